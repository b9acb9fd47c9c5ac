"""Buffers of models and guides that are modules: what a step may change besides parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["module_buffers", "unchanged"]


def module_buffers(part: Any) -> dict[str, Tensor]:
    """Return the buffers of a model or guide that is a module, or a method of one; none of anything else."""
    module = part if isinstance(part, nn.Module) else getattr(part, "__self__", None)
    return dict(module.named_buffers()) if isinstance(module, nn.Module) else {}


@contextmanager
def unchanged(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Give tensors back the values that they had."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
