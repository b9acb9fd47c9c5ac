"""NaturalGradient beside Adam on Bayesian logistic regression: steps, scores and seconds to the exact optimum.

Data, for d weights and N = max(1000, 20 d) rows, everything by one generator that starts from the seed, in this order:

    A ~ Normal(0, 1/d)^(d x d),  Z ~ Normal(0, 1)^(N x d),  X = Z (A + I/2),  v ~ Normal(0, 1)^d,
    w* = v times what makes the logits X w* of standard deviation 2,  y ~ Bernoulli(sigmoid(X w*))

The model has w ~ Normal(0, 1)^d. All is float32 on one thread. Under a Gaussian guide a logit is Gaussian, so that the
ELBO is N integrals in one dimension, here by Gauss-Hermite in float64; its optimum is a damped fixed-point iteration,
printed with the length of the gradient that is left. A gap is the optimum minus the guide's ELBO, in nats. On a CPU
seconds are the processor's, so that a busy machine does not count, and gaps are taken outside of them. What is counted
is the first time below a target. Two tables:

(1) ``AutoMultivariateNormal`` as it comes: NaturalGradient(), and NaturalGradient(max_kl=3 d), a trust region of 3 nats
    for each weight, both with ScoreRegression_ELBO(2 d) and nothing tuned, against Adam with the best of a grid of
    learning rates and of decays (ClippedAdam; without one it is plain Adam), under Pyro's Trace_ELBO with 16 particles
    vectorised, and sticking-the-landing with 16 and with 2 d particles. The grid is searched on a seed of its own; a
    run there ends after ``--limit`` seconds (at d = 100; in proportion to d), or when it has missed a target for 1.2
    times as long as the best one of its kind took. Then every seed has the best by seconds to 0.1 nats, whatever its
    kind. A score is one particle of one step.
(2) Where natural gradients do not win: a mean-field guide on the same correlated posterior, gaps to the best mean-field
    guide (Newton's direction is the way out), and a low-rank guide, which has no site that NaturalGradient can step.

    python benchmarks/natural_gradient.py [--quick] [--output natural_gradient.json] [--dims 20,50,100] [--seeds 5]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from timing import clock_of, timed, versions
from torch import Tensor

from pyro_elbo_ext import VRIWAE_ELBO, MeanField_ELBO, NaturalGradient, ScoreRegression_ELBO

TARGETS = (1.0, 0.1, 0.01)  # nats
MAIN, LATE = 0.1, 1.2
FORMS = {"steps": ".0f", "scores": ".0f", "seconds": ".2f"}
CLAIMED = {20: 8, 50: 12, 100: 15}  # steps to MAIN, by dimension
TUNING_SEED, OURS = 1000, "NaturalGradient"
PARTICLES = 16
RATES, DECAYS = (0.03, 0.1, 0.01), (4000, 1000, None)  # steps in which a rate falls tenfold; the likely best first
NODES, WEIGHTS = (torch.as_tensor(t) for t in np.polynomial.hermite_e.hermegauss(40))
WEIGHTS = WEIGHTS / math.sqrt(2 * math.pi)


class Optimum(NamedTuple):
    """The best Gaussian: its ELBO in nats, and the length of the gradient there in its own standard deviations."""

    bound: float
    gradient: float


class Problem(NamedTuple):
    """Data of a logistic regression."""

    x: Tensor
    y: Tensor

    def model(self) -> None:
        """Weights with a standard normal prior."""
        w = pyro.sample("w", dist.Normal(self.x.new_zeros(self.x.shape[1]), 1.0).to_event(1))
        pyro.sample("y", dist.Bernoulli(logits=w @ self.x.T).to_event(1), obs=self.y)

    def precise(self) -> Problem:
        """Return the same in float64 on the CPU."""
        return Problem(self.x.double().cpu(), self.y.double().cpu())

    def logits(self, loc: Tensor, scale_tril: Tensor) -> Tensor:
        """Return the nodes of each row's logit, ``[rows, nodes]``."""
        return (self.x @ loc)[:, None] + (self.x @ scale_tril).norm(dim=-1, keepdim=True) * NODES

    def bound(self, loc: Tensor, scale_tril: Tensor) -> float:
        """Return the ELBO of a Gaussian guide, but for the error of the quadrature."""
        f = self.logits(loc, scale_tril)
        likelihood = ((self.y[:, None] * f - torch.nn.functional.softplus(f)) @ WEIGHTS).sum()
        prior = (scale_tril.square().sum() + loc.square().sum() - len(loc)) / 2
        return (likelihood - prior + scale_tril.diagonal().log().sum()).item()

    def slopes(self, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
        """Return the expected gradient of the log joint in the weights, and minus its expected second derivative."""
        p = self.logits(loc, scale_tril).sigmoid()
        first = self.x.T @ (self.y - p @ WEIGHTS) - loc
        curvature = (p * (1 - p)) @ WEIGHTS
        return first, torch.eye(len(loc), dtype=loc.dtype) + self.x.T @ (curvature[:, None] * self.x)

    def optimum(self, mean_field: bool = False, steps: int = 1000) -> Optimum:
        """Return the best full-rank or mean-field Gaussian, by Newton's steps in the mean and fixed-point ones else."""
        loc = torch.zeros(self.x.shape[1], dtype=self.x.dtype)
        precision = 100 * torch.eye(len(loc), dtype=loc.dtype)
        for _ in range(steps):
            scale_tril = torch.linalg.cholesky(torch.linalg.inv(precision))
            first, curvature = self.slopes(loc, scale_tril)
            wanted = curvature.diagonal().diag() if mean_field else curvature
            rest = scale_tril.T @ (wanted - precision) @ scale_tril / 2
            gradient = math.hypot((scale_tril.T @ first).norm().item(), rest.norm().item())
            bound = self.bound(loc, scale_tril)
            if gradient < 1e-7:
                break
            loc, precision = self.search(loc, precision, bound, (torch.linalg.solve(curvature, first), wanted))
        return Optimum(bound, gradient)

    def search(self, loc: Tensor, precision: Tensor, bound: float, step: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Halve a step until the ELBO does not fall, but for rounding."""
        for rate in 0.5 ** torch.arange(20.0, dtype=loc.dtype):
            mean, trial = loc + rate * step[0], (1 - rate) * precision + rate * step[1]
            if self.bound(mean, torch.linalg.cholesky(torch.linalg.inv(trial))) >= bound - 1e-9:
                break
        return mean, trial


def make_problem(dim: int, seed: int, device: str) -> Problem:
    """Draw the data that the docstring describes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator) / math.sqrt(dim) + torch.eye(dim) / 2
    x = torch.randn(max(1000, 20 * dim), dim, generator=generator) @ mixing
    w = torch.randn(dim, generator=generator)
    logits = 2 * (x @ w) / (x @ w).std()
    y = (torch.rand(len(x), generator=generator) < logits.sigmoid()).to(x.dtype)
    return Problem(x.to(device), y.to(device))


class Contestant(NamedTuple):
    """A way to fit a guide.

    Attributes:
        kind: what the tables group by.
        setting: learning rate and decay.
        guide: a class of guides.
        optim: makes the optimiser.
        loss: makes the ELBO.
        particles: of one step.
        every: steps from one gap to the next.
    """

    kind: str
    setting: str
    guide: Callable
    optim: Callable[[], Any]
    loss: Callable[[], Any]
    particles: int
    every: int = 1


class Point(NamedTuple):
    """Where a run was, and its gap in nats."""

    steps: int
    scores: int
    seconds: float
    gap: float


def gaussian(guide: Any) -> tuple[Tensor, Tensor]:
    """Return mean and Cholesky factor of an AutoGuide's distribution of w, in float64 on the CPU."""
    if isinstance(guide, AutoNormal):
        return guide.locs.w.detach().double().cpu(), guide.scales.w.detach().double().cpu().diag()
    q = guide.get_posterior()
    if isinstance(guide, AutoMultivariateNormal):
        return q.loc.detach().double().cpu(), q.scale_tril.detach().double().cpu()
    factor, diagonal = q.cov_factor.detach().double().cpu(), q.cov_diag.detach().double().cpu()
    return q.loc.detach().double().cpu(), torch.linalg.cholesky(factor @ factor.T + diagonal.diag())


def follow(who: Contestant, problem: Problem, optimum: Optimum, seed: int, device: str) -> Iterator[Point]:
    """Train without end, or until it diverges; set-up counts."""
    pyro.set_rng_seed(seed)
    exact, steps, seconds = problem.precise(), 0, 0.0
    clock = clock_of(device)
    with pyro.get_param_store().scope():
        guide = who.guide(problem.model)
        svi = SVI(problem.model, guide, who.optim(), who.loss())
        while True:
            try:
                seconds += timed(lambda: [svi.step() for _ in range(who.every)], device, clock)
            except ValueError:
                if not steps:  # nothing that a step of training has brought about
                    raise
                yield Point(steps, steps * who.particles, seconds, math.nan)
                return
            steps += who.every
            yield Point(steps, steps * who.particles, seconds, optimum.bound - exact.bound(*gaussian(guide)))


class Race(NamedTuple):
    """A run: the first point below each target that it reached, and all its points."""

    kind: str
    setting: str
    reached: dict[float, Point]
    points: list[Point]

    def seconds(self, target: float) -> float:
        """Return the seconds to a target, infinite where it was not reached."""
        return self.reached[target].seconds if target in self.reached else math.inf

    @property
    def lowest(self) -> float:
        """Return the smallest gap; infinite if there was never a finite one."""
        return min((p.gap for p in self.points if math.isfinite(p.gap)), default=math.inf)


def race(who: Contestant, points: Iterator[Point], limit: float, steps: int, rivals: Sequence[Race] = ()) -> Race:
    """Follow a run to the hardest target, to its limits, or until it is late for a target that a rival reached."""
    late = {target: LATE * min((rival.seconds(target) for rival in rivals), default=math.inf) for target in TARGETS}
    found = Race(who.kind, who.setting, {}, [])
    for point in points:
        found.points.append(point)
        for target in TARGETS:
            if point.gap < target:
                found.reached.setdefault(target, point)
        missing = [late[target] for target in TARGETS if target not in found.reached]
        if not missing or point.seconds > min(limit, *missing) or point.steps >= steps or not math.isfinite(point.gap):
            break
    return found


def adam(rate: float, decay: int | None) -> Callable[[], Any]:
    """Make plain Adam, or one whose rate falls tenfold in so many steps."""
    if decay is None:
        return lambda: pyro.optim.Adam({"lr": rate})
    return lambda: pyro.optim.ClippedAdam({"lr": rate, "lrd": 0.1 ** (1 / decay)})


def trace_elbo() -> Trace_ELBO:
    """Pyro's ELBO as its users would vectorise it."""
    return Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=0)


