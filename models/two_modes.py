r"""A posterior of two modes, bent and exactly known: which guides find both, and how far are they from it in nats?

The generative equation is that of one number explained by a product of two factors, whose signs it does not tell:

    z_1, z_2 ~ Normal(0, 1),    y | z ~ Normal(z_1 z_2, s^2),    y = 1.5,  s = 0.3

so that the posterior lies along both branches of a hyperbola, one half in each. The evidence and the shares are sums
over a grid of 1601^2 points. A guide's KL(q || p) is log Z - E_q[log p(y, z) - log q(z)], over 20000 draws.

A guide that fits one branch and misses the other has a KL of log 2 = 0.69 nats at best, and every path that an ELBO's
gradient knows to the other branch leads through a valley 11 nats deep. So the flows' likelihood is tempered: its power
rises from 0 to 1 over the first half of the steps (`--temper` is that part in percent, 0 for none). The normal guides
have it at 1 throughout: tempered, the dense one ended across the valley on each of three seeds, 7 nats off.
`python models/two_modes.py` takes about 30 s on one core (`--quick` 5 s).

Expect, over seeds 0 to 4, a KL of 1.38 to 1.39 nats for the diagonal normal, on one branch; 0.97 to 1.23 on one branch
for the dense one, or 6.8 across the valley (seeds 0 and 4); 0.16 to 0.22 for the flow, which keeps a bridge between the
branches, with 40 to 55 % of its draws on the positive one; 0.02 to 0.30 from a mixture (0.04, 0.02, 0.27, 0.30, 0.27),
with 21 to 56 %. With one hidden layer instead of two, which is `AutoFlow`'s default, they end at 0.9 to 1.4 and at 0.3
to 0.6.
Without tempering, seeds 0 to 2, the flow is on one branch every time (0.70 nats), from a mixture once (0.16, 0.05,
0.72); so a base of several normals is no promise of several modes.

References: Variational Inference with Normalizing Flows (Rezende, Mohamed, 2015, arXiv:1505.05770), which tempers its
flows' targets as well; Resampling Base Distributions of Normalizing Flows (Stimper, Schölkopf, Hernández-Lobato, 2021,
arXiv:2110.15828) on why a flow from one normal leaves a bridge between modes.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import options
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal
from report import enlarge, write
from torch import Tensor
from tqdm import tqdm

from pyro_elbo_ext import AutoFlow

TITLES = {
    "diagonal": "AutoDiagonalNormal",
    "dense": "AutoMultivariateNormal",
    "flow": "AutoFlow",
    "mixture": 'AutoFlow, base="mixture"',
}
DEFAULTS = {"steps": 2500, "num_particles": 16, "temper": 50, "threads": 1}
QUICK = DEFAULTS | {"steps": 300}
EDGE, POINTS, DRAWS = 6.0, 1601, 20000  # the grid's border, its points a side, draws that a guide is judged by


class Product:
    """The model; ``power`` is that of the likelihood."""

    def __init__(self, observed: float = 1.5, noise: float = 0.3, device: str = "cpu") -> None:
        self.observed = torch.tensor(observed, device=device)
        self.noise, self.power = noise, 1.0

    def prior(self) -> dist.Distribution:
        """p(z)."""
        return dist.Normal(self.observed.new_zeros(2), 1.0).to_event(1)

    def likelihood(self, z: Tensor) -> dist.Distribution:
        """p(y | z)."""
        return dist.Normal(z.prod(-1), self.noise)

    def model(self) -> None:
        """p(z, y), or with the likelihood's power."""
        z = pyro.sample("z", self.prior())
        with poutine.scale(scale=self.power):
            pyro.sample("y", self.likelihood(z), obs=self.observed)

    def log_joint(self, z: Tensor) -> Tensor:
        """The logarithm of p(z, y)."""
        return self.prior().log_prob(z) + self.likelihood(z).log_prob(self.observed)


class Exact(NamedTuple):
    """Sums over a grid: log evidence, share of the positive branch, and the density [POINTS, POINTS] on the axis."""

    log_evidence: float
    share: float
    axis: Tensor
    density: Tensor


class Result(NamedTuple):
    """What a guide reached: its log-weights and draws, and the seconds of its training."""

    log_w: Tensor
    z: Tensor
    seconds: float


def positive(z: Tensor) -> Tensor:
    """Which values are on the branch of positive factors."""
    return z.sum(-1) > 0


def integrate(product: Product) -> Exact:
    """Sum over the grid, whose spacing is a fraction of the noise; beyond its edge is 1e-8 of the prior."""
    axis = torch.linspace(-EDGE, EDGE, POINTS, dtype=torch.float64).to(product.observed.device)
    z = torch.cartesian_prod(axis, axis)
    log_joint = product.log_joint(z)
    log_evidence = log_joint.logsumexp(0) + 2 * (axis[1] - axis[0]).log()
    weight = log_joint.softmax(0)
    share = (weight * positive(z)).sum() + 0.5 * weight[z.sum(-1) == 0].sum()
    return Exact(log_evidence.item(), share.item(), axis, (log_joint - log_evidence).exp().view(POINTS, POINTS))


