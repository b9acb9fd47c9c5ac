"""Every exponential family: what a natural-gradient step is, its KL, its coordinates, and what it refuses."""

import math
import warnings

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Normal, TransformedDistribution

from pyro_elbo_ext.families import recognize
from pyro_elbo_ext.families.recognition import FAMILIES
from pyro_elbo_ext.testing import z_score


def lower(size, batch=()):
    matrix = torch.randn((*batch, size, size)).tril(-1)
    return matrix + (torch.rand((*batch, size)) + 0.5).diag_embed()


def positive(*shape):
    return torch.rand(shape) * 3 + 0.6


ARGUMENTS = {
    "Normal": lambda b: {"loc": torch.randn(b), "scale": positive(*b)},
    "MultivariateNormal": lambda b: {"loc": torch.randn((*b, 3)), "scale_tril": lower(3, b)},
    "Gamma": lambda b: {"concentration": positive(*b), "rate": positive(*b)},
    "Exponential": lambda b: {"rate": positive(*b)},
    "Dirichlet": lambda b: {"concentration": positive(*b, 4)},
    "Beta": lambda b: {"concentration1": positive(*b), "concentration0": positive(*b)},
    "Bernoulli": lambda b: {"logits": torch.randn(b)},
    "Categorical": lambda b: {"logits": torch.randn((*b, 4))},
    "OneHotCategorical": lambda b: {"logits": torch.randn((*b, 4))},
    "Wishart": lambda b: {"df": positive(*b) + 3, "scale_tril": lower(3, b)},
}
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
BATCHES = {"single": (), "batch": (2, 3)}


def sample(family, q, shape):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Singular sample detected")  # torch warns of every Wishart sample
        x = family.make(q).sample(shape)
    return torch.nn.functional.one_hot(x, 4).to(q["logits"]) if family.name == "OneHotCategorical" else x


def gradient(family, q, slopes):
    """The gradient in the arguments of the linear function slopes' E[T]."""
    attached = {name: value.clone().requires_grad_() for name, value in q.items()}
    total = (slopes * family.expectation(attached, q)).sum()
    grads = dict(zip(q, torch.autograd.grad(total, list(attached.values())), strict=True))
    if "scale_tril" in grads:
        grads["scale_tril"] = grads["scale_tril"].tril()
    return grads


@families
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_step_adds_the_expectation_gradient_to_the_natural_parameters(family, batch):
    """After a step of size rho along <c, E T> the log-density has changed by -rho c' T(x), and a constant."""
    q = ARGUMENTS[family.name](batch)
    slopes = torch.randn(family.expectation(q, q).shape)
    step = torch.tensor(0.04)
    new = family.move(q, family.direction(q, gradient(family, q, slopes)), step)
    x = sample(family, q, (50,))
    change = family.log_prob(new, x) - family.log_prob(q, x)
    rest = change + step * (slopes * family.statistics(x, q)).sum(-1)
    assert (rest - rest[0]).abs().max() < 1e-10
    assert change.std() > 1e-3


@families
def test_expectation_and_divergence(family):
    """E[T] and KL are the means over samples that they claim to be."""
    q, other = ARGUMENTS[family.name](()), ARGUMENTS[family.name](())
    x = sample(family, q, (100_000,))
    for statistic, mean in zip(family.statistics(x, other).unbind(-1), family.expectation(q, other), strict=True):
        if statistic.std() > 0:
            assert abs(z_score(statistic, mean)) < 4
    ratios = family.log_prob(q, x) - family.log_prob(other, x)
    assert abs(z_score(ratios, family.kl(q, other))) < 4
    assert family.kl(q, q).abs() < 1e-12
    assert family.kl(q, other) > 1e-3


@families
def test_slope_is_twice_the_divergence_of_a_short_step(family):
    q = ARGUMENTS[family.name]((2,))
    grad = gradient(family, q, torch.randn(family.expectation(q, q).shape))
    direction = family.direction(q, grad)
    step = 1e-4
    moved = family.move(q, direction, torch.tensor(step))
    torch.testing.assert_close(2 * family.kl(moved, q) / step**2, family.slope(q, direction, grad), rtol=3e-3, atol=0)


@families
def test_coordinates_come_back(family):
    q = ARGUMENTS[family.name]((3, 2))
    eta = family.natural(q)
    for name, value in family.from_natural(eta).items():
        torch.testing.assert_close(value, q[name])
    assert {name: value.dim() - 2 for name, value in eta.items()} == dict(family.coordinates)
    assert {name: value.dim() - 2 for name, value in q.items()} == dict(family.arguments)


@families
def test_parametrizations_come_back(family):
    q = ARGUMENTS[family.name]((2,))
    for parametrization in family.parametrizations:
        given = parametrization.write(q)
        assert set(given) == set(parametrization.event_dims)
        for name, value in parametrization.read(given).items():
            if name == "logits" and family.arguments[name]:  # defined up to a shift
                value, q = value.log_softmax(-1), {name: q[name].log_softmax(-1)}
            torch.testing.assert_close(value, q[name])


