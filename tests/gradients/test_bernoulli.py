"""Gradients for Bernoulli sites: golden spreads, exact means, less spread than leave-one-out, refusals."""

import math
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_elbo_ext import ScoreFunction_ELBO
from pyro_elbo_ext.bounds import ELBO
from pyro_elbo_ext.gradients import REBAR, RELAX, DoubleControlVariates
from pyro_elbo_ext.gradients.antithetic import _antithetic
from pyro_elbo_ext.testing import (
    BELIEF_STATES,
    Problem,
    belief_network,
    enumerated_gradient,
    many_bits,
    rebar_toy,
    sample_gradients,
    z_score,
)


@pytest.mark.parametrize("theta, exact, spread", [(0.0, 5.0e-4, 0.0), (2.0, 2.0999e-4, 3.75e-4)])
def test_disarm_on_the_rebar_toy(theta, exact, spread):
    """C6: no spread at theta = 0, and below leave-one-out's 4.07e-4 at theta = 2."""
    _, grads = sample_gradients(ScoreFunction_ELBO(2, gradient="disarm"), rebar_toy(100_000, theta), calls=2)
    assert float(grads["theta"].mean()) == pytest.approx(exact, abs=1e-12 if spread == 0 else 4e-6)
    assert float(grads["theta"].std()) == pytest.approx(spread, rel=0.02, abs=1e-12)


def test_the_antithetic_pair_has_both_margins_and_the_right_joint():
    """b = [u < p] and b' = [1 - u < p]: both are 1 with probability max(2 p - 1, 0)."""
    p = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0])
    b = torch.bernoulli(p.expand(200_000, 5))
    second = _antithetic(b, p)
    for found, expected in ((second.mean(0), p), ((b * second).mean(0), (2 * p - 1).clamp(min=0))):
        assert ((found - expected).abs() < 4 * (expected * (1 - expected) / 200_000).sqrt() + 1e-9).all()


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
@pytest.mark.parametrize("gradient, k", [("disarm", 2), ("disarm", 4), ("double-cv", 2), ("double-cv", 3)])
def test_a_hierarchy_of_bits(gradient, k, vectorize):
    value, exact = enumerated_gradient(belief_network, BELIEF_STATES, ELBO(), 1)
    elbo = ScoreFunction_ELBO(k, gradient=gradient, vectorize_particles=vectorize)
    values, grads = sample_gradients(elbo, belief_network(6_000), calls=20, seed=3)
    assert z_score(values, value) < 4
    for name, expected in exact.items():
        assert z_score(grads[name], expected) < 4, name


def flat_bits(replicates):
    """Three bits without parents, an event of two and one of none, a continuous site above one and one below."""
    start = {"l": 0.4, "v": -0.3, "w": 0.6, "m": 0.2}

    def model():
        with pyro.plate("replicates", replicates, dim=-1):
            a = pyro.sample("a", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
            c = pyro.sample("c", dist.Normal(torch.zeros(replicates, dtype=torch.float64), 1.0))
            b = pyro.sample("b", dist.Bernoulli(logits=0.5 * c))
            e = pyro.sample("e", dist.Normal(a.sum(-1), 1.0))
            x = torch.full((replicates,), 0.7, dtype=torch.float64)
            pyro.sample("x", dist.Normal(a[..., 0] - a[..., 1] * b + 0.5 * e + c, 0.9), obs=x)

    def guide():
        p = {name: pyro.param(name) for name in start}
        with pyro.plate("replicates", replicates, dim=-1):
            c = pyro.sample("c", dist.Normal(p["m"], 0.7))
            pyro.sample("b", dist.Bernoulli(logits=p["w"] * c + 0.2))
            a = pyro.sample("a", dist.Bernoulli(logits=torch.stack([p["l"], p["l"] + p["v"]], -1)).to_event(1))
            pyro.sample("e", dist.Normal(a.sum(-1) + p["v"], 0.8))

    return Problem(model, guide, {n: torch.full((replicates,), v, dtype=torch.float64) for n, v in start.items()})


@pytest.fixture(scope="module")
def flat_reference():
    """The gradient by leave-one-out, which is held to exact answers elsewhere: 10^6 draws of eight particles."""
    torch.set_default_dtype(torch.float64)
    return sample_gradients(ScoreFunction_ELBO(8), flat_bits(50_000), calls=20, seed=99)[1]


@pytest.mark.parametrize("gradient", ["disarm", "double-cv", "rebar", "relax"])
def test_bits_beside_continuous_sites(gradient, flat_reference):
    elbo = ScoreFunction_ELBO(2, gradient=gradient)
    _, grads = sample_gradients(elbo, flat_bits(20_000), calls=10, seed=4)
    for name, reference in flat_reference.items():
        error = math.sqrt(float(grads[name].var() / grads[name].numel() + reference.var() / reference.numel()))
        assert abs(float(grads[name].mean() - reference.mean())) < 4 * error, name


@pytest.mark.parametrize("gradient", ["disarm", "double-cv", "rebar", "relax"])
def test_minibatches(gradient):
    """Exact on the toy's independent bits, from minibatches; N/B stands on the control variates too."""
    problem, _ = many_bits(400)
    x = torch.linspace(-1.0, 3.0, 12, dtype=torch.float64)
    slope, offset = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, -0.4))
    q = torch.sigmoid(slope * x + offset)
    ends = torch.stack([dist.Normal(mean, 1.0).log_prob(x) for mean in (0.0, 2.0)])
    value = ((1 - q) * (ends[0] - (2 * (1 - q)).log()) + q * (ends[1] - (2 * q).log())).sum()
    exact = torch.autograd.grad(value, [slope, offset])
    _, grads = sample_gradients(ScoreFunction_ELBO(2, gradient=gradient), problem, 3, calls=150)
    for name, expected in zip(("slope", "offset"), exact, strict=True):
        per_call = grads[name].reshape(150, -1).mean(1)
        assert z_score(per_call, float(expected)) < 4, name


