"""When to stop, and with which step size to go on."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pyro_elbo_ext.run.iterates import Iterates

__all__ = ["Budget", "Run", "StagedStop", "StopRule", "make_stop", "whole_number"]

METHODS = ("after_step", "state_dict", "load_state_dict")


class Run(Protocol):
    """What a stopping rule may ask of the run that it watches."""

    @property
    def losses(self) -> list[float]:
        """Losses of all steps, in nats."""

    @property
    def params(self) -> Mapping[str, Tensor]:
        """Unconstrained parameters by name, of those that the loss has met."""

    def evaluate(self, num: int, seed: int) -> np.ndarray:
        """Return losses of the parameters as they are, ``[num]``: equal seeds, equal noise and minibatches."""

    def scale_learning_rate(self, factor: float) -> None:
        """Multiply every step size."""


class StopRule(Protocol):
    """Tells a run when to stop.

    Attributes:
        stage: number of the stage under way, for the history.
    """

    stage: int

    def after_step(self, run: Run) -> bool:
        """Look at a step that was taken; True stops the run."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the rule has seen so far, in tensors and plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned, with tensors on the CPU; parameters need not be there yet."""


class Budget:
    """Stops at the number of steps that was asked for, and no earlier."""

    stage = 0

    def after_step(self, run: Run) -> bool:
        """Return False."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: a budget remembers nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Do nothing."""


class Stage(NamedTuple):
    """One stage that ended.

    Attributes:
        steps: that it took.
        bound: of what was kept, in nats.
        gain: of the stage on the one before, in nats; where it is negative, what was kept is that of the one before.
        gain_error: its standard error.
        averaged: what was kept is an average of this stage's iterates.
    """

    steps: int
    bound: float
    gain: float
    gain_error: float
    averaged: bool


class _Verdict(NamedTuple):
    """What :class:`Stage` says of an end, and whether the average was worse than the last iterate."""

    bound: float
    gain: float
    gain_error: float
    averaged: bool
    is_behind: bool


