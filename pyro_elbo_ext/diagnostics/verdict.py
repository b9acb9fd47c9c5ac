"""From numbers to words: what each witness says of a guide, and what they say together."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pyro_elbo_ext.diagnostics.bracket import Bracket
from pyro_elbo_ext.diagnostics.calibration import Calibration
from pyro_elbo_ext.diagnostics.evidence import BoundPoint
from pyro_elbo_ext.diagnostics.nested import LocalTails
from pyro_elbo_ext.diagnostics.weights import good_k, k_error
from pyro_elbo_ext.diagnostics.witnesses import Effects

__all__ = ["Finding", "Verdict", "decide"]

FAIR, BAD = 0.15, 0.4  # of a standard deviation, or of the log ratio of two


class Verdict(enum.Enum):
    """What to do with the guide's draws."""

    GOOD = "use the draws as they are"
    REWEIGHT = "use the draws with their importance weights"
    UNCLEAR = "not enough speaks for the draws, nor against them"
    BAD = "do not use the draws"


class Finding(NamedTuple):
    """What one witness says.

    Attributes:
        witness: its name.
        level: 0 nothing to see, 1 something, 2 too much.
        text: the numbers in words.
        sure: False where more draws might change the level.
    """

    witness: str
    level: int
    text: str
    sure: bool = True


def level_of(size: float) -> int:
    """Return 0, 1 or 2 for a size in standard deviations; 2 for one that is not a number."""
    return 0 if size <= FAIR else 1 if size <= BAD else 2


def judge_weights(k: float, num_samples: int, local: Sequence[LocalTails], factorised: bool) -> Finding:
    """Judge by k-hat whether the weights can correct the draws: per element where weights factorise, else jointly."""
    limit = good_k(num_samples)
    if factorised and local:
        share = local[0].share_above
        level = 0 if share <= 0.05 else 1 if share <= 0.2 else 2
        return Finding("weights", level, f"k-hat is above {limit:.2f} for {share:.0%} of the elements")
    level = 0 if k <= min(0.5, limit) else 1 if k <= limit else 2
    text = f"k-hat {k:.2f} ± {k_error(k, num_samples):.2f} where {num_samples} draws allow {limit:.2f}"
    return Finding("weights", level, text, sure=level < 2 or k - k_error(k, num_samples) > limit)


def judge_gap(bounds: Sequence[BoundPoint], units: float, coordinates: float) -> Finding:
    """Judge how far the bound rises, in nats per independent element."""
    last = bounds[-1]
    gain, error = last.gain / units, last.gain_se / units
    excess = max(gain - 2 * error, 0.0)
    level = 0 if excess <= max(0.1, 0.02 * coordinates) else 1 if excess <= max(0.5, 0.1 * coordinates) else 2
    each = "" if units == 1 else " an element"
    rising = ""
    if len(bounds) > 1 and gain > 0.1:
        step = (last.gain - bounds[-2].gain) / units
        rising = ", and still rises" if step > max(2 * error, 0.1 * gain) else ""
    return Finding("gap", level, f"the bound gains {gain:.2f} nats{each} at K = {last.num_particles}{rising}")


def judge_effects(witness: str, effects: Effects, what: str) -> Finding:
    """Judge shifts of means and ratios of standard deviations."""
    name, shift, ratio, noise = effects.worst
    text = f"{what}: {shift:+.2f} ± {noise:.2f} sd in mean"
    text += f", sd ratio {ratio:.2f}" if any(float(r.abs().max()) > 0 for r in effects.log_sd.values()) else ""
    return Finding(witness, level_of(effects.size), f"{text} at {name}, the worst")


def judge_score(effects: Effects) -> Finding:
    """Judge the slope under the guide; forgiving, for in narrow directions a small step changes it much."""
    name, shift, ratio, noise = effects.worst
    level = 0 if effects.size <= 0.3 else 1 if effects.size <= 1 else 2
    text = f"the guide by its slope: {shift:+.2f} ± {noise:.2f} sd in mean, sd ratio {ratio:.2f} at {name}, the worst"
    return Finding("score", level, text)


def judge_annealing(bracket: Bracket, bound: float, bound_se: float, units: float) -> Finding:
    """Judge whether annealing finds more evidence than the weights did, in nats per independent element."""
    excess = (bracket.lower - bound) / units
    error = math.hypot(bracket.lower_se, bound_se) / units
    level = 0 if excess <= 0.25 + 2 * error else 1 if excess <= 1 + 3 * error else 2
    each = "" if units == 1 else " an element"
    return Finding("annealing", level, f"it finds {excess:+.2f} ± {error:.2f} nats{each} beyond all draws in one bound")


