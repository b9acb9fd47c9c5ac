"""Run a script within a time limit, and say what machine and versions it ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

__all__ = ["installed", "machine", "processor_seconds", "run_limited", "without_paths"]

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "pyro-ppl", "numpy", "zuko", "arviz", "scikit-learn", "matplotlib", "numpyro", "jax")


def run_limited(command: list[str], limit: float, log: Path) -> tuple[str, str]:
    """Run a script and return how it ended and its last words; at the limit all it started is ended, too.

    Args:
        command: a script of this folder, and its arguments.
        limit: seconds.
        log: gets all that it prints.
    """
    with log.open("w", encoding="utf8") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=HERE, start_new_session=True, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return f"stopped at the limit of {limit:.0f} s", ""
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode == 0:
        return "ok", ""
    words = log.read_text(encoding="utf8", errors="replace").strip().splitlines()
    return f"failed with status {process.returncode}", without_paths(words[-1] if words else "no message")


def processor_seconds() -> float:
    """Return the processor's seconds of all scripts that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def without_paths(text: str) -> str:
    """Keep the names of files only."""
    return re.sub(r"(?<![\w.])/(?:[^\s/'\":]+/)+", "", text)[:200]


def machine() -> str:
    """Return model and number of the cores, and the memory."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), flags=re.M)):
        model = found[1]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {model}, {memory:.0f} GiB"


def installed() -> dict[str, str]:
    """Return the versions of what is here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
