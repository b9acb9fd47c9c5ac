"""Which parameters form which site: found wherever they are kept and however they are passed, refused where unsure."""

from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro.nn import PyroModule, PyroParam
from pyro.poutine import block

from pyro_elbo_ext.natural import discover

POSITIVE = constraints.positive


def model():
    a = pyro.sample("a", dist.Gamma(torch.tensor(2.0), 1.0))
    with pyro.plate("rows", 3):
        b = pyro.sample("b", dist.Normal(torch.zeros(2), a).to_event(1))
        pyro.sample("x", dist.Normal(b.sum(-1), 1.0), obs=torch.zeros(3))


def found(guide, *args):
    """The blocks by site: family, parameters, divisor, and what the others are told."""
    result = discover(guide, args, {})
    return {
        site: (b.family.name, tuple(b.names.values()), b.divisor) for site, b in result.blocks.items()
    }, result.others


def auto_list():
    guide = AutoGuideList(model)
    guide.append(AutoNormal(block(model, hide=["b"])))
    guide.append(AutoDelta(block(model, hide=["a"])))
    return guide


AUTO = {
    "AutoNormal": (
        lambda: AutoNormal(model),
        {
            "a_unconstrained": ("Normal", ("AutoNormal.locs.a", "AutoNormal.scales.a"), 1.0),
            "b_unconstrained": ("Normal", ("AutoNormal.locs.b", "AutoNormal.scales.b"), 1.0),
        },
    ),
    "AutoDiagonalNormal": (
        lambda: AutoDiagonalNormal(model),
        {"_AutoDiagonalNormal_latent": ("Normal", ("AutoDiagonalNormal.loc", "AutoDiagonalNormal.scale"), 1.0)},
    ),
    "AutoMultivariateNormal": (
        lambda: AutoMultivariateNormal(model),
        {
            "_AutoMultivariateNormal_latent": (
                "MultivariateNormal",
                tuple(f"AutoMultivariateNormal.{name}" for name in ("loc", "scale", "scale_tril")),
                1.0,
            )
        },
    ),
    "AutoGuideList": (
        auto_list,
        {"a_unconstrained": ("Normal", ("AutoGuideList.0.locs.a", "AutoGuideList.0.scales.a"), 1.0)},
    ),
}


@pytest.mark.parametrize("name", AUTO)
def test_auto_guides(name):
    make, expected = AUTO[name]
    guide = make()
    guide()
    blocks, _ = found(guide)
    assert blocks == expected


def test_a_guide_that_is_a_handler():
    guide = AutoNormalMessenger(model)
    guide()
    blocks, _ = found(guide)
    assert {family for family, _, _ in blocks.values()} == {"Normal"}
    assert {name for _, names, _ in blocks.values() for name in names} == set(pyro.get_param_store())


class ModuleGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(3, 2))
        self.scale = PyroParam(torch.ones(3, 2), constraint=constraints.softplus_positive)
        self.rate = PyroParam(torch.tensor(1.0), constraint=POSITIVE)
        self.shape = PyroParam(torch.tensor(2.0), constraint=POSITIVE)

    def forward(self):
        pyro.sample("a", dist.Gamma(self.shape, self.rate))
        with pyro.plate("rows", 3):
            pyro.sample("b", dist.Normal(self.loc, self.scale).to_event(1))


def test_a_module():
    blocks, others = found(ModuleGuide())
    assert blocks == {"a": ("Gamma", ("shape", "rate"), 1.0), "b": ("Normal", ("loc", "scale"), 1.0)}
    assert not others


def test_random_state_and_parameters_stay():
    guide = AutoMultivariateNormal(model)
    guide()
    before = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}
    random = torch.get_rng_state()
    found(guide)
    assert torch.equal(random, torch.get_rng_state())
    for name, p in pyro.get_param_store().named_parameters():
        assert torch.equal(before[name], p)
        assert p.grad is None and p.requires_grad


def test_parameters_come_back_when_the_guide_fails():
    def guide():
        loc, scale = pyro.param("loc", torch.tensor(0.0)), pyro.param("scale", torch.tensor(1.0), POSITIVE)
        if loc != 0:
            raise RuntimeError("only at its first value")
        pyro.sample("z", dist.Normal(loc, scale))

    with pytest.raises(RuntimeError, match="only at its first value"):
        found(guide)
    assert pyro.param("loc") == 0


