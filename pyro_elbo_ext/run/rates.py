"""The step size of a Pyro optimiser, whichever it is: read and scaled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pyro.optim import PyroOptim

from pyro_elbo_ext.natural.optim import NaturalGradient

__all__ = ["learning_rate", "scale_learning_rate"]


def learning_rate(optim: PyroOptim) -> float:
    """Return the step size of the first parameter met, or lr of a ``NaturalGradient``; NaN before the first step."""
    if isinstance(optim, NaturalGradient):
        return optim.lr
    return next((float(group["lr"]) for group in _groups(optim) if "lr" in group), math.nan)


def scale_learning_rate(optim: PyroOptim, factor: float, only_new: bool = False) -> None:
    """Multiply all step sizes by a factor, those of parameters not met yet included.

    Args:
        optim: the optimiser, its schedulers and an inner optimiser with it.
        factor: to multiply by.
        only_new: leave out what an optimiser's loaded state brings along.

    Raises:
        ValueError: an optimiser without a learning rate.
    """
    if isinstance(optim, NaturalGradient):
        optim.lr *= factor  # no part of its state
        scale_learning_rate(optim.inner, factor, only_new)
        return
    if not only_new:
        for group in _groups(optim):
            group["lr"] = group["lr"] * factor
            if "initial_lr" in group:
                group["initial_lr"] = group["initial_lr"] * factor
        for scheduler in optim.optim_objs.values():
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
    optim.pt_optim_args = _scaled(optim.pt_optim_args, factor)


def _groups(optim: PyroOptim) -> Iterator[dict[str, Any]]:
    for own in optim.optim_objs.values():
        yield from getattr(own, "optimizer", own).param_groups


def _scaled(given: Any, factor: float) -> Any:
    """Scale the arguments that a new parameter's optimiser is made with."""
    if callable(given):
        return _ScaledArguments(given, factor)
    if "lr" in given:
        return {**given, "lr": given["lr"] * factor}
    raise ValueError(f"the optimiser was given {given} and so has no learning rate to scale: give it an lr.")


class _ScaledArguments:
    """Arguments by parameter name, their step size scaled."""

    def __init__(self, given: Any, factor: float) -> None:
        self._given, self._factor = given, factor

    def __call__(self, *names: str) -> Any:
        return _scaled(self._given(*names), self._factor)