def make_guide(name: str, model: Callable) -> Any:
    """The whole difference between the four runs."""
    if name == "diagonal":
        return AutoDiagonalNormal(model, init_scale=1.0)
    if name == "dense":
        return AutoMultivariateNormal(model, init_scale=1.0)
    return AutoFlow(model, base="normal" if name == "flow" else "mixture", hidden_features=(64, 64), init_scale=1.0)


def power(name: str, step: int, args: argparse.Namespace) -> float:
    """The likelihood's power at a step from 0 on; only flows are tempered."""
    rising = args.steps * args.temper / 100
    return min((step + 1) / rising, 1.0) if rising and name in ("flow", "mixture") else 1.0


def train(name: str, product: Product, args: argparse.Namespace) -> Result:
    """Fit a guide with Pyro's own SVI, and draw from it."""
    pyro.set_rng_seed(args.seed)
    guide, start = make_guide(name, product.model), time.perf_counter()
    optim = pyro.optim.ClippedAdam({"lr": args.lr, "lrd": 0.02 ** (1 / args.steps)})
    loss = Trace_ELBO(args.num_particles, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(product.model, guide, optim, loss)
    with pyro.get_param_store().scope():
        for step in tqdm(range(args.steps), desc=TITLES[name], disable=None):
            product.power = power(name, step, args)
            svi.step()
        product.power, seconds = 1.0, time.perf_counter() - start
        with torch.no_grad():
            q = guide.get_posterior()
            z = q.sample((DRAWS,))
            return Result(product.log_joint(z) - q.log_prob(z), z, seconds)


def tabulate(results: dict[str, Result], exact: Exact) -> list[dict[str, Any]]:
    """Print KL(q || p) with its standard error, the share of draws on each branch, and seconds."""
    rows, line = [], "{:<26} {:>18} {:>24} {:>13}"
    print(f"log evidence {exact.log_evidence:.4f} nats; {exact.share:.1%} of the posterior on the positive branch")
    print(line.format("guide", "KL (nats)", "positive / negative", "training (s)"))
    for name, (log_w, z, seconds) in results.items():
        share = positive(z).double().mean().item()
        row = {"guide": TITLES[name], "kl": exact.log_evidence - log_w.mean().item(), "share": share}
        row |= {"kl_error": log_w.std().item() / math.sqrt(len(log_w)), "seconds": seconds}
        kl = f"{row['kl']:.3f} ± {row['kl_error']:.3f}"
        print(line.format(TITLES[name], kl, f"{share:.1%} / {1 - share:.1%}", f"{seconds:.1f}"))
        rows.append(row)
    return rows


def plot(path: Path, results: dict[str, Result], exact: Exact) -> None:
    """One panel a guide: a thousand draws over the exact density."""
    from matplotlib.figure import Figure  # draws with Agg: no display, no global state

    figure = Figure(figsize=(4.2 * len(results), 4.8), dpi=110, layout="constrained")
    shown, edge = (exact.axis.abs() <= 3.5).nonzero()[:, 0][::4], 3.5
    density = exact.density[shown][:, shown].T.cpu()  # rows are the second factor
    for axes, (name, result) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        axes.contourf(exact.axis[shown].cpu(), exact.axis[shown].cpu(), density, 12, cmap="Greys")
        axes.plot(*result.z[:1000].T.cpu(), "C0.", markersize=3, alpha=0.5)
        kl = exact.log_evidence - result.log_w.mean().item()
        axes.set(title=f"{TITLES[name]}\nKL {kl:.2f} nats", xlabel="$z_1$", ylabel="$z_2$")
        axes.set(xlim=(-edge, edge), ylim=(-edge, edge), aspect="equal")
    enlarge(figure)
    figure.savefig(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, of which ``--quick`` changes the defaults."""
    parser = options.make_parser("two_modes", __doc__.partition("\n")[0], TITLES)
    parser.add_argument("--lr", type=options.positive, default=1e-2, help="Adam's first step size")
    args = options.parse(parser, argv, DEFAULTS, QUICK, {"temper": 0})
    if args.temper > 100:
        parser.error(f"--temper {args.temper}: give percents of the steps, 0 to 100")
    with options.one_line_errors(parser):
        args.output.mkdir(parents=True, exist_ok=True)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write the picture and the numbers."""
    args = parse(argv)
    product = Product(device=args.device)
    exact = integrate(product)
    with options.num_threads(args.threads):
        results = {name: train(name, product, args) for name in (TITLES if args.elbo == "all" else [args.elbo])}
    shown = {"log_evidence": exact.log_evidence, "share": exact.share}
    write(args.output / "two_modes.json", args, exact=shown, table=tabulate(results, exact))
    plot(args.output / "two_modes.png", results, exact)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
