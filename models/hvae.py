r"""A hierarchical variational autoencoder on handwritten digits, beside one of a single layer and as many parameters.

The generative equation, for image i with L layers of Gaussian units, and the two kinds of guide:

    z_iL ~ Normal(0, I),    z_il | z_i,l+1 ~ Normal(mu_l, diag(sigma_l^2)),    x_i | z_i1 ~ Bernoulli(sigmoid(f(z_i1)))
    plain:  q(z_il | z_i,l-1) = Normal(m_l, diag(s_l^2)), z_i0 = x_i: upwards, as if each layer were an encoder's data
    ladder: q(z_il | z_i,l+1, x_i) = Normal(m_l(x_i), diag(s_l^2)) Normal(mu_l, diag(sigma_l^2)) / normaliser: downwards

The ladder goes up by a path without noise and down through the model's own layers, where the precisions of evidence
and prior add. Layers halve in size upwards, and each conditional has one hidden layer; all models have the parameters
of the ladder, by their width. The KL's weight rises to 1 over the first `--warm-up` steps, and `--free-bits` nats of a
layer cost nothing under the ELBO. `python models/hvae.py` takes about 2.5 minutes on one core (`--quick` 10 s).

Expect of seeds 0, 1, 2 a test L_1000 (nats per image, standard error 0.2) of -17.1, -17.3, -16.9 for one layer. With as
many parameters (47.7 thousand, within 0.2 %) and steps, two layers gain 0.61, 0.47, 0.59 on it (plain) and 0.73, 0.56,
0.59 (ladder; paired, standard error 0.06), in the ELBO 0.8, 0.7, 0.8 and 1.0, 0.9, 1.0. All layers are active: KL of
2.9 + 5.7, 2.5 + 6.1, 2.9 + 5.6 nats (plain) and 2.3 + 5.5, 2.4 + 5.3, 1.5 + 6.0 (ladder), 16 of 16 units below, 7 or
8 of 8 above. The ladder's gain is 0.80, 0.71, 0.75 under IWAE and 0.63, 0.59, 0.49 under DReG, at a worse ELBO.

How much of it is depth in z? One layer does better without warm-up, -16.8, -17.0, -16.7 (the ladder is still 0.41,
0.33, 0.38 better), or with 8 units, -16.9, -17.3, -16.7. With two hidden layers in its networks, of as many parameters
in all, it has -16.5, -16.8, -16.4: the ladder gains 0.15, 0.05, 0.08 on that, within error for two of three, and 0.5,
0.5, 0.6 in the ELBO. Networks of two hidden layers did not help two layers of z. The warm-up is what keeps the ladder
alive: without it (seed 0) the lower layer says nothing, and the ladder is 1.9 nats below one layer. So is the norm: a
ladder of tanh networks of two hidden layers without it lost all of z, warm-up or not. Sizes, norm, warm-up and steps
were chosen on a fifth of the training images of seed 0, looking at seed 1's for the widths, not on test images.

References: Ladder Variational Autoencoders (Sønderby, Raiko, Maaløe, Sønderby, Winther, 2016, arXiv:1602.02282);
Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2015, arXiv:1509.00519) for active units.
"""

from __future__ import annotations

import argparse
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import options
import pyro
import pyro.distributions as dist
import torch
from datasets import DATA_HELP, Data, load_data
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.elbo import ELBO
from report import CURVE, bounds, enlarge, tile, write
from torch import Tensor, nn
from tqdm import tqdm

from pyro_elbo_ext import IWAE_ELBO, MeanField_ELBO
from pyro_elbo_ext.diagnostics import pareto_k

TITLES = {"elbo": "ELBO", "iwae": "IWAE", "dreg": "IWAE + DReG"}
DEFAULTS = {"steps": 2000, "num_particles": 5, "batch_size": 100, "latent": 16, "hidden": 128, "warm_up": 700}
DEFAULTS |= {"test_images": 1000, "threads": 1, "lr": 4e-3}
QUICK = DEFAULTS | {"steps": 60, "num_particles": 2, "latent": 4, "hidden": 32, "warm_up": 40, "lr": 2e-2}
QUICK |= {"test_images": 100}

Draw = Callable[[str, dist.Distribution], Tensor]  # what is done at a site


def hidden_layer(inputs: int, hidden: int) -> nn.Sequential:
    """One hidden layer; without the norm, upper layers switch themselves off early in training."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.SiLU())


def normal(parameters: Tensor) -> dist.Distribution:
    """A diagonal normal of a network's output."""
    loc, log_scale = parameters.chunk(2, -1)
    return dist.Normal(loc, log_scale.exp()).to_event(1)