@families
def test_steps_batch_and_leave_the_domain_as_nan(family):
    """Steps of several sizes at once are the single ones; what leaves the domain is NaN, and nothing else is."""
    q = ARGUMENTS[family.name]((2,))
    direction = family.direction(q, gradient(family, q, 5 * torch.randn(family.expectation(q, q).shape)))
    steps = torch.tensor([1e-3, 0.1, 10.0, -10.0])
    together = family.move(q, direction, steps[:, None].expand(4, 2))
    for i, step in enumerate(steps):
        for name, value in family.move(q, direction, step.expand(2)).items():
            torch.testing.assert_close(together[name][i], value, equal_nan=True)
    finite = torch.stack([torch.isfinite(v).flatten(2).all(-1) if v.dim() > 2 else torch.isfinite(v) for v in
                          together.values()]).all(0)  # fmt: skip
    assert finite[0].all()
    if family.name not in ("Normal", "Bernoulli", "Categorical", "OneHotCategorical"):  # these have no edge
        assert not finite[2:].all()


def test_normal_stays_normal_whatever_the_gradient():
    """A step past zero precision is taken in the covariance: to first order the same, and always positive."""
    normal = FAMILIES[Normal]
    q = {"loc": torch.zeros(5), "scale": torch.full((5,), 0.5)}
    direction = {"loc": torch.zeros(5), "precision": torch.tensor([-1e6, -2.0, -1.0, -0.5, 1e6])}
    scale = normal.move(q, direction, torch.tensor(1.0))["scale"]
    assert (scale > 0).all() and torch.isfinite(scale).all()
    torch.testing.assert_close(scale[1:4] / 0.5, torch.tensor([math.sqrt(3), math.sqrt(2), math.sqrt(2)]))


@pytest.mark.parametrize("concentration", [1e-3, 1e3, 1e7])
def test_gamma_at_extreme_shapes(concentration):
    """The Fisher information of a Gamma is nearly singular at large shapes; float64 holds it."""
    gamma = FAMILIES[torch.distributions.Gamma]
    q = {"concentration": torch.tensor(concentration), "rate": torch.tensor(2.0)}
    slopes = torch.tensor([0.3, -0.2])
    found = gamma.direction(q, gradient(gamma, q, slopes))
    torch.testing.assert_close(found["concentration"], slopes[0], rtol=1e-6, atol=0)
    wanted = -slopes[1] * q["rate"] / q["concentration"]  # the second statistic is in units of the mean
    torch.testing.assert_close(found["rate"], wanted, rtol=1e-5, atol=0)


WRAPPED = {
    "event": (lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1), "Normal", 1, True),
    "mask": (lambda: dist.Gamma(torch.ones(3), 1.0).mask(torch.ones(3).bool()), "Gamma", 0, True),
    "plates": (lambda: dist.Beta(torch.ones(3), 1.0).expand([4, 3]), "Beta", 0, True),
    "log-normal": (lambda: dist.LogNormal(torch.zeros(3), 1.0), "Normal", 0, False),
    "inverse gamma": (lambda: dist.InverseGamma(torch.ones(3), torch.ones(3)), "Gamma", 0, False),
    "event of matrices": (
        lambda: dist.MultivariateNormal(torch.zeros(2, 3), torch.eye(3)).to_event(1),
        "MultivariateNormal",
        1,
        True,
    ),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_recognized_through_wrappers(case):
    make, family, event_dim, direct = WRAPPED[case]
    found = recognize(make())
    assert (found.family.name, found.event_dim, found.direct) == (family, event_dim, direct)


@pytest.mark.parametrize("fn", [dist.StudentT(3.0), dist.VonMises(0.0, 1.0), dist.Cauchy(0.0, 1.0)], ids=repr)
def test_not_recognized(fn):
    assert recognize(fn) is None


def test_an_affine_normal_is_the_normal_it_makes():
    """As in AutoDiagonalNormal and AutoMultivariateNormal, and right for a base that is not standard."""
    base = dist.Normal(torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.3])).to_event(1)
    loc, scale, tril = torch.tensor([1.0, 2.0]), torch.tensor([0.7, -1.5]), lower(2)
    x = torch.randn(5, 2)
    for transform in (
        dist.transforms.AffineTransform(loc, scale, event_dim=1),
        dist.transforms.LowerCholeskyAffine(loc, tril),
    ):
        fn = dist.TransformedDistribution(base, transform)
        found = recognize(fn)
        own = found.family.make(found.arguments()).log_prob(x)
        torch.testing.assert_close(own.sum(-1) if own.dim() > 1 else own, fn.log_prob(x))
    chained = TransformedDistribution(base, [dist.transforms.ExpTransform(), dist.transforms.ExpTransform()])
    assert not recognize(chained).direct
