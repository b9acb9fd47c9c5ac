"""What README.md says in numbers, and which section or command of the report supports it.

A claim's words stand in the README as they stand here, line breaks aside; one that no longer does is marked as stale.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from report_accuracy import failing_rows, finite, last, middle, reached
from report_tables import markdown_table, show

__all__ = ["CLAIMS", "Claim", "claims_table", "plain_text"]

Runs = dict[str, Any]  # what every section wrote, by key


class Claim(NamedTuple):
    """Words of the README.

    Attributes:
        words: as they stand there, with single spaces.
        source: key of a section, a command, or empty where nothing measures it.
        here: what the report's sections found, a number or text.
    """

    words: str
    source: str
    here: Callable[[Runs], Any] | None = None


VAE = "VAE, K = 50, batch 20"
NET = "network 64-32-32, validation on"


def printed(title: str, unit: str = "nats") -> Callable[[Runs], str]:
    """Numbers that a block of the README's code prints before a unit."""

    def found(runs: Runs) -> str:
        row = next(row for row in runs["readme"]["rows"] if row["title"] == title)
        return ", ".join(re.findall(rf"(-?[\d.]+(?: ± [\d.]+)?) {unit}", row["printed"])[:4])

    return found


def evidence(title: str) -> Callable[[Runs], str]:
    """Exact log evidence of a block's data."""
    return lambda runs: f"{next(r['log_evidence'] for r in runs['readme']['rows'] if r['title'] == title):.1f}"


def step_ratio(name: str) -> Callable[[Runs], float]:
    """Cost of a VAE's step to that of the plain gradient."""
    return lambda runs: (
        runs["elbo-step"]["rows"][VAE][name]["ratio"] / runs["elbo-step"]["rows"][VAE]["IWAE pathwise"]["ratio"]
    )


def score_ratio(title: str, other: str = "TraceGraph") -> Callable[[Runs], float]:
    """Cost of a leave-one-out step."""
    return lambda runs: runs["score-function"]["step_costs"][title]["leave-one-out"][other]["ratio"]


def vimco_ratio(runs: Runs) -> float:
    """Cost of a VIMCO step to Trace_ELBO's."""
    rows = runs["score-function"]["step_costs"][NET]
    return rows["IWAE vimco"]["ms"] / rows["Trace_ELBO"]["ms"]


def race_share(opponent: str) -> Callable[[Runs], str]:
    """Share of the opponent's seconds, by seed, at its rate."""

    def found(runs: Runs) -> str:
        race = next(r for r in runs["score-function"]["races"] if r["opponent"] == opponent)
        return ", ".join(show(run["seconds"]) for run in race["train"])

    return found


def natural_steps(which: int) -> Callable[[Runs], str]:
    """The worst seed's steps to 0.1 nats, by dimension."""

    def found(runs: Runs) -> str:
        texts = []
        for result in runs["natural-gradient"]["full_rank"]:
            races = list(result["races"].values())[which]
            texts.append(f"{show(float(max(reached(race, '0.1', 'steps') for race in races)))} (d = {result['dim']})")
        return ", ".join(texts)

    return found


def adam_times(which: int, field: str) -> Callable[[Runs], str]:
    """Median over seeds of Adam's steps or seconds to ours, at the largest dimension."""

    def found(runs: Runs) -> str:
        result = runs["natural-gradient"]["full_rank"][-1]
        *ours, theirs = result["races"].values()
        pairs = zip(ours[which], theirs, strict=True)
        ratios = [min(reached(b, "0.1", field), last(b, field)) / reached(a, "0.1", field) for a, b in pairs]
        return f"{show(float(statistics.median(ratios)))} (d = {result['dim']})"

    return found


def mean_field(setting: str, most: int) -> Callable[[Runs], str]:
    """The gap of a mean-field run after so many steps, or its last one before."""

    def found(runs: Runs) -> str:
        second = runs["natural-gradient"]["parity"]
        points = [p for r in second["mean_field"] if r["setting"] == setting for p in r["points"] if p[0] <= most]
        steps, _, _, gap = max(points, key=lambda point: point[0])
        return f"{show(gap)} after {steps} steps (d = {second['dim']})"

    return found


