"""Which identities hold for which ELBO class: this package's, Pyro's own and, where it is installed, NumPyro's.

Every class runs through the suite of ``pyro_elbo_ext.testing``, the identities C1 to C13, under what it claims to be.
A cell says whether all rows of an identity that apply held; below the tables stands every row that did not, with its
numbers. Columns whose cells are all n/a are of losses that are no bound. Nothing is timed.

    python benchmarks/conformance.py [--quick] [--only PART] [--size 0.1] [--json FILE] [--markdown FILE]

``--quick`` takes one class of each kind and few replicates, and keeps the defects of Pyro that are known. NumPyro is
not a dependency: put it on the path, for instance by ``pip install --target DIR numpyro`` and ``PYTHONPATH=DIR``.
The script returns 1 if a row of this package fails.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro.infer as pyros
import torch
from timing import versions

from pyro_elbo_ext import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    VRIWAE_ELBO,
    MeanField_ELBO,
    Price_ELBO,
    Regression_ELBO,
    ReweightedWakeSleep_ELBO,
    ScoreFunction_ELBO,
    ScoreRegression_ELBO,
)
from pyro_elbo_ext.bounds import VRIWAE
from pyro_elbo_ext.gradients import OVIS
from pyro_elbo_ext.testing import IDENTITIES, Check, conformance

FLAT, STEEP = (-0.65, -0.35), (-1.9, -1.2)  # slopes of log sd in log K
IWAE, ZERO = {"bound": "iwae"}, {"zero_variance": True}
SCORED = {"bound": "iwae", "scored": True, "min_particles": 2}
WAKE = {"bound": "iwae", "gradient": "rws", "min_particles": 2}
ELBO = {"bound": "elbo"}
WORDS = {True: "pass", False: "FAIL", None: "n/a"}


class Column(NamedTuple):
    """A class and what it claims.

    Attributes:
        make: returns the loss for ``num_particles=K``; None for a loss that is no bound.
        claims: arguments of ``conformance``.
        quick: part of a quick run.
        why: why nothing applies, where nothing does.
    """

    make: Callable[..., Any] | None
    claims: dict[str, Any] = {}
    quick: bool = False
    why: str = ""


def local(plates: tuple[str, ...]) -> Callable[..., Any]:
    """Return the locally enhanced bound with one global particle, which is IWAE over the plates named."""

    def make(num_particles: int, **kwargs: Any) -> IWAE_ELBO:
        return IWAE_ELBO(1, local_particles=num_particles, plates=plates, **kwargs)

    return make


def pyro_renyi(num_particles: int, **kwargs: Any) -> Any:
    """Return Pyro's Renyi bound at alpha = 1/2, with an attribute that says which function of log-weights it is."""
    loss = pyros.RenyiELBO(alpha=0.5, num_particles=num_particles, **{"vectorize_particles": True, **kwargs})
    loss.bound = VRIWAE(0.5)
    return loss


class PyroWakeSleep(pyros.ReweightedWakeSleep):
    """Pyro's wake-sleep, whose loss is a pair of numbers."""

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return the first number."""
        return super().loss_and_grads(model, guide, *args, **kwargs)[0]

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return the first number."""
        return super().loss(model, guide, *args, **kwargs)[0]


def score(**kwargs: Any) -> Callable[..., Any]:
    """Return a maker of score-function ELBOs."""
    return partial(ScoreFunction_ELBO, **kwargs)


