"""One call that asks whether a guide's draws can be trusted, and answers in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_elbo_ext.diagnostics.examination import Examination, examine
from pyro_elbo_ext.diagnostics.sampling import seeded
from pyro_elbo_ext.diagnostics.verdict import (
    Finding,
    Verdict,
    advise,
    decide,
    judge_annealing,
    judge_calibration,
    judge_effects,
    judge_gap,
    judge_score,
    judge_weights,
)
from pyro_elbo_ext.diagnostics.weights import good_k, k_error

__all__ = ["Report", "diagnose"]


@dataclass(frozen=True)
class Report(Examination):
    """What was found about a guide, and what it means; print it. The numbers are :class:`Examination`'s.

    Attributes:
        findings: what each witness says.
        verdict: what they say together.
        reason: why.
        advice: what to try next, most useful first.
    """

    findings: list[Finding]
    verdict: Verdict
    reason: str
    advice: list[str]

    @property
    def trusted(self) -> bool:
        """True where the draws can be used as they are."""
        return self.verdict is Verdict.GOOD

    def __str__(self) -> str:
        rows = [*_evidence_rows(self), *_weight_rows(self)]
        rows += [(finding.witness, finding.text) for finding in self.findings if finding.witness != "weights"]
        rows += [("gradient SNR", f"{s.snr:.2f} ({name})") for name, s in self.gradients.items()]
        rows += [(f"no {name}", why) for name, why in self.skipped.items()]
        rows.append(("verdict", f"{self.verdict.name}: {self.verdict.value}, for {self.reason}"))
        rows += [("try" if i == 0 else "", text) for i, text in enumerate(self.advice)]
        return "\n".join(f"{name:<16}{text}" for name, text in rows)


def _evidence_rows(report: Report) -> list[tuple[str, str]]:
    terms, draws = report.terms, report.draws
    note = " (annealed: scales differ by site, no bound)" if draws.annealed else ""
    parts = f"reconstruction {terms.reconstruction:.2f}, KL {terms.kl:.2f}"
    rows = [("ELBO", f"{report.bounds[0].value:.2f} ± {report.bounds[0].se:.2f} nats{note}; {parts}")]
    shown = [point for point in report.bounds[1:] if point.num_particles in (10, 100) or point is report.bounds[-1]]
    rows += [(f"L_{point.num_particles}", f"{point.value:.2f} ± {point.se:.2f}") for point in shown]
    if report.bracket is not None:
        b = report.bracket
        upper = "" if b.upper is None else f", from above {b.upper:.2f} ± {b.upper_se:.2f}"
        rows.append(("annealed", f"{b.lower:.2f} ± {b.lower_se:.2f} from below{upper}; acceptance {b.acceptance:.2f}"))
    return rows


def _weight_rows(report: Report) -> list[tuple[str, str]]:
    num = report.draws.num_samples
    median, least = float(report.ess.median()), float(report.ess.min())
    whose = f", median of the elements, {least:.0f} the least" if report.draws.plates else ""
    rows = [("ESS", f"{median:.0f} of {num} draws{whose}")]
    note = ", which grows with the number of elements" if report.draws.plates else ""
    text = f"{report.k:.2f} ± {k_error(report.k, num):.2f} of whole draws{note}; {num} draws allow {good_k(num):.2f}"
    rows.append(("k-hat", text))
    for tails in report.local:
        k = tails.k
        given = "" if report.draws.plates else " given the latents outside"
        text = f"median {float(k.median()):.2f}, largest {float(k.max()):.2f}, {tails.share_above:.0%} too large"
        rows.append(("", f"per element of {', '.join(tails.plates)}{given}: {text}"))
    return rows


def diagnose(
    model: Callable,
    guide: Callable,
    *args: Any,
    num_samples: int = 1000,
    particles: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    temperatures: int = 50,
    max_seconds: float = 30.0,
    reference: Mapping[str, Tensor] | None = None,
    refit: Callable | None = None,
    loss: Any = None,
    vectorize: bool = True,
    seed: int | None = None,
    **kwargs: Any,
) -> Report:
    """Ask whether a guide's draws can be trusted. Other keyword arguments go to model and guide.

    The verdict needs witnesses that agree: the tail of the weights, the gain of the importance-weighted bound, what
    smoothed weights change, the slope under the guide, where annealed chains go, and what the caller brings: reference
    draws or refits. What cannot be looked at is listed with its reason. Whether training has settled is only seen in
    the slope; far-away modes are not seen at all without a reference. Put modules that behave differently in
    training into evaluation mode first. Parameters and their gradients are left alone.

    Args:
        model: a Pyro model.
        guide: its trained guide.
        *args: their positional arguments; a subsampled plate must hold all latents.
        num_samples: draws of the guide, at least 100.
        particles: numbers of particles K of the importance-weighted bound.
        temperatures: steps of annealing with 128 chains; 0 leaves it out.
        max_seconds: annealing that is estimated to take longer is left out.
        reference: draws of the posterior, ``[num_draws, *plates, *event]`` by latent site.
        refit: from observations by site to a guide, or draws, for simulation-based calibration with 100 data sets; see
            :func:`calibrate`.
        loss: whose gradients' signal-to-noise ratio is measured over 50 replicates.
        vectorize: run draws at once; without it score and annealing are left out.
        seed: of everything, the global random state being left as it was; by default that is used.
        **kwargs: keyword arguments of model and guide. One of a name above is passed by ``functools.partial``.

    Raises:
        ValueError: no random latent, a pair that does not match, a subsampled plate that not all latents are inside, a
            log-weight that is NaN, or fewer than 100 draws; site or plate is named.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(2))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(torch.full((2,), 0.5), 0.5**0.5).to_event(1))
        >>> report = diagnose(model, guide, seed=0)
        >>> report.verdict.name, report.trusted
        ('GOOD', True)
    """
    if num_samples < 100:
        raise ValueError(f"a diagnosis needs num_samples >= 100, got {num_samples}")
    with seeded(seed):
        found = examine(
            (model, guide, args, kwargs),
            num_samples,
            particles,
            temperatures,
            max_seconds,
            reference,
            refit,
            loss,
            vectorize,
        )
    findings = _findings(found)
    verdict, reason = decide(findings)
    advice = advise(verdict, findings)
    return Report(**vars(found), findings=findings, verdict=verdict, reason=reason, advice=advice)


def _findings(found: Examination) -> list[Finding]:
    draws = found.draws
    units = float((torch.ones_like(draws.log_weight[0]) * draws.scale).sum()) if draws.plates else 1.0
    coordinates = sum(value[0].numel() for value in draws.values.values()) / draws.log_weight[0].numel()
    weights = judge_weights(found.k, draws.num_samples, found.local, bool(draws.plates))
    findings = [weights, judge_gap(found.bounds, units, coordinates)]
    if found.correction is not None and weights.level < 2:
        findings.append(judge_effects("correction", found.correction, "the guide less its weighted draws"))
    if found.score is not None:
        findings.append(judge_score(found.score))
    if found.bracket is not None:
        findings.append(judge_annealing(found.bracket, draws.importance_weighted, found.bounds[-1].se, units))
    if found.drift is not None:
        findings.append(judge_effects("chains", found.drift, "the guide less annealed chains"))
    if found.against is not None:
        findings.append(judge_effects("reference", found.against, "the guide less the reference"))
    if found.calibration is not None:
        findings.append(judge_calibration(found.calibration))
    return findings
