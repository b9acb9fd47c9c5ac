"""k-hat, smoothed weights and effective sample size, against ArviZ, Pyro and closed forms."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.importance import psis_diagnostic

from pyro_elbo_ext.diagnostics.weights import effective_sample_size, good_k, pareto_k, psis

pytestmark = pytest.mark.skipif("config.getoption('--dtype') != 'float64'", reason="compares digits")


def pareto(*shapes, num=1000):
    """Log-weights whose tail index is known: k = 1 / alpha."""
    return torch.distributions.Pareto(torch.tensor(1.0), 1 / torch.tensor(shapes)).sample((num,)).log()


def test_smoothed_weights_are_those_of_arviz():
    az = pytest.importorskip("arviz")
    log_w = torch.cat([pareto(0.2, 0.5, 0.9, 1.5), torch.randn(1000, 1), 30 * torch.randn(1000, 1)], 1)
    smoothed, k = psis(log_w)
    for column in range(log_w.shape[1]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected, expected_k = az.psislw(log_w[:, column].cpu().numpy())
        assert float(k[column]) == pytest.approx(float(expected_k), abs=1e-6)
        torch.testing.assert_close(smoothed[:, column].cpu(), torch.as_tensor(expected), rtol=0, atol=1e-8)


def test_tail_index_is_found():
    k = pareto_k(pareto(0.2, 0.7, 1.2, num=20_000))
    assert k.tolist() == pytest.approx([0.2, 0.7, 1.2], abs=0.15)


@pytest.mark.parametrize("num_data", [1, 10, 100, 1000])
def test_joint_k_hat_is_that_of_pyro(num_data):
    def model():
        with pyro.plate("data", num_data):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(num_data))

    def guide():
        with pyro.plate("data", num_data):
            pyro.sample("z", dist.Normal(torch.tensor(0.0), 0.75))

    pyro.set_rng_seed(1)
    expected = psis_diagnostic(model, guide, num_particles=1000, max_plate_nesting=1)
    pyro.set_rng_seed(1)
    log_w, _, _ = pyro.infer.importance.vectorized_importance_weights(
        model, guide, num_samples=1000, max_plate_nesting=1
    )
    assert float(pareto_k(log_w)) == pytest.approx(expected, abs=5e-4)


def test_elements_are_apart():
    log_w = pareto(0.3, 0.6, 0.9, 1.2).reshape(1000, 2, 2)
    smoothed, k = psis(log_w)
    one, one_k = psis(log_w[:, 1, 0])
    assert k.shape == (2, 2) and float(k[1, 0]) == float(one_k)
    assert torch.equal(smoothed[:, 1, 0], one)
    assert smoothed.logsumexp(0).abs().max() < 1e-12


def test_constants_do_not_matter():
    log_w = pareto(0.6)
    assert float(pareto_k(log_w + 1e5)) == pytest.approx(float(pareto_k(log_w)), abs=1e-6)
    assert float(effective_sample_size(log_w - 1e5)) == pytest.approx(float(effective_sample_size(log_w)))


def test_equal_weights_have_no_tail():
    assert pareto_k(torch.full((100,), -7.0)) == -math.inf
    assert psis(torch.full((100,), -7.0))[0].allclose(torch.tensor(0.01).log())
    assert float(effective_sample_size(torch.full((100, 1), -7.0))) == pytest.approx(100)
    assert pareto_k(-7.0 + 1e-12 * torch.randn(100)) == -math.inf  # rounding is no tail
    assert pareto_k(1e-3 * torch.randn(1000)) < 0.5  # small spread is one, of a bounded kind


def test_zero_weights_count():
    log_w = torch.where(torch.arange(100) < 40, 0.0, -math.inf)
    assert pareto_k(log_w) == -math.inf  # a bounded weight that many draws have
    assert float(effective_sample_size(log_w)) == pytest.approx(40)
    log_w = torch.where(torch.arange(100) < 3, torch.arange(100.0), -math.inf)
    assert pareto_k(log_w) == math.inf  # all is carried by three
    assert (psis(log_w)[0][3:] == -math.inf).all()
    log_w = torch.where(torch.arange(1000) < 3, 1.0, 0.0)
    assert pareto_k(log_w) == -math.inf  # three that are a little heavier


def test_smoothing_lowers_the_largest_weight():
    log_w = -torch.linspace(1.0, 1000.0, 1000)[torch.randperm(1000)].div(1000.5).log()  # the quantiles of pareto(1.0)
    log_w[log_w.argmax()] += 2.0
    smoothed, _ = psis(log_w)
    assert smoothed.max() < log_w.log_softmax(0).max()
    assert torch.equal(smoothed.argsort(0)[-50:], log_w.argsort(0)[-50:])


def test_good_k():
    assert good_k(100) == pytest.approx(0.5)
    assert good_k(10**6) == 0.7


BAD = {
    "few draws": (lambda: pareto_k(torch.zeros(24)), r"at least 25 draws.*\(24,\)"),
    "no draws": (lambda: pareto_k(torch.zeros(())), r"at least 25 draws"),
    "nan": (lambda: pareto_k(torch.tensor([0.0] * 30 + [math.nan])), r"log-weight \(30,\) is nan, and 1 of 31"),
    "inf": (lambda: effective_sample_size(torch.tensor([0.0, math.inf])), r"log-weight \(1,\) is inf"),
    "all zero": (
        lambda: pareto_k(torch.stack([torch.zeros(30), torch.full((30,), -math.inf)], 1)),
        r"all log-weights of element \(1,\) are -inf",
    ),
    "one draw": (lambda: good_k(1), "num_samples >= 2, got 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
