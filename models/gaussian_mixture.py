r"""A Gaussian mixture whose assignments an encoder infers: which gradient learns both, and with how many particles?

The generative equation, for point i and C = 20 components, of which only the prior is learned, and the guide:

    c_i ~ Categorical(softmax(theta)),    x_i | c_i ~ Normal(10 c_i, 5^2),    q(c_i | x_i) = Categorical(encoder(x_i))

The data are fresh draws, with a true p(c) proportional to c + 5; the encoder sees x as it is and has 16 tanh units.
`python models/gaussian_mixture.py` takes about 95 s on 2 cores (`--quick` 8 s): 16 trainings of 2500 steps. The paper
takes 100000 with Adam at 1e-3, which is `--steps 100000 --lr 1e-3` (about 4 minutes for each training).

Expect wake-sleep to get better with particles and alone to have a good guide by then. Over seeds 0, 1, 2, its L2 errors
for K = 2, 5, 10, 20 are 0.60 to 0.64, 0.15 to 0.19, 0.05 to 0.14, 0.01 to 0.02 (prior) and 0.59 to 0.72, 0.2, 0.2, 0.2
(guide), and its ELBO for K = 20 is -5.5 to -5.6 nats; the evidence under the truth is -5.25. VIMCO and OVIS learn the
prior as well (0.01 to 0.02 for K = 20), but all their guides are off by 0.47 or more, their ELBOs -9 at best. The
leave-one-out ELBO keeps 3 to 6 of the 20 components for any K (prior 0.56 to 0.70, ELBO -19 to -29).

At the paper's settings, K = 20 and seed 0, errors of prior and guide and the ELBO are: wake-sleep 0.004, 0.04, -5.25;
OVIS 0.004, 0.02, -5.25; VIMCO 0.004, 0.22, -5.47; leave-one-out 0.54, 0.31, -19.7. Length alone is no cure: 20000 steps
at 1e-2 have wake-sleep at 0.011, 0.10, -5.27, but the priors of VIMCO and OVIS at 0.24 and 0.25.

References: Revisiting Reweighted Wake-Sleep for Models with Stochastic Control Flow (Le, Kosiorek, Siddharth, Teh,
Wood, 2018, arXiv:1805.10469); constants as in the code of Optimal Variance Control of the Score-Function Gradient
Estimator for Importance-Weighted Bounds (Liévin, Dittadi, Christensen, Winther, 2020, arXiv:2008.01998).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import options
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.infer.elbo import ELBO
from report import enlarge, write
from torch import Tensor, nn
from tqdm import tqdm

from pyro_elbo_ext import IWAE_ELBO, ReweightedWakeSleep_ELBO, ScoreFunction_ELBO

TITLES = {"rws": "reweighted wake-sleep", "vimco": "VIMCO", "ovis": "OVIS", "elbo": "leave-one-out ELBO"}
DEFAULTS = {"steps": 2500, "batch_size": 100, "threads": 1, "num_particles": [2, 5, 10, 20]}
QUICK = DEFAULTS | {"steps": 300, "num_particles": [2, 10]}


class GaussianMixture(nn.Module):
    """The pair of model and guide, and the truth that the data come from: p(c) proportional to c + 5."""

    def __init__(self, num_components: int = 20, hidden: int = 16) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.encoder = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, num_components))
        components = torch.arange(num_components)
        self.register_buffer("loc", 10.0 * components)
        self.register_buffer("truth", (components + 5) / (components + 5).sum())

    def prior(self) -> dist.Distribution:
        """p(c)."""
        return dist.Categorical(logits=self.logits)

    def likelihood(self, c: Tensor) -> dist.Distribution:
        """p(x | c)."""
        return dist.Normal(self.loc[c], 5.0)

    def posterior(self, x: Tensor) -> dist.Distribution:
        """q(c | x)."""
        return dist.Categorical(logits=self.encoder(x[..., None]))

    def model(self, x: Tensor) -> None:
        """p(x, c)."""
        pyro.module("mixture", self)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", self.prior())
            pyro.sample("x", self.likelihood(c), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(c | x)."""
        pyro.module("mixture", self)
        with pyro.plate("data", len(x)):
            pyro.sample("c", self.posterior(x))


class Result(NamedTuple):
    """What a training reached; errors are L2 distances of probabilities, ``guide`` and ``bound`` one per test point."""

    prior: Tensor
    error: float
    guide: Tensor
    bound: Tensor
    evidence: float
    seconds: float


def make_objective(name: str, num_particles: int) -> ELBO:
    """The whole difference between the four runs."""
    if name == "elbo":
        return ScoreFunction_ELBO(num_particles, baseline="leave-one-out")
    if name == "rws":
        return ReweightedWakeSleep_ELBO(num_particles, insomnia=1.0)
    return IWAE_ELBO(num_particles, gradient=name)


