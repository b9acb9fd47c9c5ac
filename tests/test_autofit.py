"""autofit: exact where posteriors are known, an honest no where it fails, and nothing touched outside."""

import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import Distribution, constraints

from pyro_elbo_ext import AutoFlow, AutoPlatedFlow
from pyro_elbo_ext.autofit import autofit
from pyro_elbo_ext.autofit.frame import Frame, affine_flow, make_guide
from pyro_elbo_ext.autofit.gaussian import Gaussian, Start, _candidate, _moments, fit_gaussian
from pyro_elbo_ext.autofit.proposal import Chains, Proposal, move
from pyro_elbo_ext.autofit.witnesses import drift, evidence_error, missed_mass, precision
from pyro_elbo_ext.diagnostics.sampling import posterior_draws
from tests.cases import data, global_model, local_model
from tests.guides.cases import Y, levels, schools

QUICK = {"num_samples": 4000, "num_steps": 30}


def regression(columns=(1.0, 1e3, 1e-2), noise=0.5):
    """Known noise and normal priors: the posterior is a Gaussian. Columns are scaled as data often are."""
    x = torch.sin(torch.arange(30.0)[:, None] * torch.tensor([0.7, 1.9, 3.1])) + 0.2
    x = x * torch.tensor(columns)
    y = x @ (torch.tensor([1.0, -2.0, 0.5]) / torch.tensor(columns)) + 0.3 * torch.cos(5 * torch.arange(30.0))
    prior = 3.0 / torch.tensor(columns)

    def model():
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), prior).to_event(1))
        with pyro.plate("data", 30):
            mean = beta @ x.T
            mean = mean.squeeze(-2) if mean.dim() > 1 else mean  # the rows take the place of the event
            pyro.sample("y", dist.Normal(mean, noise), obs=y)
        pyro.sample("apart", dist.Normal(0.0, 1.0), obs=torch.tensor(1.5))  # a constant of the evidence

    covariance = torch.linalg.inv(x.T @ x / noise**2 + torch.diag(prior**-2))
    mean = covariance @ (x.T @ y) / noise**2
    marginal = x @ torch.diag(prior**2) @ x.T + noise**2 * torch.eye(30)
    evidence = dist.MultivariateNormal(torch.zeros(30), marginal).log_prob(y)
    return model, mean, covariance, float(evidence + dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.5)))


def on_vector(log_density, size):
    """A model whose posterior has a log-density on the reals, up to a constant."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
        prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        pyro.factor("density", log_density(z) - prior)

    return model


def modes(z, distance=8.0, weight=0.5):
    """Two normals on the first coordinate, a standard one on others."""
    ends = [dist.Normal(s * distance, 1.0).log_prob(z[..., 0]) for s in (-1, 1)]
    rest = dist.Normal(0.0, 1.0).log_prob(z[..., 1:]).sum(-1)
    return torch.logaddexp(ends[0] + math.log(weight), ends[1] + math.log(1 - weight)) + rest


def cauchy(z):
    return dist.Cauchy(0.0, 1.0).log_prob(z).sum(-1)


def funnel(z):
    """Neal's, with no structure to be seen in the prior."""
    return dist.Normal(0.0, 2.0).log_prob(z[..., 0]) + dist.Normal(0.0, (z[..., :1] / 2).exp()).log_prob(
        z[..., 1:]
    ).sum(-1)


