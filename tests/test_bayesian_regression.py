"""models/bayesian_regression.py measures what it says it does, learns, and one step of it is exact."""

import math
from argparse import Namespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import MultivariateNormal, kl_divergence

from tests.model_files import MODELS, quick_run, refusal

bayesian_regression = MODELS["bayesian_regression"]
FAMILIES = list(bayesian_regression.FAMILIES)


pytestmark = pytest.mark.usefixtures("on_cpu")


def settings(**changed):
    """What ``train`` reads."""
    return Namespace(**({"seed": 0, "num_particles": 16, "lr": 0.01, "steps": 1, "natural_steps": 1} | changed))


def some_gaussian(dim):
    root = torch.randn(dim, dim).double()
    return MultivariateNormal(0.3 * torch.randn(dim).double(), 0.1 * torch.eye(dim).double() + 0.03 * root @ root.T)


def small_regression(family):
    x, test_x = torch.randn(2, 20, 3)
    y, test_y = (torch.randn(2, 20) > 0).double() if family == "logistic" else torch.randn(2, 20).double()
    return bayesian_regression.Regression(family, x.double(), y, test_x.double(), test_y)


@pytest.mark.parametrize("family", FAMILIES)
def test_quick_run(family, tmp_path, capsys):
    torch.set_num_threads(2)
    result = quick_run("bayesian_regression", tmp_path, "--family", family)
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert [row["objective"] for row in result["table"]] == list(bayesian_regression.TITLES.values())
    for row in result["table"]:
        line = next(line for line in printed.splitlines() if line.startswith(row["objective"]))
        assert f"{row['bound']:.3f}" in line
        assert f"{row['test']:.3f} ± {row['test_error']:.3f}" in line
        assert row["seconds"] > 0
    assert set(result["curves"]) == set(bayesian_regression.TITLES)
    assert torch.get_num_threads() == 2
    assert ("after one step" in printed) == (family == "linear")


def test_same_seed_same_numbers(tmp_path):
    options = ("--natural-steps", "3", "--elbo", "natural", "--seed", "5")
    first, second = (quick_run("bayesian_regression", tmp_path, *options)["curves"] for _ in range(2))
    assert first == second


@pytest.mark.convergence
def test_natural_gradients_learn_and_nothing_learns_without_steps(tmp_path):
    runs = [quick_run("bayesian_regression", tmp_path / n, "--natural-steps", n, "--steps", "1") for n in ("1", "20")]
    bounds = [{row["objective"]: row["bound"] for row in run["table"]} for run in runs]
    titles = bayesian_regression.TITLES
    assert [found[titles["natural"]] > -45 for found in bounds] == [False, True]  # nats: -160 before, -41 after
    assert [found[titles["natural-mf"]] > -60 for found in bounds] == [False, True]  # -250 before, -53 after
    assert all(found[titles["adam"]] < -200 for found in bounds)


@pytest.mark.convergence
def test_adam_learns(tmp_path):
    rows = [
        quick_run("bayesian_regression", tmp_path / n, "--steps", n, "--elbo", "adam")["table"][0] for n in ("1", "400")
    ]
    assert [row["bound"] > -60 for row in rows] == [False, True]  # nats: -400 before, -46 after
    assert [row["test"] > -0.2 for row in rows] == [False, True]  # -0.9 before, -0.13 after


@pytest.mark.convergence
def test_one_step_is_exact_in_the_linear_model(tmp_path):
    result = quick_run("bayesian_regression", tmp_path, "--family", "linear", "--natural-steps", "1", "--steps", "1")
    kl = result["kl_after_one_step"]
    assert kl["natural"] < 1e-9
    assert kl["adam"] > 100
    assert [row["kl"] for row in result["table"]] == list(kl.values())


@pytest.mark.convergence
def test_one_newton_step_is_the_best_mean_field_guide_in_the_linear_model():
    regression = bayesian_regression.load("linear", 0, "cpu")
    q = bayesian_regression.train("natural-mf", regression, settings()).q
    p = regression.posterior()
    best = MultivariateNormal(p.loc, scale_tril=p.precision_matrix.diagonal().rsqrt().diag())
    assert kl_divergence(q, best) < 1e-9


def test_posterior_is_the_best_guide_and_its_elbo_the_evidence():
    regression = small_regression("linear")
    covariance = 0.49 * torch.eye(20).double() + regression.x @ regression.x.T
    evidence = MultivariateNormal(torch.zeros(20).double(), covariance).log_prob(regression.y).item()
    p, q = regression.posterior(), some_gaussian(3)
    assert regression.bound(p) == pytest.approx(evidence, abs=1e-9)
    assert regression.bound(q) == pytest.approx(evidence - kl_divergence(q, p).item(), abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_bound_is_the_elbo(family):
    regression, q = small_regression(family), some_gaussian(3)

    def guide():
        pyro.sample("w", dist.MultivariateNormal(q.loc, scale_tril=q.scale_tril))

    loss = Trace_ELBO(10000, vectorize_particles=True, max_plate_nesting=1)
    values = torch.tensor([-loss.loss(regression.model, guide) for _ in range(20)])
    assert abs(values.mean() - regression.bound(q)) < 4 * values.std() / math.sqrt(len(values))


@pytest.mark.parametrize("family", FAMILIES)
def test_log_likelihoods_are_of_the_posterior_predictive(family):
    regression, q = small_regression(family), some_gaussian(3)
    p = regression.likelihood(q.sample((100000,)) @ regression.test_x.T).log_prob(regression.test_y).exp()
    error = p.std(0) / math.sqrt(len(p))
    assert ((p.mean(0) - regression.test(q).exp()).abs() < 4.5 * error).all()


def test_data_are_standardised_by_the_rows_to_train_on():
    for family, rows, dim in (("linear", 442, 11), ("logistic", 569, 31)):
        first, again, other = (bayesian_regression.load(family, seed, "cpu") for seed in (0, 0, 1))
        assert (first.dim, len(first.x) + len(first.test_x), len(first.test_x)) == (dim, rows, rows // 5)
        torch.testing.assert_close(first.x.mean(0), torch.eye(dim).double()[-1])
        torch.testing.assert_close(first.x.std(0), 1 - torch.eye(dim).double()[-1])
        assert torch.equal(first.test_x, again.test_x)
        assert not torch.equal(first.test_x, other.test_x)


BAD = {
    "family": (["--family", "poisson"], "invalid choice: 'poisson'"),
    "objective": (["--elbo", "iwae"], "invalid choice: 'iwae'"),
    "lr": (["--lr", "0"], "--lr: 0: give a number above 0"),
    "steps": (["--steps", "0"], "--steps 0: give a whole number of 1 or more"),
    "natural steps": (["--natural-steps", "-1"], "--natural-steps -1: give a whole number of 1 or more"),
    "particles": (["--num-particles", "0"], "--num-particles 0"),
    "seed": (["--seed", "-1"], "--seed -1: give a whole number of 0 or more"),
    "threads": (["--threads", "0"], "--threads 0"),
    "no GPU": (["--device", "cuda"], "use --device cpu"),
    "output": (["--output", "{}/file"], "choose another path"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_refused_in_one_line(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    arguments, message = BAD[case]
    assert message in refusal("bayesian_regression", tmp_path, capsys, *(a.format(tmp_path) for a in arguments))
