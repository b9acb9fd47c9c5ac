"""Flow guides side by side where the log evidence is known: KL to the posterior, k-hat, cost, robustness, scale.

- ``eight-schools``, centred: mu ~ Normal(0, 5), tau ~ HalfCauchy(5), theta_j ~ Normal(mu, tau) and
  y_j ~ Normal(theta_j, s_j).
- ``funnel``: v ~ Normal(0, 3) and nine x_i ~ Normal(0, exp(v / 2)), as one vector whose structure no guide sees.
- ``groups``: the first with tau ~ HalfCauchy(2), 200 thetas and s_j = 1, on y_j ~ Normal(1, 2^(1/2)) drawn by a
  generator that starts from 0. Guides that are right on minibatches have those of 20.

The evidence is a quadrature over mu and log tau in float64, thetas integrated out; the funnel's is 1. Every guide has
16 particles, float32, the same seeds and 4000 steps of ClippedAdam whose rate falls to 2 %, from 2e-2 for Gaussian
guides and from 5e-3 for flows. Then come 20 000 draws of log w = log p(x, z) - log q(z) on all the data:

    KL(q || p) = log Z - mean log w,  ESS/N = (sum w)^2 / (N sum w^2),  k-hat: arviz.psislw, left out without ArviZ

Guides are Pyro's, this package's and, where it is installed, NumPyro's, which refuses local latents in minibatches and
has all the data, on the device that it chooses. ``3x64`` is three transforms with two hidden layers of 64 units, or of
as many as there are coordinates, the least that both libraries take (on the groups this is NumPyro's default); ``stl``
trains under sticking-the-landing. Milliseconds are a step's, on a CPU the processor's, without NumPyro's compilation.

What ``AutoFlow`` might do otherwise is run if it is named: ``spline`` and ``coupling`` for autoregressive layers,
``deep`` for two hidden layers instead of one, ``tril`` for a dense outer affine map, ``elu`` for SiLU, ``even`` for
location and scale that learn as the networks do, and ``as-is`` without non-centring.

    python benchmarks/flow_guides.py [--only funnel] [--guides AutoFlow AutoPlatedFlow] [--seeds 3] [--steps 4000]
    python benchmarks/flow_guides.py --variants  # what AutoFlow might do otherwise, on the first two
    python benchmarks/flow_guides.py --robust  # our guides, three rates, five seeds: crashes and non-finite losses
    python benchmarks/flow_guides.py --cost    # a step relative to AutoDiagonalNormal's, in turns
    python benchmarks/flow_guides.py --scale   # AutoPlatedFlow on 1 000 and 10 000 groups: parameters, memory, time
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from flow_targets import TARGETS, Target, groups
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.infer.enum import get_importance_trace
from timing import clock_of, ratio_to, timed, versions
from torch import Tensor, nn

import pyro_elbo_ext
from pyro_elbo_ext.guides import make_flow

PARTICLES, DECAYED, CLIP, CHUNK = 16, 0.02, 10.0, 2000
GAUSSIAN_RATE, FLOW_RATE = 2e-2, 5e-3
ROBUST_RATES, ROBUST_SEEDS = (1e-3, 5e-3, 2e-2), 5
COST_STEPS, COST_TURNS, REFERENCE = 50, 15, "AutoDiagonalNormal"
SCALE_STEPS, SCALE_GROUPS = 300, (1_000, 10_000)


class Settings(NamedTuple):
    """How much is run."""

    device: str
    seeds: int
    steps: int
    draws: int
    turns: int = COST_TURNS

    def seconds(self, work: Callable[[], Any]) -> float:
        """Return the seconds of a call, on a CPU the processor's."""
        return timed(work, self.device, clock_of(self.device))


def trace_elbo() -> Trace_ELBO:
    """Return the loss of all but those that name another."""
    return Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=1)


def sticking_the_landing() -> pyro_elbo_ext.VRIWAE_ELBO:
    """Return the ELBO without the noise of the guide's score."""
    return pyro_elbo_ext.VRIWAE_ELBO(1.0, PARTICLES, gradient="stl", max_plate_nesting=1)


@dataclass
class Entry:
    """A guide for Pyro, and how it is trained."""

    build: Callable[[Target], Any]
    rate: float = FLOW_RATE
    minibatches: bool = False  # whether it is right on minibatches of local latents
    loss: Callable[[], Any] = trace_elbo


