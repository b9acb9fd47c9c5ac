"""One step of size one through pyro.infer.SVI lands on the posterior of a conjugate model."""

import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoMultivariateNormal, AutoNormal

from pyro_elbo_ext import NaturalGradient, Price_ELBO, Regression_ELBO, ScoreRegression_ELBO

POSITIVE = constraints.positive
SOFTPLUS = constraints.softplus_positive
NUM_STATISTICS_OF_WISHART = 7


def param(name, value, constraint=POSITIVE):
    return pyro.param(name, lambda: torch.as_tensor(value, dtype=torch.get_default_dtype()), constraint=constraint)


def normal():
    """A mean with a normal prior, variance known."""
    data = torch.tensor([1.3, -0.4, 2.2, 0.9])

    def model():
        m = pyro.sample("m", dist.Normal(torch.tensor(0.5), 2.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(m, 0.7), obs=data)

    def guide():
        pyro.sample("m", dist.Normal(param("loc", -3.0, constraints.real), param("scale", 0.4, SOFTPLUS)))

    precision = 1 / 4 + 4 / 0.49
    return model, guide, {"loc": (0.5 / 4 + data.sum() / 0.49) / precision, "scale": torch.tensor(precision**-0.5)}


def gamma_poisson():
    """Fifty rates of thirty counts each."""
    counts = dist.Poisson(torch.linspace(1.0, 6.0, 50)).sample((30,))

    def model():
        with pyro.plate("rates", 50, dim=-1):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
            with pyro.plate("counts", 30, dim=-2):
                pyro.sample("x", dist.Poisson(rate), obs=counts)

    def guide():
        a, b = param("a", torch.ones(50)), param("b", torch.ones(50), SOFTPLUS)
        with pyro.plate("rates", 50, dim=-1):
            pyro.sample("rate", dist.Gamma(a, b))

    return model, guide, {"a": 2 + counts.sum(0), "b": torch.full((50,), 31.0)}


def beta_bernoulli():
    flips = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0])

    def model():
        p = pyro.sample("p", dist.Beta(torch.tensor(1.5), 2.0))
        with pyro.plate("flips", 6):
            pyro.sample("x", dist.Bernoulli(p), obs=flips)

    def guide():
        pyro.sample("p", dist.Beta(param("a", 1.0), param("b", 1.0, constraints.interval(0.01, 50.0))))

    return model, guide, {"a": torch.tensor(3.5), "b": torch.tensor(6.0)}


def dirichlet_multinomial():
    counts = torch.tensor([3.0, 5, 0, 7, 1, 2, 9, 4, 2, 6])

    def model():
        p = pyro.sample("p", dist.Dirichlet(torch.full((10,), 0.7)))
        pyro.sample("x", dist.Multinomial(total_count=39, probs=p), obs=counts)

    def guide():
        pyro.sample("p", dist.Dirichlet(param("a", torch.ones(10))))

    return model, guide, {"a": counts + 0.7}


def exponential():
    """A rate with an exponential prior whose likelihood leaves it exponential."""

    def model():
        x = pyro.sample("x", dist.Exponential(torch.tensor(1.5)))
        pyro.factor("seen", -2.0 * x)

    def guide():
        pyro.sample("x", dist.Exponential(param("rate", 0.6)))

    return model, guide, {"rate": torch.tensor(3.5)}


def bernoulli():
    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([0.2, 1.4, -0.3]))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Bernoulli(param("p", torch.full((3,), 0.5), constraints.unit_interval)))

    odds = torch.tensor(0.3).logit() + torch.tensor([0.2, 1.4, -0.3]) - 0.5
    return model, guide, {"p": odds.sigmoid()}


def categorical():
    def model():
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        pyro.sample("x", dist.Normal(z.to(torch.get_default_dtype()), 1.0), obs=torch.tensor(1.4))

    def guide():
        pyro.sample("z", dist.Categorical(param("p", [0.4, 0.3, 0.3], constraints.simplex)))

    log_p = torch.tensor([0.2, 0.5, 0.3]).log() - (torch.tensor([0.0, 1.0, 2.0]) - 1.4).square() / 2
    return model, guide, {"p": log_p.softmax(-1)}


