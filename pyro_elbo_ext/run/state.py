"""A run of steps under way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro.infer import SVI
from torch import Tensor

from pyro_elbo_ext.run.batches import Batches
from pyro_elbo_ext.run.checkpoint import unmoved
from pyro_elbo_ext.run.rates import learning_rate, scale_learning_rate
from pyro_elbo_ext.run.steps import Step, Steps
from pyro_elbo_ext.tracing import forked_rng

__all__ = ["FitState"]

HISTORY = ("loss", "grad_norm", "learning_rate", "stage")


@dataclass
class FitState:
    """A run under way, as callbacks and stopping rules see it.

    Attributes:
        svi: what is trained.
        step: number of steps taken.
        losses: of all steps, in nats.
        params: unconstrained parameters by name, of those that the loss has met.
        history: the lists that become :attr:`FitResult.history`.
    """

    svi: SVI
    batches: Batches
    kwargs: Mapping[str, Any]
    steps: Steps
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

    @property
    def params(self) -> dict[str, Tensor]:
        """Unconstrained parameters by name, of those that the loss has met."""
        return self.steps.params

    def evaluate(self, num: int, seed: int) -> np.ndarray:
        """Return losses of the parameters as they are, ``[num]``: equal seeds, equal noise and minibatches.

        Random state and buffers, as of batch norm, are afterwards what they were before.
        """
        losses = []
        with forked_rng(), unmoved(self.svi):
            torch.manual_seed(seed + getattr(self.svi, "rank", 0))
            for args in self.batches.samples(num):
                try:
                    loss = self.svi.evaluate_loss(*args, **self.kwargs)
                except self.steps.tolerated:
                    loss = math.inf
                losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
        return np.array(losses)

    def scale_learning_rate(self, factor: float) -> None:
        """Multiply every step size of the optimiser."""
        scale_learning_rate(self.svi.optim, factor)

    def add(self, step: Step, stage: int) -> None:
        """Take down a step."""
        self.step += 1
        row = step.loss, step.grad_norm, learning_rate(self.svi.optim), stage
        for name, value in zip(HISTORY, row, strict=True):
            self.history[name].append(value)
