"""The README's code runs and prints what it says."""

import re
from pathlib import Path

import pytest
import torch

from pyro_elbo_ext.arviz import _import_arviz

_import_arviz()  # the first import of a day warns of its next major

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
PRINTED = re.findall(r"^(\w+_ELBO) +(-[\d.]+) nats$", README, flags=re.M)


@pytest.fixture
def printed_by(capsys, request):
    """Runs a block of the README as it stands there, and returns what it prints."""
    if request.config.getoption("--dtype") != "float64" or request.config.getoption("--device") != "cpu":
        pytest.skip("the examples choose neither dtype nor device")

    def run(block, namespace=None):
        torch.set_default_dtype(torch.float32)
        exec(compile(BLOCKS[block], "README.md", "exec"), {} if namespace is None else namespace)
        return capsys.readouterr().out

    return run


# The rows of the second example lie more than a hundred nats apart, and its draws of bits may differ by machine.
EXAMPLES = {"first": (0, slice(0, 2), 3.0), "discrete": (1, slice(2, 5), 40.0)}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_prints_what_it_says(name, printed_by):
    block, lines, tolerance = EXAMPLES[name]
    found = re.findall(r"^(\w+_ELBO) +(-[\d.]+) nats$", printed_by(block), flags=re.M)
    expected = PRINTED[lines]
    assert [name for name, _ in found] == [name for name, _ in expected] and len(PRINTED) == 5
    for (_, value), (_, printed) in zip(found, expected, strict=True):
        assert float(value) == pytest.approx(float(printed), abs=tolerance)


@pytest.mark.convergence
def test_natural_gradients_print_what_they_say(printed_by):
    printed = re.compile(r"^(\w+) +after +(\d+) steps +(-[\d.]+) nats$", flags=re.M)
    out = printed_by(3)
    expected, found = printed.findall(README), printed.findall(out)
    assert [row[:2] for row in found] == [row[:2] for row in expected] and len(expected) == 3
    for (name, steps, value), (_, _, said) in zip(found, expected, strict=True):
        assert float(value) == pytest.approx(float(said), abs=10 if steps == "10" and name == "Adam" else 0.5)
    assert "_AutoMultivariateNormal_latent  MultivariateNormal" in out


def test_flow_guides_print_what_they_say(printed_by):
    printed = re.compile(r"^(Auto\w+) +(-[\d.]+) nats$", flags=re.M)
    expected, found = dict(printed.findall(README)), dict(printed.findall(printed_by(4)))
    assert list(found) == list(expected) and len(expected) == 3
    assert float(found["AutoMultivariateNormal"]) < -33  # 1.7 nats below at best, and not yet there
    for name in ("AutoFlow", "AutoPlatedFlow"):
        assert float(found[name]) == pytest.approx(float(expected[name]), abs=0.1)


@pytest.mark.convergence
def test_a_fit_is_judged_and_kept_as_it_says(printed_by):
    out = printed_by(5)
    said = re.findall(r"^mu +(-?[\d.]+) +([\d.]+)", README, flags=re.M)[0]
    found = re.findall(r"^mu +(-?[\d.]+) +([\d.]+)", out, flags=re.M)[0]
    assert [float(value) for value in found] == pytest.approx([float(value) for value in said], abs=0.4)
    assert re.search(r"^loss 31\.[234]\d ± 0\.\d\d nats after 1200 steps", out, flags=re.M)
    assert "verdict         REWEIGHT: use the draws with their importance weights" in out


def test_one_call_is_trusted(printed_by):
    namespace = {}
    exec(compile(BLOCKS[5].partition("guide = ")[0], "README.md", "exec"), namespace)
    assert "trusted" in printed_by(6, namespace).splitlines()[0]
    assert namespace["fitted"].report.trusted
    assert float(namespace["draws"]["mu"].mean()) == pytest.approx(4.4, abs=0.5)


@pytest.mark.convergence
def test_compiled_steps_train(printed_by):
    namespace = {}
    printed = re.findall(r"^(\w+) +\d+ microseconds a step$", printed_by(7, namespace), flags=re.M)
    assert printed == ["SVI", "CompiledSVI"]
    losses = namespace["losses"]
    assert losses.shape == (20_000,)
    assert losses[-1000:].mean() < losses[:10].mean() - 50
    assert namespace["svi"].how == "loop"


def test_own_bound_has_every_estimator():
    from pyro_elbo_ext.testing import conformance

    namespace = {}
    exec(compile(BLOCKS[8], "README.md", "exec"), namespace)
    checks = conformance(namespace["SoftMinimum_ELBO"], zero_variance=True, size=0.05)
    assert all(check.passed for check in checks), checks


def test_the_neural_baseline_runs_on_the_second_example(capsys):
    import torch
    from pyro.infer import SVI
    from pyro.optim import Adam

    namespace = {}
    first_half = BLOCKS[1].partition("pyros = ")[0]
    torch.set_default_dtype(torch.float32)
    exec(compile(first_half + BLOCKS[2], "README.md", "exec"), namespace)
    before = namespace["net"][0].weight.detach().clone()
    svi = SVI(namespace["model"], namespace["guide"], Adam({"lr": 0.01}), namespace["loss"])
    for _ in range(3):
        svi.step()
    assert not torch.equal(before, namespace["net"][0].weight)
