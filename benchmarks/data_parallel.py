"""What a second process brings: DistributedSVI with b rows on each of two processes against SVI with 2 b rows on one.

A VAE 784-hidden-hidden-20 at a few sizes. The two settings take turns, and so do steps of b rows on one process, whose
time is what a step would take were the processes to exchange nothing. One thread a process. Efficiency is the time of
one process over twice that of two, the median over turns of the ratio within one turn; "of CPU" is the same ratio of
CPU times, in which neither waiting counts nor what else the machine is doing, and "CPU 2/1" the CPU time of a step of b
rows with the exchange over that without.

Then a model of more nodes. A ring all-reduce of n bytes over R processes takes 2 (R - 1) messages of n / R bytes, each
alpha + (n / R) / beta. Latency alpha and bandwidth beta are fitted to all-reduces timed here, between two processes of
this machine through gloo, and beside them stands an assumed network. The model assumes that every process has cores of
its own that compute as fast as one process does here, that links between all neighbours are alike, that no step waits
for a slow process, and that nothing overlaps: DistributedSVI sends gradients when all are there. It is weak scaling, b
rows on each process whatever their number.

    python benchmarks/data_parallel.py [--device cuda] [--quick] [--output data_parallel.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from pyro.infer import SVI
from timing import ratio_to, timed, versions
from torch import Tensor, nn

from pyro_elbo_ext import IWAE_ELBO
from pyro_elbo_ext.run.distributed import DistributedSVI

LATENT, PIXELS = 20, 784
NODES = (2, 4, 8, 16, 32, 64)
NETWORK = {"alpha": 50e-6, "beta": 1.25e9}  # seconds, bytes a second: 10 Gbit/s Ethernet, assumed


class Size(NamedTuple):
    """A VAE's hidden units, rows on each process, and particles."""

    hidden: int
    batch: int
    particles: int

    @property
    def title(self) -> str:
        """How it is called in the table."""
        return f"hidden {self.hidden}, b = {self.batch}, K = {self.particles}"


SIZES = (Size(64, 32, 1), Size(200, 64, 1), Size(200, 64, 8), Size(500, 64, 4))


def vae(size: Size, batch: int, rank: int, device: str, name: str = "") -> tuple[Callable, Callable, Tensor]:
    """Return model, guide and a minibatch."""
    h = size.hidden
    layers = [nn.Linear(PIXELS, h), nn.Tanh(), nn.Linear(h, h), nn.Tanh(), nn.Linear(h, 2 * LATENT)]
    encoder = nn.Sequential(*layers).to(device)
    layers = [nn.Linear(LATENT, h), nn.Tanh(), nn.Linear(h, h), nn.Tanh(), nn.Linear(h, PIXELS)]
    decoder = nn.Sequential(*layers).to(device)
    zeros, rows = torch.zeros(LATENT, device=device), (torch.rand(batch, PIXELS, device=device) > 0.8).float()
    index = torch.arange(batch, device=device) + rank * batch

    def model(x: Tensor) -> None:
        pyro.module("decoder" + name, decoder)
        with pyro.plate("data", 60_000, subsample=index):
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder" + name, encoder)
        with pyro.plate("data", 60_000, subsample=index):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, rows


def stepper(kind: type[SVI], size: Size, batch: int, rank: int, steps: int, device: str) -> Callable[[], None]:
    """Return what takes some steps."""
    model, guide, rows = vae(size, batch, rank, device, f" {kind.__name__} {batch}")
    svi = kind(model, guide, pyro.optim.Adam({"lr": 1e-3}), IWAE_ELBO(size.particles))

    def work() -> None:
        for _ in range(steps):
            svi.step(rows)

    return work


def time_size(size: Size, rank: int, steps: int, turns: int, device: str) -> dict[str, Any]:
    """Return seconds a step of the three settings, turn by turn; only rank 0's are complete."""
    works = {
        "one": stepper(SVI, size, 2 * size.batch, rank, steps, device),
        "alone": stepper(SVI, size, size.batch, rank, steps, device),
        "two": stepper(DistributedSVI, size, size.batch, rank, steps, device),
    }
    pyro.clear_param_store()
    times: dict[str, list[float]] = {name: [] for name in works}
    cpu: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            torch.distributed.barrier()
            if name == "two" or rank == 0:
                start = time.process_time()
                seconds = timed(work, device) / steps
                if turn:  # the first warms up
                    times[name].append(seconds)
                    cpu[name].append((time.process_time() - start) / steps)
    floats = sum(p.numel() for fn in vae(size, 1, rank, "cpu")[:2] for p in _parameters(fn))
    return {"times": times, "cpu": cpu, "bytes": 4 * floats}


def _parameters(fn: Callable) -> list[Tensor]:
    cells = [cell.cell_contents for cell in fn.__closure__ or ()]
    return [p for cell in cells if isinstance(cell, nn.Module) for p in cell.parameters()]


