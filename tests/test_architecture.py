"""Arrows point down, importing changes nothing, optional libraries stay out."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyro_elbo_ext"
FLOORS = [
    {"bounds", "families", "tracing"},
    {"sites"},
    {"plates"},
    {"dependencies", "handlers"},
    {"particles"},
    {"gradients", "guides", "natural"},
    {"elbo", "diagnostics"},
    {"export", "run"},
    {"testing", "arviz", "plots", "autofit"},
]
# Each optional library in the one module that wraps it, imported when that is used.
OPTIONAL = {"guides/zuko.py": "zuko", "arviz.py": "arviz", "plots.py": "matplotlib"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


def room(module):
    return module.split(".")[0]


def floor(name):
    return next(level for level, rooms in enumerate(FLOORS) if name in rooms)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down(path):
    own = room(str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."))
    for module in imports(path):
        if module.startswith("pyro_elbo_ext."):
            other = room(module.removeprefix("pyro_elbo_ext."))
            assert other == own or floor(other) < floor(own), f"{own} imports {other}"
        own_library = OPTIONAL.get(path.relative_to(PACKAGE).as_posix())
        assert room(module) not in {"models", "tests", "benchmarks", *OPTIONAL.values()} - {own_library}


def test_bounds_know_no_pyro():
    assert not any(room(module).startswith("pyro") for module in imports(PACKAGE / "bounds.py"))


def test_importing_changes_nothing():
    code = """
import sys, torch, pyro
from torch.distributions import Distribution
before = (pyro.settings.get(), Distribution._validate_args, torch.get_default_dtype(), torch.get_rng_state().tolist())
import pyro_elbo_ext
after = (pyro.settings.get(), Distribution._validate_args, torch.get_default_dtype(), torch.get_rng_state().tolist())
assert before == after
assert not {"zuko", "arviz", "matplotlib"} & set(sys.modules)
assert all(hasattr(pyro_elbo_ext, name) for name in pyro_elbo_ext.__all__)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_no_assert_and_no_print_in_the_library():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            assert not isinstance(node, ast.Assert), path
            assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), path