def widths(target: Target) -> list[int]:
    """Return the hidden widths of the ``3x64`` guides."""
    return [max(64, target.dim)] * 2


def plated_flow(target: Target) -> Any:
    """Return this package's guide that follows the plates."""
    kwargs = {"amortize": target.features or None, "create_plates": target.create_plates}
    return pyro_elbo_ext.AutoPlatedFlow(target.model, **kwargs)


GUIDES: dict[str, Entry] = {
    "AutoNormal": Entry(lambda t: AutoNormal(t.model, create_plates=t.create_plates), GAUSSIAN_RATE, minibatches=True),
    REFERENCE: Entry(lambda t: AutoDiagonalNormal(t.model), GAUSSIAN_RATE),
    "AutoMultivariateNormal": Entry(lambda t: AutoMultivariateNormal(t.model), GAUSSIAN_RATE),
    "AutoIAFNormal": Entry(lambda t: AutoIAFNormal(t.model)),
    "AutoIAFNormal-3x64": Entry(lambda t: AutoIAFNormal(t.model, widths(t), num_transforms=3)),
    "AutoFlow": Entry(lambda t: pyro_elbo_ext.AutoFlow(t.model, flow="iaf")),
    "AutoFlow-stl": Entry(lambda t: pyro_elbo_ext.AutoFlow(t.model, flow="iaf"), loss=sticking_the_landing),
    "AutoPlatedFlow": Entry(plated_flow, minibatches=True),
}
VARIANTS: dict[str, Entry] = {
    "AutoFlow-spline": Entry(lambda t: pyro_elbo_ext.AutoFlow(t.model, flow="spline")),
    "AutoFlow-coupling": Entry(lambda t: pyro_elbo_ext.AutoFlow(t.model, flow="coupling")),
    "AutoFlow-deep": Entry(lambda t: pyro_elbo_ext.AutoFlow(t.model, hidden_features=(64, 64))),
    "AutoFlow-tril": Entry(lambda t: pyro_elbo_ext.AutoFlow(t.model, affine="tril")),
    "AutoFlow-elu": Entry(lambda t: pyro_elbo_ext.AutoFlow(t.model, flow=partial(make_flow, "iaf", activation=nn.ELU))),
    "AutoFlow-even": Entry(lambda t: pyro_elbo_ext.AutoFlow(t.model, affine_rate=1.0)),
    "AutoFlow-as-is": Entry(lambda t: pyro_elbo_ext.AutoFlow(t.model, noncenter=False)),
}
ENTRIES = GUIDES | VARIANTS
OURS = ("AutoFlow", "AutoPlatedFlow")
NUMPYRO_GUIDES: dict[str, tuple[str, Callable[[Target], dict[str, Any]]]] = {
    "numpyro-AutoIAFNormal": ("AutoIAFNormal", lambda t: {}),
    "numpyro-AutoIAFNormal-3x64": ("AutoIAFNormal", lambda t: {"num_flows": 3, "hidden_dims": widths(t)}),
    "numpyro-AutoBNAFNormal": ("AutoBNAFNormal", lambda t: {}),
}


class Trained(NamedTuple):
    """What a run leaves."""

    losses: np.ndarray
    seconds: float
    parameters: int
    weights: np.ndarray