def merge(evidence: dist.Distribution, prior: dist.Distribution) -> dist.Distribution:
    """The normalised product of two diagonal normals: precisions add, means are weighted by them."""
    first, second = evidence.variance.reciprocal(), prior.variance.reciprocal()
    total = first + second
    return dist.Normal((first * evidence.mean + second * prior.mean) / total, total.rsqrt()).to_event(1)


class HVAE(nn.Module):
    """The pair of model and guide; ``sizes`` are the numbers of units, from the layer above the pixels upwards."""

    def __init__(self, num_pixels: int, sizes: Sequence[int], hidden: int, kind: str, batch_size: int) -> None:
        super().__init__()
        self.sizes, self.kind, self.batch_size = sizes, kind, batch_size
        self.beta = 1.0  # weight of the KL
        outputs = [num_pixels, *(2 * size for size in sizes)]
        # each network above the first sees the features of the one below, or under "plain" a draw
        inputs = [num_pixels, *([hidden] * len(sizes) if kind == "ladder" else sizes)]
        self.down = nn.ModuleList(
            nn.Sequential(hidden_layer(size, hidden), nn.Linear(hidden, out))
            for size, out in zip(sizes, outputs, strict=False)
        )
        self.up = nn.ModuleList(hidden_layer(size, hidden) for size, _ in zip(inputs, sizes, strict=False))
        self.heads = nn.ModuleList(nn.Linear(hidden, 2 * size) for size in sizes)

    def prior(self, layer: int, above: Tensor | None, x: Tensor) -> dist.Distribution:
        """p(z_l | z_{l+1}), without a layer above p(z_L), on the device of x."""
        if above is not None:
            return normal(self.down[layer](above))
        return dist.Normal(x.new_zeros(self.sizes[-1]), x.new_ones(self.sizes[-1])).to_event(1)

    def likelihood(self, z: Tensor) -> dist.Distribution:
        """p(x | z_1)."""
        return dist.Bernoulli(logits=self.down[0](z)).to_event(1)

    def generate(self, x: Tensor, draw: Draw) -> Tensor:
        """Draw from the top down to z_1."""
        z = None
        for layer in range(len(self.sizes), 0, -1):
            z = draw(f"z{layer}", self.prior(layer, z, x))
        return z

    def infer(self, x: Tensor, draw: Draw) -> None:
        """Draw from the guide, in the order of its kind."""
        if self.kind == "plain":
            for layer, (up, head) in enumerate(zip(self.up, self.heads, strict=True), 1):
                x = draw(f"z{layer}", normal(head(up(x))))
            return
        features, evidence, z = x, [], None
        for up, head in zip(self.up, self.heads, strict=True):
            features = up(features)
            evidence.append(normal(head(features)))
        for layer in range(len(self.sizes), 0, -1):
            q = evidence[layer - 1]
            z = draw(f"z{layer}", q if z is None else merge(q, self.prior(layer, z, x)))

    def sample(self, name: str, fn: dist.Distribution) -> Tensor:
        """A site whose part of the KL has the weight ``beta``."""
        with poutine.scale(scale=self.beta):
            return pyro.sample(name, fn)

    def images(self, x: Tensor) -> pyro.plate:
        """The plate of images, of which a step sees a minibatch."""
        return pyro.plate("data", len(x), subsample_size=min(self.batch_size, len(x)), device=x.device)

    def model(self, x: Tensor) -> None:
        """p(x, z)."""
        pyro.module("hvae", self)
        with self.images(x) as rows:
            pyro.sample("x", self.likelihood(self.generate(x, self.sample)), obs=x[rows])

    def guide(self, x: Tensor) -> None:
        """q(z | x)."""
        pyro.module("hvae", self)
        with self.images(x) as rows:
            self.infer(x[rows], self.sample)


class Run(NamedTuple):
    """What is trained: layers, the kind of guide, and the objective."""

    layers: int
    kind: str
    objective: str

    @property
    def title(self) -> str:
        """For the table and the picture."""
        return f"{f'{self.layers} layers, {self.kind}' if self.layers > 1 else '1 layer'}, {TITLES[self.objective]}"


class Examination(NamedTuple):
    """Log-weights ``[particles, images]``; by layer the KL in nats ``[layers, images]`` and the guide's means."""

    log_w: Tensor
    kl: Tensor
    means: list[Tensor]

    @property
    def active(self) -> list[int]:
        """Units by layer whose mean under the guide has a variance above 0.01 over the images."""
        return [int((means.var(0) > 0.01).sum()) for means in self.means]


class Result(NamedTuple):
    """A trained pair, its L_K in nats as ``[len(CURVE), test images]``, and the rest of its row."""

    pair: HVAE
    bounds: Tensor
    row: dict[str, Any]


