"""Flow guides among Pyro's own: states, stores, copies, summaries, warm starts, other guides, other flows."""

import copy
import io
import math
import pickle
import statistics

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal, init_to_value

from pyro_elbo_ext import VRIWAE_ELBO, AutoFlow, AutoPlatedFlow, make_flow
from pyro_elbo_ext.guides.zuko import import_zuko
from tests.cases import nested_model
from tests.guides.cases import GUIDES, log_weight, perturb, perturb_built, rows, schools


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_a_state_loads_into_a_fresh_guide(make):
    guide = perturb_built(make(schools))
    state = io.BytesIO()
    torch.save(guide.state_dict(), state)
    state.seek(0)
    fresh = make(schools)
    fresh.load_state_dict(torch.load(state, weights_only=True))
    for run in (guide, fresh):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        run.found = log_weight(schools, run)[0]
    assert guide.found == fresh.found
    built = make(schools)
    built.build()
    built.load_state_dict(guide.state_dict())
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    assert log_weight(schools, built)[0] == guide.found


def test_a_loaded_param_store_reaches_a_fresh_guide():
    guide = perturb_built(AutoFlow(schools))
    guide()
    state = pyro.get_param_store().get_state()
    pyro.set_rng_seed(3)
    before = log_weight(schools, guide)[0]
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    fresh = AutoFlow(schools)
    fresh.build()
    pyro.set_rng_seed(3)
    assert log_weight(schools, fresh)[0] == before
    assert (
        pyro.param("AutoFlow.weights").data_ptr() == fresh.weights.data_ptr()
    )  # what an optimiser steps is what the guide uses


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda guide: pickle.loads(pickle.dumps(guide))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_a_guide_is_copied_and_pickled(make, how):
    guide = perturb_built(make(schools))
    guide()
    other = how(guide)
    found = []
    for run in (guide, other, guide):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        found.append(log_weight(schools, run)[0])
    assert found[0] == found[1] == found[2]
    with torch.no_grad():
        other.weights.add_(1.0)
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    assert log_weight(schools, guide)[0] == found[0]


def test_a_loaded_state_goes_before_the_param_store():
    guide = perturb_built(AutoPlatedFlow(schools))
    guide()
    state = copy.deepcopy(guide.state_dict())
    perturb(guide)
    for restored in (AutoPlatedFlow(schools), guide):
        restored.load_state_dict(state)
        restored()
        assert torch.equal(restored.weights, state["weights"])
        assert torch.equal(pyro.param("AutoPlatedFlow.weights"), state["weights"])


def test_a_warm_start_reaches_the_param_store():
    guide = AutoFlow(schools)
    guide()
    guide.warm_start("normal", num_steps=20)
    pyro.set_rng_seed(3)
    before = guide()["theta"]
    state = pyro.get_param_store().get_state()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    fresh = AutoFlow(schools)
    fresh.build()
    pyro.set_rng_seed(3)
    assert torch.equal(fresh()["theta"], before)


def test_a_store_that_is_cleared_or_loaded_later_is_noticed():
    guide = perturb_built(AutoPlatedFlow(schools))
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step()
    first = guide.weights.detach().clone()
    state = {part: dict(values) for part, values in pyro.get_param_store().get_state().items()}
    state["params"] = {name: value.detach().clone().requires_grad_() for name, value in state["params"].items()}
    svi.step()
    assert not torch.equal(guide.weights, first)
    pyro.get_param_store().set_state(state)
    guide()
    assert torch.equal(guide.weights, first) and pyro.param("AutoPlatedFlow.weights") is guide.weights
    SVI(schools, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert not torch.equal(guide.weights, first)
    pyro.clear_param_store()
    guide()
    assert "AutoPlatedFlow.start" in pyro.get_param_store()
    assert pyro.param("AutoPlatedFlow.weights") is guide.weights


def test_a_warm_start_knows_the_rows_of_its_minibatch():
    def model(batch):
        scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0), 0.1))
        with rows(batch) as i:
            pyro.sample("z", dist.Normal(100.0 * i, scale))

    guide = AutoPlatedFlow(model, create_plates=rows)
    guide.warm_start(model, 3)  # the prior, which is this model's posterior
    drawn = poutine.trace(guide).get_trace(3)
    z, i = drawn.nodes["z"]["value"], drawn.nodes["data"]["value"]
    assert (z - 100 * i).abs().max() < 40  # another row's prior is a hundred away


