"""The README's code runs and prints what it says."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
PRINTED = dict(re.findall(r"^(\w+_ELBO) +(-[\d.]+) nats$", README, flags=re.M))


def test_example_prints_what_it_says(capsys, request):
    if request.config.getoption("--dtype") != "float64" or request.config.getoption("--device") != "cpu":
        pytest.skip("the example chooses neither dtype nor device")
    import torch

    torch.set_default_dtype(torch.float32)
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    found = dict(re.findall(r"^(\w+_ELBO) +(-[\d.]+) nats$", capsys.readouterr().out, flags=re.M))
    assert found.keys() == PRINTED.keys() and len(found) == 2
    for name, value in found.items():
        assert float(value) == pytest.approx(float(PRINTED[name]), abs=3.0)


def test_own_bound_has_every_estimator():
    from pyro_elbo_ext.testing import conformance

    namespace = {}
    exec(compile(BLOCKS[1], "README.md", "exec"), namespace)
    checks = conformance(namespace["SoftMinimum_ELBO"], zero_variance=True, size=0.05)
    assert all(check.passed for check in checks), checks
