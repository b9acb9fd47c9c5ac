"""Optimisers' steps as functions are the optimisers' own."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints
from torch.utils import _pytree as pytree

from pyro_elbo_ext import NaturalGradient
from pyro_elbo_ext.run.compiled.natural import NaturalUpdate
from pyro_elbo_ext.run.compiled.updates import TorchUpdate
from tests.run.cases import leaves_of, params

OPTIMISERS = {
    "sgd": lambda: pyro.optim.SGD({"lr": 0.1}),
    "momentum": lambda: pyro.optim.SGD({"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.01}),
    "nesterov": lambda: pyro.optim.SGD({"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    "adam": lambda: pyro.optim.Adam({"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    "adamw": lambda: pyro.optim.AdamW({"lr": 0.1, "weight_decay": 0.2}),
    "by name": lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if name == "a" else 0.02}),
    "clipped": lambda: pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.9, "clip_norm": 0.5, "weight_decay": 0.1}),
    "centred": lambda: pyro.optim.ClippedAdam({"lr": 0.1, "centered_variance": True}),
    "scheduled": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5}
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_update_is_the_optimisers(name):
    """Eager steps, steps of the function, and eager ones again, against eager ones alone."""
    pyro.param("a", torch.randn(3))
    pyro.param("b", torch.randn(2, 2))
    start, grads = params(), [{"a": torch.randn(3), "b": torch.randn(2, 2)} for _ in range(9)]
    expected = None
    for functional in ((), range(3, 6), range(4)):
        leaves, optim = leaves_of(), OPTIMISERS[name]()
        with torch.no_grad():
            for key, leaf in leaves.items():
                leaf.copy_(start[key])
        for i, grad in enumerate(grads):
            if i in functional:
                update = TorchUpdate(optim, leaves)
                flat = torch.cat([leaf.detach().reshape(-1) for leaf in leaves.values()])
                joined = torch.cat([grad[key].reshape(-1) for key in leaves])
                flat, state = update.step(update.read(), flat, joined)
                update.write(state)
                with torch.no_grad():
                    leaves["a"].copy_(flat[:3])
                    leaves["b"].copy_(flat[3:].reshape(2, 2))
            else:
                for key, leaf in leaves.items():
                    leaf.grad = grad[key].clone()
                optim(list(leaves.values()))
            if name == "scheduled" and i % 2:
                optim.step()  # which warns, an error here, where it has seen no step
        expected = expected or params()
        for key, value in params().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-12)


# Natural gradients.


def guide():
    """Sites of three families, and a parameter that no site is made of."""
    loc, scale = pyro.param("loc", torch.zeros(4)), pyro.param("scale", torch.ones(4), constraints.positive)
    rate = pyro.param("rate", torch.tensor([2.0, 3.0]), constraints.positive)
    with pyro.plate("rows", 4):
        pyro.sample("z", dist.Normal(loc, scale))
    pyro.sample("g", dist.Gamma(pyro.param("shape", torch.tensor([1.5, 2.5]), constraints.positive), rate).to_event(1))
    pyro.param("weight", torch.randn(2, 2))


def normals():
    guide_scale = pyro.param("scale", torch.ones(4), constraints.positive)
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(4)), guide_scale).to_event(1))


NATURAL = {
    "as it comes": (guide, lambda: NaturalGradient()),
    "few opening steps": (guide, lambda: NaturalGradient(lr=0.6, retreat=4)),
    "none": (guide, lambda: NaturalGradient(lr=0.1, retreat=0, schedule="constant")),
    "radius": (guide, lambda: NaturalGradient(lr=0.8, max_kl=0.05)),
    "schedule": (guide, lambda: NaturalGradient(schedule=lambda step: 0.5 / (1 + step))),
    "average": (guide, lambda: NaturalGradient(lr=0.2, average_after=5)),
    "inner": (guide, lambda: NaturalGradient(lr=0.2, optim=pyro.optim.SGD({"lr": 0.1, "momentum": 0.5}))),
    "ivon": (normals, lambda: NaturalGradient(lr=0.1, mode="ivon", clip_radius=0.3, schedule="inverse")),
    "ivon, schedule": (normals, lambda: NaturalGradient(lr=0.1, mode="ivon", schedule=lambda step: 0.9**step)),
}


@pytest.mark.parametrize("name", NATURAL)
def test_natural_steps_are_the_optimisers(name):
    """On a noisy quadratic loss: eager steps, steps of the function, and eager ones again, against eager ones alone."""
    pair, make = NATURAL[name]
    pair()
    start = params()
    targets = {key: torch.randn_like(value) for key, value in start.items()}
    noise = [{key: 0.3 * torch.randn_like(value) for key, value in start.items()} for _ in range(15)]
    found = {}
    for functional in (False, True):
        leaves, optim = leaves_of(), make()
        with torch.no_grad():
            for key, leaf in leaves.items():
                leaf.copy_(start[key])
        optim.discover(pair)
        for i in range(15):
            grads = {key: 3 * (leaf.detach() - targets[key]) + noise[i][key] for key, leaf in leaves.items()}
            if functional and 2 <= i < 12:
                update = NaturalUpdate(optim, leaves)
                flat, grad = (torch.cat([part.reshape(-1) for part in p.values()]) for p in (params(), grads))
                entries = [table[0] for table in update.tables(1, 0)]
                flat, state = update.step(update.read(), flat, grad, entries)
                assert pytree.tree_structure(state) == pytree.tree_structure(update.read())
                update.write(state)
                with torch.no_grad():
                    for leaf, part in zip(
                        leaves.values(), flat.split([leaf.numel() for leaf in leaves.values()]), strict=True
                    ):
                        leaf.copy_(part.reshape(leaf.shape))
                assert update.is_current()
            else:
                for key, leaf in leaves.items():
                    leaf.grad = grads[key]
                optim(list(leaves.values()))
        found[functional] = params(), pytree.tree_leaves(optim.get_state()), str(optim.report())
    for key, value in found[False][0].items():
        torch.testing.assert_close(found[True][0][key], value, rtol=1e-10, atol=1e-12)
        assert not torch.equal(value, start[key])
    assert len(found[True][1]) == len(found[False][1])
    for one, other in zip(found[True][1], found[False][1], strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12, check_device=False)  # Adam's counts
        else:
            assert one == other
    assert found[True][2] == found[False][2]


def test_a_natural_update_notices_new_settings():
    normals()
    optim = NaturalGradient(lr=0.5)
    optim.discover(normals)
    update = NaturalUpdate(optim, leaves_of())
    assert update.is_current()
    optim.lr = 0.25  # a number that steps are told
    assert update.is_current()
    assert update.read()["lr"] == 0.25
    optim.max_kl = 1.0
    assert not update.is_current()


def test_a_schedule_is_asked_for_every_step_of_a_long_run():
    asked = []

    def schedule(step):
        asked.append(step)
        return 0.5

    normals()
    optim = NaturalGradient(schedule=schedule)
    optim.discover(normals)
    optim.num_steps = 7
    update = NaturalUpdate(optim, leaves_of())
    assert update.tables(3, 0)[0].tolist() == [0.5] * 3
    update.tables(2, 3)
    assert asked == [7, 8, 9, 10, 11]


def test_a_step_inside_an_average_is_refused():
    normals()
    optim = NaturalGradient(lr=0.1, average_after=0)
    optim.discover(normals)
    for leaf in leaves_of().values():
        leaf.grad = torch.ones_like(leaf)
    optim(list(leaves_of().values()))
    update = NaturalUpdate(optim, leaves_of())
    with optim.averaged(), pytest.raises(ValueError, match="would be lost"):
        update.read()
    update.read()


def test_a_state_of_another_guide_is_refused_every_time():
    normals()
    saved = NaturalGradient()
    saved.discover(normals)
    optim = NaturalGradient()
    optim.set_state(saved.get_state())
    pyro.clear_param_store()

    def wider():
        loc, scale = pyro.param("loc", torch.zeros(5)), pyro.param("scale", torch.ones(5), constraints.positive)
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    wider()
    for _ in range(2):
        with pytest.raises(ValueError, match="the state is of another guide"):
            optim.discover(wider)


def test_a_site_without_half_of_its_gradient_is_refused():
    normals()
    optim = NaturalGradient()
    optim.discover(normals)
    with pytest.raises(ValueError, match="only some of 'loc', 'scale', the parameters of guide site 'z'"):
        NaturalUpdate(optim, {"loc": leaves_of()["loc"]})
