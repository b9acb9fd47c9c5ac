"""What autofit returns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_elbo_ext.autofit.verdict import Candidate
from pyro_elbo_ext.diagnostics.resampling import systematic
from pyro_elbo_ext.diagnostics.sampling import seeded
from pyro_elbo_ext.diagnostics.verdict import Finding

__all__ = ["AutofitReport", "AutofitResult", "Rung", "own_store"]


class Rung(NamedTuple):
    """One fit that was tried.

    Attributes:
        name: what was fitted.
        elbo: mean log-weight in nats.
        bound: importance-weighted bound of fifty particles in nats.
        k: Pareto's k-hat.
        ess: effective sample size.
        num_samples: draws that these are from.
        seconds: that fit and draws took.
    """

    name: str
    elbo: float
    bound: float
    k: float
    ess: float
    num_samples: int
    seconds: float


@dataclass(frozen=True)
class AutofitReport:
    """What was tried and what speaks for the result; print it.

    Attributes:
        trusted: True where every witness was asked and none speaks against the weighted draws.
        findings: what each witness says; level 0 is nothing to see.
        rungs: the fits, in the order in which they were tried.
        chosen: name of the one that the result is made of.
        k: k-hat of its weights.
        ess: effective sample size of the smoothed ones.
        log_evidence: log of their mean, in nats.
        restarts: the ELBO that each start of the first rung came to, in nats.
        size: number of unconstrained coordinates.
        seconds: that all took.
    """

    trusted: bool
    findings: tuple[Finding, ...]
    rungs: tuple[Rung, ...]
    chosen: str
    k: float
    ess: float
    log_evidence: float
    restarts: tuple[float, ...]
    size: int
    seconds: float

    @property
    def reasons(self) -> tuple[str, ...]:
        """What speaks against the result; empty if it is trusted."""
        return tuple(f"{finding.witness}: {finding.text}" for finding in self.findings if finding.level)

    def __str__(self) -> str:
        verdict = "trusted" if self.trusted else "NOT trusted"
        lines = [f"{self.chosen}, {self.size} coordinates, {self.seconds:.1f} s: {verdict}"]
        lines += [f"  {'!' if f.level else ' '} {f.witness}: {f.text}" for f in self.findings]
        lines.append(f"  {'rung':20}{'elbo':>12}{'bound':>12}{'k-hat':>8}{'ess':>10}{'seconds':>9}")
        for rung in self.rungs:
            numbers = f"{rung.elbo:12.2f}{rung.bound:12.2f}{rung.k:8.2f}{rung.ess:10.0f}{rung.seconds:9.1f}"
            lines.append(f"  {rung.name:20}{numbers}")
        lines.append("  starts ended at " + ", ".join(f"{bound:.2f}" for bound in self.restarts))
        return "\n".join(lines)


@contextmanager
def own_store(*kinds: str) -> Iterator[None]:
    """Work in a param store that has what the user's has, but for guides of some kinds, and give that back untouched.

    Args:
        *kinds: names of guide classes.
    """
    store = pyro.get_param_store()
    found: Any = store.get_state()
    prefixes = tuple(f"{kind}." for kind in kinds)
    state: Any = {p: {k: v for k, v in values.items() if not k.startswith(prefixes)} for p, values in found.items()}
    with store.scope(state), poutine.block():
        yield


@dataclass(frozen=True)
class AutofitResult:
    """A fitted guide, weighted draws of the posterior, and the verdict on them.

    Attributes:
        guide: an AutoFlow or AutoPlatedFlow, for ``SVI``, ``Predictive``, ``diagnose``, ``to_arviz`` and all else.
        report: the verdict and what it rests on. It speaks of the weighted draws; the guide's own are off by what the
            weights correct.
    """

    guide: Callable
    report: AutofitReport
    _candidate: Candidate | None = field(repr=False, default=None)

    @property
    def trusted(self) -> bool:
        """The verdict."""
        return self.report.trusted

    @property
    def log_weights(self) -> Tensor:
        """Raw log-weights of the draws that the verdict is on ``[num_samples]``, in nats."""
        return self._weighted().draws.log_weight

    def _weighted(self) -> Candidate:
        if self._candidate is None:
            raise RuntimeError(
                "a posterior fitted by minibatches has no weighted draws, for a minibatch's weights are not the "
                "posterior's. Draw from the guide: pyro.infer.Predictive(model, guide=result.guide, num_samples=...)."
            )
        return self._candidate

    def posterior(self, num_samples: int = 1000, *, seed: int | None = None) -> dict[str, Tensor]:
        """Return draws of the posterior: draws of the guide resampled by their smoothed weights.

        Args:
            num_samples: number of draws, at most as many as were weighed.
            seed: of the resampling alone; by default it uses the global random state.

        Returns:
            Latent and deterministic sites, ``[num_samples, *plates, *event]``.

        Raises:
            ValueError: more draws than were weighed.
            RuntimeError: the model was fitted by minibatches.
        """
        candidate = self._weighted()
        weighed = len(candidate.log_weights)
        if not 1 <= num_samples <= weighed:
            raise ValueError(
                f"num_samples must be between 1 and {weighed}, the number of weighed draws, got {num_samples}. Give "
                "autofit a larger num_samples."
            )
        if not self.trusted:
            warnings.warn("this posterior is not trusted. " + "; ".join(self.report.reasons), stacklevel=2)
        with seeded(seed), own_store("AutoFlow"), torch.no_grad():
            chosen = systematic(candidate.log_weights)[:num_samples]
            return candidate.proposal.values(candidate.draws.noise[chosen])
