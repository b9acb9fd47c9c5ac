"""What a natural-gradient optimiser is told, and what it refuses to be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_elbo_ext.natural.ivon import IVON

__all__ = ["SCHEDULES", "check_arguments", "check_mode"]


def inverse(step: Tensor) -> Tensor:
    """Full steps at first, then falling with the number of steps, so that the noise of the iterates averages out."""
    return 1 / (1 + 0.25 * (step - 6).clamp(min=0.0))


SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {"inverse": inverse, "constant": torch.ones_like}


def check_arguments(
    guide: Any, lr: Any, schedule: Any, max_kl: Any, retreat: Any, optim: Any, average_after: Any, clip_args: Any
) -> None:
    """Refuse what would not be a natural-gradient step."""
    if isinstance(guide, (PyroOptim, dict, float, int)) or (guide is not None and not callable(guide)):
        raise ValueError(
            f"guide must be the guide or None, got {guide!r}. The optimiser of other parameters is optim=..., the step "
            "size lr=..."
        )
    if isinstance(lr, Mapping):
        raise ValueError(
            f"lr must be a number, got {dict(lr)!r}: betas and the like would rescale the natural gradient, which has "
            "its scale already. The optimiser of all other parameters takes them, as in optim=Adam({...})."
        )
    if not isinstance(lr, (int, float)) or isinstance(lr, bool) or not lr > 0:
        raise ValueError(f"lr must be a positive number, got {lr!r}")
    if not callable(schedule) and schedule not in SCHEDULES:
        names = ", ".join(f'"{name}"' for name in SCHEDULES)
        raise ValueError(f"schedule must be one of {names} or a function of the step, got {schedule!r}")
    if max_kl is not None and (isinstance(max_kl, bool) or not isinstance(max_kl, (int, float)) or not max_kl > 0):
        raise ValueError(f"max_kl must be a positive number of nats or None, got {max_kl!r}")
    if optim is not None and not isinstance(optim, PyroOptim):
        raise ValueError(f"optim must be a pyro.optim.PyroOptim for the other parameters, got {optim!r}")
    if isinstance(retreat, bool) or not isinstance(retreat, int) or retreat < 0:
        raise ValueError(f"retreat must be a number of opening steps, 0 for none, got {retreat!r}")
    if average_after is not None and (not isinstance(average_after, int) or average_after < 0):
        raise ValueError(f"average_after must be a number of steps or None, got {average_after!r}")
    if clip_args is not None:
        raise ValueError(
            f"clip_args={clip_args!r} would cut natural gradients coordinate by coordinate, which turns them. Use "
            "max_kl=..., a limit on the step that is the same in any coordinates; optim= may clip what is its own."
        )


def check_mode(
    mode: str, max_kl: float | None, precision_lr: float | None, momentum: float | None, clip_radius: float | None
) -> IVON | None:
    """Return the IVON mode's numbers, or None for natural steps; refuse what belongs to the other mode."""
    if mode not in ("natural", "ivon"):
        raise ValueError(f'mode must be "natural" or "ivon", got {mode!r}')
    own = {"precision_lr": precision_lr, "momentum": momentum, "clip_radius": clip_radius}
    foreign = own if mode == "natural" else {"max_kl": max_kl}
    given = [name for name, value in foreign.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} does nothing under mode={mode!r}. Leave it out, or change the mode.")
    if mode == "natural":
        return None
    defaults = IVON()
    rho = defaults.precision_lr if precision_lr is None else precision_lr
    beta = defaults.momentum if momentum is None else momentum
    if not 0 < rho <= 1 or not 0 <= beta < 1 or (clip_radius is not None and not clip_radius > 0):
        raise ValueError(
            "mode='ivon' needs 0 < precision_lr <= 1, 0 <= momentum < 1 and clip_radius above 0 or None, got "
            f"{rho!r}, {beta!r} and {clip_radius!r}"
        )
    return IVON(rho, beta, clip_radius)
