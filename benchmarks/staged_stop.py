"""The staged stop beside constant step sizes, from four starts: where each ends, and after how many steps.

An ill-conditioned regression of 500 rows on 10 correlated columns, whose scales span a factor of ten, with unknown
noise; ``AutoNormal``, Adam, ``Trace_ELBO`` with one particle; step sizes 0.1 and 0.01, all rows or 25 of them in each
step. Constant runs take 6000 steps. What is compared is the ELBO at the end, from 20000 fresh particles with all rows.

    python benchmarks/staged_stop.py [--quick] [--output staged_stop.json] [--seeds 3]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from timing import versions

from pyro_elbo_ext import fit

ROWS, COLUMNS = 500, 10
STARTS = [(rate, batch) for rate in (0.1, 0.01) for batch in (None, 25)]
LIMIT = 0.6  # nats below the best constant run


def make_model(seed: int = 0) -> Any:
    """Return the regression, a function of the size of the minibatch."""
    generator = torch.Generator().manual_seed(seed)
    noise, common = torch.randn(ROWS, COLUMNS, generator=generator), torch.randn(ROWS, 1, generator=generator)
    x = (noise + 0.9 * common) * torch.logspace(0, -1, COLUMNS)
    y = x @ torch.randn(COLUMNS, generator=generator) + 0.3 * torch.randn(ROWS, generator=generator)

    def model(batch: int | None) -> None:
        weights = pyro.sample("weights", dist.Normal(torch.zeros(COLUMNS), 5.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("data", ROWS, subsample_size=batch) as rows:
            pyro.sample("y", dist.Normal((weights * x[rows]).sum(-1), sigma), obs=y[rows])

    return model


@torch.no_grad()
def elbo(model: Any, guide: Any, chunks: int = 10) -> float:
    """Return the ELBO in nats, of common noise for all runs."""
    pyro.set_rng_seed(99)
    loss = Trace_ELBO(2000, vectorize_particles=True, max_plate_nesting=1).loss
    return -float(np.mean([loss(model, guide, None) for _ in range(chunks)]))


def train(model: Any, rate: float, batch: int | None, stop: str, num_steps: int, seed: int) -> dict[str, Any]:
    """Train from one start and return the ELBO, the steps and the seconds that it took."""
    pyro.clear_param_store()
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": rate}), Trace_ELBO())
    start = time.process_time()
    result = fit(svi, batch, num_steps=num_steps, stop=stop, seed=seed, progress=False)
    seconds = time.process_time() - start
    return {"elbo": elbo(model, guide), "steps": result.num_steps, "stopped": result.stopped, "seconds": seconds}


def main() -> None:
    """Run all starts and seeds, print a line for each, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, short constant runs: a look at the table")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    num_seeds, num_steps = (1, 1000) if args.quick else (args.seeds, 6000)
    model, rows = make_model(), []
    print(f"{'seed':>4} {'rate':>5} {'batch':>5} {'constant ELBO':>14} {'staged ELBO':>12} {'steps':>6} {'stopped':>8}")
    for seed in range(num_seeds):
        for rate, batch in STARTS:
            constant = train(model, rate, batch, "budget", num_steps, seed)
            staged = train(model, rate, batch, "staged", 5 * num_steps, seed)
            rows.append({"seed": seed, "rate": rate, "batch": batch, "constant": constant, "staged": staged})
            print(
                f"{seed:>4} {rate:>5} {batch or 'all':>5} {constant['elbo']:>14.2f} {staged['elbo']:>12.2f} "
                f"{staged['steps']:>6} {staged['stopped']:>8}",
                flush=True,
            )
    best = max(row["constant"]["elbo"] for row in rows)
    worst = min(row["staged"]["elbo"] for row in rows)
    print(f"best constant run {best:.2f}, worst staged run {worst:.2f}: {best - worst:.2f} nats below ({LIMIT} asked)")
    if args.output:
        report = {"rows": rows, "best_constant": best, "worst_staged": worst, "limit": LIMIT, "versions": versions()}
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
