"""From the model to a posterior with a verdict: fits of rising cost until one can be trusted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from pyro_elbo_ext.autofit.frame import Frame, affine_flow, inspect, make_guide
from pyro_elbo_ext.autofit.gaussian import Gaussian, fit_gaussian, starts
from pyro_elbo_ext.autofit.minibatch import fit_minibatch
from pyro_elbo_ext.autofit.proposal import Proposal
from pyro_elbo_ext.autofit.result import AutofitReport, AutofitResult, Rung, own_store
from pyro_elbo_ext.autofit.training import new_flow, train_flow
from pyro_elbo_ext.autofit.verdict import Candidate, judge, weigh
from pyro_elbo_ext.diagnostics.sampling import seeded
from pyro_elbo_ext.diagnostics.verdict import Finding
from pyro_elbo_ext.diagnostics.weights import good_k

__all__ = ["autofit"]

RATE = 4e-3  # of Adam, for a flow's first training
MAX_SIZE = 2000  # coordinates that a full covariance is fitted for
DRAWS = 5  # times num_samples that may be drawn where moments are not yet precise


def autofit(
    model: Callable,
    *args: Any,
    seed: int | None = None,
    num_samples: int = 20_000,
    num_steps: int = 1000,
    max_seconds: float = 300.0,
    progress: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> AutofitResult:
    r"""Fit a model's posterior without a choice to make, and say whether it can be trusted.

    Works on all continuous latent sites at once, unconstrained and non-centred as by :class:`~pyro_elbo_ext.AutoFlow`:

    1. full-rank Gaussians by natural-gradient steps from several starts, and the best one's under Student-t noise;
    2. an inverse autoregressive flow that starts as the best Gaussian, of each centring where there are two; then the
       better one trained on at a smaller step size, or anew where it failed.

    The answer of a rung is its draws weighted by importance, smoothed by PSIS. The first rung whose weights are even (a
    k-hat below 1/2, or below 0.65 with half of the draws effective), and against which no witness speaks, ends the
    climb; after the last, the fit with the best importance-weighted bound of those with a k-hat below 0.7 is taken. The
    witnesses: k-hat; standard errors of means and standard deviations of every coordinate; Hamiltonian chains from the
    resampled draws, which must not move; and the evidence that all starts' Gaussians together find, which must not
    exceed the fit's.

    What they cannot see: a mode that no start leads to, and a thin gap that holds a few percent of the mass, as where a
    flow closes a ring (means off by 0.12 sd were trusted there). Nor does anything here see a wrong model.

    On one core a model that a Gaussian fits takes seconds, one of 30 to 90 coordinates that needs a flow 15 to 45, one
    of 144 that none fits well 200; with thousands of data, Gaussians take up to 40.

    Models with subsampled plates are fitted by :class:`~pyro_elbo_ext.AutoPlatedFlow` and never trusted, for the
    weights of a minibatch are not the posterior's.

    References:
        Yes, but Did It Work?: Evaluating Variational Inference (Yao, Vehtari, Simpson, Gelman, 2018, arXiv:1802.02538);
        Pareto Smoothed Importance Sampling (Vehtari et al., 2015, arXiv:1507.02646); Advances in Black-Box VI (Agrawal,
        Sheldon, Domke, 2020, arXiv:2006.10343).

    Args:
        model: a Pyro model of continuous latent sites whose operations keep particles in a dimension left of its
            plates.
        *args: its positional arguments.
        seed: of all random numbers, the global state being left as it was; by default that is used. Results repeat
            unless ``max_seconds`` cut a fit short.
        num_samples: draws to weigh; up to five times as many where moments would not be precise otherwise.
        num_steps: of each flow's training.
        max_seconds: no fit begins or goes on after these.
        progress: called with a line of text after every fit, as ``print``.
        **kwargs: the model's keyword arguments; bind one that has the name of an argument here by
            ``functools.partial``.

    Returns:
        The fitted guide, a report and draws. The param store is left as it was; the guide registers its parameters
        there when it first runs.

    Raises:
        ValueError: a discrete latent site, an unlearned parameter, a scaled model, one whose operations mix particles,
            or more than 2000 coordinates; site or parameter is named.
        ImportError: zuko is not installed.

    Example::

        >>> result = autofit(model, data, seed=0)
        >>> print(result.report)
        >>> draws = result.posterior(1000)
    """
    _check(num_samples, num_steps, max_seconds)
    with seeded(seed), own_store("AutoFlow", "AutoPlatedFlow"), torch.enable_grad():
        if inspect(model, args, kwargs):
            return fit_minibatch(model, args, kwargs, num_steps, max_seconds, progress)
        climb = _Climb(Frame(model, args, kwargs), num_samples, num_steps, max_seconds, progress)
        best = climb.run()
        guide = make_guide(model, best.proposal.flow, args, kwargs)
        if best.proposal.centering is not None:
            guide.centering.data.copy_(best.proposal.centering)
        guide.requires_grad_(True)
        return AutofitResult(guide, climb.report(best), best)


def _check(num_samples: int, num_steps: int, max_seconds: float) -> None:
    for name, number, least in (("num_samples", num_samples, 1000), ("num_steps", num_steps, 1)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {number!r}")
    if not max_seconds > 0:
        raise ValueError(f"max_seconds must be positive, got {max_seconds}")


class _Climb:
    """One run of the ladder.

    Args:
        frame: the model's coordinates.
        num_samples: draws to weigh.
        num_steps: of each flow's training.
        max_seconds: to spend.
        progress: told of every fit.
    """

    def __init__(
        self,
        frame: Frame,
        num_samples: int,
        num_steps: int,
        max_seconds: float,
        progress: Callable[[str], None] | None,
    ) -> None:
        if frame.size > MAX_SIZE:
            raise ValueError(
                f"the model has {frame.size} unconstrained coordinates, and autofit fits a full covariance of up to "
                f"{MAX_SIZE}. Use AutoPlatedFlow, whose parameters do not grow with plates, with pyro.infer.SVI."
            )
        self.frame, self.num_samples, self.num_steps = frame, num_samples, num_steps
        self.begun = self.lap = time.monotonic()
        self.max_seconds, self.progress = max_seconds, progress
        self.rungs: list[Rung] = []
        self.fits: list[Gaussian] = []

    def has_time(self) -> bool:
        """Tell whether another step may be made."""
        return time.monotonic() - self.begun < self.max_seconds

    def run(self) -> Candidate:
        """Climb, and return the fit to keep, judged."""
        found: list[Candidate] = []
        for proposal in self._proposals():
            candidate = weigh(proposal, max(self.num_samples // 2, 1000))
            self._note(candidate)
            if candidate.is_comfortable(DRAWS * self.num_samples):
                candidate = self._judge(candidate)
                if candidate.trusted or candidate.misses_mass:  # no later rung would cross to another mode
                    return candidate
            found.append(candidate)
        usable = [c for c in found if c.k < good_k(len(c.log_weights))] or found
        best = max(usable, key=lambda candidate: candidate.bound)
        return best if best.findings else self._judge(best)

    def _judge(self, candidate: Candidate) -> Candidate:
        """Judge a fit by other draws than those that it was chosen by."""
        judged = judge(weigh(candidate.proposal, self.num_samples, DRAWS * self.num_samples), self.fits)
        self.lap = time.monotonic()
        return judged

    def _proposals(self) -> Iterator[Proposal]:
        for start in starts(self.frame):
            if self.fits and not self.has_time():
                break
            self.fits.append(fit_gaussian(self.frame, start))
        best = max(self.fits, key=lambda fit: fit.bound)
        for base in ("normal", "studentt"):
            yield Proposal(f"gaussian ({base})", self.frame, affine_flow(*best[:2], base), best.centering)
        yield from self._flows()

    def _flows(self) -> Iterator[Proposal]:
        """Bend the best Gaussian of each centring, then train the better flow on, or anew where it failed."""
        tried: list[tuple[float, Gaussian, Proposal]] = []
        for fit in self._best_of_each_centring():
            if self.has_time():
                flow = train_flow(new_flow(self.frame, fit), RATE, self.num_steps, on_step=self.has_time)
                yield replace(flow, name=f"flow {len(tried) + 1}")
                tried.append((self.rungs[-1].bound, fit, flow))
        if not self.has_time():
            return
        bound, fit, flow = max(tried, key=lambda entry: entry[0])
        if bound >= self.rungs[0].bound:  # the Gaussian's
            longer = train_flow(flow, RATE / 2, 2 * self.num_steps, on_step=self.has_time)
        else:
            longer = train_flow(new_flow(self.frame, fit), RATE / 4, 2 * self.num_steps, on_step=self.has_time)
        yield replace(longer, name="flow, longer")

    def _best_of_each_centring(self) -> list[Gaussian]:
        best: dict[tuple, Gaussian] = {}
        for fit in sorted(self.fits, key=lambda fit: -fit.bound):
            best.setdefault(() if fit.centering is None else tuple(fit.centering.tolist()), fit)
        return list(best.values())

    def _note(self, candidate: Candidate) -> None:
        now = time.monotonic()
        num = len(candidate.log_weights)
        rung = Rung(
            candidate.proposal.name, candidate.elbo, candidate.bound, candidate.k, candidate.ess, num, now - self.lap
        )
        self.lap = now
        self.rungs.append(rung)
        if self.progress is not None:
            self.progress(
                f"{rung.name}: bound {rung.bound:.2f}, k-hat {rung.k:.2f}, effective sample size {rung.ess:.0f} of "
                f"{num}, {rung.seconds:.1f} s"
            )

    def report(self, best: Candidate) -> AutofitReport:
        """Return the report on the fit that is kept."""
        findings = best.findings
        if not self.has_time() and not best.trusted:
            findings += (Finding("budget", 1, f"the climb ended after max_seconds={self.max_seconds:g}"),)
        return AutofitReport(
            trusted=best.trusted,
            findings=findings,
            rungs=tuple(self.rungs),
            chosen=best.proposal.name,
            k=best.k,
            ess=best.ess,
            log_evidence=best.log_evidence,
            restarts=tuple(fit.bound for fit in self.fits),
            size=self.frame.size,
            seconds=time.monotonic() - self.begun,
        )
