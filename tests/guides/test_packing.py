"""Many parameters as one vector: the same function, and slopes that come back where they belong."""

import math

import pytest
import torch

from pyro_elbo_ext import make_flow
from pyro_elbo_ext.guides.packing import Packing


@pytest.fixture
def packed():
    """A flow whose layers are not near the identity, what it gave before it was packed, and its vector."""
    flow = make_flow("iaf", 3, 2, hidden_features=(8, 8)).to(torch.get_default_dtype())
    noise, context = torch.randn(5, 3), torch.randn(5, 2)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = [value.detach() for value in flow.push(noise, context)]
    packing = Packing(flow)
    return flow, packing, lambda: flow.push(noise, context), before


def test_a_packed_flow_is_the_same_function(packed):
    flow, packing, push, before = packed
    assert all(torch.allclose(now, then) for now, then in zip(push(), before, strict=True))
    assert not list(flow.parameters()) and torch.equal(packing.pack(), packing.first * packing.mask)


def test_slopes_are_those_of_finite_differences(packed):
    _, packing, push, _ = packed

    def loss(vector):
        packing.unpack(vector, packing.mask)
        return sum(value.sin().sum() for value in push())

    vector = packing.first.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, vector, check_undefined_grad=False)
    (slope,) = torch.autograd.grad(loss(vector), vector)
    assert torch.equal(slope != 0, packing.mask != 0)


def test_slopes_can_be_gone_back_through_again(packed):
    _, packing, push, _ = packed

    def slope(vector):
        packing.unpack(vector, packing.mask)
        return torch.autograd.grad(push()[1].sin().sum(), vector, create_graph=True)[0]

    vector, direction = packing.first.clone().requires_grad_(), torch.randn_like(packing.first)
    (twice,) = torch.autograd.grad(slope(vector) @ direction, vector)
    step = 1e-5 * direction
    difference = (slope(vector + step) - slope(vector - step)) / 2e-5
    assert torch.allclose(twice, difference, atol=1e-6)


def test_a_slope_that_is_not_finite_moves_nothing(packed):
    flow, packing, push, _ = packed
    vector = packing.first.clone().requires_grad_()
    packing.unpack(vector, packing.mask)
    flow.affine.shift.register_hook(lambda slope: torch.full_like(slope, math.nan))
    (slope,) = torch.autograd.grad(push()[0].sum(), vector)
    assert torch.isfinite(slope).all() and int((slope != 0).sum()) > 0
