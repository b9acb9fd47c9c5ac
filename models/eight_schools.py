r"""Eight schools, the hierarchy whose posterior is a funnel: what each guide and each ELBO miss of the exact answer.

The generative equation is Rubin's, for the effect y_j of coaching in school j and its standard error s_j; the model is
written centred, as its equation is:

    mu ~ Normal(0, 5),    tau ~ HalfCauchy(5),    theta_j ~ Normal(mu, tau),    y_j ~ Normal(theta_j, s_j)

Given tau all else is Gaussian, which leaves one integral, over log tau: evidence, means and deviations are exact. A
guide is judged by 10000 draws: log Z less the ELBO, which is KL(q || p), and less L_100, k-hat of `diagnose`, and the
means of its draws as they are, not weighted. `python models/eight_schools.py` takes about 90 s on one core (`--quick`
8 s); `--netcdf` writes the best guide's draws for ArviZ as well.

Log Z is -31.3113 nats. Expect, for seeds 0, 1, 2, a KL of 3.0, 2.7, 2.9 nats for AutoNormal and of 2.2, 1.8, 1.9 for
AutoMultivariateNormal, both still falling after 1000 steps; 0.18, 0.14, 0.17 for AutoFlow(noncenter=False); 0.09, 0.07,
0.06 for AutoFlow, which non-centres theta by itself; and 0.015, 0.033, 0.012 when sticking-the-landing takes the
score's noise out of the same ELBO's gradient, for three times the seconds. AutoPlatedFlow has 0.04, 0.03, 0.04. Of the
best run all means are within 0.03 standard deviations. The Gaussians' are off by 0.6 to 0.9 at the worst school, and
their k-hat, 0.77 to 0.96, says so: `diagnose` calls them BAD or UNCLEAR, and AutoFlow under both gradients GOOD.

An importance-weighted bound trains the weighted draws, not the draws: under IWAE + DReG the same flow's L_100 is within
0.004 nats of log Z, its standard error, but its KL is 1.6, 0.3, 1.1, and its deviation of tau 9, 5, 8 for 3.2.
`diagnose` says REWEIGHT.

References: Estimation in Parallel Randomized Experiments (Rubin, 1981), with the data; Yes, but Did It Work?:
Evaluating Variational Inference (Yao, Vehtari, Simpson, Gelman, 2018, arXiv:1802.02538), on this posterior; Automatic
Reparameterisation of Probabilistic Programs (Gorinova, Moore, Hoffman, 2020, arXiv:1906.03028); Sticking the Landing
(Roeder, Wu, Duvenaud, 2017, arXiv:1703.09194).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import options
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_median
from report import Examined, Moments, enlarge, examine, mixture, plot_distances, tabulate_distances, write
from torch import Tensor
from tqdm import tqdm

from pyro_elbo_ext import IWAE_ELBO, VRIWAE_ELBO, AutoFlow, AutoPlatedFlow, to_arviz

TITLES = {
    "normal": "AutoNormal, ELBO",
    "dense": "AutoMultivariateNormal, ELBO",
    "centred": "AutoFlow(noncenter=False), ELBO",
    "flow": "AutoFlow, ELBO",
    "flow-dreg": "AutoFlow, IWAE + DReG",
    "flow-stl": "AutoFlow, ELBO + STL",
    "plated": "AutoPlatedFlow, ELBO",
}
DEFAULTS = {"steps": 1000, "num_particles": 16, "draws": 10000, "threads": 1}
QUICK = DEFAULTS | {"steps": 30, "draws": 1000}
EFFECTS = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]  # Rubin (1981): points gained in the verbal test
ERRORS = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
SCALE = 5.0  # of the priors of mu and tau


class Schools(NamedTuple):
    """The model and its data, ``[schools]`` both."""

    effects: Tensor
    errors: Tensor

    @property
    def features(self) -> Tensor:
        """What tells the schools apart."""
        return torch.stack([self.effects, self.errors.log()], -1)

    def model(self) -> None:
        """p(mu, tau, theta, y)."""
        scale = self.effects.new_tensor(SCALE)
        mu = pyro.sample("mu", dist.Normal(torch.zeros_like(scale), scale))
        tau = pyro.sample("tau", dist.HalfCauchy(scale))
        with pyro.plate("schools", len(self.effects)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, self.errors), obs=self.effects)


class Exact(NamedTuple):
    """Log evidence; moments by site; and on a grid of log tau its density, and theta given it, ``[nodes, schools]``."""

    log_evidence: float
    moments: dict[str, Moments]
    log_tau: Tensor
    density: Tensor
    theta: Moments


def integrate(schools: Schools, nodes: int = 4001) -> Exact:
    """Sum over log tau by the trapezoidal rule in float64, with mu and theta in closed form given tau."""
    y, s = schools.effects.double(), schools.errors.double()
    log_tau = torch.linspace(-20, 15, nodes, dtype=torch.float64).to(y.device)
    tau = log_tau.exp()[:, None]
    variance = s.square() + tau.square()  # of y given mu and tau, [nodes, schools]
    precision = SCALE**-2 + (1 / variance).sum(-1)  # of mu given tau and y
    mu = (y / variance).sum(-1) / precision
    likelihood = dist.Normal(0.0, variance.sqrt()).log_prob(y).sum(-1)
    likelihood = likelihood + (mu.square() * precision - (SCALE**2 * precision).log()) / 2
    log_joint = likelihood + dist.HalfCauchy(torch.full_like(log_tau, SCALE)).log_prob(tau[:, 0]) + log_tau
    weight = log_joint.softmax(0)
    pooling = s.square() / variance  # how much of theta's mean is mu
    theta = (1 - pooling) * y + pooling * mu[:, None]
    theta_variance = (1 - pooling) * s.square() + pooling.square() / precision[:, None]
    moments = {
        "mu": mixture(weight, mu[:, None], 1 / precision[:, None]),
        "tau": mixture(weight, tau, torch.zeros_like(tau)),
        "theta": mixture(weight, theta, theta_variance),
    }
    step = log_tau[1] - log_tau[0]
    log_evidence = (log_joint.logsumexp(0) + step.log()).item()
    return Exact(log_evidence, moments, log_tau, weight / step, Moments(theta, theta_variance.sqrt()))


def make_objective(name: str, schools: Schools, num_particles: int) -> tuple[Any, float, Any]:
    """The whole difference between the runs: guide, first step size, ELBO."""
    loss: Any = Trace_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=1)
    if name in ("normal", "dense"):
        gaussian = AutoNormal if name == "normal" else AutoMultivariateNormal
        return gaussian(schools.model, init_loc_fn=init_to_median, init_scale=0.5), 5e-2, loss
    if name == "plated":
        return AutoPlatedFlow(schools.model, {"schools": schools.features}), 1e-2, loss
    if name == "flow-dreg":
        loss = IWAE_ELBO(num_particles, gradient="dreg")
    elif name == "flow-stl":
        loss = VRIWAE_ELBO(1.0, num_particles, gradient="stl")
    return AutoFlow(schools.model, noncenter=False if name == "centred" else "auto"), 1e-2, loss


def train(name: str, schools: Schools, args: argparse.Namespace) -> Examined:
    """Fit a guide with Pyro's own SVI, and have it examined."""
    pyro.set_rng_seed(args.seed)
    start, (guide, lr, loss) = time.perf_counter(), make_objective(name, schools, args.num_particles)
    optim = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.02 ** (1 / args.steps)})
    with pyro.get_param_store().scope() as state:
        svi = SVI(schools.model, guide, optim, loss)
        for _ in tqdm(range(args.steps), desc=TITLES[name], disable=None):
            svi.step()
        seconds = time.perf_counter() - start
        return examine(svi, state, seconds, args.draws, args.seed)


