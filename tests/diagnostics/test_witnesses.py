"""Each witness against what it must see: exact distances between Gaussians."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_elbo_ext.diagnostics.bracket import annealed_bracket
from pyro_elbo_ext.diagnostics.sampling import posterior_draws
from pyro_elbo_ext.diagnostics.witnesses import Effects, against, corrected, drift, score_balance
from tests.cases import NUM_DATA, data, local_model, nested_model


def model():
    """The posterior of z is N(1, 1/2)."""
    z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))


def normal(loc, sd):
    def guide():
        pyro.sample("z", dist.Normal(torch.tensor(float(loc)), sd))

    return guide


SD = 0.5**0.5


@pytest.mark.parametrize(("loc", "sd"), [(1.0, SD), (1.4, 0.9), (0.7, 0.8)])
def test_weights_correct_moments(loc, sd):
    draws = posterior_draws(model, normal(loc, sd), num_samples=8000, chunk_size=4000)
    effects = corrected(draws)
    assert float(effects.shift["z"]) == pytest.approx((loc - 1) / SD, abs=0.06)
    assert float(effects.log_sd["z"]) == pytest.approx(math.log(sd / SD), abs=0.06)


@pytest.mark.parametrize(("loc", "sd"), [(1.0, SD), (1.4, 0.9), (-2.0, 0.05)])
def test_slope_sees_where_the_posterior_is(loc, sd):
    effects = score_balance(model, normal(loc, sd), num_samples=2000, chunk_size=1000)
    noise = float(effects.noise["z"])
    assert abs(float(effects.shift["z"]) - (loc - 1) / SD) < 4 * noise + 0.1
    assert abs(float(effects.log_sd["z"]) - math.log(sd / SD)) < 4 * noise + 1e-6
    exact = (loc, sd) == (1.0, SD)
    assert (noise < 1e-6) == exact and (effects.size < 1e-6) == exact


def test_chains_see_what_narrow_draws_miss():
    guide = normal(-2.0, 0.05)
    draws = posterior_draws(model, guide)
    assert abs(float(corrected(draws).shift["z"])) < 1  # its weights are nearly alike
    effects = drift(draws, annealed_bracket(model, guide, num_chains=200, num_temperatures=5))
    assert float(effects.shift["z"]) == pytest.approx(-3 / SD, abs=0.5)
    assert float(effects.log_sd["z"]) == pytest.approx(math.log(0.05 / SD), abs=0.2)


def test_reference_is_compared():
    draws = posterior_draws(model, normal(1.0, 0.9), num_samples=4000, chunk_size=2000)
    effects = against(draws, {"z": 1.3 + SD * torch.randn(4000)})
    assert float(effects.shift["z"]) == pytest.approx(-0.3 / SD, abs=0.08)
    with pytest.raises(ValueError, match=r"site 'z' have shape \(10, 2\)"):
        against(draws, {"z": torch.zeros(10, 2)})


def test_elements_have_weights_of_their_own():
    shifts = torch.zeros(NUM_DATA).index_fill(0, torch.tensor([3]), 0.5)

    def guide():
        with pyro.plate("data", NUM_DATA):
            pyro.sample("z", dist.Normal(data() / 2 + shifts, 0.8))

    effects = corrected(posterior_draws(local_model, guide, num_samples=4000, chunk_size=2000))
    torch.testing.assert_close(effects.shift["z"], shifts / SD, rtol=0, atol=0.1, check_dtype=False)
    name, shift, ratio, noise = effects.worst
    assert name == "z[3]" and shift == pytest.approx(0.5 / SD, abs=0.1)
    assert ratio == pytest.approx(0.8 / SD, abs=0.1) and 0 < noise < 0.05
    assert effects.size == pytest.approx(0.5 / SD, abs=0.15)


def test_sites_in_more_plates_than_the_weights():
    draws = posterior_draws(nested_model, AutoNormal(nested_model), num_samples=100)
    assert draws.plates == ("inner",)
    effects = corrected(draws)
    assert {name: tuple(value.shape) for name, value in effects.shift.items()} == {
        "a": (3,),
        "b": (2, 3),
        "w": (2, 3, 2),
    }
    assert all(effects.noise[name].shape == effects.shift[name].shape for name in effects.shift)


def test_moments_are_taken_on_the_reals():
    def model():
        pyro.sample("s", dist.LogNormal(torch.tensor(0.0), 3.0))

    draws = posterior_draws(model, model, num_samples=2000)
    assert float(draws.unconstrained["s"].std()) == pytest.approx(3, rel=0.1)
    assert float(corrected(draws).log_sd["s"]) == pytest.approx(0, abs=1e-6)


def test_discrete_latents_are_compared_too():
    def model():
        c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("x", dist.Normal(c, 1.0), obs=torch.tensor(0.5))

    def guide():
        pyro.sample("c", dist.Bernoulli(torch.tensor(0.2)))

    effects = corrected(posterior_draws(model, guide, num_samples=4000))
    assert float(effects.shift["c"]) == pytest.approx(-0.6, abs=0.1)


def test_size_forgives_noise_and_five_in_a_hundred():
    def of(*shifts, noise=0.05):
        shift = torch.tensor(shifts)
        return Effects({"z": shift}, {"z": torch.zeros_like(shift)}, {"z": torch.full_like(shift, noise)}).size

    assert of(0.5) == pytest.approx(0.5 - 1.96 * 0.05, abs=1e-3)
    assert of(0.08) == 0
    assert of(*[0.0] * 96, *[3.0] * 4) == 0
    assert of(*[0.0] * 90, *[3.0] * 10) == pytest.approx(3 - 3.02 * 0.05, abs=1e-3)
    sites = {"global": torch.tensor(2.0), "local": torch.zeros(100)}
    zeros = {name: torch.zeros_like(value) for name, value in sites.items()}
    assert Effects(sites, zeros, zeros).size == 2  # one of a hundred and one, but a site of its own
