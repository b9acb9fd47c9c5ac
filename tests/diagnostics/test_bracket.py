"""Annealing: exact evidence between the two bounds, weights unbiased, supports, plates, planted faults."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalMessenger
from torch.distributions import constraints

from pyro_elbo_ext import AutoFlow
from pyro_elbo_ext.diagnostics import annealing
from pyro_elbo_ext.diagnostics.annealing import anneal, find_schedule, refine
from pyro_elbo_ext.diagnostics.bracket import annealed_bracket, simulated_bracket
from pyro_elbo_ext.diagnostics.sampling import make_sampler
from pyro_elbo_ext.diagnostics.simulate import simulate
from pyro_elbo_ext.diagnostics.target import Target
from tests.cases import (
    NUM_DATA,
    data,
    global_guide,
    global_log_evidence,
    global_model,
    local_guide,
    local_model,
    log_evidence,
)


def posterior_of_global(num):
    """Exact draws of the posterior of ``global_model``."""
    precision = 1 + NUM_DATA / 2
    g = data().sum() / 2 / precision + torch.randn(num) / precision**0.5
    return {"g": g, "z": (g[:, None] + data()) / 2 + torch.randn(num, NUM_DATA) / 2**0.5}


def plain_model():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=torch.tensor([1.0, -2.0]))


def plain_guide():
    pyro.sample("z", dist.Normal(torch.tensor([0.5, -1.2]), torch.tensor([0.4, 0.6])).to_event(1))


PLAIN = float(dist.Normal(0.0, 1.25**0.5).log_prob(torch.tensor([1.0, -2.0])).sum())


def log_weights(num_chains=5000, num=4, reverse=False):
    """Log-weights of annealing on the plain pair, forwards or from exact draws backwards."""
    target = Target(make_sampler(plain_model, plain_guide, (), {}, num_chains))
    schedule = find_schedule(target, num, 3)
    start = target.start
    if reverse:
        mean = torch.tensor([1.0, -2.0]) / 1.25
        start = {"z": mean + torch.randn(num_chains, 2) * 0.2**0.5}
    return anneal(target, start, schedule, reverse)[0].flatten()


def unsettled(num_chains=4000, step=1.3):
    """How many standard errors the moments of exact draws are off after some transitions of large steps."""
    target = Target(make_sampler(plain_model, plain_guide, (), {}, num_chains))
    schedule = find_schedule(target, 2, 3)
    schedule.steps = [torch.full_like(found, step) for found in schedule.steps]  # so large that they need correcting
    mean, sd = torch.tensor([1.0, -2.0]) / 1.25, 0.2**0.5
    z = (refine(target, {"z": mean + torch.randn(num_chains, 2) * sd}, schedule, 8)["z"] - mean) / sd
    errors = z.mean(0) * num_chains**0.5, (z.square().mean(0) - 1) * (num_chains / 2) ** 0.5
    return float(torch.cat(errors).abs().max())


def bias(log_ratio):
    """How many standard errors the mean of exp is from one."""
    ratio = log_ratio.exp()
    return float((ratio.mean() - 1) / ratio.std() * math.sqrt(len(ratio)))


def test_weights_are_unbiased_both_ways():
    forward, backward = log_weights(), log_weights(reverse=True)
    assert abs(bias(forward - PLAIN)) < 4
    assert abs(bias(PLAIN - backward)) < 4
    assert forward.mean() < PLAIN < backward.mean()
    assert backward.mean() - forward.mean() < 2


def test_transitions_come_between_the_right_weights(monkeypatch):
    target = Target(make_sampler(plain_model, plain_guide, (), {}, 3))
    schedule = find_schedule(target, 4, 1)
    betas = schedule.betas

    def move(target, point, schedule, beta, step):
        moved = {"z": point["z"] + beta}
        return moved, target(moved)[0], torch.ones_like(step)

    monkeypatch.setattr(annealing, "_transition", move)
    for reverse in (False, True):
        z, expected = target.start["z"], 0.0
        for t in (4, 3, 2, 1) if reverse else (1, 2, 3, 4):
            expected += (betas[t] - betas[t - 1]) * target({"z": z})[0].log_weight
            z = z + (betas[t - 1] if reverse else betas[t])
        torch.testing.assert_close(anneal(target, target.start, schedule, reverse)[0], expected)


@pytest.mark.parametrize("fault", ["every proposal accepted", "momentum left out", "wrong way"])
def test_planted_faults_are_seen(fault, monkeypatch):
    kinetic = annealing._kinetic
    if fault == "every proposal accepted":
        monkeypatch.setattr(torch, "rand_like", lambda value: torch.zeros_like(value))
    elif fault == "momentum left out":
        monkeypatch.setattr(annealing, "_kinetic", lambda *args: 0 * kinetic(*args))
    else:
        monkeypatch.setattr(annealing, "_kinetic", lambda *args: -kinetic(*args))

    assert unsettled() > 6


def test_no_fault_is_seen_where_there_is_none():
    assert unsettled() < 4


@pytest.mark.parametrize("make", [lambda: global_guide, lambda: AutoNormal(global_model, init_scale=0.7)])
def test_evidence_is_inside(make):
    bracket = annealed_bracket(
        global_model, make(), num_temperatures=8, num_leapfrog=2, reference=posterior_of_global(50)
    )
    exact = global_log_evidence()
    assert bracket.lower - 4 * bracket.lower_se < exact < bracket.upper + 4 * bracket.upper_se
    assert bracket.upper - bracket.lower < 2
    assert 0.5 < bracket.acceptance < 0.95
    assert bracket.ends["z"].shape == (32, NUM_DATA)


def test_packed_guide_is_inverted():
    guide = AutoMultivariateNormal(global_model, init_scale=0.7)
    bracket = annealed_bracket(
        global_model, guide, num_temperatures=8, num_leapfrog=2, reference=posterior_of_global(50)
    )
    assert bracket.lower - 4 * bracket.lower_se < global_log_evidence() < bracket.upper + 4 * bracket.upper_se


def test_elements_are_annealed_apart_and_scaled():
    bracket = annealed_bracket(local_model, local_guide, num_temperatures=8, num_leapfrog=2)
    assert bracket.lower == pytest.approx(log_evidence(), abs=0.3) and bracket.upper is None
    whole = annealed_bracket(local_model, local_guide, num_temperatures=8, num_leapfrog=2, plates=())
    assert whole.lower == pytest.approx(log_evidence(), abs=0.6)

    def model(batch):
        with pyro.plate("data", 20, subsample_size=batch):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(batch))

    def guide(batch):
        with pyro.plate("data", 20, subsample_size=batch):
            pyro.sample("z", dist.Normal(torch.tensor(0.5), 0.8))

    exact = 20 * float(dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0)))
    bracket = annealed_bracket(model, guide, (5,), num_temperatures=4)
    assert abs(bracket.lower - exact) < 4 * bracket.lower_se < 1


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "backward"])
def test_weights_are_unbiased_on_bounded_supports(reverse):
    def model():
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
        pyro.sample("n", dist.Poisson(rate), obs=torch.tensor(4.0))

    def guide():
        pyro.sample("rate", dist.Gamma(torch.tensor(4.0), 2.0))

    exact = math.lgamma(6) - math.lgamma(2) - 6 * math.log(2) - math.lgamma(5)
    target = Target(make_sampler(model, guide, (), {}, 5000))
    start = {"rate": dist.Gamma(6.0, 2.0).sample((5000,)).log()} if reverse else target.start
    log_w = anneal(target, start, find_schedule(target, 3, 3), reverse)[0].flatten()
    assert abs(bias(exact - log_w if reverse else log_w - exact)) < 4


def test_supports_are_kept():
    def model():
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
        share = pyro.sample("share", dist.Beta(torch.tensor(2.0), 3.0))
        mix = pyro.sample("mix", dist.Dirichlet(torch.ones(3)))
        pyro.sample("n", dist.Poisson(rate), obs=torch.tensor(3.0))
        pyro.sample("b", dist.Binomial(5, share), obs=torch.tensor(4.0))
        pyro.sample("c", dist.Categorical(mix), obs=torch.tensor(1))

    def guide():
        pyro.sample("rate", dist.Gamma(torch.tensor(3.0), 1.0))
        pyro.sample("share", dist.Beta(torch.tensor(3.0), 3.0))
        pyro.sample("mix", dist.Dirichlet(torch.ones(3)))

    poisson = math.lgamma(5) - math.lgamma(2) - 5 * math.log(2) - math.lgamma(4)
    beta = lambda a, b: math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)  # noqa: E731
    exact = poisson + math.log(5) + beta(6, 4) - beta(2, 3) - math.log(3)
    reference = {
        "rate": dist.Gamma(5.0, 2.0).sample((40,)),
        "share": dist.Beta(6.0, 4.0).sample((40,)),
        "mix": dist.Dirichlet(torch.tensor([1.0, 2.0, 1.0])).sample((40,)),
    }
    bracket = annealed_bracket(model, guide, num_temperatures=8, num_leapfrog=2, num_chains=64, reference=reference)
    assert bracket.lower - 4 * bracket.lower_se < exact < bracket.upper + 4 * bracket.upper_se
    assert bracket.upper - bracket.lower < 0.5


def test_simulated_data():
    bracket = simulated_bracket(global_model, global_guide, num_temperatures=30, num_leapfrog=2, seed=1)
    wide = simulated_bracket(global_model, global_guide, num_temperatures=3, num_leapfrog=1, seed=1)
    gap, error = bracket.upper - bracket.lower, math.hypot(bracket.lower_se, bracket.upper_se)
    assert -4 * error < gap < 0.1 * (wide.upper - wide.lower) + 4 * error
    assert wide.upper - wide.lower > gap


def amortized_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def amortized_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def test_simulated_data_reach_an_encoder():
    bracket = simulated_bracket(
        amortized_model, amortized_guide, (torch.zeros(5),), rebind=lambda seen: ((seen["x"],), {}), num_temperatures=5
    )
    assert bracket.upper == pytest.approx(bracket.lower, abs=1e-6)  # the guide is exact: every path weighs the same


def test_simulate_draws_latents_and_data():
    latents, observations = simulate(global_model)
    assert latents["z"].shape == observations["x"].shape == (NUM_DATA,)
    assert not torch.equal(observations["x"], data())


def test_nothing_is_changed():
    guide = AutoNormal(global_model)
    guide()
    before, state = {n: p.clone() for n, p in pyro.get_param_store().items()}, torch.get_rng_state()
    annealed_bracket(global_model, guide, num_temperatures=3, seed=0)
    assert all(torch.equal(before[name], value) for name, value in pyro.get_param_store().items())
    assert all(param.grad is None for param in guide.parameters())
    assert torch.equal(state, torch.get_rng_state())


def discrete_model():
    pyro.sample("c", dist.Bernoulli(torch.tensor(0.3)))


def moving_model():
    a = pyro.sample("a", dist.Gamma(torch.tensor(2.0), 1.0))
    pyro.sample("b", dist.Uniform(torch.zeros(()), a))


def factor_model():
    z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.factor("f", -z.square())


def scaled_guide():
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    g = pyro.sample("g", dist.Normal(0.0, s))
    with pyro.plate("data", NUM_DATA):
        pyro.sample("z", dist.Normal(g, 1.0))


BAD = {
    "discrete": (lambda: annealed_bracket(discrete_model, discrete_model), "'c' is discrete"),
    "moving support": (lambda: annealed_bracket(moving_model, moving_model), "support of guide site 'b' depends"),
    "one chain": (lambda: annealed_bracket(plain_model, plain_guide, num_chains=1), "num_chains >= 2"),
    "no latents": (lambda: annealed_bracket(lambda: None, lambda: None), "no random site"),
    "reference site": (
        lambda: annealed_bracket(global_model, scaled_guide, reference={"g": torch.zeros(3)}, num_temperatures=2),
        "no draws of latent site 'z'",
    ),
    "reference shape": (
        lambda: annealed_bracket(
            global_model, scaled_guide, reference={"g": torch.zeros(3), "z": torch.zeros(3, 7)}, num_temperatures=2
        ),
        r"site 'z' have shape \(32, 7\)",
    ),
    "flow": (
        lambda: simulated_bracket(plain_model, AutoFlow(plain_model), num_temperatures=2),
        "not known for this guide",
    ),
    "factor": (lambda: simulated_bracket(factor_model, plain_guide), "'f' is a factor"),
    "no data": (lambda: simulate(discrete_model), "no observed site"),
    "subsampled": (lambda: simulate(local_model, (4,)), r"'data' is subsampled \(4 of 8\)"),
    "handler": (
        lambda: simulated_bracket(global_model, AutoNormalMessenger(global_model)),
        "AutoNormalMessenger runs its own model",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
