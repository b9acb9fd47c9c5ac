"""From the JSON of the benchmarks of convergence and accuracy to tables and comparisons, as in ``report_tables.py``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from report_tables import Comparison, Data, Found, faster, markdown_table, show, spread, within

__all__ = ["autofit", "conformance", "flow_costs", "flow_guides", "flow_robust", "flow_scale", "gallery",
           "natural_gradient", "readme", "reproduce", "staged_stop"]  # fmt: skip

TARGETS = ("1.0", "0.1", "0.01")


def reached(race: dict[str, Any], target: str, field: str) -> float:
    """Return steps, scores or seconds of a run to a target, infinite where it did not get there."""
    point = race["reached"].get(target)
    return math.inf if point is None else point[("steps", "scores", "seconds").index(field)]


def last(race: dict[str, Any], field: str) -> float:
    """Return what a run took when it was stopped."""
    return race["points"][-1][("steps", "scores", "seconds").index(field)]


def natural_gradient(data: Data) -> Found:
    """Steps, scores and seconds to a gap, and where natural gradients do not win."""
    cells, comparisons = [], []
    for result in data["full_rank"]:
        *mine, adam = result["races"]
        for target in TARGETS:
            for name, races in result["races"].items():
                row: list[Any] = [result["dim"], target, name]
                for field in ("steps", "scores", "seconds"):
                    found = spread([reached(race, target, field) for race in races])
                    row.append(show(float(found[0])) + (f" ({within(*found[1:])})" if found[1] < found[2] else ""))
                cells.append(row)
        for name in mine:
            for field in ("steps", "seconds"):
                ratios = [
                    min(reached(theirs, "0.1", field), last(theirs, field)) / reached(ours, "0.1", field)
                    for ours, theirs in zip(result["races"][name], result["races"][adam], strict=True)
                ]
                what = f"{name}: {field} to 0.1 nats, d = {result['dim']}"
                comparisons.append(Comparison(what, f"best of grid: {adam}", *spread(ratios)))
    second = data["parity"]
    tables = []
    for key, title in (("mean_field", "Mean field"), ("low_rank", "Low rank beside full rank")):
        rows = [(f"{r['kind']}, {r['setting']}", *r["points"][-1][::2], r["points"][-1][3]) for r in second[key]]
        text = f"**{title}**, d = {second['dim']}: gap to the best such guide when the run ended, in nats"
        text = text.replace("best such", "best full-rank") if key == "low_rank" else text
        tables.append(f"{text}\n\n{markdown_table(('who', 'steps', 'seconds', 'gap'), rows)}")
    comparisons += mean_field(second)
    head = ("d", "gap in nats", "who", "steps", "scores", "seconds")
    text = "**Full rank**: medians (range over seeds) to a gap below the exact optimum"
    return Found("\n\n".join([text, markdown_table(head, cells), *tables]), comparisons)


def mean_field(second: Data) -> list[Comparison]:
    """Compare last gaps under a mean-field guide, on which pure natural gradients are not at home."""
    adam = min(r["points"][-1][3] for r in second["mean_field"] if r["kind"] != "NaturalGradient")
    found = []
    for race in second["mean_field"]:
        if race["kind"] == "NaturalGradient":
            gain = adam - race["points"][-1][3]
            what = f"NaturalGradient, {race['setting']}: last gap, mean field, d = {second['dim']}"
            found.append(Comparison(what, "best Adam of the grid", gain, gain, gain, "nats"))
    return found


def staged_stop(data: Data) -> Found:
    """The stopping rule beside constant step sizes."""
    cells, gains, steps = [], [], []
    for row in data["rows"]:
        ends = row["constant"], row["staged"]
        gains.append(ends[1]["elbo"] - ends[0]["elbo"])
        steps.append(ends[0]["steps"] / ends[1]["steps"])
        numbers = [cell for end in ends for cell in (f"{end['elbo']:.2f}", end["steps"], end["seconds"])]
        cells.append(
            (row["seed"], row["rate"], row["batch"] or "all", *numbers, ends[1]["stopped"], f"{gains[-1]:.2f}")
        )
    head = ("seed", "rate", "batch", "constant ELBO", "steps", "s", "staged ELBO", "steps", "s", "stopped by", "gain")
    below = data["worst_staged"] - data["best_constant"]
    text = f"Best constant run {data['best_constant']:.2f} nats, worst staged run {data['worst_staged']:.2f}: "
    text += f"{-below:.2f} nats below ({data['limit']} asked)."
    what = "stop='staged', regression of 500 rows"
    comparisons = [
        Comparison(f"{what}: ELBO", "constant steps, same start", *spread(gains), "nats"),
        Comparison(f"{what}: steps", "constant steps, same start", *spread(steps)),
        Comparison(f"{what}: the worst run's ELBO", "the best constant run", below, below, below, "nats"),
    ]
    return Found(f"{markdown_table(head, cells)}\n\n{text}", comparisons)


def autofit(data: Data) -> Found:
    """Errors of automatic fits against the verdict."""
    cells = [
        (row["posterior"], row["seed"], row["mean"], row["log_sd"], row["k"], row["ess"], row.get("evidence_error"),
         "trusted" if row["trusted"] else "not trusted",
         "pass" if row["passes"] else "**SILENT FAILURE**" if row["silent"] else "-", row["seconds"], row["rung"])
        for row in data
    ]  # fmt: skip
    head = ("posterior", "seed", "mean error, sd", "log sd error", "k-hat", "ESS", "log evidence error", "verdict",
            "result", "s", "chosen")  # fmt: skip
    passes, silent = (sum(row[key] for row in data) for key in ("passes", "silent"))
    median = statistics.median(row["seconds"] for row in data)
    text = f"{passes} of {len(data)} pass, {silent} trusted wrongly, median {median:.1f} s."
    exact = [
        (row["posterior"], site, mean, deviation)
        for row in data if row["seed"] == 0 and row.get("moments")
        for site, (mean, deviation) in row["moments"].items() if not isinstance(mean, list)
    ]  # fmt: skip
    parts = [markdown_table(head, cells), text]
    if exact:
        parts.append(
            "**Exact moments**, by quadrature\n\n" + markdown_table(("posterior", "site", "mean", "sd"), exact)
        )
    return Found("\n\n".join(parts), [])


def finite(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    """Return the numbers that runs have."""
    return [row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])]


def middle(values: Sequence[float]) -> float:
    """Return a median, not a number if there is none."""
    return statistics.median(values) if values else math.nan


def flow_guides(data: Data) -> Found:
    """KL to the exact posterior of all guides."""
    rows = data["quality"]
    parts, comparisons = [], []
    for target in dict.fromkeys(row["target"] for row in rows):
        guides = {name: [r for r in rows if (r["target"], r["guide"]) == (target, name)]
                  for name in dict.fromkeys(row["guide"] for row in rows if row["target"] == target)}  # fmt: skip
        cells = []
        for name, runs in guides.items():
            numbers = [middle(finite(runs, key)) for key in ("kl", "k_hat", "ess", "ms", "parameters")]
            seeds = ", ".join("crashed" if "error" in run else show(run["kl"]) for run in runs)
            cells.append((name, *numbers[:-1], int(numbers[-1]) if numbers[-1] > 0 else None, seeds))
        head = ("guide", "KL in nats", "k-hat", "ESS/N", "ms a step", "numbers", "KL by seed")
        parts.append(f"**{target}**, medians\n\n{markdown_table(head, cells)}")
        comparisons += best_flows(target, guides)
    return Found("\n\n".join(parts), comparisons)


OURS = ("AutoFlow", "AutoPlatedFlow")


def best_flows(target: str, guides: dict[str, list[dict[str, Any]]]) -> list[Comparison]:
    """Hold our guides against the best median of Pyro's and of NumPyro's."""
    found = []
    for library in ("pyro", "numpyro"):
        theirs = {name: finite(runs, "kl") for name, runs in guides.items()
                  if not name.startswith(OURS) and name.startswith("numpyro") == (library == "numpyro")}  # fmt: skip
        theirs = {name: kls for name, kls in theirs.items() if kls}
        if not theirs:
            continue
        best = min(theirs, key=lambda name: statistics.median(theirs[name]))
        for name in OURS:
            if kls := finite(guides.get(name, []), "kl"):
                gains = [statistics.median(theirs[best]) - kl for kl in kls]
                other = f"best of {library}: {best.removeprefix('numpyro-')}"
                found.append(Comparison(f"{name}: KL, {target}", other, *spread(gains), "nats"))
        found += compiled_steps(target, guides, best) if library == "numpyro" else []
    return found


def compiled_steps(target: str, guides: dict[str, list[dict[str, Any]]], best: str) -> list[Comparison]:
    """Hold the time of our guides' eager steps against that of NumPyro's compiled ones."""
    theirs, found = middle(finite(guides[best], "ms")), []
    for name in OURS:
        ms = middle(finite(guides.get(name, []), "ms"))
        if math.isfinite(ms):
            value = theirs / ms
            other = f"numpyro {best.removeprefix('numpyro-')}, compiled"
            found.append(Comparison(f"{name}, eager step: {target}", other, value, value, value))
    return found


def flow_costs(data: Data) -> Found:
    """Step cost of guides."""
    rows = data["cost"]
    cells = [(r["target"], r["guide"], r["ms"], r["ratio"], within(r["ratio_low"], r["ratio_high"])) for r in rows]
    comparisons = [faster(f"{r['guide']} step: {r['target']}", "pyro AutoDiagonalNormal", r) for r in rows
                   if r["guide"].startswith(OURS)]  # fmt: skip
    head = ("target", "guide", "ms a step", "to AutoDiagonalNormal", "quartiles")
    return Found(markdown_table(head, cells), comparisons)


def flow_robust(data: Data) -> Found:
    """Crashes, and KL at other learning rates."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in data["robust"]:
        groups.setdefault((row["target"], row["guide"], row["rate"]), []).append(row)
    cells = []
    for key, runs in groups.items():
        crashes, bad = sum("error" in run for run in runs), sum(run.get("nonfinite", 0) > 0 for run in runs)
        kls = finite(runs, "kl")
        cells.append((*key, len(runs), crashes, bad, middle(kls), max(kls, default=math.nan)))
    head = ("target", "guide", "rate", "runs", "crashes", "non-finite", "KL, median", "worst")
    return Found(markdown_table(head, cells), [])