def tuned_trace_elbo(runs: Runs) -> str:
    """Seconds of Adam under Trace_ELBO to 0.1 nats at its best rate, and of ours, at the largest dimension."""
    result = runs["natural-gradient"]["full_rank"][-1]
    races = {name: [reached(r, "0.1", "seconds") for r in found] for name, found in result["tuning"].items()}
    theirs = min((min(times) for name, times in races.items() if "Trace_ELBO" in name), default=math.inf)
    return f"{show(theirs)} s, {show(min(races['NaturalGradient, default']))} s (d = {result['dim']})"


def low_rank(runs: Runs) -> str:
    """Last gaps of low rank and full rank."""
    second = runs["natural-gradient"]["parity"]
    gaps = ", ".join(f"{r['kind']}: {show(r['points'][-1][3])}" for r in second["low_rank"])
    return f"{gaps} (d = {second['dim']})"


def kl(*guides: str, section: str = "flow-guides") -> Callable[[Runs], str]:
    """Median KL by target."""

    def found(runs: Runs) -> str:
        rows, texts = runs[section]["quality"], []
        for guide in guides:
            by_target = [
                f"{show(middle(finite([r for r in rows if (r['target'], r['guide']) == (target, guide)], 'kl')))}"
                for target in dict.fromkeys(row["target"] for row in rows)
            ]
            texts.append("; ".join(by_target))
        return " / ".join(texts)

    return found


variant = partial(kl, section="flow-variants")


def best_gaussian(runs: Runs) -> str:
    """The best ELBO of a Gaussian on the eight schools, of which the log evidence is -31.311 nats."""
    rows = [r for r in runs["flow-guides"]["quality"] if r["target"] == "eight-schools"]
    return f"{-31.311 - min(finite([r for r in rows if r['guide'] == 'AutoMultivariateNormal'], 'kl')):.2f}"


def guide_cost(guide: str, other: str = "") -> Callable[[Runs], str]:
    """Step cost by target, to AutoDiagonalNormal's or another's."""

    def found(runs: Runs) -> str:
        rows = {(r["target"], r["guide"]): r for r in runs["flow-costs"]["cost"]}
        targets = dict.fromkeys(target for target, _ in rows)
        return "; ".join(
            show(rows[t, guide]["ms"] / rows[t, other]["ms"] if other else rows[t, guide]["ratio"]) for t in targets
        )

    return found


def exact_means(runs: Runs) -> str:
    """Exact posterior means of the eight schools."""
    row = next(r for r in runs["autofit"] if r["posterior"] == "eight-schools")
    return ", ".join(f"{site} {show(row['moments'][site][0])}" for site in ("mu", "tau"))


def autofit_passes(runs: Runs) -> str:
    """How many fits pass, and how many are trusted wrongly."""
    rows = runs["autofit-references"]
    return f"{sum(r['passes'] for r in rows)} of {len(rows)}, {sum(r['silent'] for r in rows)} trusted wrongly"


def compiled(key: str) -> Callable[[Runs], str]:
    """Geometric mean and range of a ratio."""

    def found(runs: Runs) -> str:
        values = [row[key] for row in runs["compiled-svi"]["rows"] if row.get(key)]
        return f"{show(statistics.geometric_mean(values))} ({show(min(values))} to {show(max(values))})"

    return found


def first_steps(key: str) -> Callable[[Runs], str]:
    """Range of seconds before the first step."""

    def found(runs: Runs) -> str:
        values = [row["compiled"].get(key, math.nan) for row in runs["compiled-svi"]["rows"] if row["compiled"]]
        return f"{show(min(values))} to {show(max(values))} s"

    return found


def break_even(runs: Runs) -> str:
    """Range of steps after which compiling pays."""
    values = [row["break_even"] for row in runs["compiled-svi"]["rows"] if row.get("break_even")]
    return f"{min(values)} to {max(values)}"


def vae_share(way: str) -> Callable[[Runs], str]:
    """Range of a compiled VAE step's time to another's."""

    def found(runs: Runs) -> str:
        rows = runs["compiled-vae"]["rows"]
        values = [row["compiled"]["milliseconds"] / row[way]["milliseconds"] for row in rows]
        return f"{show(min(values))} to {show(max(values))}"

    return found


