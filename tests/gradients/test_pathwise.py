"""Estimators against exact answers: golden values, slopes, zero variance, hierarchies, PIWAE's two objectives."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO
from pyro.infer.autoguide import AutoIAFNormal

from pyro_elbo_ext import IWAE_ELBO, MIWAE_ELBO, PIWAE_ELBO
from pyro_elbo_ext.bounds import IWAE, MIWAE, FunctionBound
from pyro_elbo_ext.gradients import DoublyReparameterized, Estimator, Pathwise
from pyro_elbo_ext.gradients.pathwise import Weights
from pyro_elbo_ext.testing import (
    GOLDEN_GRADIENT,
    GOLDEN_HIERARCHY,
    GOLDEN_IWAE,
    GOLDEN_SCALE_GRADIENT,
    conjugate_normal,
    hierarchical_guide,
    sample_gradients,
    spread_slope,
    z_score,
)
from tests.cases import ELBOS, local_guide, local_model


@pytest.mark.parametrize("k", GOLDEN_IWAE)
@pytest.mark.parametrize("gradient", ["pathwise", "dreg", "stl"])
def test_golden_values_over_a_million_draws(gradient, k):
    values, grads = sample_gradients(IWAE_ELBO(k, gradient), conjugate_normal(50_000), calls=20, seed=k)
    assert z_score(values, GOLDEN_IWAE[k], 1e-6) < 4
    kind = "iwae+rws" if gradient == "stl" else "iwae"
    assert grads["m"].numel() == 10**6
    assert z_score(grads["m"], GOLDEN_GRADIENT[kind][k], 1e-6) < 4
    if gradient != "stl":
        assert z_score(grads["s"], GOLDEN_SCALE_GRADIENT[k], 1e-6) < 4


def test_the_golden_test_tells_stl_from_iwae():
    _, grads = sample_gradients(IWAE_ELBO(3, "stl"), conjugate_normal(50_000), calls=2)
    assert z_score(grads["m"], GOLDEN_GRADIENT["iwae"][3]) > 100


def test_stl_is_iwae_plus_wake_sleep():
    """The identity holds draw by draw: v = v^2 + (v - v^2), the second being the wake-phi gradient reparameterised."""

    class WakePhi(Estimator):
        name = "rws-dreg"

        def weights(self, bound, log_w):
            v = bound.path_weights(log_w)
            return Weights(v, v - v.square(), None)

    found = {}
    for gradient in ("stl", "dreg", WakePhi()):
        _, grads = sample_gradients(IWAE_ELBO(3, gradient), conjugate_normal(1000), seed=1)
        found[getattr(gradient, "name", gradient)] = grads["m"]
    torch.testing.assert_close(found["stl"], found["dreg"] + found["rws-dreg"])


SLOPES = {"pathwise": (-0.6, -0.4), "dreg": (-1.7, -1.3), "stl": (-0.7, -0.4)}


@pytest.mark.parametrize("gradient", SLOPES)
def test_slope_of_the_spread(gradient):
    low, high = SLOPES[gradient]
    assert low < spread_slope(partial(IWAE_ELBO, gradient=gradient)) < high


def signal_slope(gradient, particles=(4, 16, 64), replicates=20_000):
    """Slope of log SNR of the gradient in the mean of q against log K, close to the posterior."""
    logs, found = [], []
    for k in particles:
        problem = conjugate_normal(replicates, 0.65, math.sqrt(0.5) * 1.05)
        _, grads = sample_gradients(IWAE_ELBO(k, gradient), problem, calls=20, seed=k)
        logs.append(math.log(k))
        found.append(math.log(float(grads["m"].mean().abs() / grads["m"].std())))
    centre = sum(logs) / len(logs)
    return sum((x - centre) * y for x, y in zip(logs, found, strict=True)) / sum((x - centre) ** 2 for x in logs)


def test_signal_to_noise():
    """The total derivative loses the guide's signal with more particles, the doubly reparameterised one gains."""
    assert signal_slope("dreg") == pytest.approx(0.5, abs=0.1)
    assert signal_slope("pathwise", (2, 4, 8)) < -0.2


@pytest.mark.parametrize("gradient, lands", [("stl", True), ("dreg", True), ("pathwise", False)])
def test_variance_at_the_posterior(gradient, lands):
    problem = conjugate_normal(1000, 0.75, math.sqrt(0.5))
    _, grads = sample_gradients(IWAE_ELBO(4, gradient), problem)
    assert (float(torch.stack(list(grads.values())).abs().max()) < 1e-6) == lands


@pytest.mark.parametrize("gradient", ["pathwise", "dreg"])
def test_two_layer_guide(gradient):
    _, grads = sample_gradients(IWAE_ELBO(3, gradient), hierarchical_guide(50_000), calls=20, seed=5)
    for name, expected in GOLDEN_HIERARCHY.items():
        assert z_score(grads[name], expected, 4e-4) < 4, name


