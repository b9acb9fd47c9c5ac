r"""Bayesian regression, linear or logistic, under a Gaussian guide: how many steps do natural gradients save?

The generative equation, for row i of x, standardised and with a last column of ones, and the guide, which is full-rank
(``AutoMultivariateNormal``) or mean-field (``AutoNormal``):

    w ~ Normal(0, I),    y_i ~ Normal(x_i w, 0.7^2)  or  y_i ~ Bernoulli(sigmoid(x_i w)),    q(w) = Normal(m, S)

The data are scikit-learn's diabetes (442 rows, 11 weights) and breast cancer (569 rows, 31 weights), a fifth held out.
The ELBO of a guide is exact: x_i w is Gaussian under it, which leaves one integral a row, by Gauss-Hermite. A score is
one particle of one step. `python models/bayesian_regression.py` takes about 25 s on 2 cores (`--quick` 5 s), most of
it Adam's 4000 steps; `--family linear` is the other model.

Expect, of breast cancer and over seeds 0, 1, 2, natural gradients within 0.1 nats of the best ELBO after 10 to 12 steps
of the full-rank guide (about 700 scores) and 29 to 40 of the mean-field one (1800 to 2500, in Newton's direction). Adam
needs about 1200 steps for the mean-field guide (20000 scores) and stays 0.4 to 0.5 nats off the full-rank one: the
noise of its gradient, which smaller steps lower and prolong (`benchmarks/natural_gradient.py` has it tuned, with decays
and better gradients). The test log likelihoods are the same within their errors.

Of the linear model the posterior is known, and one natural-gradient step is there: KL 1e-14 nats or less. The best
mean-field guide, 3.7 to 3.9 nats away, is reached in one step as well. Adam is 0.14 to 0.20 nats from the posterior
after its 4000 steps.

References: Conjugate-Computation Variational Inference (Khan, Lin, 2017, arXiv:1703.04265); Fixed-Form Variational
Posterior Approximation through Stochastic Linear Regression (Salimans, Knowles, 2013, arXiv:1206.6679).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import options
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from report import enlarge, write
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence
from tqdm import tqdm

from pyro_elbo_ext import NaturalGradient, ScoreRegression_ELBO

TITLES = {
    "natural": "natural gradient, full-rank",
    "natural-mf": "natural gradient, mean-field",
    "adam": "Adam, full-rank",
    "adam-mf": "Adam, mean-field",
}
STYLES = {"natural": ("C0o-", 7), "natural-mf": ("C1s-", 4), "adam": ("C2-", 0), "adam-mf": ("C3--", 0)}
FAMILIES = {"linear": "diabetes", "logistic": "breast cancer"}
DEFAULTS = {"steps": 4000, "natural_steps": 40, "num_particles": 16, "threads": 1}
QUICK = DEFAULTS | {"steps": 200, "natural_steps": 15}
NOISE, NEAR, FLOOR = 0.7, 0.1, 1e-3  # standard deviation of y given x; nats that count as having arrived; nats shown


class Regression(NamedTuple):
    """The model, with its rows to train on and to test on."""

    family: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def dim(self) -> int:
        """How many weights there are."""
        return self.x.shape[-1]

    def likelihood(self, f: Tensor) -> dist.Distribution:
        """p(y | f), f = x w."""
        return dist.Normal(f, NOISE) if self.family == "linear" else dist.Bernoulli(logits=f)

    def model(self) -> None:
        """p(w, y)."""
        w = pyro.sample("w", dist.Normal(self.x.new_zeros(self.dim), 1.0).to_event(1))
        with pyro.plate("data", len(self.x)):
            pyro.sample("y", self.likelihood((self.x * w).sum(-1)), obs=self.y)

    def posterior(self) -> MultivariateNormal:
        """p(w | y) of the linear model, in closed form."""
        precision = torch.eye(self.dim).to(self.x) + self.x.T @ self.x / NOISE**2
        loc = torch.linalg.solve(precision, self.x.T @ self.y / NOISE**2)
        return MultivariateNormal(loc, precision_matrix=precision)

    def log_prob(self, q: MultivariateNormal, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate p(y_i | w) under q at the nodes of Gauss-Hermite, ``[rows, nodes]``; both it and weights in logs."""
        nodes, weights = (torch.as_tensor(t).to(x) for t in np.polynomial.hermite_e.hermegauss(50))
        f = (x @ q.loc)[:, None] + (x @ q.scale_tril).norm(dim=-1, keepdim=True) * nodes
        return self.likelihood(f).log_prob(y[:, None]), (weights / math.sqrt(2 * math.pi)).log()

    def bound(self, q: MultivariateNormal) -> float:
        """The ELBO."""
        log_prob, log_weights = self.log_prob(q, self.x, self.y)
        prior = MultivariateNormal(torch.zeros_like(q.loc), torch.eye(self.dim).to(q.loc))
        return (log_prob @ log_weights.exp()).sum().item() - kl_divergence(q, prior).item()

    def test(self, q: MultivariateNormal) -> Tensor:
        """The logarithm of the average of p(y_i | w) over q, one for each row held out."""
        log_prob, log_weights = self.log_prob(q, self.test_x, self.test_y)
        return (log_prob + log_weights).logsumexp(-1)