def stick(particles: int) -> Callable[[], Any]:
    """Make the ELBO with sticking-the-landing."""
    return lambda: VRIWAE_ELBO(1.0, particles, gradient="stl", max_plate_nesting=0)


def ours(dim: int) -> list[Contestant]:
    """The library as it comes, and with a trust region."""
    optims = {"default": NaturalGradient, "max_kl=3 d": lambda: NaturalGradient(max_kl=3.0 * dim)}
    loss = lambda: ScoreRegression_ELBO(2 * dim)  # noqa: E731
    return [Contestant(OURS, name, AutoMultivariateNormal, o, loss, 2 * dim) for name, o in optims.items()]


def opponents(dim: int, rates: Sequence[float], decays: Sequence[int | None]) -> dict[str, list[Contestant]]:
    """Return the grid by kind."""
    kinds: dict[str, tuple[Callable[[], Any], int]] = {
        f"Adam, Trace_ELBO({PARTICLES})": (trace_elbo, PARTICLES),
        f"Adam, STL({PARTICLES})": (stick(PARTICLES), PARTICLES),
        f"Adam, STL({2 * dim})": (stick(2 * dim), 2 * dim),
    }
    return {kind: grid(kind, AutoMultivariateNormal, *rest, rates, decays) for kind, rest in kinds.items()}


