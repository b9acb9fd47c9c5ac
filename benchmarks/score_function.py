"""Leave-one-out score gradients beside Pyro's TraceGraph_ELBO: what a step costs, and how soon the bound is reached.

The model is a sigmoid belief network with two stochastic layers on handwritten digits. Everyone has K = 8 particles and
one thread, and on a CPU seconds are the processor's, so that a busy machine does not count. Two claims are put to the
test, against TraceGraph_ELBO vectorised and as it comes (looped):

(a) A step of ``ScoreFunction_ELBO(8)`` costs at most half of TraceGraph_ELBO's. Losses take turns, and a ratio is the
    median over turns of the ratio within one turn.
(b) It needs at most a quarter of TraceGraph_ELBO's time for TraceGraph_ELBO's final bound, the mean of the last five
    evaluations on the training images. Its own time is that of the evaluation from which on it stays above. The
    learning rate is the best for TraceGraph_ELBO, found on a seed of its own, and leave-one-out has to live with it; a
    second row gives it its own best rate. Runs take turns block by block; evaluations, which use no ELBO class, stand
    outside the timed sections. Another opponent adds Pyro's decaying average (one slot for each particle and position
    in the minibatch, so no ragged last batch), tuned for itself; the looped one, statistically the same as the
    vectorised, takes a fifth of the steps, with the rate that was best for so many.

    python benchmarks/score_function.py [--quick] [--output score_function.json] [--plot score_function.png]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from belief_network import BATCH, BeliefNetwork, Digits, load
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from timing import clock_of, ratio_to, take_turns, timed, versions

from pyro_elbo_ext import IWAE_ELBO, ReweightedWakeSleep_ELBO, ScoreFunction_ELBO

K, WIDTHS, WIDE = 8, (32, 32), (200, 200)
LAST, TUNING_SEED = 5, 1000
VECTORIZED: dict[str, Any] = {"num_particles": K, "vectorize_particles": True, "max_plate_nesting": 1}
PLAIN, AVERAGE, LOOPED, OURS = "TraceGraph", "TraceGraph + average", "TraceGraph looped", "leave-one-out"
LOSSES: dict[str, Callable[[], Any]] = {
    PLAIN: lambda: TraceGraph_ELBO(**VECTORIZED),
    LOOPED: lambda: TraceGraph_ELBO(num_particles=K),
    OURS: lambda: ScoreFunction_ELBO(K),
    "Trace_ELBO": lambda: Trace_ELBO(**VECTORIZED),
    "IWAE vimco": lambda: IWAE_ELBO(K, "vimco"),
    "IWAE ovis": lambda: IWAE_ELBO(K, "ovis"),
    "ReweightedWakeSleep": lambda: ReweightedWakeSleep_ELBO(K),
}
OPPONENTS = (PLAIN, AVERAGE, LOOPED)
Rows = dict[str, dict[str, Any]]
Curves = dict[str, list["Curve"]]


class Settings(NamedTuple):
    """How much is run."""

    device: str
    seeds: int
    steps: int
    turns: int
    evaluations: int
    rates: tuple[float, ...]

    @property
    def clock(self) -> Callable[[], float]:
        """What seconds are read from."""
        return clock_of(self.device)

    @property
    def every(self) -> int:
        """Steps from one evaluation to the next."""
        return max(self.steps // self.evaluations, 1)

    def blocks(self, name: str) -> int:
        """Return how many evaluations a contestant gets."""
        return max(self.steps // self.every // (5 if name == LOOPED else 1), 1)


class Curve(NamedTuple):
    """Bounds in nats per image against training time, one entry for each evaluation."""

    seconds: list[float]
    train: list[float]
    test: list[float]

    def final(self, images: str) -> float:
        """Return the mean of the last evaluations."""
        return statistics.fmean(getattr(self, images)[-LAST:])

    def stays_above(self, level: float, images: str) -> int | None:
        """Return the first evaluation from which on no bound lies below a level, None if there is none."""
        bounds = getattr(self, images)
        first = 1 + max((i for i, bound in enumerate(bounds) if bound < level), default=-1)
        return first if first < len(bounds) else None


class Run:
    """A contestant in training, with a parameter store of its own."""

    def __init__(self, name: str, rate: float, seed: int, digits: Digits, settings: Settings) -> None:
        """Start from the weights and the order of minibatches that belong to the seed."""
        pyro.set_rng_seed(seed)
        infer = {"baseline": {"use_decaying_avg_baseline": True}} if name == AVERAGE else None
        self.settings, self.curve = settings, Curve([], [], [])
        self.digits, self.batches, self.state = digits, digits.batches(seed), {"params": {}, "constraints": {}}
        self.network = BeliefNetwork(WIDTHS, infer).to(digits.train.device)
        loss = LOSSES[PLAIN if name == AVERAGE else name]()
        self.svi = SVI(self.network.model, self.network.guide, pyro.optim.Adam({"lr": rate}), loss=loss)

    def block(self) -> None:
        """Take timed steps, then evaluate."""
        batches = list(islice(self.batches, self.settings.every))
        with pyro.get_param_store().scope(self.state):
            seconds = timed(lambda: [self.svi.step(x) for x in batches], self.settings.device, self.settings.clock)
        self.curve.seconds.append(seconds + (self.curve.seconds or [0.0])[-1])
        for images, bounds in zip(self.digits, self.curve[1:], strict=True):
            bounds.append(self.network.bound(images, K))


def step_costs(settings: Settings, digits: Digits) -> dict[str, Rows]:
    """Time a step of every loss on both networks, with Pyro's validation (its default) and without."""
    found: dict[str, Rows] = {}
    for widths in (WIDTHS, WIDE):
        for validate in (True, False):
            title = f"network 64-{widths[0]}-{widths[1]}, validation {'on' if validate else 'off'}"
            with pyro.validation_enabled(validate), pyro.get_param_store().scope():
                network = BeliefNetwork(widths).to(settings.device)
                pair = network.model, network.guide, (digits.train[:BATCH],)
                losses = {name: make() for name, make in LOSSES.items()}
                times = take_turns(losses, pair, 5, settings.turns, settings.device, settings.clock)
            found[title] = {
                name: {"ms": 1e3 * statistics.median(mine), PLAIN: ratio_to(times[PLAIN], mine)}
                | {LOOPED: ratio_to(times[LOOPED], mine)}
                for name, mine in times.items()
            }
    return found


