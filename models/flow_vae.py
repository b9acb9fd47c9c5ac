r"""A variational autoencoder on handwritten digits, with a Gaussian and with a flow as its amortised posterior.

The generative equation is that of `vae.py` for image i, with L = 2 latent dimensions; the two guides share all but the
last step, which turns the encoder's features into a distribution:

    z_i ~ Normal(0, I_L),    x_i | z_i ~ Bernoulli(sigmoid(decoder(z_i))),    h_i = encoder(x_i)
    Gaussian: q(z_i | x_i) = Normal(mu, diag(sigma^2)), (mu, log sigma) = h_i    flow: z_i = T(noise | h_i)

T is inverse autoregressive. Both are trained, each with a decoder of its own that starts from the same numbers, under
the ELBO, `VRIWAE_ELBO(1.0)`, whose gradient is `--gradient`. The inference gap is L_500 less the ELBO, a lower bound
on KL(q(z | x) || p(z | x)) that is close to it where the gap is small. `python models/flow_vae.py` takes about 40 s
on one core that is its own (`--quick` 6 s).

Expect the flow's test ELBO (nats per image) above the Gaussian's by 0.42, 0.74, 0.28, 1.06, 0.84 for seeds 0 to 4
(paired, standard error 0.19 to 0.26), from -18.9 to -20.1, and its gap smaller by 0.40, 0.25, 0.02, 0.44, 0.48 (0.12
to 0.13: nothing for seed 2), from 0.9 to 1.3. After 1500 steps the ELBO's gains are 0.85, 0.49 and -0.12 for seeds 0 to
2.

It is not so everywhere. A flow starts almost without its context and takes longer to learn to use it: in short runs
(`--quick`) the Gaussian is 3 nats better, and with four latent dimensions (`--latent 4 --steps 1500`, seed 0) 1.3 nats,
though the flow's gap is no larger. For one decoder, held fixed, a flow gains 0.2 to 0.3 nats with two dimensions
and 0.0 to 0.1 with four, but may also end with a tenth of the images in the wrong region, and lose one nat.

References: Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016, arXiv:1606.04934);
Inference Suboptimality in Variational Autoencoders (Cremer, Li, Duvenaud, 2018, arXiv:1801.03558).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import options
import pyro
import pyro.distributions as dist
import torch
from datasets import DATA_HELP, Data, load_data
from pyro.infer import SVI
from report import bound, enlarge, log_weights, write
from torch import Tensor, nn
from tqdm import tqdm

from pyro_elbo_ext import VRIWAE_ELBO, FlowDistribution, make_flow

TITLES = {"gaussian": "Gaussian", "flow": "flow"}
DEFAULTS = {"steps": 2500, "num_particles": 4, "batch_size": 100, "latent": 2, "hidden": 200, "threads": 1}
QUICK = DEFAULTS | {"steps": 400, "hidden": 64}
PARTICLES, FEATURES = 500, 32  # of the importance-weighted bound; that a flow is given


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """A network of two hidden layers."""
    first, second = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(hidden, outputs))


class VAE(nn.Module):
    """The pair of model and guide, the latter with a flow if ``flow``."""

    def __init__(self, num_pixels: int, latent: int, hidden: int, batch_size: int, flow: bool) -> None:
        super().__init__()
        self.latent, self.batch_size = latent, batch_size
        self.decoder = mlp(latent, hidden, num_pixels)
        self.encoder = mlp(num_pixels, hidden, FEATURES if flow else 2 * latent)
        # no affine map of the flow's own: each image has its location and scale from its features
        self.flow = make_flow("iaf", latent, FEATURES, transforms=2, affine=None) if flow else None

    def prior(self, x: Tensor) -> dist.Distribution:
        """p(z), on the device of x."""
        return dist.Normal(x.new_zeros(self.latent), x.new_ones(self.latent)).to_event(1)

    def likelihood(self, z: Tensor) -> dist.Distribution:
        """p(x | z)."""
        return dist.Bernoulli(logits=self.decoder(z)).to_event(1)

    def posterior(self, x: Tensor) -> dist.Distribution:
        """q(z | x)."""
        features = self.encoder(x)
        if self.flow is not None:
            return FlowDistribution(self.flow, features)
        loc, log_scale = features.chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def images(self, x: Tensor) -> pyro.plate:
        """The plate of images, of which a step sees a minibatch."""
        return pyro.plate("data", len(x), subsample_size=min(self.batch_size, len(x)), device=x.device)

    def model(self, x: Tensor) -> None:
        """p(x, z)."""
        pyro.module("decoder", self.decoder)
        with self.images(x) as rows:
            z = pyro.sample("z", self.prior(x))
            pyro.sample("x", self.likelihood(z), obs=x[rows])

    def guide(self, x: Tensor) -> None:
        """q(z | x)."""
        pyro.module("encoder", self.encoder)
        if self.flow is not None:
            pyro.module("flow", self.flow)
        with self.images(x) as rows:
            pyro.sample("z", self.posterior(x[rows]))


class Result(NamedTuple):
    """A trained pair, its ELBO and importance-weighted bound in nats for each test image, and the seconds it took."""

    pair: VAE
    elbo: Tensor
    tight: Tensor
    seconds: float

    @property
    def gap(self) -> Tensor:
        """The inference gap of each test image."""
        return self.tight - self.elbo


def make_objective(num_particles: int, gradient: str) -> VRIWAE_ELBO:
    """The ELBO, for both runs."""
    return VRIWAE_ELBO(1.0, num_particles, gradient=gradient)


def train(name: str, data: Data, args: argparse.Namespace) -> Result:
    """Fit a VAE with Pyro's own SVI and score the test images."""
    pyro.set_rng_seed(args.seed)
    start, flow = time.perf_counter(), name == "flow"
    vae = VAE(data.train.shape[1], args.latent, args.hidden, args.batch_size, flow).to(args.device)
    optim = pyro.optim.ClippedAdam({"lr": args.lr, "lrd": 0.05 ** (1 / args.steps)})
    svi = SVI(vae.model, vae.guide, optim, make_objective(args.num_particles, args.gradient))
    with pyro.get_param_store().scope():
        for _ in tqdm(range(args.steps), desc=TITLES[name], disable=None):
            svi.step(data.train)
    seconds = time.perf_counter() - start
    log_w = log_weights(vae, data.test, PARTICLES)
    return Result(vae, bound(log_w, 1), bound(log_w, PARTICLES), seconds)