def grid(
    kind: str,
    guide: Callable,
    loss: Callable[[], Any],
    particles: int,
    rates: Sequence[float],
    decays: Sequence[int | None],
) -> list[Contestant]:
    """Return Adam at all rates and decays."""
    return [
        Contestant(kind, f"lr {rate:g}" + (f", /10 in {decay}" if decay else ""), guide, adam(rate, decay), loss,
                   particles, 20)
        for decay in decays for rate in rates
    ]  # fmt: skip


class Settings(NamedTuple):
    """How much is run."""

    device: str
    dims: tuple[int, ...]
    seeds: int
    limit: float
    steps: int
    rates: tuple[float, ...]
    decays: tuple[int | None, ...]


def full_rank(dim: int, settings: Settings) -> dict[str, Any]:
    """Search the grid, then race us and the best of it on every seed."""
    by_kind, limits = opponents(dim, settings.rates, settings.decays), (settings.limit * dim / 100, settings.steps)

    def run(who: Contestant, seed: int, rivals: Sequence[Race] = ()) -> Race:
        problem = make_problem(dim, seed, settings.device)
        found = race(who, follow(who, problem, problem.precise().optimum(), seed, settings.device), *limits, rivals)
        print_race(f"d = {dim}, {f'seed {seed}' if seed != TUNING_SEED else 'tuning'}", found)
        return found

    tuned: dict[str, list[Race]] = {f"{who.kind}, {who.setting}": [run(who, TUNING_SEED)] for who in ours(dim)}
    for kind, contestants in by_kind.items():
        tuned[kind] = []
        for who in contestants:
            tuned[kind].append(run(who, TUNING_SEED, tuned[kind]))
    best = min((r for kind in by_kind for r in tuned[kind]), key=lambda r: (r.seconds(MAIN), r.lowest))
    rival = next(who for who in by_kind[best.kind] if who.setting == best.setting)
    seeds = [*range(settings.seeds)]
    gradient = max(make_problem(dim, seed, "cpu").precise().optimum().gradient for seed in (*seeds, TUNING_SEED))
    races = {f"{who.kind}, {who.setting}": [run(who, seed) for seed in seeds] for who in (*ours(dim), rival)}
    return {"dim": dim, "gradient_at_optima": gradient, "tuning": tuned, "races": races}