def judge_calibration(calibration: Calibration) -> Finding:
    """Judge the ranks of simulation-based calibration."""
    found = calibration.describe()
    text = "; ".join(f"{name}: {what}" for name, what in list(found.items())[:3])
    return Finding("calibration", 2 if found else 0, text or f"ranks are uniform (p = {calibration.p_value:.2f})")


def decide(findings: Sequence[Finding]) -> tuple[Verdict, str]:
    """Return the verdict and the sentence that gives its reason.

    No single witness acquits. Draws are good where weights, their correction and at least one witness that does not
    live on the weights agree. The slope alone does not condemn: along a narrow ridge it asks for a step of many of the
    ridge's widths that is nothing beside its length, and chains that stay outvote it.
    """
    level = {finding.witness: finding.level for finding in findings}
    outer = [name for name in ("reference", "calibration") if level.get(name, 0) == 2]
    if outer:
        return Verdict.BAD, f"the {outer[0]} contradicts the guide"
    moved = [name for name in ("chains", "annealing", "score") if level.get(name, 0) == 2]
    if level.get("chains") == 0:
        moved = [name for name in moved if name != "score"]
    if level["weights"] == 2:
        return _without_weights(next(f for f in findings if f.witness == "weights"), moved, level)
    if level.get("correction", 0) == 2 or level["gap"] == 2:
        if "annealing" in moved:
            return Verdict.BAD, "annealing finds mass that the weighted draws miss"
        return Verdict.REWEIGHT, "the guide is off, but its weights can correct it"
    if moved == ["score"]:
        return Verdict.UNCLEAR, "the weights look fine, but not the slope under the guide"
    if moved:
        return Verdict.BAD, f"the weights look fine, but {_and(moved, 'sees', 'see')} mass that no draw met"
    seen = [name for name in ("chains", "score", "reference", "calibration") if name in level]
    if not seen:
        return Verdict.UNCLEAR, "only the weights speak, and they cannot see what no draw met"
    if max(level.get(name, 0) for name in ("correction", "chains", "reference", "gap")) or level.get("score", 0) == 2:
        return Verdict.REWEIGHT, "the guide is slightly off, which its weights correct"
    return Verdict.GOOD, "weights, correction and " + _and(seen, "agrees", "agree")


def _without_weights(weights: Finding, moved: Sequence[str], level: Mapping[str, int]) -> tuple[Verdict, str]:
    """Decide where the weights are too uneven to correct the draws."""
    if not moved and not weights.sure:
        return Verdict.UNCLEAR, "whether the weights are too uneven takes more draws to tell"
    if not moved and ("reference" in level or level.get("chains") == 0):
        return Verdict.UNCLEAR, "the weights are too uneven to vouch for the draws, though nothing else moves them"
    whose = " of too many elements" if "elements" in weights.text else ""
    both = f", and {_and(moved, 'contradicts', 'contradict')} them" if moved else ""
    return Verdict.BAD, f"a few draws carry all the weight{whose}{both}"


def _and(names: Sequence[str], one: str, several: str) -> str:
    listed = " and ".join([", ".join(names[:-1])] * (len(names) > 1) + [names[-1]])
    return f"{listed} {one if len(names) == 1 and names[0] != 'chains' else several}"


def advise(verdict: Verdict, findings: Sequence[Finding]) -> list[str]:
    """Return what to try next, most useful first."""
    level = {finding.witness: finding.level for finding in findings}
    advice = []
    if verdict is Verdict.REWEIGHT:
        advice.append("weight or resample the draws: to_arviz(..., correct='psis')")
    if level.get("score", 0):
        advice.append("longer training, a smaller step or averaged iterates, if the guide's family can move there")
    outside = max(level.get(name, 0) for name in ("reference", "calibration", "correction"))
    if level["weights"] == 2 or level["gap"] or outside == 2:
        advice.append(
            "a guide that can hold the posterior's shape: AutoMultivariateNormal, AutoFlow, AutoPlatedFlow for plates, "
            "a larger encoder; or a non-centred model"
        )
    if level["gap"]:
        advice.append("IWAE_ELBO, whose guide covers more of the posterior, and its draws reweighted")
    if verdict is Verdict.BAD and {"annealing", "chains"} & {name for name, value in level.items() if value == 2}:
        advice.append("restarts from other initial values, AutoFlow.warm_start or init_loc_fn: mass lies elsewhere")
    if level.get("calibration", 0) == 2:
        advice.append("what the calibration says of each site")
    if any(not finding.sure for finding in findings):
        advice.append("num_samples= ten times as many, which settle k-hat")
    if verdict is Verdict.UNCLEAR:
        advice.append("another witness: reference= draws of MCMC, or refit= for simulation-based calibration")
    return advice