def tune(settings: Settings, digits: Digits) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return final bounds by learning rate, and the best rate of each contestant."""
    scores: dict[str, dict[str, float]] = {name: {} for name in (*OPPONENTS, OURS)}
    for rate in settings.rates:
        for name in (PLAIN, AVERAGE, OURS):
            run = Run(name, rate, TUNING_SEED, digits, settings)
            for _ in range(settings.blocks(name)):
                run.block()
            scores[name][f"{rate:g}"] = run.curve.final("train")
            if name == PLAIN:
                scores[LOOPED][f"{rate:g}"] = statistics.fmean(run.curve.train[: settings.blocks(LOOPED)][-LAST:])
    return scores, {name: float(max(found, key=found.__getitem__)) for name, found in scores.items()}


def label(name: str, rate: float) -> str:
    """Return a contestant's name with its learning rate."""
    return f"{name}, lr {rate:g}"


def train(settings: Settings, digits: Digits, rates: dict[str, float]) -> Curves:
    """Train the opponents, and leave-one-out at each of their rates and its own, block by block in turn."""
    contestants = [*((name, rates[name]) for name in OPPONENTS), *((OURS, rate) for rate in sorted({*rates.values()}))]
    curves: Curves = {label(*contestant): [] for contestant in contestants}
    for seed in range(settings.seeds):
        runs = {contestant: Run(*contestant, seed, digits, settings) for contestant in contestants}
        for block in range(settings.blocks(PLAIN)):
            for (name, _), run in runs.items():
                if block < settings.blocks(name):
                    run.block()
        for contestant, run in runs.items():
            curves[label(*contestant)].append(run.curve)
    return curves


