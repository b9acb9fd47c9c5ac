"""Which plates a bound factorises over, and where each scale stands: the defects this family was built to repair."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO
from pyro.infer.autoguide import AutoDiagonalNormal

from pyro_elbo_ext import IWAE_ELBO
from tests.cases import NUM_DATA, data, global_guide, global_model, local_guide, local_model, log_evidence


def mean_and_error(elbo, model, guide, *args, calls=300):
    values = torch.tensor([-elbo.loss(model, guide, *args) for _ in range(calls)])
    return float(values.mean()), float(values.std()) / calls**0.5


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
def test_a_minibatch_estimates_the_full_bound(vectorize):
    calls = 600 if vectorize else 150
    found = {
        batch: mean_and_error(
            IWAE_ELBO(16, vectorize_particles=vectorize), local_model, local_guide, batch, calls=calls
        )
        for batch in (8, 4, 1)
    }
    full, error = found[8]
    for mean, se in found.values():
        assert abs(mean - full) < 4 * (se**2 + error**2) ** 0.5
        assert mean < log_evidence() + 4 * se


def test_the_minibatch_test_fails_for_a_scale_inside_the_log():
    elbo = RenyiELBO(alpha=0, num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    mean, se = mean_and_error(elbo, local_model, local_guide, 4)
    assert mean > log_evidence() + 4 * se


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
def test_all_particles_of_a_step_share_one_minibatch(vectorize):
    seen = []

    def model():
        with pyro.plate("data", NUM_DATA, subsample_size=3) as rows:
            seen.append(rows.clone())
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0)), 1.0), obs=data()[rows])

    def guide():
        with pyro.plate("data", NUM_DATA, subsample_size=3):
            pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))

    IWAE_ELBO(4, vectorize_particles=vectorize, max_plate_nesting=1).loss(model, guide)
    assert len(seen) == (1 if vectorize else 4)
    assert all(torch.equal(rows, seen[0]) for rows in seen)


def test_a_guide_site_outside_the_plate_makes_one_joint_weight():
    guide = AutoDiagonalNormal(local_model)
    elbo = IWAE_ELBO(64)
    assert elbo.explain(local_model, guide).plates == ()
    mean, se = mean_and_error(elbo, local_model, guide)
    assert mean < log_evidence() + 4 * se


def test_a_guide_site_outside_a_subsampled_plate_is_refused():
    guide = AutoDiagonalNormal(local_model)
    with pytest.raises(ValueError, match="plate 'data' is subsampled .4 of 8. .*'_AutoDiagonalNormal_latent'"):
        IWAE_ELBO(4).loss(local_model, guide, 4)
    assert IWAE_ELBO(1).loss(local_model, guide, 4) > 0


def outside_model(depends):
    def model(batch=NUM_DATA):
        with pyro.plate("data", NUM_DATA, subsample_size=batch) as rows:
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=data()[rows])
        pyro.deterministic("total", z.sum(-1))
        mean = z.sum(-1) if depends else torch.tensor(0.5)
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(1.0))

    return model


def test_an_unrelated_observation_outside_leaves_the_bound_alone():
    extra = float(dist.Normal(0.5, 1.0).log_prob(torch.tensor(1.0)))
    elbo = IWAE_ELBO(16)
    explanation = elbo.explain(outside_model(False), local_guide, 4)
    assert explanation.plates == ("data",) and explanation.constants == ("y",)
    pyro.set_rng_seed(1)
    with_extra = -elbo.loss(outside_model(False), local_guide, 4)
    pyro.set_rng_seed(1)
    assert with_extra == pytest.approx(-IWAE_ELBO(16).loss(local_model, local_guide, 4) + extra)


def test_an_observation_outside_that_depends_on_the_plate_forces_the_joint_weight():
    elbo = IWAE_ELBO(16)
    assert elbo.explain(outside_model(True), local_guide).plates == ()
    cov = torch.cat([torch.cat([torch.eye(8) * 2, torch.ones(8, 1)], 1), torch.tensor([[1.0] * 8 + [9.0]])])
    exact = float(dist.MultivariateNormal(torch.zeros(9), cov).log_prob(torch.cat([data(), torch.tensor([1.0])])))
    mean, se = mean_and_error(elbo, outside_model(True), local_guide)
    assert mean < exact + 4 * se
    with pytest.raises(ValueError, match="'data' is subsampled.*site 'y' is outside it"):
        IWAE_ELBO(16).loss(outside_model(True), local_guide, 4)


def test_named_plates():
    def model():
        with pyro.plate("a", 3, dim=-2), pyro.plate("b", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3, 2))

    def guide():
        with pyro.plate("a", 3, dim=-2), pyro.plate("b", 2, dim=-1):
            pyro.sample("z", dist.Normal(torch.tensor(1.0), 1.0))

    bounds = {}
    for plates in (None, ("a",), ("b",), ()):
        elbo = IWAE_ELBO(4, plates=plates)
        bounds[plates] = mean_and_error(elbo, model, guide)[0]
        assert elbo.explain(model, guide).plates == (("a", "b") if plates is None else plates)
    assert bounds[None] > bounds[("a",)] > bounds[()]
    assert bounds[None] > bounds[("b",)] > bounds[()]


def test_crossed_plates_keep_only_the_common_one():
    def model():
        a, b = pyro.plate("a", 3, dim=-2), pyro.plate("b", 2, dim=-1)
        with a:
            u = pyro.sample("u", dist.Normal(torch.tensor(0.0), 1.0))
            with b:
                v = pyro.sample("v", dist.Normal(u, 1.0))
                pyro.sample("x", dist.Normal(v, 1.0), obs=torch.zeros(3, 2))

    def guide():
        a, b = pyro.plate("a", 3, dim=-2), pyro.plate("b", 2, dim=-1)
        with a:
            pyro.sample("u", dist.Normal(torch.tensor(0.1), 1.0))
            with b:
                pyro.sample("v", dist.Normal(torch.tensor(0.1), 1.0))

    elbo = IWAE_ELBO(4)
    assert elbo.explain(model, guide).plates == ("a",)
    cov = 2 * torch.eye(2) + torch.ones(2, 2)
    exact = 3 * float(dist.MultivariateNormal(torch.zeros(2), cov).log_prob(torch.zeros(2)))
    mean, se = mean_and_error(IWAE_ELBO(200), model, guide)
    assert exact - 0.5 < mean < exact + 4 * se


def test_a_shared_scale_stands_outside_the_log():
    elbo = IWAE_ELBO(8)
    pyro.set_rng_seed(0)
    plain = elbo.loss(local_model, local_guide)
    for factor in (0.25, torch.tensor(0.25)):
        scaled = [pyro.poutine.scale(fn, scale=factor) for fn in (local_model, local_guide)]
        pyro.set_rng_seed(0)
        assert IWAE_ELBO(8).loss(*scaled) == pytest.approx(0.25 * plain)
        assert not IWAE_ELBO(8).explain(*scaled).annealed


def test_weights_per_datum():
    """A scale that differs by datum, but not by site, weighs each datum's bound."""
    weights = torch.linspace(0.5, 2.0, NUM_DATA)

    def model():
        with pyro.plate("data", NUM_DATA), pyro.poutine.scale(scale=weights):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data())

    def guide():
        with pyro.plate("data", NUM_DATA), pyro.poutine.scale(scale=weights):
            pyro.sample("z", dist.Normal(torch.tensor(0.1), 0.8))

    exact = float((weights * dist.Normal(0.0, 2**0.5).log_prob(data())).sum())
    mean, se = mean_and_error(IWAE_ELBO(5000), model, guide, calls=50)
    assert abs(mean - exact) < 4 * se + 1e-3