def test_a_warm_start_leaves_the_model_alone():
    module = pyro.nn.PyroModule[torch.nn.Linear](1, 1)

    def model():
        pyro.module("m", module)
        scale = pyro.param("scale", lambda: torch.tensor(0.3))
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(module(z.reshape(-1, 1)).sum() * scale, 1.0), obs=torch.tensor(3.0))

    Trace_ELBO().loss(model, AutoDelta(poutine.block(model, expose=["z"])))
    before = {name: value.clone() for name, value in pyro.get_param_store().items()}
    for source in ("normal", "laplace"):
        AutoFlow(model).warm_start(source, num_steps=20, num_samples=1)
    assert {name for name in pyro.get_param_store()} == set(before)
    assert all(torch.equal(pyro.param(name), value) for name, value in before.items())


def test_a_guide_whose_model_does_not_pickle_asks_for_it():
    def local():
        schools()

    guide = AutoPlatedFlow(local)
    guide()
    other = pickle.loads(pickle.dumps(guide))
    with pytest.raises(RuntimeError, match="guide.model = model"):
        other()
    other.model = local
    other()
    copy.deepcopy(guide)()  # a copy shares the model


def test_building_leaves_random_state_alone():
    for make in GUIDES.values():
        before = torch.get_rng_state()
        make(schools).build()
        assert torch.equal(torch.get_rng_state(), before)


def test_names_are_stable():
    AutoPlatedFlow(schools)()
    names = ("start", "weights", "centering", "rows$$$rows_0.table")
    assert set(pyro.get_param_store()) == {f"AutoPlatedFlow.{name}" for name in names}


def test_double_precision_follows_the_model():
    guide = AutoFlow(schools)
    guide()
    assert {p.dtype for p in guide.parameters()} == {torch.get_default_dtype()}


def test_it_starts_where_it_is_told():
    start = {"mu": torch.tensor(3.0), "tau": torch.tensor(2.0), "theta": torch.arange(4.0)}
    for make in GUIDES.values():
        guide = make(schools, init_loc_fn=init_to_value(values=start), init_scale=1e-3)
        median = guide.median()
        assert abs(float(median["mu"]) - 3) < 0.1 and abs(float(median["tau"]) - 2) < 0.1
        expected = start["theta"] if make is AutoFlow else torch.full((4,), 1.5)  # one flow for all elements
        assert torch.allclose(median["theta"], expected, atol=0.2)


def test_median_and_quantiles_have_the_sites_shapes():
    for make in GUIDES.values():
        guide = make(nested_model)
        median, quantiles = guide.median(), guide.quantiles([0.05, 0.5, 0.95])
        assert {name: tuple(value.shape) for name, value in median.items()} == {"a": (3,), "b": (2, 3), "w": (2, 3, 2)}
        assert all(value.shape == (3, *median[name].shape) for name, value in quantiles.items())
        assert all((value[0] < value[1]).all() and (value[1] < value[2]).all() for value in quantiles.values())


@pytest.mark.convergence
@pytest.mark.parametrize("source", ["normal", "laplace", "guide"])
def test_a_warm_start_is_the_gaussian(source):
    def model():
        z = pyro.sample("z", dist.MultivariateNormal(torch.tensor([3.0, -1.0]), torch.tensor([[2.0, 1.2], [1.2, 1.0]])))
        pyro.sample("s", dist.LogNormal(z[..., 0] / 3, 0.5))

    pyro.set_rng_seed(0)
    before = list(pyro.get_param_store())
    guide = AutoFlow(model, affine="tril")
    other = perturb(AutoFlow(model, affine="tril", noncenter=False)) if source == "guide" else source
    if source == "guide":
        other.build()
        other.warm_start("laplace", num_samples=4000)
    guide.warm_start(other, num_steps=1500, num_samples=4000)
    if source != "guide":
        assert list(pyro.get_param_store()) == before
    pyro.clear_param_store()
    losses = torch.tensor([VRIWAE_ELBO(1.0, 500).loss(model, guide) for _ in range(20)])
    limit = 0.85 if source == "normal" else 0.02  # a mean field is 0.7 nats away
    pyro.clear_param_store()
    assert float(losses.mean()) < limit < VRIWAE_ELBO(1.0, 500).loss(model, AutoFlow(model))


def test_a_scale_does_not_round_to_zero():
    start = {"mu": torch.tensor(0.0), "tau": torch.tensor(1e-30), "theta": torch.zeros(4)}
    for make in GUIDES.values():
        guide = make(schools, init_loc_fn=init_to_value(values=start), init_scale=600.0)
        values = torch.stack([guide()["tau"].detach() for _ in range(50)])
        assert (values > 0).all() and torch.isfinite(values).all() and float(values.min()) < 1e-300


