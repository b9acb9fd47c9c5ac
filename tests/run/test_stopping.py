import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_elbo_ext import NaturalGradient, StagedStop, fit
from pyro_elbo_ext.run.iterates import Iterates
from pyro_elbo_ext.run.rates import get_rates, learning_rate, scale_learning_rate, set_rates
from pyro_elbo_ext.run.stopping import _gain

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


@pytest.mark.convergence
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
    rates = [
        set(result.history["learning_rate"][result.history["stage"] == at].tolist()) for at in range(len(result.stages))
    ]
    assert all(len(of_stage) == 1 for of_stage in rates)
    rates = [of_stage.pop() for of_stage in rates]
    assert rates[0] == lr
    assert rates[-1] < lr
    assert {after / before for before, after in zip(rates, rates[1:], strict=False)} <= {0.5, 1.0}


@pytest.mark.convergence
def test_averaging_and_halving_beat_the_step_that_is_too_large():
    found, result = train(0.3, 3.0, StagedStop(tol=0.1, block=100, num_evaluations=100))
    constant, _ = train(0.3, 3.0, "budget", result.num_steps)
    assert found < constant / 3
    assert any(stage.averaged for stage in result.stages)


def test_an_average_of_a_stage_that_had_not_settled_is_not_kept():
    """Steps too small to get anywhere: the losses' noise hides their progress, and the average lies behind."""
    _, result = train(1e-3, 30.0, StagedStop(tol=1e-9, block=20, num_evaluations=50), 400)
    assert not result.stages[0].averaged


def test_a_bound_that_does_not_stop_falling_is_a_budget_run():
    """Losses that improve by a constant in each step end no stage."""
    rule = StagedStop(block=10)

    class Falling:
        losses: list[float] = []
        params: dict[str, torch.Tensor] = {}

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
        params = {"x": leaf}
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
    assert rule.stages[1].bound == pytest.approx(0.0, abs=1.0)  # of what was kept
    assert not rule.stages[1].averaged


class Moving:
    """A run of one parameter, whose losses are noise alone, and whose bound is what is asked for."""

    def __init__(self, bound, start=0.0):
        self.losses, self.halvings, self.bound = [], 0, bound
        self.leaf = torch.tensor(start, requires_grad=True)
        self.rng = np.random.default_rng(0)

    @property
    def params(self):
        return {"x": self.leaf}

    def step(self, rule, by=0.0):
        with torch.no_grad():
            self.leaf += by
        self.losses.append(self.rng.normal())
        return rule.after_step(self)

    def evaluate(self, num, seed):
        with np.errstate(invalid="ignore"):
            return self.bound(float(self.leaf.detach())) + np.random.default_rng(seed).normal(0.0, 1.0, num)

    def scale_learning_rate(self, factor):
        self.halvings += 1


def test_a_stage_under_way_goes_on_with_the_same_steps():
    run, rule = Moving(lambda x: x**2, -30.0), StagedStop(block=10, num_evaluations=20, patience=1, max_stages=3)
    while float(run.leaf.detach()) < -1.0:
        assert not run.step(rule, 0.02)
    assert rule.stage > 20
    assert run.halvings == rule.halvings == 0
    restored = StagedStop(block=10, num_evaluations=20, patience=1, max_stages=3)
    restored.load_state_dict(rule.state_dict())
    assert (restored.stage, restored.halvings) == (rule.stage, 0)
    num = 0
    while not run.step(restored):
        num += 1
        assert num < 500
    assert 1 <= run.halvings == restored.halvings <= 3


@pytest.mark.parametrize(("gain", "stops"), [(0.45, False), (0.05, True)])
def test_a_gain_that_may_be_large_enough_does_not_stop(gain, stops):
    """It stops where a gain is a standard error below ``tol``, not where noise may have hidden it."""
    bounds = iter([4.0, 4.0, 4.0 - gain, 4.0 - gain, 4.0])  # last, average; last, average, the stage before

    class Run(Moving):
        def evaluate(self, num, seed):
            value = next(bounds)
            return value + (1 if value < 4 else -1) * np.linspace(-0.6, 0.6, num)

    run, rule = Run(None), StagedStop(block=10, num_evaluations=20, patience=1)
    while len(rule.stages) < 2:
        stopped = run.step(rule)
    assert rule.stages[1].gain == pytest.approx(gain)
    assert rule.stages[1].gain_error == pytest.approx(0.167, abs=1e-3)
    assert stopped == stops


def test_infinite_bounds_everywhere_stop_without_nan():
    run, rule = Moving(lambda x: math.inf), StagedStop(block=10, num_evaluations=20, patience=1)
    while not run.step(rule):
        pass
    assert [stage.gain for stage in rule.stages] == [math.inf, 0.0]
    assert [stage.bound for stage in rule.stages] == [-math.inf] * 2


def test_a_state_with_fewer_infinite_losses_is_the_better():
    before, after = np.array([1.0, math.inf, 2.0]), np.array([9.0, 9.0, 9.0])
    assert _gain(before, after) == (math.inf, 0.0)
    assert _gain(after, before) == (-math.inf, 0.0)
    assert _gain(np.array([1.0, math.inf, 2.0]), np.array([0.0, math.inf, 1.0])) == (1.0, 0.0)