def wishart(argument):
    """A precision matrix, the mean known: the Wishart factor of a Normal-Wishart posterior."""
    data = torch.randn(40, 3) @ torch.tensor([[1.0, 0.3, 0.0], [0.0, 0.8, -0.5], [0.0, 0.0, 1.2]])
    inverse = torch.eye(3) + data.T @ data

    def model():
        precision = pyro.sample("precision", dist.Wishart(torch.tensor(4.0), torch.eye(3)))
        with pyro.plate("data", 40):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), precision_matrix=precision), obs=data)

    def guide():
        constraint = constraints.lower_cholesky if argument == "scale_tril" else constraints.positive_definite
        matrix = param("matrix", torch.eye(3), constraint)
        pyro.sample("precision", dist.Wishart(param("df", 6.0, constraints.greater_than(2.0)), **{argument: matrix}))

    scale = {"scale_tril": torch.linalg.cholesky(inverse.inverse()), "covariance_matrix": inverse.inverse()}
    truth = {"df": torch.tensor(44.0), "matrix": scale.get(argument, inverse)}
    return model, guide, truth


def normal_mean(argument):
    """The normal factor of the same posterior: a mean vector, the precision known."""
    data = torch.randn(20, 3) + torch.tensor([1.0, -2.0, 0.5])
    noise = torch.tensor([[1.0, 0.4, 0.0], [0.4, 2.0, -0.3], [0.0, -0.3, 0.7]])
    precision = torch.eye(3) / 4 + 20 * noise.inverse()

    def model():
        mean = pyro.sample("mean", dist.MultivariateNormal(torch.zeros(3), 4 * torch.eye(3)))
        with pyro.plate("data", 20):
            pyro.sample("x", dist.MultivariateNormal(mean, noise), obs=data)

    def guide():
        constraint = constraints.lower_cholesky if argument == "scale_tril" else constraints.positive_definite
        matrix = param("matrix", torch.eye(3), constraint)
        pyro.sample(
            "mean", dist.MultivariateNormal(param("loc", torch.zeros(3), constraints.real), **{argument: matrix})
        )

    covariance = precision.inverse()
    matrix = {"scale_tril": torch.linalg.cholesky(covariance), "covariance_matrix": covariance}
    loc = covariance @ noise.inverse() @ data.sum(0)
    return model, guide, {"loc": loc, "matrix": matrix.get(argument, precision)}


CASES = {
    "normal by scores": (normal, partial(ScoreRegression_ELBO, 4)),
    "normal by values": (normal, partial(Regression_ELBO, 5)),
    "normal by second derivatives": (normal, partial(Price_ELBO, 1)),
    "gamma-Poisson": (gamma_poisson, partial(Regression_ELBO, 6)),
    "gamma-Poisson, looped": (gamma_poisson, partial(Regression_ELBO, 6, vectorize_particles=False)),
    "gamma-Poisson, in chunks": (gamma_poisson, partial(Regression_ELBO, 6, chunk_size=2)),
    "beta-Bernoulli": (beta_bernoulli, partial(Regression_ELBO, 6)),
    "Dirichlet-multinomial": (dirichlet_multinomial, partial(Regression_ELBO, 20)),
    "exponential": (exponential, partial(Regression_ELBO, 4)),
    "Bernoulli": (bernoulli, partial(Regression_ELBO, 100)),
    "categorical": (categorical, partial(Regression_ELBO, 100)),
    **{
        f"Wishart by {name}": (lambda name=name: wishart(name), partial(Regression_ELBO, 2 * NUM_STATISTICS_OF_WISHART))
        for name in ("scale_tril", "covariance_matrix", "precision_matrix")
    },
    **{
        f"normal vector by {name}": (lambda name=name: normal_mean(name), loss)
        for name, loss in {
            "scale_tril": partial(ScoreRegression_ELBO, 4),
            "covariance_matrix": partial(Price_ELBO, 1),
            "precision_matrix": partial(Regression_ELBO, 20),
        }.items()
    },
}


@pytest.mark.convergence
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_one_step(case, dtype):
    torch.set_default_dtype(dtype)
    make, loss = CASES[case]
    model, guide, truth = make()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Singular sample detected")  # torch warns of every Wishart sample
        SVI(model, guide, NaturalGradient(), loss()).step()
    for name, value in truth.items():
        found = pyro.param(name).detach()
        assert found.dtype == dtype
        error = (found - value).abs().max() / value.abs().max()
        assert error < (1e-8 if dtype == torch.float64 else 1e-3), (name, found, value)


