"""Draws and what they weigh: shapes, values against single runs, minibatches, random state."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta

from pyro_elbo_ext.diagnostics.sampling import posterior_draws
from tests.cases import (
    AUTO_GUIDES,
    MODELS,
    NUM_DATA,
    data,
    global_guide,
    global_log_evidence,
    global_model,
    local_guide,
    local_model,
    log_evidence,
)

WITH_DRAWS = [name for name in AUTO_GUIDES if name != "AutoDelta"]


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
@pytest.mark.parametrize("name", WITH_DRAWS)
def test_shapes(name, vectorize):
    guide = AUTO_GUIDES[name](MODELS["nested"])
    draws = posterior_draws(MODELS["nested"], guide, num_samples=7, chunk_size=3, vectorize=vectorize)
    assert {name: tuple(value.shape) for name, value in draws.values.items()} == {
        "a": (7, 3),
        "b": (7, 2, 3),
        "w": (7, 2, 3, 2),
    }
    assert draws.site_plates == {"a": ("inner",), "b": ("outer", "inner"), "w": ("outer", "inner")}
    assert draws.num_samples == 7 and draws.joint_log_weight.shape == (7,)
    assert draws.log_weight.shape == (7,) + (3,) * len(draws.plates)
    assert not draws.log_weight.requires_grad
    torch.testing.assert_close(draws.joint_log_weight, draws.log_weight.reshape(7, -1).sum(1))


def test_weights_are_density_ratios():
    draws = posterior_draws(global_model, global_guide, num_samples=50)
    g, z, x = draws.values["g"], draws.values["z"], data()
    joint = dist.Normal(0.0, 1.0).log_prob(g) + (
        dist.Normal(g[:, None], 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
    ).sum(1)
    proposal = dist.Normal(0.3, 0.4).log_prob(g) + dist.Normal(0.5 * g[:, None] + 0.4 * x, 0.8).log_prob(z).sum(1)
    torch.testing.assert_close(draws.log_joint, joint)
    torch.testing.assert_close(draws.log_guide, proposal)


def test_bounds_are_near_the_evidence():
    for model, guide, evidence in (
        (local_model, local_guide, log_evidence()),
        (global_model, global_guide, global_log_evidence()),
    ):
        draws = posterior_draws(model, guide, num_samples=4000, chunk_size=1000)
        assert draws.importance_weighted == pytest.approx(evidence, abs=0.1)
        assert draws.elbo < draws.importance_weighted


def test_minibatch_is_shared_and_scaled():
    draws = posterior_draws(local_model, local_guide, (4,), num_samples=1000, chunk_size=100)
    assert draws.scale == NUM_DATA / 4 and draws.log_weight.shape == (1000, 4)
    rows = draws.indices["data"]
    mean = dist.Normal(0.0, 2**0.5).log_prob(data()[rows]).sum() * NUM_DATA / 4
    assert draws.importance_weighted == pytest.approx(float(mean), abs=0.1)
    assert draws.importance_weighted != pytest.approx(float(mean) / 2, abs=0.5)


def test_elbo_is_that_of_pyro():
    draws = posterior_draws(local_model, local_guide, num_samples=30, chunk_size=30, seed=3)
    pyro.set_rng_seed(3)
    expected = Trace_ELBO(num_particles=30, vectorize_particles=True, max_plate_nesting=1).loss(
        local_model, local_guide
    )
    assert draws.elbo == pytest.approx(-expected)


def test_constants_and_user_scales_are_kept():
    def scaled_model():
        p = pyro.param("p", torch.tensor(0.5))
        pyro.sample("prior", dist.Normal(0.0, 1.0), obs=p)
        with pyro.poutine.scale(scale=0.1):
            local_model()

    def scaled_guide():
        with pyro.poutine.scale(scale=0.1):
            local_guide()

    draws = posterior_draws(scaled_model, scaled_guide, num_samples=2000)
    constant = float(dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5)))
    assert draws.constant == pytest.approx(constant)
    assert draws.importance_weighted == pytest.approx(constant + 0.1 * log_evidence(), abs=0.05)
    assert not draws.annealed
    assert posterior_draws(scaled_model, local_guide, num_samples=2).annealed


def test_random_state_and_store():
    rng_state = torch.cuda.get_rng_state if torch.get_default_device().type == "cuda" else torch.get_rng_state
    before = rng_state()
    draws = [posterior_draws(global_model, global_guide, num_samples=3, seed=1) for _ in range(2)]
    assert torch.equal(draws[0].log_weight, draws[1].log_weight)
    assert torch.equal(before, rng_state())
    params = {name: value.clone() for name, value in pyro.get_param_store().items()}
    posterior_draws(global_model, global_guide, num_samples=3)
    assert not torch.equal(before, rng_state())
    assert params.keys() == set(pyro.get_param_store().keys()) == {"gm", "gs", "a", "b", "c"}
    assert all(torch.equal(params[name], value) for name, value in pyro.get_param_store().items())
    assert all(value.requires_grad for value in pyro.get_param_store().values())


def test_requested_plates_may_be_fewer():
    assert posterior_draws(local_model, local_guide, num_samples=2, plates=()).log_weight.shape == (2,)


def test_discrete_latents_are_drawn():
    def model():
        with pyro.plate("data", 3):
            pyro.sample("c", dist.Bernoulli(torch.tensor(0.3)))

    draws = posterior_draws(model, model, num_samples=5)
    assert draws.values["c"].shape == (5, 3) and float(draws.log_weight.abs().max()) == 0


def changing_model():
    z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
    if z > 0:
        pyro.sample("more", dist.Normal(z, 1.0))


def no_latents():
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


BAD = {
    "point estimate": (lambda: posterior_draws(global_model, AutoDelta(global_model)), "no random site.*AutoDelta"),
    "no latents": (lambda: posterior_draws(no_latents, lambda: None), "no random site"),
    "no draws": (lambda: posterior_draws(global_model, global_guide, num_samples=0), "positive, got 0"),
    "plate name": (lambda: posterior_draws(local_model, local_guide, plates="data"), r"plates=\('data',\)"),
    "unknown plate": (lambda: posterior_draws(local_model, local_guide, plates=("rows",)), "'rows'.*'data'"),
    "global plate": (lambda: posterior_draws(global_model, global_guide, plates=("data",)), "'data'.*'g' is outside"),
    "subsampled": (lambda: posterior_draws(global_model, global_guide, (4,)), r"'data' is subsampled \(4 of 8\)"),
    "not in guide": (lambda: posterior_draws(global_model, local_guide), "'g' is not in the guide"),
    "changing": (
        lambda: posterior_draws(changing_model, changing_model, num_samples=20, vectorize=False, chunk_size=1),
        "structure changes",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_one_draw():
    draws = posterior_draws(local_model, local_guide, num_samples=1)
    assert draws.values["z"].shape == (1, NUM_DATA) and math.isfinite(draws.elbo)
