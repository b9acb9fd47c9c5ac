"""The step size of a Pyro optimiser, whichever it is: read, scaled, and saved."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler

from pyro_elbo_ext.natural.optim import NaturalGradient

__all__ = ["check_rates", "get_rates", "learning_rate", "scale_learning_rate", "set_rates"]

OWN_RATES = ("max_lr", "base_lr", "eta_min")  # what schedulers are given beside the optimiser's lr


def learning_rate(optim: PyroOptim) -> float:
    """Return the step size of the first parameter met, or lr of a ``NaturalGradient``; NaN before the first step."""
    if isinstance(optim, NaturalGradient):
        return optim.lr
    return next((float(group["lr"]) for group in _groups(optim) if "lr" in group), math.nan)


def check_rates(optim: PyroOptim) -> None:
    """Look whether :func:`scale_learning_rate` can do its work.

    Raises:
        ValueError: an optimiser without a learning rate, or a scheduler with more than one.
    """
    if isinstance(optim, NaturalGradient):
        check_rates(optim.inner)
        return
    own = [name for name in OWN_RATES if isinstance(optim, PyroLRScheduler) and optim.kwargs.get(name)]
    if own:
        raise ValueError(
            f"the scheduler was given {' and '.join(own)}, which cannot be "
            "scaled with the learning rate of its optimiser. Use one whose rates all follow from that, such as "
            'ExponentialLR, or stop="budget".'
        )
    given, _ = _given(optim)
    default = _default_rate(optim)
    if default is None and (callable(given) or "lr" not in given):
        raise ValueError(
            f"{getattr(optim.pt_optim_constructor, '__name__', 'the optimiser')} was given {given} and has no learning "
            'rate "lr" to scale: use another optimiser such as pyro.optim.Adam({"lr": 0.01}), or stop="budget".'
        )


def scale_learning_rate(optim: PyroOptim, factor: float) -> None:
    """Multiply all step sizes by a factor, those of parameters not met yet included.

    Args:
        optim: the optimiser, its schedulers and an inner optimiser with it.
        factor: to multiply by.

    Raises:
        ValueError: an optimiser without a learning rate, or a scheduler with more than one.
    """
    check_rates(optim)
    if isinstance(optim, NaturalGradient):
        optim.lr *= factor
        scale_learning_rate(optim.inner, factor)
        return
    for group in _groups(optim):
        group.update({name: group[name] * factor for name in ("lr", "initial_lr") if name in group})
    for scheduler in optim.optim_objs.values():
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
    _scale_new(optim, _given(optim)[1] * factor)


def get_rates(optim: PyroOptim) -> dict[str, Any]:
    """Return what an optimiser's own state lacks of its step sizes: those that new parameters will get."""
    if isinstance(optim, NaturalGradient):
        return {"lr": optim.lr, "inner": get_rates(optim.inner)}
    return {"scale": _given(optim)[1]}


def set_rates(optim: PyroOptim, state: Mapping[str, Any]) -> None:
    """Take over what :func:`get_rates` returned, whatever the optimiser was scaled by before."""
    if isinstance(optim, NaturalGradient):
        optim.lr = state["lr"]
        set_rates(optim.inner, state["inner"])
    elif state["scale"] != _given(optim)[1]:
        _scale_new(optim, state["scale"])


def _groups(optim: PyroOptim) -> Iterator[dict[str, Any]]:
    for own in optim.optim_objs.values():
        yield from getattr(own, "optimizer", own).param_groups


class _ScaledArguments(dict):
    """Arguments that a new parameter's optimiser is made with, their step size scaled."""

    def __init__(self, given: Mapping[str, Any], scale: float, default: float | None) -> None:
        super().__init__(given, lr=given.get("lr", default) * scale)
        self.given, self.scale = given, scale


class _ScaledFunction:
    """Such arguments by parameter name."""

    def __init__(self, given: Callable, scale: float, default: float | None) -> None:
        self.given, self.scale, self._default = given, scale, default

    def __call__(self, *names: str) -> Any:
        return _ScaledArguments(self.given(*names), self.scale, self._default)


def _given(optim: PyroOptim) -> tuple[Any, float]:
    """Return the arguments as the user gave them, and what they have been scaled by."""
    args = optim.pt_optim_args
    return (args.given, args.scale) if isinstance(args, (_ScaledArguments, _ScaledFunction)) else (args, 1.0)


def _scale_new(optim: PyroOptim, scale: float) -> None:
    given, _ = _given(optim)
    kind = _ScaledFunction if callable(given) else _ScaledArguments
    optim.pt_optim_args = kind(given, scale, _default_rate(optim))


def _default_rate(optim: PyroOptim) -> float | None:
    """Return the learning rate that an optimiser has without being told, None where it has none."""
    constructor: Any = optim.pt_optim_constructor
    try:
        known = inspect.signature(constructor).parameters
    except ValueError:  # none to be had
        return None
    return known["lr"].default if "lr" in known and isinstance(known["lr"].default, float) else None
