"""Runs the tests in several environments: Python, torch, Pyro and ArviZ from the oldest supported to the newest.

    python tests/matrix.py [--list] [--only NAME ...] [--tests PATH ...] [--download] [--folder DIR]

Each row of ``ENVIRONMENTS`` gets a virtual environment in ``.matrix/``, the project as `make test` installs it, and the
tests that are not slow. torch is taken from what pip finds on the disk (``PIP_FIND_LINKS``), for elsewhere it is
gigabytes; ``--download`` takes it from wherever pip looks. A row whose interpreter or versions are not to be had is not
run, and the table says why: that is no failure. The exit status is 1 if tests failed, and 2 if no row could be run.
``PYTEST_XDIST_AUTO_NUM_WORKERS`` bounds the processes. It needs a python3 with pip, and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
EXTRAS = ".[flows,arviz,examples,dev]"
SHOWN = ("torch", "pyro-ppl", "arviz", "numpy")
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "nbclient", "nbformat", "ipykernel")  # pinned in every row
OF_THEIR_TIME = {"pyparsing": "==3.0.*"}  # what the oldest of the others need: newer ones warn of matplotlib's calls
LIMIT = 3600  # seconds that a row's tests may take


class Environment(NamedTuple):
    """A row of the table.

    Attributes:
        python: its version, as in ``python3.12``.
        pins: versions in the place of those of ``constraints.txt``; "" for any.
        base: "pinned" to ``constraints.txt``, "oldest" that ``pyproject.toml`` allows, or "newest".
    """

    python: str
    pins: Mapping[str, str] = {}
    base: str = "pinned"


ENVIRONMENTS = {
    "oldest": Environment("3.10", base="oldest"),
    "3.10": Environment("3.10"),
    "3.11": Environment("3.11"),
    "3.11, pyro 1.9.1": Environment("3.11", {"pyro-ppl": "==1.9.1"}),
    "3.11, old libraries": Environment("3.11", {"torch": "==2.13.0", "numpy": "==1.26.*"}, base="oldest"),
    "3.12": Environment("3.12"),
    "3.13": Environment("3.13"),
    "newest": Environment("3.13", base="newest"),
}  # fmt: skip


class NotRun(Exception):
    """An environment that is not to be had here."""


class Row(NamedTuple):
    """What became of an environment: installed versions, and the tests' result or why there is none."""

    name: str
    versions: str
    result: str
    failed: bool = False
    ran: bool = False


def constraints(environment: Environment) -> str:
    """Return the text of a file of constraints."""
    pinned, pins = (ROOT / "constraints.txt").read_text(), dict(environment.pins)
    if environment.base == "oldest":
        lowest = re.findall(r'"([\w-]+)>=([\d.]+)"', _runtime((ROOT / "pyproject.toml").read_text()))
        pins = {name: f"=={version}.*" for name, version in lowest} | OF_THEIR_TIME | pins
    lines = []
    for line in pinned.splitlines():
        name = re.match(r"[\w-]*", line)[0]
        if name and name not in pins and (environment.base == "pinned" or name in TOOLS):
            lines.append(line)
    return "\n".join([*lines, *(name + version for name, version in pins.items() if version)]) + "\n"


def _runtime(pyproject: str) -> str:
    """What users install: from ``dependencies`` to the extras for development."""
    return pyproject[pyproject.index("dependencies = [") : pyproject.index("notebooks = [")]


def interpreter(version: str) -> str:
    """Return a path of this Python, on the PATH or of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python")))]
    for path in filter(None, found):
        done = _run([path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
        if done.stdout.strip() == version:  # pyenv's shims are there without a Python behind them
            return path
    raise NotRun(f"no python{version} on the PATH or in {pyenv}")


def _run(command: Sequence[str | Path], **settings: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT, **settings)


def install(environment: Environment, folder: Path, download: bool) -> Path:
    """Make the environment, unless it is there, and return its Python."""
    python, text = folder / "bin" / "python", constraints(environment)
    key = hashlib.sha256((text + (ROOT / "pyproject.toml").read_text()).encode()).hexdigest()
    ready = folder / "ready"
    if ready.exists() and ready.read_text() == key:
        return python
    base = interpreter(environment.python)
    shutil.rmtree(folder, ignore_errors=True)
    _must([base, "-m", "venv", "--without-pip", folder])
    (folder / "constraints.txt").write_text(text)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "-c", folder / "constraints.txt"]
    if not download:
        _must([*pip, "--no-index", "--no-deps", "torch"], "torch is not on this disk (--download fetches it): ")
    _must([*pip, "-e", EXTRAS])
    ready.write_text(key)
    return python


def _must(command: Sequence[str | Path], why: str = "") -> None:
    done = _run(command)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR") and "ResolutionImpossible" not in line]
        raise NotRun(why + (errors or lines or [f"exit status {done.returncode}"])[-1].removeprefix("ERROR: "))


def versions(python: Path) -> str:
    """Return the versions of what matters, in the order of ``SHOWN``."""
    code = f"import importlib.metadata as m, json; print(json.dumps([m.version(name) for name in {SHOWN!r}]))"
    return ", ".join(json.loads(_run([python, "-c", code], check=True).stdout))


def run_tests(python: Path, paths: Sequence[str], log: Path) -> tuple[str, bool]:
    """Run the tests; return pytest's counts and whether any failed."""
    started = time.perf_counter()
    command = [python, "-m", "pytest", "-n", "auto", "--dist", "loadfile", "-p", "no:cacheprovider", *paths]
    try:
        done = _run(command, timeout=LIMIT, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    except subprocess.TimeoutExpired:
        return f"FAILED: not done in {LIMIT} s", True
    log.write_text(done.stdout + done.stderr)
    seconds = time.perf_counter() - started
    counts = re.findall(r"\d+ (?:passed|failed|errors?|skipped|xfailed|warnings?)", done.stdout[-500:])
    found = f"{', '.join(counts) or f'exit status {done.returncode}'}, {seconds:.0f} s"
    return (f"FAILED: {found}; see {log}" if done.returncode else found), done.returncode != 0


def rows(names: Sequence[str], paths: Sequence[str], folder: Path, download: bool) -> Iterator[Row]:
    """Run the environments in turn."""
    for name in names:
        environment, own = ENVIRONMENTS[name], folder / re.sub(r"[^\w.]+", "-", name)
        try:
            own.parent.mkdir(parents=True, exist_ok=True)
            python = install(environment, own, download)
        except NotRun as error:
            yield Row(name, "", f"not run: {error}")
            continue
        found = versions(python)
        yield Row(name, found, *run_tests(python, paths, own / "log.txt"), ran=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a shell, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the environments and what they pin, and run none")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(ENVIRONMENTS), help="some environments")
    parser.add_argument("--tests", nargs="+", metavar="PATH", default=[], help="some tests")
    parser.add_argument("--download", action="store_true", help="take torch from the registry, too")
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="of the environments, which are kept")
    given = parser.parse_args(arguments)
    names = given.only or list(ENVIRONMENTS)
    if given.list:
        for name in names:
            pins = [line for line in constraints(ENVIRONMENTS[name]).splitlines() if not line.startswith("#")]
            say(f"{name} | python {ENVIRONMENTS[name].python} | {', '.join(pins)}")
        return 0
    say(f"environment | {', '.join(SHOWN)} | tests")
    done = []
    for row in rows(names, given.tests, given.folder.resolve(), given.download):
        done.append(row)
        say(" | ".join(row[:3]))
    return 1 if any(row.failed for row in done) else 0 if any(row.ran for row in done) else 2


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
