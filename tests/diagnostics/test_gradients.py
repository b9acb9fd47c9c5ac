"""Mean and variance of gradients against exact ones, for losses of the package and of Pyro; nothing is left changed."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_elbo_ext import IWAE_ELBO, ScoreFunction_ELBO
from pyro_elbo_ext.diagnostics.gradients import gradient_summaries
from tests.cases import global_guide, global_model

LOSSES = {
    "Trace": Trace_ELBO,
    "TraceGraph": TraceGraph_ELBO,
    "TraceMeanField": TraceMeanField_ELBO,
    "Renyi": lambda: RenyiELBO(num_particles=3),
    "IWAE": lambda: IWAE_ELBO(3),
    "ScoreFunction": lambda: ScoreFunction_ELBO(2),
}


def model():
    z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.5))


def guide():
    m = pyro.param("m", torch.tensor(0.2))
    pyro.sample("z", dist.Normal(m, 0.9))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name):
    found = gradient_summaries(LOSSES[name](), global_model, global_guide, num_replicates=5)
    assert set(found) == {"gm", "gs", "a", "b", "c"}
    assert all(s.num_parameters == 1 and s.num_replicates == 5 and s.variance > 0 for s in found.values())


def test_values_are_exact_ones():
    summary = gradient_summaries(Trace_ELBO(), model, guide, num_replicates=600)["m"]
    sd = 2 * 0.9  # d/dm of the loss at one draw: 2 z - 1.5
    assert summary.mean_norm == pytest.approx(1.1, abs=4 * sd / 600**0.5)
    assert summary.variance == pytest.approx(sd**2, rel=0.25)
    assert summary.snr == pytest.approx(1.1 / sd, rel=0.15)
    assert summary.noise_floor == pytest.approx(math.sqrt(2 / (math.pi * 600)))


def test_noise_floor_is_the_ratio_of_no_signal():
    def still():
        m = pyro.param("still", torch.full((200,), 0.75))
        pyro.sample("z", dist.Normal(m, 0.9).to_event(1))

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(200), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.full((200,), 1.5))

    summary = gradient_summaries(Trace_ELBO(), model, still, num_replicates=30)["still"]
    assert summary.num_parameters == 200
    assert summary.snr == pytest.approx(summary.noise_floor, rel=0.2)


def test_groups():
    guide = AutoNormal(global_model)
    found = gradient_summaries(
        Trace_ELBO(), global_model, guide, num_replicates=3, group=lambda name: name.split(".")[-2]
    )
    assert {name: s.num_parameters for name, s in found.items()} == {"locs": 9, "scales": 9}


def test_everything_is_left_as_found():
    guide = AutoNormal(global_model)
    guide()
    store = pyro.get_param_store()
    leaves = {name: store[name].unconstrained() for name in store}
    for leaf in leaves.values():
        leaf.grad = torch.full_like(leaf, 7.0)
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    grads, state = {name: leaf.grad for name, leaf in leaves.items()}, torch.get_rng_state()
    for seed in (None, 3):
        gradient_summaries(Trace_ELBO(), global_model, guide, num_replicates=3, seed=seed)
    assert torch.equal(state, torch.get_rng_state())
    for name, leaf in leaves.items():
        assert store[name].unconstrained() is leaf and torch.equal(leaf, before[name])
        assert leaf.grad is grads[name] and (leaf.grad == 7).all()


def test_found_gradients_do_not_leak_in():
    gradient_summaries(Trace_ELBO(), model, guide, num_replicates=2)
    pyro.get_param_store()["m"].unconstrained().grad = torch.tensor(1000.0)
    assert gradient_summaries(Trace_ELBO(), model, guide, num_replicates=50)["m"].mean_norm < 10


BAD = {
    "one": (ValueError, lambda: gradient_summaries(Trace_ELBO(), model, guide, num_replicates=1), ">= 2, got 1"),
    "no loss": (TypeError, lambda: gradient_summaries(len, model, guide), "loss_and_grads.*builtin"),
    "no parameter": (ValueError, lambda: gradient_summaries(Trace_ELBO(), model, model_guide), "no gradient"),
}


def model_guide():
    pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))


@pytest.mark.parametrize("case", BAD)
def test_refusals(case):
    error, call, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
