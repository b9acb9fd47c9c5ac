"""The ELBO taken apart: terms add up to it, and agree with closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch.distributions import kl_divergence

from pyro_elbo_ext import MeanField_ELBO
from pyro_elbo_ext.diagnostics.sampling import posterior_draws
from pyro_elbo_ext.diagnostics.terms import elbo_terms
from tests.cases import NUM_DATA, data, global_guide, global_model, local_guide, local_model, nested_model


@pytest.mark.parametrize(
    "make",
    [lambda: global_guide, lambda: AutoNormal(global_model), lambda: AutoDiagonalNormal(global_model)],
    ids=["hand-written", "AutoNormal", "AutoDiagonalNormal"],
)
def test_terms_add_up_to_the_elbo_of_the_same_draws(make):
    guide = make()
    terms = elbo_terms(global_model, guide, num_samples=70, chunk_size=30, seed=0)
    draws = posterior_draws(global_model, guide, num_samples=70, chunk_size=30, seed=0)
    assert terms.elbo == pytest.approx(draws.elbo, abs=1e-9)
    assert terms.reconstruction - terms.kl == pytest.approx(terms.elbo, abs=1e-9)
    assert terms.se == pytest.approx(float(draws.log_weight.std()) / math.sqrt(70), rel=1e-6)


def test_closed_forms():
    terms = elbo_terms(local_model, local_guide, num_samples=2000).terms
    assert set(terms) == {"z", "x"} and terms["z"].kind == "latent" and terms["x"].kind == "observed"
    kl = NUM_DATA * float(kl_divergence(dist.Normal(0.1, 0.8), dist.Normal(0.0, 1.0)))
    likelihood = dist.Normal(torch.tensor(0.1), 1.0).log_prob(data()).sum() - NUM_DATA * 0.8**2 / 2
    assert terms["z"].exact == pytest.approx(kl)
    assert terms["x"].exact is None
    assert abs(terms["z"].value - kl) < 4 * terms["z"].se
    assert abs(terms["x"].value - float(likelihood)) < 4 * terms["x"].se


def test_minibatch_of_a_plate_with_globals_is_scaled():
    full = elbo_terms(global_model, global_guide, num_samples=500)
    parts = [elbo_terms(global_model, global_guide, (4,), num_samples=50) for _ in range(40)]
    for name in ("g", "z", "x"):
        values = torch.tensor([part.terms[name].value for part in parts])
        assert abs(float(values.mean()) - full.terms[name].value) < 4 * float(values.std()) / 40**0.5 + 0.1


def test_auto_normal_has_closed_forms_where_sites_are_unbounded():
    guide = AutoNormal(global_model)
    terms = elbo_terms(global_model, guide, num_samples=2000)
    exact = MeanField_ELBO(num_particles=2000).terms(global_model, guide)
    assert exact.closed_form == ("g", "z")
    for name in ("g", "z"):
        assert terms.terms[name].exact == pytest.approx(exact.kl[name], abs=0.05)
        assert abs(terms.terms[name].value - terms.terms[name].exact) < 4 * terms.terms[name].se + 0.05
    bounded = elbo_terms(nested_model, AutoNormal(nested_model), num_samples=10)
    assert bounded.terms["a"].exact is None and bounded.terms["a"].kind == "latent"


def test_joint_guides_have_no_kl_per_site():
    terms = elbo_terms(global_model, AutoDiagonalNormal(global_model), num_samples=10).terms
    kinds = {name: term.kind for name, term in terms.items()}
    assert kinds == {"_AutoDiagonalNormal_latent": "joint", "g": "prior", "z": "prior", "x": "observed"}


def test_no_closed_form_where_the_prior_hangs_on_the_draw():
    def model():
        a = pyro.sample("a", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("b", dist.Normal(a, 1.0))

    def guide():
        b = pyro.sample("b", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("a", dist.Normal(b, 1.0))

    terms = elbo_terms(model, guide, num_samples=100).terms
    assert terms["a"].exact is not None and terms["b"].exact is None


def test_factors_and_no_plates():
    def model():
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.factor("f", -z.square())

    def guide():
        pyro.sample("z", dist.Normal(torch.tensor(0.0), 0.5))

    terms = elbo_terms(model, guide, num_samples=4000).terms
    assert abs(terms["f"].value + 0.25) < 4 * terms["f"].se


def test_refusals():
    with pytest.raises(ValueError, match="at least 2"):
        elbo_terms(local_model, local_guide, num_samples=1)


def test_auto_normal_has_a_closed_form_of_a_vector():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    guide = AutoNormal(model, init_scale=0.5)
    terms = elbo_terms(model, guide, num_samples=2000).terms
    own = dist.Normal(guide.locs.z.detach(), guide.scales.z.detach())
    assert terms["z"].exact == pytest.approx(float(kl_divergence(own, dist.Normal(torch.zeros(3), 2.0)).sum()))
    assert abs(terms["z"].value - terms["z"].exact) < 4 * terms["z"].se
