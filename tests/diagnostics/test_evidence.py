"""The importance-weighted bound against its exact values, its errors against repeats."""

import math
import statistics

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_elbo_ext.diagnostics.evidence import cubo, importance_bounds
from pyro_elbo_ext.diagnostics.sampling import posterior_draws
from tests.cases import local_guide, local_model, log_evidence

LOG_Z = -1.828012
GOLDEN = {1: -2.199299, 2: -1.972623, 3: -1.914307, 4: -1.889118}  # by Gauss-Hermite quadrature


def model(num=1):
    with pyro.plate("data", num):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.full((num,), 1.5))


def guide(num=1):
    with pyro.plate("data", num):
        pyro.sample("z", dist.Normal(torch.tensor(0.2), 0.9))


@pytest.mark.parametrize("num", [1, 5])
def test_golden_values(num):
    draws = posterior_draws(model, guide, (num,), num_samples=20_000, chunk_size=5000)
    for point in importance_bounds(draws, tuple(GOLDEN)):
        exact = num * GOLDEN[point.num_particles]
        assert abs(point.value - exact) < 4 * point.se
        gain = exact - num * GOLDEN[1]
        assert abs(point.gain - gain) < 4 * point.gain_se + 1e-5
        assert point.groups == 20_000 // point.num_particles


def test_errors_are_those_of_repeats():
    for particles, groups in ((10, 20), (50, 4)):
        points = []
        for seed in range(60):
            draws = posterior_draws(model, guide, (3,), num_samples=200, chunk_size=200, seed=seed)
            points += importance_bounds(draws, (particles,))
        assert points[0].groups == groups
        spread = statistics.stdev(point.value for point in points)
        assert statistics.mean(point.se for point in points) == pytest.approx(spread, rel=0.3)


def test_bounds_rise_and_scale():
    draws = posterior_draws(local_model, local_guide, (4,), num_samples=1000)
    points = importance_bounds(draws, (100, 1, 10, 10, 5000))
    assert [point.num_particles for point in points] == [1, 10, 100]
    assert [point.value for point in points] == sorted(point.value for point in points)
    assert points[0].gain == 0 and points[0].value == pytest.approx(draws.elbo)
    per_row = dist.Normal(0.0, 2**0.5).log_prob(torch.linspace(-1.5, 2.0, 8))[draws.indices["data"]]
    assert points[-1].value == pytest.approx(2 * float(per_row.sum()), abs=0.5)


def test_chi_estimate():
    draws = posterior_draws(model, guide, num_samples=50_000, chunk_size=10_000)
    grid = torch.linspace(-12.0, 12.0, 20_001)
    joint = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid, 1.0).log_prob(torch.tensor(1.5))
    log_q = dist.Normal(0.2, 0.9).log_prob(grid)
    exact = 0.5 * float(torch.logsumexp(2 * joint - log_q, 0) + math.log(24 / 20_000))
    assert cubo(draws) == pytest.approx(exact, abs=0.03)
    assert cubo(draws) > LOG_Z


def test_evidence_is_reached():
    draws = posterior_draws(local_model, local_guide, num_samples=4000, chunk_size=1000)
    (point,) = importance_bounds(draws, (4000,))
    assert point.groups == 1 and point.value == pytest.approx(draws.importance_weighted)
    assert abs(point.value - log_evidence()) < 4 * point.se


def test_refusals():
    draws = posterior_draws(model, guide, num_samples=30)
    with pytest.raises(ValueError, match="positive integers"):
        importance_bounds(draws, (0, 1))
    with pytest.raises(ValueError, match="order must be above 1"):
        cubo(draws, 1.0)
