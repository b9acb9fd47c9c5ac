"""autofit on posteriors that are known: errors against the verdict.

    python benchmarks/autofit.py [--accuracy FOLDER] [--only NAME ...] [--seeds 2] [--output FILE]

Without a folder they are the eight schools and twenty groups of ``flow_targets.py``, whose moments are a quadrature,
and the funnel, of which v is held against its normal. A folder holds ``posteriors`` (a package with ``POSTERIORS``:
name -> model, data, reference draws, sites) and ``score.py``. Errors are in units of the reference's standard
deviation. A fit passes with every mean within 0.1, every log ratio of standard deviations within 0.15 and k-hat below
0.7; a verdict fails silently where it trusts a fit whose errors exceed those limits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from flow_targets import SCHOOLS, Target, eight_schools, exact_moments, funnel, group_data, groups
from torch import Tensor

from pyro_elbo_ext.autofit import AutofitResult, autofit

MEAN, LOG_SD, K = 0.1, 0.15, 0.7
DRAWS = 10_000


class Exact(NamedTuple):
    """A posterior with exact moments, with the names of those of a folder."""

    name: str
    target: Target
    moments: dict[str, tuple[Tensor, Tensor]]

    @property
    def model(self) -> Any:
        """The model on all the data."""
        return self.target.model

    @property
    def site_map(self) -> dict[str, str]:
        """The site of each parameter: the same."""
        return {name: name for name in self.moments}

    def data(self) -> dict[str, Any]:
        """Return the model's arguments."""
        return {"size": self.target.args[0]} if self.target.args else {}

    def reference(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return mean and standard deviation of each site; those of the funnel's x are of too long a tail to be met."""
        return self.moments


def exact_posteriors() -> dict[str, Exact]:
    """Return what is known without a folder."""
    schools, many = eight_schools(), groups(20)
    y, sigma = (torch.tensor(column) for column in SCHOOLS)
    found = (
        Exact("eight-schools", schools, exact_moments(y, sigma, 5.0)),
        Exact("groups-20", many, exact_moments(group_data(20), torch.ones(20), 2.0)),
        Exact("funnel", funnel(), {"z": (torch.zeros(1), torch.full((1,), 3.0))}),
    )
    return {posterior.name: posterior for posterior in found}


def exact_score(named: dict[str, np.ndarray], moments: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return the largest errors of mean and log standard deviation over sites."""
    means, deviations = [], []
    for name, (mean, deviation) in moments.items():
        draws = named[name][:, : mean.numel()]
        means.append(np.abs(draws.mean(0) - mean.numpy()) / deviation.numpy())
        deviations.append(np.abs(np.log(draws.std(0, ddof=1) / deviation.numpy())))
    return {
        key: float(max(np.max(e) for e in found))
        for key, found in (("mean_error_max", means), ("log_sd_ratio_max", deviations))
    }


def choose(folder: Path | None) -> tuple[dict[str, Any], Any]:
    """Return posteriors and their score."""
    if folder is None:
        return exact_posteriors(), exact_score
    sys.path.insert(0, str(folder.resolve()))
    from posteriors import POSTERIORS  # noqa: PLC0415
    from score import score  # noqa: PLC0415

    return POSTERIORS, score


def fit(posterior: Any, score: Any, seed: int, verbose: bool) -> dict[str, Any]:
    """Fit one posterior and return its row."""
    pyro.clear_param_store()
    data = posterior.data()
    start, cpu = time.perf_counter(), time.process_time()
    result = autofit(posterior.model, seed=seed, progress=print if verbose else None, **data)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    if verbose:
        print(result.report)
    errors = measure(result, posterior, score)
    inside = errors["mean_error_max"] <= MEAN and errors["log_sd_ratio_max"] <= LOG_SD
    report = result.report
    return {
        "posterior": posterior.name,
        "seed": seed,
        "mean": errors["mean_error_max"],
        "log_sd": errors["log_sd_ratio_max"],
        "k": report.k,
        "ess": report.ess,
        "log_evidence": report.log_evidence,
        "evidence_error": report.log_evidence - posterior.target.log_evidence if isinstance(posterior, Exact) else None,
        "moments": {site: [m.tolist(), sd.tolist()] for site, (m, sd) in posterior.moments.items()}
        if isinstance(posterior, Exact)
        else None,
        "trusted": report.trusted,
        "passes": bool(inside and report.k < K),
        "silent": bool(report.trusted and not inside),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "rung": report.chosen,
        "reasons": list(report.reasons),
    }


def measure(result: AutofitResult, posterior: Any, score: Any) -> dict[str, float]:
    """Return errors of the resampled draws against the reference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a posterior is not trusted is what the table says
        draws = result.posterior(DRAWS, seed=0)
    named = {
        parameter: draws[site].detach().cpu().double().reshape(DRAWS, -1).numpy()
        for parameter, site in posterior.site_map.items()
    }
    return score(named, posterior.reference())


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    numbers = f"{row['mean']:8.3f}{row['log_sd']:8.3f}{row['k']:8.2f}{row['ess']:9.0f}"
    verdict = "trusted" if row["trusted"] else "no"
    mark = "pass" if row["passes"] else "SILENT" if row["silent"] else "-"
    times = f"{row['seconds']:8.1f}{row['cpu_seconds']:8.1f}"
    return f"{row['posterior']:28}{row['seed']:5}{numbers}  {verdict:8}{mark:7}{times}  {row['rung']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for, print it, write JSON; exit 1 on a silent failure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accuracy", type=Path, default=None, help="folder of posteriors and their score")
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    posteriors, score = choose(options.accuracy)
    head = f"{'posterior':28}{'seed':>5}{'mean':>8}{'log sd':>8}{'k-hat':>8}{'ess':>9}  {'verdict':15}"
    print(f"{head}{'seconds':>8}{'cpu':>8}  rung", flush=True)
    rows = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for name in options.only or posteriors:
            rows.append(fit(posteriors[name], score, seed, options.verbose))
            print(line(rows[-1]), flush=True)
            if options.output:
                options.output.write_text(json.dumps(rows, indent=1), encoding="utf8")
    passes, silent = sum(row["passes"] for row in rows), sum(row["silent"] for row in rows)
    median = statistics.median(row["seconds"] for row in rows)
    trusted = sum(row["trusted"] for row in rows)
    print(f"{passes} of {len(rows)} pass, {trusted} trusted, {silent} silent failures, median {median:.1f} s")
    return int(silent > 0)


if __name__ == "__main__":
    raise SystemExit(main())
