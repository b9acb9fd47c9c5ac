"""One call that trains an SVI: progress, stopping, checkpoints, history."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import SVI
from torch import Tensor

from pyro_elbo_ext.run.batches import Batches
from pyro_elbo_ext.run.checkpoint import check_path
from pyro_elbo_ext.run.compiled import CompiledSVI
from pyro_elbo_ext.run.compiled.loop import BLOCK
from pyro_elbo_ext.run.progress import Progress, smoothed
from pyro_elbo_ext.run.rates import check_rates
from pyro_elbo_ext.run.resume import Saved
from pyro_elbo_ext.run.state import FitState
from pyro_elbo_ext.run.steps import Steps
from pyro_elbo_ext.run.stopping import Budget, StagedStop, StopRule, make_stop, whole_number

__all__ = ["FitResult", "FitState", "fit"]

BEST_WINDOW = 100  # losses by whose mean a state is judged


@dataclass(frozen=True)
class FitResult:
    """What came of :func:`fit`; the parameters are where Pyro keeps them.

    Attributes:
        history: by name, arrays with one entry per step: ``loss`` in nats, ``grad_norm``, ``learning_rate``, ``stage``.
            Of compiled steps the norm is NaN, and the rate that of the last of those that were taken at once.
        loss: mean of the last 100 losses.
        loss_error: its standard error.
        num_steps: number of steps taken, those before an interruption included.
        num_skipped: how many of them were left out because loss or gradient was not finite.
        stopped: what ended the run: ``"budget"``, ``"staged"`` or another rule's name in lower case, or ``"callback"``.
        seconds: of this call.
        stages: of a staged stop: steps, bound and gain of each.
    """

    history: dict[str, np.ndarray]
    loss: float
    loss_error: float
    num_steps: int
    num_skipped: int
    stopped: str
    seconds: float
    stages: Sequence[Any] = ()

    def __str__(self) -> str:
        skipped = f", {self.num_skipped} skipped" if self.num_skipped else ""
        return (
            f"loss {self.loss:.2f} ± {self.loss_error:.2f} nats after {self.num_steps} steps{skipped} "
            f"in {self.seconds:.1f} s (stopped by {self.stopped})"
        )


def fit(
    svi: SVI,
    *args: Any,
    num_steps: int,
    batches: Callable[[int], Any] | Iterable | None = None,
    stop: str | StopRule = "budget",
    callbacks: Sequence[Callable[[FitState], bool | None]] = (),
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 500,
    seed: int | None = None,
    progress: bool = True,
    nonfinite: str = "raise",
    restore_best: bool = False,
    **kwargs: Any,
) -> FitResult:
    """Train an SVI: ``num_steps`` times ``svi.step``, and what one writes around it.

    Args:
        svi: an SVI; a :class:`~pyro_elbo_ext.CompiledSVI`, of which many steps are taken at once where no
            callbacks, stopping rule, or batches other than :class:`~pyro_elbo_ext.Minibatches` come between them; or a
            :class:`~pyro_elbo_ext.DistributedSVI`, of which every process makes the same call.
        *args: arguments of model and guide, after those of ``batches``.
        num_steps: number of steps in all, those of an interrupted run that is taken up again included.
        batches: minibatches: a function of the number of the step, or something to iterate over, again from the start
            where it ends, such as a ``DataLoader`` or :class:`~pyro_elbo_ext.Minibatches`. A tuple or list is so many
            arguments.
        stop: ``"budget"`` for all ``num_steps``, ``"staged"`` or a :class:`~pyro_elbo_ext.StagedStop` to stop earlier
            and halve the step size on the way, where the optimiser keeps it; or any rule with its methods.
        callbacks: functions of the :class:`FitState`, called after every step; one that returns True ends the run. The
            step of a scheduler's learning rates is one: ``lambda state: scheduler.step()``.
        checkpoint: a file to write to, whole or not at all, and to go on from if it is there: the run then ends as if
            it had not been interrupted, bit for bit, on one kind of machine. It holds the parameters that the loss has
            met, and leaves others' alone. On several processes rank 0 writes, and all read the same file. A run that a
            callback ended goes on when it is called again.
        checkpoint_every: number of steps between two writes; the last state is written too.
        seed: for Python, NumPy and torch, plus the rank of the process; None leaves the random state as it is.
        progress: False for no bar; there is none in any case where the output is no terminal.
        nonfinite: ``"raise"`` where loss or gradient is not finite, with site and parameter named, or ``"skip"`` that
            step and count it, up to 100 in a row. Errors of Pyro's validation, as of a NaN parameter, and of a matrix
            that is not positive definite, are then passed over too, once a step has succeeded.
        restore_best: end with the best of the parameters after every 100 steps and after the last, by the mean loss of
            the 100 steps before, most of which must be finite. Buffers, as of batch norm, are those of the last step.
            Not with a staged stop, which keeps the better of its stages by itself.
        **kwargs: keyword arguments of model and guide.

    Returns:
        History, loss and what ended the run.

    Raises:
        NonFiniteError: a loss or gradient that is not finite.
        TypeError: a rule or batches of another type.
        ValueError: a bad argument; a checkpoint that cannot be read, or of another model or run. It is left as it is.
    """
    started, rule, steps = time.perf_counter(), make_stop(stop), Steps(svi, nonfinite)
    num_steps = whole_number("num_steps", num_steps)
    checkpoint_every = whole_number("checkpoint_every", checkpoint_every)
    state = FitState(svi, Batches(batches, args), kwargs, steps)
    _check(state, rule, checkpoint, restore_best)
    if seed is not None:
        pyro.set_rng_seed(seed + getattr(svi, "rank", 0))
    best = _Best() if restore_best else None
    saved = Saved(checkpoint, state, rule, best, seed) if checkpoint is not None else None
    stopped = saved.load() if saved is not None else ""
    bar = Progress(num_steps, state.step, progress and getattr(svi, "rank", 0) == 0)
    try:
        while not stopped and state.step < num_steps:
            left = min(num_steps - state.step, checkpoint_every - state.step % checkpoint_every)
            taken = state.step
            stopped = _advance(state, rule, best, callbacks, left)
            bar.after_steps(state.step - taken, state.losses, rule.stage, steps.num_skipped)
            if saved is not None and (stopped or state.step % checkpoint_every == 0 or state.step == num_steps):
                saved.save(stopped)
    finally:
        bar.close()
    if best is not None:
        best.put(state)
    if isinstance(rule, StagedStop):
        rule.finish(state)
    return _result(state, rule, stopped or "budget", time.perf_counter() - started)


def _advance(state: FitState, rule: StopRule, best: _Best | None, callbacks: Sequence[Callable], left: int) -> str:
    """Take a step, or many compiled ones that nobody looks at singly, and return what stops the run, if anything."""
    nobody_looks = type(rule) is Budget and not callbacks and best is None and state.batches.come_in_blocks
    num = state.steps.at_once(min(left, BLOCK) if nobody_looks else 1)
    with state.steps.watching():
        if isinstance(state.svi, CompiledSVI):
            steps = state.steps.take_several(num, state.batches.take_block(state.step, num), state.kwargs)
        else:
            steps = [state.steps.take(state.batches.take(state.step), state.kwargs)]
    for step in steps:
        state.add(step, rule.stage)
    if best is not None:
        best.after_step(state)
    stopped = ""
    if rule.after_step(state):
        stopped = type(rule).__name__.removesuffix("Stop").lower() or "stop"
    for callback in callbacks:
        if callback(state) is True:
            stopped = stopped or "callback"
    return stopped


def _result(state: FitState, rule: StopRule, stopped: str, seconds: float) -> FitResult:
    history = {name: np.asarray(values, dtype=float) for name, values in state.history.items()}
    history["stage"] = history["stage"].astype(int)
    loss, error = smoothed(state.losses)
    stages = tuple(getattr(rule, "stages", ()))
    return FitResult(history, loss, error, state.step, state.steps.num_skipped, stopped, seconds, stages)


def _check(state: FitState, rule: StopRule, checkpoint: Any, restore_best: bool) -> None:
    """Refuse what cannot work before the first step."""
    is_staged = isinstance(rule, StagedStop)
    if (checkpoint is not None or is_staged) and not state.batches.can_restart:
        raise ValueError(
            "batches can be gone through once only, and a checkpoint goes on in the middle of them, as a staged stop "
            "takes some for evaluation: give a list, a DataLoader or a function of the step."
        )
    if is_staged:
        state.batches.check_can_branch()
        check_rates(state.svi.optim)
        if restore_best:
            raise ValueError("a staged stop keeps the best of its stages by itself: leave out restore_best.")
    if checkpoint is not None:
        check_path(checkpoint)
        if not (folder := Path(checkpoint).absolute().parent).is_dir():
            raise ValueError(f"there is no folder '{folder}' to write a checkpoint to.")


class _Best:
    """Remembers the parameters at the end of the best stretch of steps, of those that lie side by side."""

    def __init__(self) -> None:
        self.loss = math.inf
        self.params: dict[str, Tensor] = {}

    def after_step(self, state: FitState) -> None:
        """Look at every hundredth step."""
        if state.step % BEST_WINDOW == 0 and (loss := self._judged(state.losses)) < self.loss:
            self.loss = loss
            self.params = {name: leaf.detach().clone() for name, leaf in state.params.items()}

    @torch.no_grad()
    def put(self, state: FitState) -> None:
        """Go back to the best, unless the last steps are better."""
        if self._judged(state.losses) < self.loss:
            return
        leaves = state.params
        for name, value in self.params.items():
            leaves[name].copy_(value)

    def _judged(self, losses: list[float]) -> float:
        """Return the mean of the last losses, infinite where less than half of them are finite."""
        last = losses[-BEST_WINDOW:]
        return smoothed(last)[0] if sum(map(math.isfinite, last)) * 2 > len(last) else math.inf