def test_the_two_layer_test_fails_for_detaching_layer_by_layer():
    problem = hierarchical_guide(200_000)
    m, log_s1, a, c, log_s2 = (value.clone().requires_grad_() for value in problem.params.values())
    z1 = m + log_s1.exp() * torch.randn(3, len(m))
    z2 = a * z1 + c + log_s2.exp() * torch.randn(3, len(m))
    log_q = dist.Normal(m.detach(), log_s1.detach().exp()).log_prob(z1)
    log_q = log_q + dist.Normal((a * z1 + c).detach(), log_s2.detach().exp()).log_prob(z2)
    log_p = dist.Normal(0.0, 1.0).log_prob(z1) + dist.Normal(z1, 1.0).log_prob(z2)
    log_w = log_p + dist.Normal(z2, 1.0).log_prob(torch.tensor(1.2)) - log_q
    squares = torch.softmax(log_w, 0).square().detach()
    (grad,) = torch.autograd.grad((squares * log_w).sum(), m)
    assert z_score(grad, GOLDEN_HIERARCHY["m"], 4e-4) > 20


@pytest.mark.parametrize("name", ["iwae", "vr-iwae", "miwae", "ciwae", "own-bound"])
def test_every_estimator_of_every_bound_has_one_mean(name):
    """Total derivative and doubly reparameterised gradient agree, by derived weights for a bound of one's own."""
    found = {}
    for gradient in ("pathwise", "dreg"):
        elbo = ELBOS[name](num_particles=4, gradient=gradient)
        found[gradient] = sample_gradients(elbo, conjugate_normal(50_000), calls=4)[1]
    for parameter in ("m", "s"):
        one, two = found["pathwise"][parameter], found["dreg"][parameter]
        error = float(one.var() / one.numel() + two.var() / two.numel()) ** 0.5
        assert abs(float(one.mean() - two.mean())) < 4 * error
        assert two.std() < one.std()


def test_replaying_the_total_derivative_changes_nothing():
    class Replayed(Pathwise):
        replays = True

    grads = [sample_gradients(IWAE_ELBO(4, e), conjugate_normal(100), seed=2)[1] for e in (Pathwise(), Replayed())]
    for parameter in ("m", "s"):
        torch.testing.assert_close(grads[0][parameter], grads[1][parameter])


def theta_pair():
    def model():
        theta = pyro.param("theta", torch.tensor(0.4))
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.5))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("phi", torch.tensor(0.2)), 0.9))

    return model, guide


@pytest.mark.parametrize("gradient", ["pathwise", "dreg"])
def test_piwae_gives_each_its_own_bound(gradient):
    model, guide = theta_pair()
    found = {}
    for name, elbo in (
        ("piwae", PIWAE_ELBO(6, num_groups=3, gradient=gradient)),
        ("iwae", IWAE_ELBO(6, gradient)),
        ("miwae", MIWAE_ELBO(6, num_groups=3, gradient=gradient)),
    ):
        elbo.loss(model, guide)
        pyro.set_rng_seed(0)
        elbo.loss_and_grads(model, guide)
        found[name] = {n: float(pyro.param(n).grad) for n in ("theta", "phi")}
        for n in ("theta", "phi"):
            pyro.param(n).grad = None
    assert found["piwae"]["theta"] == pytest.approx(found["iwae"]["theta"])
    assert found["piwae"]["phi"] == pytest.approx(found["miwae"]["phi"])
    assert found["iwae"]["phi"] != pytest.approx(found["miwae"]["phi"])


def test_the_choice_can_be_asked_for():
    assert IWAE_ELBO(8).explain(local_model, local_guide).gradient == "dreg"
    assert IWAE_ELBO(1).explain(local_model, local_guide).gradient == "pathwise"
    assert "not needed" in IWAE_ELBO(8, "vimco").explain(local_model, local_guide).reason
    assert IWAE_ELBO(8, DoublyReparameterized()).explain(local_model, local_guide).reason == "asked for"
    flow = AutoIAFNormal(local_model)
    explanation = IWAE_ELBO(8).explain(local_model, flow)
    assert explanation.gradient == "pathwise" and "flow" in explanation.reason


def test_a_flow_without_an_inverse_is_refused_by_name():
    from pyro.distributions.transforms import planar
    from pyro.infer.autoguide import AutoNormalizingFlow

    guide = AutoNormalizingFlow(local_model, partial(planar))
    guide()
    with pytest.raises(NotImplementedError, match="'_AutoNormalizingFlow_latent'.*gradient='pathwise'"):
        IWAE_ELBO(4, "dreg").loss_and_grads(local_model, guide)
    assert math.isfinite(IWAE_ELBO(4).loss_and_grads(local_model, guide))


def test_equal_to_pyro_where_pyro_is_right():
    """Full batch, every latent in the plate: RenyiELBO(alpha=0) has the same value and the same gradient."""
    found = []
    for elbo in (
        IWAE_ELBO(5, "pathwise", max_plate_nesting=1),
        RenyiELBO(alpha=0, num_particles=5, vectorize_particles=True, max_plate_nesting=1),
    ):
        pyro.set_rng_seed(0)
        value = elbo.loss_and_grads(local_model, local_guide)
        found.append([value] + [float(pyro.param(n).unconstrained().grad) for n in ("m", "s")])
        for n in ("m", "s"):
            pyro.param(n).unconstrained().grad = None
    assert found[0] == pytest.approx(found[1])


def test_own_bound_in_closed_form_or_derived():
    class OwnIWAE(Estimator):
        name = "own"

        def weights(self, bound, log_w):
            derived = FunctionBound(bound)
            return Weights(derived.path_weights(log_w), derived.doubly_reparameterized_weights(log_w), None)

    for bound in (IWAE(), MIWAE(2)):
        log_w = torch.randn(4, 3)
        one, two = OwnIWAE().weights(bound, log_w), DoublyReparameterized().weights(bound, log_w)
        torch.testing.assert_close(one.path, two.path)