def time_reduce(device: str, quick: bool) -> dict[int, float]:
    """Return the median seconds of an all-reduce, by bytes."""
    found = {}
    for floats in (
        (100, 10_000, 100_000, 1_000_000) if quick else (100, 1000, 10_000, 100_000, 300_000, 1_000_000, 3_000_000)
    ):
        buffer, times = torch.zeros(floats, device=device), []
        for _ in range(8 if quick else 40):
            torch.distributed.barrier()
            times.append(timed(lambda buffer=buffer: torch.distributed.all_reduce(buffer), device))
        found[4 * floats] = statistics.median(times[3:])
    return found


def worker(rank: int, folder: Path, options: argparse.Namespace) -> None:
    """Be one of two processes, and write what was timed."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    steps, turns = (3, 3) if options.quick else (10, 9)
    sizes = SIZES[1:2] if options.quick else SIZES
    found = {size.title: time_size(size, rank, steps, turns, options.device) for size in sizes}
    reduce = time_reduce(options.device, options.quick)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps({"sizes": found, "reduce": reduce}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start the two processes and return what they timed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--device", options.device, "--folder", folder]
        command += ["--quick"] if options.quick else []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        started = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in range(2)]
        if any([process.wait() for process in started]):
            raise RuntimeError("a process ended with an error; it is printed above")
        return json.loads((Path(folder) / "found.json").read_text())


def fit_reduce(times: dict[str, float]) -> dict[str, float]:
    """Fit t = 2 alpha + bytes / beta, in relative error, to all-reduces of two processes."""
    size = torch.tensor([float(n) for n in times], dtype=torch.float64)
    seconds = torch.tensor(list(times.values()), dtype=torch.float64)
    design = torch.stack([1 / seconds, size / seconds], -1)
    intercept, slope = (
        torch.linalg.lstsq(design, torch.ones_like(seconds)[:, None]).solution[:, 0].clamp(min=1e-12).tolist()
    )
    return {"alpha": intercept / 2, "beta": 1 / slope}


def ring(num_bytes: float, nodes: int, link: dict[str, float]) -> float:
    """Return the seconds of a ring all-reduce."""
    return 2 * (nodes - 1) * (link["alpha"] + num_bytes / nodes / link["beta"])


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """Turn times into medians, ratios and the model's predictions."""
    link = fit_reduce(found["reduce"])
    rows = {}
    for title, row in found["sizes"].items():
        times = row["times"]
        speedup = ratio_to(times["two"], times["one"])
        alone = statistics.median(times["alone"])
        rows[title] = {
            "megabytes": row["bytes"] / 1e6,
            "one_ms": 1e3 * statistics.median(times["one"]),
            "two_ms": 1e3 * statistics.median(times["two"]),
            "alone_ms": 1e3 * alone,
            "efficiency": speedup["ratio"] / 2,
            "efficiency_low": speedup["ratio_low"] / 2,
            "efficiency_high": speedup["ratio_high"] / 2,
            "cpu_efficiency": ratio_to(row["cpu"]["two"], row["cpu"]["one"])["ratio"] / 2,
            "cpu_overhead": ratio_to(row["cpu"]["alone"], row["cpu"]["two"])["ratio"],
            "model": {
                name: {nodes: alone / (alone + ring(row["bytes"], nodes, links)) for nodes in NODES}
                for name, links in (("measured link", link), ("assumed network", NETWORK))
            },
        }
    return {"rows": rows, "link": link, "network": NETWORK, "reduce_seconds_by_bytes": found["reduce"]}


def table(result: dict[str, Any]) -> None:
    """Print measurements and model."""
    heads = f"{'MB':>7}{'1 x 2b ms':>11}{'2 x b ms':>10}{'1 x b ms':>10}{'efficiency':>12}{'quartiles':>16}"
    print(f"{'VAE':28}{heads}{'of CPU':>8}{'CPU 2/1':>9}")
    for title, row in result["rows"].items():
        spread = f"{row['efficiency_low']:.2f} to {row['efficiency_high']:.2f}"
        times = f"{row['one_ms']:11.2f}{row['two_ms']:10.2f}{row['alone_ms']:10.2f}"
        print(
            f"{title:28}{row['megabytes']:7.2f}{times}{row['efficiency']:12.2f}{spread:>16}{row['cpu_efficiency']:8.2f}{row['cpu_overhead']:9.2f}"
        )
    for name, link in (("measured link", result["link"]), ("assumed network", result["network"])):
        print(f"\nmodel, {name}: alpha {1e6 * link['alpha']:.0f} us, beta {link['beta'] / 1e9:.2f} GB/s; efficiency on")
        print(f"{'nodes':28}" + "".join(f"{nodes:>7}" for nodes in NODES))
        for title, row in result["rows"].items():
            print(f"{title:28}" + "".join(f"{value:7.2f}" for value in row["model"][name].values()))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rank is not None:
        worker(options.rank, options.folder, options)
        return 0
    result = summarize(measure(options))
    print(f"{options.device}, {os.cpu_count()} cores, one thread a process, {versions()}")
    table(result)
    if options.output:
        result |= {"versions": versions(), "device": options.device, "cores": os.cpu_count()}
        options.output.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
