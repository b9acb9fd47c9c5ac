"""Loads the scripts of models/ as modules, and runs them."""

import importlib.util
import json
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
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in HELPERS)
MODELS = {name: load(name, **HELPERS) for name in NAMES}


def quick_run(name, folder, *options):
    """The numbers that a quick run wrote, beside a picture."""
    assert MODELS[name].main(["--quick", "--output", str(folder), *options]) == 0
    assert {f"{name}.json", f"{name}.png"} <= {path.name for path in folder.glob("*.*")}
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / f"{name}.json").read_text())