class Run:
    """A guide with its optimiser, in a parameter store of its own."""

    def __init__(self, target: Target, entry: Entry, seed: int, steps: int, rate: float | None = None) -> None:
        self.target, self.state = target, {"params": {}, "constraints": {}}
        self.args = target.train_args if entry.minibatches else target.args
        options = {"lr": rate or entry.rate, "lrd": DECAYED ** (1 / steps), "clip_norm": CLIP}
        pyro.set_rng_seed(seed)
        with pyro.get_param_store().scope(self.state):
            self.guide = entry.build(target)
            self.guide(*self.args)  # AutoGuides make their parameters here
        self.svi = SVI(target.model, self.guide, pyro.optim.ClippedAdam(options), entry.loss())

    def steps(self, number: int) -> list[float]:
        """Take so many steps and return the losses."""
        with pyro.get_param_store().scope(self.state):
            return [self.svi.step(*self.args) for _ in range(number)]

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.guide.parameters())

    def weights(self, draws: int) -> np.ndarray:
        """Return log p - log q of so many draws of the guide, on all the data."""
        sizes = [min(CHUNK, draws - start) for start in range(0, draws, CHUNK)]
        with pyro.get_param_store().scope(self.state), torch.no_grad():
            return torch.cat([self.chunk(size) for size in sizes]).cpu().numpy()

    def chunk(self, size: int) -> Tensor:
        """Return as many log-weights, from one vectorised run of guide and model."""

        def many(function: Callable) -> Callable:
            def run(*args: Any) -> Any:
                with pyro.plate("draws", size, dim=-2):
                    return function(*args)

            return run

        traces = get_importance_trace("flat", 2, many(self.target.model), many(self.guide), self.target.args, {})
        sites = [[s for s in trace.nodes.values() if s["type"] == "sample"] for trace in traces]
        model, guide = (sum(s["log_prob"].double().reshape(size, -1).sum(-1) for s in found) for found in sites)
        return model - guide


def train(target: Target, name: str, seed: int, settings: Settings, rate: float | None = None) -> Trained:
    """Train a guide of either library."""
    if name in NUMPYRO_GUIDES:
        return numpyro_train(target, name, seed, settings)
    run = Run(target, ENTRIES[name], seed, settings.steps, rate)
    losses: list[float] = []
    seconds = settings.seconds(lambda: losses.extend(run.steps(settings.steps)))
    return Trained(np.array(losses), seconds, run.parameters, run.weights(settings.draws))


def numpyro_train(target: Target, name: str, seed: int, settings: Settings) -> Trained:
    """Train a guide of NumPyro: the same rates and the same clipping, steps in one compiled loop."""
    import jax
    import numpyro

    kind, kwargs = NUMPYRO_GUIDES[name]
    model = target.numpyro_model()
    guide = getattr(numpyro.infer.autoguide, kind)(model, **kwargs(target))
    optim = numpyro.optim.ClippedAdam(lambda i: FLOW_RATE * DECAYED ** ((i + 1) / settings.steps), clip_norm=CLIP)
    svi = numpyro.infer.SVI(model, guide, optim, numpyro.infer.Trace_ELBO(num_particles=PARTICLES))
    key, init_key = jax.random.split(jax.random.PRNGKey(seed))
    state = svi.init(init_key)
    loop = jax.jit(lambda state: jax.lax.scan(lambda s, _: svi.update(s), state, length=settings.steps))
    loop, found = loop.lower(state).compile(), []
    seconds = timed(lambda: found.append(jax.block_until_ready(loop(state))), "cpu", clock_of("cpu"))
    params = svi.get_params(found[0][0])
    weights = numpyro_weights(model, guide, params, jax.random.split(key, settings.draws))
    return Trained(np.array(found[0][1]), seconds, sum(leaf.size for leaf in jax.tree.leaves(params)), weights)


def numpyro_weights(model: Callable, guide: Callable, params: dict[str, Any], keys: Any) -> np.ndarray:
    """Return log p - log q, a draw for each key, those of NumPyro's Trace_ELBO under the same keys."""
    import jax
    from numpyro.handlers import seed
    from numpyro.infer.util import get_importance_trace as get_traces

    def weight(key: Any) -> Any:
        model_key, guide_key = jax.random.split(key)
        traces = get_traces(seed(model, model_key), seed(guide, guide_key), (), {}, params)
        log_p, log_q = (sum(s["log_prob"].sum() for s in t.values() if s["type"] == "sample") for t in traces)
        return log_p - log_q

    found = jax.jit(lambda keys: jax.lax.map(weight, keys, batch_size=min(CHUNK, len(keys))))(keys)
    return np.asarray(found, dtype=np.float64)


def k_hat(weights: np.ndarray) -> float | None:
    """Return the shape of the tail of the weights, not a number if any is not finite, None without ArviZ."""
    if importlib.util.find_spec("arviz") is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its next version
        from arviz import psislw

        return float(psislw(weights)[1]) if np.isfinite(weights).all() else math.nan


