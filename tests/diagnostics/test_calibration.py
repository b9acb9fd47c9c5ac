"""Calibration: exact posteriors have uniform ranks, wrong ones are named for what is wrong with them."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_elbo_ext.diagnostics.calibration import calibrate, symmetry_p_value, uniformity_p_value
from tests.cases import global_model, local_model

NUM = 4


def model(num=NUM):
    g = pyro.sample("g", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("data", num):
        pyro.sample("x", dist.Normal(g, 1.0), obs=torch.zeros(num))


def fit(width=1.0, shift=0.0, draws=False):
    """The exact posterior, its standard deviation times ``width``, its mean moved by ``shift`` of them."""

    def refit(seen):
        sd = (1 + NUM) ** -0.5
        q = dist.Normal(seen["x"].sum() / (1 + NUM) + shift * sd, width * sd)

        def guide(num=NUM):
            pyro.sample("g", q)

        return {"g": q.sample((99,))} if draws else guide

    return refit


WRONG = {
    "draws too narrow": {"width": 0.5},
    "draws too wide": {"width": 2.0},
    "draws too high": {"shift": 0.7},
    "draws too low": {"shift": -0.7},
}


def test_exact_posterior_is_uniform():
    found = calibrate(model, fit(), num_simulations=150)
    assert found.ranks["g"].shape == (150, 1) and found.p_value > 0.01
    assert found.describe() == {} and float(found.symmetric["g"]) > 0.01


@pytest.mark.parametrize("what", WRONG)
def test_wrong_posteriors_are_named(what):
    found = calibrate(model, fit(**WRONG[what], draws=True), num_simulations=150, seed=0)
    assert found.describe() == {"g": what} and found.p_value < 1e-3
    shifted = "shift" in WRONG[what]
    assert (float(found.symmetric["g"]) < 0.01) == shifted  # only a shift is asymmetric


def test_draws_do_as_well_as_a_guide():
    assert calibrate(model, fit(draws=True), num_simulations=150, seed=0).describe() == {}


def test_components_are_apart():
    def refit(seen):
        g = torch.zeros(99)
        width = torch.tensor([0.5**0.5] * 7 + [0.1])
        return {"g": g, "z": seen["x"] / 2 + width * torch.randn(99, 8)}

    def model():
        pyro.sample("g", dist.Delta(torch.tensor(0.0)))
        local_model()

    found = calibrate(model, refit, num_simulations=100)
    assert found.describe() == {"z[7]": "draws too narrow"}
    assert found.uniform["z"].shape == (8,)


def test_p_values_are_uniform_under_the_null():
    ranks = torch.randint(0, 100, (100, 400))
    for p in (uniformity_p_value(ranks, 99), symmetry_p_value(ranks, 99, num_flips=199)):
        for level in (0.1, 0.5):
            assert float((p < level).double().mean()) == pytest.approx(level, abs=0.08)


def test_random_state_and_store():
    state = torch.get_rng_state()
    first, second = (calibrate(model, fit(), num_simulations=10, seed=5).ranks["g"] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(state, torch.get_rng_state())


BAD = {
    "few": (lambda: calibrate(model, fit(), num_simulations=5), "num_simulations >= 10"),
    "missing": (lambda: calibrate(global_model, fit(draws=True)), "no 99 draws of latent site 'z'"),
    "shape": (lambda: calibrate(model, lambda seen: {"g": torch.zeros(99, 2)}), r"shape \(99, 2\)"),
    "count": (lambda: calibrate(model, lambda seen: {"g": torch.zeros(50)}), "no 99 draws"),
    "subsampled": (lambda: calibrate(local_model, fit(), (4,)), "'data' is subsampled"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
