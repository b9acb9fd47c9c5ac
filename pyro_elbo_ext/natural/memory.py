"""What a natural-gradient optimiser remembers of one site from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_elbo_ext.natural.blocks import Move
from pyro_elbo_ext.natural.ivon import Momentum
from pyro_elbo_ext.natural.retreat import Trail

__all__ = ["STATISTICS", "SiteMemory", "add_up"]

STATISTICS = ("step", "kl", "largest_kl", "backtracks", "retreats", "rejected")


@dataclass
class SiteMemory:
    """One site's share of the optimiser's state.

    Attributes:
        num_steps: taken so far.
        statistics: of the last step (size, KL) and of all (backtracks, retreats, rejections), in one tensor, so that
            nothing is waited for on a GPU before a report.
        trail: how the steps have gone.
        momentum: of the IVON mode.
        average: mean of the iterates in natural coordinates.
        num_averaged: how many iterates are in it.
    """

    num_steps: int = 0
    statistics: Tensor | None = None
    trail: Trail | None = None
    momentum: Momentum | None = None
    average: dict[str, Tensor] | None = None
    num_averaged: int = 0

    def note(self, move: Move) -> None:
        """Take down what a step did."""
        self.statistics = add_up(move, self.statistics)
        self.num_steps += 1

    def add_to_average(self, natural: Mapping[str, Tensor]) -> None:
        """Average one more iterate in."""
        self.num_averaged += 1
        before = self.average or natural
        self.average = {n: torch.lerp(before[n], value, 1 / self.num_averaged) for n, value in natural.items()}

    def numbers(self) -> dict[str, float]:
        """Return the statistics by name."""
        values = [0.0] * len(STATISTICS) if self.statistics is None else self.statistics.tolist()
        return dict(zip(STATISTICS, values, strict=True))

    def get_state(self) -> dict[str, Any]:
        """Return tensors, numbers, strings and dictionaries of them."""
        state: dict[str, Any] = {"num_steps": self.num_steps, "num_averaged": self.num_averaged}
        parts = {"statistics": self.statistics, "average": self.average}
        parts |= {
            "trail": None if self.trail is None else self.trail._asdict(),
            "momentum": None if self.momentum is None else self.momentum._asdict(),
        }
        return state | {name: part for name, part in parts.items() if part is not None}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> SiteMemory:
        """Return what :meth:`get_state` described, on the device of the site's parameters."""
        kept = {name: _moved(part, device) for name, part in state.items()}
        for name, kind in (("trail", Trail), ("momentum", Momentum)):
            if name in kept:
                kept[name] = kind(**kept[name])
        return cls(**kept)


def add_up(move: Move, before: Tensor | None) -> Tensor:
    """Return the statistics after a step, ``[6]``."""
    last = [move.step.mean(), move.kl.sum(), move.kl.max()]
    total = torch.stack([flag.sum().to(move.kl) for flag in (move.backtracks, move.retreated, move.rejected)])
    if before is not None:
        total = total + before[len(last) :]
    return torch.cat([torch.stack(last), total])


def _moved(part: Any, device: torch.device) -> Any:
    if isinstance(part, Mapping):
        return {name: _moved(value, device) for name, value in part.items()}
    return part.to(device) if isinstance(part, Tensor) else part
