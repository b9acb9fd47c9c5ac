"""From the JSON of the benchmarks that time steps to tables in Markdown, and to comparisons for the summary.

A comparison is oriented so that more is better for this package: a factor is the other's time, memory or steps over
ours, a gain in nats ours minus the other's (or their KL minus ours).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

__all__ = ["Comparison", "Data", "Found", "faster", "markdown_table", "show", "spread", "within"]

Data = Any  # what a benchmark wrote
TIE, ALONE = 0.05, 0.1  # beyond a tie, by the whole spread or by one number without
LEAST_MIB = 4  # below it a peak is the kernel's counting


class Comparison(NamedTuple):
    """One line of the summary.

    Attributes:
        what: ours, and on what.
        other: what it is held against.
        value: factor or gain in nats, above 1 or 0 where this package is better.
        low: its lower quartile or the least of what was seen.
        high: its upper quartile or the largest.
        unit: ``"times"`` or ``"nats"``.
    """

    what: str
    other: str
    value: float
    low: float
    high: float
    unit: str = "times"

    @property
    def verdict(self) -> str:
        """Wins or loses where the whole spread is on one side of a tie."""
        neutral, width = float(self.unit == "times"), ALONE if self.low == self.high else TIE
        if self.low > neutral + width:
            return "wins"
        return "loses" if self.high < neutral - width else "ties"


class Found(NamedTuple):
    """Tables, and what they say for the summary."""

    text: str
    comparisons: list[Comparison]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; numbers have three digits."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(show(cell) for cell in row) + " |" for row in rows)])


def show(cell: Any) -> str:
    """Format a cell: None is a dash, floats have three digits."""
    if isinstance(cell, float):
        if not math.isfinite(cell):
            return "-" if math.isnan(cell) else "not reached"
        return f"{cell:.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return "-" if cell is None else str(cell)


def within(low: float, high: float) -> str:
    """Format a spread; a dash where there is none."""
    if low == high:
        return "-"
    return f"{show(float(low))} to {show(float(high))}"


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Return median, least and largest."""
    return statistics.median(values), min(values), max(values)


def faster(what: str, other: str, row: dict[str, float]) -> Comparison:
    """Turn a ratio of costs with quartiles, ours to theirs, into a factor."""
    return Comparison(what, other, 1 / row["ratio"], 1 / row["ratio_high"], 1 / row["ratio_low"])


def elbo_step(data: Data) -> Found:
    """Step cost and memory, this package's losses and Pyro's."""
    parts, comparisons = [], []
    for title, rows in data["rows"].items():
        reference = next(iter(rows))
        cells = [(name, row["ms"], row["ratio"], within(row["ratio_low"], row["ratio_high"]),
                  row.get("mib"), row.get("mib_ratio")) for name, row in rows.items()]  # fmt: skip
        head = ("loss", "ms a step", f"to {reference}", "quartiles", "peak MiB", "ratio")
        parts.append(f"**{title}**\n\n{markdown_table(head, cells)}")
        comparisons += [faster(f"{name}: {title}", reference, row) for name, row in rows.items() if name != reference]
        for name, row in rows.items():
            if name != reference and row.get("mib_ratio"):
                value = 1 / row["mib_ratio"]
                comparisons.append(Comparison(f"{name}: {title}, memory", reference, value, value, value))
    return Found("\n\n".join(parts), comparisons)


def score_costs(data: Data) -> tuple[list[str], list[Comparison]]:
    """Step cost of score-function losses."""
    parts, comparisons = [], []
    for title, rows in data["step_costs"].items():
        others = [key for key in next(iter(rows.values())) if key != "ms"]
        cells = [
            (name, row["ms"], *(v for other in others for v in
             (row[other]["ratio"], within(row[other]["ratio_low"], row[other]["ratio_high"]))))
            for name, row in rows.items()
        ]  # fmt: skip
        head = ["loss", "ms a step", *(h for other in others for h in (f"to {other}", "quartiles"))]
        parts.append(f"**{title}**\n\n{markdown_table(head, cells)}")
        for other in others:
            comparisons.append(faster(f"leave-one-out step: {title}", f"pyro {other}", rows["leave-one-out"][other]))
    return parts, comparisons


def score_function(data: Data) -> Found:
    """Step cost, and the time to the opponent's final bound."""
    parts, comparisons = score_costs(data)
    cells = []
    for race in data["races"]:
        for images, title in (("train", "training"), ("test", "held-out")):
            shares = [spread([run[key] for run in race[images]]) for key in ("seconds", "steps")]
            cells.append(
                (race["opponent"], race["rate"], race["our_rate"], title,
                 *(v for share in shares for v in (share[0], within(*share[1:]))))
            )  # fmt: skip
            if images == "train":
                value, low, high = shares[0]
                what = f"leave-one-out (rate {race['our_rate']:g}): seconds to the other's final bound"
                other = f"pyro {race['opponent']} (rate {race['rate']:g})"
                comparisons.append(Comparison(what, other, 1 / value, 1 / high, 1 / low))
    head = (
        "opponent",
        "its rate",
        "our rate",
        "images",
        "share of its seconds",
        "range",
        "share of its steps",
        "range",
    )
    text = "**Leave-one-out's time to stay above the opponent's final bound**, as a share of the opponent's whole time"
    return Found("\n\n".join([*parts, text, markdown_table(head, cells)]), comparisons)


WAYS = ("eager", "jit", "compiled", "numpyro loop", "numpyro update")