@pytest.mark.convergence
def test_a_budget_that_ends_within_a_stage_keeps_the_average_where_it_is_better():
    found, result = train(0.3, 3.0, StagedStop(tol=1e-6, block=100, patience=9, num_evaluations=50), 350)
    constant, _ = train(0.3, 3.0, "budget", 350)
    assert result.stopped == "budget"
    assert not result.stages
    assert found < constant / 3
    run, rule = Moving(lambda x: x**2, -30.0), StagedStop(block=10, num_evaluations=20, patience=100)
    for _ in range(45):
        run.step(rule, 0.1)
    rule.finish(run)
    assert float(run.leaf.detach()) == pytest.approx(-25.5)  # the average lies behind


def test_a_rule_serves_many_runs_and_is_left_as_it_was():
    rule = StagedStop(tol=0.1, block=50, num_evaluations=50)
    (first, one), (second, two) = train(0.3, 3.0, rule), train(0.3, 3.0, rule)
    assert (first, one.num_steps, one.stages) == (second, two.num_steps, two.stages)
    assert one.stages
    assert rule.state_dict() == StagedStop(tol=0.1, block=50, num_evaluations=50).state_dict()


def test_parameters_of_others_are_left_alone():
    other = 100 * torch.randn(1000, dtype=torch.float32)
    pyro.clear_param_store()
    pyro.param("other", other.clone())
    stop = StagedStop(tol=0.1, block=50, num_evaluations=20)
    result = fit(
        SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.3}), Trace_ELBO()), num_steps=2000, stop=stop, seed=0
    )
    assert any(stage.averaged for stage in result.stages)
    assert torch.equal(pyro.param("other").detach(), other)


def test_iterates_are_averaged_over_the_later_half_in_bounded_memory():
    iterates, values = Iterates(), torch.randn(100, 3)
    for at in range(100):
        for offset in (-1.0, 1.0):
            iterates.add({"x": values[at] + offset, **({"late": values[at]} if at > 2 else {})})
        iterates.end_block()
        assert len(iterates.blocks) <= 16
        again = Iterates()
        again.load_state_dict(iterates.state_dict())
        average = again.average()
        assert ("late" in average) == (at >= 5)
        expected = [values[first : at + 1].mean(0) for first in range(at + 1)]
        (first,) = [n for n, mean in enumerate(expected) if torch.allclose(mean, average["x"], atol=1e-12)]
        assert first == (at + 1) // 2 if at < 16 else (at + 1) // 2 - (at + 1) // 8 <= first <= (at + 1) // 2


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


def test_step_sizes_come_back_whatever_was_scaled_since():
    for name in OPTIMISERS:
        optim = OPTIMISERS[name]()
        scale_learning_rate(optim, 0.7)
        scale_learning_rate(optim, 0.7)
        saved = get_rates(optim)
        for again in (OPTIMISERS[name](), optim):
            scale_learning_rate(again, 0.5)
            set_rates(again, saved)
            assert get_rates(again) == saved
        pyro.clear_param_store()
        svi = SVI(model, AutoNormal(model), optim, Trace_ELBO())
        svi.step()
        assert learning_rate(optim) in (0.02 * 0.7 * 0.7, 0.02 * (0.7 * 0.7), 0.01 * (0.7 * 0.7))


def scheduled(name, **settings):
    given = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01}, **settings}
    return getattr(pyro.optim, name)(given)


REFUSED_OPTIMISERS = {
    "no lr": (lambda: pyro.optim.AdagradRMSProp({"eta": 0.1}), "AdagradRMSProp was given .*no learning rate"),
    "one cycle": (lambda: scheduled("OneCycleLR", max_lr=0.05, total_steps=100), "max_lr, which cannot be scaled"),
    "cyclic": (lambda: scheduled("CyclicLR", base_lr=0.001, max_lr=0.01), "max_lr and base_lr, which cannot be"),
    "inner": (lambda: NaturalGradient(optim=pyro.optim.AdagradRMSProp({"eta": 0.1})), "no learning rate"),
}


@pytest.mark.parametrize("name", REFUSED_OPTIMISERS)
def test_an_optimiser_that_cannot_be_scaled_is_refused_before_the_first_step(name):
    make, message = REFUSED_OPTIMISERS[name]
    steps = []
    with pytest.raises(ValueError, match=message):
        fit(
            SVI(model, AutoNormal(model), make(), Trace_ELBO()),
            num_steps=5,
            stop="staged",
            callbacks=[lambda state: steps.append(state.step)],
        )
    assert not steps
    with pytest.raises(ValueError, match=message):
        scale_learning_rate(make(), 0.5)


def test_a_rate_that_is_not_given_is_scaled_too():
    optim = pyro.optim.Adam({})
    scale_learning_rate(optim, 0.5)
    SVI(model, AutoNormal(model), optim, Trace_ELBO()).step()
    assert learning_rate(optim) == 0.0005


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tol": 0.0}, "tol must be a positive number of nats"),
        ({"block": 5}, "block must be a whole number of at least 10"),
        ({"block": "abc"}, "block must be a whole number of at least 10, got 'abc'"),
        ({"patience": 0}, "patience must be"),
        ({"num_evaluations": 1}, "num_evaluations must be"),
        ({"max_stages": 0}, "max_stages must be"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StagedStop(**settings)


def test_whole_numbers_that_are_floats():
    assert StagedStop(block=10.0).state_dict() == StagedStop(block=10).state_dict()


def test_a_state_of_other_settings_is_refused():
    with pytest.raises(ValueError, match="was stopped by other rules"):
        StagedStop(block=20).load_state_dict(StagedStop(block=30).state_dict())