def schools_moments():
    """Means and variances of mu, log tau and theta, by quadrature over tau and normal theory given it."""
    log_tau = torch.linspace(-14.0, 9.0, 20001)
    tau = log_tau.exp()
    spread = 1 + tau.square()
    precision_mu = 1 + len(Y) / spread
    mean_mu = Y.sum() / spread / precision_mu
    log_like = dist.Normal(0.0, 1.0).log_prob(mean_mu) - dist.Normal(mean_mu, precision_mu**-0.5).log_prob(mean_mu)
    log_like = log_like + dist.Normal(mean_mu[:, None], spread[:, None].sqrt()).log_prob(Y).sum(-1)
    weight = (log_like + dist.HalfCauchy(1.0).log_prob(tau) + log_tau).softmax(0)
    shrink = (tau.square() / spread)[:, None]
    theta = mean_mu[:, None] + shrink * (Y - mean_mu[:, None])
    inner = shrink + ((1 - shrink).square() / precision_mu[:, None])
    mean = (weight[:, None] * theta).sum(0)
    return {
        "log tau": ((weight * log_tau).sum(), None),
        "mu": ((weight * mean_mu).sum(), None),
        "theta": (mean, (weight[:, None] * (inner + (theta - mean).square())).sum(0)),
    }


# Exact answers


@pytest.mark.convergence
def test_a_gaussian_posterior_is_exact_whatever_its_scales():
    model, mean, covariance, evidence = regression()
    result = autofit(model, seed=0, **QUICK)
    assert result.trusted
    assert result.report.log_evidence == pytest.approx(evidence, abs=1e-6)
    assert result.report.ess == pytest.approx(len(result.log_weights), rel=1e-6)
    flow = result.guide.flows["block_latent"]
    assert torch.allclose(flow.affine.loc, mean, rtol=1e-7)
    found = flow.affine.triangle @ flow.affine.triangle.T
    assert torch.allclose(found, covariance, rtol=1e-6, atol=1e-9 * covariance.max())


def test_moments_by_stein_are_exact_on_a_gaussian():
    target = dist.MultivariateNormal(torch.tensor([1.0, -2.0]), torch.tensor([[2.0, 0.6], [0.6, 0.5]]))
    frame = Frame(on_vector(lambda z: target.log_prob(z), 2), (), {})
    loc, triangle = torch.tensor([5.0, 3.0]), torch.tensor([[0.7, 0.0], [0.2, 1.5]])
    second, mean, share = _moments(frame, loc, triangle)
    assert share == 1
    assert torch.allclose(second, -triangle.T @ target.precision_matrix @ triangle, atol=1e-10)
    assert torch.allclose(mean, triangle.T @ target.precision_matrix @ (target.loc - loc), atol=1e-10)
    at, factor = _candidate(loc, triangle, second, mean, 1.0)
    assert torch.allclose(at, target.loc, atol=1e-9)
    assert torch.allclose(factor @ factor.T, target.covariance_matrix, atol=1e-9)


@pytest.mark.convergence
def test_a_hierarchy_has_the_moments_of_quadrature():
    result = autofit(schools, seed=1, num_samples=4000, num_steps=500)  # enough for any seed
    assert result.trusted
    draws, exact = result.posterior(4000, seed=0), schools_moments()
    draws["log tau"] = draws["tau"].log()
    for name, (mean, variance) in exact.items():
        sd = draws[name].std(0)
        assert ((draws[name].mean(0) - mean).abs() / sd < 0.08).all(), name
        if variance is not None:
            assert ((sd.log() - variance.log() / 2).abs() < 0.1).all(), name


def informed():
    """Much is known of each group, so that a Gaussian fits better half-way to centred."""
    tau = pyro.sample("tau", dist.LogNormal(torch.tensor(0.0), 1.0))
    with pyro.plate("groups", 4):
        theta = pyro.sample("theta", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(theta, 0.1), obs=Y.to(theta))


@pytest.mark.parametrize("model", [schools, informed])
def test_the_guide_alone_fits_what_it_is_trusted_for(model):
    """The guide's own weights are those that were judged, and it goes on learning under SVI."""
    result = autofit(model, seed=2, num_samples=4000, num_steps=5)
    assert (result.guide.centering_weights["theta"] > 0.4) == (model is informed)
    draws = posterior_draws(model, result.guide, num_samples=4000, seed=0)
    own, judged = draws.log_weight, result.log_weights
    error = math.hypot(float(own.std()), float(judged.std())) / 4000**0.5
    assert abs(float(own.mean() - judged.mean())) < 4 * error
    assert isinstance(result.guide, AutoFlow)
    svi = SVI(model, result.guide, pyro.optim.Adam({"lr": 1e-4}), Trace_ELBO(num_particles=10))
    assert math.isfinite(svi.step()) and math.isfinite(svi.step())