def flow_scale(data: Data) -> Found:
    """Parameters, memory and time of a plated flow against its groups."""
    cells = [(r["groups"], r["guide"], r["parameters"], r["peak"], r["ms"]) for r in data["scale"]]
    return Found(markdown_table(("groups", "guide", "numbers", "peak MiB", "ms a step"), cells), [])


def conformance(data: Data) -> Found:
    """Which identities hold for which class."""
    parts = []
    for title, columns in data["rows"].items():
        cells = []
        for identity, what in data["identities"].items():
            cells.append([f"{identity} {what}"])
            for rows in columns.values():
                seen = {row["passed"] for row in rows if row["identity"] == identity}
                cells[-1].append("**FAIL**" if False in seen else "pass" if True in seen else "n/a")
        failed = [f"- {name}, {row['identity']}, {row['name']}: {row['detail']}"
                  for name, rows in columns.items() for row in rows if row["passed"] is False]  # fmt: skip
        whose = title if title in ("Pyro", "NumPyro") else f"This package, {title}"
        parts += [f"**{whose}**\n\n{markdown_table(('', *columns), cells)}", f"Failing rows: {len(failed) or 'none'}."]
        parts += ["\n".join(failed)] if failed else []
    return Found("\n\n".join(parts), [])


def failing_rows(data: Data) -> dict[str, tuple[int, int]]:
    """Return rows that failed, and those that apply, by library."""
    counts: dict[str, tuple[int, int]] = {}
    for title, columns in data["rows"].items():
        whose = title if title in ("Pyro", "NumPyro") else "this package"
        rows = [row["passed"] for found in columns.values() for row in found if row["passed"] is not None]
        before = counts.get(whose, (0, 0))
        counts[whose] = (before[0] + rows.count(False), before[1] + len(rows))
    return counts


