"""Run every model of ``models/`` as it comes, seed 0, and keep the table that it prints.

python benchmarks/gallery.py [--quick] [--only vae lda ...] [--output gallery.json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timing import versions

MODELS = Path(__file__).resolve().parents[1] / "models"
HELPERS = ("datasets", "options", "report")
NAMES = sorted(path.stem for path in MODELS.glob("*.py") if path.stem not in HELPERS)
OTHERWISE: dict[str, tuple[tuple[str, ...], ...]] = {
    "bayesian_regression": (("--family", "linear"),),
    "state_space": (("--kind", "volatility"),),
    "flow_vae": (*(("--seed", str(seed)) for seed in range(1, 5)), ("--steps", "400")),
    "two_modes": tuple(("--seed", str(seed)) for seed in range(1, 5)),
}


def choose(names: Sequence[str], quick: bool) -> list[tuple[str, tuple[str, ...]]]:
    """Return models and their arguments: as they come first, then otherwise."""
    if quick:
        return [(name, ("--quick",)) for name in names]
    return [(name, ()) for name in names] + [(name, other) for name in names for other in OTHERWISE.get(name, ())]


def run(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Return a model's table, what it prints, and the seconds it takes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(MODELS / f"{name}.py"), "--output", folder, *arguments]
        start = time.perf_counter()
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds = time.perf_counter() - start
        found = json.loads((Path(folder) / f"{name}.json").read_text())
    lines = [line for line in printed.splitlines() if folder not in line]  # where the picture is
    title = " ".join((name, *arguments))
    return {"run": title, "seconds": seconds, "printed": "\n".join(lines), "table": found["table"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the models one after the other, print what they print, write JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models and few steps, which show that they run")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for name, arguments in choose(options.only, options.quick):
        rows.append(run(name, arguments))
        print(f"{rows[-1]['run']}, {rows[-1]['seconds']:.0f} s\n{rows[-1]['printed']}\n", flush=True)
        if options.output:
            options.output.write_text(
                json.dumps({"quick": options.quick, "rows": rows, "versions": versions()}, indent=1)
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
