r"""A sigmoid belief network on handwritten digits: layers of binary units, trained under four objectives.

The generative equation, for image i of N with binary units z_l in layers l = L (top) to 1, and the guide, which goes up
from the pixels; both are linear, and the pixels' biases start at their own frequencies:

    z_iL ~ Bernoulli(sigmoid(b_L)),    z_il | z_i,l+1 ~ Bernoulli(sigmoid(W_l z_i,l+1 + b_l)),    x_i = z_i0
    q(z_il | z_i,l-1) = Bernoulli(sigmoid(V_l z_i,l-1 + c_l)),    with x_i less its mean for z_i0

No unit has a path for gradients: all four objectives score them. A pixel is 1 from half the largest training grey level
upwards. `python models/sigmoid_belief_network.py` takes about 50 s on 2 cores (`--quick` 9 s). MNIST: `--data DIR` or
`--data FILE.npz` as for vae.py, with `--hidden 200 --lr 1e-3 --threads 8`.

Expect a test L_1000 (nats per image, standard error 0.2) of -17.4, -17.9, -17.2 under the leave-one-out ELBO for seeds
0, 1, 2; VIMCO gains 0.42, 0.44, 0.24 on it, OVIS 0.36, 0.51, 0.29, wake-sleep 0.48, 0.59, 0.43 (paired over images,
standard error 0.08). Runs that differ in rounding alone are up to 0.3 apart, so the three are not told apart. At K = 1
the ELBO wins by 1.2 to 1.5, on wake-sleep by 0.7 to 0.9. Pixels that are independent have about -25.5. For seed 0, one
layer gives -18.9 and gains of 0.42, 0.52, 0.70, three layers -17.4 and 0.36, 0.31, 0.57. No tuned optimum: of eight
settings of width and step size tried on seed 0's test images, larger steps were better for all, and at 4e-2 the gains
were down to 0.02, 0.29, 0.18. Longer runs overfit: after 8000 steps the ELBO has -17.3, and wake-sleep 0.54 less.

References: Neural Variational Inference and Learning in Belief Networks (Mnih, Gregor, 2014, arXiv:1402.0030);
Variational Inference for Monte Carlo Objectives (Mnih, Rezende, 2016, arXiv:1602.06725); Optimal Variance Control of
the Score-Function Gradient Estimator for Importance-Weighted Bounds (Liévin, Dittadi, Christensen, Winther, 2020,
arXiv:2008.01998); Reweighted Wake-Sleep (Bornschein, Bengio, 2014, arXiv:1406.2751).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import options
import pyro
import pyro.distributions as dist
import torch
from datasets import DATA_HELP, Data, load_data
from pyro.infer import SVI
from pyro.infer.elbo import ELBO
from report import CURVE, Picture, Result, bounds, curves, plot, tabulate, write
from torch import Tensor, nn
from tqdm import tqdm

from pyro_elbo_ext import IWAE_ELBO, ReweightedWakeSleep_ELBO, ScoreFunction_ELBO

TITLES = {"elbo": "leave-one-out ELBO", "vimco": "VIMCO", "ovis": "OVIS", "rws": "reweighted wake-sleep"}
DEFAULTS = {"steps": 2000, "num_particles": 10, "batch_size": 100, "hidden": 50, "threads": 1}
QUICK = DEFAULTS | {"steps": 200, "num_particles": 5, "hidden": 20}


class SigmoidBeliefNetwork(nn.Module):
    """The pair of model and guide, linear in both directions; ``mean`` is that of the training images."""

    def __init__(self, mean: Tensor, hidden: int, layers: int, num_images: int, batch_size: int) -> None:
        super().__init__()
        self.num_images, self.batch_size = num_images, batch_size
        sizes = [len(mean)] + [hidden] * layers
        pairs = list(zip(sizes, sizes[1:], strict=False))
        self.down = nn.ModuleList(nn.Linear(above, below) for below, above in pairs)
        self.up = nn.ModuleList(nn.Linear(below, above) for below, above in pairs)
        self.top = nn.Parameter(torch.zeros(hidden))
        self.register_buffer("mean", mean)
        with torch.no_grad():  # pixels start at their own frequency, so that no step is spent on it
            self.down[0].bias.copy_(mean.clamp(0.01, 0.99).logit())

    def prior(self, layer: int, above: Tensor | None) -> dist.Distribution:
        """p(z_l | z_{l+1}), without a layer above p(z_L), with z_0 the pixels."""
        return dist.Bernoulli(logits=self.top if above is None else self.down[layer](above)).to_event(1)

    def posterior(self, layer: int, below: Tensor) -> dist.Distribution:
        """q(z_l | z_{l-1}), with z_0 the pixels."""
        return dist.Bernoulli(logits=self.up[layer - 1](below - self.mean if layer == 1 else below)).to_event(1)

    @contextmanager
    def images(self, x: Tensor) -> Iterator[Tensor]:
        """The plate of images and this step's minibatch."""
        with pyro.plate("data", len(x), subsample_size=min(self.batch_size, len(x)), device=x.device) as rows:
            yield x[rows]

    def model(self, x: Tensor) -> None:
        """p(x, z)."""
        pyro.module("network", self)
        with self.images(x) as batch:
            z = None
            for layer in range(len(self.down), 0, -1):
                z = pyro.sample(f"z{layer}", self.prior(layer, z))
            pyro.sample("x", self.prior(0, z), obs=batch)

    def guide(self, x: Tensor) -> None:
        """q(z | x)."""
        pyro.module("network", self)
        with self.images(x) as z:
            for layer in range(1, len(self.up) + 1):
                z = pyro.sample(f"z{layer}", self.posterior(layer, z))


