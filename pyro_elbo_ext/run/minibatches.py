"""Random minibatches of tensors, for steps that take them by index."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["Minibatches"]


class Minibatches:
    """Rows of tensors in random minibatches of one size, in another order in every epoch.

    Iterating gives the tuples of one epoch, as a ``DataLoader`` that shuffles and drops the incomplete last one. A
    :class:`~pyro_elbo_ext.CompiledSVI` is given the object itself, as the first argument of ``step`` or ``run``, or by
    ``fit(..., batches=...)``: every step then has the next minibatch's tensors as first arguments, taken by index
    inside the compiled call. The model says itself how much of the data a minibatch stands for, as by
    ``poutine.scale(scale=N / len(x))``. The order is from torch's random state on the CPU.

    Args:
        *tensors: the data, each ``[N, ...]``.
        batch_size: rows of a minibatch, at most N.

    Raises:
        ValueError: no tensors, tensors of different lengths, or a size that is not from 1 to N.
    """

    def __init__(self, *tensors: Tensor, batch_size: int) -> None:
        lengths = {len(t) if isinstance(t, Tensor) and t.dim() else -1 for t in tensors}
        if len(lengths) != 1 or -1 in lengths:
            found = ", ".join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in tensors)
            raise ValueError(f"give tensors of one first dimension, got {found or 'none'}")
        (self.num_rows,) = lengths
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or not 1 <= batch_size <= self.num_rows:
            raise ValueError(f"batch_size must be a whole number from 1 to {self.num_rows}, got {batch_size!r}")
        self.tensors = tensors
        self.batch_size = batch_size
        self._left = torch.empty(0, batch_size, dtype=torch.int64, device="cpu")  # of the present epoch

    def __len__(self) -> int:
        return self.num_rows // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return (self.take(rows) for rows in self.epoch())

    def epoch(self) -> Tensor:
        """Return the rows of a new epoch's minibatches, ``[minibatches, batch_size]``."""
        order = torch.randperm(self.num_rows, device="cpu")
        return order[: len(self) * self.batch_size].view(-1, self.batch_size)

    def take(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors' rows of these indices."""
        return tuple(tensor[rows.to(tensor.device)] for tensor in self.tensors)

    def rows(self, num: int) -> Tensor:
        """Return the next rows, ``[num, batch_size]``, epoch after epoch."""
        while len(self._left) < num:
            self._left = torch.cat([self._left, self.epoch()])
        now, self._left = self._left[:num], self._left[num:]
        return now

    def at(self, rows: Tensor) -> Minibatches:
        """Return minibatches of the same tensors, of which the next are these rows."""
        other = Minibatches(*self.tensors, batch_size=self.batch_size)
        other._left = rows
        return other