def race(theirs: Curve, ours: Curve, images: str) -> dict[str, float]:
    """Return the share of the opponent's seconds, and of its steps, after which we stay above its final bound."""
    level = theirs.final(images)
    at = ours.stays_above(level, images)
    if at is None:
        return {"level": level, "seconds": math.inf, "steps": math.inf}
    share = ours.seconds[at] / theirs.seconds[-1]
    return {"level": level, "seconds": share, "steps": (at + 1) / len(theirs.seconds)}


def races(curves: Curves, rates: dict[str, float]) -> list[dict[str, Any]]:
    """Hold leave-one-out against every opponent, seed by seed, at the opponent's rate and at its own."""
    found = []
    for name in OPPONENTS:
        for rate in dict.fromkeys((rates[name], rates[OURS])):
            pairs = list(zip(curves[label(name, rates[name])], curves[label(OURS, rate)], strict=True))
            row = {"opponent": name, "rate": rates[name], "our_rate": rate}
            found.append(row | {images: [race(*pair, images) for pair in pairs] for images in ("train", "test")})
    return found


def spread(shares: Sequence[float]) -> str:
    """Format a median and a range; infinite where the bound was not reached."""
    return f"{statistics.median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})"


def verdict(found: float, allowed: float) -> str:
    """Say whether a claim holds."""
    return f"{'holds' if found <= allowed else 'FAILS'} at {found:.2f}"


def print_costs(costs: dict[str, Rows]) -> None:
    """Print claim (a)."""
    head = f"{'loss':22}{'ms/step':>9}{'to TraceGraph':>17}{'quartiles':>16}{'to looped':>11}{'quartiles':>16}"
    for title, rows in costs.items():
        print(f"\n{title}\n{head}")
        for name, row in rows.items():
            cells = ""
            for other, width in ((PLAIN, 17), (LOOPED, 11)):
                quartiles = f"{row[other]['ratio_low']:.2f} to {row[other]['ratio_high']:.2f}"
                cells += f"{row[other]['ratio']:{width}.2f}{quartiles:>16}"
            print(f"{name:22}{row['ms']:9.2f}{cells}")
    print()
    for title, rows in costs.items():
        for other in (PLAIN, LOOPED):
            ratio = rows[OURS][other]["ratio"]
            print(f"(a) at most 0.5 of {other}: {verdict(ratio, 0.5)}, {title}")


def print_tuning(scores: dict[str, dict[str, float]]) -> None:
    """Print what the learning rates were chosen by."""
    print("\nfinal bound on training images by learning rate, nats; the best is taken")
    for name, found in scores.items():
        print(f"{name:24}" + "".join(f"{rate:>8}:{bound:7.2f}" for rate, bound in found.items()), flush=True)


def print_curves(curves: Curves, settings: Settings) -> None:
    """Print every run: time for a step, bound on training images by steps, and last on held-out images."""
    count = settings.blocks(PLAIN)
    shown = sorted({max(round(count * share), 1) - 1 for share in (0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1)})
    head = "".join(f"{(i + 1) * settings.every:>8}" for i in shown)
    print(f"\nbound on training images in nats after so many steps; final = mean of the last {LAST} evaluations")
    print(f"{'run':36}{'ms/step':>8}{'seconds':>9}{head}{'final':>8}{'held-out':>9}")
    for name, runs in curves.items():
        for seed, run in enumerate(runs):
            cells = "".join(f"{run.train[i]:8.2f}" if i < len(run.train) else f"{'':8}" for i in shown)
            ms = 1e3 * run.seconds[-1] / (len(run.seconds) * settings.every)
            ends = f"{run.final('train'):8.2f}{run.final('test'):9.2f}"
            print(f"{name + f', seed {seed}':36}{ms:8.2f}{run.seconds[-1]:9.2f}{cells}{ends}")


