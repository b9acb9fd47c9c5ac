"""Many parameters as one vector: an eager step pays for each parameter, in registering, stepping and clipping it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_elbo_ext.guides.zuko import take_mask

__all__ = ["Packing", "zero_nonfinite"]


class Packing:
    """Where the parameters of a module lie in one vector.

    Args:
        module: whose parameters are taken out of it; they are plain tensors from then on, set by :meth:`unpack`.

    Attributes:
        first: the vector at first.
        mask: by what it is multiplied for all masked layers at once.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places: list[tuple[nn.Module, str]] = []
        self._shapes: list[torch.Size] = []
        values: list[Tensor] = []
        masks: list[Tensor] = []
        for part in module.modules():
            mask = take_mask(part)
            for name, parameter in list(part.named_parameters(recurse=False)):
                value = parameter.detach()
                self._places.append((part, name))
                self._shapes.append(value.shape)
                values.append(value.reshape(-1))
                masks.append(
                    (mask.to(value) if mask is not None and name == "weight" else torch.ones_like(value)).reshape(-1)
                )
                del part._parameters[name]
        self._sizes = [len(value) for value in values]
        self.first, self.mask = torch.cat(values), torch.cat(masks)
        self.unpack(self.first, self.mask)

    def unpack(self, vector: Tensor, mask: Tensor) -> None:
        """Set the module's tensors to views of a vector, through which gradients flow back to it, where finite."""
        masked = vector * mask
        if masked.requires_grad:
            masked.register_hook(zero_nonfinite)
        parts = masked.split(self._sizes)
        for (module, name), part, shape in zip(self._places, parts, self._shapes, strict=True):
            module.__dict__[name] = part if len(shape) == 1 else part.view(shape)

    def pack(self) -> Tensor:
        """Return the vector of the module's tensors as they are now."""
        return torch.cat([module.__dict__[name].reshape(-1) for module, name in self._places])

    def cut(self) -> None:
        """Cut the views off their history, which cannot be copied."""
        for module, name in self._places:
            module.__dict__[name] = module.__dict__[name].detach()


def zero_nonfinite(slope: Tensor) -> Tensor:
    """A draw that overflows on the way makes the slope of what it met not a number: step nothing by that."""
    return slope.nan_to_num(0.0, 0.0, 0.0)
