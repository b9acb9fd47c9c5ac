import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_elbo_ext import NaturalGradient, StagedStop, fit
from pyro_elbo_ext.run.rates import learning_rate, scale_learning_rate

PRECISION = torch.tensor([1.0, 4.0, 25.0], dtype=torch.float64)
TARGET = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def model(noise=0.0):
    """A posterior of independent normals; ``noise`` stands for that of minibatches."""
    z = pyro.sample("z", dist.Normal(TARGET.to(torch.zeros(())), PRECISION.to(torch.zeros(())).rsqrt()).to_event(1))
    pyro.factor("minibatch", noise * (z * torch.randn(3)).sum())


def gap(guide):
    """KL(q || p) of the guide, in nats."""
    loc, scale = guide.locs.z.detach(), guide.scales.z.detach()
    q = dist.Normal(loc, scale)
    return float(torch.distributions.kl_divergence(q, dist.Normal(TARGET.to(loc), PRECISION.to(loc).rsqrt())).sum())


def train(lr, noise, stop, num_steps=12000):
    pyro.clear_param_store()
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), Trace_ELBO())
    result = fit(svi, noise, num_steps=num_steps, stop=stop, seed=0, progress=False)
    return gap(guide), result


@pytest.mark.parametrize(("lr", "noise"), [(0.3, 3.0), (0.03, 0.0), (0.03, 3.0)])
def test_it_ends_near_the_optimum_by_itself(lr, noise):
    stop = StagedStop(tol=0.1, block=100, num_evaluations=100)
    start, _ = train(1e-9, noise, "budget", 1)
    found, result = train(lr, noise, stop)
    assert start > 5
    assert found < 0.15
    assert result.stopped == "staged"
    assert result.num_steps < 6000
    assert result.history["stage"][-1] == len(result.stages) - 1
    for stage in range(len(result.stages)):
        rates = result.history["learning_rate"][result.history["stage"] == stage]
        assert np.allclose(rates, lr / 2**stage)


def test_averaging_and_halving_beat_the_step_that_is_too_large():
    found, result = train(0.3, 3.0, StagedStop(tol=0.1, block=100, num_evaluations=100))
    constant, _ = train(0.3, 3.0, "budget", result.num_steps)
    assert found < constant / 3
    assert any(stage.averaged for stage in result.stages)


def test_an_average_of_a_stage_that_had_not_settled_is_not_kept():
    """Steps too small to get anywhere: the losses' noise hides their progress, and the average lies behind."""
    _, result = train(1e-3, 30.0, StagedStop(tol=1e-9, block=20, num_evaluations=50, max_stages=1))
    assert not result.stages[0].averaged


def test_a_bound_that_does_not_stop_falling_is_a_budget_run():
    """Losses that improve by a constant in each step end no stage."""
    rule = StagedStop(block=10)

    class Falling:
        losses: list[float] = []

    run = Falling()
    for step in range(1000):
        run.losses.append(-float(step))
        assert not rule.after_step(run)
    assert rule.stage == 0


def test_a_better_stage_is_kept_over_a_worse_one():
    """What a stage has lost against the one before is given back."""
    pyro.param("x", torch.tensor(0.0))
    leaf = pyro.get_param_store()._params["x"]
    rule = StagedStop(block=10, num_evaluations=20, patience=1)
    rng = np.random.default_rng(0)

    class Run:
        losses: list[float] = []
        halved = 0

        def evaluate(self, num, seed):
            return np.random.default_rng(seed).normal(float(leaf.detach() - 1) ** 2, 1.0, num)

        def scale_learning_rate(self, factor):
            self.halved += 1

    run, values = Run(), [1.0, 4.0]
    for value in values:
        stopped = False
        with torch.no_grad():
            leaf.fill_(value)
        while rule.stage < values.index(value) + 1:
            run.losses.append(rng.normal())
            stopped = rule.after_step(run)
    assert stopped
    assert run.halved == 2
    assert float(leaf.detach()) == 1.0
    assert rule.stages[1].gain == pytest.approx(-9.0)
    assert rule.stages[1].gain_error == pytest.approx(0.0)
    assert rule.stages[0].gain == math.inf


OPTIMISERS = {
    "adam": lambda: pyro.optim.Adam({"lr": 0.02}),
    "by name": lambda: pyro.optim.Adam(lambda name: {"lr": 0.02 if "loc" in name else 0.01}),
    "scheduled": lambda: pyro.optim.StepLR(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.02}, "step_size": 2, "gamma": 0.1}
    ),
    "natural": lambda: NaturalGradient(lr=0.02, optim=pyro.optim.Adam({"lr": 0.02})),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_step_sizes_are_scaled_before_and_after_parameters_are_met(name):
    for met_first in (True, False):
        pyro.clear_param_store()
        optim = OPTIMISERS[name]()
        svi = SVI(model, AutoNormal(model), optim, Trace_ELBO())
        if met_first:
            svi.step()
            assert learning_rate(optim) == pytest.approx(0.02)
        scale_learning_rate(optim, 0.5)
        svi.step()
        groups = [own for p in optim.optim_objs.values() for own in getattr(p, "optimizer", p).param_groups]
        expected = {0.01} | ({0.005} if name == "by name" else set())
        assert {round(group["lr"], 9) for group in groups} == (set() if name == "natural" else expected)
        assert learning_rate(optim) in expected
        if name == "scheduled":
            optim.step(), optim.step()
            assert learning_rate(optim) == pytest.approx(0.001)


def test_an_optimiser_without_a_rate_is_refused():
    optim = pyro.optim.Adam({})
    with pytest.raises(ValueError, match="no learning rate to scale: give it an lr"):
        scale_learning_rate(optim, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tol": 0.0}, "tol must be a positive number of nats"),
        ({"block": 5}, "block must be a whole number of at least 10"),
        ({"patience": 0}, "patience must be"),
        ({"num_evaluations": 1}, "num_evaluations must be"),
        ({"max_stages": 0}, "max_stages must be"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StagedStop(**settings)


def test_a_state_of_other_settings_is_refused():
    with pytest.raises(ValueError, match="was stopped by other rules"):
        StagedStop(block=20).load_state_dict(StagedStop(block=30).state_dict())
