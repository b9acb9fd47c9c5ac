"""What flow guides refuse, and what they say."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from pyro_elbo_ext import AutoFlow, AutoPlatedFlow, make_flow
from pyro_elbo_ext.guides.zuko import import_zuko
from tests.cases import NUM_DATA, local_model
from tests.guides.cases import levels, rows, schools


def discrete():
    pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))


def dynamic():
    top = pyro.sample("top", dist.LogNormal(torch.tensor(0.0), 1.0))
    pyro.sample("z", dist.Uniform(0.0, top))


def sequential():
    for i in pyro.plate("rows", 2):
        pyro.sample(f"z{i}", dist.Normal(torch.tensor(0.0), 1.0))


def undeclared():
    with pyro.plate("rows", 3, dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(2, 3), 1.0))


def by_row(batch):
    with rows(batch) as i:
        pyro.sample("z", dist.Uniform(0.0, 1.0 + torch.arange(float(NUM_DATA))[i]))


def chosen(rows):
    with pyro.plate("data", NUM_DATA, subsample=rows):
        pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))


def later(guide, *calls):
    for args in calls:
        guide(*args)


def grown(batch, size=NUM_DATA):
    with pyro.plate("data", size, subsample_size=batch):
        pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))


REFUSALS = {
    "discrete": (lambda: AutoFlow(discrete)(), ValueError, "latent site 'z' is a Bernoulli, which is discrete"),
    "dynamic": (lambda: AutoFlow(dynamic)(), ValueError, r"support of latent site 'z' depends on \['top'\]"),
    "sequential": (lambda: AutoFlow(sequential)(), NotImplementedError, "'z0' is in plate 'rows', which is sequential"),
    "no-latents": (lambda: AutoFlow(lambda: None)(), ValueError, "no latent sites"),
    "undeclared": (lambda: AutoPlatedFlow(undeclared)(), ValueError, r"batch shape \(2, 3\), of which dimension -2"),
    "row-support": (lambda: AutoPlatedFlow(by_row, create_plates=rows)(3), ValueError, "'z' differs between the rows"),
    "subsampled": (lambda: AutoFlow(local_model)(3), ValueError, r"plate 'data', which is subsampled \(3 of 8\)"),
    "uncovered": (
        lambda: AutoPlatedFlow(schools, {})(),
        ValueError,
        "'theta' is in plate 'schools', for which amortize",
    ),
    "unknown": (
        lambda: AutoPlatedFlow(schools, {"x": 3})(),
        ValueError,
        r"amortize names plate 'x', but .* \['schools'\]",
    ),
    "nested-part": (lambda: AutoPlatedFlow(levels, {"groups": 2})(), ValueError, "'member' is in plate 'members'"),
    "rows": (
        lambda: AutoPlatedFlow(schools, {"schools": torch.ones(3, 2)})(),
        ValueError,
        "have 3 rows, but its minibatch has 4",
    ),
    "flat": (
        lambda: AutoPlatedFlow(schools, {"schools": torch.ones(4)})(),
        ValueError,
        r"shape \(4,\); expected \[schools, features\]",
    ),
    "integers": (
        lambda: AutoPlatedFlow(schools, {"schools": torch.ones(4, 2, dtype=torch.long)})(),
        ValueError,
        "tensor of floats",
    ),
    "context": (
        lambda: later(AutoPlatedFlow(grown, {"data": lambda batch: torch.ones(8, batch)}), (3,), (4,)),
        ValueError,
        r"have shape \(8, 4\), but the guide was built for \[data, 3\]",
    ),
    "hidden-plate": (
        lambda: AutoPlatedFlow(poutine.block(local_model, expose=["z"]))(3),
        ValueError,
        "'data' is subsampled and hidden from the guide",
    ),
    "learning-features": (
        lambda: AutoPlatedFlow(schools, {"schools": torch.ones(4, 2, requires_grad=True)}),
        ValueError,
        "is a tensor that learns",
    ),
    "chosen": (
        lambda: AutoPlatedFlow(chosen)(torch.tensor([1, 4])),
        ValueError,
        "'data' is given its rows in the model",
    ),
    "bisection": (lambda: AutoFlow(schools, flow=import_zuko().flows.GF)(), ValueError, "draws by bisection"),
    "too-large": (lambda: AutoPlatedFlow(grown)(9), ValueError, None),
    "grown": (
        lambda: later(
            AutoPlatedFlow(grown, create_plates=lambda b, n=8: pyro.plate("data", n, subsample_size=b)), (3,), (3, 9)
        ),
        ValueError,
        "plate 'data' has 9 elements, but the guide's embedding was made for 8",
    ),
    "source": (
        lambda: AutoPlatedFlow(schools, {"schools": "y"}),
        ValueError,
        r"amortize\['schools'\] must be a number",
    ),
    "embedding": (lambda: AutoPlatedFlow(schools, {"schools": 0}), ValueError, "must be a positive number"),
    "scale": (lambda: AutoFlow(schools, init_scale=0.0), ValueError, "init_scale must be positive"),
    "noncenter": (lambda: AutoFlow(schools, noncenter="always"), ValueError, '"auto" or False'),
    "flow": (lambda: AutoFlow(schools, flow="maf")(), ValueError, "flow must be one of"),
    "no-flow": (lambda: AutoFlow(schools, flow=3), ValueError, "a name or a function"),
    "base": (lambda: AutoFlow(schools, flow=make_flow, base="mixture"), ValueError, "base= is for flows given by name"),
    "width": (lambda: make_flow("iaf", 3, hidden_features=64), ValueError, r"a sequence of widths, got 64: \(64,\)"),
    "widths": (
        lambda: AutoFlow(schools, flow=make_flow, hidden_features=(8,)),
        ValueError,
        "hidden_features= is for flows given by name",
    ),
    "affine": (lambda: AutoFlow(schools, affine="full")(), ValueError, '"diag", "tril" or None'),
    "features": (
        lambda: AutoFlow(schools, flow=import_zuko().flows.NICE(5))(),
        ValueError,
        "has 5 features, but the model 6 coordinates",
    ),
    "one-flow": (
        lambda: AutoPlatedFlow(schools, flow=import_zuko().flows.NICE(5)),
        ValueError,
        "a flow for each block",
    ),
    "quantiles": (lambda: AutoFlow(schools).quantiles([1.5]), ValueError, "between 0 and 1"),
    "warm-start": (lambda: AutoFlow(schools).warm_start("map"), ValueError, '"normal", "laplace" or a trained guide'),
    "warm-part": (
        lambda: AutoFlow(schools).warm_start(AutoNormal(poutine.block(schools, hide=["mu"]))),
        ValueError,
        "no site 'mu'",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused(case):
    run, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        run()


def test_a_param_store_of_another_guide_is_refused():
    AutoFlow(schools)()
    with pytest.raises(ValueError, match="it is another guide's"):
        AutoFlow(levels)()


def test_a_prior_that_changes_its_family_is_refused():
    def model(family=dist.Normal):
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("z", family(mu.exp(), 1.0))

    guide = AutoFlow(model)
    guide()
    with pytest.raises(RuntimeError, match="noncenter=False"):
        guide(dist.Gamma if False else dist.VonMises)


def test_infinite_starts_are_replaced():
    guide = AutoFlow(schools, init_loc_fn=lambda site: torch.full(site["fn"].shape(), math.inf))
    assert all(torch.isfinite(value).all() for value in guide().values())


@pytest.mark.parametrize("case", ["uncovered", "rows", "affine"])
def test_a_refusal_is_met_again(case):
    guide = {
        "uncovered": lambda: AutoPlatedFlow(schools, {}),
        "rows": lambda: AutoPlatedFlow(schools, {"schools": torch.ones(3, 2)}),
        "affine": lambda: AutoFlow(schools, affine="full"),
    }[case]()
    for _ in range(2):
        with pytest.raises(ValueError, match=REFUSALS[case][2]):
            guide()
