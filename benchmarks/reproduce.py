"""Published results on MNIST, trained again beside Pyro's own classes at an equal budget.

A row is a set-up of a paper; its entries are objectives that train one pair of model and guide from the same numbers,
Pyro's own class first. Test images are a random subset, the same for all; an entry's gain over the row's first is
paired, image by image. What is scored is L_K, a bound from K particles that uses no ELBO class, or the ELBO.

The schedule is the paper's. `--seconds` takes its beginning, for so many seconds (the processor's on a CPU) after the
first step, or with it where that compiles; `--steps` takes so many steps of it, and `--budget X` shortens each of its
stages to X of its length; 1 is the published run. On a CPU steps are SVI's, unless `--compile` is given (with
TORCHINDUCTOR_COMPILE_THREADS=1 in the environment the compilers' seconds are counted); on a GPU this package's
objectives are trained by CompiledSVI, Pyro's by SVI.

    python benchmarks/reproduce.py --data DIR [--rows NAME ...] [--seconds S | --budget X | --steps N] [--seeds N]
        [--particles 5000 --test-images 10000] [--device cuda] [--output reproduce.json]

DIR holds `mnist_u8.npz` (`x_train`, `x_test`, grey levels to 255) and `static_binarized_mnist_u8.npz` (`train`, `test`,
0 or 1), rows of 784 pixels. RenyiELBO puts a minibatch's scale inside its logarithm, so that no pair here has one: a
loss is the sum over a minibatch, and Adam's epsilon is the published one, of the mean, times the batch size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.elbo import ELBO
from timing import synchronize, versions
from torch import Tensor, nn

from pyro_elbo_ext import (
    IWAE_ELBO,
    PIWAE_ELBO,
    CompiledSVI,
    FlowDistribution,
    MeanField_ELBO,
    Minibatches,
    ScoreFunction_ELBO,
    make_flow,
)

FILES = {"dynamic": ("mnist_u8.npz", "x_train", "x_test"), "static": ("static_binarized_mnist_u8.npz", "train", "test")}
CONTEXT = 64  # features that an encoder hands to a flow
CHUNK = 256  # steps between two looks at the clock where steps are compiled


class Setup(NamedTuple):
    """Networks, data and schedule.

    Attributes:
        latent: units of each stochastic layer, from the pixels upwards.
        hidden: width of two hidden layers under each, None for none.
        bits: the units are binary, their inputs centred.
        activation: of the hidden layers.
        learn_prior: whether the top layer's bits have probabilities of their own, or a half.
        binarization: "dynamic", a draw anew in every epoch, or "static".
        num_train: images to train on, the first ones.
        batch_size: of a minibatch.
        epsilon: Adam's, for a loss that is the mean over the minibatch.
        stages: epochs and step size, one after the other.
        score: "L_K" or "ELBO", on "test" or "train" images.
    """

    latent: tuple[int, ...] = (50,)
    hidden: tuple[int | None, ...] = (200,)
    bits: bool = False
    activation: Callable[[], nn.Module] = nn.Tanh
    learn_prior: bool = False
    binarization: str = "dynamic"
    num_train: int = 60000
    batch_size: int = 20
    epsilon: float = 1e-4
    stages: tuple[tuple[float, float], ...] = tuple((3**i, 1e-3 * 10 ** (-i / 7)) for i in range(8))
    score: tuple[str, str] = ("L_K", "test")


class Entry(NamedTuple):
    """An objective, the paper's negative score in nats (its error), if any, and whether the guide has a flow."""

    title: str
    objective: Callable[[], ELBO]
    paper: str = ""
    theirs: str = ""
    flow: bool = False


class Row(NamedTuple):
    """A set-up and those that are trained in it; the first is what the others are compared to."""

    title: str
    setup: Setup
    entries: tuple[Entry, ...]


def vectorized(kind: type[ELBO], num_particles: int, **kwargs: Any) -> ELBO:
    """One of Pyro's classes at its fastest."""
    return kind(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1, **kwargs)


def renyi(num_particles: int) -> Entry:
    """Pyro's importance-weighted bound."""
    return Entry(f"Pyro RenyiELBO(0, {num_particles})", lambda: vectorized(RenyiELBO, num_particles, alpha=0))


def iwae(num_particles: int, theirs: str, gradient: str = "pathwise", paper: str = "burda") -> Entry:
    """The same bound here."""
    title = f'IWAE_ELBO({num_particles}, "{gradient}")'
    return Entry(title, lambda: IWAE_ELBO(num_particles, gradient, max_plate_nesting=1), paper, theirs)


