"""How a step's time and memory grow: with particles, rows, rows in minibatches, and the latent dimension.

The model draws z_i ~ Normal(0, 1)^d inside a plate and x_i ~ Normal(z_i w, 1)^d; the guide is Normal(a x_i + b, e^c),
so that the arithmetic is the same few operations for each particle, row and coordinate. Losses of this package and of
Pyro, both vectorised, take eager steps under SVI and Adam in turns, one thread, float32; on a CPU seconds are the
processor's. A ratio is the median over turns of the ratio within one turn, to Pyro's ``Trace_ELBO``. Each point has a
process of its own, and each peak of memory as well: the growth of the peak resident set (``ru_maxrss``) over the first
steps, after the same steps on one row, one particle and one coordinate. The kernel counts it in pages by batches: below
a MiB it says little. Under ``RenyiELBO`` minibatches are timed as they run; its bound is not right there.

    python benchmarks/scaling.py [--quick] [--only particles ...] [--output scaling.json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from timing import ratio_to, take_turns, versions
from torch import Tensor

from pyro_elbo_ext import IWAE_ELBO

REFERENCE = "pyro Trace_ELBO"
PYRO: dict[str, Any] = {"vectorize_particles": True, "max_plate_nesting": 1}
LOSSES: dict[str, Callable[[int], Any]] = {
    REFERENCE: lambda k: Trace_ELBO(k, **PYRO),
    "pyro RenyiELBO(alpha=0)": lambda k: RenyiELBO(alpha=0, num_particles=k, **PYRO),
    "IWAE pathwise": lambda k: IWAE_ELBO(k, "pathwise"),
    "IWAE dreg": lambda k: IWAE_ELBO(k, "dreg"),
}


class Point(NamedTuple):
    """What is run: K particles, N rows, of which a minibatch or all, and d coordinates."""

    particles: int = 8
    rows: int = 100
    batch: int | None = None
    dim: int = 10


POINTS = {
    "particles": [Point(particles=k) for k in (1, 4, 16, 64, 256, 1024)],
    "rows": [Point(2, n, dim=2) for n in (100, 1000, 10_000, 100_000, 1_000_000)],
    "rows in minibatches of 100": [Point(rows=n, batch=100) for n in (100, 1000, 10_000, 100_000, 1_000_000)],
    "latent dimension": [Point(dim=d) for d in (10, 30, 100, 300, 1000)],
}
SIZES = dict(zip(POINTS, ("particles", "rows", "rows", "dim"), strict=True))


def make_pair(point: Point) -> tuple[Callable, Callable, tuple]:
    """Return model, guide and arguments."""
    data = torch.randn(point.rows, point.dim)
    w, zeros = torch.linspace(0.5, 1.5, point.dim), torch.zeros(point.dim)

    def rows(x: Tensor) -> pyro.plate:
        return pyro.plate("data", len(x), subsample_size=point.batch)

    def model(x: Tensor) -> None:
        with rows(x) as i:
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * w, 1.0).to_event(1), obs=x[i] if point.batch else x)

    def guide(x: Tensor) -> None:
        a, b, c = (pyro.param(name, lambda: torch.zeros(point.dim)) for name in "abc")
        with rows(x) as i:
            pyro.sample("z", dist.Normal(a * (x[i] if point.batch else x) + b, c.exp()).to_event(1))

    return model, guide, (data,)


def step_times(point: Point, steps: int, turns: int) -> dict[str, list[float]]:
    """Return the seconds of a step of every loss, turn by turn."""
    losses = {name: make(point.particles) for name, make in LOSSES.items()}
    steps = max(1, round(steps * min(1.0, 3e5 / (point.particles * (point.batch or point.rows) * point.dim))))
    return take_turns(losses, make_pair(point), steps, turns, "cpu", time.process_time)


def peak_memory(point: Point, name: str) -> float:
    """Return how many MiB the first steps need beyond what this process had."""
    for each in (Point(1, 1, dim=1), point):
        pyro.clear_param_store()
        model, guide, args = make_pair(each)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), loss=LOSSES[name](each.particles))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(3):
            svi.step(*args)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10  # of KiB on Linux


def in_a_process(work: Callable[..., Any], *args: Any) -> Any:
    """Return what a function returns in a process of its own, made from this one, where nothing has run yet."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(work, args)


def measure(axis: str, point: Point, quick: bool) -> dict[str, Any]:
    """Return times, ratios and peaks of one point."""
    times = in_a_process(step_times, point, *((5, 5) if quick else (20, 15)))
    losses: dict[str, dict[str, float]] = {}
    for name, found in times.items():
        peaks = [in_a_process(peak_memory, point, name) for _ in range(1 if quick else 3)]
        losses[name] = {"microseconds": 1e6 * statistics.median(found), "mib": statistics.median(peaks)}
        losses[name] |= ratio_to(times[REFERENCE], found)
    return {"axis": axis, "size": getattr(point, SIZES[axis]), **point._asdict(), "losses": losses}


def show(row: dict[str, Any]) -> None:
    """Print a point."""
    for name, found in row["losses"].items():
        spread = f"{found['ratio_low']:.2f} to {found['ratio_high']:.2f}"
        numbers = f"{found['microseconds']:14.0f}{found['ratio']:8.2f}{spread:>16}{found['mib']:10.1f}"
        print(f"{row['axis']:28}{row['size']:>9}  {name:26}{numbers}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write JSON after every point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="first, middle and last point of each, fewer turns")
    parser.add_argument("--only", nargs="+", choices=list(POINTS), default=list(POINTS), metavar="AXIS")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(argv)
    if sys.platform != "linux":
        parser.error("memory is read as Linux counts it; run this there")
    torch.set_num_threads(1)
    print(f"cpu, 1 thread, {versions()}")
    print(f"{'axis':28}{'size':>9}  {'loss':26}{'microseconds':>14}{'ratio':>8}{'quartiles':>16}{'peak MiB':>10}")
    rows = []
    for axis in options.only:
        points = POINTS[axis]
        for point in (points[0], points[len(points) // 2], points[-1]) if options.quick else points:
            rows.append(measure(axis, point, options.quick))
            show(rows[-1])
            if options.output:
                report = {"rows": rows, "reference": REFERENCE, "quick": options.quick, "versions": versions()}
                options.output.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
