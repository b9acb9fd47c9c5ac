"""Natural-gradient steps as a function of flat tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_elbo_ext.natural import NaturalGradient
from pyro_elbo_ext.natural.arguments import SCHEDULES
from pyro_elbo_ext.natural.blocks import Block, Move, Rate, natural_step
from pyro_elbo_ext.natural.ivon import Momentum, ivon_step
from pyro_elbo_ext.natural.memory import STATISTICS, SiteMemory, add_up
from pyro_elbo_ext.natural.retreat import Trail, no_trail
from pyro_elbo_ext.run.compiled.updates import TorchUpdate

__all__ = ["NaturalUpdate"]


class NaturalUpdate:
    """The step of :class:`~pyro_elbo_ext.NaturalGradient`, and of its inner optimiser beside it.

    Args:
        optim: the optimiser, which has discovered its guide.
        leaves: unconstrained parameters by name, in the order of coordinates.

    Raises:
        ValueError: an inner optimiser that is not known here, or a site of which only some parameters have a gradient.
    """

    def __init__(self, optim: NaturalGradient, leaves: Mapping[str, Tensor]) -> None:
        self._optim, self._leaves = optim, dict(leaves)
        self._blocks: dict[str, Block] = {}
        for site, block in optim.blocks.items():
            found = [name in leaves for name in block.names.values()]
            if any(found) and not all(found):
                names = ", ".join(map(repr, block.names.values()))
                raise ValueError(f"the loss depends on only some of {names}, the parameters of guide site '{site}'.")
            if all(found):
                self._blocks[site] = block
        natural = {name for block in self._blocks.values() for name in block.names.values()}
        rest = {name: leaf for name, leaf in leaves.items() if name not in natural}
        self._inner = TorchUpdate(optim.inner, rest) if rest else None
        self._rest = list(rest)
        self._settings = self._read_settings()

    def _read_settings(self) -> tuple:
        optim = self._optim
        blocks = [(site, id(optim.blocks.get(site))) for site in self._blocks]
        return optim.schedule, optim.max_kl, optim.retreat, optim.average_after, optim.ivon, blocks

    def is_current(self) -> bool:
        """Tell whether the optimiser still has the blocks and settings that this was made for."""
        return self._settings == self._read_settings() and (self._inner is None or self._inner.is_current())

    def read(self) -> dict[str, Any]:
        """Return the optimiser's state as it is now.

        Raises:
            ValueError: within ``averaged()``.
        """
        self._optim.check_can_step()
        kept = {site: self._read_site(site, block) for site, block in self._blocks.items()}
        inner = () if self._inner is None else self._inner.read()
        return {"lr": self._number(self._optim.lr), "count": self._number(self._optim.num_steps)} | {
            "sites": kept, "inner": inner,
        }  # fmt: skip

    def _number(self, value: float) -> Tensor:
        device = next(iter(self._leaves.values())).device
        return torch.tensor(float(value), dtype=torch.float64, device=device)

    def _read_site(self, site: str, block: Block) -> dict[str, Any]:
        memory = self._optim._memory.get(site, SiteMemory())
        leaves = {argument: self._leaves[name].detach() for argument, name in block.names.items()}
        statistics = self._number(0.0).expand(len(STATISTICS)) if memory.statistics is None else memory.statistics
        state: dict[str, Any] = {"count": self._number(memory.num_steps), "statistics": statistics.clone()}
        if self._optim.ivon is None:
            state["trail"] = _begin(block, leaves) if memory.trail is None else memory.trail
        else:
            zero = torch.zeros_like(block.read(leaves)["loc"])
            state["momentum"] = Momentum(zero, zero.clone()) if memory.momentum is None else memory.momentum
        if self._optim.average_after is not None:
            natural = block.family.natural(block.read(leaves))
            state["average"] = natural if memory.average is None else memory.average
            state["num_averaged"] = self._number(memory.num_averaged)
        return state

    def tables(self, num: int, done: int) -> list[Tensor]:
        """Return the factors of a schedule that is the user's function."""
        schedule, now = self._optim.schedule, self._optim.num_steps + done
        if isinstance(schedule, str):
            return []
        return [torch.stack([self._number(schedule(now + i)) for i in range(num)])]

    def step(
        self, state: Mapping[str, Any], flat: Tensor, grad: Tensor, entries: Sequence[Tensor] = ()
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return coordinates and state after a step: pure tensor code."""
        sizes = [leaf.numel() for leaf in self._leaves.values()]
        parts, slopes = (dict(zip(self._leaves, t.split(sizes), strict=True)) for t in (flat, grad))
        count, sites = state["count"] + 1, dict(state["sites"])
        rate = self._rate(state["lr"], entries)
        for site, block in self._blocks.items():
            leaves, grads = (
                {a: values[name].reshape(self._leaves[name].shape) for a, name in block.names.items()}
                for values in (parts, slopes)
            )
            new, sites[site] = self._step_site(block, leaves, grads, rate, count, state["sites"][site])
            parts |= {block.names[argument]: value.reshape(-1) for argument, value in new.items()}
        inner = state["inner"]
        if self._inner is not None:
            rest, slope = (torch.cat([values[name] for name in self._rest]) for values in (parts, slopes))
            rest, inner = self._inner.step(inner, rest, slope)
            widths = [self._leaves[name].numel() for name in self._rest]
            parts |= dict(zip(self._rest, rest.split(widths), strict=True))
        after = {"lr": state["lr"], "count": count, "sites": sites, "inner": inner}
        return torch.cat([parts[name] for name in self._leaves]), after

    def _rate(self, lr: Tensor, entries: Sequence[Tensor]) -> Rate:
        if isinstance(self._optim.schedule, str):
            schedule = SCHEDULES[self._optim.schedule]
            return lambda clock: lr * schedule(clock)
        (factor,) = entries
        return lambda clock: (lr * factor).expand_as(clock)

    def _step_site(
        self, block: Block, leaves: dict, grads: dict, rate: Rate, count: Tensor, state: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return one site's parameters and memory after a step."""
        optim, state = self._optim, dict(state)
        move: Move
        if optim.ivon is None:
            watched = optim.retreat > 0 and block.share == 1
            opening = count <= optim.retreat
            new, move, state["trail"] = natural_step(
                block, leaves, grads, rate, optim.max_kl, state["trail"], watched, opening
            )
        else:
            new, move, state["momentum"] = ivon_step(
                block, leaves, grads, rate, optim.ivon, state["momentum"], state["count"]
            )
        state["statistics"] = add_up(move, state["statistics"])
        state["count"] = state["count"] + 1
        if optim.average_after is not None:
            begun = count > optim.average_after
            state["num_averaged"] = state["num_averaged"] + begun
            weight, natural = begun / state["num_averaged"].clamp(min=1), block.family.natural(block.read(new))
            state["average"] = {n: torch.lerp(old, natural[n], weight) for n, old in state["average"].items()}
        return new, state

    def write(self, state: Mapping[str, Any]) -> None:
        """Make the optimiser's own state that of a function's result."""
        self._optim.num_steps = round(state["count"].item())
        for site, kept in state["sites"].items():
            memory = self._optim._memory.setdefault(site, SiteMemory())
            memory.num_steps, memory.statistics = round(kept["count"].item()), kept["statistics"]
            memory.trail, memory.momentum = kept.get("trail"), kept.get("momentum")
            if "average" in kept and kept["num_averaged"] > 0:
                memory.average, memory.num_averaged = kept["average"], round(kept["num_averaged"].item())
        if self._inner is not None:
            self._inner.write(state["inner"])


def _begin(block: Block, leaves: Mapping[str, Tensor]) -> Trail:
    """Return the trail of a site that took no step yet."""
    still = {argument: torch.zeros_like(leaf) for argument, leaf in leaves.items()}
    begun = natural_step(block, leaves, still, lambda clock: clock, None)[2]
    return no_trail(begun.natural, begun.fall)