@pytest.mark.parametrize("centred", [0.0, 0.4], ids=["non-centred", "half-way"])
def test_a_frame_keeps_its_centring_in_the_guide(centred):
    frame = Frame(levels, (), {})
    frame.centering = torch.full((frame.num_centred,), centred)
    loc, triangle = 0.3 * torch.ones(frame.size), 0.5 * torch.eye(frame.size)
    proposal = Proposal("any", frame, affine_flow(loc, triangle), frame.centering)
    judged = proposal.draw(3000).log_weight
    guide = make_guide(levels, affine_flow(loc, triangle), (), {})
    pyro.clear_param_store()
    guide.centering.data.copy_(frame.centering)
    own = posterior_draws(levels, guide, num_samples=3000).log_weight
    error = math.hypot(float(own.std()), float(judged.std())) / 3000**0.5
    assert abs(float(own.mean() - judged.mean())) < 4 * error


def test_a_funnel_without_structure_is_fitted_or_refused():
    result = autofit(on_vector(funnel, 3), seed=0, num_samples=4000, num_steps=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        z = result.posterior(4000, seed=0)["z"]
    right = abs(float(z[:, 0].mean())) / 2 < 0.1 and abs(math.log(float(z[:, 0].std()) / 2)) < 0.15
    assert right or not result.trusted


# An honest no


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_far_modes_are_not_trusted(seed):
    result = autofit(on_vector(modes, 2), seed=seed, **QUICK)
    assert not result.trusted
    assert any(reason.startswith("restarts") for reason in result.report.reasons)
    with pytest.warns(UserWarning, match="not trusted"):
        result.posterior(10)


def test_tails_that_no_rung_has_are_not_trusted():
    result = autofit(on_vector(cauchy, 2), seed=0, **QUICK)
    assert not result.trusted
    assert any(reason.startswith(("weights", "precision")) for reason in result.report.reasons)


def test_out_of_time_says_so():
    result = autofit(on_vector(cauchy, 2), seed=0, num_samples=1000, num_steps=5, max_seconds=1e-9)
    assert not result.trusted
    assert len(result.report.restarts) == 1 and "flow" not in str(result.report)
    assert any("max_seconds" in reason for reason in result.report.reasons)


# Witnesses


def gaussian_proposal(log_density, loc, scale, size=2):
    frame = Frame(on_vector(log_density, size), (), {})
    return Proposal("any", frame, affine_flow(loc * torch.ones(size), scale * torch.eye(size)), None)


def normal(z):
    return dist.Normal(0.0, 1.0).log_prob(z).sum(-1)


def test_chains_stay_where_the_posterior_is_and_leave_where_it_is_not():
    exact = gaussian_proposal(normal, 0.0, 1.0)
    draws = exact.draw(4000)
    flat = torch.full((4000,), -math.log(4000))
    assert drift(exact, draws, flat, 400).z < 4.5
    narrow = gaussian_proposal(normal, 0.0, 0.6)
    shifted = gaussian_proposal(normal, 0.5, 1.0)
    for wrong in (narrow, shifted):
        assert drift(wrong, wrong.draw(4000), flat, 400).z > 6  # without the weights that would correct it


def test_transitions_leave_the_posterior_invariant():
    wide = gaussian_proposal(modes, 0.0, 2.0)
    ends = 8.0 * (2 * torch.bernoulli(torch.full((4000,), 0.5)) - 1)
    exact = torch.randn(4000, 2) + torch.stack([ends, torch.zeros(4000)], -1)
    chains = Chains.at(wide, exact / 2)
    for _ in range(5):
        chains, accept = move(wide, chains, 0.3, 4)
    assert 0.5 < accept < 1
    end = chains.noise * 2
    assert abs(float((end[:, 0].abs() - 8).mean())) < 4 / 4000**0.5
    assert float((end[:, 0].abs() - 8).var()) == pytest.approx(1, abs=0.1)
    assert float(end[:, 1].var()) == pytest.approx(1, abs=0.1)


def test_restarts_find_the_other_mode():
    proposal = gaussian_proposal(modes, 0.0, 1.0)
    one, other = (Gaussian(torch.tensor([s * 8.0, 0.0]), torch.eye(2), None, 0.0, 1) for s in (-1, 1))
    gain, error = missed_mass(proposal, math.log(0.5), [one])
    assert abs(gain) < 4 * error + 1e-3
    gain, error = missed_mass(proposal, math.log(0.5), [one, other, other])
    assert abs(gain - math.log(2)) < 4 * error + 1e-3
    lost = Gaussian(torch.tensor([1e200, 0.0]), torch.eye(2), None, 0.0, 1)
    assert not missed_mass(proposal, math.log(0.5), [lost])[0] > 0


def test_precision_is_the_standard_error_of_weighted_moments():
    """Against many replications of the weighted mean and log standard deviation."""
    torch.manual_seed(0)
    size, copies = 400, 2000
    x = 1.5 * torch.randn(copies, size)
    log_w = (-0.5 * x.square() * (1 - 1 / 2.25)).log_softmax(-1)
    w = log_w.exp()
    mean = (w * x).sum(-1)
    log_sd = 0.5 * (w * (x - mean[:, None]).square()).sum(-1).log()
    found = [precision({"x": x[i], "constant": torch.ones(size)}, log_w[i]) for i in range(50)]
    assert sum(f.mean for f in found) / 50 == pytest.approx(float(mean.std()), rel=0.1)
    assert sum(f.log_sd for f in found) / 50 == pytest.approx(float(log_sd.std()), rel=0.1)
    assert evidence_error(torch.zeros(8)) == 0


def test_an_overflowing_start_narrows_until_it_has_a_density():
    def steep(z):
        return dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - 1e9 * torch.relu(z.abs().amax(-1) - 6)

    frame = Frame(on_vector(steep, 2), (), {})
    fit = fit_gaussian(frame, Start(torch.zeros(2), 1e4, None))
    assert fit.bound == pytest.approx(0.0, abs=0.1)


# Nothing touched, everything repeatable


def test_the_same_seed_gives_the_same_posterior_and_nothing_is_touched():
    pyro.param("mine", torch.tensor(3.0))
    pyro.param("AutoFlow.weights", torch.ones(2))
    before, state, validation = dict(pyro.get_param_store().items()), torch.get_rng_state(), Distribution._validate_args
    first, second = (autofit(schools, seed=5, num_samples=1000, num_steps=3) for _ in range(2))
    assert any(rung.name == "flow 1" for rung in first.report.rungs)
    assert torch.equal(first.log_weights, second.log_weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = [result.posterior(100, seed=seed) for result, seed in ((first, 1), (second, 1), (first, 2))]
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert Distribution._validate_args == validation
    after = dict(pyro.get_param_store().items())
    assert set(after) == set(before) and all(after[name] is before[name] for name in before)
    assert not torch.equal(draws[0]["mu"], draws[2]["mu"])


def test_sites_have_their_own_shapes_and_deterministic_ones_come_along():
    def model(x):
        w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 4, dim=-1):
            a = pyro.sample("a", dist.Gamma(2.0, torch.tensor(1.0)))
            pyro.deterministic("b", a * w[..., 0], event_dim=0)
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)
        pyro.deterministic("fixed", torch.arange(2.0))

    result = autofit(model, torch.ones(2, 4), seed=0, num_samples=2000, num_steps=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = result.posterior(50)
    shapes = {name: tuple(value.shape) for name, value in draws.items()}
    assert shapes == {"w": (50, 3), "a": (50, 2, 4), "b": (50, 2, 4), "fixed": (50, 2)}
    assert torch.allclose(draws["b"], draws["a"] * draws["w"][:, None, :1])


@pytest.mark.convergence
def test_single_precision_is_enough_for_easy_posteriors():
    torch.set_default_dtype(torch.float32)
    model, mean, covariance, _ = regression(columns=(1.0, 2.0, 0.5))
    result = autofit(model, seed=0, **QUICK)
    assert result.trusted
    draws = result.posterior(4000, seed=0)["beta"]
    assert draws.dtype == torch.float32
    assert ((draws.mean(0) - mean).abs() / covariance.diagonal().sqrt() < 0.1).all()


@pytest.mark.convergence
def test_a_learned_parameter_is_held():
    def model():
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("z", dist.Normal(loc, 1.0))

    pyro.param("loc", torch.tensor(3.0))
    result = autofit(model, seed=0, num_samples=2000)
    assert result.trusted
    assert float(result.guide.flows["block_latent"].affine.loc.detach()) == pytest.approx(3.0, abs=1e-6)


@pytest.mark.parametrize("model", [local_model, global_model], ids=["local", "global"])
def test_minibatches_are_fitted_and_not_judged(model):
    lines = []
    result = autofit(partial(model, 4), seed=0, num_steps=10, progress=lines.append)
    assert isinstance(result.guide, AutoPlatedFlow) and not result.trusted
    assert len(lines) == len(result.report.rungs) == 2
    assert "subsampled" in result.report.reasons[0] and "NOT trusted" in str(result.report)
    with pytest.raises(RuntimeError, match="minibatches"):
        result.posterior()


def test_the_report_reads_as_a_table():
    lines = []
    result = autofit(regression()[0], seed=0, num_samples=1000, progress=lines.append)
    text = str(result.report)
    assert "trusted" in text and "k-hat" in text and "restarts" in text and result.report.reasons == ()
    assert [line.split(":")[0] for line in lines] == [rung.name for rung in result.report.rungs]


# Refusals


def discrete():
    z = pyro.sample("z", dist.Bernoulli(0.5))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


def nothing():
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def unlearned():
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    pyro.sample("z", dist.Normal(0.0, scale))


@poutine.scale(scale=0.5)
def scaled():
    pyro.sample("z", dist.Normal(0.0, 1.0))


def mixing():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("f", -z.square().mean())


def noisy():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.randn(()))


