"""The report's pictures, one function for each: from a benchmark's JSON onto a figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # draws with Agg: no display, no global state
from matplotlib.ticker import NullFormatter
from PIL import Image  # comes with matplotlib

__all__ = ["compiled_svi", "flow_guides", "natural_gradient", "save", "scaling", "score_function"]

Data = Any  # what a benchmark wrote
TARGET = 0.1  # nats


def save(path: Path, draw: Callable[[Data, Figure], None], data: Data) -> None:
    """Write a picture of few colours, which is small, the same bytes for the same data."""
    figure, buffer = Figure(figsize=(9, 4.2), dpi=90, layout="constrained"), BytesIO()
    draw(data, figure)
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                axis.set_minor_formatter(NullFormatter())
    figure.savefig(buffer)
    Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)


def scaling(data: Data, figure: Figure) -> None:
    """Draw microseconds a step and peak memory against each size."""
    figure.set_size_inches(10, 5)
    axes = list(dict.fromkeys(row["axis"] for row in data["rows"]))
    grid = figure.subplots(2, len(axes), squeeze=False, sharex="col")
    for column, axis in enumerate(axes):
        rows = [row for row in data["rows"] if row["axis"] == axis]
        sizes = [row["size"] for row in rows]
        for name in rows[0]["losses"]:
            style = "--" if name.startswith("pyro") else "-"
            for line, key in enumerate(("microseconds", "mib")):
                values = [max(row["losses"][name][key], 0.1) for row in rows]
                grid[line, column].loglog(sizes, values, style, marker=".", label=name)
        grid[1, column].set_xlabel(axis)
    grid[0, 0].set_ylabel("microseconds a step")
    grid[1, 0].set_ylabel("peak MiB (0.1 or less: 0.1)")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)


def natural_gradient(data: Data, figure: Figure) -> None:
    """Draw the gap against steps, scores and seconds at the largest dimension, every seed a line."""
    result = data["full_rank"][-1]
    panels = figure.subplots(1, 3, sharey=True)
    for column, (axes, what) in enumerate(zip(panels, ("steps", "score evaluations", "seconds"), strict=True)):
        for number, (name, races) in enumerate(result["races"].items()):
            for seed, race in enumerate(races):
                points = [point for point in race["points"] if point[3] > 0]
                label = name if seed == 0 else None
                axes.loglog([p[column] for p in points], [p[3] for p in points], color=f"C{number}", lw=1, label=label)
        axes.axhline(TARGET, color="0.6", lw=0.8, ls=":")
        axes.set_xlabel(what)
        axes.set_ylim(1e-3, 1e3)
    panels[0].set_ylabel(f"nats below the exact optimum, d = {result['dim']}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)


def score_function(data: Data, figure: Figure) -> None:
    """Draw the bound on training images against seconds, every seed a thin line and the median a thick one."""
    axes = figure.subplots()
    for number, (name, runs) in enumerate(data["curves"].items()):
        for run in runs:
            axes.semilogx(run["seconds"], run["train"], color=f"C{number}", lw=0.6, alpha=0.4)
        medians = [
            [statistics.median(values) for values in zip(*(run[key] for run in runs), strict=True)]
            for key in ("seconds", "train")
        ]
        axes.semilogx(*medians, color=f"C{number}", lw=2, label=name)
    axes.set(xlabel="seconds of training", ylabel="ELBO, nats a training image")
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.3)


def compiled_svi(data: Data, figure: Figure) -> None:
    """Draw microseconds a step of every way, as bars."""
    axes = figure.subplots()
    ways = [way for way in ("eager", "jit", "numpyro loop", "compiled") if any(row.get(way) for row in data["rows"])]
    names = {"eager": "SVI.step", "jit": "JitTrace_ELBO", "numpyro loop": "NumPyro's loop", "compiled": "CompiledSVI"}
    for number, way in enumerate(ways):
        at = [i + (number - (len(ways) - 1) / 2) * 0.8 / len(ways) for i in range(len(data["rows"]))]
        heights = [row[way]["microseconds"] if row.get(way) else 0 for row in data["rows"]]
        axes.bar(at, heights, 0.8 / len(ways), label=names[way])
    axes.set_yscale("log")
    labels = [f"{row['model']}\nK = {row['particles']}" for row in data["rows"]]
    axes.set_xticks(range(len(labels)), labels, fontsize=8, rotation=45 if len(labels) > 6 else 0)
    axes.set_ylabel("microseconds a step")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)


def flow_guides(data: Data, figure: Figure) -> None:
    """Draw the KL to the exact posterior, a dot for each seed."""
    targets = list(dict.fromkeys(row["target"] for row in data["quality"]))
    for axes, target in zip(figure.subplots(1, len(targets), squeeze=False)[0], targets, strict=True):
        rows = [row for row in data["quality"] if row["target"] == target]
        guides = list(dict.fromkeys(row["guide"] for row in rows))[::-1]
        for row in rows:
            if row.get("kl", 0) > 0:
                ours = row["guide"].startswith(("AutoFlow", "AutoPlatedFlow"))
                axes.semilogx(row["kl"], guides.index(row["guide"]), "o", color="C0" if ours else "C1", ms=5)
        axes.set_yticks(range(len(guides)), guides, fontsize=7)
        axes.set_title(target)
        axes.grid(alpha=0.3, axis="x")
    figure.supxlabel("KL to the posterior, nats", fontsize=10)
