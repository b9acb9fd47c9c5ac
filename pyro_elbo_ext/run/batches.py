"""The arguments of each step: always the same, or minibatches, taken up again where a run was interrupted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Generator

from pyro_elbo_ext.run.minibatches import Minibatches
from pyro_elbo_ext.run.random_state import get_rng_state, set_rng_state

__all__ = ["Batches"]


class Batches:
    """Hands out the positional arguments of each step.

    Args:
        batches: None for the same arguments in every step; a function of the number of the step; or minibatches that
            can be gone through again and again, such as a list, a ``DataLoader`` or :class:`Minibatches`. A minibatch
            that is a tuple or a list is so many arguments.
        args: what follows the minibatch.

    Raises:
        TypeError: ``batches`` is none of those.
        ValueError: it is empty.
    """

    def __init__(self, batches: Callable[[int], Any] | Iterable | None, args: tuple) -> None:
        if batches is not None and not callable(batches) and not isinstance(batches, Iterable):
            raise TypeError(
                f"batches must be a function of the step or minibatches to iterate over, got {type(batches).__name__}"
            )
        self._batches, self._args = batches.fresh() if isinstance(batches, Minibatches) else batches, args
        self._iterator: Iterator | None = None
        self._position = 0  # in the epoch
        self._epoch: dict[str, Any] = {}  # the random state when it began

    @property
    def come_in_blocks(self) -> bool:
        """True where :meth:`take_block` gives the arguments of many steps at once."""
        return self._batches is None or isinstance(self._batches, Minibatches)

    @property
    def can_restart(self) -> bool:
        """False for an iterator that can be gone through once."""
        return not isinstance(self._batches, Iterator)

    def check_can_branch(self) -> None:
        """Raise where a second epoch would end the first."""
        if getattr(self._batches, "persistent_workers", False):
            raise ValueError(
                "evaluations take minibatches from an epoch of their own, and persistent workers would lose their "
                "place in the run's: give DataLoader(persistent_workers=False)."
            )

    def take(self, step: int) -> tuple:
        """Return the arguments of a step, the first of which is 0."""
        if self._batches is None:
            return self._args
        if callable(self._batches):
            return (*_arguments(self._batches(step)), *self._args)
        batch = self._next(step)
        if isinstance(self._batches, Minibatches):
            batch = self._batches.take(batch)
        return (*_arguments(batch), *self._args)

    def take_block(self, step: int, num: int) -> tuple:
        """Return the arguments of so many steps for a ``CompiledSVI``, which takes minibatches apart by itself."""
        if not isinstance(self._batches, Minibatches):
            return self.take(step)
        rows = torch.stack([self._next(step + i) for i in range(num)])
        return (self._batches.at(rows), *self._args)

    def _next(self, step: int) -> Any:
        """Return the next minibatch, or its rows where they are taken by index."""
        for _ in range(2):
            if self._iterator is None:
                self._begin()
            batch = next(self._iterator, _END)  # type: ignore[arg-type]
            if batch is not _END:
                self._position += 1
                return batch
            if not self.can_restart:
                break
            self._iterator = None
        what = "came to its end" if not self.can_restart else "is empty"
        raise ValueError(f"batches {what} at step {step}: give something that can be gone through again, as a list.")

    def samples(self, num: int) -> Iterator[tuple]:
        """Return arguments for ``num`` evaluations, from an epoch of their own; the run's own goes on where it was.

        Call it where the random state is kept, as in ``forked_rng()``.

        Raises:
            ValueError: workers of a DataLoader that cannot serve two epochs at once.
        """
        if self._iterator is not None:
            self.check_can_branch()
        if self._batches is None:
            return itertools.repeat(self._args, num)
        if callable(self._batches):
            return ((*_arguments(self._batches(step)), *self._args) for step in range(num))
        return ((*_arguments(batch), *self._args) for batch in itertools.islice(self._again(), num))

    def _again(self) -> Iterator:
        kept = [(generator, generator.get_state()) for generator in self._generators]
        again: Any = self._batches.fresh() if isinstance(self._batches, Minibatches) else self._batches
        try:
            while True:
                empty = True
                for batch in again:
                    empty = False
                    yield batch
                if empty:
                    raise ValueError("batches is empty: give at least one minibatch.")
        finally:
            for generator, state in kept:
                generator.set_state(state)

    def _begin(self) -> None:
        self._prepare()
        states = [generator.get_state() for generator in self._generators]
        self._epoch = {"rng": get_rng_state(), "generators": states}
        source: Any = self._batches.epoch() if isinstance(self._batches, Minibatches) else self._batches
        self._iterator, self._position = iter(source), 0

    def _prepare(self) -> None:
        if isinstance(self._batches, Minibatches):
            self._batches.prepare()

    @property
    def _generators(self) -> list[Generator]:
        """Random numbers of a DataLoader's and its samplers' own."""
        by_batch = getattr(self._batches, "batch_sampler", None)
        parts = self._batches, getattr(self._batches, "sampler", None), by_batch, getattr(by_batch, "sampler", None)
        found = [own for part in parts if isinstance(own := getattr(part, "generator", None), Generator)]
        return list({id(generator): generator for generator in found}.values())

    def state_dict(self) -> dict[str, Any]:
        """Return where the run is in its minibatches."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where :meth:`state_dict` was, through the epoch's minibatches. Leaves another random state behind.

        Raises:
            ValueError: it was in other minibatches.
        """
        if not state["epoch"] or self._batches is None or callable(self._batches):
            return
        self._prepare()
        generators, states, taken = self._generators, state["epoch"]["generators"], state["position"]
        if len(generators) != len(states):
            raise ValueError(
                f"batches drew from {len(states)} generators of random numbers of their own when the checkpoint was "
                f"saved, and now have {len(generators)}: give the DataLoader or its sampler as it was."
            )
        set_rng_state(state["epoch"]["rng"])
        for generator, own in zip(generators, states, strict=True):
            generator.set_state(own)
        self._begin()
        for at in range(taken):
            if next(self._iterator, _END) is _END:  # type: ignore[arg-type]
                raise ValueError(
                    f"batches end after {at} minibatches, and the run had taken {taken} of an epoch when the "
                    "checkpoint was saved: give the same data and size of minibatches."
                )
        self._position = taken


_END = object()


def _arguments(batch: Any) -> tuple:
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
