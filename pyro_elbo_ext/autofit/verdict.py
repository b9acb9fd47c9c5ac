"""What the witnesses of one fit say together, and what they can't see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyro_elbo_ext.autofit.gaussian import Gaussian
from pyro_elbo_ext.autofit.proposal import Draws, Proposal
from pyro_elbo_ext.autofit.witnesses import Drift, Precision, drift, evidence_error, missed_mass, precision
from pyro_elbo_ext.bounds import log_mean_exp
from pyro_elbo_ext.diagnostics.verdict import Finding
from pyro_elbo_ext.diagnostics.weights import MIN_SAMPLES, effective_sample_size, good_k, psis

__all__ = ["COMFORT", "Candidate", "judge", "weigh"]

MEAN, LOG_SD = 0.03, 0.05  # largest standard errors, in posterior sd: a third of what may be wrong in the end
COMFORT = 0.5  # k-hat at which weights have a variance, and no higher rung is tried
MARGIN = 0.05  # below the largest k-hat allowed, where half of the draws count, suffices as well
CHANCE = 1e-3  # that chains which stay where they are look as if they moved
CHAINS, CHEAP = (400, 1000), 20  # chains, and up to how many coordinates there are more of them
MASS = 0.1  # nats of evidence that restarts may find beyond the fit's
GROUP = 50  # particles of the bound by which fits are compared


@dataclass(frozen=True)
class Candidate:
    """Draws of one fit and what their weights say.

    Attributes:
        proposal: the fit.
        draws: from it, with raw log-weights.
        log_weights: smoothed by PSIS and normalised, ``[S]``.
        k: Pareto's k-hat.
        ess: effective sample size of the smoothed weights.
        precision: of weighted moments.
        findings: of witnesses asked so far.
    """

    proposal: Proposal
    draws: Draws
    log_weights: Tensor = field(repr=False)
    k: float
    ess: float
    precision: Precision
    findings: tuple[Finding, ...] = ()

    @property
    def elbo(self) -> float:
        """Mean log-weight in nats."""
        return float(self.draws.log_weight.mean())

    @property
    def log_evidence(self) -> float:
        """Log of the mean weight in nats."""
        return float(log_mean_exp(self.draws.log_weight))

    @property
    def bound(self) -> float:
        """Importance-weighted bound of fifty particles, averaged over all draws, in nats."""
        whole = len(self.draws.log_weight) // GROUP * GROUP
        return float(log_mean_exp(self.draws.log_weight[:whole].view(GROUP, -1)).mean())

    def is_comfortable(self, max_samples: int) -> bool:
        """Tell whether weights leave nothing to wish once there are ``max_samples`` draws."""
        num = len(self.log_weights)
        even = self.k <= COMFORT or (self.k <= good_k(num) - MARGIN and self.ess >= num / 2)
        error = max(self.precision.mean / MEAN, self.precision.log_sd / LOG_SD) * math.sqrt(num / max_samples)
        return even and error <= 1

    @property
    def misses_mass(self) -> bool:
        """True where restarts together found more evidence."""
        return any(finding.witness == "restarts" and finding.level for finding in self.findings)

    @property
    def trusted(self) -> bool:
        """True where all witnesses were asked and none speaks against the draws."""
        return bool(self.findings) and all(finding.level == 0 for finding in self.findings)


def weigh(proposal: Proposal, num_samples: int, max_samples: int | None = None) -> Candidate:
    """Draw from a fit, more often as long as that alone would make weighted moments precise enough.

    Args:
        proposal: the fit.
        num_samples: draws to begin with.
        max_samples: draws at most.
    """
    draws = proposal.draw(num_samples)
    values = proposal.values(draws.noise)
    while True:
        found = _weigh(proposal, draws, values)
        need = len(draws.noise) * max(found.precision.mean / MEAN, found.precision.log_sd / LOG_SD, 0.0) ** 2
        more = min(int(1.3 * need), max_samples or 0) - len(draws.noise)
        if more <= 0 or found.k > good_k(len(draws.noise)) or need > 4 * (max_samples or 0):
            return found
        further = proposal.draw(more)
        draws = draws + further
        extra = proposal.values(further.noise)
        values = {name: torch.cat([value, extra[name]]) for name, value in values.items()}


def _weigh(proposal: Proposal, draws: Draws, values: dict[str, Tensor]) -> Candidate:
    log_w = draws.log_weight
    if int(torch.isfinite(log_w).sum()) < MIN_SAMPLES:
        none = Precision(math.inf, math.inf, "")
        return Candidate(proposal, draws, torch.full_like(log_w, -math.log(len(log_w))), math.inf, 0.0, none)
    smoothed, k = psis(log_w)
    return Candidate(
        proposal, draws, smoothed, float(k), float(effective_sample_size(smoothed)), precision(values, smoothed)
    )


def judge(candidate: Candidate, fits: Sequence[Gaussian]) -> Candidate:
    """Ask every witness, and return the candidate with what they say.

    Args:
        candidate: weighted draws of a fit.
        fits: Gaussians fitted from different starts.
    """
    findings = [_judge_weights(candidate), _judge_precision(candidate)]
    if candidate.k < math.inf:
        findings.append(_judge_drift(candidate))
        findings.append(_judge_restarts(candidate, fits))
    return replace(candidate, findings=tuple(findings))


def _judge_weights(candidate: Candidate) -> Finding:
    limit = good_k(len(candidate.log_weights))
    text = f"k-hat {candidate.k:.2f} where {limit:.2f} is allowed, effective sample size {candidate.ess:.0f}"
    return Finding("weights", 2 * (not candidate.k < limit), text)


def _judge_precision(candidate: Candidate) -> Finding:
    found = candidate.precision
    bad = not (found.mean <= MEAN and found.log_sd <= LOG_SD)
    text = f"standard errors {found.mean:.3f} sd of a mean (at most {MEAN}), {found.log_sd:.3f} of a log sd ({LOG_SD})"
    return Finding("precision", 2 * bad, f"{text}, worst in site '{found.site}'")


def _judge_drift(candidate: Candidate) -> Finding:
    few, many = CHAINS
    num_chains = many if candidate.proposal.frame.size <= CHEAP else few
    found: Drift = drift(candidate.proposal, candidate.draws, candidate.log_weights, num_chains)
    limit = float(-torch.special.ndtri(torch.tensor(CHANCE / (2 * found.num), dtype=torch.float64)))
    still = not found.accept >= 0.3  # chains that stand still say nothing
    text = f"chains move moments by {found.z:.1f} standard errors (chance allows {limit:.1f})"
    text += f", a mean by {found.shift:.2f} sd at most; they accept {found.accept:.0%}"
    return Finding("chains", 2 * (still or not found.z <= limit), text)


def _judge_restarts(candidate: Candidate, fits: Sequence[Gaussian]) -> Finding:
    usable = [fit for fit in fits if math.isfinite(fit.bound)]
    if not usable:
        return Finding("restarts", 2, "no restart ended anywhere")
    gain, error = missed_mass(candidate.proposal, candidate.log_evidence, usable)
    error = math.hypot(error, evidence_error(candidate.draws.log_weight))
    bad = not gain <= MASS + 3 * error
    text = f"draws of {len(usable)} restarts together find {gain:+.2f} ± {error:.2f} nats of evidence beyond the fit's"
    return Finding("restarts", 2 * bad, text)
