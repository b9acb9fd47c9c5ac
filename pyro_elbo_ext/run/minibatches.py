"""Random minibatches of tensors, for steps that take them by index."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_elbo_ext.run.stopping import whole_number

__all__ = ["Minibatches"]


class Minibatches:
    """Rows of tensors in random minibatches of one size, in another order in every epoch.

    Iterating gives the tuples of one epoch, as a ``DataLoader`` that shuffles and drops the incomplete last one. A
    :class:`~pyro_elbo_ext.CompiledSVI` is given the object itself, as the first argument of ``step`` or ``run``, or by
    ``fit(..., batches=...)``: every step then has the next minibatch's tensors as first arguments, taken by index
    inside the compiled call. The model says itself how much of the data a minibatch stands for, as by
    ``poutine.scale(scale=N / len(x))``.

    The order is from a generator of their own, which takes its seed from torch's random state when it is first needed;
    ``fit`` starts each run with a new one. So it does not matter for a run how many steps are taken at once.

    Args:
        *tensors: the data, each ``[N, ...]``.
        batch_size: rows of a minibatch, at most N.

    Attributes:
        generator: None before the first epoch.

    Raises:
        ValueError: no tensors, tensors of different lengths, or a size that is not from 1 to N.
    """

    def __init__(self, *tensors: Tensor, batch_size: int) -> None:
        lengths = {len(t) if isinstance(t, Tensor) and t.dim() else -1 for t in tensors}
        if len(lengths) != 1 or -1 in lengths:
            found = ", ".join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in tensors)
            raise ValueError(f"give tensors of one first dimension, got {found or 'none'}")
        (self.num_rows,) = lengths
        self.batch_size = whole_number("batch_size", batch_size)
        if self.batch_size > self.num_rows:
            raise ValueError(f"batch_size must be a whole number from 1 to {self.num_rows}, got {batch_size!r}")
        self.tensors = tensors
        self.generator: torch.Generator | None = None
        self._left = torch.empty(0, self.batch_size, dtype=torch.int64, device="cpu")  # of the present epoch

    def __len__(self) -> int:
        return self.num_rows // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return (self.take(rows) for rows in self.epoch())

    def epoch(self) -> Tensor:
        """Return the rows of a new epoch's minibatches, ``[minibatches, batch_size]``."""
        self.prepare()
        order = torch.randperm(self.num_rows, generator=self.generator, device="cpu")
        return order[: len(self) * self.batch_size].view(-1, self.batch_size)

    def prepare(self) -> None:
        """Make the generator where there is none."""
        if self.generator is None:
            self.generator = torch.Generator("cpu")
            self.generator.manual_seed(int(torch.randint(2**62, (), device="cpu")))

    def take(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors' rows of these indices."""
        return tuple(tensor[rows.to(tensor.device)] for tensor in self.tensors)

    def rows(self, num: int) -> Tensor:
        """Return the next rows, ``[num, batch_size]``, epoch after epoch."""
        while len(self._left) < num:
            self._left = torch.cat([self._left, self.epoch()])
        now, self._left = self._left[:num], self._left[num:]
        return now

    def put_back(self, rows: Tensor) -> None:
        """Take these rows next, which were not needed."""
        self._left = torch.cat([rows.to("cpu"), self._left])

    def sample(self) -> tuple[Tensor, ...]:
        """Return a random minibatch beside the epochs, from torch's random state."""
        return self.take(torch.randperm(self.num_rows, device="cpu")[: self.batch_size])

    def fresh(self) -> Minibatches:
        """Return minibatches of the same tensors in an order of their own."""
        return Minibatches(*self.tensors, batch_size=self.batch_size)

    def at(self, rows: Tensor) -> Minibatches:
        """Return minibatches of the same tensors, of which the next are these rows."""
        other = self.fresh()
        other.put_back(rows)
        return other