def make_pair(run: Run, num_pixels: int, args: argparse.Namespace) -> HVAE:
    """A pair as large as a ladder of all layers and ``--hidden`` units, whatever its own kind and layers."""

    def build(layers: int, kind: str, hidden: int) -> HVAE:
        return HVAE(num_pixels, [max(args.latent >> i, 1) for i in range(layers)], hidden, kind, args.batch_size)

    with torch.device("meta"):  # sizes only
        wanted, widths = size(build(args.layers, "ladder", args.hidden)), range(1, 2**20)
        above = bisect_left(widths, wanted, key=lambda width: size(build(run.layers, run.kind, width)))
        nearest = widths[max(above - 1, 0) : above + 1]
        hidden = min(nearest, key=lambda width: abs(size(build(run.layers, run.kind, width)) - wanted))
    return build(run.layers, run.kind, hidden).to(args.device)


def size(pair: HVAE) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in pair.parameters())


def make_objective(name: str, num_particles: int, free_bits: float = 0.0) -> ELBO:
    """The whole difference between the objectives."""
    if name == "elbo":
        return MeanField_ELBO(num_particles, free_bits=free_bits)
    return IWAE_ELBO(num_particles, gradient="pathwise" if name == "iwae" else "dreg")


@torch.no_grad()
def examine(pair: HVAE, x: Tensor, num_particles: int) -> Examination:
    """Draw from the guide and look at each layer.

    The KL of layer l is E_q[log q(z_l | ...) - log p(z_l | z_{l+1})]; the layers' add up to KL(q || p).
    """
    parts = [examine_part(pair, part, num_particles) for part in x.split(20)]
    log_w, kl, means = zip(*parts, strict=True)
    return Examination(
        torch.cat(log_w, -1), torch.cat(kl, -1), [torch.cat(layer) for layer in zip(*means, strict=True)]
    )


def examine_part(pair: HVAE, x: Tensor, num_particles: int) -> Examination:
    """The same for a few images at once."""
    q, z = [], []

    def draw(name: str, fn: dist.Distribution) -> Tensor:
        q.append(fn.expand((num_particles, len(x))))
        z.append(q[-1].sample())
        return z[-1]

    pair.infer(x, draw)
    if pair.kind == "ladder":  # drawn downwards
        q, z = q[::-1], z[::-1]
    p = [pair.prior(layer, above, x) for layer, above in enumerate([*z[1:], None], 1)]
    kl = torch.stack([q[i].log_prob(z[i]) - p[i].log_prob(z[i]) for i in range(len(z))])
    log_w = pair.likelihood(z[0]).log_prob(x) - kl.sum(0)
    return Examination(log_w, kl.mean(1), [fn.mean.mean(0) for fn in q])


def train(run: Run, data: Data, args: argparse.Namespace) -> Result:
    """Fit a pair with Pyro's own SVI and score the test images."""
    pyro.set_rng_seed(args.seed)
    start, pair = time.perf_counter(), make_pair(run, data.train.shape[1], args)
    optim = pyro.optim.ClippedAdam({"lr": args.lr, "lrd": 0.05 ** (1 / args.steps), "clip_norm": math.inf})
    svi = SVI(pair.model, pair.guide, optim, make_objective(run.objective, args.num_particles, args.free_bits))
    with pyro.get_param_store().scope():
        for step in tqdm(range(args.steps), desc=run.title, disable=None):
            pair.beta = min(1.0, (step + 1) / max(args.warm_up, 1))
            svi.step(data.train)
    seconds = time.perf_counter() - start
    found = examine(pair, data.test, CURVE[-1])
    khat = pareto_k(found.log_w).median().item()
    row = {"run": run.title, "parameters": size(pair), "kl": found.kl.mean(1).tolist(), "active": found.active}
    return Result(pair, bounds(found.log_w), row | {"k_hat": khat, "seconds": seconds})


def plan(args: argparse.Namespace) -> list[Run]:
    """One layer and both kinds under the first objective, then the last kind under the others."""
    first, *others = TITLES if args.elbo == "all" else [args.elbo]
    kinds = ("plain", "ladder") if args.kind == "both" else (args.kind,)
    runs = [Run(1, "plain", first)]
    if args.layers > 1:
        runs += [Run(args.layers, kind, first) for kind in kinds]
    return runs + [runs[-1]._replace(objective=other) for other in others]


