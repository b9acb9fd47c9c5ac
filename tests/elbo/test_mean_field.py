import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, AutoNormalMessenger

from pyro_elbo_ext import MeanField_ELBO


def entangled_model():
    z2 = pyro.sample("z2", dist.Normal(torch.tensor(0.0), 1.0))
    z1 = pyro.sample("z1", dist.Normal(0.8 * z2, 0.7))
    pyro.sample("x", dist.Normal(z1, 1.0), obs=torch.tensor(1.0))


def entangled_guide():
    z1 = pyro.sample("z1", dist.Normal(torch.tensor(0.3), 0.8))
    pyro.sample("z2", dist.Normal(0.9 * z1, 0.6))


def many_supports():
    a = pyro.sample("a", dist.LogNormal(torch.tensor(0.0), 1.0))
    b = pyro.sample("b", dist.Normal(torch.tensor(0.0), a))
    c = pyro.sample("c", dist.Gamma(torch.tensor(2.0), 2.0))
    pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("v", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("u", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", 5, subsample_size=2):
        z = pyro.sample("z", dist.Normal(b, 1.0))
        pyro.sample("x", dist.Normal(z, c), obs=torch.ones(2))


def test_a_model_parent_that_descends_from_the_site_forces_monte_carlo():
    """q(z1) q(z2 | z1) against p(z2) p(z1 | z2): the closed form at z1 would be another number."""
    terms = MeanField_ELBO(400_000).terms(entangled_model, entangled_guide)
    assert terms.closed_form == ("z2",)
    # E log p - E log q by moments of the Gaussian guide.
    m1, v1 = torch.tensor(0.3), torch.tensor(0.64)
    m2, v2, cov = 0.9 * m1, 0.81 * v1 + 0.36, 0.9 * v1
    log2pi = torch.tensor(2 * torch.pi).log()
    likelihood = -0.5 * (log2pi + (1 - m1) ** 2 + v1)
    prior2 = -0.5 * (log2pi + m2**2 + v2)
    residual = (m1 - 0.8 * m2) ** 2 + v1 + 0.64 * v2 - 1.6 * cov
    prior1 = -0.5 * (log2pi + torch.tensor(0.49).log() + residual / 0.49)
    entropy = (log2pi + 1) + 0.5 * (torch.tensor(0.64).log() + torch.tensor(0.36).log())
    assert terms.elbo == pytest.approx(float(likelihood + prior1 + prior2 + entropy), abs=0.02)


CLOSED = {AutoNormal: "abvwz", AutoNormalMessenger: "abvwz", AutoDiagonalNormal: ""}


@pytest.mark.parametrize("guide, closed", CLOSED.items())
def test_auto_guides(guide, closed):
    guide = guide(many_supports)
    elbo = MeanField_ELBO(500)
    terms = [elbo.terms(many_supports, guide) for _ in range(20)]
    assert terms[0].closed_form == tuple(closed)
    mine = torch.tensor([t.elbo for t in terms])
    reference = Trace_ELBO(500, vectorize_particles=True, max_plate_nesting=1)
    theirs = -torch.tensor([reference.loss(many_supports, guide) for _ in range(20)])
    error = float((mine.var() + theirs.var()) / 20) ** 0.5
    assert abs(float(mine.mean() - theirs.mean())) < 4 * error


def test_the_closed_form_has_no_variance():
    def model():
        pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))

    guide = AutoNormal(model)
    assert len({MeanField_ELBO().loss(model, guide) for _ in range(5)}) == 1


def scaled_model(batch=8):
    with pyro.plate("data", 8, subsample_size=batch):
        pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))


def scaled_guide(batch=8):
    m = pyro.param("m", torch.tensor(2.0))
    with pyro.plate("data", 8, subsample_size=batch):
        pyro.sample("z", dist.Normal(m, 1.0))


@pytest.mark.parametrize("batch", [8, 2])
def test_scale_and_beta(batch):
    """KL(N(2, 1) || N(0, 1)) = 2 per element, eight elements, whatever the minibatch."""
    assert MeanField_ELBO().loss(scaled_model, scaled_guide, batch) == pytest.approx(16)
    assert MeanField_ELBO(beta=0.25).loss(scaled_model, scaled_guide, batch) == pytest.approx(4)
    assert MeanField_ELBO(4, beta=0.25, vectorize_particles=False).loss(
        scaled_model, scaled_guide, batch
    ) == pytest.approx(4)
    assert MeanField_ELBO(beta=0.25).terms(scaled_model, scaled_guide, batch).kl["z"] == pytest.approx(16)


@pytest.mark.parametrize("free, loss, moves", [(1.0, 16, True), (3.0, 24, False), ({"z": 3.0}, 24, False)])
def test_free_bits_are_nats_per_element(free, loss, moves):
    elbo = MeanField_ELBO(3, free_bits=free)
    assert elbo.loss_and_grads(scaled_model, scaled_guide, 2) == pytest.approx(loss)
    assert bool(pyro.param("m").grad.any()) == moves
    assert elbo.terms(scaled_model, scaled_guide, 2).elbo == pytest.approx(-16)


def test_free_bits_need_a_kl_per_site():
    guide = AutoDiagonalNormal(entangled_model)
    with pytest.raises(ValueError, match="'_AutoDiagonalNormal_latent' draws several at once"):
        MeanField_ELBO(free_bits=1.0).loss(entangled_model, guide)


@pytest.mark.parametrize("shared", [True, False])
def test_masks(shared):
    mask = torch.arange(8) < 3

    def model():
        with pyro.plate("data", 8), pyro.poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))

    def guide():
        with pyro.plate("data", 8), pyro.poutine.mask(mask=mask if shared else mask.clone()):
            pyro.sample("z", dist.Normal(torch.tensor(2.0), 1.0))

    terms = MeanField_ELBO(100_000).terms(model, guide)
    assert terms.closed_form == (("z",) if shared else ())
    assert terms.kl["z"] == pytest.approx(6, abs=1e-9 if shared else 0.1)


@pytest.mark.convergence
def test_training_a_minibatch_reaches_the_optimum():
    """The KL is all there is, so the optimum is the prior; from m = 2 a step that does nothing stays there."""
    svi = SVI(scaled_model, scaled_guide, pyro.optim.Adam({"lr": 0.05}), loss=MeanField_ELBO())
    for _ in range(300):
        svi.step(2)
    assert abs(float(pyro.param("m").detach())) < 1e-2
