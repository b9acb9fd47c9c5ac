"""Minibatches by index: every row once an epoch, and the same for eager, compiled and resumed runs."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, init_to_mean

from pyro_elbo_ext import (
    IWAE_ELBO,
    VRIWAE_ELBO,
    CompiledSVI,
    Minibatches,
    NaturalGradient,
    ScoreRegression_ELBO,
    fit,
)
from pyro_elbo_ext.elbo.base import NonFiniteError
from pyro_elbo_ext.run.compiled import loop
from pyro_elbo_ext.run.compiled import svi as compiled_svi
from tests.run.cases import params


@pytest.fixture
def uncompiled(monkeypatch):
    """Steps operation by operation: what is not about compiling need not wait for it."""
    monkeypatch.setattr(compiled_svi, "compile_block", lambda step, *_: (loop._python_loop(step), "graph"))


def test_an_epoch_has_every_row_at_most_once():
    x, y = torch.arange(10), torch.arange(10.0)[:, None]
    batches = Minibatches(x, y, batch_size=3)
    assert len(batches) == 3
    epochs = [list(batches) for _ in range(2)]
    for epoch in epochs:
        assert [(a.shape, b.shape) for a, b in epoch] == [((3,), (3, 1))] * 3
        assert all(torch.equal(a.to(b.dtype), b[:, 0]) for a, b in epoch)
        rows = torch.cat([a for a, _ in epoch]).tolist()
        assert len(set(rows)) == 9
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])


def test_rows_go_on_from_epoch_to_epoch():
    batches = Minibatches(torch.arange(6), batch_size=2)
    torch.manual_seed(1)
    whole = batches.rows(9)
    torch.manual_seed(1)
    again = batches.fresh()
    parts = [(again.rows(num), torch.randn(3))[0] for num in (1, 4, 2, 2)]  # other random numbers come between
    assert torch.equal(torch.cat(parts), whole)
    again.put_back(whole[2:4])
    assert torch.equal(again.rows(2), whole[2:4])
    assert all(sorted(epoch.flatten().tolist()) == list(range(6)) for epoch in whole.split(3))
    assert torch.equal(batches.at(whole[:2]).rows(2), whole[:2])


@pytest.mark.parametrize("size", [np.int64(2), 2.0])
def test_a_whole_number_may_be_of_another_type(size):
    assert Minibatches(torch.arange(6), batch_size=size).rows(4).shape == (4, 2)


BAD = {
    "nothing": ((), 1, "got none"),
    "lengths": ((torch.ones(3), torch.ones(4)), 1, r"got \(3,\), \(4,\)"),
    "a number": ((torch.tensor(1.0),), 1, r"got \(\)"),
    "a list": (([1, 2],), 1, "got list"),
    "zero": ((torch.ones(3),), 0, "of at least 1, got 0"),
    "too many": ((torch.ones(3),), 4, "from 1 to 3, got 4"),
    "a half": ((torch.ones(3),), 1.5, "of at least 1, got 1.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_minibatches(case):
    tensors, size, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        Minibatches(*tensors, batch_size=size)


X = torch.linspace(-1.0, 1.0, 30, dtype=torch.float64, device="cpu")[:, None] ** torch.arange(3, device="cpu")
Y = 2 * X.sum(-1) + 0.3 * torch.sin(50 * X[:, 1])


def model(x, y, power=1.0):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.poutine.scale(scale=len(X) / len(x)), pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(power * (w * x).sum(-1), 0.5), obs=y)


def data():
    return X.to(torch.tensor(0.0)), Y.to(torch.tensor(0.0))


def adam(kind):
    pyro.clear_param_store()
    return kind(model, AutoDelta(model, init_loc_fn=init_to_mean), pyro.optim.Adam({"lr": 0.05}), IWAE_ELBO(1))


def test_eager_and_compiled_runs_take_the_same_minibatches(uncompiled, tmp_path):
    """In one run, in two with a checkpoint within an epoch, in single steps, and with another argument behind."""
    found = {}
    for name, kind, size in (("eager", SVI, None), ("blocks", CompiledSVI, None), ("file", CompiledSVI, 7)):
        batches = Minibatches(*data(), batch_size=8)
        settings = {"batches": batches, "seed": 3, "progress": False}
        if size is not None:
            settings |= {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 5}
            fit(adam(kind), 0.9, num_steps=size, **settings)
        result = fit(adam(kind), 0.9, num_steps=20, **settings)
        found[name] = result.history["loss"], params()
    for losses, values in found.values():
        np.testing.assert_allclose(losses, found["eager"][0], rtol=1e-9)
        for key, value in values.items():
            torch.testing.assert_close(value, found["eager"][1][key], rtol=1e-9, atol=1e-12)
    assert len(set(found["eager"][0])) == 20


def test_run_step_and_evaluate(uncompiled):
    batches = Minibatches(*data(), batch_size=10)
    svi = adam(CompiledSVI)
    torch.manual_seed(2)
    losses = [*svi.run(4, batches), svi.step(batches), *svi.run(5, batches)]
    value = svi.evaluate_loss(batches)
    eager = adam(SVI)
    torch.manual_seed(2)
    rows = batches.fresh().rows(12)
    expected = [eager.step(*batches.take(part)) for part in rows[:10]]
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    assert torch.equal(batches.rows(2), rows[10:])  # of which a look at the loss takes none
    around = [eager.evaluate_loss(*batches.take(part)) for part in rows]
    assert min(around) / 3 < value < 3 * max(around)
    assert len(svi._programs) == 1


def test_with_noise_a_run_does_not_depend_on_where_blocks_end(uncompiled, tmp_path):
    """In one run, in two, with a checkpoint here or there, and resumed: the same rows and the same noise."""

    def svi():
        pyro.clear_param_store()
        return CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), VRIWAE_ELBO(1.0, 3))

    found = {}
    for name, sizes in (("one", (30,)), ("two", (4, 26))):
        engine, batches = svi(), Minibatches(*data(), batch_size=6)
        torch.manual_seed(1)
        for size in sizes:
            engine.run(size, batches)
        found[name] = params()
    for name, every, stops in (("often", 4, (30,)), ("seldom", 10, (30,)), ("resumed", 7, (14, 30))):
        path = tmp_path / f"{name}.pt"
        settings = {"checkpoint": path, "checkpoint_every": every, "seed": 5, "progress": False}
        for stop in stops:
            fit(svi(), num_steps=stop, batches=Minibatches(*data(), batch_size=6), **settings)
        found[name] = params()
    for first, second in (("one", "two"), ("often", "seldom"), ("often", "resumed")):
        for key, value in found[first].items():
            assert torch.equal(value, found[second][key]), (first, second, key)
    assert not torch.equal(found["one"]["AutoNormal.locs.w"], found["often"]["AutoNormal.locs.w"])


def test_minibatches_of_steps_that_were_not_taken_come_again(uncompiled):
    x, y = data()
    y = y.clone()
    y[7] = torch.nan
    batches = Minibatches(x, y, batch_size=10)
    torch.manual_seed(1)
    rows = batches.fresh().rows(6)
    torch.manual_seed(1)
    first = next(i for i, part in enumerate(rows) if 7 in part)
    no_checks = pyro.validation_enabled(False)
    with no_checks, pytest.raises(NonFiniteError, match=f"in step {first + 1} of 6"):
        adam(CompiledSVI).run(6, batches)
    assert torch.equal(batches.rows(6 - first - 1), rows[first + 1 :])


def test_skipped_steps_are_counted_where_none_is_compiled():
    x, y = data()
    y = y.clone()
    y[7] = torch.nan
    found = {}
    for kind, settings in ((SVI, {}), (CompiledSVI, {"fallback": "eager"})):
        pyro.clear_param_store()
        svi = kind(
            model, AutoDelta(model, init_loc_fn=init_to_mean), pyro.optim.Rprop({"lr": 0.01}), IWAE_ELBO(1), **settings
        )
        with pyro.validation_enabled(False):
            result = fit(
                svi, num_steps=20, batches=Minibatches(x, y, batch_size=6), seed=1, progress=False, nonfinite="skip"
            )
        found[kind] = result.num_skipped, result.history["loss"], result.history["grad_norm"]
    assert found[SVI][0] == found[CompiledSVI][0] > 1
    np.testing.assert_array_equal(found[SVI][1], found[CompiledSVI][1])
    np.testing.assert_array_equal(found[SVI][2], found[CompiledSVI][2])


def test_without_a_graph_minibatches_are_taken_all_the_same():
    svi = CompiledSVI(model, AutoDelta(model), pyro.optim.Rprop({"lr": 0.05}), IWAE_ELBO(1), fallback="eager")
    losses = svi.run(8, Minibatches(*data(), batch_size=8))
    assert svi.how == "eager"
    assert len(set(losses)) == 8


@pytest.mark.convergence
def test_natural_steps_in_a_loop_reach_the_posterior(uncompiled):
    """Conjugate, on minibatches, averaged: the whole data's posterior; without steps it is nats away."""
    svi = CompiledSVI(
        model,
        AutoMultivariateNormal(model),
        NaturalGradient(lr=0.1, schedule="constant", average_after=100),
        ScoreRegression_ELBO(8),
    )
    svi.run(400, Minibatches(*data(), batch_size=10))
    x, y = data()
    precision = torch.eye(3) / 4 + x.T @ x / 0.25
    mean = torch.linalg.solve(precision, x.T @ y / 0.25)
    exact = dist.MultivariateNormal(mean, precision_matrix=precision)
    assert svi.optim.num_steps == 400
    with svi.optim.averaged():
        found = svi.guide.get_posterior()
        assert torch.distributions.kl_divergence(found, exact) < 0.05
    pyro.clear_param_store()
    guide = AutoMultivariateNormal(model)
    guide(x, y)
    assert torch.distributions.kl_divergence(guide.get_posterior(), exact) > 1


@pytest.mark.slow
def test_a_compiled_loop_takes_them_by_index():
    """Compiled as one call: without noise the eager steps on the same rows, over blocks and epochs."""
    batches = Minibatches(*data(), batch_size=7)
    found = {}
    for kind in (SVI, CompiledSVI):
        result = fit(adam(kind), num_steps=600, batches=batches, seed=1, progress=False)
        found[kind] = result.history["loss"], params()
    np.testing.assert_allclose(found[CompiledSVI][0], found[SVI][0], rtol=1e-8)
    for key, value in found[SVI][1].items():
        torch.testing.assert_close(found[CompiledSVI][1][key], value, rtol=1e-7, atol=1e-9)