def vectorized(make: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    """Return a maker of a class of Pyro's that runs its particles at once."""
    return partial(make, vectorize_particles=True, **kwargs)


WEIGHTED = {
    "IWAE pathwise": Column(partial(IWAE_ELBO, gradient="pathwise"), {**IWAE, "slope": FLAT}),
    "dreg": Column(partial(IWAE_ELBO, gradient="dreg"), {**IWAE, **ZERO, "slope": STEEP}),
    "auto": Column(IWAE_ELBO, {**IWAE, **ZERO, "slope": STEEP}, quick=True),
    "stl": Column(partial(IWAE_ELBO, gradient="stl"), {**IWAE, **ZERO, "gradient": "iwae+rws", "slope": FLAT}),
    "vimco": Column(partial(IWAE_ELBO, gradient="vimco"), {**SCORED, "slope": FLAT}),
    "ovis": Column(partial(IWAE_ELBO, gradient="ovis"), {**SCORED, "slope": STEEP}),
    "ovis, gamma 1": Column(partial(IWAE_ELBO, gradient=OVIS(1.0)), {**SCORED, **ZERO, "gradient": "iwae+rws"}),
    "score": Column(partial(IWAE_ELBO, gradient="score"), {**IWAE, "scored": True}),
    "looped": Column(partial(IWAE_ELBO, vectorize_particles=False), {**IWAE, **ZERO}),
    "local, one plate": Column(local(("replicates",)), {**IWAE, "only": ["C1", "C2", "C4", "C7"]}),
    "local, two plates": Column(local(("replicates", "data")), {"only": ["C8"]}),
}
OTHERS = {
    "VR-IWAE": Column(partial(VRIWAE_ELBO, 0.4), ZERO, quick=True),
    "MIWAE": Column(MIWAE_ELBO, ZERO),
    "CIWAE": Column(partial(CIWAE_ELBO, 0.3), ZERO),
    "PIWAE": Column(PIWAE_ELBO, {"gradient": None}),
    "wake-sleep": Column(ReweightedWakeSleep_ELBO, {**WAKE, "slope": FLAT, "improves": True}, quick=True),
    "wake-sleep dreg": Column(partial(ReweightedWakeSleep_ELBO, wake_phi="dreg"), {**WAKE, **ZERO}),
    "mean-field": Column(MeanField_ELBO, {**ELBO, "slope": FLAT}),
    "regression": Column(Regression_ELBO, {**ELBO, "min_particles": 4}),
    "score regr.": Column(ScoreRegression_ELBO, {**ELBO, **ZERO, "min_particles": 3}),
    "Price": Column(Price_ELBO, {**ELBO, **ZERO}),
}
SCORES = {
    "leave-one-out": Column(
        ScoreFunction_ELBO, {**ELBO, **ZERO, "scored": True, "min_particles": 2, "slope": FLAT}, quick=True
    ),
    "no baseline": Column(score(baseline="none"), {**ELBO, "scored": True, "slope": FLAT}),
    "running mean": Column(score(baseline="running-mean"), {**ELBO, "scored": True}),
    "nvil": Column(score(baseline="nvil"), {**ELBO, "gradient": None}),
    "disarm": Column(score(gradient="disarm"), ELBO),
    "double-cv": Column(score(gradient="double-cv"), ELBO),
    "rebar": Column(score(gradient="rebar"), ELBO),
    "relax": Column(score(gradient="relax"), ELBO),
}
PYRO = {
    "Trace": Column(vectorized(pyros.Trace_ELBO), {**ELBO, "slope": FLAT}, quick=True),
    "TraceGraph": Column(vectorized(pyros.TraceGraph_ELBO), {**ELBO, "slope": FLAT}),
    "TraceEnum": Column(vectorized(pyros.TraceEnum_ELBO), {**ELBO, "slope": FLAT}),
    "TraceMeanField": Column(vectorized(pyros.TraceMeanField_ELBO), {**ELBO, "slope": FLAT}),
    "Renyi(0)": Column(vectorized(pyros.RenyiELBO, alpha=0), {**IWAE, "slope": FLAT}, quick=True),
    "Renyi(0.5)": Column(pyro_renyi),
    "wake-sleep": Column(vectorized(PyroWakeSleep), {"gradient": "rws", "min_particles": 2}, quick=True),
    "TailAdaptive": Column(None, why="loss() is not implemented and step() returns inf: no value to hold to a bound"),
    "MMD": Column(None, why="a discrepancy between samples, no bound on the evidence"),
    "EnergyDistance": Column(None, why="likelihood-free, no bound on the evidence"),
}
GROUPS = {"IWAE": WEIGHTED, "other bounds": OTHERS, "score function": SCORES, "Pyro": PYRO}
# What notes and trackers say of Pyro's classes: (column, a row that fails).
KNOWN = {
    "minibatches of RenyiELBO": ("Renyi(0)", "minibatch of 4 in 20"),
    "discrete guides of RenyiELBO": ("Renyi(0)", "belief network, gradient in first"),
    "weights of the model's plates alone": ("Renyi(0)", "guide that is joint over a plate, value"),
    "wake-sleep pooled over a plate": ("wake-sleep", "gradient of a row, bits"),
    "score beside an auxiliary site": ("Trace", "auxiliary site after a bit, gradient"),
}


def run(column: Column, size: float, trains: bool) -> list[Check]:
    """Return the rows of a class; those that do not apply say why."""
    if column.make is None:
        return [Check(what, None, column.why, identity) for identity, what in IDENTITIES.items()]
    return conformance(column.make, **column.claims, size=size, trains=trains, complete=True)


def cell(rows: Sequence[Check], identity: str) -> str:
    """Return FAIL if a row of an identity failed, n/a if none ran, pass otherwise."""
    found = {row.passed for row in rows if row.identity == identity}
    return "FAIL" if False in found else "pass" if True in found else "n/a"


def table(title: str, columns: dict[str, list[Check]]) -> str:
    """Return a group's table, rows identities and columns classes, and its failing rows."""
    lines = [f"### {title}", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for identity, what in IDENTITIES.items():
        cells = [cell(rows, identity) for rows in columns.values()]
        lines.append(f"| {identity} {what} | " + " | ".join(f"**{c}**" if c == "FAIL" else c for c in cells) + " |")
    failed = [(name, row) for name, rows in columns.items() for row in rows if row.passed is False]
    lines += ["", f"Failing rows: {len(failed) or 'none'}.", ""]
    return "\n".join([*lines, *(f"- {name}, {row.identity}, {row.name}: {row.detail}" for name, row in failed)])


def numpyro_columns(size: float, quick: bool) -> dict[str, list[Check]]:
    """Return the rows of NumPyro's classes, none where it is not installed."""
    try:
        from conformance_numpyro import columns
    except ImportError as error:
        print(f"NumPyro is left out: {error}")
        return {}
    return columns(size, quick)


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[Check]]]:
    """Run every group."""
    size = options.size or (0.02 if options.quick else 0.1)
    groups: dict[str, dict[str, list[Check]]] = {}
    for title, columns in GROUPS.items():
        if options.only not in (None, title):
            continue
        groups[title] = {}
        for name, column in columns.items():
            if options.quick and not column.quick:
                continue
            start = time.perf_counter()
            claims = {**column.claims, "improves": column.claims.get("improves", False) and not options.quick}
            groups[title][name] = run(column._replace(claims=claims), size, trains=not options.quick)
            print(f"{title}: {name}, {time.perf_counter() - start:.0f} s", flush=True)
    if options.only in (None, "NumPyro"):
        groups["NumPyro"] = numpyro_columns(size, options.quick)
    return {title: columns for title, columns in groups.items() if columns}


