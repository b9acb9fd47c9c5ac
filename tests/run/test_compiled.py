import copy
import io
import os
import time
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, init_to_value
from pyro.optim import PyroOptim
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_elbo_ext import (
    IWAE_ELBO,
    AutoFlow,
    AutoPlatedFlow,
    CompiledSVI,
    MeanField_ELBO,
    NaturalGradient,
    Price_ELBO,
    ScoreFunction_ELBO,
    ScoreRegression_ELBO,
    fit,
)
from pyro_elbo_ext.elbo.base import NonFiniteError
from pyro_elbo_ext.run.compiled import loop, packages
from pyro_elbo_ext.run.compiled import svi as compiled_svi
from pyro_elbo_ext.run.compiled.call import Call
from pyro_elbo_ext.run.compiled.graph import LossGraph, record
from pyro_elbo_ext.run.compiled.mutation import CompileError
from pyro_elbo_ext.run.compiled.noise import draw_ahead, draw_at_once
from pyro_elbo_ext.run.compiled.packages import PackageStore, fingerprint
from pyro_elbo_ext.run.distributed.averaging import running_averages
from pyro_elbo_ext.run.progress import Stages
from tests.run.cases import Coder, coins, coins_guide, leaves_of, params, regression


@pytest.fixture
def uncompiled(monkeypatch):
    """Steps operation by operation: what is not about compiling need not wait for it."""
    monkeypatch.setattr(compiled_svi, "compile_block", lambda step, *_: (loop._python_loop(step), "graph"))


# Graphs: the loss and gradient that were taken down are the ELBO's.