def failures(runs: Runs) -> str:
    """Failing rows by library."""
    counts = failing_rows(runs["conformance"])
    return ", ".join(f"{whose} {failed} of {rows} fail" for whose, (failed, rows) in counts.items())


def robust_kl(target: str, rate: float) -> Callable[[Runs], float]:
    """Median KL of AutoFlow at another rate."""
    return lambda runs: middle(
        finite([r for r in runs["flow-robust"]["robust"]
                if (r["target"], r["guide"], r["rate"]) == (target, "AutoFlow", rate)], "kl")
    )  # fmt: skip


def model(run: str, *keys: str) -> Callable[[Runs], str]:
    """A model's numbers by line of its table; a reduced run has its smallest form only."""

    def found(runs: Runs) -> str:
        tables = {row["run"]: row["table"] for row in runs["gallery"]["rows"]}
        table = tables.get(run) or tables[f"{run} --quick"]
        labels = [next(r[k] for k in ("objective", "run", "guide", "posterior", "optimiser") if k in r) for r in table]
        values = [" / ".join(show(at(row, key)) for key in keys) for row in table]
        return "; ".join(f"{label}: {value}" for label, value in zip(labels, values, strict=True))

    return found


def several(key: str, *names: str) -> Callable[[Runs], str]:
    """The last lines of several runs."""
    return lambda runs: "; ".join(model(name, key)(runs).rpartition("; ")[2] for name in names)


def at(row: dict[str, Any], key: str) -> Any:
    """A field of a row, or one within it."""
    for part in key.split("."):
        row = (row or {}).get(part)
    return row


