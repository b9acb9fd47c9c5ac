"""The arguments of model and guide, as what may change from step to step and from call to call, and what may not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_elbo_ext.run.compiled.mutation import CompileError
from pyro_elbo_ext.run.minibatches import Minibatches

__all__ = ["Call"]

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Call:
    """One call's arguments.

    Args:
        args: positional arguments, of which the first may be :class:`Minibatches`.
        kwargs: keyword arguments.

    Attributes:
        minibatches: what each step takes its first arguments from, or None.
    """

    def __init__(self, args: tuple, kwargs: dict) -> None:
        self.minibatches = args[0] if args and isinstance(args[0], Minibatches) else None
        self._rest = (args[1:] if self.minibatches else args, dict(sorted(kwargs.items())))
        self._flat, self._spec = pytree.tree_flatten(self._rest)
        self._data = self.minibatches.tensors if self.minibatches else ()
        self._num_data = len(self._data)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All tensors, contiguous, whole data sets before other arguments."""
        return [value.contiguous() for value in (*self._data, *self._flat) if isinstance(value, Tensor)]

    @property
    def key(self) -> tuple:
        """What a compiled step depends on: not the values of tensors."""
        size = self.minibatches.batch_size if self.minibatches else None
        return tuple(map(_described, (*self._data, *self._flat))), str(self._spec), self._num_data, size

    def check(self) -> None:
        """Refuse arguments that may change unseen.

        Raises:
            CompileError: the type is named.
        """
        for value in (*self._data, *self._flat):
            if isinstance(value, Tensor) and value.layout is not torch.strided:
                raise CompileError(f"an argument is a tensor of layout {value.layout}: give dense ones.")
            if not isinstance(value, (Tensor, *PLAIN)):
                raise CompileError(
                    f"an argument is a {type(value).__name__}, of which a compiled step cannot tell whether it has "
                    "changed: give tensors, numbers and strings, and lists and dictionaries of them."
                )

    def values(self) -> list[Tensor]:
        """Return what a graph takes, the rows of a first minibatch before all tensors."""
        if self.minibatches is None:
            return self.tensors
        device = self.tensors[0].device
        return [torch.arange(self.minibatches.batch_size, device=device), *self.tensors]

    def rebuild(self, values: Sequence[Tensor]) -> tuple[tuple, dict]:
        """Return arguments made of such values."""
        rows = values[:1] if self.minibatches else ()
        data, left = values[len(rows) : len(rows) + self._num_data], iter(values[len(rows) + self._num_data :])
        args, kwargs = pytree.tree_unflatten(
            [next(left) if isinstance(v, Tensor) else v for v in self._flat], self._spec
        )
        return (*(part[rows[0]] for part in data), *args), kwargs

    def example(self) -> tuple[tuple, dict]:
        """Return a step's arguments; of the minibatches, that of the first rows."""
        return self.rebuild(self.values())

    def example_tables(self) -> list[Tensor]:
        """Return tables of one entry."""
        return [rows[None] for rows in self.values()[:1]] if self.minibatches else []

    def next(self) -> tuple[tuple, dict]:
        """Return the next step's arguments."""
        args, kwargs = self._rest
        return (*(self.minibatches.take(self.minibatches.rows(1)[0]) if self.minibatches else ()), *args), kwargs

    def sample(self) -> tuple[tuple, dict]:
        """Return arguments for a look at the loss, which takes no minibatch from those of the steps."""
        args, kwargs = self._rest
        return (*(self.minibatches.sample() if self.minibatches else ()), *args), kwargs

    def put_back(self, tables: list[Tensor], taken: int) -> None:
        """Give back the minibatches of steps that were not taken."""
        if self.minibatches is not None:
            self.minibatches.put_back(tables[0][taken:])

    def tables(self, num: int) -> list[Tensor]:
        """Return what differs from step to step, each with one entry for each of so many steps."""
        return [self.minibatches.rows(num).to(self.tensors[0].device)] if self.minibatches else []


def _described(value: Any) -> tuple:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device, value.requires_grad
    return type(value), repr(value)
