"""Loads the scripts of models/ as modules."""

import importlib.util
import sys
from pathlib import Path

import pytest

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
NAMES = (
    "vae",
    "sigmoid_belief_network",
    "gaussian_mixture",
    "bayesian_regression",
    "bnn",
    "lda",
    "flow_vae",
    "two_modes",
)
MODELS = {name: load(name, **HELPERS) for name in NAMES}
