"""When to stop, and with which step size to go on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyro
import torch
from torch import Tensor

__all__ = ["Budget", "Run", "StagedStop", "StopRule", "make_stop"]


class Run(Protocol):
    """What a stopping rule may ask of the run that it watches."""

    @property
    def losses(self) -> list[float]:
        """Losses of all steps, in nats."""

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
        """Go on from what :meth:`state_dict` returned."""


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
    """One stage that ended: its steps, the bound in nats and its gain on the stage before, and what was kept."""

    steps: int
    bound: float
    gain: float
    gain_error: float
    averaged: bool


class StagedStop:
    r"""Constant steps until they gain nothing, averaging, half the step size; until a halving gains nothing.

    1. A stage ends when two adjacent blocks of losses differ by less than one standard error of their difference,
       ``patience`` times: the noise of the steps then hides what progress there is.
    2. The iterates of the stage's second half are averaged, in unconstrained space. Where the step was too large the
       average is better by nats; where the stage had not settled it is worse: the average is kept only if its bound,
       on fresh noise common to both, is better.
    3. Step sizes are halved.
    4. The run stops when a stage's bound is less than ``tol`` nats above that of the stage before.

    For losses whose value is a bound in nats: ELBOs and importance-weighted bounds, of models that one step size
    suits in principle. Networks that learn for epochs want a budget instead: there the loss is not stationary until
    long after it is good.

    Args:
        tol: smallest gain, in nats, for which it is worth going on.
        block: number of losses in a block.
        patience: number of comparisons in a row that must see no gain.
        num_evaluations: fresh losses that each bound is estimated with, on common random numbers.
        max_stages: stop after so many stages in any case.

    Attributes:
        stage: number of the stage under way.
        stages: those that ended.

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
        for name, value, least in (
            ("block", block, 10),
            ("patience", patience, 1),
            ("num_evaluations", num_evaluations, 10),
            ("max_stages", max_stages, 1),
        ):
            if value != int(value) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if not tol > 0:
            raise ValueError(f"tol must be a positive number of nats, got {tol!r}")
        self.tol, self.block, self.patience = float(tol), block, patience
        self.num_evaluations, self.max_stages = num_evaluations, max_stages
        self.stage = 0
        self.stages: list[Stage] = []
        self._start = 0  # of this stage
        self._means: list[dict[str, Tensor]] = []  # of the iterates, block by block
        self._sum: dict[str, Tensor] = {}  # of this block's
        self._quiet = 0
        self._settled: dict[str, Tensor] | None = None  # where the stage before ended

    def after_step(self, run: Run) -> bool:
        """Look at a step that was taken; True stops the run."""
        taken = len(run.losses) - self._start
        self._add_iterate()
        if taken % self.block:
            return False
        self._means.append({name: total / self.block for name, total in self._sum.items()})
        self._sum = {}
        if taken < 2 * self.block:
            return False
        losses = np.asarray(run.losses[-2 * self.block :]).reshape(2, self.block)
        before, after = (part[np.isfinite(part)] for part in losses)
        self._quiet = self._quiet + 1 if _no_gain(before, after) else 0
        return self._quiet >= self.patience and self._end_stage(run)

    def _end_stage(self, run: Run) -> bool:
        """Average, compare with the stage before, and halve the step; True where that gained too little."""
        last, average = _snapshot(), self._average()
        seed = 7919 * self.stage + 1
        losses = run.evaluate(self.num_evaluations, seed)
        _put(average)
        averaged = run.evaluate(self.num_evaluations, seed)
        is_better = _mean(averaged) < _mean(losses)
        found = averaged if is_better else losses
        gain, error = math.inf, 0.0
        if self._settled is not None:
            _put(self._settled)
            gained = run.evaluate(self.num_evaluations, seed) - found
            gained = gained[np.isfinite(gained)]
            gain, error = _mean(gained), float(gained.std(ddof=1) / math.sqrt(len(gained)))
        kept = average if is_better else last
        if gain < 0:
            kept = self._settled  # type: ignore[assignment]
        _put(kept)
        self.stages.append(Stage(len(run.losses) - self._start, -_mean(found), gain, error, is_better))
        self.stage += 1
        self._start, self._means, self._quiet, self._settled = len(run.losses), [], 0, kept
        run.scale_learning_rate(0.5)
        return gain < self.tol or self.stage >= self.max_stages

    def _add_iterate(self) -> None:
        for name, leaf in pyro.get_param_store()._params.items():
            value = leaf.detach()
            if name in self._sum:
                self._sum[name].add_(value)
            else:
                self._sum[name] = value.clone()

    def _average(self) -> dict[str, Tensor]:
        """Return the mean of the iterates over the blocks of the stage's second half."""
        half = self._means[len(self._means) // 2 :]
        return {name: sum(mean[name] for mean in half) / len(half) for name in half[-1] if all(name in m for m in half)}  # type: ignore[misc]

    def state_dict(self) -> dict[str, Any]:
        """Return what the rule has seen so far, in tensors and plain values."""
        return {
            "settings": self._settings(),
            "stages": [list(stage) for stage in self.stages],
            "start": self._start,
            "means": self._means,
            "sum": self._sum,
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
        self.stage = len(self.stages)
        self._start, self._quiet = state["start"], state["quiet"]
        self._means = [_beside_leaves(mean) for mean in state["means"]]
        self._sum = _beside_leaves(state["sum"])
        self._settled = None if state["settled"] is None else _beside_leaves(state["settled"])

    def _settings(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("tol", "block", "patience", "num_evaluations", "max_stages")}


def make_stop(stop: str | StopRule) -> StopRule:
    """Return a stopping rule by name, or as it is given.

    Raises:
        ValueError: an unknown name.
    """
    if not isinstance(stop, str):
        return stop
    rules = {"budget": Budget, "staged": StagedStop}
    if stop not in rules:
        raise ValueError(
            f"stop must be one of {', '.join(map(repr, rules))} or a rule such as StagedStop(), got {stop!r}"
        )
    return rules[stop]()


def _no_gain(before: np.ndarray, after: np.ndarray) -> bool:
    """Tell whether a block's mean loss is less than one standard error below that of the block before."""
    if min(len(before), len(after)) < 2:
        return False
    error = math.sqrt(before.var(ddof=1) / len(before) + after.var(ddof=1) / len(after))
    return before.mean() - after.mean() < error


def _mean(losses: np.ndarray) -> float:
    """Return the mean loss, +inf where one is not a number."""
    return float(losses.mean()) if np.isfinite(losses).all() else math.inf


def _snapshot() -> dict[str, Tensor]:
    return {name: leaf.detach().clone() for name, leaf in pyro.get_param_store()._params.items()}


def _beside_leaves(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy a checkpoint's tensors, which are read on the CPU, to where the parameters are."""
    leaves = pyro.get_param_store()._params
    return {name: value.to(leaves[name].device, copy=True) for name, value in values.items()}


@torch.no_grad()
def _put(values: Mapping[str, Tensor]) -> None:
    leaves = pyro.get_param_store()._params
    for name, value in values.items():
        leaves[name].copy_(value)
