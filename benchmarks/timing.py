"""What the benchmarks share: timing in turns, and what a result must say about where it came from."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import SVI

from pyro_elbo_ext import __version__


def synchronize(device: str) -> None:
    """Wait for what a GPU still has to do."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def clock_of(device: str) -> Callable[[], float]:
    """Return the clock to time steps by: on a CPU the processor's, which other work beside hardly moves."""
    return time.process_time if device == "cpu" else time.perf_counter


def timed(work: Callable[[], Any], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds that a call takes."""
    synchronize(device)
    start = clock()
    work()
    synchronize(device)
    return clock() - start


def take_turns(
    losses: dict[str, Any],
    pair: tuple,
    steps: int,
    turns: int,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds a step takes under every loss, turn by turn, so that a drifting machine hits all alike."""
    model, guide, args = pair
    svis = {name: SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), loss=loss) for name, loss in losses.items()}
    times: dict[str, list[float]] = {name: [] for name in svis}
    for turn in range(turns + 1):
        for name, svi in svis.items():
            seconds = timed(lambda svi=svi: [svi.step(*args) for _ in range(steps)], device, clock)
            if turn:  # the first warms up
                times[name].append(seconds / steps)
    return times


def ratio_to(reference: list[float], found: list[float]) -> dict[str, float]:
    """Return median and quartiles over turns of the ratio within one turn."""
    ratios = sorted(mine / theirs for mine, theirs in zip(found, reference, strict=True))
    return {
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-1 - len(ratios) // 4],
    }


def compare(losses: dict[str, Any], pair: tuple, steps: int, turns: int, device: str) -> dict[str, dict[str, float]]:
    """Time the losses in turns by the device's clock; the first is the reference of the ratios."""
    times = take_turns(losses, pair, steps, turns, device, clock_of(device))
    reference = next(iter(times.values()))
    return {name: {"ms": 1e3 * statistics.median(found)} | ratio_to(reference, found) for name, found in times.items()}


def versions() -> dict[str, str]:
    """Return what a reader needs to run the same again."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "pyro": pyro.__version__}
    return found | {"pyro_elbo_ext": __version__}
