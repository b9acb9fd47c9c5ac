"""Guides of independent restarts side by side, each with its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

__all__ = ["Restart", "own_parameters", "restarts"]


class Restart(NamedTuple):
    """A guide and the state of the param store that it was fitted to; None to take its own parameters."""

    guide: Callable
    state: Mapping[str, Any] | None


def restarts(guide: Any) -> list[Restart]:
    """Return the restarts that one guide, or a sequence of guides or of pairs ``(guide, state)``, stands for.

    Raises:
        ValueError: no guide, something that is none, or two restarts with the same parameters.
    """
    several = isinstance(guide, Sequence) and not callable(guide)
    found = [_restart(entry, i) for i, entry in enumerate(guide if several else [guide])]
    if not found:
        raise ValueError("guide is an empty sequence; give one guide, or one for each restart.")
    for i, first in enumerate(found):
        for j, second in enumerate(found[:i]):
            if _same(first, second):
                raise ValueError(
                    f"guides {j} and {i} have the same parameters, so their chains would be no restarts: Pyro's param "
                    "store is shared by name. Fit each in `with pyro.get_param_store().scope() as state:` and pass "
                    "pairs (guide, state)."
                )
    return found


def _restart(entry: Any, i: int) -> Restart:
    guide, state = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None)
    if not callable(guide):
        raise ValueError(f"guide {i} is a {type(guide).__name__}, not a callable, nor a pair (guide, state).")
    if state is not None and not (isinstance(state, Mapping) and {"params", "constraints"} <= set(state)):
        raise ValueError(
            f"the state of guide {i} must be what pyro.get_param_store().get_state() returns, got "
            f"{type(state).__name__}."
        )
    return Restart(guide, state)


def _same(first: Restart, second: Restart) -> bool:
    if first.state is not None or second.state is not None:
        return first.state is second.state
    if first.guide is second.guide:
        return True
    ids = [{id(p) for p in r.guide.parameters()} if isinstance(r.guide, nn.Module) else set() for r in (first, second)]
    return bool(ids[0]) and ids[0] == ids[1]


@contextmanager
def own_parameters(restart: Restart, alone: bool, *others: Any) -> Iterator[None]:
    """Run a restart's guide at its own parameters; the param store and all modules are given back as they were.

    Pyro keeps parameters in one store by name, and a ``PyroModule`` takes over what it finds there: two guides of one
    class would silently become one.

    Args:
        restart: whose parameters are wanted.
        alone: there is no other restart, and so no doubt.
        *others: the model, and what else may be a module.
    """
    if alone and restart.state is None:
        yield
        return
    store = pyro.get_param_store()
    held = set() if restart.state is not None else _names(restart.guide)
    full: Any = store.get_state() if restart.state is None else restart.state
    state: Any = {p: {k: v for k, v in full[p].items() if k not in held} for p in ("params", "constraints")}
    modules = [m for top in (restart.guide, *others) if isinstance(top, nn.Module) for m in top.modules()]
    saved = [(module, dict(module._parameters)) for module in modules]
    try:
        with store.scope(state), _ModulesAgree():
            yield
    finally:
        for module, parameters in saved:
            module._parameters.update(parameters)


class _ModulesAgree(Messenger):
    """Refuses a state that ``pyro.module`` would pass over: a module keeps the weights that it holds."""

    def _pyro_post_param(self, msg: Any) -> None:
        given = msg["args"][1] if len(msg["args"]) > 1 else None  # what pyro.module offers as initial value
        if "$$$" in msg["name"] and isinstance(given, Tensor) and not torch.equal(given, msg["value"]):
            module = msg["name"].partition("$$$")[0]
            raise ValueError(
                f"module '{module}' holds other weights than the param store for '{msg['name']}': pyro.module does not "
                "load a module from the store. Give each restart a guide with a module of its own, and leave its "
                "weights out of the state."
            )


def _names(guide: Any) -> set[str]:
    """Names in the param store that a module's own parameters have."""
    if not isinstance(guide, PyroModule):
        return set()
    local = (name.removesuffix("_unconstrained") for name, _ in guide.named_parameters())
    return {guide._pyro_get_fullname(name) for name in local}