CLAIMS = (
    Claim("Trace_ELBO -191.8 nats", "readme", printed("twenty lines")),
    Claim("The log evidence of these data is -171.2 nats", "readme", evidence("twenty lines")),
    Claim("TraceGraph_ELBO -7011.9 nats", "readme", printed("discrete latents")),
    Claim("The log evidence is -6551.3 nats", "readme", evidence("discrete latents")),
    Claim("0.7 nats a digit over the ELBO", "gallery", model("vae", "gain")),
    Claim("0.7 nats a digit; less over one layer with deeper networks", "gallery", model("hvae", "gain")),
    Claim("0.4 nats a digit; 1.5 worse after 400 steps", "gallery", several(
        "elbo", "flow_vae", "flow_vae --steps 400")),
    Claim("0.4 nats a digit over the leave-one-out ELBO", "gallery",
          model("sigmoid_belief_network", "gain")),
    Claim("100 % counted right; 0.6 nats a canvas over the ELBO", "gallery", model("air", "weighted", "gain")),
    Claim("prior to 0.01, guide to 0.2", "gallery", model("gaussian_mixture", "K", "prior_error", "guide_error")),
    Claim("6 passes for Adam's 40", "gallery", model("lda", "passes_to_target")),
    Claim("one step where linear", "gallery", model("bayesian_regression --family linear", "steps_to_near")),
    Claim("12 for Adam's 4000 where logistic", "gallery", model("bayesian_regression", "steps_to_near")),
    Claim("-5.44 nats a row, both", "gallery", model("bnn", "log_likelihood")),
    Claim("KL 0.015 nats; a Gaussian 2.2", "gallery", model("eight_schools", "kl")),
    Claim("KL 0.35 nats; a Gaussian 1.8", "gallery", model("radon", "kl")),
    Claim("0.04 nats a series off a Kalman filter", "gallery", model("state_space", "gaps.1")),
    Claim("0.07 off a particle filter", "gallery", model("state_space --kind volatility", "gaps.10")),
    Claim("KL 0.04 nats; 0.69 is one mode", "gallery", model("two_modes", "kl")),
    Claim('no variance where the guide is the posterior | reparameterised sites whose density can be evaluated '
          'anywhere | 1.3', "elbo-step", step_ratio("IWAE dreg")),
    Claim("another fixed point | the same | 1.3", "elbo-step", step_ratio("IWAE stl")),
    Claim("which costs what Pyro's vectorised `RenyiELBO(alpha=0)` does", "elbo-step",
          lambda runs: runs["elbo-step"]["rows"][VAE]["IWAE pathwise"]["ratio"]),
    Claim("1.2 of `Trace_ELBO`", "score-function", vimco_ratio),
    Claim("costs 0.46 of Pyro's `TraceGraph_ELBO`", "score-function", score_ratio(NET)),
    Claim("0.08 of it as it comes", "score-function", score_ratio(NET, "TraceGraph looped")),
    Claim("With validation off it is 0.58", "score-function", score_ratio("network 64-32-32, validation off")),
    Claim("on a 64-200-200 network 0.80", "score-function", score_ratio("network 64-200-200, validation off")),
    Claim("final bound in 0.08 of its time", "score-function", race_share("TraceGraph")),
    Claim("0.14 with Pyro's decaying average as baseline, for which one of three seeds took 0.23", "score-function",
          race_share("TraceGraph + average")),
    Claim("NaturalGradient after 10 steps -282.4 nats", "readme", printed("natural gradients")),
    Claim("in 8 steps at d = 20, 50 and 100", "natural-gradient", natural_steps(0)),
    Claim("in 6, 5 and 5", "natural-gradient", natural_steps(1)),
    Claim("49 times the steps", "natural-gradient", adam_times(0, "steps")),
    Claim("28 times the seconds of the defaults", "natural-gradient", adam_times(0, "seconds")),
    Claim("88 and 50 times those with the radius", "natural-gradient",
          lambda runs: f"{adam_times(1, 'steps')(runs)}, {adam_times(1, 'seconds')(runs)}"),
    Claim("it gets there in 22 s at best, against 0.1 s", "natural-gradient", tuned_trace_elbo),
    Claim("1.9 nats from its optimum after 1600 steps", "natural-gradient", mean_field('direction="gradient"', 1600)),
    Claim("0.001 nats after 20 steps", "natural-gradient", mean_field('direction="newton"', 20)),
    Claim("ends 27 nats below the full-rank optimum after 8 s", "natural-gradient", low_rank),
    Claim("AutoPlatedFlow -31.33 nats", "readme", printed("flow guides")),
    Claim("-33.1 the best of three trainings of `AutoMultivariateNormal`", "flow-guides",
          best_gaussian),
    Claim("6 000 at d = 10 | 1.4 |", "flow-costs", guide_cost("AutoFlow")),
    Claim("15 000, whatever the size of the plate | 1.4 to 2.1", "flow-costs", guide_cost("AutoPlatedFlow")),
    Claim("a step of `AutoFlow` takes 2.6 and 3.6 times as long", "flow-costs", guide_cost("AutoFlow-stl", "AutoFlow")),
    Claim("ends at 0.005 and 0.002 nats instead of", "flow-guides", kl("AutoFlow-stl")),
    Claim("| `AutoFlow` | 0.019 | 0.016 | 0.10 |", "flow-guides", kl("AutoFlow")),
    Claim("| `AutoPlatedFlow`, features | 0.008 | 0.016 | 0.055", "flow-guides", kl("AutoPlatedFlow")),
    Claim("| Pyro `AutoMultivariateNormal` | 1.90 | 1.90 | 1.05 |", "flow-guides", kl("AutoMultivariateNormal")),
    Claim("| Pyro `AutoIAFNormal`, as it comes; 3 x (64, 64) | 1.37; 0.29 |", "flow-guides",
          kl("AutoIAFNormal", "AutoIAFNormal-3x64")),
    Claim("| NumPyro `AutoIAFNormal`, as it comes; 3 x (64, 64) | 0.50; 0.18 |", "flow-guides",
          kl("numpyro-AutoIAFNormal", "numpyro-AutoIAFNormal-3x64")),
    Claim("| NumPyro `AutoBNAFNormal` | 1.20 | 1.01 | 3.16 |", "flow-guides", kl("numpyro-AutoBNAFNormal")),
    Claim("| Pyro `AutoNormal` | | | 16, on minibatches of 20 |", "flow-guides", kl("AutoNormal")),
    Claim("0.2 nats, from a mixture 0.02 to 0.3", "gallery", several(
        "kl", "two_modes", *(f"two_modes --seed {seed}" for seed in range(1, 5)))),
    Claim("it wins 0.3 to 1.1 nats after 2500 steps", "gallery", several(
        "elbo", "flow_vae", *(f"flow_vae --seed {seed}" for seed in range(1, 5)))),
    Claim("loses 1.5 after 400", "gallery", several("elbo", "flow_vae --steps 400")),
    Claim("splines end at 0.022 and 0.24 nats", "flow-variants", variant("AutoFlow-spline")),
    Claim("coupling layers at 0.024 and 0.23", "flow-variants", variant("AutoFlow-coupling")),
    Claim("a dense affine map at 0.028 and 0.040", "flow-variants", variant("AutoFlow-tril")),
    Claim("splines at two to three times its cost", "flow-costs", guide_cost("AutoFlow-spline", "AutoFlow")),
    Claim("ends at 0.016 and 0.014", "flow-variants", variant("AutoFlow-deep")),
    Claim("for a tenth more a step", "flow-costs", guide_cost("AutoFlow-deep", "AutoFlow")),
    Claim("under ELU the funnel ends at 0.035", "flow-variants", variant("AutoFlow-elu")),
    Claim("`affine_rate=1` ends at 0.013 and 0.015", "flow-variants", variant("AutoFlow-even")),
    Claim("without it eight schools end at 0.11", "flow-variants", variant("AutoFlow-as-is")),
    Claim("at 1e-3 `AutoFlow` ends at 0.11 on eight schools", "flow-robust", robust_kl("eight-schools", 1e-3)),
    Claim("at 2e-2 at 0.04 on the funnel", "flow-robust", robust_kl("funnel", 2e-2)),
    Claim("loss 31.38 ± 0.05 nats after 1200 steps", "readme",
          printed("fit, judge, keep")),
    Claim("Exactly, by quadrature, the mean of `mu` is 4.4 and that of `tau` 3.6", "autofit", exact_means),
    Claim("fourteen came within 0.1 standard deviations of every mean", "autofit-references", autofit_passes),
    Claim("SVI 876 microseconds a step CompiledSVI 7 microseconds a step", "readme",
          printed("compiled steps", "microseconds")),
    Claim("its steps are 116 times as fast as `SVI.step`", "compiled-svi", compiled("ratio")),
    Claim("1.6 times as fast as NumPyro's compiled loop", "compiled-svi", compiled("to_numpyro")),
    Claim("Compiling took 13 to 47 seconds on two busy cores", "compiled-svi", first_steps("first")),
    Claim("pays after four to twenty-eight thousand steps", "compiled-svi", break_even),
    Claim("another process takes its first step after 1 to 5 seconds", "compiled-svi", first_steps("warm")),
    Claim("take 0.5 to 0.7 of `SVI.step`'s time", "compiled-vae", vae_share("eager")),
    Claim("0.8 to 1.1 of that of a loop written by hand", "compiled-vae", vae_share("by hand")),
    Claim("in about a minute", "`python -m pyro_elbo_ext.testing pyro_elbo_ext:IWAE_ELBO`"),
    Claim("of this package, in which no row fails", "conformance", failures),
)  # fmt: skip


def plain_text(text: str) -> str:
    """Return a text with single spaces."""
    return re.sub(r"\s+", " ", text)


def rows(runs: Runs, readme: str, sections: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield claim, source and what was found here."""
    text = plain_text(readme)
    for claim in CLAIMS:
        words = claim.words.replace("|", "\\|")
        source = f"[{sections[claim.source]}](#{claim.source})" if claim.source in sections else claim.source
        here = "-"
        if claim.here and claim.source in runs:
            try:
                here = show(claim.here(runs))
            except (LookupError, TypeError, ValueError, ArithmeticError, StopIteration):
                here = "not among this run's rows"
        stale = "" if claim.words in text else " (**no longer in the README**)"
        yield words + stale, source or "**no script**", here


def claims_table(runs: Runs, readme: str, sections: dict[str, str]) -> str:
    """Return the table of what the README says."""
    return markdown_table(("the README says", "section or command", "in this report"), rows(runs, readme, sections))