PAIRS = {
    "iwae, subsampled": (regression, AutoNormal, lambda: IWAE_ELBO(1), (7,)),
    "dreg, full rank": (regression, AutoMultivariateNormal, lambda: IWAE_ELBO(4, "dreg"), ()),
    "looped": (regression, AutoNormal, lambda: IWAE_ELBO(3, vectorize_particles=False), ()),
    "stl, flow": (regression, AutoFlow, lambda: IWAE_ELBO(4, "stl"), ()),
    "plated flow": (regression, AutoPlatedFlow, lambda: IWAE_ELBO(2), ()),
    "mean field": (regression, AutoNormal, lambda: MeanField_ELBO(2), ()),
    "price": (regression, AutoMultivariateNormal, lambda: Price_ELBO(2), ()),
    "score regression": (regression, AutoMultivariateNormal, lambda: ScoreRegression_ELBO(10), ()),
    "score function": (coins, lambda _: coins_guide, lambda: ScoreFunction_ELBO(4), ()),
    "running mean": (coins, lambda _: coins_guide, lambda: ScoreFunction_ELBO(4, baseline="running-mean"), ()),
    "vimco": (coins, lambda _: coins_guide, lambda: IWAE_ELBO(4, "vimco"), ()),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_graph_is_the_loss_and_its_gradient(name):
    model, make_guide, make_elbo, args = PAIRS[name]
    guide, elbo = make_guide(model), make_elbo()
    with pyro.poutine.trace(param_only=True):
        elbo.differentiable_loss(model, guide, *args)
    memory = {**running_averages(elbo), **(dict(guide.named_buffers()) if hasattr(guide, "named_buffers") else {})}
    before = {name: value.clone() for name, value in memory.items()}
    graph = record(elbo, model, guide, leaves_of(), memory, Call(args, {}))
    assert all(torch.equal(before[name], value) for name, value in memory.items())
    inputs = [*graph.leaves.values(), *graph.held, *graph.memory]
    for seed in (3, 4):
        torch.manual_seed(seed)
        with torch.no_grad():
            found = graph.module(*inputs)
        torch.manual_seed(seed)
        loss = elbo.differentiable_loss(model, guide, *args)
        grads = torch.autograd.grad(loss, list(graph.leaves.values()))
        for traced, eager in zip(found, [loss, *grads], strict=False):
            torch.testing.assert_close(traced, eager.detach(), rtol=1e-9, atol=1e-10)
        for traced, eager in zip(found[1 + len(grads) :], graph.memory, strict=True):
            torch.testing.assert_close(traced, eager)
        inputs[len(inputs) - len(graph.memory) :] = [value.clone() for value in graph.memory]
    assert bool(graph.memory) == ("flow" in name or name == "running mean")


# Compiled runs, without noise: the eager ones to rounding.


def compiled_as():
    """How steps run where they can be compiled: a GPU's are not put into a loop."""
    return "step" if torch.get_default_device().type == "cuda" else "loop"


def eager_and_compiled(optim, steps, args=(), model=regression, guide=AutoDelta):
    found = {}
    for kind in ("eager", "compiled"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = (SVI if kind == "eager" else CompiledSVI)(model, guide(model), optim(), IWAE_ELBO(1))
        if kind == "eager":
            losses = [svi.step(*args) for _ in range(steps)]
        else:
            losses = [*svi.run(2, *args), svi.step(*args), *svi.run(steps - 5, *args)]
            eager = SVI(model, svi.guide, svi.optim, IWAE_ELBO(1))
            losses += [eager.step(*args), eager.step(*args)]  # and on from there
            assert svi.how == compiled_as()
        found[kind] = np.array(losses), params()
    return found["eager"], found["compiled"]


def adam():
    return pyro.optim.Adam({"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1})


@pytest.mark.convergence
def test_without_noise_a_compiled_run_is_the_eager_one():
    (losses, expected), (again, found) = eager_and_compiled(adam, 120)
    np.testing.assert_allclose(again, losses, rtol=1e-8)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)
    assert losses[-1] < losses[0] - 20


@pytest.mark.convergence
def test_with_noise_it_reaches_the_posterior_and_takes_other_data_of_one_shape(caplog):
    """A conjugate normal mean, whose posterior is exact; no shape is new, so that nothing is compiled again."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    guide = AutoNormal(model)
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.02}), IWAE_ELBO(8, "stl"))
    assert isinstance(svi, SVI)
    for centre in (2.0, -1.0):
        x = centre + torch.randn(15)
        losses = svi.run(1500, x)
        assert losses.shape == (1500,)
        assert float(guide.locs.mu.detach()) == pytest.approx(float(x.sum() / 16), abs=0.02)
        assert float(guide.scales.mu.detach()) == pytest.approx(0.25, abs=0.01)
        evidence = dist.MultivariateNormal(torch.zeros(15), torch.eye(15) + 1.0).log_prob(x)
        assert svi.evaluate_loss(x) == pytest.approx(-float(evidence), abs=0.05)
        assert len(set(losses[:100])) == 100  # other noise in every step
    assert not [record for record in caplog.records if record.name == "pyro_elbo_ext"]


def test_another_shape_is_compiled_and_said_once(uncompiled, caplog):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.02}), IWAE_ELBO(8, "stl"))
    for length in (15, 15, 4, 4, 15):
        svi.step(torch.randn(length))
    assert [record.message for record in caplog.records if record.name == "pyro_elbo_ext"] == [
        "compiling another step: shapes, arguments, parameters or optimiser settings are new"
    ]


def test_a_vae_its_memory_and_data_that_are_held():
    """Batch norm's running means, and data in a closure that change in place."""
    start, rows = Coder(), torch.randn(6, 4)
    buffers = {}
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        coder, x = copy.deepcopy(start), rows.clone()
        coder.x = x

        elbo = IWAE_ELBO(2, max_plate_nesting=1)  # which else runs the pair once more to count its plates
        svi = kind(coder.model_of_x, coder.guide_of_x, pyro.optim.SGD({"lr": 1e-12}), elbo)
        losses = [svi.step() for _ in range(4)]
        x.add_(100.0)
        assert svi.step() > 100 * max(losses)
        buffers[kind] = {name: value.clone() for name, value in coder.named_buffers()}
    assert set(buffers[SVI]) >= {"encode.1.running_mean", "encode.1.num_batches_tracked"}
    for name, value in buffers[SVI].items():
        torch.testing.assert_close(buffers[CompiledSVI][name], value, rtol=1e-6, atol=1e-9)


def test_fit_takes_compiled_steps(tmp_path):
    """Many at once, and one at a time where somebody looks: the same steps, from a file as well."""
    found = {}
    for name, settings in {
        "own loop": None,
        "blocks": {},
        "single": {"callbacks": [lambda state: None]},
        "file": {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 7},
    }.items():
        pyro.clear_param_store()
        svi = CompiledSVI(regression, AutoDelta(regression), pyro.optim.Adam({"lr": 0.05}), IWAE_ELBO(1))
        if settings is None:
            losses = svi.run(20)
        else:
            losses = fit(svi, num_steps=13 if name == "file" else 20, progress=False, **settings).history["loss"]
        if name == "file":
            pyro.clear_param_store()
            svi = CompiledSVI(regression, AutoDelta(regression), pyro.optim.Adam({"lr": 0.05}), IWAE_ELBO(1))
            losses = fit(svi, num_steps=20, progress=False, **settings).history["loss"]
        found[name] = losses, params()
    for losses, values in found.values():
        np.testing.assert_allclose(losses, found["own loop"][0], rtol=1e-9)
        for key, value in values.items():
            torch.testing.assert_close(value, found["own loop"][1][key])
    assert len(set(found["own loop"][0])) == 20  # without noise, so that all steps moved


@pytest.mark.convergence
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "graph"])
def test_it_stops_before_a_step_that_is_not_finite(compiled, request):
    if not compiled:
        request.getfixturevalue("uncompiled")

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        pyro.factor("fall", 1e-9 * torch.log(x - 0.5) - x)

    def guide():
        pyro.sample("x", dist.Delta(pyro.param("loc", torch.tensor(1.0))))

    def make(kind):
        pyro.clear_param_store()
        return kind(model, guide, pyro.optim.SGD({"lr": 0.01}), IWAE_ELBO(1))

    eager, steps = make(SVI), 0
    with pyro.validation_enabled(False), pytest.raises(NonFiniteError):
        while steps < 2000:
            before = params()
            eager.step()
            steps += 1
    svi = make(CompiledSVI)
    with pytest.raises(NonFiniteError, match=f"in step {steps + 1} of 2000"):
        svi.run(2000)
    assert svi.how == (compiled_as() if compiled else "graph")
    assert steps > 20
    torch.testing.assert_close(params()["loc"], before["loc"])


def test_an_interruption_leaves_parameters_and_optimiser_in_step(monkeypatch):
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = CompiledSVI(regression, AutoDelta(regression), optim, IWAE_ELBO(1))
    svi.step()
    (program,) = svi._programs.values()
    calls = []

    def interrupted(*args):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return program.block(*args)

    svi._programs = {key: program._replace(block=interrupted) for key in svi._programs}
    with pytest.raises(KeyboardInterrupt):
        svi.run(10_000)
    assert {int(own["step"]) for o in optim.optim_objs.values() for own in o.state.values()} == {1 + 2 * loop.BLOCK}


@pytest.mark.parametrize("missing", ["loop", "compiler"])
def test_what_is_missing_is_said_and_gone_without(missing, monkeypatch, caplog, request):
    if missing == "loop" and request.config.getoption("--device") != "cpu":
        pytest.skip("a GPU's steps are not compiled into a loop")

    def fails(*args):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(loop, "_packaged_loop", fails)
    if missing == "compiler":
        monkeypatch.setattr(loop, "_compiled", fails)
    svi = CompiledSVI(regression, AutoDelta(regression), pyro.optim.Adam({"lr": 0.05}), IWAE_ELBO(1))
    losses = svi.run(40)
    assert svi.how == {"loop": "step", "compiler": "graph"}[missing]
    assert f"compiling the {'step' if missing == 'compiler' else 'loop'} failed (no such thing)" in caplog.text
    pyro.clear_param_store()
    eager = SVI(regression, AutoDelta(regression), pyro.optim.Adam({"lr": 0.05}), IWAE_ELBO(1))
    np.testing.assert_allclose(losses, [eager.step() for _ in range(40)], rtol=1e-9)


def test_nothing_is_left_changed():
    import torch._dynamo.config
    import torch._inductor.config

    before = {m.__name__: m.save_config_portable() for m in (torch._inductor.config, torch._dynamo.config)}
    svi = CompiledSVI(coins, coins_guide, pyro.optim.Adam({"lr": 0.05}), ScoreFunction_ELBO(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi.run(2)
    assert before == {m.__name__: m.save_config_portable() for m in (torch._inductor.config, torch._dynamo.config)}
    assert all(leaf.grad is None for leaf in leaves_of().values())


# What cannot be compiled.


def branches():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z if z > 0 else -z, 1.0), obs=torch.tensor(1.0))


def takes_a_number_out():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("x", torch.tensor(z.item()))


def draws_elsewhere():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("x", np.random.uniform() * z)  # noqa: NPY002


def counts():
    COUNT[0] += 1
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("x", COUNT[0] * z)


COUNT, TOTAL = [0], torch.zeros((), dtype=torch.float64, device="cpu")


def remembers():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    TOTAL.to(z.device).add_(z.detach().sum())
    pyro.factor("x", TOTAL.to(z.device) * z)


class OwnSteps(PyroOptim):
    def __init__(self):
        super().__init__(torch.optim.Adam, {"lr": 0.1})

    def __call__(self, *args, **kwargs):
        super().__call__(*args, **kwargs)


def regression_with_a_weight():
    regression()
    pyro.factor("penalty", -pyro.param("weight", torch.tensor(1.0)).square())


REFUSED = {
    "a branch": (branches, adam, None, r"test_compiled.py, line \d+: .*if z > 0.*number was taken out of a tensor"),
    "item": (takes_a_number_out, adam, None, r"line \d+: .*z.item\(\).*number was taken out of a tensor"),
    "another generator": (draws_elsewhere, adam, None, "draws random numbers of Python or NumPy"),
    "a counter": (counts, adam, None, "from one random state the loss is"),
    "a total": (remembers, adam, None, r"changes a tensor of shape \(\) that model or guide holds in place"),
    "Pyro's ELBO": (branches, adam, Trace_ELBO(), "Trace_ELBO has a loss_and_grads of its own.*IWAE_ELBO"),
    "an unknown optimiser": (coins, lambda: pyro.optim.Rprop({"lr": 0.1}), None, "knows Adam, AdamW, SGD.*not Rprop"),
    "clip_args": (coins, lambda: pyro.optim.Adam({"lr": 0.1}, {"clip_norm": 1.0}), None, "knows no clip_args"),
    "settings by name": (
        coins, lambda: pyro.optim.Adam(lambda name: {"lr": 0.1, "eps": 1e-3 * len(name)}), None, "'eps' differs",
    ),
    "an optimiser of its own steps": (
        coins, OwnSteps, None, "cannot follow OwnSteps, whose steps are its own",
    ),
    "natural steps beside an unknown one": (
        regression_with_a_weight, lambda: NaturalGradient(optim=pyro.optim.Rprop({"lr": 0.1})), None, "not Rprop",
    ),
    "amsgrad": (coins, lambda: pyro.optim.Adam({"lr": 0.1, "amsgrad": True}), None, "has no amsgrad=True"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_eager_if_asked(name, caplog):
    model, optim, loss, message = REFUSED[name]
    guide = coins_guide if model is coins else AutoNormal(model)
    settings = (loss or (ScoreFunction_ELBO(2) if model is coins else IWAE_ELBO(1)),)
    with pytest.raises(CompileError, match=message):
        CompiledSVI(model, guide, optim(), *settings).step()
    svi = CompiledSVI(model, guide, optim(), *settings, fallback="eager")
    assert np.isfinite(svi.run(3)).all()
    assert svi.how == "eager"
    assert "steps are eager" in caplog.text


@pytest.mark.convergence
def test_a_guide_that_builds_itself_is_left_as_it_is(uncompiled):
    """The first call makes a flow's parameters and buffers, and trains them as SVI does."""

    def model():
        pyro.sample("z", dist.Normal(torch.tensor([3.0, -2.0]), 0.1).to_event(1))

    found = {}
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = kind(model, AutoFlow(model), pyro.optim.Adam({"lr": 0.005}), IWAE_ELBO(16, "stl"))
        start = svi.step()
        for _ in range(150):
            svi.step()
        found[kind] = start, np.mean([svi.evaluate_loss() for _ in range(20)]), dict(svi.guide.named_buffers())
    assert found[SVI][0] == pytest.approx(found[CompiledSVI][0], abs=3.0)
    assert max(found[SVI][1], found[CompiledSVI][1]) < 0.1
    for name, value in found[SVI][2].items():
        assert torch.equal(value, found[CompiledSVI][2][name]), name


def test_what_a_step_depends_on_is_noticed(uncompiled):
    """Settings of the loss, arguments by value, modes of modules, another optimiser: each as an eager step has it."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.999999))

    def model(scale, words=("a",)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.factor("f", scale * (1.0 + len(words[0])) * z.sum(-1) + 1e4 * net(torch.ones(1)).square().sum())

    def guide(scale, words=("a",)):
        pyro.sample("z", dist.Delta(pyro.param("loc", torch.ones(1)), event_dim=1))

    elbo = MeanField_ELBO(1)
    svi = CompiledSVI(model, guide, pyro.optim.SGD({"lr": 0.0}), elbo)

    def same(*args):
        return svi.step(*args) == pytest.approx(svi.evaluate_loss(*args), rel=1e-6)

    dropped = svi.step(1.0)
    assert dropped == pytest.approx(svi.evaluate_loss(1.0)) and same(2.0) and same(2.0, ("longer",))
    net.eval()
    assert abs(svi.step(1.0) - dropped) > 1 and same(1.0)
    before, elbo.beta = svi.step(1.0), 5.0
    assert abs(svi.step(1.0) - before) > 1 and same(1.0)
    svi.optim = pyro.optim.SGD({"lr": 0.5})
    svi.step(1.0)
    assert float(pyro.param("loc").detach()) != 1.0


def test_numbers_of_steps():
    svi = CompiledSVI(coins, coins_guide, adam(), ScoreFunction_ELBO(2))
    for number, error in ((0, ValueError), (-1, ValueError), (2.5, TypeError)):
        with pytest.raises(error):
            svi.run(number)


def test_batch_norm_of_no_module_is_refused():
    coder = Coder()
    svi = CompiledSVI(lambda x: coder.model(x), lambda x: coder.guide(x), adam(), IWAE_ELBO(2))
    with pytest.raises(CompileError, match="no buffers of model or guide|model or guide holds in place"):
        svi.step(torch.randn(5, 4))


def test_unknown_fallback():
    with pytest.raises(ValueError, match='fallback must be "raise" or "eager", got \'python\''):
        CompiledSVI(coins, coins_guide, adam(), IWAE_ELBO(1), fallback="python")


def test_small_draws_are_parts_of_one():
    def draws(x):
        a, b, large = torch.empty(3).normal_(), torch.empty(2, 2).normal_(), torch.empty(5000).normal_()
        c = torch.empty(1, dtype=torch.float32).normal_()
        return x + a.sum(), a, b, c, large

    x = torch.zeros(())
    graph = make_fx(draws)(x)
    draw_at_once(graph)
    drawn = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.normal_.default)
    assert sorted(node.args[0].args[0][0] for node in drawn) == [1, 7, 5000]
    found = [graph(x) for _ in range(3000)]
    a, b, c = (torch.stack([run[i] for run in found]) for i in (1, 2, 3))
    torch.testing.assert_close(torch.stack([run[0] for run in found]), a.sum(1))
    assert (b.shape[1:], c.dtype) == ((2, 2), torch.float32)
    values = torch.cat([a, b.flatten(1), c.to(a.dtype)], 1)
    assert (values.mean(0).abs() < 4.5 / 3000**0.5).all()
    assert ((values.T @ values / 3000 - torch.eye(8)).abs() < 4.5 * 2**0.5 / 3000**0.5).all()


def test_numbers_drawn_ahead_are_the_same_however_steps_are_divided(on_cpu):
    """Those of one draw: beside another, or too many, they stay where they are."""

    def beside(x):
        return x + torch.empty(2).normal_() + torch.empty(2).uniform_()

    def many(x):
        return x + torch.empty(2000).normal_().sum()

    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(20, dtype=dtype)
        step = make_fx(lambda x: x + torch.empty(20, dtype=x.dtype).normal_())(x)
        ahead, noise = draw_ahead(step)
        assert (noise.width, len(step.graph.find_nodes(op="placeholder"))) == (32, 1)
        torch.manual_seed(2)
        rows = noise.rows(8)
        assert rows.dtype == dtype
        assert torch.equal(ahead(rows[3], x), rows[3][:20])
        torch.manual_seed(2)
        assert torch.equal(torch.cat([noise.rows(1), noise.rows(4), noise.rows(3)]), rows)
    for function in (beside, many):
        step = make_fx(function)(torch.zeros(2))
        assert draw_ahead(step) == (step, None)


def test_what_a_loop_carries_is_joined_and_comes_apart():
    parts = [torch.rand(3), torch.rand(()), torch.tensor(4), torch.rand(2, 3).T, torch.rand(2, 1)]
    joined = loop._Joined(parts)
    together = joined.join(parts)
    assert [part.shape for part in together] == [(6,), (), (3, 2)]
    for part, again in zip(parts, joined.split(*together), strict=True):
        torch.testing.assert_close(again, part, rtol=0, atol=0)
        assert again.data_ptr() != part.data_ptr()


# What a compiled call would take as it comes.


def two_parameters():
    pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("b", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    pyro.factor("f", -3.0 * HELD.to(torch.get_default_dtype()).sum())


HELD = torch.arange(6.0, device="cpu").reshape(2, 3)[:, ::2]


@pytest.mark.parametrize("what", ["rate", "count", "dtype"])
def test_optimiser_and_parameters_may_change_their_form(what, uncompiled, caplog):
    found = {}
    for kind in (SVI, CompiledSVI):
        pyro.clear_param_store()
        optim = pyro.optim.SGD({"lr": 0.1}) if what == "dtype" else pyro.optim.Adam({"lr": 0.1})
        guide = AutoDelta(two_parameters, init_loc_fn=init_to_value(values={"a": torch.ones(2), "b": torch.ones(3)}))
        svi = kind(two_parameters, guide, optim, IWAE_ELBO(1))
        losses = [svi.step() for _ in range(3)]
        leaves = leaves_of()
        first = next(name for name in leaves if name.endswith("a"))
        if what == "rate":
            optim.optim_objs[leaves[first]].param_groups[0]["lr"] = 0.0
        elif what == "count":
            for _ in range(4):
                leaves[first].grad = torch.ones_like(leaves[first])
                optim([leaves[first]])
            leaves[first].grad = None
        else:
            guide.float()
        losses += [svi.step() for _ in range(3)]
        states = [optim.optim_objs[leaf].state.get(leaf, {}) for leaf in leaves.values()]
        found[kind] = losses, params(), [float(kept["step"]) for kept in states if "step" in kept]
    assert "compiling another step" in caplog.text  # for a call from the disk would not look at what it is given
    np.testing.assert_allclose(found[SVI][0], found[CompiledSVI][0], rtol=1e-6)
    for key, value in found[SVI][1].items():
        torch.testing.assert_close(found[CompiledSVI][1][key], value)
    assert found[SVI][2] == found[CompiledSVI][2] == {"rate": [6, 6], "count": [10, 6], "dtype": []}[what]


def test_tensors_are_given_in_one_form_whoever_shares_them():
    x = torch.arange(12.0).reshape(3, 4)
    graph = LossGraph(None, {}, [x[:, ::2]], [])
    for args in ((torch.ones(2),), (x,), (x.T,), (x[0],)):
        given = compiled_svi._given(Call(args, {}), graph)
        assert given[-1].stride() == (2, 1)
        assert all(part.is_contiguous() for part in given)
        assert len({part.untyped_storage().data_ptr() for part in given}) == len(given)


def test_what_has_no_dense_layout_is_refused_or_eager():
    x = torch.eye(3).to_sparse()

    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("f", -(torch.sparse.mm(x, w[:, None]) ** 2).sum())

    with pytest.raises(CompileError, match=r"layout torch.sparse_coo: give dense"):
        CompiledSVI(model, AutoDelta(model), adam(), IWAE_ELBO(1)).step(x)
    svi = CompiledSVI(model, AutoDelta(model), adam(), IWAE_ELBO(1), fallback="eager")
    assert np.isfinite([svi.step(x), svi.evaluate_loss(x)]).all()


# What another process compiled.


def test_a_second_process_loads_what_the_first_compiled(on_cpu, tmp_path, monkeypatch):
    """In this one a new SVI does the same; nothing is compiled, and the steps are those of the first."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    losses = []
    for make in (loop._package, None):
        monkeypatch.setattr(loop, "_package", make)
        pyro.clear_param_store()
        svi = CompiledSVI(coins, coins_guide, pyro.optim.Adam({"lr": 0.05}), ScoreFunction_ELBO(2))
        torch.manual_seed(0)
        losses.append(svi.run(300))
        assert svi.how == "loop"
    np.testing.assert_array_equal(*losses)
    (package,) = (tmp_path / "pyro_elbo_ext").iterdir()
    package.write_bytes(b"cut short")
    monkeypatch.undo()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    svi._programs.clear()
    assert len(svi.run(3)) == 3
    assert svi.how == "loop"
    assert package.stat().st_size > 100_000


def test_packages_are_told_apart():
    def step(x):
        return (x * 2 + 1,)

    x = torch.ones(3)
    graphs = [make_fx(f)(x) for f in (step, lambda x: (x * 3 + 1,), lambda x: (x + torch.tensor([1.0, 2.0, 3.0]),))]
    names = [fingerprint(graph, [x]) for graph in graphs]
    graphs[2]._tensor_constant0 = torch.tensor([1.0, 2.0, 4.0])
    names += [fingerprint(graphs[2], [x]), fingerprint(graphs[0], [x.float()]), fingerprint(graphs[0], [x], 1)]
    graphs[2]._tensor_constant0 = torch.tensor([[1.0, 2.0, 4.0]])
    names.append(fingerprint(graphs[2], [x]))
    torch.set_default_dtype(torch.float32)  # which graphs leave unsaid
    names.append(fingerprint(graphs[0], [x]))
    torch.set_default_dtype(torch.float64)
    assert len(set(names)) == len(names)
    assert fingerprint(make_fx(step)(x), [x]) == names[0]


def test_a_folder_that_cannot_be_written_to_is_gone_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    store, made = PackageStore(), []
    assert store.load("name") is None
    monkeypatch.setattr(packages, "_loaded", lambda path: made.append(path.read_text()))
    store.save("name", lambda path: path.write_text("call"))
    assert made == ["call"]


def test_without_a_home_nothing_is_kept(monkeypatch):
    for name in ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for home in ("", "/"):
        monkeypatch.setenv("HOME", home)
        assert PackageStore().folder is None
        assert PackageStore().load("name") is None
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(PackageStore().folder) == "/home/someone/.cache/pyro_elbo_ext"


def test_a_package_that_may_not_be_touched_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(packages, "_loaded", lambda path: path.name)

    def refuse(path):
        raise PermissionError

    monkeypatch.setattr(packages.Path, "touch", refuse)
    assert PackageStore().load("name") == "name.pt2"


def test_a_package_that_does_not_run_is_made_anew(on_cpu, monkeypatch, caplog):
    class Store:
        folder = "folder"

        def load(self, name):
            def call(values):
                raise RuntimeError("expected inputs vector size to be 8")

            return call

        def save(self, name, make):
            raise RuntimeError("cannot be made here")

    def fails(*args):
        raise RuntimeError("nor compiled")

    monkeypatch.setattr(loop, "PackageStore", Store)
    monkeypatch.setattr(loop, "_compiled", fails)
    svi = CompiledSVI(coins, coins_guide, adam(), ScoreFunction_ELBO(2))
    svi.step()
    assert svi.how == "graph"
    assert "a compiled loop in folder cannot be run, and is made anew" in caplog.text
    assert "compiling the loop failed (cannot be made here)" in caplog.text


def test_the_longest_unused_packages_go(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(packages, "KEPT", 3)
    monkeypatch.setattr(packages, "_loaded", lambda path: path)
    store = PackageStore()
    for age, name in ((7200, "making-old"), (0, "making-new")):
        (store.folder / name).mkdir(parents=True)
        os.utime(store.folder / name, (time.time() - age,) * 2)
    for i in range(5):
        path = store.save(str(i), lambda path: path.touch())
        os.utime(path, (i, i))
    assert sorted(path.stem for path in store.folder.iterdir()) == ["2", "3", "4", "making-new"]


def test_what_is_being_done_is_said(uncompiled):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with Stages("CompiledSVI", file=out) as stages:
        stages.say("compiling")
    assert "CompiledSVI: compiling [00:0" in out.getvalue()
