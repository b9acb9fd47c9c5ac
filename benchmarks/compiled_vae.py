"""CompiledSVI on a variational autoencoder beside SVI.step and a training loop written by hand for torch.compile.

A VAE of 784-200-200-50 as in Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2015, arXiv:1509.00519),
float32, on made-up binary images, trained under the importance-weighted bound with the plain gradient. The loop by hand
has the same networks, minibatches, bound and Adam in plain torch, and torch compiles its step; CompiledSVI takes the
minibatches by index inside its loop. Each way runs in a process of its own; on the CPU with one thread, in processor
time, the median of blocks of steps.

    python benchmarks/compiled_vae.py [--device cuda] [--quick] [--output compiled_vae.json]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI
from timing import clock_of, versions
from torch import Tensor, nn

from pyro_elbo_ext import IWAE_ELBO, CompiledSVI, Minibatches

PIXELS, HIDDEN, LATENT, IMAGES = 784, 200, 50, 2000
WAYS = ("eager", "by hand", "compiled")
CASES = [(20, 1), (20, 50), (128, 1), (128, 50)]  # batch size, particles


def network(inputs: int, outputs: int) -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, outputs)
    )


class VAE(nn.Module):
    """Model and guide."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = network(PIXELS, 2 * LATENT), network(LATENT, PIXELS)

    def model(self, x: Tensor) -> None:
        """p(x, z)."""
        pyro.module("decoder", self.decoder)
        with poutine.scale(scale=IMAGES / len(x)), pyro.plate("images", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), x.new_ones(LATENT)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x)."""
        pyro.module("encoder", self.encoder)
        with poutine.scale(scale=IMAGES / len(x)), pyro.plate("images", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def loss(self, x: Tensor, num_particles: int) -> Tensor:
        """The bound's negative as one would write it without Pyro."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        noise = torch.randn(num_particles, *loc.shape, device=x.device)
        z = loc + log_scale.exp() * noise
        logits = self.decoder(z)
        likelihood = -nn.functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        log_w = likelihood.sum(-1) + (log_scale + (noise.square() - z.square()) / 2).sum(-1)
        return -(IMAGES / len(x)) * (log_w.logsumexp(0) - math.log(num_particles)).sum()


def make_steps(way: str, batch_size: int, num_particles: int, device: str) -> Callable[[int], None]:
    """Return a function that takes so many steps."""
    pyro.set_rng_seed(0)
    vae = VAE().to(device)
    data = torch.bernoulli(torch.full((IMAGES, PIXELS), 0.2)).to(device)
    batches = Minibatches(data, batch_size=batch_size)
    if way == "by hand":
        optim = torch.optim.Adam(vae.parameters(), lr=1e-3)
        mode = {"mode": "reduce-overhead"} if device == "cuda" else {"options": {"cpp_wrapper": True}}
        loss = torch.compile(vae.loss, fullgraph=True, dynamic=False, **mode)

        def by_hand(number: int) -> None:
            for rows in batches.rows(number).to(device):
                optim.zero_grad()
                loss(data[rows], num_particles).backward()
                optim.step()

        return by_hand
    elbo = IWAE_ELBO(num_particles, "pathwise", max_plate_nesting=1)
    svi = (SVI if way == "eager" else CompiledSVI)(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), elbo)

    def steps(number: int) -> None:
        if isinstance(svi, CompiledSVI):
            svi.run(number, batches)
            return
        for rows in batches.rows(number):
            svi.step(*batches.take(rows))

    return steps


def worker(way: str, batch_size: int, num_particles: int, device: str, budget: float) -> dict[str, float]:
    """Time one way, in milliseconds a step."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    steps = make_steps(way, batch_size, num_particles, device)

    def timed(number: int) -> float:
        clock = clock_of(device)
        start = clock()
        steps(number)
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    start = time.perf_counter()
    steps(1)
    first = time.perf_counter() - start
    timed(3)
    size = max(2, int(budget / 7 / (timed(2) / 2)))
    each = [timed(size) / size for _ in range(7)]
    return {"first": first, "milliseconds": 1e3 * statistics.median(each), "spread": 1e3 * statistics.pstdev(each)}


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="the first two cases, short blocks")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        way, batch_size, num_particles, budget = args.worker
        print(json.dumps(worker(way, int(batch_size), int(num_particles), args.device, float(budget))))
        return
    print(
        f"{'milliseconds a step':<24}" + "".join(f"{way:>12}" for way in WAYS) + f"{'to eager':>10}{'to by hand':>12}"
    )
    rows = []
    for batch_size, num_particles in CASES[: 2 if args.quick else None]:
        row: dict[str, dict[str, float]] = {}
        for way in WAYS:
            command = [sys.executable, __file__, "--device", args.device, "--worker"]
            command += [way, str(batch_size), str(num_particles), "1" if args.quick else "8"]
            row[way] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        each = {way: found["milliseconds"] for way, found in row.items()}
        ratios = (each["compiled"] / each[way] for way in ("eager", "by hand"))
        times = "".join(f"{each[way]:>12.2f}" for way in WAYS)
        print(f"batch {batch_size:>3}, K = {num_particles:>2}{'':8}{times}{next(ratios):>10.2f}{next(ratios):>12.2f}")
        rows.append({"batch_size": batch_size, "num_particles": num_particles, **row})
    if args.output:
        args.output.write_text(json.dumps({"rows": rows, "versions": versions()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
