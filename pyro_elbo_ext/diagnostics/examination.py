"""Everything that is looked at for one report, before it is judged."""

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
from pyro_elbo_ext.diagnostics.sampling import PosteriorDraws, make_sampler, posterior_draws
from pyro_elbo_ext.diagnostics.target import Target
from pyro_elbo_ext.diagnostics.terms import ELBOTerms, elbo_terms
from pyro_elbo_ext.diagnostics.weights import effective_sample_size, pareto_k
from pyro_elbo_ext.diagnostics.witnesses import Effects, against, corrected, drift, score_balance
from pyro_elbo_ext.tracing import Hold, forked_rng, run_pair

__all__ = ["Examination", "examine"]

_CHAINS = 128
_Pair = tuple[Callable, Callable, tuple, dict[str, Any]]
_CANNOT = (ValueError, NotImplementedError, torch.linalg.LinAlgError)  # refusals, which are reported


@dataclass(frozen=True)
class Examination:
    """What was found about a guide.

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


def examine(
    pair: _Pair,
    num_samples: int,
    particles: Sequence[int],
    temperatures: int,
    max_seconds: float,
    reference: Mapping[str, Tensor] | None,
    refit: Callable | None,
    loss: Any,
    vectorize: bool,
) -> Examination:
    """Look at a pair, ``(model, guide, args, kwargs)``; the settings are those of :func:`diagnose`."""
    skipped: dict[str, str] = {}
    draws = posterior_draws(*pair, num_samples, vectorize=vectorize)
    model, guide, args, kwargs = pair
    gradients = {} if loss is None else gradient_summaries(loss, *pair)
    if draws.indices:  # all other witnesses look at one minibatch
        pair = (Hold(draws.indices)(model), Hold(draws.indices)(guide), args, kwargs)
    if not vectorize:
        skipped["score, annealing"] = "they need vectorised particles"
    bracket = _annealed(pair, temperatures, max_seconds, reference, skipped) if vectorize else None
    return Examination(
        draws=draws,
        k=float(pareto_k(draws.joint_log_weight)),
        local=_local(draws, pair, skipped),
        ess=effective_sample_size(draws.log_weight),
        bounds=importance_bounds(draws, particles),
        terms=elbo_terms(*pair, 200),
        correction=corrected(draws),
        score=_tried("score", skipped, lambda: score_balance(*pair)) if vectorize else None,
        bracket=bracket,
        drift=None if bracket is None else drift(draws, bracket),
        against=None if reference is None else against(draws, reference),
        gradients=gradients,
        calibration=None if refit is None else calibrate(model, refit, args, kwargs),
        skipped=skipped,
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