class StagedStop:
    r"""Constant steps until they gain nothing, averaging, half the step size; until a halving gains nothing.

    1. A stage ends when two adjacent blocks of losses differ by less than one standard error of their difference,
       ``patience`` times: the noise of the steps then hides what progress there is.
    2. The iterates of the stage's second half are averaged, in unconstrained space. Where the step was too large the
       average is better by nats; where the stage had not settled it is worse: the average is kept only if its bound,
       on fresh noise common to both, is better.
    3. Step sizes are halved; but where the average was worse and the stage gained ``tol`` nats or more on the one
       before, it was under way, behind the noise of the losses: the next goes on with the same steps.
    4. The run stops when a stage's bound is, by more than a standard error, less than ``tol`` nats above that of the
       stage before.

    Where the budget ends within a stage, the best of its last iterate, its average so far, and where the stage before
    ended, is kept. What is averaged are the parameters that the loss has met, not buffers, as of batch norm.

    For losses whose value is a bound in nats: ELBOs and importance-weighted bounds, of models that one step size
    suits in principle. Networks that learn for epochs want a budget instead: there the loss is not stationary until
    long after it is good.

    :func:`~pyro_elbo_ext.fit` works on a copy, so that one rule serves many runs.

    Args:
        tol: smallest gain, in nats, for which it is worth going on.
        block: number of losses in a block.
        patience: number of comparisons in a row that must see no gain.
        num_evaluations: fresh losses that each bound is estimated with, on common random numbers.
        max_stages: stop after so many halvings in any case.

    Attributes:
        stage: number of the stage under way.
        stages: those that ended.
        halvings: number of times that the step sizes were halved.

    Raises:
        ValueError: a number out of range.

    References:
        Robust, Automated, and Accurate Black-box Variational Inference (Welandawe, Andersen, Vehtari, Huggins, 2024,
        arXiv:2203.15945), for stages, averaging and halving; the tests of this class are simpler than theirs.
    """

    def __init__(
        self,
        tol: float = 0.5,
        block: int = 300,
        patience: int = 2,
        num_evaluations: int = 200,
        max_stages: int = 20,
    ) -> None:
        if not tol > 0:
            raise ValueError(f"tol must be a positive number of nats, got {tol!r}")
        self.tol = float(tol)
        self.block = whole_number("block", block, 10)
        self.patience = whole_number("patience", patience, 1)
        self.num_evaluations = whole_number("num_evaluations", num_evaluations, 10)
        self.max_stages = whole_number("max_stages", max_stages, 1)
        self.stage = self.halvings = 0
        self.stages: list[Stage] = []
        self._start = 0  # of this stage
        self._iterates = Iterates()  # of this stage
        self._quiet = 0
        self._settled: dict[str, Tensor] | None = None  # where the stage before ended

    def after_step(self, run: Run) -> bool:
        """Look at a step that was taken; True stops the run."""
        taken = len(run.losses) - self._start
        self._iterates.add(run.params)
        if taken % self.block:
            return False
        self._iterates.end_block()
        if taken < 2 * self.block:
            return False
        losses = np.asarray(run.losses[-2 * self.block :]).reshape(2, self.block)
        before, after = (part[np.isfinite(part)] for part in losses)
        self._quiet = self._quiet + 1 if _no_gain(before, after) else 0
        return self._quiet >= self.patience and self._end_stage(run)

    def finish(self, run: Run) -> None:
        """Keep the best of what there is, where a run ends within a stage."""
        if self._iterates.blocks:
            self._keep_best(run)

    def _end_stage(self, run: Run) -> bool:
        """Keep the best, compare with the stage before, and halve the step; True where that gained too little."""
        found = self._keep_best(run)
        stage = Stage(len(run.losses) - self._start, found.bound, found.gain, found.gain_error, found.averaged)
        self.stages.append(stage)
        self.stage += 1
        self._start, self._quiet = len(run.losses), 0
        self._iterates, self._settled = Iterates(), _snapshot(run.params)
        if found.is_behind and found.gain >= self.tol:
            return False
        self.halvings += 1
        run.scale_learning_rate(0.5)
        return found.gain + found.gain_error < self.tol or self.halvings >= self.max_stages

    def _keep_best(self, run: Run) -> _Verdict:
        """Put the best of last iterate, average, and end of the stage before, by losses on common noise."""
        seed, params = 7919 * self.stage + 1, run.params

        def evaluate(values: Mapping[str, Tensor]) -> np.ndarray:
            _put(values, params)
            return run.evaluate(self.num_evaluations, seed)

        kept = last = _snapshot(params)
        average = {**last, **self._iterates.average()}
        losses, averaged = evaluate(last), evaluate(average)
        lead, _ = _gain(losses, averaged)
        if lead > 0:
            kept, losses = average, averaged
        gain, error = math.inf, 0.0
        if self._settled is not None:
            before = evaluate({**last, **self._settled})
            gain, error = _gain(before, losses)
            if gain < 0:
                kept, losses = {**last, **self._settled}, before
        _put(kept, params)
        return _Verdict(-_mean(losses), gain, error, lead > 0 and gain >= 0, lead < 0)

    def state_dict(self) -> dict[str, Any]:
        """Return what the rule has seen so far, in tensors and plain values."""
        return {
            "settings": self._settings(),
            "stages": [list(stage) for stage in self.stages],
            "halvings": self.halvings,
            "start": self._start,
            "iterates": self._iterates.state_dict(),
            "quiet": self._quiet,
            "settled": self._settled,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: it is the state of other settings.
        """
        if state.get("settings") != self._settings():
            raise ValueError(
                f"the run was stopped by other rules, StagedStop({state.get('settings')}), and now is to be by "
                f"{self._settings()}. Give the same, or start anew."
            )
        self.stages = [Stage(*stage) for stage in state["stages"]]
        self.stage, self.halvings = len(self.stages), state["halvings"]
        self._start, self._quiet = state["start"], state["quiet"]
        self._iterates.load_state_dict(state["iterates"])
        self._settled = state["settled"]

    def _settings(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("tol", "block", "patience", "num_evaluations", "max_stages")}


def make_stop(stop: str | StopRule) -> StopRule:
    """Return a stopping rule by name, as it is given, or a copy of a :class:`StagedStop`.

    Raises:
        ValueError: an unknown name.
        TypeError: not a rule.
    """
    rules = {"budget": Budget, "staged": StagedStop}
    expected = f"stop must be one of {', '.join(map(repr, rules))} or a rule such as StagedStop(), got "
    if isinstance(stop, str):
        if stop not in rules:
            raise ValueError(f"{expected}{stop!r}")
        return rules[stop]()
    if isinstance(stop, type) or not all(callable(getattr(stop, name, None)) for name in METHODS):
        what = f"the class {stop.__name__} itself" if isinstance(stop, type) else type(stop).__name__
        raise TypeError(f"{expected}{what}: a rule has a stage and the methods {', '.join(METHODS)}.")
    return copy.deepcopy(stop) if isinstance(stop, StagedStop) else stop


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """Return a number as an int.

    Raises:
        ValueError: it is not whole, or too small.
    """
    is_number = isinstance(value, (int, float, np.integer)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value != int(value) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def _no_gain(before: np.ndarray, after: np.ndarray) -> bool:
    """Tell whether a block's mean loss is less than one standard error below that of the block before."""
    if min(len(before), len(after)) < 2:
        return False
    error = math.sqrt(before.var(ddof=1) / len(before) + after.var(ddof=1) / len(after))
    return before.mean() - after.mean() < error


def _gain(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Return by how much losses on common noise fell, and the standard error; infinite where more are finite."""
    finite = np.isfinite(before), np.isfinite(after)
    more = int(finite[1].sum() - finite[0].sum())
    if more:
        return math.copysign(math.inf, more), 0.0
    both = finite[0] & finite[1]
    gained = before[both] - after[both]
    if len(gained) < 2:
        return 0.0, 0.0
    return float(gained.mean()), float(gained.std(ddof=1) / math.sqrt(len(gained)))


def _mean(losses: np.ndarray) -> float:
    """Return the mean of the finite losses, +inf where there is none."""
    finite = losses[np.isfinite(losses)]
    return float(finite.mean()) if len(finite) else math.inf


def _snapshot(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.detach().clone() for name, leaf in params.items()}


@torch.no_grad()
def _put(values: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        params[name].copy_(value)
