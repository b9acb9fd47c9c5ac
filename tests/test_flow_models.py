"""models/flow_vae.py and models/two_modes.py run, learn, and measure what they say they do."""

import math
from argparse import Namespace

import pytest
import torch

from tests.model_files import HELPERS, MODELS, quick_run

flow_vae, two_modes = (MODELS[name] for name in ("flow_vae", "two_modes"))

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.mark.parametrize("gradient", ["pathwise", "dreg"])
def test_flow_vae_quick_run(gradient, tmp_path, capsys):
    result = quick_run("flow_vae", tmp_path, "--steps", "5", "--gradient", gradient)
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert [row["posterior"] for row in result["table"]] == ["Gaussian", "flow", "flow - Gaussian"]
    for row, line in zip(result["table"], printed.splitlines()[1:], strict=True):
        assert line.startswith(row["posterior"])
        assert f"{row['elbo']:.2f} ± {row['elbo_error']:.2f}".lstrip("+") in line
        assert row["gap"] == pytest.approx(row["tight"] - row["elbo"])
    assert result["settings"]["gradient"] == gradient


def settings(**changed):
    """What both ``train`` read."""
    tiny = {"num_particles": 4, "batch_size": 50, "latent": 2, "hidden": 32, "gradient": "pathwise", "temper": 50}
    return Namespace(**({"seed": 0, "steps": 300, "lr": 1e-2, "device": "cpu"} | tiny | changed))


@pytest.mark.convergence
@pytest.mark.slow
def test_flow_vae_learns_more_than_the_frequency_of_each_pixel():
    data = HELPERS["datasets"].load_data(None, 0)
    frequencies = torch.distributions.Bernoulli(data.train.mean(0).clamp(0.01, 0.99))
    trivial = frequencies.log_prob(data.test).sum(-1).mean()
    runs = [settings(steps=steps, num_particles=1, hidden=64) for steps in (1, 900)]
    before, after = (flow_vae.train("flow", data, run).elbo.mean() - trivial for run in runs)
    assert before < 0
    assert after > 1.5  # nats: about 3


def test_flow_vae_differences_are_paired(capsys):
    elbo, gap = torch.randn(2, 50), torch.rand(2, 50)
    runs = [flow_vae.Result(None, elbo[i], elbo[i] + gap[i], 1.0) for i in range(2)]
    row = flow_vae.tabulate(dict(zip(flow_vae.TITLES, runs, strict=True)))[-1]
    assert row["elbo"] == pytest.approx((elbo[1] - elbo[0]).mean().item())
    assert row["gap_error"] == pytest.approx((gap[1] - gap[0]).std().item() / math.sqrt(50))
    assert f"{row['elbo']:+.2f} ± {row['elbo_error']:.2f}" in capsys.readouterr().out


def test_two_modes_quick_run(tmp_path, capsys):
    result = quick_run("two_modes", tmp_path, "--steps", "5")
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert [row["guide"] for row in result["table"]] == list(two_modes.TITLES.values())
    for row, line in zip(result["table"], printed.splitlines()[2:], strict=True):
        assert line.startswith(row["guide"])
        assert f"{row['kl']:.3f} ± {row['kl_error']:.3f}" in line


def test_evidence_of_a_product_is_that_of_prior_draws():
    exact, product = two_modes.integrate(two_modes.Product()), two_modes.Product()
    w = product.likelihood(product.prior().sample((200000,))).log_prob(product.observed).exp()
    assert abs(w.mean() - math.exp(exact.log_evidence)) < 4 * w.std() / math.sqrt(len(w))
    assert exact.share == pytest.approx(0.5, abs=1e-6)


def test_a_tempered_flow_from_a_mixture_finds_both_modes():
    product, name = two_modes.Product(), "mixture"
    exact = two_modes.integrate(product)
    untrained, trained = (two_modes.train(name, product, settings(steps=n, num_particles=8)) for n in (1, 600))
    before, after = (exact.log_evidence - result.log_w.mean() for result in (untrained, trained))
    share = two_modes.positive(trained.z).to(torch.get_default_dtype()).mean()
    assert before > 5
    assert after < 0.69  # nats: log 2, the least that a guide of one branch is off
    assert 0.1 < share < 0.9


@pytest.mark.parametrize("percent", ["-1", "101"])
def test_percents_out_of_range_are_refused(percent, tmp_path):
    with pytest.raises(SystemExit) as exit:
        two_modes.main(["--quick", "--output", str(tmp_path / "out"), "--temper", percent])
    assert exit.value.code == 2
