"""Loads the scripts of models/ as modules, and runs them."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
from pyro import poutine

from pyro_elbo_ext.diagnostics import posterior_draws

FOLDER = Path(__file__).parents[1] / "models"


def load(name, **imported):
    """A file of the folder as a module that finds, while it is loaded, what it imports from its neighbours."""
    spec = importlib.util.spec_from_file_location(f"models_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {spec.name: module, **imported}.items():
            patch.setitem(sys.modules, key, value)
        spec.loader.exec_module(module)
    return module


HELPERS = {name: load(name) for name in ("datasets", "options", "report")}  # what the models share
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in HELPERS)
MODELS = {name: load(name, **HELPERS) for name in NAMES}


def quick_run(name, folder, *options):
    """The numbers that a quick run wrote, beside a picture."""
    assert MODELS[name].main(["--quick", "--output", str(folder), *options]) == 0
    assert {f"{name}.json", f"{name}.png"} <= {path.name for path in folder.glob("*.*")}
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / f"{name}.json").read_text())


def refusal(name, folder, capsys, *options):
    """The line that a model refuses options with."""
    with pytest.raises(SystemExit) as exit:
        MODELS[name].main(["--quick", "--output", str(folder / "out"), *options])
    printed, errors = capsys.readouterr()
    assert (exit.value.code, printed, errors.count("\n")) == (2, "", 1)
    assert not (folder / "out").exists()
    return errors


def hold_to_weighted_prior_draws(model, exact, furthest=math.inf):
    """Exact evidence, means and variances against prior draws, weighted; beyond ``furthest`` deviations all is one."""
    draws = posterior_draws(model, poutine.block(model, hide=["y"]), num_samples=200_000, chunk_size=50_000)
    w = (draws.log_weight - exact.log_evidence).exp()
    assert abs(w.mean() - 1) < 4 * w.std() / math.sqrt(len(w))
    for site, (mean, sd) in exact.moments.items():
        off = (draws.values[site].reshape(len(w), -1) - mean) / sd
        for power, expected in ((1, 0.0), (2, 1.0)):
            terms = w[:, None] * (off.clamp(-furthest, furthest) ** power - expected)
            assert (terms.mean(0).abs() < 4 * terms.std(0) / math.sqrt(len(w))).all()