@pytest.mark.parametrize("kind", ["mask", "obs_mask"])
def test_masked_data(kind):
    mask = torch.arange(NUM_DATA) % 2 == 0

    def model():
        with pyro.plate("data", NUM_DATA):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            if kind == "mask":
                with pyro.poutine.mask(mask=mask):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=data())
            else:
                pyro.sample("x", dist.Normal(z, 1.0), obs=data(), obs_mask=mask)

    def guide():
        with pyro.plate("data", NUM_DATA):
            z = pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.1)), 0.9))
            if kind == "obs_mask":
                with pyro.poutine.mask(mask=~mask):
                    pyro.sample("x_unobserved", dist.Normal(z, 1.0))

    exact = float(dist.Normal(0.0, 2**0.5).log_prob(data())[mask].sum())
    elbo = IWAE_ELBO(20_000)
    assert elbo.explain(model, guide).plates == ("data",)
    mean, se = mean_and_error(elbo, model, guide, calls=20)
    assert abs(mean - exact) < 4 * se + 1e-3


@pytest.mark.parametrize("gradient", ["pathwise", "stl", "dreg"])
def test_local_particles_estimate_one_gradient(gradient):
    """Minibatch, full batch and looped particles agree; without the scale N/B they would not."""
    results = {}
    for label, batch, vectorize, particles, calls in (
        ("full", 8, True, 200, 60),
        ("minibatch", 2, True, 200, 300),
        ("looped", 8, False, 2, 200),
    ):
        elbo = IWAE_ELBO(particles, gradient, plates=("data",), local_particles=3, vectorize_particles=vectorize)
        grads = []
        for _ in range(calls):
            value = elbo.loss_and_grads(global_model, global_guide, batch)
            grads.append([-value] + [-float(pyro.param(n).unconstrained().grad) for n in ("gm", "gs", "a", "b", "c")])
            for n in ("gm", "gs", "a", "b", "c"):
                pyro.param(n).unconstrained().grad = None
        grads = torch.tensor(grads)
        results[label] = grads.mean(0), grads.std(0) / calls**0.5
    for label in ("minibatch", "looped"):
        distance = (results[label][0] - results["full"][0]).abs()
        assert (distance < 4 * (results[label][1] ** 2 + results["full"][1] ** 2).sqrt()).all(), label