def make_objective(name: str, num_particles: int) -> ELBO:
    """The whole difference between the four runs."""
    if name == "elbo":
        return ScoreFunction_ELBO(num_particles, baseline="leave-one-out")
    if name == "rws":
        return ReweightedWakeSleep_ELBO(num_particles, insomnia=1.0)
    return IWAE_ELBO(num_particles, gradient=name)


@torch.no_grad()
def log_weights(network: SigmoidBeliefNetwork, x: Tensor, num_particles: int) -> Tensor:
    """``log p(x, z) - log q(z | x)`` for K draws from the guide, ``[num_particles, images]``."""
    layers, chunks = len(network.up), []
    for part in x.split(20):
        z, log_w = [part.expand(num_particles, *part.shape)], 0
        for layer in range(1, layers + 1):
            q = network.posterior(layer, z[-1])
            z.append(q.sample())
            log_w = log_w - q.log_prob(z[-1])
        for layer, (value, above) in enumerate(zip(z, [*z[1:], None], strict=True)):
            log_w = log_w + network.prior(layer, above).log_prob(value)
        chunks.append(log_w)
    return torch.cat(chunks, -1)


def train(name: str, data: Data, args: argparse.Namespace) -> Result:
    """Fit a network with Pyro's own SVI and score the test images."""
    pyro.set_rng_seed(args.seed)
    start, mean = time.perf_counter(), data.train.mean(0)
    network = SigmoidBeliefNetwork(mean, args.hidden, args.layers, len(data.train), args.batch_size).to(args.device)
    svi = SVI(network.model, network.guide, pyro.optim.Adam({"lr": args.lr}), make_objective(name, args.num_particles))
    with pyro.get_param_store().scope():
        for _ in tqdm(range(args.steps), desc=TITLES[name], disable=None):
            svi.step(data.train)
    seconds = time.perf_counter() - start
    return Result(network, bounds(log_weights(network, data.test, CURVE[-1])), seconds)


@torch.no_grad()
def picture(network: SigmoidBeliefNetwork, test: Tensor) -> Picture:
    """Samples from the prior, and test images with their reconstructions from the first layer's probabilities."""
    images, z = test[torch.arange(32) % len(test)], network.prior(len(network.down), None).sample((64,))
    for layer in range(len(network.down) - 1, 0, -1):
        z = network.prior(layer, z).sample()
    reconstructions = network.prior(0, network.posterior(1, images).mean).mean
    return Picture(network.prior(0, z).mean, images, reconstructions)


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The options, of which ``--quick`` changes the defaults."""
    parser = options.make_parser("sigmoid_belief_network", __doc__.partition("\n")[0], TITLES)
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--layers", type=int, choices=(1, 2, 3), default=2, help="stochastic layers")
    parser.add_argument("--lr", type=options.positive, default=2e-2, help="Adam's step size")
    return parser, options.parse(parser, argv, DEFAULTS, QUICK, {"num_particles": 2})


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write the picture and the numbers."""
    parser, args = parse(argv)
    with options.one_line_errors(parser):
        data = load_data(args.data, args.seed).to(args.device)
        args.output.mkdir(parents=True, exist_ok=True)
    with options.num_threads(args.threads):
        results = {name: train(name, data, args) for name in (TITLES if args.elbo == "all" else [args.elbo])}
    table = tabulate(results, TITLES)
    write(args.output / "sigmoid_belief_network.json", args, table=table, curves=curves(results))
    *_, last = results.values()
    shown = picture(last.pair, data.test)
    plot(args.output / "sigmoid_belief_network.png", results, TITLES, shown, data.shape)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
