r"""Attend, Infer, Repeat on small canvases: how many digits are there, where, and what do they look like?

A canvas of 20 x 20 pixels holds 0, 1 or 2 of scikit-learn's digits. The model draws objects until one is absent, each
with a place z_where (log-scale, x, y) and a look z_what, and adds what a decoder paints of them:

    z_pres_t ~ Bernoulli(z_pres_{t-1} / 2),    z_where_t ~ Normal(0, I_3),    z_what_t ~ Normal(0, I_L)
    x ~ Normal(sum_t z_pres_t paste(sigmoid(decoder(z_what_t)), z_where_t), 0.3^2)

There are T = 3 steps, one more than there are digits, and no step branches on a value. The guide looks at what is left
of the canvas, x less the objects so far, for z_pres_t and z_where_t, cuts that window out and encodes it for z_what_t.
For an absent object it has the prior, so that its terms cancel in the weight as under a mask.

`python models/air.py` takes about 110 s on one core (`--quick` 9 s). Both objectives take 800 steps of 5 particles, and
a step of either takes as long (IWAE's 0.90 to 1.05 of the ELBO's in five pairs of runs): equal steps are equal seconds.

Expect 100 % of 200 test canvases counted right under the ELBO for seeds 0, 1, 2 and 100.0, 99.5, 100.0 % under IWAE,
by the commonest count of 1000 draws; weighted, 99.0, 100.0, 99.5 and 100.0, 100.0, 99.5 %. Nine in ten are right after
160 to 288 steps. Test L_1000 (nats per canvas, standard error 1.5) is 91.2, 90.3, 88.9 under the ELBO, and IWAE gains
0.58, 0.35, 1.34 on it (paired, standard error 0.16, 0.17, 0.28). An ELBO of 32 steps more, for seeds 1 and 2, leaves
0.15 and 0.75. Neither has converged by then, and digits are painted blurred; in 4000 steps, when they can be told, IWAE
comes to 94.7 and 94.1 and the ELBO to 94.2 and 94.1 (seeds 1, 2). DReG beside VIMCO gains 0.83, 0.65, 1.57 in as many
steps, each of which takes 1.6 times as long: at equal seconds it is 1.0 behind the ELBO. With 10 particles for both,
seed 1, what is default here lost 0.5. On L_1, the ELBO itself, it loses 2.1 to 4.7.

What makes it learn so soon is that the guide sees what is left. With a recurrent cell over the whole canvas instead,
as in the paper, one run of the ELBO on such canvases, with two objects and step size 1e-3, counted 64 % right after
2250 steps, and no single digit. Pyro's `RenyiELBO(0)` gives the guide's z_pres no gradient at all; its tracker has the
paper's model under that bound as issue 3289.

References: Attend, Infer, Repeat: Fast Scene Understanding with Generative Models (Eslami et al., 2016,
arXiv:1603.08575); Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker, Lawson, Gu, Maddison,
2018, arXiv:1810.04152); Variational Inference for Monte Carlo Objectives (Mnih, Rezende, 2016, arXiv:1602.06725).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import options
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.elbo import ELBO
from report import CURVE, Result, bounds, curves, enlarge, tabulate, tile, write
from torch import Tensor, nn
from tqdm import tqdm

from pyro_elbo_ext import IWAE_ELBO, ScoreFunction_ELBO

TITLES = {"elbo": "leave-one-out ELBO", "iwae": "IWAE, pathwise + VIMCO"}
DEFAULTS = {"steps": 800, "num_particles": 5, "batch_size": 64, "objects": 3, "latent": 8, "hidden": 128, "threads": 1}
DEFAULTS |= {"canvases": 10_000, "test_canvases": 200}
QUICK = DEFAULTS | {"steps": 20, "num_particles": 2, "batch_size": 32, "hidden": 32}
QUICK |= {"canvases": 500, "test_canvases": 16}
DIGITS = 2  # at most, on a canvas
CANVAS, PATCH = 20, 8  # pixels a side, of a canvas and of an object
SCALE, SPREAD = 0.4, 0.4  # an object's typical share of a canvas's side; deviation of its centre, in half canvases


class Canvases(NamedTuple):
    """Grey-scale images ``[canvases, CANVAS, CANVAS]``, and how many digits each holds, for evaluation only."""

    images: Tensor
    counts: Tensor


def hats(centre: Tensor, scale: Tensor, num_out: int, num_in: int) -> Tensor:
    """Bilinear weights ``[..., num_out, num_in]`` of one axis: pixels of [-1, 1] that show centre + scale * [-1, 1]."""
    out = torch.linspace(1 / num_out - 1, 1 - 1 / num_out, num_out, device=centre.device, dtype=centre.dtype)
    seen = ((out - centre[..., None]) / scale[..., None] + 1) * num_in / 2 - 0.5
    return (1 - (seen[..., None] - torch.arange(num_in, device=centre.device)).abs()).clamp(min=0)


def paste(patch: Tensor, frame: Tensor) -> Tensor:
    """A patch on an empty canvas, in a frame of scale, x and y; the spatial transformer for frames that only scale."""
    scale, x, y = frame.unbind(-1)
    return hats(y, scale, CANVAS, PATCH) @ patch @ hats(x, scale, CANVAS, PATCH).mT


def cut(canvas: Tensor, frame: Tensor) -> Tensor:
    """The patch of a canvas that a frame shows."""
    scale, x, y = frame.unbind(-1)
    rows, columns = (hats(-centre / scale, 1 / scale, PATCH, CANVAS) for centre in (y, x))
    return rows @ canvas @ columns.mT


def make_canvases(digits: np.ndarray, num_canvases: int, rng: np.random.Generator) -> Canvases:
    """Canvases with digits of different sizes, whose centres are most of a digit's width apart."""
    counts, chosen = rng.integers(0, DIGITS + 1, num_canvases), rng.integers(0, len(digits), (num_canvases, DIGITS))
    scales = SCALE * rng.uniform(0.9, 1.1, (num_canvases, DIGITS, 1))
    tries = rng.uniform(-0.58, 0.58, (num_canvases, 50, DIGITS, 2))
    apart = np.abs(tries[:, :, :, None] - tries[:, :, None]).max(-1) + 2 * np.eye(DIGITS)
    first = (apart.min((2, 3)) > 0.65).argmax(1)
    frames = np.concatenate([scales, tries[np.arange(num_canvases), first]], -1)
    patches = digits[chosen] * (np.arange(DIGITS) < counts[:, None])[..., None, None]
    patches, frames = (torch.as_tensor(part, dtype=torch.get_default_dtype()) for part in (patches, frames))
    return Canvases(paste(patches, frames).sum(1).clamp(max=1), torch.as_tensor(counts))


