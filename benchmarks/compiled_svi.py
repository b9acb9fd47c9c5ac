"""CompiledSVI beside SVI.step, JitTrace_ELBO and NumPyro: microseconds a step, seconds to the first, break-even.

Every model is written once, over what Pyro and NumPyro have in common, and trained with the same mean-field guide
(another where it says so), Adam at 0.01 and particles in one vectorised step. Each framework runs in a process of its
own on one thread, everything in float32: seconds of the first call, with an empty cache on disk (``cold``) and with
the one that this left (``warm``), then the median of blocks of steps. NumPyro's ``SVI.run`` is a ``lax.fori_loop``;
``update`` is its jitted single step. It is left out where it is not installed.

    python benchmarks/compiled_svi.py [--quick] [--output compiled_svi.json] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

PROGRAMS: dict[str, Callable[[Any], tuple[Callable, tuple]]] = {}


def program(function: Callable) -> Callable:
    """Register a model: from a framework's names to ``(model, data)``."""
    PROGRAMS[function.__name__.replace("_", " ")] = function
    return function


@program
def eight_schools(f: Any) -> tuple[Callable, tuple]:
    """Rubin (1981), centred: ten latents."""
    effects = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(effects: Any, errors: Any) -> None:
        mu = f.sample("mu", f.dist.Normal(f.zero, 5.0))
        tau = f.sample("tau", f.dist.HalfCauchy(f.zero + 5.0))
        with f.plate("schools", 8):
            theta = f.sample("theta", f.dist.Normal(mu, tau))
            f.sample("y", f.dist.Normal(theta, errors), obs=effects)

    return model, (effects, errors)


@program
def logistic_regression(f: Any) -> tuple[Callable, tuple]:
    """3020 rows on five columns."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3020, 5))
    y = (rng.random(3020) < 1 / (1 + np.exp(-x @ rng.normal(size=5)))) * 1.0

    def model(x: Any, y: Any) -> None:
        w = f.sample("w", f.dist.Normal(f.zeros(5), 1.0).to_event(1))
        with f.plate("rows", len(x)):
            f.sample("y", f.dist.Bernoulli(logits=(w * x).sum(-1)), obs=y)

    return model, (x, y)


@program
def radon(f: Any) -> tuple[Callable, tuple]:
    """Intercepts and slopes of 85 counties, 3020 houses: made up, of the size of Gelman and Hill's (2006)."""
    rng = np.random.default_rng(0)
    county, floor = rng.integers(0, 85, 3020), rng.integers(0, 2, 3020) * 1.0
    y = rng.normal(size=85)[county] + rng.normal(size=85)[county] * floor + rng.normal(size=3020)

    def model(county: Any, floor: Any, y: Any) -> None:
        mu = f.sample("mu", f.dist.Normal(f.zeros(2), 1.0).to_event(1))
        tau = f.sample("tau", f.dist.HalfNormal(f.zeros(2) + 1.0).to_event(1))
        sigma = f.sample("sigma", f.dist.HalfNormal(f.zero + 1.0))
        with f.plate("counties", 85):
            a = f.sample("a", f.dist.Normal(mu[..., 0], tau[..., 0]))
            b = f.sample("b", f.dist.Normal(mu[..., 1], tau[..., 1]))
        with f.plate("houses", len(y)):
            f.sample("y", f.dist.Normal(a[..., county] + b[..., county] * floor, sigma), obs=y)

    return model, (county, floor, y)