def readme(data: Data) -> Found:
    """What the README's code prints."""
    parts = []
    for row in data["rows"]:
        exact = "" if row["log_evidence"] is None else f", log evidence {row['log_evidence']:.1f} nats"
        parts.append(f"**{row['title']}**, {row['seconds']:.0f} s{exact}\n\n```\n{row['printed'].rstrip()}\n```")
    return Found("\n\n".join(parts), [])


def gallery(data: Data) -> Found:
    """What the models print."""
    parts = [f"**{row['run']}**, {row['seconds']:.0f} s\n\n```\n{row['printed'].strip()}\n```" for row in data["rows"]]
    return Found("\n\n".join(parts), [])


def reproduce(data: Data) -> Found:
    """Scores of published set-ups after a short training."""
    names = dict.fromkeys((r["row"], r["entry"]) for r in data["records"])
    cells = []
    for name in names:
        runs = [r for r in data["records"] if (r["row"], r["entry"]) == name]
        numbers = (
            statistics.fmean(r[key] for r in runs) for key in ("score", "score_error", "gain", "steps", "seconds")
        )
        score, *rest = numbers
        cells.append((*name, -score, *rest))
    head = ("row", "objective", "negative score, nats", "error over images", "gain on the row's first", "steps", "s")
    return Found(markdown_table(head, cells), [])