def print_race(title: str, found: Race) -> None:
    """Print a run when it ends."""
    cells = "".join(
        f"{p.steps:7d} st {p.seconds:7.2f} s" if (p := found.reached.get(target)) else f"{'-':>20}"
        for target in TARGETS
    )
    last = found.points[-1]
    end = f"{last.steps:7d} st {last.seconds:7.2f} s, lowest gap {found.lowest:.4g}"
    print(f"{title:20}{found.kind:22}{found.setting:22}{cells}   ended {end}", flush=True)


def spread(values: Sequence[float], form: str) -> str:
    """Format a median and a range; infinite is what was not reached."""
    if math.isinf(statistics.median(values)):
        return f"not reached ({sum(map(math.isfinite, values))} of {len(values)})"
    low, middle, high = (format(v, form) for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def column(races: Sequence[Race], target: float, field: str) -> list[float]:
    """Return one number for each run."""
    return [getattr(r.reached[target], field) if target in r.reached else math.inf for r in races]


def ratios(mine: Sequence[Race], adam: Sequence[Race], target: float, field: str) -> tuple[list[float], bool]:
    """Return what Adam took to what we took by seed, and if some are only lower bounds: Adam was stopped before."""
    found = [getattr(b.reached.get(target, b.points[-1]), field) / getattr(a.reached[target], field)
             for a, b in zip(mine, adam, strict=True) if target in a.reached]  # fmt: skip
    return found or [math.nan], any(target not in r.reached for r in adam)


def print_full_rank(found: list[dict[str, Any]], settings: Settings) -> None:
    """Print the first table: us and the best of the grid on every seed, and their ratios."""
    line = "{:>4} {:>5}  {:46}{:>26}{:>30}{:>26}"
    print(f"\n(1) full rank, to a gap in nats; median (range) over {settings.seeds} seeds; then Adam's to ours by seed")
    print(line.format("d", "gap", "who", "steps", "scores", "seconds"))
    for result in found:
        *mine, adam = result["races"]
        for target in TARGETS:
            for name, races in result["races"].items():
                cells = (spread(column(races, target, field), form) for field, form in FORMS.items())
                print(line.format(result["dim"], target, name, *cells))
            for name in mine:
                pair = result["races"][name], result["races"][adam]
                cells = (f"{'>= ' if cut else ''}{spread(values, '.0f')}"
                         for values, cut in (ratios(*pair, target, field) for field in FORMS))  # fmt: skip
                print(line.format(result["dim"], target, f"  Adam / {name}", *cells))


def print_best(found: list[dict[str, Any]]) -> None:
    """Print the best of each kind on the tuning seed, target by target."""
    print("\nbest of each grid by seconds to each gap, on the tuning seed")
    print(f"{'d':>4} {'kind':30}" + "".join(f"{f'gap {target:g}':>60}" for target in TARGETS))
    for result in found:
        for kind, races in result["tuning"].items():
            cells = []
            for target in TARGETS:
                best = min(races, key=lambda r: r.seconds(target))  # noqa: B023
                p = best.reached.get(target)
                text = f"{p.steps} st, {p.scores} sc, {p.seconds:.2f} s" if p else "not reached"
                cells.append(f"{text} ({best.setting})" if p else text)
            print(f"{result['dim']:4d} {kind:30}" + "".join(f"{cell:>60}" for cell in cells))


def print_verdicts(found: list[dict[str, Any]]) -> None:
    """Say whether the claims hold, by the worst seed."""
    for result in found:
        dim, (*mine, adam) = result["dim"], result["races"]
        print(f"\nd = {dim}: length of the gradient at the optima {result['gradient_at_optima']:.1g}")
        for name in mine:
            worst = max(column(result["races"][name], MAIN, "steps"))
            print(f"{name}: {worst:.0f} steps to {MAIN} nats", end="")
            print(f" (at most {CLAIMED[dim]}: {verdict(worst <= CLAIMED[dim])})" if dim in CLAIMED else "")
            for field, least in (("steps", 50), ("seconds", 30)):
                values, cut = ratios(result["races"][name], result["races"][adam], MAIN, field)
                low = f"{'at least ' if cut else ''}{min(values):.0f}"
                print(f"{name}: Adam takes {low} times the {field} ({least} or more: {verdict(min(values) >= least)})")


def verdict(holds: bool) -> str:
    """Say whether a claim holds."""
    return "holds" if holds else "FAILS"


def mean_field_contestants(dim: int, settings: Settings) -> list[Contestant]:
    """Natural gradients, Newton's and Adam, on AutoNormal."""

    def natural(direction: str) -> Contestant:
        loss = lambda: ScoreRegression_ELBO(2 * dim, direction=direction)  # noqa: E731
        return Contestant(OURS, f'direction="{direction}"', AutoNormal, NaturalGradient, loss, 2 * dim)

    def closed() -> MeanField_ELBO:
        return MeanField_ELBO(PARTICLES, max_plate_nesting=0)

    losses = {f"Adam, Trace_ELBO({PARTICLES})": trace_elbo, f"Adam, MeanField_ELBO({PARTICLES})": closed}
    adams = [grid(k, AutoNormal, loss, PARTICLES, settings.rates, (None, 1000)) for k, loss in losses.items()]
    return [natural("gradient"), natural("newton"), *(who for found in adams for who in found)]


def at_steps(found: Race, steps: int) -> float:
    """Return the gap after so many steps, not a number where the run was shorter."""
    return next((p.gap for p in found.points if p.steps >= steps), math.nan)


def at_seconds(found: Race, seconds: float) -> float:
    """Return the gap after so many seconds, not a number where the run was shorter."""
    before = [p.gap for p in found.points if p.seconds <= seconds]
    return before[-1] if before and found.points[-1].seconds >= seconds else math.nan


STEPS, SECONDS = (20, 100, 400, 1600), (0.5, 2.0, 8.0)


def run_for(who: Contestant, problem: Problem, optimum: Optimum, settings: Settings) -> Race:
    """Follow a run to the last of both, whatever its gap."""
    steps, seconds = min(STEPS[-1], settings.steps), min(SECONDS[-1], settings.limit / 5)
    found = Race(who.kind, who.setting, {}, [])
    for point in follow(who, problem, optimum, 0, settings.device):
        found.points.append(point)
        enough = point.steps >= steps and point.seconds >= seconds
        if enough or not math.isfinite(point.gap):
            return found
    return found


def best_of(races: Sequence[Race]) -> list[Race]:
    """Keep of each kind of Adam the one with the lowest gap in the end, and all others."""
    kinds = dict.fromkeys(r.kind for r in races if r.kind != OURS)
    best = [min((r for r in races if r.kind == kind), key=lambda r: r.points[-1].gap) for kind in kinds]
    return [r for r in races if r.kind == OURS] + best


def parity(dim: int, settings: Settings) -> dict[str, Any]:
    """Run the cases of the second table."""
    problem = make_problem(dim, 0, settings.device)
    optima = problem.precise().optimum(mean_field=True), problem.precise().optimum()
    mean_field = [run_for(who, problem, optima[0], settings) for who in mean_field_contestants(dim, settings)]

    def low_rank_guide(model: Callable) -> AutoLowRankMultivariateNormal:
        return AutoLowRankMultivariateNormal(model, rank=10)

    with pyro.get_param_store().scope():
        try:
            NaturalGradient().discover(low_rank_guide(problem.model))
            refusal = ""
        except ValueError as error:
            refusal = str(error)
    contestants = grid("Adam, low rank 10", low_rank_guide, trace_elbo, PARTICLES, settings.rates, (None, 1000))
    low_rank = [run_for(who, problem, optima[1], settings) for who in contestants]
    whole = run_for(ours(dim)[0], problem, optima[1], settings)
    return {
        "dim": dim,
        "optima": optima,
        "mean_field": best_of(mean_field),
        "low_rank": [whole, *best_of(low_rank)],
        "refusal": refusal,
    }


def print_parity(found: dict[str, Any]) -> None:
    """Print the second table."""
    best_mean_field, best = (optimum.bound for optimum in found["optima"])
    print(f"\n(2) where natural gradients do not win, d = {found['dim']}: gap in nats after so many steps, and seconds")
    print(f"best mean-field ELBO {best_mean_field:.2f}, best full-rank ELBO {best:.2f}")
    head = "".join(f"{f'{s} st':>11}" for s in STEPS) + "".join(f"{f'{s:g} s':>11}" for s in SECONDS)
    for key, title in (("mean_field", "AutoNormal, gap to the best mean field"),
                       ("low_rank", "low rank and full rank, gap to the best full rank")):  # fmt: skip
        print(f"{title:60}{head}{'ms/step':>9}")
        for r in found[key]:
            cells = [*(at_steps(r, s) for s in STEPS), *(at_seconds(r, s) for s in SECONDS)]
            last = r.points[-1]
            line = "".join(f"{cell:11.4g}" for cell in cells) + f"{1e3 * last.seconds / last.steps:9.2f}"
            print(f"{r.kind + ', ' + r.setting:60}{line}")
    print(f"NaturalGradient on the low-rank guide: {found['refusal'] or 'not refused'}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="few steps: shows that it runs, settles nothing")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--dims", type=lambda text: tuple(int(part) for part in text.split(",")), default=None)
    parser.add_argument("--limit", type=float, default=None, help="seconds of one run at d = 100")
    return parser.parse_args(argv)


def choose(options: argparse.Namespace) -> Settings:
    """Return how much is to be run."""
    settings = Settings(options.device, (20, 50, 100), 5, 60.0, 40000, RATES, DECAYS)
    if options.quick:
        settings = Settings(options.device, (10,), 1, 5.0, 400, RATES[:1], DECAYS[:1])
    changed = {name: value for name in ("dims", "seeds", "limit") if (value := getattr(options, name)) is not None}
    return settings._replace(**changed)


def plain(value: Any) -> Any:
    """Return what JSON can hold, without the points of a run but for every twentieth."""
    if isinstance(value, Race):
        kept = value.points[:40] + value.points[40::20]
        return {"kind": value.kind, "setting": value.setting, "reached": plain(value.reached), "points": kept}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if type(value) in (list, tuple) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Run both tables, print them, write JSON."""
    options = parse(argv)
    torch.set_num_threads(1)
    settings = choose(options)
    print(f"{settings.device}, {torch.get_num_threads()} thread, {versions()}", flush=True)
    warm_up(settings)
    found = [full_rank(dim, settings) for dim in settings.dims]
    print_best(found)
    print_full_rank(found, settings)
    print_verdicts(found)
    second = parity(max(settings.dims), settings)
    print_parity(second)
    if options.output:
        report = {"settings": settings._asdict(), "versions": versions(), "full_rank": found, "parity": second}
        options.output.write_text(json.dumps(plain(report), indent=1))
    return 0


def warm_up(settings: Settings) -> None:
    """Take a few steps of all kinds, so that nobody's seconds have what is done once in a process."""
    problem = make_problem(3, 0, settings.device)
    for who in (*ours(3), *(contestants[0] for contestants in opponents(3, RATES, DECAYS).values())):
        race(who, follow(who, problem, Optimum(0.0, 0.0), 0, settings.device), math.inf, 5)


if __name__ == "__main__":
    raise SystemExit(main())