def tabulate(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Print parameters, bounds, the gain on the first run (paired image by image), and how much each layer says."""
    rows, line = [], "{:<30} {:>10} {:>9} {:>19} {:>15}  {:<15} {:<13} {:>5} {:>12}"
    heads = "parameters", "test ELBO", "test L_1000 (nats)", "gain on 1 layer", "KL by layer", "active units", "k-hat"
    print(line.format("model, objective", *heads, "training (s)"))
    for result in results:
        row, gain = dict(result.row), result.bounds[-1] - results[0].bounds[-1]
        for key, nats in (("elbo", result.bounds[0]), ("bound", result.bounds[-1]), ("gain", gain)):
            row |= {key: nats.mean().item(), f"{key}_error": nats.std().item() / math.sqrt(len(nats))}
        cells = [f"{row['bound']:.2f} ± {row['bound_error']:.2f}", f"{row['gain']:+.2f} ± {row['gain_error']:.2f}"]
        cells[1] = "-" if result is results[0] else cells[1]
        layers = " + ".join(f"{kl:.1f}" for kl in row["kl"]), " + ".join(map(str, row["active"]))
        ends = f"{row['k_hat']:.2f}", f"{row['seconds']:.1f}"
        print(line.format(row["run"], row["parameters"], f"{row['elbo']:.2f}", *cells, *layers, *ends))
        rows.append(row)
    return rows


@torch.no_grad()
def plot(path: Path, results: Sequence[Result], data: Data) -> None:
    """Draws of the last model that share their top layer by rows, bounds of all models, and the KL by layer."""
    from matplotlib.figure import Figure  # draws with Agg: no display, no global state

    figure = Figure(figsize=(16, 5.4), dpi=110, layout="constrained")
    shown, curves, bars = figure.subplots(1, 3, width_ratios=(1, 1.15, 1.15))
    shown.imshow(tile(fantasies(results[-1].pair, data.test), data.shape), cmap="gray_r", vmin=0, vmax=1)
    note = f"ink probability,\n{results[-1].row['run']}"
    shown.set(xticks=[], yticks=[], title="Samples: a row shares its top layer", xlabel=note)
    for index, (result, marker) in enumerate(zip(results, "os^Dv", strict=False)):
        name = result.row["run"]
        curves.semilogx(CURVE, result.bounds.mean(-1).cpu(), f"{marker}-", label=name)
        starts = [sum(result.row["kl"][:layer]) for layer in range(len(result.row["kl"]))]
        for layer, (start, kl) in enumerate(zip(starts, result.row["kl"], strict=True)):
            bars.barh(index, kl, left=start, color=f"C{index}", alpha=0.9 - 0.15 * layer, edgecolor="white")
            bars.text(start + kl / 2, index, f"$z_{layer + 1}$\n{kl:.1f}", ha="center", va="center", fontsize=12)
    curves.set(
        title="Bound against number of particles", xlabel="particles K", ylabel="bound $L_K$ (nats per test image)"
    )
    curves.legend(fontsize=11)
    curves.grid(alpha=0.3)
    bars.set(title="What each layer says of an image", xlabel="KL (nats per test image)")
    bars.set_yticks(range(len(results)), [result.row["run"].replace(", ", ",\n") for result in results])
    bars.invert_yaxis()
    enlarge(figure)
    figure.savefig(path)


def fantasies(pair: HVAE, x: Tensor) -> Tensor:
    """Eight rows of eight images; a row's have one top layer."""

    def draw(name: str, p: dist.Distribution) -> Tensor:
        top = name == f"z{len(pair.sizes)}"
        return p.sample((8, 1)).expand(8, 8, -1) if top and len(pair.sizes) > 1 else p.expand((8, 8)).sample()

    return pair.likelihood(pair.generate(x, draw)).mean.reshape(64, -1)


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The options, of which ``--quick`` changes the defaults."""
    parser = options.make_parser("hvae", __doc__.partition("\n")[0], TITLES)
    parser.add_argument("--data", type=Path, help=DATA_HELP)
    parser.add_argument("--layers", type=int, choices=range(1, 6), default=2, help="stochastic layers")
    parser.add_argument("--kind", choices=("plain", "ladder", "both"), default="both", help="of the guide")
    parser.add_argument("--lr", type=options.positive, help="Adam's first step size, which falls to a twentieth")
    parser.add_argument("--free-bits", type=float, default=0.0, help="nats per layer that cost nothing, of the ELBO")
    args = options.parse(parser, argv, DEFAULTS, QUICK, {"warm_up": 0, "test_images": 2})
    if not 0 <= args.free_bits < math.inf:
        parser.error(f"--free-bits {args.free_bits}: give a number of 0 or more")
    if args.free_bits and args.elbo in ("iwae", "dreg"):
        parser.error(f"--free-bits {args.free_bits}: {TITLES[args.elbo]} has no KL to be free of; use --elbo elbo")
    return parser, args


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write the picture and the numbers."""
    parser, args = parse(argv)
    with options.one_line_errors(parser):
        data = load_data(args.data, args.seed).to(args.device)
        data = data._replace(test=data.test[: args.test_images])
        args.output.mkdir(parents=True, exist_ok=True)
    with options.num_threads(args.threads):
        results = [train(run, data, args) for run in plan(args)]
    curves = {"K": CURVE} | {result.row["run"]: result.bounds.mean(-1).tolist() for result in results}
    write(args.output / "hvae.json", args, table=tabulate(results), curves=curves)
    plot(args.output / "hvae.png", results, data)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