def score_function(gradient: str, theirs: str, paper: str) -> Entry:
    """Two particles for bits."""
    title = "leave-one-out" if gradient == "score" else gradient
    return Entry(f"ScoreFunction_ELBO(2), {title}", lambda: ScoreFunction_ELBO(2, gradient=gradient), paper, theirs)


PAPERS = {
    "burda": "Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2015, arXiv:1509.00519)",
    "tucker": "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker, Lawson, Gu, Maddison, "
    "2018, arXiv:1810.04152)",
    "rainforth": "Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018, arXiv:1802.04537)",
    "ffjord": "FFJORD (Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, 2018, arXiv:1810.01367), Table 3",
    "rodeo": "Gradient Estimation with Discrete Stein Operators (Shi, Zhou, Hwang, Titsias, Mackey, 2022, "
    "arXiv:2202.09497), Table 1",
    "vimco": "Variational Inference for Monte Carlo Objectives (Mnih, Rezende, 2016, arXiv:1602.06725), Table 1",
}
BURDA = Setup()
TWO_LAYERS = Setup((100, 50), (200, 100))
STATIC = Setup(binarization="static", num_train=50000)
# dense networks with the batch, epochs and step size of the convolutional ones in the paper
FLOW = STATIC._replace(batch_size=100, epsilon=1e-8, stages=((2000, 5e-4),), score=("ELBO", "test"))
BITS = Setup((200,), (200,), True, lambda: nn.LeakyReLU(0.3), num_train=50000, batch_size=100, epsilon=1e-7)
BITS = BITS._replace(stages=((2000, 1e-3),), score=("ELBO", "train"))
BELIEF = Setup((200,) * 3, (None,) * 3, True, learn_prior=True, binarization="static", num_train=50000, batch_size=24)
BELIEF = BELIEF._replace(epsilon=1e-8, stages=((1920, 3e-4),))
TRACE = Entry("Pyro Trace_ELBO(1)", lambda: vectorized(Trace_ELBO, 1))

ROWS = {
    "vae": Row("one layer", BURDA, (TRACE, Entry("MeanField_ELBO(1)", lambda: MeanField_ELBO(1), "burda", "86.76"))),
    "iwae-5": Row("one layer", BURDA, (renyi(5), iwae(5, "85.54"))),
    "iwae-50": Row(
        "one layer",
        BURDA,
        (
            renyi(50),
            iwae(50, "84.78"),
            iwae(50, "", "dreg", "tucker"),
            Entry(
                'PIWAE_ELBO(64, 8, "pathwise")',
                lambda: PIWAE_ELBO(64, 8, gradient="pathwise", max_plate_nesting=1),
                "rainforth",
                "84.46 (.06)",
            ),
        ),
    ),
    "two-layers": Row("two layers", TWO_LAYERS, (renyi(50), iwae(50, "82.90"), iwae(50, "", "dreg", "tucker"))),
    "static": Row("one layer, static", STATIC, (renyi(50), iwae(50, "87.10"))),
    "flow": Row(
        "one layer, static, Gaussian or flow",
        FLOW,
        (
            TRACE._replace(title="Pyro Trace_ELBO(1), Gaussian", paper="ffjord", theirs="86.55 (.06)"),
            TRACE._replace(title="Pyro Trace_ELBO(1), flow", paper="ffjord", theirs="84.20 (.17)", flow=True),
            Entry('IWAE_ELBO(1, "pathwise"), flow', lambda: IWAE_ELBO(1, "pathwise"), "ffjord", "84.20 (.17)", True),
        ),
    ),
    "bits": Row(
        "200 bits",
        BITS,
        (
            Entry("Pyro TraceGraph_ELBO(2)", lambda: vectorized(TraceGraph_ELBO, 2)),
            score_function("score", "", "rodeo"),
            score_function("disarm", "102.75 (.08)†", "rodeo"),
            score_function("double-cv", "102.14 (.06)†", "rodeo"),
        ),
    ),
    "belief": Row(
        "belief network 200-200-200, static",
        BELIEF,
        (
            Entry("Pyro TraceGraph_ELBO(50)", lambda: vectorized(TraceGraph_ELBO, 50)),
            iwae(50, "91.9†", "vimco", "vimco"),
        ),
    ),
}