def judge(target: Target, found: Trained) -> dict[str, Any]:
    """Return the numbers of a run."""
    w = np.exp(found.weights - found.weights.max())
    return {
        "kl": target.log_evidence - found.weights.mean().item(),
        "se": found.weights.std().item() / math.sqrt(len(w)),
        "k_hat": k_hat(found.weights),
        "ess": (w.sum() ** 2 / (w @ w) / len(w)).item(),
        "ms": 1e3 * found.seconds / len(found.losses),
        "parameters": found.parameters,
        "nonfinite": int((~np.isfinite(found.losses)).sum()),
    }


def attempt(target: Target, name: str, seed: int, settings: Settings, rate: float | None = None) -> dict[str, Any]:
    """Return the numbers of a run, or what it died of."""
    row = {"target": target.name, "guide": name, "seed": seed, "rate": rate}
    try:
        return row | judge(target, train(target, name, seed, settings, rate))
    except (ValueError, RuntimeError, ArithmeticError) as error:  # what a guide that has diverged ends in
        return row | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def median(rows: Sequence[dict[str, Any]], key: str) -> float:
    """Return the median over the runs that have such a number."""
    return statistics.median([r[key] for r in rows if r.get(key) is not None] or [math.nan])


def quality(targets: list[Target], names: list[str], settings: Settings) -> Iterator[dict[str, Any]]:
    """Train everything under every seed; print medians and each seed's KL."""
    for target in targets:
        print(f"\n{target.name}, log evidence {target.log_evidence:.4f} nats; medians, and the KL of each seed")
        print(f"{'guide':30}{'numbers':>9}{'KL':>9}{'se':>8}{'k-hat':>7}{'ESS/N':>8}{'ms/step':>9}  KL by seed")
        for name in names:
            if name == "AutoNormal" and not target.create_plates:
                continue  # AutoDiagonalNormal is the same
            if name == "AutoFlow-stl" and target.dim > 100:
                continue  # a step goes back through every coordinate of every layer: a quarter of an hour for each seed
            rows = [attempt(target, name, seed, settings) for seed in range(settings.seeds)]
            forms = {"parameters": "9.0f", "kl": "9.3f", "se": "8.3f", "k_hat": "7.2f", "ess": "8.3f", "ms": "9.2f"}
            line = "".join(f"{median(rows, key):{form}}" for key, form in forms.items())
            print(f"{name:30}{line}  {' '.join(r.get('error') or format(r['kl'], '.3f') for r in rows)}", flush=True)
            yield from rows


def robust(targets: list[Target], names: list[str], settings: Settings) -> Iterator[dict[str, Any]]:
    """Count crashes and runs with non-finite losses over rates and seeds."""
    print(f"{'target':16}{'guide':30}{'rate':>8}{'runs':>6}{'crashes':>9}{'non-finite':>12}{'KL':>9}{'worst':>9}")
    for target, name, rate in itertools.product(targets, names, ROBUST_RATES):
        rows = [attempt(target, name, seed, settings, rate) for seed in range(settings.seeds)]
        crashes, bad = sum("error" in r for r in rows), sum(r.get("nonfinite", 0) > 0 for r in rows)
        worst = max((r["kl"] for r in rows if "kl" in r), default=math.nan)
        line = f"{target.name:16}{name:30}{rate:8g}{len(rows):6d}{crashes:9d}{bad:12d}"
        print(f"{line}{median(rows, 'kl'):9.3f}{worst:9.3f}", flush=True)
        yield from rows