def test_local_doubly_reparameterised_gradient_is_the_bounds():
    results = {}
    for gradient in ("pathwise", "dreg", "stl"):
        elbo = IWAE_ELBO(400, gradient, plates=("data",), local_particles=3)
        grads = []
        for _ in range(80):
            elbo.loss_and_grads(global_model, global_guide)
            grads.append([float(pyro.param(n).unconstrained().grad) for n in ("gm", "gs", "a", "b", "c")])
            for n in ("gm", "gs", "a", "b", "c"):
                pyro.param(n).unconstrained().grad = None
        grads = torch.tensor(grads)
        results[gradient] = grads.mean(0), grads.std(0) / 80**0.5
    path, error = results["pathwise"]
    for gradient, same in (("dreg", True), ("stl", False)):
        z = (results[gradient][0] - path).abs() / (results[gradient][1] ** 2 + error**2).sqrt()
        assert (z < 4).all() == same, (gradient, z)


def test_local_bound_tightens_with_local_particles_and_stays_below_the_evidence():
    from tests.cases import global_log_evidence

    found = []
    for local in (1, 4, 32):
        extra = {} if local == 1 else {"plates": ("data",), "local_particles": local}
        found.append(
            mean_and_error(IWAE_ELBO(1 if local == 1 else 100, **extra), global_model, global_guide, calls=400)
        )
    outer = IWAE_ELBO(100, plates=("data",), local_particles=32, global_bound="iwae")
    found.append(mean_and_error(outer, global_model, global_guide, calls=100))
    for (looser, e1), (tighter, e2) in zip(found, found[1:], strict=False):
        assert looser < tighter + 4 * (e1**2 + e2**2) ** 0.5
    assert found[1][0] > found[0][0] + 4 * found[0][1]
    assert found[-1][0] < global_log_evidence() + 4 * found[-1][1]