def test_predictive_takes_the_guide():
    for make in GUIDES.values():
        drawn = Predictive(schools, guide=make(schools), num_samples=6)()
        assert drawn["theta"].shape == (6, 4)


def test_it_is_a_part_of_a_guide_list():
    guide = AutoGuideList(schools)
    guide.append(AutoDelta(poutine.block(schools, expose=["mu"])))
    guide.append(AutoFlow(poutine.block(schools, hide=["mu"])))
    Trace_ELBO().loss_and_grads(schools, guide)
    assert set(guide.median()) == {"mu", "tau", "theta"}


def test_a_prior_given_what_another_guide_holds_is_left_centred():
    guide = AutoGuideList(schools)
    guide.append(AutoNormal(poutine.block(schools, expose=["tau"])))
    guide.append(AutoFlow(poutine.block(schools, hide=["tau"])))
    guide()
    assert guide[1].centering_weights == {}
    assert "theta" in guide[1]()


@pytest.mark.parametrize("name", ["items", "keys", "type", "global", "a.b"])
def test_plates_may_be_called_anything(name):
    def model():
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate(name, 3):
            pyro.sample("z", dist.Normal(mu, 1.0))

    assert AutoPlatedFlow(model)()["z"].shape == (3,)


@pytest.mark.convergence
def test_discrete_sites_are_left_to_enumeration():
    def model():
        p = pyro.sample("p", dist.Beta(torch.tensor(1.0), 1.0))
        with pyro.plate("rows", 5):
            z = pyro.sample("z", dist.Bernoulli(p), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=torch.tensor([0.0, 0.1, 2.0, 1.9, 2.2]))

    guide = AutoFlow(poutine.block(model, hide=["z"]), init_loc_fn=init_to_value(values={"p": torch.tensor(0.01)}))
    svi = SVI(
        model, guide, pyro.optim.Adam({"lr": 0.02}), TraceEnum_ELBO(8, vectorize_particles=True, max_plate_nesting=1)
    )
    start = sum(svi.evaluate_loss() for _ in range(10))
    for _ in range(200):
        svi.step()
    assert sum(svi.evaluate_loss() for _ in range(10)) < 100 < start  # nats: 145 before, 80 after


@pytest.mark.convergence
def test_zuko_flows_and_flows_of_ones_own():
    zuko = import_zuko()
    torch_dtype = torch.get_default_dtype()
    for flow in (
        zuko.flows.NICE,
        zuko.flows.NICE(6).to(torch_dtype),
        lambda d, c: make_flow("coupling", d, c, transforms=2),
    ):
        pyro.clear_param_store()
        guide = AutoFlow(schools, flow=flow)
        svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.01}), VRIWAE_ELBO(1.0, 16))
        start = sum(svi.evaluate_loss() for _ in range(10))
        for _ in range(70):
            svi.step()
        assert sum(svi.evaluate_loss() for _ in range(10)) < 95 < start  # nats: 110 or more before, 84 or less after


@pytest.mark.parametrize("guide", [AutoFlow(schools, hidden_features=(5, 7)), AutoPlatedFlow(schools, {"schools": 2})])
def test_networks_are_as_deep_as_they_are_asked_to_be(guide):
    """By default with two layers where there is a context, and one where there is none."""
    guide.build()
    found = {key: [len(layer.hyper) // 2 for layer in flow.transform.transforms] for key, flow in guide.flows.items()}
    joint = isinstance(guide, AutoFlow)
    assert found == ({"block_latent": [2] * 3} if joint else {"block_global": [1] * 3, "block_schools": [2] * 3})
    if joint:
        assert guide.flows["block_latent"].transform.transforms[0].hyper[2].weight.shape == (7, 5)


@pytest.mark.convergence
@pytest.mark.parametrize("base", ["studentt", "mixture"])
@pytest.mark.parametrize("flow", ["iaf", "coupling", "spline"])
def test_every_flow_and_base_trains(flow, base):
    guide = AutoFlow(schools, flow=flow, base=base)
    svi = SVI(schools, guide, pyro.optim.Adam({"lr": 0.01}), VRIWAE_ELBO(1.0, 16))
    start = statistics.median(svi.evaluate_loss() for _ in range(11))  # a mixture's first tails spoil a mean
    for _ in range(70):
        svi.step()
    after = [svi.evaluate_loss() for _ in range(11)]
    assert all(map(math.isfinite, after)) and statistics.median(after) < 9.5 < start  # nats: 10 or more, then 8 to 9
