"""What one SVI step costs: time and peak memory beside Pyro's own classes, in one run.

Two models: a VAE 784-200-200-50 with K = 50 particles, held against Pyro's vectorised ``RenyiELBO(alpha=0)``; and a
model of ten scalar latents with an ``AutoNormal`` guide, held against ``Trace_ELBO``. Losses take turns, and a ratio is
the median over turns of the ratio within one turn, so a machine whose speed drifts does not matter; on a CPU it is one
thread's, of the processor's time. Memory is the growth of the peak resident set over the first steps of a fresh process
(of the allocator's peak on a GPU).

    python benchmarks/elbo_step.py [--device cuda] [--quick] [--output elbo_step.json]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from timing import compare, versions
from torch import Tensor, nn

from pyro_elbo_ext import CIWAE_ELBO, IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO, VRIWAE_ELBO, MeanField_ELBO

VAE_LOSSES: dict[str, Callable[[int], Any]] = {
    "pyro RenyiELBO(alpha=0)": lambda k: RenyiELBO(
        alpha=0, num_particles=k, vectorize_particles=True, max_plate_nesting=1
    ),
    "IWAE pathwise": lambda k: IWAE_ELBO(k, "pathwise"),
    "IWAE dreg": lambda k: IWAE_ELBO(k, "dreg"),
    "IWAE stl": lambda k: IWAE_ELBO(k, "stl"),
    "VR-IWAE dreg": lambda k: VRIWAE_ELBO(0.5, k),
    "MIWAE dreg": lambda k: MIWAE_ELBO(k),
    "CIWAE dreg": lambda k: CIWAE_ELBO(0.5, k),
    "PIWAE dreg": lambda k: PIWAE_ELBO(k),
}
TEN_LOSSES: dict[str, Callable[[int], Any]] = {
    "pyro Trace_ELBO": lambda k: Trace_ELBO(num_particles=k, vectorize_particles=k > 1, max_plate_nesting=0),
    "IWAE pathwise": lambda k: IWAE_ELBO(k, "pathwise"),
    "IWAE auto": lambda k: IWAE_ELBO(k),
    "IWAE dreg": lambda k: IWAE_ELBO(k, "dreg"),
    "MeanField": lambda k: MeanField_ELBO(k),
}


def vae(device: str, batch: int) -> tuple[Callable, Callable, tuple[Tensor]]:
    """Return model, guide and arguments of the VAE."""
    encoder = nn.Sequential(nn.Linear(784, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 100))
    decoder = nn.Sequential(nn.Linear(50, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 784))
    encoder, decoder = encoder.to(device), decoder.to(device)
    images = (torch.rand(batch, 784, device=device) > 0.8).float()
    zeros = torch.zeros(50, device=device)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, (images,)


def ten_latents(device: str) -> tuple[Callable, Callable, tuple[Tensor]]:
    """Return model, guide and arguments of the ten-latent model."""
    data = torch.tensor(3.0, device=device)

    def model(x: Tensor) -> None:
        total = sum(pyro.sample(f"z{i}", dist.Normal(torch.zeros_like(x), 1.0)) for i in range(10))
        pyro.sample("x", dist.Normal(total, 1.0), obs=x)

    guide = AutoNormal(model)
    guide(data)
    return model, guide, (data,)


def peak_memory(name: str, num_particles: int, batch: int, device: str) -> float:
    """Return how many MiB the first steps of one VAE loss need beyond what was there, in this process."""
    model, guide, args = vae(device, batch)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), loss=VAE_LOSSES[name](num_particles))
    SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), loss=VAE_LOSSES[name](1)).step(args[0][:1])
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for _ in range(3):
        svi.step(*args)
    after = torch.cuda.max_memory_allocated() if device != "cpu" else 0
    after = after or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (after - before) / 2**20


def memory_in_fresh_process(name: str, options: argparse.Namespace) -> float:
    """Return :func:`peak_memory`, the median over processes of their own."""
    command = [sys.executable, __file__, "--memory-of", name, "--device", options.device]
    found = [float(subprocess.check_output(command, text=True)) for _ in range(1 if options.quick else 3)]
    return statistics.median(found)


def table(title: str, rows: dict[str, dict[str, float]]) -> None:
    """Print one comparison."""
    print(f"\n{title}\n{'loss':26}{'ms/step':>10}{'ratio':>8}{'quartiles':>16}{'peak MiB':>10}{'ratio':>8}")
    for name, row in rows.items():
        memory = f"{row['mib']:10.0f}{row['mib_ratio']:8.2f}" if "mib" in row else ""
        spread = f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
        print(f"{name:26}{row['ms']:10.2f}{row['ratio']:8.2f}{spread:>16}{memory}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run both comparisons, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--memory-of", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.memory_of:
        print(peak_memory(options.memory_of, 50, 400, options.device))
        return 0
    turns, steps = (5, 3) if options.quick else (21, 10)
    rows = {"VAE, K = 50, batch 20": compare_vae(options, steps, turns)}
    for k in (1, 10):
        for validate in (True, False):
            pyro.clear_param_store()
            losses = {name: make(k) for name, make in TEN_LOSSES.items()}
            title = f"ten latents, K = {k}, validation {'on' if validate else 'off'}"
            with pyro.validation_enabled(validate):
                rows[title] = compare(losses, ten_latents(options.device), 4 * steps, turns, options.device)
    print(f"{options.device}, {torch.get_num_threads()} threads, {versions()}")
    for title, found in rows.items():
        table(title, found)
    if options.output:
        options.output.write_text(
            json.dumps({"versions": versions(), "device": options.device, "rows": rows}, indent=1)
        )
    return 0


def compare_vae(options: argparse.Namespace, steps: int, turns: int) -> dict[str, dict[str, float]]:
    """Time the VAE's losses and add their peak memory."""
    losses = {name: make(50) for name, make in VAE_LOSSES.items()}
    found = compare(losses, vae(options.device, 20), steps, turns, options.device)
    names = list(VAE_LOSSES)[: 3 if options.quick else 4]
    for name in names:
        found[name]["mib"] = memory_in_fresh_process(name, options)
        found[name]["mib_ratio"] = found[name]["mib"] / found[names[0]]["mib"]
    return found


if __name__ == "__main__":
    raise SystemExit(main())