def print_races(found: list[dict[str, Any]], costs: dict[str, Rows]) -> None:
    """Print claim (b), as measured and for Pyro's validation switched off, which changes a step's cost alone."""
    fast = next(rows for title, rows in costs.items() if title.endswith("off"))[OURS]
    print("\nleave-one-out's time to stay above an opponent's final bound, as a share of the opponent's whole time")
    print("median over seeds (range); validation off = share of steps x ratio of step costs in the second table")
    print(f"{'opponent':22}{'its lr':>7}{'our lr':>7}  {'images':8}{'seconds':>24}{'steps':>24}{'validation off':>24}")
    for row in found:
        # a step with the average is taken to cost no more than one without: at worst too kind to the opponent
        cost = fast[LOOPED if row["opponent"] == LOOPED else PLAIN]["ratio"]
        for images, title in (("train", "training"), ("test", "held-out")):
            steps = [result["steps"] for result in row[images]]
            columns = [result["seconds"] for result in row[images]], steps, [cost * share for share in steps]
            cells = "".join(f"{spread(column):>24}" for column in columns)
            print(f"{row['opponent']:22}{row['rate']:7g}{row['our_rate']:7g}  {title}{cells}")
    print()
    for row in found:
        share = statistics.median(result["seconds"] for result in row["train"])
        whose = "the opponent's" if row["rate"] == row["our_rate"] else "its own"
        print(f"(b) at most 0.25 of {row['opponent']}: {verdict(share, 0.25)}, leave-one-out at {whose} rate")


def plot(path: Path, curves: Curves) -> None:
    """Draw bound against seconds, every seed thin and the median thick."""
    from matplotlib.figure import Figure  # draws with Agg: no display, no global state

    figure = Figure(figsize=(9, 5.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for number, (name, runs) in enumerate(curves.items()):
        colour = f"C{number}"
        for run in runs:
            axes.semilogx(run.seconds, run.train, color=colour, linewidth=0.7, alpha=0.45)
        medians = [
            [statistics.median(values) for values in zip(*(run[i] for run in runs), strict=True)] for i in (0, 1)
        ]
        axes.semilogx(*medians, color=colour, linewidth=2.4, label=name)
    axes.set(xlabel="seconds of training on one thread", ylabel="ELBO (nats per training image)")
    axes.set_title(f"Sigmoid belief network on digits, {K} particles")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs, settles nothing")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--steps", type=int, default=None)
    return parser.parse_args(argv)


def choose(options: argparse.Namespace) -> Settings:
    """Return how much is to be run."""
    settings = Settings(options.device, 3, 2000, 21, 60, (0.01, 0.02, 0.04, 0.08, 0.16))
    if options.quick:
        settings = Settings(options.device, 1, 200, 3, 20, (0.04, 0.08))
    return settings._replace(seeds=options.seeds or settings.seeds, steps=options.steps or settings.steps)


def main(argv: Sequence[str] | None = None) -> int:
    """Test both claims, print the tables, write JSON and picture."""
    options = parse(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = choose(options)
    digits = load(settings.device)
    print(f"{settings.device}, {torch.get_num_threads()} thread, {versions()}", flush=True)
    costs = step_costs(settings, digits)
    print_costs(costs)
    scores, best = tune(settings, digits)
    print_tuning(scores)
    curves = train(settings, digits, best)
    print_curves(curves, settings)
    found = races(curves, best)
    print_races(found, costs)
    if options.plot:
        plot(options.plot, curves)
    if options.output:
        report = {"settings": settings._asdict(), "versions": versions(), "step_costs": costs, "tuning": scores}
        report |= {"curves": {name: [run._asdict() for run in runs] for name, runs in curves.items()}, "races": found}
        options.output.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