def batches(mixture: GaussianMixture, size: int, seed: int) -> Iterator[Tensor]:
    """Fresh draws from the truth without end, the same for every objective."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        c = torch.multinomial(mixture.truth.cpu(), size, replacement=True, generator=generator).to(mixture.loc.device)
        yield mixture.loc[c] + 5.0 * torch.randn(size, generator=generator).to(c.device)


@torch.no_grad()
def evaluate(mixture: GaussianMixture, x: Tensor, seconds: float) -> Result:
    """Compare with the truth and with the posterior under the learned model, by summing over the components."""
    q = mixture.posterior(x).probs
    log_joint = mixture.logits.log_softmax(-1) + dist.Normal(mixture.loc, 5.0).log_prob(x[:, None])
    prior, log_evidence = mixture.prior().probs, log_joint.logsumexp(-1)
    guide = (q - (log_joint - log_evidence[:, None]).exp()).norm(dim=-1)
    bound = (q * log_joint - torch.xlogy(q, q)).sum(-1)
    error = (prior - mixture.truth).norm().item()
    return Result(prior.cpu(), error, guide.cpu(), bound.cpu(), log_evidence.mean().item(), seconds)


def train(name: str, num_particles: int, args: argparse.Namespace) -> Result:
    """Fit a mixture with Pyro's own SVI and compare it on fresh points."""
    pyro.set_rng_seed(args.seed)
    start, mixture = time.perf_counter(), GaussianMixture().to(args.device)
    svi = SVI(mixture.model, mixture.guide, pyro.optim.Adam({"lr": args.lr}), make_objective(name, num_particles))
    with pyro.get_param_store().scope():
        bar = tqdm(range(args.steps), desc=f"{TITLES[name]}, K = {num_particles}", disable=None)
        for _, x in zip(bar, batches(mixture, args.batch_size, args.seed), strict=False):
            svi.step(x)
    seconds = time.perf_counter() - start
    return evaluate(mixture, next(batches(mixture, 1000, args.seed + 1)), seconds)


def tabulate(results: dict[tuple[str, int], Result]) -> list[dict[str, Any]]:
    """Print both errors, the ELBO per test point with its standard error, and seconds."""
    rows, line = [], "{:<21} {:>3} {:>12} {:>17} {:>17} {:>13}"
    print(line.format("objective", "K", "prior error", "guide error", "ELBO (nats)", "training (s)"))
    for (name, num_particles), result in results.items():
        row = {"objective": TITLES[name], "K": num_particles, "seconds": result.seconds}
        row |= {"prior_error": result.error, "log_evidence": result.evidence, "prior": result.prior.tolist()}
        for key, values in (("guide_error", result.guide), ("bound", result.bound)):
            row |= {key: values.mean().item(), f"{key}_error": values.std().item() / math.sqrt(len(values))}
        guide = f"{row['guide_error']:.3f} ± {row['guide_error_error']:.3f}"
        bound = f"{row['bound']:.2f} ± {row['bound_error']:.2f}"
        print(line.format(TITLES[name], num_particles, f"{result.error:.4f}", guide, bound, f"{result.seconds:.1f}"))
        rows.append(row)
    return rows


def plot(path: Path, results: dict[tuple[str, int], Result], truth: Tensor) -> None:
    """Three panels: both errors against K, and the priors learned with the most particles."""
    from matplotlib.figure import Figure  # draws with Agg: no display, no global state
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(15, 5.4), dpi=110, layout="constrained")
    prior, guide, learned = figure.subplots(1, 3)
    counts = sorted({count for _, count in results})
    for name, marker in zip(dict.fromkeys(name for name, _ in results), "os^D", strict=False):
        found = [results[name, count] for count in counts]
        prior.loglog(counts, [result.error for result in found], f"{marker}-")
        guide.semilogx(counts, [result.guide.mean().item() for result in found], f"{marker}-")
        learned.plot(found[-1].prior.tolist(), f"{marker}-", markersize=4, label=TITLES[name])
    prior.set(title="Prior against the truth", ylabel="L2 error of the prior")
    prior.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    prior.yaxis.set_major_formatter("{x:g}")
    guide.set(title="Guide against the learned posterior", ylabel="mean L2 error of the guide", ylim=(0, None))
    for axes in (prior, guide):
        axes.set(xlabel="particles K", xticks=counts, xticklabels=counts)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    show_truth(learned, truth, counts[-1])
    enlarge(figure)
    figure.savefig(path)


def show_truth(axes: Any, truth: Tensor, num_particles: int) -> None:
    """The true prior behind the learned ones, and room for a legend above."""
    axes.bar(range(len(truth)), truth.tolist(), color="0.85", label="truth", zorder=0)
    title = f"Prior learned with {num_particles} particles"
    axes.set(title=title, xlabel="component c", ylabel="prior p(c)", xticks=range(0, len(truth), 5))
    axes.set_ylim(0, 1.5 * axes.get_ylim()[1])
    axes.legend(fontsize=12, loc="upper left")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, of which ``--quick`` changes the defaults."""
    parser = options.make_parser("gaussian_mixture", __doc__.partition("\n")[0], TITLES)
    particles = "particles of the runs, of which each has its row in the table"
    parser.add_argument("--num-particles", "--particles", type=options.counts, metavar="N,N,...", help=particles)
    parser.add_argument("--lr", type=options.positive, default=1e-2, help="Adam's step size")
    args = options.parse(parser, argv, DEFAULTS, QUICK)
    with options.one_line_errors(parser):
        args.output.mkdir(parents=True, exist_ok=True)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write the picture and the numbers."""
    args = parse(argv)
    names = TITLES if args.elbo == "all" else [args.elbo]
    with options.num_threads(args.threads):
        results = {(name, count): train(name, count, args) for name in names for count in args.num_particles}
    write(args.output / "gaussian_mixture.json", args, table=tabulate(results))
    plot(args.output / "gaussian_mixture.png", results, GaussianMixture().truth)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