def load_canvases(args: argparse.Namespace) -> tuple[Canvases, Canvases]:
    """Canvases to train on and others to test on, which have no digit in common."""
    from sklearn.datasets import load_digits  # 1797 images of 8 x 8 pixels, bundled

    rng = np.random.default_rng(args.seed)
    digits = rng.permutation(load_digits().images / 16)
    train, test = make_canvases(digits[360:], args.canvases, rng), make_canvases(digits[:360], args.test_canvases, rng)
    return Canvases(*(part.to(args.device) for part in train)), Canvases(*(part.to(args.device) for part in test))


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """A network of one hidden layer."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def normal(loc: Tensor, log_scale: Tensor) -> dist.Distribution:
    """Independent Normals as one variable."""
    return dist.Normal(loc, log_scale.exp()).to_event(1)


class AIR(nn.Module):
    """The pair of model and guide; ``hidden`` is the width of the network that looks for objects."""

    def __init__(self, objects: int, latent: int, hidden: int, batch_size: int, sd: float = 0.3) -> None:
        super().__init__()
        self.objects, self.latent, self.batch_size, self.sd = objects, latent, batch_size, sd
        self.decoder = mlp(latent, hidden // 2, PATCH**2)
        self.encoder = mlp(PATCH**2, hidden // 2, 2 * latent)
        self.look = nn.Sequential(nn.Linear(CANVAS**2, hidden), nn.ReLU(), mlp(hidden, hidden, 7))
        with torch.no_grad():  # objects start faint, likely, and anywhere near the middle: none is given up early
            self.decoder[-1].bias.fill_(-2.0)
            self.encoder[-1].bias[latent:] = -1.0
            self.look[-1][-1].weight.mul_(0.1)
            self.look[-1][-1].bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0, -1.0, -1.0, -1.0]))

    def frame(self, where: Tensor) -> Tensor:
        """Scale, x and y of an object."""
        return torch.cat([SCALE * (0.1 * where[..., :1]).exp(), SPREAD * where[..., 1:]], -1)

    def draw(self, pres: Tensor, where: Tensor, what: Tensor) -> Tensor:
        """An object on an otherwise empty canvas, which stays empty if it is absent."""
        patch = self.decoder(what).sigmoid().unflatten(-1, (PATCH, PATCH))
        return pres[..., None, None] * paste(patch, self.frame(where))

    def images(self, x: Tensor) -> pyro.plate:
        """The plate of canvases, of which a step sees a minibatch."""
        return pyro.plate("data", len(x), subsample_size=min(self.batch_size, len(x)), device=x.device)

    def model(self, x: Tensor) -> None:
        """p(x, z)."""
        pyro.module("air", self)
        with self.images(x) as rows:
            canvas, pres = torch.zeros_like(x[rows]), x.new_ones(len(rows))
            for t in range(self.objects):
                pres = pyro.sample(f"pres{t}", dist.Bernoulli(pres / 2))
                where = pyro.sample(f"where{t}", normal(x.new_zeros(3), x.new_zeros(3)))
                what = pyro.sample(f"what{t}", normal(x.new_zeros(self.latent), x.new_zeros(self.latent)))
                canvas = canvas + self.draw(pres, where, what)
            pyro.sample("x", dist.Normal(canvas, self.sd).to_event(2), obs=x[rows])

    def guide(self, x: Tensor) -> None:
        """q(z | x)."""
        pyro.module("air", self)
        with self.images(x) as rows:
            left, pres = x[rows], x.new_ones(len(rows))
            for t in range(self.objects):
                logit, loc, log_scale = self.look(left.flatten(-2)).split((1, 3, 3), -1)
                pres = pyro.sample(f"pres{t}", dist.Bernoulli(pres * logit.squeeze(-1).sigmoid()))
                on = pres[..., None]  # where it is 0, the prior
                where = pyro.sample(f"where{t}", normal(on * loc, on * log_scale))
                loc, log_scale = self.encoder(cut(left, self.frame(where)).flatten(-2)).chunk(2, -1)
                what = pyro.sample(f"what{t}", normal(on * loc, on * log_scale))
                left = left - self.draw(pres, where, what)


def make_objective(name: str, num_particles: int) -> ELBO:
    """The whole difference between the runs."""
    if name == "elbo":
        return ScoreFunction_ELBO(num_particles, baseline="leave-one-out")
    return IWAE_ELBO(num_particles, gradient="pathwise+vimco")


class Draws(NamedTuple):
    """Draws from the guide, ``[draws, canvases, objects, ...]``, and their log-weights, ``[draws, canvases]``."""

    log_w: Tensor
    pres: Tensor
    where: Tensor
    what: Tensor

    def counts(self, weights: Tensor) -> Tensor:
        """The most probable number of objects on each canvas, of draws with weights ``[draws, canvases]``."""
        numbers = nn.functional.one_hot(self.pres.sum(-1).long(), self.pres.shape[-1] + 1)
        return (weights[..., None] * numbers).sum(0).argmax(-1)


def log_weights(guide: poutine.Trace, model: poutine.Trace) -> Tensor:
    """``log p(x, z) - log q(z | x)``, summed over all sites."""
    totals = []
    for trace in (model, guide):
        trace.compute_log_prob()
        totals.append(sum(site["log_prob"] for site in trace.nodes.values() if "log_prob" in site))
    return totals[0] - totals[1]


@torch.no_grad()
def sample(air: AIR, x: Tensor, num_draws: int) -> Draws:
    """Draws from the guide with their weights, of a few canvases at a time."""
    chunks = []
    for part in x.split(min(20, air.batch_size)):
        with pyro.plate("draws", num_draws, dim=-2):
            guide = poutine.trace(air.guide).get_trace(part)
            model = poutine.trace(poutine.replay(air.model, trace=guide)).get_trace(part)
        sites = [[guide.nodes[f"{name}{t}"]["value"] for t in range(air.objects)] for name in Draws._fields[1:]]
        chunks.append(Draws(log_weights(guide, model), *(torch.stack(values, 2) for values in sites)))
    return Draws(*(torch.cat(values, 1) for values in zip(*chunks, strict=True)))


class Run(NamedTuple):
    """What a bound gave: numbers for the table; for each test canvas the count by draws, with weights and without."""

    result: Result
    plain: Tensor
    weighted: Tensor
    curve: list[tuple[int, float]]


def share(found: Tensor, canvases: Canvases) -> float:
    """Of canvases whose objects are counted right."""
    return (found == canvases.counts).to(torch.get_default_dtype()).mean().item()


def train(name: str, data: tuple[Canvases, Canvases], args: argparse.Namespace) -> Run:
    """Fit the pair with Pyro's own SVI and count on the test canvases, now and then and with care at the end."""
    pyro.set_rng_seed(args.seed)
    (x, _), test = data
    air = AIR(args.objects, args.latent, args.hidden, args.batch_size).to(args.device)
    # the clip is for single steps that go astray; a loss is that of all canvases
    optim = pyro.optim.ClippedAdam({"lr": args.lr, "lrd": 0.1 ** (1 / args.steps), "clip_norm": 10.0 * len(x)})
    svi, curve, seconds = SVI(air.model, air.guide, optim, make_objective(name, args.num_particles)), [], 0.0
    with pyro.get_param_store().scope():
        for step in tqdm(range(args.steps + 1), desc=TITLES[name], disable=None):
            if step % max(args.steps // 25, 1) == 0:
                draws = sample(air, test.images, 10)
                curve.append((step, share(draws.counts(torch.ones_like(draws.log_w)), test)))
            start = time.perf_counter()
            if step < args.steps:
                svi.step(x)
            seconds += time.perf_counter() - start
        draws = sample(air, test.images, CURVE[-1])
    plain, weighted = draws.counts(torch.ones_like(draws.log_w)), draws.counts(draws.log_w.softmax(0))
    return Run(Result(air, bounds(draws.log_w), seconds), plain, weighted, curve)


def report(runs: dict[str, Run], test: Canvases) -> list[dict[str, Any]]:
    """Print bounds, gains and seconds, then the shares of canvases whose digits are counted right."""
    rows = tabulate({name: run.result for name, run in runs.items()}, TITLES)
    print("\nobjects counted right on test canvases, with 0 to 2 digits, by the guide's draws and by weighted draws")
    for row, run in zip(rows, runs.values(), strict=True):
        row |= {"plain": share(run.plain, test), "weighted": share(run.weighted, test), "curve": run.curve}
        found = nn.functional.one_hot(run.plain, run.result.pair.objects + 1)
        row["found_by_truth"] = [found[test.counts == count].sum(0).tolist() for count in range(DIGITS + 1)]
        print(f"{row['objective']:<20} {row['plain']:.1%}, weighted {row['weighted']:.1%}")
    return rows


def boxes(axes: Any, frames: Tensor, pres: Tensor, row: int, column: int) -> None:
    """The frames of the objects that are there, and their number, over one canvas of a tiled picture."""
    from matplotlib.patches import Rectangle

    left, top = column * (CANVAS + 1) + 1, row * (CANVAS + 1) + 1
    for t, (scale, x, y) in enumerate(frames.tolist()):
        if pres[t]:
            side, corner = scale * CANVAS, [(1 + centre - scale) * CANVAS / 2 - 0.5 for centre in (x, y)]
            corner = left + corner[0], top + corner[1]
            axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=f"C{t + 1}", linewidth=1.8))
    axes.text(left + 0.3, top + 0.3, f"{int(pres.sum())}", va="top", fontsize=11, color="C3", fontweight="bold")