@program
def autoregression(f: Any) -> tuple[Callable, tuple]:
    """AR(5) on 200 times, given the first five."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=200).cumsum() / 5
    lags = np.stack([y[5 - k : -k] for k in range(1, 6)], -1)

    def model(lags: Any, y: Any) -> None:
        alpha = f.sample("alpha", f.dist.Normal(f.zero, 10.0))
        beta = f.sample("beta", f.dist.Normal(f.zeros(5), 10.0).to_event(1))
        sigma = f.sample("sigma", f.dist.HalfCauchy(f.zero + 2.5))
        with f.plate("times", len(y)):
            f.sample("y", f.dist.Normal(alpha + (beta * lags).sum(-1), sigma), obs=y)

    return model, (lags, y[5:])


@program
def item_response(f: Any) -> tuple[Callable, tuple]:
    """Two-parameter logistic: 20 items, 100 persons."""
    rng = np.random.default_rng(0)
    y = (rng.random((100, 20)) < 1 / (1 + np.exp(-rng.normal(size=(100, 1)) - rng.normal(size=20)))) * 1.0

    def model(y: Any) -> None:
        with f.plate("items", 20, dim=-1):
            a = f.sample("a", f.dist.LogNormal(f.zero, 0.5))
            b = f.sample("b", f.dist.Normal(f.zero, 1.0))
        with f.plate("persons", 100, dim=-2):
            theta = f.sample("theta", f.dist.Normal(f.zero, 1.0))
            with f.plate("items again", 20, dim=-1):
                f.sample("y", f.dist.Bernoulli(logits=a * (theta - b)), obs=y)

    return model, (y,)


@program
def gamma_poisson(f: Any) -> tuple[Callable, tuple]:
    """Fifty rates."""
    y = np.random.default_rng(0).poisson(3.0, 50) * 1.0

    def model(y: Any) -> None:
        with f.plate("rows", 50):
            rate = f.sample("rate", f.dist.Gamma(f.zero + 2.0, 1.0))
            f.sample("y", f.dist.Poisson(rate), obs=y)

    return model, (y,)


def run_torch(name: str, particles: int, budget: float, kind: str) -> dict[str, float]:
    """Time one way to take steps with Pyro."""
    import pyro
    import torch
    from pyro.infer import SVI, JitTrace_ELBO
    from pyro.infer.autoguide import AutoNormal

    from pyro_elbo_ext import IWAE_ELBO, AutoFlow, CompiledSVI

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    f = SimpleNamespace(sample=pyro.sample, plate=pyro.plate, dist=pyro.distributions, zeros=torch.zeros)
    f.zero = torch.tensor(0.0)
    kind, _, guide_name = kind.partition("/")
    model, data = PROGRAMS[name](f)
    data = tuple(torch.as_tensor(d) if d.dtype.kind == "i" else torch.as_tensor(d, dtype=torch.float32) for d in data)
    pyro.set_rng_seed(0)
    guide = AutoFlow(model) if guide_name == "flow" else AutoNormal(model)
    rate = 0.001 if guide_name == "flow" else 0.01  # at which flows may end in NaN under this bound
    loss = IWAE_ELBO(particles, "dreg" if guide_name == "dreg" else "auto")
    if kind == "jit":
        loss = JitTrace_ELBO(particles, vectorize_particles=True, max_plate_nesting=3, ignore_jit_warnings=True)
    svi = (CompiledSVI if kind == "compiled" else SVI)(model, guide, pyro.optim.Adam({"lr": rate}), loss)

    def steps(number: int) -> None:
        if kind == "compiled":
            svi.run(number, *data)
        else:
            for _ in range(number):
                svi.step(*data)

    return timed_blocks(steps, budget, 256 if kind == "compiled" else 10)


def run_numpyro(name: str, particles: int, budget: float, kind: str) -> dict[str, float]:
    """Time one way to take steps with NumPyro."""
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    import jax
    import jax.numpy as jnp
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    f = SimpleNamespace(sample=numpyro.sample, plate=numpyro.plate, dist=numpyro.distributions, zeros=jnp.zeros)
    f.zero = jnp.zeros(())
    model, data = PROGRAMS[name](f)
    data = tuple(jnp.asarray(d) for d in data)
    svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(0.01), Trace_ELBO(particles, vectorize_particles=True))
    state = [svi.init(jax.random.PRNGKey(0), *data)]
    update = jax.jit(svi.update)
    loop = jax.jit(lambda n, s: jax.lax.fori_loop(0, n, lambda _, t: svi.update(t, *data)[0], s))

    def steps(number: int) -> None:
        if kind == "loop":
            state[0] = loop(number, state[0])
        else:
            for _ in range(number):
                state[0], _ = update(state[0], *data)
        jax.block_until_ready(state[0])

    return timed_blocks(steps, budget, 256 if kind == "loop" else 20)


def timed_blocks(steps: Callable[[int], None], budget: float, least: int) -> dict[str, float]:
    """Return seconds of the first step, and microseconds a step after it: median over blocks of processor time."""
    start = time.perf_counter()
    steps(1)
    first = time.perf_counter() - start
    steps(least)
    start = time.process_time()
    steps(least)
    each = (time.process_time() - start) / least
    size = max(least, int(budget / 9 / each))
    blocks = []
    for _ in range(9):
        start = time.process_time()
        steps(size)
        blocks.append((time.process_time() - start) / size)
    return {"first": first, "microseconds": 1e6 * statistics.median(blocks)}


def in_a_process(name: str, particles: int, budget: float, kind: str, cache: str) -> dict[str, float] | None:
    """Run one measurement in a process of its own; None where its framework is missing or fails."""
    command = [sys.executable, __file__, "--worker", name, str(particles), str(budget), kind]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"    {kind} failed: {reason[:110]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


WAYS = ("eager", "jit", "compiled", "numpyro loop", "numpyro update")
VARIANTS = {"eight schools/flow": 16, "eight schools/dreg": 16}


def measure(name: str, particles: int, budget: float) -> dict[str, Any]:
    """Return what every way took on one model."""
    name, _, variant = name.partition("/")
    found: dict[str, Any] = {"model": f"{name}/{variant}" if variant else name, "particles": particles}
    with tempfile.TemporaryDirectory() as cache:
        for kind in WAYS:
            if variant and kind.split()[0] not in ("eager", "compiled"):
                continue
            found[kind] = in_a_process(name, particles, budget, f"{kind}/{variant}", cache)
        again = in_a_process(name, particles, 0.1, f"compiled/{variant}", cache)
        if found["compiled"] and again:
            found["compiled"]["warm"] = again["first"]
    eager, ours = found["eager"], found["compiled"]
    if eager and ours:
        found["ratio"] = eager["microseconds"] / ours["microseconds"]
        saved = 1e-6 * (eager["microseconds"] - ours["microseconds"])
        found["break_even"] = math.ceil(ours["first"] / saved) if saved > 0 else None
        if found.get("numpyro loop"):
            found["to_numpyro"] = found["numpyro loop"]["microseconds"] / ours["microseconds"]
    return found


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two models, short blocks")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, particles, budget, kind = args.worker
        run = run_numpyro if kind.startswith("numpyro") else run_torch
        kind = kind.removeprefix("numpyro ").rstrip("/") if run is run_numpyro else kind
        print(json.dumps(run(name, int(particles), float(budget), kind)))
        return
    cases = [(name, k) for name in PROGRAMS for k in (1, 10)] + list(VARIANTS.items())
    if args.quick:
        cases = [("eight schools", 1), ("gamma poisson", 10)]
    if args.only is not None:
        cases = [(name, k) for name, k in cases if name in args.only]
    titles = "".join(f"{way:>16}" for way in WAYS) + f"{'cold s':>9}{'warm s':>8}{'ratio':>7}{'break-even':>12}"
    print(f"{'microseconds a step':<28}{titles}")
    rows = []
    for name, particles in cases:
        row = measure(name, particles, 0.5 if args.quick else 4.0)
        rows.append(row)
        times = "".join(f"{row[w]['microseconds']:>16.1f}" if row.get(w) else f"{'-':>16}" for w in WAYS)
        ours = row["compiled"] or {"first": math.nan}
        print(
            f"{row['model'] + f', K = {particles}':<28}{times}{ours['first']:>9.1f}{ours.get('warm', math.nan):>8.1f}"
            f"{row.get('ratio', math.nan):>7.0f}{row.get('break_even') or '-':>12}",
            flush=True,
        )
    summarise(rows)
    if args.output:
        from timing import versions

        args.output.write_text(json.dumps({"rows": rows, "versions": versions()}, indent=2) + "\n")


def summarise(rows: list[dict[str, Any]]) -> None:
    """Print geometric means."""
    for key, what in (("ratio", "SVI.step"), ("to_numpyro", "NumPyro's loop")):
        values = [row[key] for row in rows if key in row]
        if values:
            print(f"{statistics.geometric_mean(values):.1f} times as fast as {what}, geometric mean of {len(values)}")


if __name__ == "__main__":
    main()
