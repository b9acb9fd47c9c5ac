"""Cases in which a number would be silently wrong: each was so once."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import planar
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow

from pyro_elbo_ext import IWAE_ELBO, MeanField_ELBO
from pyro_elbo_ext.elbo.base import NonFiniteError
from pyro_elbo_ext.testing import Problem, sample_gradients
from tests.cases import global_guide, global_model, local_model


def agree(one, two):
    error = float(one.var() / one.numel() + two.var() / two.numel()) ** 0.5
    return abs(float(one.mean() - two.mean())) < 4 * error


def annealed_normal(replicates, model_scale, guide_scale):
    def model():
        with pyro.plate("replicates", replicates):
            with pyro.poutine.scale(scale=model_scale):
                z = pyro.sample("z", dist.Normal(torch.zeros(replicates), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(replicates))

    def guide():
        with pyro.plate("replicates", replicates), pyro.poutine.scale(scale=guide_scale):
            pyro.sample("z", dist.Normal(pyro.param("m"), 0.7))

    return Problem(model, guide, {"m": torch.full((replicates,), 0.9)})


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["float", "tensor"])
@pytest.mark.parametrize("scales", [(0.3, 0.3), (0.3, 1.0)], ids=str)
def test_dreg_under_annealing_is_the_total_derivative(scales, kind):
    problem = annealed_normal(50_000, *map(kind, scales))
    found = [sample_gradients(IWAE_ELBO(4, g), problem, calls=4)[1]["m"] for g in ("pathwise", "dreg")]
    assert agree(*found)


def test_dreg_refuses_leaves_scaled_differently():
    def model():
        pyro.sample("a", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("b", dist.Normal(torch.tensor(0.0), 1.0))

    def guide():
        m = pyro.param("m", torch.tensor(0.1))
        with pyro.poutine.scale(scale=0.5):
            pyro.sample("a", dist.Normal(m, 1.0))
        pyro.sample("b", dist.Normal(m, 1.0))

    with pytest.raises(ValueError, match="different scales"):
        IWAE_ELBO(4, "dreg").loss_and_grads(model, guide)


def test_a_shared_scale_stays_outside_whatever_the_rounding():
    """0.7 * 10/3 * 11/3 is not the same float in every order of the factors."""

    def plates(batch):
        return pyro.plate("a", 10, batch, dim=-1), pyro.plate("b", 11, batch, dim=-2)

    def model(batch):
        a, b = plates(batch)
        with pyro.poutine.scale(scale=0.7), a, b:
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(3.0))

    def guide(batch):
        a, b = plates(batch)
        with a, b, pyro.poutine.scale(scale=0.7):
            pyro.sample("z", dist.Normal(torch.tensor(-0.5), 1.0))

    for batch in (3, None):
        assert not IWAE_ELBO(4).explain(model, guide, batch).annealed


def chain(order, scale=1.0, mask=None):
    def model():
        outer = pyro.poutine.scale(scale=scale)
        with outer, pyro.poutine.mask(mask=mask) if mask is not None else pyro.poutine.scale(scale=1.0):
            if order == "12":
                z1 = pyro.sample("z1", dist.Normal(torch.tensor(0.0), 1.0))
                z2 = pyro.sample("z2", dist.Normal(0.8 * z1, 0.7))
            else:
                z2 = pyro.sample("z2", dist.Normal(torch.tensor(0.0), 1.0))
                z1 = pyro.sample("z1", dist.Normal(0.8 * z2, 0.7))
        pyro.sample("x", dist.Normal(z1 + z2, 1.0), obs=torch.tensor(1.0))

    return model


def chain_guide():
    z1 = pyro.sample("z1", dist.Normal(torch.tensor(0.3), 0.8))
    pyro.sample("z2", dist.Normal(0.9 * z1, 0.6))


CHANGES = {
    "another order": chain("21"),
    "another scale": chain("12", scale=0.25),
    "a mask": chain("12", mask=torch.tensor(False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_closed_forms_are_decided_anew_when_something_changes(change):
    elbo = MeanField_ELBO(200_000)
    assert elbo.terms(chain("12"), chain_guide).closed_form == ("z1", "z2")
    exact = Trace_ELBO(200_000, vectorize_particles=True, max_plate_nesting=0).loss(CHANGES[change], chain_guide)
    assert elbo.loss(CHANGES[change], chain_guide) == pytest.approx(exact, abs=0.03)


def assigning_model(depends=True):
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([0.5, -1.0, 1.5]))
    total = torch.zeros(z.shape[:-1] + (1,))
    if depends:
        total[..., 0] = z.sum(-1)
    pyro.sample("y", dist.Normal(total, 1.0).to_event(1), obs=torch.tensor([2.0]))


def assigning_guide(depends=True):
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(torch.tensor(0.3), 0.7))


def test_assignment_in_place_does_not_hide_a_dependency():
    elbo = IWAE_ELBO(16)
    assert elbo.explain(assigning_model, assigning_guide, False).constants == ("y",)
    assert IWAE_ELBO(16).explain(assigning_model, assigning_guide).plates == ()


def test_a_transform_that_is_no_bijection_is_not_left_out():
    def model():
        pyro.sample("z", dist.FoldedDistribution(dist.Normal(torch.tensor(0.5), 1.0)))

    def guide():
        pyro.sample("z", dist.FoldedDistribution(dist.Normal(torch.tensor(-0.3), 0.7)))

    assert MeanField_ELBO().terms(model, guide).closed_form == ()


@pytest.mark.parametrize("num_particles", [1, 2])
@pytest.mark.parametrize("gradient", ["pathwise", "dreg", "stl"])
def test_a_local_zero_weight_is_no_error(gradient, num_particles):
    def model():
        global_model()
        with pyro.plate("more", 3):
            u = pyro.sample("u", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("edge", dist.Unit((1.0 - u).clamp(min=0).log(), validate_args=False), obs=torch.zeros(0))

    def guide():
        global_guide()
        with pyro.plate("more", 3):
            pyro.sample("u", dist.Normal(pyro.param("u_loc", torch.tensor(0.5)), 1.0))

    elbo = IWAE_ELBO(num_particles, gradient, plates=("more",), local_particles=12)
    for _ in range(20):
        assert math.isfinite(elbo.loss_and_grads(model, guide))
        assert pyro.param("u_loc").grad.isfinite()


def test_looped_particles_with_a_flow_that_has_no_inverse():
    guide = AutoNormalizingFlow(local_model, partial(planar))
    assert math.isfinite(IWAE_ELBO(3, vectorize_particles=False).loss_and_grads(local_model, guide))


@pytest.mark.parametrize("num_particles", [1, 3])
def test_given_nesting_counts_the_models_own_plates(num_particles):
    elbo = IWAE_ELBO(num_particles, plates=("data",), local_particles=2, max_plate_nesting=1)
    assert math.isfinite(elbo.loss_and_grads(global_model, global_guide))


def test_a_weight_that_depends_on_no_leaf_smoothly():
    def model():
        pyro.sample("z", dist.Uniform(torch.tensor(0.0), 2.0))

    def guide():
        pyro.sample("z", dist.Uniform(torch.tensor(0.5), 1.0))

    assert IWAE_ELBO(4, "dreg").loss_and_grads(model, guide) == pytest.approx(math.log(4))


def test_a_point_is_told_from_another():
    """What a Delta drew itself has its log-density without a look; another value has none, of the same storage too."""
    points = torch.tensor([0.5, 0.5, 1.5])

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(2))

    def guide(point=points[:2]):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Delta(point, log_density=torch.tensor([0.25, 0.5])))

    log_joint = dist.Normal(0.0, 1.0).log_prob(points[:2]) + dist.Normal(points[:2], 1.0).log_prob(torch.ones(2))
    assert -IWAE_ELBO(1).loss(model, guide) == pytest.approx(float(log_joint.sum()) - 0.75)
    with pytest.raises(NonFiniteError, match="guide site 'z'"):
        IWAE_ELBO(1).loss(model, pyro.poutine.replay(guide, pyro.poutine.trace(guide).get_trace(points[1:])))


def test_weights_whose_sum_overflows_are_fine():
    def model():
        pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.factor("far", torch.tensor(-1e308, requires_grad=True))

    assert IWAE_ELBO(4).loss(model, lambda: pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))) == 1e308


def test_gradients_whose_squares_overflow_are_fine():
    torch.set_default_dtype(torch.float32)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("steep", 1e30 * (z - z.detach()).sum())

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(3)), 1.0).to_event(1))

    assert math.isfinite(IWAE_ELBO(1).loss_and_grads(model, guide))
    assert torch.allclose(pyro.param("loc").grad, torch.tensor(-1e30))
