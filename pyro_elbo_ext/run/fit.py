"""One call that trains an SVI: progress, stopping, checkpoints, history."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import SVI
from torch import Tensor

from pyro_elbo_ext.elbo.base import NonFiniteError
from pyro_elbo_ext.run.batches import Batches
from pyro_elbo_ext.run.checkpoint import get_rng_state, read_checkpoint, restore, save_checkpoint, set_rng_state
from pyro_elbo_ext.run.progress import Progress, smoothed
from pyro_elbo_ext.run.rates import learning_rate, scale_learning_rate
from pyro_elbo_ext.run.steps import Step, Steps
from pyro_elbo_ext.run.stopping import StagedStop, StopRule, make_stop
from pyro_elbo_ext.tracing import forked_rng

__all__ = ["FitResult", "FitState", "fit"]

HISTORY = ("loss", "grad_norm", "learning_rate", "stage")
BEST_WINDOW = 100  # losses by whose mean a state is judged


@dataclass(frozen=True)
class FitResult:
    """What came of :func:`fit`; the parameters are where Pyro keeps them.

    Attributes:
        history: by name, arrays with one entry per step: ``loss`` in nats, ``grad_norm``, ``learning_rate``, ``stage``.
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


@dataclass
class FitState:
    """A run under way, as callbacks and stopping rules see it.

    Attributes:
        svi: what is trained.
        step: number of steps taken.
        losses: of all steps, in nats.
        history: the lists that become :attr:`FitResult.history`.
    """

    svi: SVI
    batches: Batches
    kwargs: Mapping[str, Any]
    step: int = 0
    history: dict[str, list] = field(default_factory=lambda: {name: [] for name in HISTORY})

    @property
    def losses(self) -> list[float]:
        """Losses of all steps, in nats."""
        return self.history["loss"]

    @property
    def loss(self) -> float:
        """Loss of the last step, in nats."""
        return self.history["loss"][-1]

    def evaluate(self, num: int, seed: int) -> np.ndarray:
        """Return losses of the parameters as they are, ``[num]``: equal seeds, equal noise and minibatches."""
        losses = []
        with forked_rng():
            torch.manual_seed(seed + getattr(self.svi, "rank", 0))
            for args in self.batches.samples(num):
                try:
                    loss = self.svi.evaluate_loss(*args, **self.kwargs)
                except NonFiniteError:
                    loss = math.inf
                losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
        return np.array(losses)

    def scale_learning_rate(self, factor: float) -> None:
        """Multiply every step size of the optimiser."""
        scale_learning_rate(self.svi.optim, factor)

    def _add(self, step: Step, stage: int) -> None:
        self.step += 1
        row = step.loss, step.grad_norm, learning_rate(self.svi.optim), stage
        for name, value in zip(HISTORY, row, strict=True):
            self.history[name].append(value)


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
        svi: an SVI, or a :class:`~pyro_elbo_ext.DistributedSVI`, of which every process makes the same call.
        *args: arguments of model and guide, after those of ``batches``.
        num_steps: number of steps in all, those of an interrupted run that is taken up again included.
        batches: minibatches: a function of the number of the step, or something to iterate over, again from the start
            where it ends, such as a ``DataLoader``. A tuple or list is so many arguments.
        stop: ``"budget"`` for all ``num_steps``, ``"staged"`` or a :class:`~pyro_elbo_ext.StagedStop` to stop earlier
            and halve the step size on the way, where the optimiser keeps it; or any rule with its methods.
        callbacks: functions of the :class:`FitState`, called after every step; one that returns True ends the run. The
            step of a scheduler's learning rates is one: ``lambda state: scheduler.step()``.
        checkpoint: a file to write to, whole or not at all, and to go on from if it is there: the run then ends as if
            it had not been interrupted, bit for bit, on one kind of machine. On several processes rank 0 writes.
        checkpoint_every: number of steps between two writes; the last state is written too.
        seed: for Python, NumPy and torch, plus the rank of the process; None leaves the random state as it is.
        progress: False for no bar; there is none in any case where the output is no terminal.
        nonfinite: ``"raise"`` where loss or gradient is not finite, with site and parameter named, or ``"skip"`` that
            step and count it, up to 100 in a row.
        restore_best: end with the parameters of the 100 steps whose mean loss was least, not with the last.
        **kwargs: keyword arguments of model and guide.

    Returns:
        History, loss and what ended the run.

    Raises:
        NonFiniteError: a loss or gradient that is not finite.
        ValueError: a bad argument; a checkpoint that cannot be read, or of another model or run. It is left as it is.
    """
    started, rule, steps = time.perf_counter(), make_stop(stop), Steps(svi, nonfinite)
    _check(num_steps, checkpoint_every, checkpoint, batches, rule)
    if seed is not None:
        pyro.set_rng_seed(seed + getattr(svi, "rank", 0))
    state = FitState(svi, Batches(batches, args), kwargs)
    best = _Best() if restore_best else None
    saved = _Saved(checkpoint, state, steps, rule, best, seed) if checkpoint is not None else None
    stopped = saved.load() if saved is not None else ""
    bar = Progress(num_steps, state.step, progress and getattr(svi, "rank", 0) == 0)
    try:
        while not stopped and state.step < num_steps:
            stopped = _advance(state, steps, rule, best, callbacks)
            bar.after_step(state.losses, rule.stage, steps.num_skipped)
            if saved is not None and (stopped or state.step % checkpoint_every == 0 or state.step == num_steps):
                saved.save(stopped)
    finally:
        bar.close()
    if best is not None:
        best.put()
    return _result(state, steps, rule, stopped or "budget", time.perf_counter() - started)


def _advance(state: FitState, steps: Steps, rule: StopRule, best: _Best | None, callbacks: Sequence[Callable]) -> str:
    """Take one step, and return what stops the run, if anything does."""
    with steps.watching():
        step = steps.take(state.batches.take(state.step), state.kwargs)
    state._add(step, rule.stage)
    if best is not None:
        best.after_step(state.losses)
    stopped = type(rule).__name__.removesuffix("Stop").lower() if rule.after_step(state) else ""
    for callback in callbacks:
        if callback(state) is True:
            stopped = stopped or "callback"
    return stopped


def _result(state: FitState, steps: Steps, rule: StopRule, stopped: str, seconds: float) -> FitResult:
    history = {name: np.asarray(values, dtype=float) for name, values in state.history.items()}
    history["stage"] = history["stage"].astype(int)
    loss, error = smoothed(state.losses)
    stages = tuple(getattr(rule, "stages", ()))
    return FitResult(history, loss, error, state.step, steps.num_skipped, stopped, seconds, stages)


def _check(num_steps: int, every: int, checkpoint: Any, batches: Any, rule: StopRule) -> None:
    for name, value in (("num_steps", num_steps), ("checkpoint_every", every)):
        if isinstance(value, bool) or value != int(value) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if (checkpoint is not None or isinstance(rule, StagedStop)) and not Batches(batches, ()).can_restart:
        raise ValueError(
            "batches can be gone through once only, and a checkpoint goes on in the middle of them, as a staged stop "
            "takes some for evaluation: give a list, a DataLoader or a function of the step."
        )
    if checkpoint is not None and not Path(checkpoint).absolute().parent.is_dir():
        raise ValueError(f"there is no folder '{Path(checkpoint).absolute().parent}' to write a checkpoint to.")


class _Best:
    """Remembers the parameters at the end of the best stretch of steps."""

    def __init__(self) -> None:
        self.loss = math.inf
        self.params: dict[str, Tensor] = {}

    def after_step(self, losses: list[float]) -> None:
        if len(losses) % BEST_WINDOW == 0:
            mean, _ = smoothed(losses, BEST_WINDOW)
            if mean < self.loss:
                self.loss = mean
                self.params = {n: p.detach().clone() for n, p in pyro.get_param_store()._params.items()}

    @torch.no_grad()
    def put(self) -> None:
        for name, value in self.params.items():
            pyro.get_param_store()._params[name].copy_(value)


@dataclass
class _Saved:
    """A run's checkpoint."""

    path: str | os.PathLike
    state: FitState
    steps: Steps
    rule: StopRule
    best: _Best | None
    seed: int | None

    @property
    def _is_writer(self) -> bool:
        return getattr(self.state.svi, "rank", 0) == 0

    def _settings(self) -> dict[str, Any]:
        return {"stop": type(self.rule).__name__, "seed": self.seed, "restore_best": self.best is not None}

    def save(self, stopped: str) -> None:
        rngs = _gathered(self.state.svi, get_rng_state())
        if self._is_writer:
            save_checkpoint(
                self.path,
                self.state.svi,
                settings=self._settings(),
                step=self.state.step,
                stopped=stopped,
                history={name: torch.tensor(v, dtype=torch.float64) for name, v in self.state.history.items()},
                skipped=[self.steps.num_skipped, self.steps.in_a_row],
                rule=self.rule.state_dict(),
                stage=self.rule.stage,
                batches=self.state.batches.state_dict(),
                best=None if self.best is None else {"loss": self.best.loss, "params": self.best.params},
                rngs=rngs,
            )

    def load(self) -> str:
        """Go on from the file, if there is one; return what had stopped the run."""
        if not Path(self.path).exists():
            return ""
        content = read_checkpoint(self.path)
        extra = content["extra"]
        if extra.get("settings") != self._settings():
            raise ValueError(
                f"'{self.path}' is of a run with {extra.get('settings')}, and this one has {self._settings()}. Give "
                "the same, or name another file to start anew. It is left as it is."
            )
        with forked_rng():
            example = self.state.batches.take(0)
        restore(self.state.svi, content, str(self.path), example, dict(self.state.kwargs))
        self._put(extra)
        return extra["stopped"]

    def _put(self, extra: dict[str, Any]) -> None:
        self.state.step = extra["step"]
        self.state.history.update({name: values.tolist() for name, values in extra["history"].items()})
        self.steps.num_skipped, self.steps.in_a_row = extra["skipped"]
        self.rule.load_state_dict(extra["rule"])
        if isinstance(self.rule, StagedStop):
            scale_learning_rate(self.state.svi.optim, 0.5**self.rule.stage, only_new=True)
        if self.best is not None:
            self.best.loss, self.best.params = extra["best"]["loss"], extra["best"]["params"]
        self.state.batches.load_state_dict(extra["batches"])
        rank, rngs = getattr(self.state.svi, "rank", 0), extra["rngs"]
        if len(rngs) == getattr(self.state.svi, "world_size", 1):
            set_rng_state(rngs[rank])
        else:  # on another number of processes there is no run to repeat: new noise, different on each
            pyro.set_rng_seed((int(rngs[0]["torch"].sum()) + extra["step"]) % 2**31 + rank)


def _gathered(svi: SVI, value: Any) -> list[Any]:
    """Return a value of every process, in the order of their ranks."""
    if getattr(svi, "world_size", 1) == 1:
        return [value]
    return svi.gather(value)  # type: ignore[attr-defined]
