"""Run the README's code blocks as they stand there, keep what they print, and the log evidence that it tells of.

The evidence of the first example is a closed form, that of the second a sum over all states of its bits.

    python benchmarks/readme.py [--output readme.json]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timing import versions

README = Path(__file__).resolve().parents[1] / "README.md"
# A block is known by a word in it; those with the same title share their names.
BLOCKS = {
    "twenty lines": "Exponential",
    "discrete latents": "TraceGraph_ELBO",
    "natural gradients": "NaturalGradient",
    "flow guides": "AutoPlatedFlow",
    "fit, judge, keep": "to_arviz",
    "compiled steps": "CompiledSVI",
}


def blocks(text: str) -> dict[str, str]:
    """Return the code of each title; one call comes after what it uses."""
    found = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    codes = {title: next(code for code in found if word in code) for title, word in BLOCKS.items()}
    codes["fit, judge, keep"] += next(code for code in found if "autofit" in code)
    return codes


def printed_by(code: str, names: dict[str, Any]) -> str:
    """Run code and return what it prints."""
    buffer = io.StringIO()
    with contextlib.redirect_stdout(buffer), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "README.md", "exec"), names)
    return buffer.getvalue()


def evidence(title: str, names: dict[str, Any]) -> float | None:
    """Return the log evidence of an example's data in nats, None where the README does not tell it."""
    if title == "twenty lines":  # z ~ Exponential(1), x ~ Normal(z, 1)
        x = names["data"].double()
        return (0.5 - x + torch.special.log_ndtr(x - 1)).sum().item()
    if title == "discrete latents":
        data, weight = names["data"].double(), names["weight"].double()
        states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=data.dtype)] * len(weight))
        prior = torch.distributions.Bernoulli(torch.tensor(0.3, dtype=data.dtype)).log_prob(states).sum(-1)
        likelihood = torch.distributions.Normal(states @ weight, 1.0).log_prob(data[:, None]).sum(-1)
        return (likelihood + prior).logsumexp(-1).sum().item()
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, print what they print, write JSON after every block."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for title, code in blocks(README.read_text(encoding="utf8")).items():
        names: dict[str, Any] = {"__name__": "readme"}
        start = time.perf_counter()
        text = printed_by(code, names)
        seconds = time.perf_counter() - start
        rows.append({"title": title, "seconds": seconds, "printed": text, "log_evidence": evidence(title, names)})
        exact = rows[-1]["log_evidence"]
        print(f"{title}, {seconds:.1f} s\n{text}" + (f"log evidence {exact:.1f}\n" if exact else ""), flush=True)
        if options.output:
            options.output.write_text(json.dumps({"rows": rows, "versions": versions()}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