class Result(NamedTuple):
    """What a training reached: q(w), first and last, the ELBO after the steps that are shown, test log likelihoods."""

    first: MultivariateNormal
    q: MultivariateNormal
    steps: list[int]
    bounds: list[float]
    num_particles: int
    test: Tensor
    seconds: float


def load(family: str, seed: int, device: str) -> Regression:
    """Read scikit-learn's bundled data in float64, standardise by the rows to train on, and hold out a fifth."""
    from sklearn.datasets import load_breast_cancer, load_diabetes

    x, y = (torch.as_tensor(t, dtype=torch.float64) for t in
            (load_diabetes if family == "linear" else load_breast_cancer)(return_X_y=True))  # fmt: skip
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[len(x) // 5 :], order[: len(x) // 5]
    x = torch.cat([(x - x[train].mean(0)) / x[train].std(0), torch.ones(len(x), 1, dtype=x.dtype)], 1)
    if family == "linear":
        y = (y - y[train].mean()) / y[train].std()
    return Regression(family, *(t.to(device) for t in (x[train], y[train], x[test], y[test])))


def make_objective(name: str, regression: Regression, num_particles: int, lr: float) -> tuple[Callable, Any, Any]:
    """The whole difference between the four runs: guide, optimiser, ELBO."""
    guide = AutoNormal if name.endswith("-mf") else AutoMultivariateNormal
    if name.startswith("adam"):
        loss = Trace_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=1)
        return guide, pyro.optim.Adam({"lr": lr}), loss
    direction = "newton" if guide is AutoNormal else "gradient"
    # a whole step is exact where the posterior is Gaussian; elsewhere early ones overshoot: 3 nats for each weight
    max_kl = None if regression.family == "linear" else 3.0 * regression.dim
    return guide, NaturalGradient(max_kl=max_kl), ScoreRegression_ELBO(2 * regression.dim, direction=direction)


def gaussian(guide: Any) -> MultivariateNormal:
    """q(w)."""
    if isinstance(guide, AutoNormal):
        return MultivariateNormal(guide.locs.w.detach().clone(), scale_tril=guide.scales.w.detach().diag())
    q = guide.get_posterior()
    return MultivariateNormal(q.loc.detach().clone(), scale_tril=q.scale_tril.detach())


