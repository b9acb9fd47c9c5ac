"""One call that asks whether a guide's draws can be trusted, and answers in words."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_elbo_ext.diagnostics.bracket import Bracket, annealed_bracket
from pyro_elbo_ext.diagnostics.calibration import Calibration, calibrate
from pyro_elbo_ext.diagnostics.evidence import BoundPoint, importance_bounds
from pyro_elbo_ext.diagnostics.gradients import GradientSummary, gradient_summaries
from pyro_elbo_ext.diagnostics.nested import LocalTails, candidate_plates, local_k
from pyro_elbo_ext.diagnostics.sampling import PosteriorDraws, make_sampler, posterior_draws, seeded
from pyro_elbo_ext.diagnostics.target import Target
from pyro_elbo_ext.diagnostics.terms import ELBOTerms, elbo_terms
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
from pyro_elbo_ext.diagnostics.weights import effective_sample_size, good_k, k_error, pareto_k
from pyro_elbo_ext.diagnostics.witnesses import Effects, against, corrected, drift, score_balance
from pyro_elbo_ext.tracing import Hold, forked_rng, run_pair

__all__ = ["Report", "diagnose"]

_CHAINS = 128
_Pair = tuple[Callable, Callable, tuple, dict[str, Any]]
_CANNOT = (ValueError, NotImplementedError, torch.linalg.LinAlgError)  # refusals, which are reported


@dataclass(frozen=True)
class Report:
    """What was found about a guide; print it.

    Attributes:
        draws: of the guide, with their weights.
        k: k-hat of whole draws.
        local: k-hat per plate element: of the draws' own weights where all latents are inside plates, else given the
            latents outside.
        ess: effective sample size, ``[*plates]`` with the plates over which weights factorise, else of whole draws.
        bounds: the importance-weighted bound for rising numbers of particles.
        terms: the ELBO by site.
        correction: what smoothed weights change.
        score: the slope under the guide.
        bracket: the annealed bounds.
        drift: where annealed chains went.
        against: comparison with a reference.
        gradients: of the loss, by parameter.
        calibration: of refits to simulated data.
        skipped: what could not be looked at, and why.
        findings: what each witness says.
        verdict: what they say together.
        reason: why.
        advice: what to try next, most useful first.
    """

    draws: PosteriorDraws
    k: float
    local: list[LocalTails]
    ess: Tensor
    bounds: list[BoundPoint]
    terms: ELBOTerms
    correction: Effects | None
    score: Effects | None
    bracket: Bracket | None
    drift: Effects | None
    against: Effects | None
    gradients: dict[str, GradientSummary]
    calibration: Calibration | None
    skipped: dict[str, str]
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
    """
    if num_samples < 100:
        raise ValueError(f"a diagnosis needs num_samples >= 100, got {num_samples}")
    pair: _Pair = (model, guide, args, kwargs)
    skipped: dict[str, str] = {}
    with seeded(seed):
        draws = posterior_draws(*pair, num_samples, vectorize=vectorize)
        if draws.indices:  # all witnesses look at one minibatch
            pair = (Hold(draws.indices)(model), Hold(draws.indices)(guide), args, kwargs)
        k = float(pareto_k(draws.joint_log_weight))
        local = _local(draws, pair, skipped)
        bounds = importance_bounds(draws, particles)
        terms = elbo_terms(*pair, 200)
        score = _tried("score", skipped, lambda: score_balance(*pair)) if vectorize else None
        bracket = _annealed(pair, temperatures, max_seconds, reference, skipped) if vectorize else None
        if not vectorize:
            skipped["score, annealing"] = "they need vectorised particles"
        calibration = None if refit is None else calibrate(model, refit, args, kwargs)
        gradients = {} if loss is None else gradient_summaries(loss, *pair)
    correction = corrected(draws)
    moved = None if bracket is None else drift(draws, bracket)
    compared = None if reference is None else against(draws, reference)
    findings = _findings(draws, k, local, bounds, correction, score, bracket, moved, compared, calibration)
    verdict, reason = decide(findings)
    return Report(
        draws=draws,
        k=k,
        local=local,
        ess=effective_sample_size(draws.log_weight),
        bounds=bounds,
        terms=terms,
        correction=correction,
        score=score,
        bracket=bracket,
        drift=moved,
        against=compared,
        gradients=gradients,
        calibration=calibration,
        skipped=skipped,
        findings=findings,
        verdict=verdict,
        reason=reason,
        advice=advise(verdict, findings),
    )


def _tried(name: str, skipped: dict[str, str], look: Callable) -> Any:
    try:
        return look()
    except _CANNOT as error:
        skipped[name] = str(error)
        return None


def _local(draws: PosteriorDraws, pair: _Pair, skipped: dict[str, str]) -> list[LocalTails]:
    """Return k-hat per element, from the draws' own weights or given the latents outside each plate."""
    if draws.plates:
        return [LocalTails(draws.plates, pareto_k(draws.log_weight).unsqueeze(0), draws.num_samples)]
    with forked_rng(), poutine.block(), torch.no_grad():
        plates = list(candidate_plates(run_pair(*pair)))
    found: list[LocalTails] = []
    for plate in plates:
        tails = _tried(f"k-hat in {plate}", skipped, lambda plate=plate: local_k(*pair, plate=plate))
        if tails is not None and tails.plates not in [other.plates for other in found]:
            found.append(tails)
    return found


def _annealed(
    pair: _Pair, temperatures: int, max_seconds: float, reference: Any, skipped: dict[str, str]
) -> Bracket | None:
    if temperatures == 0:
        skipped["annealing"] = "temperatures=0"
        return None

    def look() -> Bracket | None:
        with forked_rng():
            target = Target(make_sampler(*pair, _CHAINS))
            start = time.perf_counter()
            target.slopes(target.start, 0.5)
            seconds = (time.perf_counter() - start) * 12 * temperatures * (1.5 if reference else 1)
        if seconds > max_seconds:
            skipped["annealing"] = f"it would take about {seconds:.0f} s, more than max_seconds={max_seconds:g}"
            return None
        return annealed_bracket(*pair, num_chains=_CHAINS, num_temperatures=temperatures, reference=reference)

    return _tried("annealing", skipped, look)


def _findings(
    draws: PosteriorDraws,
    k: float,
    local: list[LocalTails],
    bounds: list[BoundPoint],
    correction: Effects | None,
    score: Effects | None,
    bracket: Bracket | None,
    moved: Effects | None,
    compared: Effects | None,
    calibration: Calibration | None,
) -> list[Finding]:
    units = float((torch.ones_like(draws.log_weight[0]) * draws.scale).sum()) if draws.plates else 1.0
    elements = draws.log_weight[0].numel()
    coordinates = sum(value[0].numel() for value in draws.values.values()) / elements
    found = [
        judge_weights(k, draws.num_samples, local, bool(draws.plates)),
        judge_gap(bounds, units, coordinates),
    ]
    if correction is not None and found[0].level < 2:
        found.append(judge_effects("correction", correction, "the guide less its weighted draws"))
    if score is not None:
        found.append(judge_score(score))
    if bracket is not None:
        found.append(judge_annealing(bracket, draws.importance_weighted, bounds[-1].se, units))
    if moved is not None:
        found.append(judge_effects("chains", moved, "the guide less annealed chains"))
    if compared is not None:
        found.append(judge_effects("reference", compared, "the guide less the reference"))
    if calibration is not None:
        found.append(judge_calibration(calibration))
    return found