class BinaryVAE:
    """Twenty bits, a nonlinear decoder, thirty pixels; each row of data is one replicate of the gradient."""

    def __init__(self, replicates):
        torch.manual_seed(5)
        self.decoder = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.Tanh(), torch.nn.Linear(40, 30))
        for layer in (self.decoder[0], self.decoder[2]):
            torch.nn.init.normal_(layer.weight, std=0.5)
        self.x = torch.bernoulli(torch.full((30,), 0.5)).expand(replicates, 30)
        self.logits = torch.randn(20)

    def model(self):
        with pyro.plate("replicates", len(self.x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((20,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=self.x)

    def guide(self):
        with pyro.plate("replicates", len(self.x)):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits")).to_event(1))

    def spread(self, elbo, steps=6):
        """Root of the summed variances of the gradient in the logits, once an estimator has seen a few steps."""
        problem = Problem(self.model, self.guide, {"logits": self.logits.expand(len(self.x), 20).clone()})
        _, grads = sample_gradients(elbo, problem, calls=steps)
        return float(grads["logits"][-len(self.x) :].var(0).sum().sqrt())


@pytest.mark.parametrize("k", [2, 4])
def test_double_control_variates_on_a_binary_vae(k):
    """Less spread than leave-one-out with as many particles."""
    vae = BinaryVAE(2000)
    plain = vae.spread(ScoreFunction_ELBO(k))
    assert vae.spread(ScoreFunction_ELBO(k, gradient="double-cv")) < 0.9 * plain


def test_relaxed_noise_agrees_with_the_bit():
    """z > 0 where b = 1, free or given b; over b it is logistic around the logit, and moves with it as it should."""
    logits = torch.tensor([-1.5, 0.0, 2.0])
    bits = SimpleNamespace(value=torch.bernoulli(logits.sigmoid().expand(100_000, 3)))
    for conditional in (False, True):
        alpha = logits.expand(100_000, 3).clone().requires_grad_()
        torch.manual_seed(1)
        z = REBAR()._noise({"z": bits}, {"z": alpha}, conditional)["z"]
        assert ((z > 0) == (bits.value == 1)).all()
        variance = (z.detach() - logits).var(0)
        assert ((z.detach().mean(0) - logits).abs() < 4 * (variance / 100_000).sqrt()).all()
        assert float((variance / (math.pi**2 / 3) - 1).abs().max()) < 0.05
        (slope,) = torch.autograd.grad(z.sum(), alpha)
        torch.manual_seed(1)
        moved = REBAR()._noise({"z": bits}, {"z": (alpha + 1e-6).detach()}, conditional)["z"]
        expected = (moved - z.detach()) / 1e-6 if conditional else torch.ones_like(slope)
        torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.convergence
@pytest.mark.parametrize("kind", [REBAR, RELAX])
def test_the_control_variate_is_trained_on_the_spread(kind):
    """By SVI's own optimiser; the guide's and the model's parameters stand still meanwhile."""
    torch.manual_seed(2)
    vae = BinaryVAE(100)
    for parameter in vae.decoder.parameters():
        parameter.requires_grad_(False)
    gradient = kind(temperature=0.1)
    elbo = ScoreFunction_ELBO(1, gradient=gradient)
    pyro.param("logits", vae.logits.expand(100, 20).clone())
    rate = lambda name: {"lr": 0.0 if name == "logits" else 0.02}  # noqa: E731
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam(rate), elbo)
    svi.step()
    before = vae.spread(elbo)
    temperature = float(gradient.log_temperature["z"].detach())
    for _ in range(300):
        svi.step()
    after = vae.spread(elbo)
    assert after < 0.8 * before, (before, after)
    assert float(gradient.log_temperature["z"].detach()) != temperature
    assert after < 0.8 * vae.spread(ScoreFunction_ELBO(1, "none"))


def test_training_the_control_variate_leaves_other_gradients_alone():
    """What trains it adds nothing to the gradient of model or guide: the mean is unchanged, the loss is the ELBO."""
    found = []
    for factor in (0.0, 1.0):
        elbo = ScoreFunction_ELBO(1, gradient="rebar")
        problem = flat_bits(30_000)
        original = elbo.gradient._training
        elbo.gradient._training = lambda spread, f=factor, o=original: f * o(spread)
        _, grads = sample_gradients(elbo, problem, seed=8)
        found.append(grads)
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name])