def param(name, value, constraint=constraints.real):
    return pyro.param(name, lambda: torch.as_tensor(value), constraint=constraint)


def normal(loc, scale, *sizes, event=0):
    """A guide with one site and plates of the given sizes around it."""

    def guide():
        fn = dist.Normal(loc(), scale())
        fn = fn.to_event(event) if event else fn
        with ExitStack() as stack:
            for i, size in enumerate(sizes):
                stack.enter_context(pyro.plate(f"plate {i}", size, dim=-1 - i))
            pyro.sample("z", fn)

    return guide


ORDER = [2, 0, 1]
FOUND = {
    "one for one": (normal(lambda: param("m", [0.0] * 3), lambda: param("s", [1.0] * 3, POSITIVE), 3), 1.0),
    "shared by a plate": (normal(lambda: param("m", 0.0), lambda: param("s", 1.0, POSITIVE), 3), 3.0),
    "shared by the outer of two plates": (
        normal(lambda: param("m", [0.0] * 3), lambda: param("s", [1.0] * 3, POSITIVE), 3, 4),
        4.0,
    ),
    "both taken in another order": (
        normal(lambda: param("m", [0.0] * 3)[ORDER], lambda: param("s", [1.0] * 3, POSITIVE)[ORDER], 3),
        1.0,
    ),
    "equal numbers at first": (
        normal(lambda: param("m", [0.7] * 3), lambda: param("s", [0.7] * 3, POSITIVE), event=1),
        1.0,
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_found(case):
    guide, divisor = FOUND[case]
    blocks, _ = found(guide)
    assert blocks == {"z": ("Normal", ("m", "s"), divisor)}


LEFT = {
    "a function of a parameter": (
        normal(lambda: param("m", 0.0), lambda: param("s", 0.0).exp()),
        {"m": "its scale is no parameter", "s": "its scale is no parameter"},
    ),
    "a constant": (normal(lambda: param("m", 0.0), lambda: torch.tensor(1.0)), {"m": "its scale is no parameter"}),
    "in different orders": (
        normal(lambda: param("m", [0.0] * 3), lambda: param("s", [1.0] * 3, POSITIVE)[ORDER], 3),
        {"m": "not of one shape, or not taken in one order", "s": "not taken in one order"},
    ),
    "one of them shared": (
        normal(lambda: param("m", [0.0] * 3), lambda: param("s", 1.0, POSITIVE), 3),
        {"m": "not of one shape", "s": "not of one shape"},
    ),
    "unevenly shared": (
        normal(
            lambda: param("m", [0.0] * 2)[torch.tensor([0, 0, 1])],
            lambda: param("s", [1.0] * 2, POSITIVE)[torch.tensor([0, 0, 1])],
            3,
        ),
        {"m": "share their parameters unevenly", "s": "share their parameters unevenly"},
    ),
    "one parameter twice": (
        normal(lambda: param("s", 1.0, POSITIVE), lambda: param("s", 1.0, POSITIVE)),
        {"s": "not of one shape"},
    ),
    "another family": (
        lambda: pyro.sample("z", dist.VonMises(param("m", 0.0), param("s", 1.0, POSITIVE))),
        {"m": "a VonMises has no natural coordinates here", "s": "a VonMises has no natural coordinates here"},
    ),
    "kept the other way round": (
        normal(lambda: param("m", torch.zeros(2, 3)).T, lambda: param("s", torch.ones(2, 3), POSITIVE).T, 3, event=1),
        {"m": "not in the order of its own", "s": "not in the order of its own"},
    ),
    "no site": (lambda: pyro.deterministic("d", param("m", 0.0) + 1), {"m": "no argument of a random guide site"}),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_to_the_inner_optimizer(case):
    guide, reasons = LEFT[case]
    blocks, others = found(guide)
    assert not blocks
    assert others.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in others[name]


def amortized_beside():
    """A site whose parameters come from a network, beside one with its own."""
    net = torch.nn.Linear(2, 1)

    def guide():
        pyro.module("net", net)
        pyro.sample("a", dist.Beta(param("p", 1.0, POSITIVE), param("q", 2.0, POSITIVE)))
        with pyro.plate("rows", 4):
            pyro.sample("b", dist.Normal(net(torch.ones(4, 2))[:, 0], 1.0))

    return guide


def test_networks_are_left_alone():
    blocks, others = found(amortized_beside())
    assert blocks == {"a": ("Beta", ("p", "q"), 1.0)}
    assert others.keys() == {"net$$$weight", "net$$$bias"}
    assert all("guide site 'b': its loc is no parameter" in reason for reason in others.values())


SHARED = {
    "two sites": lambda m, s: pyro.sample("y", dist.Normal(m, 2.0)),
    "a site's value": lambda m, s: pyro.sample("y", dist.Delta(2 * s)),
    "through a network": lambda m, s: pyro.sample("y", dist.Normal((m * s).tanh(), 1.0)),
}


@pytest.mark.parametrize("case", SHARED)
def test_shared_parameters_are_refused(case):
    def guide():
        m, s = param("m", 0.0), param("s", 1.0, POSITIVE)
        pyro.sample("z", dist.Normal(m, s))
        SHARED[case](m, s)

    with pytest.raises(ValueError, match="parameter '[ms]' is used by guide sites 'z' and 'y'"):
        found(guide)


def test_a_value_is_no_use_of_a_parameter():
    """A site that depends on another's value does not share its parameters."""

    def guide():
        z = pyro.sample("z", dist.Normal(param("m", 0.0), param("s", 1.0, POSITIVE)))
        pyro.sample("y", dist.Normal(z, param("t", 1.0, POSITIVE)))

    blocks, others = found(guide)
    assert list(blocks) == ["z"]
    assert others == {"t": "guide site 'y': its loc is no parameter, nor part of one"}


def test_transformed_sites_have_the_geometry_of_what_is_inside():
    def guide():
        pyro.sample("z", dist.LogNormal(param("m", 0.0), param("s", 1.0, POSITIVE)))
        pyro.sample("y", dist.InverseGamma(param("a", 2.0, POSITIVE), param("b", 1.0, POSITIVE)))

    blocks, _ = found(guide)
    assert blocks == {"z": ("Normal", ("m", "s"), 1.0), "y": ("Gamma", ("a", "b"), 1.0)}


def test_rows_of_a_minibatch():
    def guide(rows):
        with pyro.plate("rows", 10, subsample=rows) as i:
            pyro.sample(
                "z", dist.Gamma(param("a", torch.ones(10), POSITIVE)[i], param("b", torch.ones(10), POSITIVE)[i])
            )

    block_found = discover(guide, (torch.tensor([3, 7]),), {}).blocks["z"]
    assert (block_found.divisor, block_found.share) == (5.0, 0.2)
    shared = normal(lambda: param("m", 0.0), lambda: param("s", 1.0, POSITIVE))

    def outer(rows):
        with pyro.plate("rows", 10, subsample=rows):
            shared()

    block_found = discover(outer, (torch.tensor([3, 7]),), {}).blocks["z"]
    assert (block_found.divisor, block_found.share) == (10.0, 1.0)


def test_what_is_computed_and_not_scored_is_no_use():
    def guide():
        m = param("m", 0.0)
        pyro.sample("z", dist.Normal(m, param("s", 1.0, POSITIVE)))
        pyro.deterministic("twice", 2 * m)

    assert list(found(guide)[0]) == ["z"]


def test_scalars_beside_a_large_site():
    """In float32 a million numbers hold nearly every other: the small parameter is taken."""
    torch.set_default_dtype(torch.float32)

    def guide():
        loc, scale = param("wl", torch.zeros(10**6)), param("ws", torch.ones(10**6), POSITIVE)
        pyro.sample("w", dist.Normal(loc, scale).to_event(1))
        for i in range(6):
            pyro.sample(f"z{i}", dist.Normal(param(f"l{i}", 0.0), param(f"s{i}", 1.0, POSITIVE)))

    blocks, _ = found(guide)
    assert {site: names for site, (_, names, _) in blocks.items()} == {
        "w": ("wl", "ws"),
        **{f"z{i}": (f"l{i}", f"s{i}") for i in range(6)},
    }


@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b: dist.ZeroInflatedDistribution(dist.Gamma(a, b), gate=torch.tensor(0.3)),
        lambda a, b: dist.FoldedDistribution(dist.Normal(a, b)),
    ],
    ids=["zero-inflated", "folded"],
)
def test_other_distributions_around_a_family_are_not_that_family(fn):
    def guide():
        pyro.sample("z", fn(param("a", 1.0, POSITIVE), param("b", 1.0, POSITIVE)))

    assert not found(guide)[0]