def network(inputs: int, hidden: int | None, outputs: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Two hidden layers, or none, with Glorot's weights."""
    widths = [inputs, *([] if hidden is None else [hidden, hidden]), outputs]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
        nn.init.xavier_uniform_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


class Pair(nn.Module):
    """Model and guide of a set-up, with layers of Gaussian or binary units; ``mean`` is that of the training images."""

    def __init__(self, setup: Setup, mean: Tensor, flow: bool = False) -> None:
        super().__init__()
        self.bits, arguments = setup.bits, 1 if setup.bits else 2
        sizes, self.up, self.down = [len(mean), *setup.latent], nn.ModuleList(), nn.ModuleList()
        for i, hidden in enumerate(setup.hidden):
            features = CONTEXT if flow and i == len(setup.hidden) - 1 else 0
            self.up.append(network(sizes[i], hidden, arguments * sizes[i + 1] + features, setup.activation))
            outputs = sizes[0] if i == 0 else arguments * sizes[i]
            self.down.append(network(sizes[i + 1], hidden, outputs, setup.activation))
        self.flow = make_flow("iaf", sizes[-1], CONTEXT, transforms=4, affine=None) if flow else None
        top = torch.zeros(sizes[-1])
        self.register_parameter("top", nn.Parameter(top)) if setup.learn_prior else self.register_buffer("top", top)
        self.register_buffer("centre", mean.clone() if setup.bits else torch.zeros_like(mean))
        with torch.no_grad():
            self.down[0][-1].bias.copy_(mean.clamp(0.001, 0.999).logit())

    def units(self, outputs: Tensor) -> dist.Distribution:
        """A layer's distribution, of a network's outputs."""
        if self.bits:
            return dist.Bernoulli(logits=outputs).to_event(1)
        loc, log_scale = outputs.chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def prior(self) -> dist.Distribution:
        """Of the top layer."""
        if self.bits:
            return dist.Bernoulli(logits=self.top).to_event(1)
        return dist.Normal(torch.zeros_like(self.top), torch.ones_like(self.top)).to_event(1)

    def posterior(self, outputs: Tensor) -> dist.Distribution:
        """Of the top layer: with a flow, an affine map for each image, around a flow that knows the image."""
        if self.flow is None:
            return self.units(outputs)
        outputs, features = outputs[..., :-CONTEXT], outputs[..., -CONTEXT:]
        loc, log_scale = outputs.chunk(2, -1)
        # the cache hands the flow back its own draw, whose density costs nothing
        affine = dist.transforms.AffineTransform(loc, log_scale.exp(), event_dim=1, cache_size=1)
        return dist.TransformedDistribution(FlowDistribution(self.flow, features), [affine])

    def model(self, x: Tensor) -> None:
        """p(x, z), downwards."""
        pyro.module("pair", self)
        with pyro.plate("images", len(x)):
            z = pyro.sample(f"z{len(self.down)}", self.prior())
            for layer in range(len(self.down) - 1, 0, -1):
                z = pyro.sample(f"z{layer}", self.units(self.down[layer](z)))
            pyro.sample("x", dist.Bernoulli(logits=self.down[0](z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x), upwards."""
        pyro.module("pair", self)
        with pyro.plate("images", len(x)):
            z = x - self.centre
            for layer, up in enumerate(self.up, 1):
                make = self.posterior if layer == len(self.up) else self.units
                z = pyro.sample(f"z{layer}", make(up(z)))


@torch.no_grad()
def log_weights(pair: Pair, x: Tensor, num_particles: int) -> Tensor:
    """``log p(x, z) - log q(z | x)`` for draws from the guide, ``[num_particles, images]``."""
    found = []
    for part in x.split(max(1, (10_000 if x.device.type == "cpu" else 500_000) // num_particles)):
        with pyro.plate("particles", num_particles, dim=-2):
            guide = poutine.trace(pair.guide).get_trace(part)
            model = poutine.trace(poutine.replay(pair.model, guide)).get_trace(part)
        log_w = part.new_zeros(num_particles, len(part))
        for trace, sign in ((model, 1), (guide, -1)):
            trace.compute_log_prob()
            log_w += sign * sum(trace.nodes[n]["log_prob"] for n in [*trace.stochastic_nodes, *trace.observation_nodes])
        found.append(log_w)
    return torch.cat(found, -1).double()


class Images(NamedTuple):
    """Grey levels from 0 to 1, or bits, to train on; bits to score; and whether the former are drawn anew."""

    train: Tensor
    scored: Tensor
    dynamic: bool


def read(path: Path, keys: Sequence[str], largest: int) -> list[Tensor]:
    """Images of an ``.npz`` file, from 0 to 1, one a row."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = [torch.as_tensor(file[key], dtype=torch.get_default_dtype()) for key in keys]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give the folder that holds it") from error
    except Exception as error:  # a damaged archive raises any of ten kinds
        raise ValueError(f"{path}: no .npz file with {' and '.join(keys)}; write one by numpy.savez") from error
    for images in arrays:
        if images.dim() != 2 or len(images) < 2 or images.shape[1] != arrays[0].shape[1]:
            raise ValueError(f"{path}: an array of shape {tuple(images.shape)}; give [images, pixels], 2 or more")
        if not (images.numel() and images.min() >= 0 and images.max() <= largest):
            raise ValueError(f"{path}: values that are not from 0 to {largest}")
    return [images / largest for images in arrays]


def load(folder: Path, setup: Setup, num_scored: int, device: str) -> Images:
    """Read what a set-up is trained on and scored with: the same images for all, by a seed of its own."""
    name, *keys = FILES[setup.binarization]
    dynamic = setup.binarization == "dynamic"
    train, test = read(folder / name, keys, 255 if dynamic else 1)
    train, generator = train[: setup.num_train], torch.Generator().manual_seed(0)
    scored = train if setup.score[1] == "train" else test
    scored = scored[torch.randperm(len(scored), generator=generator)[:num_scored]]
    if dynamic:
        scored = torch.bernoulli(scored, generator=generator)
    return Images(train.to(device), scored.to(device), dynamic)


class Trained(NamedTuple):
    """Steps taken, their seconds after the first, that one's, in which CompiledSVI compiles, and how it ran them."""

    steps: int
    seconds: float
    first: float
    how: str


def stints(setup: Setup, per_epoch: int, chunk: int, args: argparse.Namespace) -> Iterator[tuple[int, float, bool]]:
    """Numbers of steps, at first one, their size, and whether an epoch begins, stage by stage."""
    left, number = args.steps or math.inf, 0
    for epochs, rate in setup.stages:
        in_stage, done = max(1, round((args.budget or 1) * epochs * per_epoch)), 0
        while done < in_stage:
            to_epoch = per_epoch - done % per_epoch
            number = int(min(chunk if number else 1, to_epoch, in_stage - done, left))
            if number == 0:
                return
            yield number, rate, done % per_epoch == 0
            done, left = done + number, left - number


def processor_seconds() -> float:
    """Of this process and of the compilers it has called."""
    return sum(os.times()[:4])


def optimizer(setup: Setup, batch_size: int) -> pyro.optim.PyroOptim:
    """Adam as in the paper, for the sum over a minibatch."""
    return pyro.optim.Adam({"lr": setup.stages[0][1], "eps": setup.epsilon * batch_size})


def train(pair: Pair, entry: Entry, setup: Setup, images: Images, args: argparse.Namespace) -> Trained:
    """Take the schedule's steps, or as many as the seconds allow."""
    clock = processor_seconds if args.device == "cpu" else time.perf_counter
    compiled = (args.compile or args.device == "cuda") and not entry.title.startswith("Pyro")
    x = images.train.clone() if images.dynamic else images.train
    batches = Minibatches(x, batch_size=min(args.batch_size or setup.batch_size, len(x)))
    optim = optimizer(setup, batches.batch_size)
    engine = partial(CompiledSVI, fallback="eager") if compiled else SVI
    svi = engine(pair.model, pair.guide, optim, entry.objective())
    steps, first, start = 0, 0.0, clock()
    for number, rate, epoch in stints(setup, len(batches), CHUNK if compiled else 1, args):
        if args.seconds and steps and clock() - start + (first if compiled else 0) >= args.seconds:
            break
        if epoch and images.dynamic:
            x.copy_(torch.bernoulli(images.train))
        for own in optim.optim_objs.values():
            own.param_groups[0]["lr"] = rate
        if compiled:
            svi.run(number, batches)
        else:
            svi.step(*batches.take(batches.rows(1)[0]))
        steps += number
        if steps == 1:
            synchronize(args.device)
            first, start = clock() - start, clock()
    synchronize(args.device)
    return Trained(steps, clock() - start, first, svi.how if compiled else "eager")


def fit(row: Row, entry: Entry, images: Images, seed: int, args: argparse.Namespace) -> tuple[dict[str, Any], Tensor]:
    """Train an entry and return its record and the score of each image, in nats."""
    pyro.set_rng_seed(seed)
    pair = Pair(row.setup, images.train.mean(0).cpu(), entry.flow).to(args.device)
    with pyro.get_param_store().scope():
        trained = train(pair, entry, row.setup, images, args)
        pyro.set_rng_seed(seed)
        log_w = log_weights(pair, images.scored, args.particles)
    tight, elbo = log_w.logsumexp(0) - math.log(len(log_w)), log_w.mean(0)
    scored = elbo if row.setup.score[0] == "ELBO" else tight
    record = {"entry": entry.title, "seed": seed, **trained._asdict()}
    return record | measure("score", scored) | measure("bound", tight) | measure("elbo", elbo), scored


def measure(key: str, nats: Tensor) -> dict[str, float]:
    """Mean and standard error over images."""
    return {key: nats.mean().item(), f"{key}_error": nats.std().item() / math.sqrt(len(nats))}


def run_row(name: str, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and score all entries of a row, and print each when it is done."""
    row, records, first = ROWS[name], [], None
    images = load(args.data, row.setup, args.test_images, args.device)
    for entry in row.entries:
        record, nats = fit(row, entry, images, seed, args)
        first = nats if first is None else first
        record |= {"row": name, **measure("gain", nats - first)}
        score, gain = (f"{record[key]:.2f} ± {record[f'{key}_error']:.2f}" for key in ("score", "gain"))
        length = f"{record['steps']} steps in {record['seconds']:.1f} s after {record['first']:.1f} s"
        print(f"{name:<11}{entry.title:<38}seed {seed}: {score} nats, gain {gain}, {length}", flush=True)
        records.append(record)
    return records


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Over seeds; one seed has no error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def tabulate(records: Sequence[dict[str, Any]], args: argparse.Namespace) -> Iterator[str]:
    """The lines of a table in Markdown, negative scores in nats: means over seeds with the standard error over them."""
    yield "| row | scored | objective | published | here | over images | gain on Pyro's | steps | seconds |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name in args.rows:
        row = ROWS[name]
        kind = f"L_{args.particles}" if row.setup.score[0] == "L_K" else "ELBO"
        for i, entry in enumerate(row.entries):
            mine = [record for record in records if (record["row"], record["entry"]) == (name, entry.title)]
            if not mine:
                continue
            score, score_error = mean_and_error([record["score"] for record in mine])
            gain, gain_error = mean_and_error([record["gain"] for record in mine])
            cells = [f"`{name}`: {row.title}", f"{kind}, {row.setup.score[1]}"] if i == 0 else ["", ""]
            published = f"{entry.theirs} [{entry.paper}]" if entry.theirs else "-"
            cells += [entry.title, published, f"{-score:.2f} ± {score_error:.2f}"]
            cells += [f"± {mine[0]['score_error']:.1f}", f"{gain:+.2f} ± {gain_error:.2f}" if i else "-"]
            cells += [f"{statistics.fmean(r['steps'] for r in mine):.0f}"]
            yield "| " + " | ".join([*cells, f"{statistics.fmean(r['seconds'] for r in mine):.0f}"]) + " |"


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The options; errors are one line."""
    parser = argparse.ArgumentParser("reproduce.py", argparse.SUPPRESS, __doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the .npz files")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="for each entry; 45 if no length is given")
    length.add_argument("--budget", type=float, help="share of every stage of the published schedule")
    length.add_argument("--steps", type=int, help="steps of the published schedule")
    for name, default in (("seeds", 1), ("particles", 500), ("test-images", 500), ("batch-size", 0), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="CompiledSVI on a CPU too")
    parser.add_argument("--output", type=Path, metavar="JSON")
    args = parser.parse_args(argv)
    if args.data is None:
        parser.error("--data DIR is needed: the folder of mnist_u8.npz and static_binarized_mnist_u8.npz")
    for name in ("seconds", "budget", "steps"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} {getattr(args, name)}: give a number above 0")
    for name, low in (("seeds", 1), ("particles", 1), ("test_images", 2), ("batch_size", 0), ("threads", 1)):
        if getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give a whole number of {low} or more")
    if args.output and not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: there is no such folder; make it first")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no GPU; use --device cpu")
    if not (args.seconds or args.budget or args.steps):
        args.seconds = 45.0
    return parser, args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rows seed by seed, print the table, and write JSON after every row."""
    parser, args = parse(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    records: list[dict[str, Any]] = []
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    try:
        for seed, name in itertools.product(range(args.seeds), args.rows):
            records += run_row(name, seed, args)
            if args.output:
                found = {"records": records, "settings": settings, "versions": versions()}
                args.output.write_text(json.dumps(found, indent=2) + "\n")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    finally:
        torch.set_num_threads(threads)
    papers = [f"{key}: {title}" for key, title in PAPERS.items()]
    print(*tabulate(records, args), *papers, "†: as remembered, not read again in the paper", sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