def test_state_of_the_fit_is_saved_and_restored():
    elbo, fresh = ScoreFunction_ELBO(2, gradient="double-cv"), ScoreFunction_ELBO(2, gradient="double-cv")
    problem = flat_bits(50)
    sample_gradients(elbo, problem, calls=3)
    fresh.gradient.load_state_dict(elbo.gradient.state_dict())
    one, two = (sample_gradients(e, problem, seed=7)[1] for e in (elbo, fresh))
    for name in one:
        torch.testing.assert_close(one[name], two[name])


# --- refusals --------------------------------------------------------------------------------------------------------


def pair(fn, use=lambda z: 1.0 * z, infer=None):
    def model():
        z = pyro.sample("z", fn(torch.tensor(0.4)))
        pyro.sample("x", dist.Normal(use(z), 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", fn(torch.sigmoid(pyro.param("l", torch.tensor(0.1)))), infer=infer or {})

    return model, guide


def categorical(p):
    return dist.Categorical(torch.stack([p / 2, p / 2, 1 - p]))


def chain():
    def model():
        a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.4)))
        pyro.sample("b", dist.Bernoulli(0.3 + 0.2 * a))

    def guide():
        a = pyro.sample("a", dist.Bernoulli(torch.sigmoid(pyro.param("l", torch.tensor(0.1)))))
        pyro.sample("b", dist.Bernoulli(0.4 + 0.2 * a))

    return model, guide


def looked_up(z):
    return torch.tensor([0.3, 1.2])[z.long()]


BITS = pair(dist.Bernoulli)
REFUSED = {
    "a category under disarm": (2, "disarm", pair(categorical), "'z' is a Categorical.*binary sites only.*\"score\""),
    "a category under double-cv": (2, "double-cv", pair(categorical), "'z' is a Categorical"),
    "a category under rebar": (2, "rebar", pair(categorical), "'z' is a Categorical"),
    "a count under relax": (2, "relax", pair(dist.Poisson), "'z' is a Poisson"),
    "an odd number": (3, "disarm", BITS, "'z' is drawn in antithetic pairs.*even num_particles, got 3"),
    "one particle under disarm": (1, "disarm", BITS, "even num_particles, got 1"),
    "one particle under double-cv": (1, "double-cv", BITS, "'z'.*num_particles >= 2, got 1"),
    "an index under rebar": (
        2, "rebar", pair(dist.Bernoulli, looked_up), "'z' is used by model site 'x'.*no derivative",
    ),
    "a comparison under relax": (
        2, "relax", pair(dist.Bernoulli, lambda z: torch.where(z > 0.5, 1.0, 0.0)), "'z' is used by model site 'x'",
    ),
    "an index under double-cv": (
        2, "double-cv", pair(dist.Bernoulli, looked_up), "'z' is used by model site 'x'",
    ),
    "a chain under rebar": (2, "rebar", chain(), "'b' descends from the sampled site 'a'.*\"double-cv\""),
    "an enumerated site": (
        2, "disarm", pair(dist.Bernoulli, infer={"enumerate": "parallel"}), "'z' is enumerated.*\"score\"",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_pair_is_refused(case):
    k, gradient, (model, guide), message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        ScoreFunction_ELBO(k, gradient=gradient).loss_and_grads(model, guide)
    assert all(p.grad is None for _, p in pyro.get_param_store().named_parameters())


def test_arguments_are_refused():
    with pytest.raises(ValueError, match="temperature must be positive"):
        REBAR(temperature=0.0)
    with pytest.raises(ValueError, match="decay must lie in"):
        DoubleControlVariates(decay=1.0)
