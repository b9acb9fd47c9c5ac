"""How a flow guide lives with Pyro's param store, state dicts, copies and pickles."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_elbo_ext.guides.packing import Packing

__all__ = ["SavedGuide"]


class SavedGuide(AutoGuide):
    """An AutoGuide whose parameters come from its own modules, from a state loaded before they are made, or a store.

    Attributes:
        _packing: where its flows' parameters lie in one vector, None before they are made or where they are apart.
        _unloaded: a state that came before the parameters were made.
        _registered: the param store knows what the guide has.
        _loaded: what the guide has goes before what the param store has.
    """

    _packing: Packing | None
    _unloaded: dict[str, Tensor] | None
    _registered: bool
    _loaded: bool

    def __init__(self, model: Callable, create_plates: Callable | None = None) -> None:
        super().__init__(model, create_plates=create_plates)
        self._packing = self._unloaded = None
        self._registered = self._loaded = False

    @property
    def _built(self) -> bool:
        return "flows" in self._modules

    def _is_registered(self) -> bool:
        """Tell whether the param store still has what the guide has: it may be cleared or loaded at any time."""
        if not self._registered or pyro.settings.get("module_local_params"):
            return self._registered
        name, parameter = next(self.named_parameters())
        store = pyro.get_param_store()
        return store._params.get(self._store_name(name)) is parameter and self._pyro_get_fullname("start") in store

    def _store_name(self, name: str) -> str:
        head, _, tail = name.partition(".")
        return self._pyro_get_fullname(head) + (f"$$${tail}" if tail else "")

    def _register(self) -> None:
        """Make the parameters known to Pyro's param store, or take over what it has been loaded with."""
        self._registered = True
        if pyro.settings.get("module_local_params"):
            return
        store = pyro.get_param_store()
        start = self._pyro_get_fullname("start")
        modules = [
            self._modules[name] for name in ("flows", "rows") if name in self._modules
        ]  # which registers nothing
        buffers = [b for module in modules if module for b in module.buffers() if b.is_floating_point()]
        for name, parameter in self.named_parameters():
            self._claim(self._store_name(name), parameter, start in store)
        if self._loaded and start in store:
            del store[start]
        self._loaded = False
        if start in store:
            for buffer, part in zip(buffers, store[start].detach().split([b.numel() for b in buffers]), strict=True):
                buffer.copy_(part.reshape(buffer.shape))
        else:  # an optimiser leaves alone what no loss depends on
            pyro.param(start, torch.cat([buffer.reshape(-1) for buffer in buffers]))

    def _claim(self, full: str, parameter: Tensor, is_ours: bool) -> None:
        """Take a parameter's value from the store, unless this guide's goes first, and leave its name free for it."""
        store = pyro.get_param_store()
        if full not in store or store._params[full] is parameter:
            return
        if not self._loaded:
            stored = store[full].detach()
            if stored.shape != parameter.shape or not is_ours:
                raise ValueError(
                    f"the param store holds '{full}' of shape {tuple(stored.shape)}, where this guide's has "
                    f"{tuple(parameter.shape)}: it is another guide's. Call pyro.clear_param_store() first."
                )
            parameter.data.copy_(stored)
        del store[full]

    def _supersede(self) -> None:
        """Let what the guide has now replace what the param store has, at the next run."""
        self._loaded, self._registered = True, False

    @property
    def model(self) -> Any:
        """The model, None where it could not be pickled with the guide."""
        return self._model[0]

    @model.setter
    def model(self, model: Callable) -> None:
        self._model = (model,)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be pickled: weak references, and a model that is not importable."""
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)
        if self._packing is not None:
            self._packing.cut()
        state = self.__dict__.copy()
        state["master"] = None
        state["prototype_trace"] = None
        for name in ("_model", "_make"):
            try:
                pickle.dumps(state[name])
            except (pickle.PicklingError, AttributeError, TypeError):
                state[name] = (None,)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> SavedGuide:
        """Copy all but the model and the flow's maker, which two guides may share."""
        shared = {name: self.__dict__[name] for name in ("_model", "_make")}
        state = {name: value for name, value in self.__getstate__().items() if name not in shared}
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(state, memo) | shared)
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Keep a state that comes before the parameters are made until they are."""
        self._supersede()
        if self._built:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        else:
            own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
            self._unloaded = {name: value.detach().clone() for name, value in own.items()}
