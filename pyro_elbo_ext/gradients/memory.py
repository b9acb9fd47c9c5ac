"""What an estimator remembers from step to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

__all__ = ["Memory", "Trained"]


class Trained(nn.Module):
    """A module whose parameters, if any, the optimiser of ``SVI`` trains: the loss registers it with Pyro.

    What the param store holds under its name is taken over, so that two modules of one name are one; values that
    ``load_state_dict`` has put into this module come first.

    Attributes:
        param_name: its name in the param store.
    """

    param_name: str = "baseline"

    def __init__(self) -> None:
        super().__init__()
        self._restored = False
        self.register_load_state_dict_post_hook(_note_restored)

    def register(self) -> None:
        """Make the parameters known to Pyro."""
        if next(self.parameters(), None) is None:
            return
        mine = {name: p.detach().clone() for name, p in self.named_parameters()} if self._restored else {}
        pyro.module(self.param_name, self, update_module_params=True)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if name in mine:
                    p.copy_(mine[name])
        self._restored = False


def _note_restored(module: Any, incompatible_keys: Any) -> None:
    module._restored = True


class Memory(nn.Module):
    """Keeps tensors by key: in ``state_dict()``, moved by ``to()``, changed in place, and never parameters."""

    def __init__(self) -> None:
        super().__init__()
        self._memory: dict[str, Tensor] = {}

    def recall(self, key: str, example: Tensor, shape: Sequence[int] = ()) -> Tensor:
        """Return the tensor under a key, zeros like the example at first, on the device of the example.

        Raises:
            ValueError: it has another shape, from another model.
        """
        kept = self._memory.get(key)
        if kept is None or kept.device != example.device:  # a checkpoint's is on the CPU
            kept = example.new_zeros(tuple(shape)) if kept is None else kept.to(example.device)
            self._memory[key] = kept
        if kept.shape != tuple(shape):
            raise ValueError(
                f"{type(self).__name__} remembers '{key}' with shape {tuple(kept.shape)}, but it now has "
                f"{tuple(shape)}: it was used with another model. Give each model an object of its own."
            )
        return kept

    @staticmethod
    def average(kept: Tensor, seen: Tensor, decay: float) -> None:
        """Take a value into a moving average, in place; one that is not finite is left out, as its step will be."""
        kept.copy_(torch.where(seen.isfinite(), decay * kept + (1 - decay) * seen, kept))

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return what is remembered, for ``state_dict``."""
        return {key: value.clone() for key, value in self._memory.items()}

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state_dict`` held."""
        self._memory = {key: value.clone() for key, value in state.items()}

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        self._memory = {key: fn(value) for key, value in self._memory.items()}
        return super()._apply(fn, recurse)