def plot(path: Path, results: dict[str, Examined], rows: list[dict[str, Any]], exact: Exact) -> None:
    """One panel a run, its draws over the exact funnel of log tau and the first school; and the runs' distances."""
    from matplotlib.figure import Figure  # draws with Agg: no display, no global state

    columns = min(len(results) + 1, 4)
    lines = math.ceil((len(results) + 1) / columns)
    figure = Figure(figsize=(4.2 * columns, 4.2 * lines), dpi=110, layout="constrained")
    *panels, last = figure.subplots(lines, columns).flat
    theta = torch.linspace(-25, 50, 200).to(exact.log_tau)
    shown = (exact.log_tau > -4) & (exact.log_tau < 4)
    given = dist.Normal(exact.theta.mean[shown, :1], exact.theta.sd[shown, :1])
    density = exact.density[shown, None] * given.log_prob(theta).exp()
    for axes, row, result in zip(panels, rows, results.values(), strict=True):
        axes.contourf(theta.cpu(), exact.log_tau[shown].cpu(), density.cpu(), 12, cmap="Greys")
        draws = result.report.draws.values
        axes.plot(draws["theta"][:1000, 0].cpu(), draws["tau"][:1000].log().cpu(), "C0.", markersize=3, alpha=0.5)
        axes.set(title=f"{row['run']}\nKL {row['kl']:.3f} nats", xlim=(-25, 50), ylim=(-4, 4))
        axes.set(xlabel=r"$\theta_1$", ylabel=r"$\log \tau$")
    plot_distances(last, rows)
    enlarge(figure)
    figure.savefig(path)


def export(path: Path, results: dict[str, Examined], schools: Schools, seed: int) -> None:
    """Write the draws of the guide with the least KL, their weights and their predictions in ArviZ's format."""
    best = max(results.values(), key=lambda result: result.report.bounds[0].value)
    coords = {"schools": [chr(ord("A") + i) for i in range(len(schools.effects))]}
    with pyro.get_param_store().scope(best.parameters):
        data = to_arviz(schools.model, best.guide, num_samples=2000, correct="psis", coords=coords, seed=seed)
    data.to_netcdf(str(path))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, of which ``--quick`` changes the defaults."""
    parser = options.make_parser("eight_schools", __doc__.partition("\n")[0], TITLES)
    parser.add_argument("--netcdf", action="store_true", help="write eight_schools.nc, too, with ArviZ")
    args = options.parse(parser, argv, DEFAULTS, QUICK, {"draws": 1000})
    if args.netcdf and not importlib.util.find_spec("arviz"):
        parser.error("--netcdf needs ArviZ: pip install 'pyro-elbo-ext[arviz]'")
    with options.one_line_errors(parser):
        args.output.mkdir(parents=True, exist_ok=True)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write the picture and the numbers."""
    args = parse(argv)
    schools = Schools(*(torch.tensor(column, device=args.device) for column in (EFFECTS, ERRORS)))
    exact = integrate(schools)
    with options.num_threads(args.threads):
        results = {name: train(name, schools, args) for name in (TITLES if args.elbo == "all" else [args.elbo])}
    moments = {site: [part.tolist() for part in pair] for site, pair in exact.moments.items()}
    shown = {"log_evidence": exact.log_evidence, **moments}
    rows = tabulate_distances(results, TITLES, exact, ("mu", "tau"), "theta")
    write(args.output / "eight_schools.json", args, exact=shown, table=rows)
    plot(args.output / "eight_schools.png", results, rows, exact)
    if args.netcdf:
        export(args.output / "eight_schools.nc", results, schools, args.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