@torch.no_grad()
def show(axes: Any, air: AIR, images: Tensor) -> None:
    """24 canvases with the frames of what is found, above what the model paints there."""
    draws, every = sample(air, images, 100), torch.arange(24, device=images.device)
    best = draws.log_w.argmax(0)
    pres, where, what = (values[best, every] for values in draws[1:])
    painted, frames = air.draw(pres, where, what).sum(1), air.frame(where)
    pairs = torch.stack([images.view(3, 8, -1), painted.view(3, 8, -1)], 1)
    axes.imshow(tile(pairs, (CANVAS, CANVAS)), cmap="gray_r", vmin=0, vmax=1)
    for i in every.tolist():
        boxes(axes, frames[i].cpu(), pres[i].cpu(), 2 * (i // 8), i % 8)
    axes.set(xticks=[], yticks=[], title="Test canvases with what is found, above what is painted")


def plot(path: Path, runs: dict[str, Run], test: Canvases) -> None:
    """Test canvases with what was found on them, and the counts and bounds of all objectives."""
    from matplotlib.figure import Figure  # draws with Agg: no display, no global state

    figure = Figure(figsize=(15.5, 5.2), dpi=110, layout="constrained")
    shown, counts, nats = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
    name, run = list(runs.items())[-1]
    show(shown, run.result.pair, test.images[torch.arange(24) % len(test.images)])
    shown.set_xlabel(f"the likeliest of 100 draws, trained under {TITLES[name]}")
    for (name, run), marker in zip(runs.items(), "os", strict=False):
        counts.plot(*zip(*run.curve, strict=True), f"{marker}-", label=TITLES[name])
        nats.semilogx(CURVE, run.result.bounds.mean(-1).cpu(), f"{marker}-", label=TITLES[name])
    counts.set(title="Digits counted right", xlabel="steps", ylim=(0, 1.03))
    counts.set_ylabel("share of test canvases")
    nats.set(title="Bound against number of particles", xlabel="particles K")
    nats.set_ylabel("bound $L_K$ (nats per test canvas)")
    for axes in (counts, nats):
        axes.legend(fontsize=12, loc="lower right", title="trained under")
        axes.grid(alpha=0.3)
    enlarge(figure)
    figure.savefig(path)


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The options, of which ``--quick`` changes the defaults."""
    parser = options.make_parser("air", __doc__.partition("\n")[0], TITLES)
    parser.add_argument("--lr", type=options.positive, default=2e-3, help="Adam's step size, falling to a tenth")
    lowest = {"num_particles": 2, "test_canvases": 2, "hidden": 2}
    return parser, options.parse(parser, argv, DEFAULTS, QUICK, lowest)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, write the picture and the numbers."""
    parser, args = parse(argv)
    with options.one_line_errors(parser):
        args.output.mkdir(parents=True, exist_ok=True)
    data = load_canvases(args)
    with options.num_threads(args.threads):
        runs = {name: train(name, data, args) for name in (TITLES if args.elbo == "all" else [args.elbo])}
        table = report(runs, data[1])
        plot(args.output / "air.png", runs, data[1])
    write(args.output / "air.json", args, table=table, curves=curves({name: run.result for name, run in runs.items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