def regression(size, orthogonal=False, correlation=0.0):
    """Linear regression with unit noise; returns the model and its posterior's mean and precision."""
    x = torch.randn(3 * size, size)
    if orthogonal:
        x = torch.linalg.qr(x)[0] * 3
    x = x + correlation / (1 - correlation) ** 0.5 * torch.randn(3 * size, 1) if correlation else x
    y = x @ torch.linspace(-1, 1, size) + torch.randn(3 * size)

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(size), 1.0).to_event(1))
        with pyro.plate("data", 3 * size):
            pyro.sample("y", dist.Normal((w @ x.T).squeeze(-2) if w.dim() > 1 else x @ w, 1.0), obs=y)

    precision = torch.eye(size) + x.T @ x
    return model, torch.linalg.solve(precision, x.T @ y), precision


FULL = {
    "scores, one more than coordinates": lambda: ScoreRegression_ELBO(21),
    "scores, jointly": lambda: ScoreRegression_ELBO(40),
    "scores, in chunks": lambda: ScoreRegression_ELBO(40, chunk_size=8),
    "scores, looped": lambda: ScoreRegression_ELBO(21, vectorize_particles=False),
    "second derivatives": lambda: Price_ELBO(1),
    "second derivatives, in chunks": lambda: Price_ELBO(4, chunk_size=2),
}


@pytest.mark.convergence
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("loss", FULL)
def test_linear_regression_full_rank(loss, dtype):
    torch.set_default_dtype(dtype)
    model, mean, precision = regression(20)
    guide = AutoMultivariateNormal(model)
    SVI(model, guide, NaturalGradient(), FULL[loss]()).step()
    found = guide.get_posterior()
    posterior = dist.MultivariateNormal(mean.double(), precision_matrix=precision.double())
    own = dist.MultivariateNormal(found.loc.double(), scale_tril=found.scale_tril.double())
    assert torch.distributions.kl_divergence(own, posterior) < (1e-8 if dtype == torch.float64 else 1e-3)


MEAN_FIELD = {
    "scores": lambda: ScoreRegression_ELBO(40),
    "second derivatives": lambda: Price_ELBO(1),
    "values": lambda: Regression_ELBO(80),
    "newton": lambda: ScoreRegression_ELBO(40, direction="newton"),
}


@pytest.mark.convergence
@pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal])
@pytest.mark.parametrize("loss", MEAN_FIELD)
def test_linear_regression_mean_field_on_an_orthogonal_design(loss, auto):
    model, mean, precision = regression(20, orthogonal=True)
    guide = auto(model, init_scale=0.5)
    SVI(model, guide, NaturalGradient(), MEAN_FIELD[loss]()).step()
    loc, scale = (guide.locs.w, guide.scales.w) if auto is AutoNormal else (guide.loc, guide.scale)
    torch.testing.assert_close(loc.detach(), mean, atol=1e-8, rtol=0)
    torch.testing.assert_close(scale.detach(), precision.diagonal().rsqrt(), atol=1e-8, rtol=0)


def mean_field_path(steps, loss, **settings):
    pyro.set_rng_seed(0)
    model, mean, precision = regression(5, correlation=0.6)
    guide = AutoNormal(model)
    optim = NaturalGradient(schedule="constant", **settings)
    svi = SVI(model, guide, optim, loss)
    errors = []
    for _ in range(steps):
        svi.step()
        errors.append(float((guide.locs.w.detach() - mean).abs().max()))
    return errors, optim.report()


def test_full_steps_of_a_mean_field_guide_diverge_on_a_correlated_design():
    errors, _ = mean_field_path(25, Price_ELBO(1), retreat=0)
    assert errors[-1] > 10 * errors[2]


@pytest.mark.convergence
@pytest.mark.parametrize("settings", [{"max_kl": 0.5, "retreat": 0}, {}], ids=["radius", "retreat"])
def test_radius_and_retreat_hold_them(settings):
    errors, report = mean_field_path(80, Price_ELBO(1), **settings)
    assert max(errors) < 3 * errors[0] + 3
    assert max(errors[-10:]) < 0.1
    if not settings:
        assert min(errors[-10:]) < 1e-2
        assert report.blocks["w_unconstrained"].retreats > 2


@pytest.mark.convergence
def test_newton_needs_neither():
    errors, _ = mean_field_path(2, ScoreRegression_ELBO(20, direction="newton"), retreat=0)
    assert errors[-1] < 1e-8


def test_monte_carlo_gradients_are_not_exact():
    """What makes one step exact is the estimator: with the plain gradient the same step misses."""
    model, guide, truth = normal()
    loss = Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1)
    SVI(model, guide, NaturalGradient(), loss).step()
    assert (pyro.param("loc") - truth["loc"]).abs() > 1e-2