def train(name: str, regression: Regression, args: argparse.Namespace) -> Result:
    """Fit a guide with Pyro's own SVI; seconds are those of its steps."""
    pyro.set_rng_seed(args.seed)
    steps = args.steps if name.startswith("adam") else args.natural_steps
    make_guide, optim, loss = make_objective(name, regression, args.num_particles, args.lr)
    guide, shown, seconds = make_guide(regression.model), {}, 0.0
    svi = SVI(regression.model, guide, optim, loss)
    with pyro.get_param_store().scope():
        for step in tqdm(range(1, steps + 1), desc=TITLES[name], disable=None):
            start = time.perf_counter()
            svi.step()
            seconds += time.perf_counter() - start
            if step % max(step // 50, 1) == 0 or step == steps:  # every step at first, then fewer and fewer
                shown[step] = gaussian(guide)
    bounds, q = [regression.bound(q) for q in shown.values()], shown[steps]
    return Result(shown[1], q, [*shown], bounds, loss.num_particles, regression.test(q), seconds)


def best_bounds(results: dict[str, Result]) -> dict[str, float]:
    """The best ELBO that anyone's guide of that kind has reached, by objective."""
    best = {mean_field: max((max(r.bounds) for name, r in results.items() if name.endswith("-mf") == mean_field),
                            default=math.nan) for mean_field in (True, False)}  # fmt: skip
    return {name: best[name.endswith("-mf")] for name in results}


def tabulate(results: dict[str, Result], regression: Regression) -> list[dict[str, Any]]:
    """Print the last ELBO, when it was nearly reached, the test log likelihood with its standard error, and seconds."""
    rows, best, line = [], best_bounds(results), "{:<29} {:>6} {:>12} {:>20} {:>8} {:>18} {:>13}"
    near = f"to {NEAR} nats (scores)"
    print(line.format("objective", "steps", "ELBO (nats)", near, "KL", "test (nats)", "training (s)"))
    for name, result in results.items():
        pairs = zip(result.steps, result.bounds, strict=True)
        arrived = next((step for step, bound in pairs if bound > best[name] - NEAR), None)
        kl = kl_divergence(result.q, regression.posterior()).item() if regression.family == "linear" else None
        test, error = result.test.mean().item(), result.test.std().item() / math.sqrt(len(result.test))
        row = {"objective": TITLES[name], "steps": result.steps[-1], "bound": result.bounds[-1], "kl": kl}
        row |= {"steps_to_near": arrived, "scores_to_near": arrived and arrived * result.num_particles}
        rows.append(row | {"test": test, "test_error": error, "seconds": result.seconds})
        near = f"{arrived} ({arrived * result.num_particles})" if arrived else "not reached"
        cells = f"{result.bounds[-1]:.3f}", near, "-" if kl is None else f"{kl:.1e}", f"{test:.3f} ± {error:.3f}"
        print(line.format(TITLES[name], result.steps[-1], *cells, f"{result.seconds:.1f}"))
    return rows


def print_first_step(results: dict[str, Result], regression: Regression) -> dict[str, float]:
    """Print how far one step goes in the linear model, whose posterior is known."""
    if regression.family != "linear":
        return {}
    found = {name: kl_divergence(result.first, regression.posterior()).item() for name, result in results.items()}
    print("KL to the exact posterior after one step: " + ", ".join(f"{TITLES[n]} {kl:.2g}" for n, kl in found.items()))
    return found


def plot(path: Path, results: dict[str, Result], title: str) -> None:
    """Two panels against score evaluations: the ELBO, and its distance from the best one of a guide of that kind."""
    from matplotlib.figure import Figure  # draws with Agg: no display, no global state

    figure = Figure(figsize=(13, 5.4), dpi=110, layout="constrained")
    bound, gap = figure.subplots(1, 2)
    best = best_bounds(results)
    for name, result in results.items():
        style, size = STYLES[name]
        scores = result.num_particles * torch.tensor(result.steps)
        bound.semilogx(scores, result.bounds, style, markersize=size, label=TITLES[name])
        gap.loglog(scores, [max(best[name] - value, FLOOR) for value in result.bounds], style, markersize=size)
    top = max(best.values())
    bound.set(title=title, ylabel="ELBO (nats)", ylim=(top - 100, top + 5))
    figure.legend(fontsize=12, loc="outside lower center", ncols=4)
    gap.set(title="Distance from the best guide of that kind", ylabel=f"nats below the best ELBO, or {FLOOR:g}")
    gap.axhline(NEAR, color="0.5", linewidth=1, linestyle=":")
    for axes in (bound, gap):
        axes.set_xlabel("score evaluations (steps x particles)")
        axes.grid(alpha=0.3)
    enlarge(figure)
    figure.savefig(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, of which ``--quick`` changes the defaults."""
    parser = options.make_parser("bayesian_regression", __doc__.partition("\n")[0], TITLES)
    parser.add_argument("--family", choices=FAMILIES, default="logistic", help="what y is given x w")
    parser.add_argument("--lr", type=options.positive, default=1e-2, help="Adam's step size")
    args = options.parse(parser, argv, DEFAULTS, QUICK)
    with options.one_line_errors(parser):
        args.output.mkdir(parents=True, exist_ok=True)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write the picture and the numbers."""
    args = parse(argv)
    names = TITLES if args.elbo == "all" else [args.elbo]
    regression = load(args.family, args.seed, args.device)
    with options.num_threads(args.threads):
        results = {name: train(name, regression, args) for name in names}
    curves = {name: {"steps": r.steps, "bounds": r.bounds, "particles": r.num_particles} for name, r in results.items()}
    table, first = tabulate(results, regression), print_first_step(results, regression)
    write(args.output / "bayesian_regression.json", args, table=table, kl_after_one_step=first, curves=curves)
    title = f"{args.family.capitalize()} regression, {FAMILIES[args.family]}"
    plot(args.output / "bayesian_regression.png", results, title)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