def known_defects(groups: dict[str, dict[str, list[Check]]]) -> list[str]:
    """Return a line for each defect of Pyro that is known, and whether the suite shows it."""
    lines = []
    for what, (column, name) in KNOWN.items():
        rows = [row for row in groups.get("Pyro", {}).get(column, []) if row.name == name]
        shown = {False: "shown", True: "not shown, the row passes", None: "not shown"}
        lines += [f"- {what}: {shown[row.passed]} by {row.identity}, {row.name}" for row in rows]
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite on every class, print and write the tables; return 1 if a row of this package fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=[*GROUPS, "NumPyro"])
    parser.add_argument("--size", type=float, help="factor on the number of replicates; 0.1 if not given, quick 0.02")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--markdown", type=Path, default=None)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("pyro").setLevel(logging.WARNING)  # Pyro says how many plates it guesses
    warnings.filterwarnings("ignore", category=UserWarning, module="pyro.infer")
    start = time.perf_counter()
    groups = measure(options)
    titles = {title: title if title in ("Pyro", "NumPyro") else f"This package, {title}" for title in groups}
    parts = [table(titles[title], columns) for title, columns in groups.items()]
    parts += ["\n".join(["### Known defects of Pyro", "", *known_defects(groups)])] if "Pyro" in groups else []
    text = "\n\n".join(parts)
    print(text)
    print(f"\n{time.perf_counter() - start:.0f} s, {versions()}")
    if options.markdown:
        options.markdown.write_text(text + "\n")
    if options.json:
        rows = {t: {c: [r._asdict() for r in rows] for c, rows in columns.items()} for t, columns in groups.items()}
        found = {"versions": versions(), "quick": options.quick, "identities": IDENTITIES, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1))
    ours = [
        row for title in groups if title not in ("Pyro", "NumPyro") for rows in groups[title].values() for row in rows
    ]
    return int(any(row.passed is False for row in ours))


if __name__ == "__main__":
    raise SystemExit(main())