def large():
    pyro.sample("z", dist.Normal(torch.zeros(2001), 1.0).to_event(1))


BAD = {
    "discrete": (discrete, {}, "latent site 'z' is a Bernoulli.*discrete"),
    "no latent": (nothing, {}, "no latent sites"),
    "unlearned parameter": (unlearned, {}, "parameter 'scale'"),
    "scaled": (scaled, {}, "scaled, as by poutine.scale"),
    "mixing": (mixing, {}, "three values at once"),
    "random": (noisy, {}, "draws values of its own"),
    "large": (large, {}, "2001 unconstrained coordinates"),
    "few samples": (schools, {"num_samples": 10}, "num_samples must be an integer of at least 1000, got 10"),
    "bool steps": (schools, {"num_steps": True}, "num_steps must be an integer"),
    "no time": (schools, {"max_seconds": 0.0}, "max_seconds must be positive, got 0.0"),
    "nan time": (schools, {"max_seconds": math.nan}, "max_seconds must be positive, got nan"),
}


@pytest.mark.parametrize("model, options, message", BAD.values(), ids=BAD)
def test_refusals_say_what_and_why(model, options, message):
    before = set(pyro.get_param_store().keys())
    with pytest.raises(ValueError, match=message):
        autofit(model, **options)
    assert set(pyro.get_param_store().keys()) == before


def test_more_draws_than_were_weighed_are_refused():
    result = autofit(local_model, seed=0, num_samples=1000)
    most = len(result.log_weights)
    assert result.trusted and result.posterior(most)["z"].shape == (most, len(data()))
    with pytest.raises(ValueError, match=f"between 1 and {most}"):
        result.posterior(most + 1)