def compiled_svi(data: Data) -> Found:
    """Compiled steps beside eager ones, Pyro's JIT and NumPyro."""
    cells, comparisons = [], []
    for row in data["rows"]:
        times = {way: row[way]["microseconds"] if row.get(way) else None for way in WAYS}
        ours, title = row["compiled"] or {}, f"{row['model']}, K = {row['particles']}"
        cells.append((title, *times.values(), row.get("ratio"), row.get("to_numpyro"),
                      ours.get("first"), ours.get("warm"), row.get("break_even")))  # fmt: skip
        for way in ("eager", "jit", "numpyro loop"):
            if times[way] and times["compiled"]:
                value = times[way] / times["compiled"]
                comparisons.append(Comparison(f"CompiledSVI: {title}", way_name(way), value, value, value))
    head = ("microseconds a step", *map(way_name, WAYS), "eager / compiled", "NumPyro loop / compiled",
            "first step cold, s", "warm, s", "break-even, steps")  # fmt: skip
    means = []
    for key, other in (("ratio", "SVI.step"), ("to_numpyro", "NumPyro's loop")):
        if values := [row[key] for row in data["rows"] if row.get(key)]:
            mean = statistics.geometric_mean(values)
            means.append(f"Geometric mean of {len(values)}: {show(mean)} times as fast as {other} "
                         f"({within(min(values), max(values))}).")  # fmt: skip
    return Found("\n\n".join([markdown_table(head, cells), *means]), comparisons)


def way_name(way: str) -> str:
    """Name a way of taking steps."""
    names = {"eager": "SVI.step", "jit": "pyro JitTrace_ELBO", "compiled": "CompiledSVI"}
    return names.get(way) or way.replace("numpyro", "NumPyro")


def compiled_vae(data: Data) -> Found:
    """Compiled steps of a VAE."""
    cells, comparisons = [], []
    for row in data["rows"]:
        title, ours = f"batch {row['batch_size']}, K = {row['num_particles']}", row["compiled"]["milliseconds"]
        others = {way: row[way]["milliseconds"] for way in ("eager", "by hand")}
        cells.append((title, *others.values(), ours, *(ours / other for other in others.values())))
        for way, other in others.items():
            name = "SVI.step" if way == "eager" else "torch.compile by hand"
            comparisons.append(Comparison(f"CompiledSVI: VAE, {title}", name, *[other / ours] * 3))
    head = ("milliseconds a step", "SVI.step", "torch.compile by hand", "CompiledSVI", "to SVI.step", "to by hand")
    return Found(markdown_table(head, cells), comparisons)


def scaling(data: Data) -> Found:
    """Time and memory of eager steps against particles, rows and coordinates."""
    parts, comparisons = [], []
    for axis in dict.fromkeys(row["axis"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["axis"] == axis]
        cells = [
            (row["size"], name, found["microseconds"], found["ratio"], within(found["ratio_low"], found["ratio_high"]),
             found["mib"])
            for row in rows for name, found in row["losses"].items()
        ]  # fmt: skip
        head = (axis, "loss", "microseconds a step", f"to {data['reference']}", "quartiles", "peak MiB")
        names = {"particles": "particles", "rows": "rows", "dim": "latent dimension"}
        fixed = ", ".join(f"{name} {rows[0][key]}" for key, name in names.items() if not axis.startswith(name))
        parts.append(f"**{axis.capitalize()}** ({fixed})\n\n{markdown_table(head, cells)}")
        for row in (rows[0], rows[-1]):
            comparisons += scaled(row, data["reference"])
    return Found("\n\n".join(parts), comparisons)


def scaled(row: dict[str, Any], reference: str) -> list[Comparison]:
    """Hold one point's losses against Pyro's, in time and, where it can be told, in memory."""
    found, theirs = [], row["losses"][reference]
    for name, ours in row["losses"].items():
        if not name.startswith("pyro"):
            size = f"{row['size']:,}"
            what = f"{row['axis']} {size}" if row["axis"] == "latent dimension" else f"{size} {row['axis']}"
            what = f"{name}, eager step: {what}"
            found.append(faster(what, reference, ours))
            if min(ours["mib"], theirs["mib"]) > LEAST_MIB:
                found.append(Comparison(f"{what}, memory", reference, *[theirs["mib"] / ours["mib"]] * 3))
    return found


def data_parallel(data: Data) -> Found:
    """Two processes beside one."""
    cells, comparisons = [], []
    for title, row in data["rows"].items():
        efficiency = within(row["efficiency_low"], row["efficiency_high"])
        cells.append((title, row["megabytes"], row["one_ms"], row["two_ms"], row["alone_ms"], row["efficiency"],
                      efficiency, row["cpu_efficiency"], row["cpu_overhead"]))  # fmt: skip
        speed = (2 * row[key] for key in ("efficiency", "efficiency_low", "efficiency_high"))
        comparisons.append(Comparison(f"DistributedSVI, two processes: {title}", "SVI on one, the same rows", *speed))
    head = ("VAE", "MB", "1 x 2b ms", "2 x b ms", "1 x b ms", "efficiency", "quartiles", "of CPU", "CPU 2/1")
    parts = [markdown_table(head, cells)]
    for name, link in (("measured link", data["link"]), ("assumed network", data["network"])):
        nodes = list(next(iter(data["rows"].values()))["model"][name])
        rows = [(title, *row["model"][name].values()) for title, row in data["rows"].items()]
        text = f"**Model, not measured: efficiency on more nodes**, {name}, {1e6 * link['alpha']:.0f} us and"
        text += f" {link['beta'] / 1e9:.2f} GB/s"
        parts.append(f"{text}\n\n{markdown_table(('nodes', *nodes), rows)}")
    return Found("\n\n".join(parts), comparisons)