def measure(nats: Tensor) -> tuple[float, float]:
    """Mean and standard error over the images."""
    return nats.mean().item(), nats.std().item() / math.sqrt(len(nats))


def tabulate(results: dict[str, Result]) -> list[dict[str, Any]]:
    """Print ELBO, L_500 and gap of a test image; then what the flow changes, paired image by image."""
    rows, line = [], "{:<17} {:>16} {:>16} {:>16} {:>13}"
    print(line.format("posterior", "test ELBO (nats)", f"test L_{PARTICLES}", "gap", "training (s)"))
    found = {TITLES[name]: (r.elbo, r.tight, r.gap, f"{r.seconds:.1f}") for name, r in results.items()}
    if len(results) == 2:
        first, last = results.values()
        found["flow - Gaussian"] = last.elbo - first.elbo, last.tight - first.tight, last.gap - first.gap, ""
    for title, (*values, seconds) in found.items():
        row: dict[str, Any] = {"posterior": title}
        cells, sign = [], "+" if not seconds else ""
        for key, nats in zip(("elbo", "tight", "gap"), values, strict=True):
            row[key], row[f"{key}_error"] = measure(nats)
            cells.append(f"{row[key]:{sign}.2f} ± {row[f'{key}_error']:.2f}")
        print(line.format(title, *cells, seconds))
        rows.append(row | ({"seconds": float(seconds)} if seconds else {}))
    return rows


@torch.no_grad()
def plot(path: Path, results: dict[str, Result], test: Tensor) -> None:
    """One panel a posterior: draws for twelve test images in the first two latent dimensions."""
    from matplotlib.figure import Figure  # draws with Agg: no display, no global state

    figure = Figure(figsize=(6.5 * len(results), 6), dpi=110, layout="constrained")
    for axes, (name, result) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        z = result.pair.posterior(test[:12]).sample((400,)).cpu()
        for i in range(z.shape[1]):
            axes.plot(z[:, i, 0], z[:, i, -1], f"C{i % 10}.", markersize=3, alpha=0.5)
        gap = f"gap {result.gap.mean().item():.2f} nats"
        axes.set(title=f"{TITLES[name]}, {gap}: draws for 12 test images", xlabel="first latent", ylabel="last latent")
        axes.grid(alpha=0.3)
    enlarge(figure)
    figure.savefig(path)


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The options, of which ``--quick`` changes the defaults."""
    parser = options.make_parser("flow_vae", __doc__.partition("\n")[0], TITLES)
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--gradient", choices=("pathwise", "stl", "dreg"), default="pathwise", help="of the ELBO")
    parser.add_argument("--lr", type=options.positive, default=4e-3, help="Adam's first step size")
    return parser, options.parse(parser, argv, DEFAULTS, QUICK)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write the picture and the numbers."""
    parser, args = parse(argv)
    with options.one_line_errors(parser):
        data = load_data(args.data, args.seed).to(args.device)
        args.output.mkdir(parents=True, exist_ok=True)
    with options.num_threads(args.threads):
        results = {name: train(name, data, args) for name in (TITLES if args.elbo == "all" else [args.elbo])}
    write(args.output / "flow_vae.json", args, table=tabulate(results))
    plot(args.output / "flow_vae.png", results, data.test)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