def take_turns(target: Target, names: list[str], settings: Settings) -> dict[str, list[float]]:
    """Return the seconds of a step, turn by turn."""
    runs = {name: Run(target, ENTRIES[name], 0, settings.steps) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(settings.turns + 1):
        for name, run in runs.items():
            seconds = settings.seconds(lambda run=run: run.steps(COST_STEPS))
            if turn:  # the first warms up
                times[name].append(seconds / COST_STEPS)
    return times


def cost(targets: list[Target], names: list[str], settings: Settings) -> Iterator[dict[str, Any]]:
    """Print what a step costs relative to the reference, medians of the ratio within a turn."""
    names = [REFERENCE, *(n for n in names if n in ENTRIES and n != REFERENCE)]
    print(f"{'target':16}{'guide':30}{'ms/step':>9}{'ratio':>8}  quartiles")
    for target in targets:
        times = take_turns(target, names, settings)
        for name in names:
            row = {"target": target.name, "guide": name, "ms": 1e3 * statistics.median(times[name])}
            row |= ratio_to(times[REFERENCE], times[name])
            line = f"{target.name:16}{name:30}{row['ms']:9.2f}{row['ratio']:8.2f}"
            print(f"{line}  {row['ratio_low']:.2f} to {row['ratio_high']:.2f}", flush=True)
            yield row


def peak(device: str, reset: bool = False) -> float:
    """Return the most MiB that the process held since the last reset (Linux), on a GPU those that tensors held."""
    if device != "cpu":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10


def scale(targets: list[Target], names: list[str], settings: Settings) -> Iterator[dict[str, Any]]:
    """Print how parameters, peak memory and time grow with the groups, in minibatches of one size."""
    print(f"{'groups':>8}  {'guide':30}{'numbers':>9}{'peak MiB':>10}{'ms/step':>9}")
    for name, target in itertools.product([n for n in names if n in GUIDES and GUIDES[n].minibatches], targets):
        Run(groups(100), GUIDES[name], 0, SCALE_STEPS).steps(20)  # what is loaded once in a process does not count
        before = peak(settings.device, reset=True)
        run = Run(target, GUIDES[name], 0, SCALE_STEPS)
        ms = 1e3 * settings.seconds(lambda run=run: run.steps(SCALE_STEPS)) / SCALE_STEPS
        row = {"groups": target.dim - 2, "guide": name, "parameters": run.parameters, "ms": ms}
        row["peak"] = peak(settings.device) - before
        print(f"{row['groups']:8d}  {name:30}{row['parameters']:9d}{row['peak']:10.1f}{ms:9.2f}", flush=True)
        yield row


def available(names: Sequence[str]) -> list[str]:
    """Return the guides that there are, and say which are left out."""
    missing = {name: "not in this version of pyro_elbo_ext" for name in OURS if not hasattr(pyro_elbo_ext, name)}
    if importlib.util.find_spec("numpyro") is None:
        missing |= dict.fromkeys(NUMPYRO_GUIDES, "NumPyro is not installed")
    for name in [n for n in names if n in missing]:
        print(f"{name}: {missing[name]}")
    return [name for name in names if name not in missing]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=None, help="targets")
    parser.add_argument("--guides", nargs="+", choices=[*ENTRIES, *NUMPYRO_GUIDES], default=None)
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--draws", type=int, default=20_000, help="fewer show that it runs, and settle nothing")
    parser.add_argument("--turns", type=int, default=COST_TURNS, help="of --cost")
    for mode in ("variants", "robust", "cost", "scale"):
        parser.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, default="quality")
    return parser.parse_args(argv)


def choose(options: argparse.Namespace) -> tuple[list[Target], list[str]]:
    """Return what the mode runs, unless told otherwise."""
    usual = {
        "robust": OURS,
        "scale": OURS[1:],
        "cost": (*GUIDES, "AutoFlow-spline", "AutoFlow-deep"),
        "variants": tuple(VARIANTS),
    }.get(options.mode, (*GUIDES, *NUMPYRO_GUIDES))
    names = available(options.guides or usual)
    if options.mode == "scale":
        return [groups(number) for number in SCALE_GROUPS], names
    few = ("eight-schools", "funnel") if options.mode in ("cost", "variants") else tuple(TARGETS)
    return [TARGETS[name]() for name in options.only or few], names


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for, print it, write JSON."""
    options = parse(argv)
    torch.set_num_threads(1)
    if options.device != "cpu":  # it costs every call of torch a little
        torch.set_default_device(options.device)
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    seeds = options.seeds or (ROBUST_SEEDS if options.mode == "robust" else 3)
    settings = Settings(options.device, seeds, options.steps, options.draws, options.turns)
    print(f"{settings.device}, {torch.get_num_threads()} thread, {versions()}", flush=True)
    modes = {"robust": robust, "cost": cost, "scale": scale}
    key = options.mode if options.mode in modes else "quality"
    report: dict[str, Any] = {"settings": settings._asdict(), "versions": versions(), key: []}
    for row in modes.get(key, quality)(*choose(options), settings):
        report[key].append(row)
        if options.output:  # as soon as there is a row
            options.output.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
