"""models/state_space.py knows its evidence, draws and weighs paths right, and trains guides of one weight a series."""

import math
from argparse import Namespace

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_elbo_ext.diagnostics import posterior_draws
from tests.model_files import MODELS, refusal

state_space = MODELS["state_space"]

pytestmark = pytest.mark.usefixtures("on_cpu")


def pair(kind="linear", batch_size=10):
    return state_space.StateSpace(kind, 8, batch_size)


def settings(**changed):
    """What ``train`` reads."""
    tiny = {"kind": "linear", "hidden": 16, "batch_size": 40, "device": "cpu", "num_particles": 4, "draws": 200}
    return Namespace(**({"seed": 0, "steps": 1, "lr": 2e-2} | tiny | changed))


def dense(path):
    """A chain as a multivariate normal, by x = (I - gain below the diagonal)^-1 (shift + scale noise)."""
    inverse = (torch.eye(len(path.shift)) - torch.diag(path.gain[1:], -1)).inverse()
    return MultivariateNormal(inverse @ path.shift, scale_tril=inverse * path.scale)


def test_path_is_a_dense_gaussian():
    path = state_space.Path(torch.randn(4), torch.randn(4), torch.rand(4) + 0.2)
    value, expected = torch.randn(7, 4), dense(path)
    torch.testing.assert_close(path.log_prob(value), expected.log_prob(value))
    x = path.sample((40_000,))
    white = torch.linalg.solve_triangular(expected.scale_tril, (x - expected.loc).T, upper=False)
    assert (white.mean(1).abs() < 4 / math.sqrt(len(x))).all()
    moments = white @ white.T / len(x) - torch.eye(4)
    assert (moments.abs() < 4 * math.sqrt(2 / len(x))).all()


def test_path_has_batches_and_a_gradient():
    gain = torch.randn(3, 4, requires_grad=True)
    path = state_space.Path(gain, torch.zeros(4), torch.ones(4))
    assert (path.batch_shape, path.event_shape) == ((3,), (4,))
    wide = path.expand((2, 3))
    x = wide.rsample((5,))
    assert x.shape == (5, 2, 3, 4)
    assert wide.log_prob(x).shape == (5, 2, 3)
    x.sum().backward()
    assert (gain.grad[:, 0] == 0).all()  # there is nothing before the first point
    assert (gain.grad[:, 1:] != 0).all()


@pytest.mark.parametrize("kind", state_space.KINDS)
def test_prior_is_stationary(kind):
    mean, gain, scale = state_space.KINDS[kind]
    prior = dense(pair(kind).prior(6))
    torch.testing.assert_close(prior.loc, torch.full((6,), mean))
    distance = (torch.arange(6)[:, None] - torch.arange(6)).abs()
    torch.testing.assert_close(prior.covariance_matrix, scale**2 / (1 - gain**2) * gain**distance)


def test_kalman_filter_has_the_evidence_of_one_gaussian():
    linear, y = pair(), torch.randn(5, 7)
    prior = dense(linear.prior(7))
    joint = MultivariateNormal(prior.loc, prior.covariance_matrix + state_space.NOISE**2 * torch.eye(7))
    torch.testing.assert_close(state_space.kalman(linear, y), joint.log_prob(y))


def test_particle_filter_has_the_evidence_of_the_kalman_filter():
    linear, y = pair(), torch.randn(4, 12)
    ratios = [(state_space.particle_filter(linear, y, 100) - state_space.kalman(linear, y)).exp() for _ in range(100)]
    w = torch.stack(ratios)
    assert ((w.mean(0) - 1).abs() < 4 * w.std(0) / 10).all()


def test_particle_filter_has_the_evidence_of_prior_paths():
    volatility, y = pair("volatility"), torch.randn(3, 4)
    x = volatility.prior(4).sample((200_000, 1))
    w = (volatility.likelihood(x).log_prob(y).sum(-1) - state_space.particle_filter(volatility, y, 200_000)).exp()
    error = math.sqrt(2) * w.std(0) / math.sqrt(len(w))  # of both
    assert ((w.mean(0) - 1).abs() < 4 * error).all()


@pytest.mark.parametrize("kind", state_space.KINDS)
def test_weights_average_to_the_evidence_of_each_series(kind):
    model, y = pair(kind), torch.randn(6, 3)
    with torch.no_grad():
        model.head.bias[2] = 0.5  # a guide that is wide enough for weights with a variance
    draws = posterior_draws(model.model, model.guide, (y,), num_samples=40_000, chunk_size=10_000)
    assert draws.log_weight.shape == (40_000, 6)
    exact = state_space.kalman(model, y) if kind == "linear" else state_space.particle_filter(model, y, 200_000)
    w = (draws.log_weight - exact).exp()
    assert ((w.mean(0) - 1).abs() < 4 * w.std(0) / math.sqrt(len(w)) + 0.01).all()


@pytest.mark.parametrize("name", ["dreg", "flow"])
def test_minibatches_have_the_bound_of_all_series(name):
    model, y = pair(batch_size=2), torch.randn(6, 3)
    guide, loss = state_space.make_objective(name, model, 4)
    whole, parts = (
        torch.tensor([loss.loss(model.model, guide, y, part) for _ in range(150)]) for part in (False, True)
    )
    error = math.hypot(whole.std(), parts.std()) / math.sqrt(150)
    assert abs(whole.mean() - parts.mean()) < 4 * error
    assert parts.std() > 1.2 * whole.std()  # minibatches they are


def test_guide_reads_backwards():
    y = torch.randn(1, 6)
    other = y.clone()
    other[0, 2] += 1
    first, second = (pair_.posterior(series) for pair_ in [pair()] for series in (y, other))
    changed = (first.shift != second.shift)[0]
    assert changed.tolist() == [True] * 3 + [False] * 3


@pytest.mark.convergence
@pytest.mark.parametrize(("name", "near"), [("stl", 0.4), ("flow", 2.0)])
def test_trained_guides_come_near_on_series_they_have_not_seen(name, near):
    y, test = state_space.simulate(pair(), 220, 6, 1).split([200, 20])
    evidence = state_space.kalman(pair(), test)
    runs = [state_space.train(name, y, test, settings(steps=steps)) for steps in (1, 150)]
    gaps = [(evidence - run.log_w.mean(0)).mean() for run in runs]
    assert [gap < near for gap in gaps] == [False, True]  # nats
    assert all(gap > 0 for gap in gaps)


def test_rows_hold_gaps_and_their_errors(capsys):
    log_w, evidence = torch.randn(200, 30), torch.rand(30)
    (row,) = state_space.tabulate({"dreg": state_space.Result(None, log_w, 2.0)}, evidence)
    gap = evidence - (log_w.view(2, 100, 30).logsumexp(1) - math.log(100)).mean(0)
    assert row["gaps"][100] == pytest.approx(gap.mean().item())
    assert row["errors"][100] == pytest.approx(gap.std().item() / math.sqrt(30))
    assert row["gaps"][1] == pytest.approx((evidence - log_w.mean(0)).mean().item())
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith("GRU, IWAE + DReG")
    assert f"{row['gaps'][10]:.4f} ± {row['errors'][10]:.4f}" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "arch"], "invalid choice: 'arch'"),
        (["--length", "1"], "--length 1: give a whole number of 2"),
        (["--lr", "0"], "0: give a number above 0"),
    ],
)
def test_wrong_input_is_refused_in_one_line(options, message, tmp_path, capsys):
    assert message in refusal("state_space", tmp_path, capsys, *options)
