"""models/radon.py knows the exact posterior of its hierarchy, trains on minibatches, and reads houses from files."""

import csv
import math
from argparse import Namespace

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from tests.model_files import MODELS, hold_to_weighted_prior_draws, refusal

radon = MODELS["radon"]

pytestmark = pytest.mark.usefixtures("on_cpu")


def houses(sizes=(1, 2, 5, 3), seed=0):
    """Columns of a few houses, in no order."""
    rng = np.random.default_rng(seed)
    county = np.repeat(np.arange(len(sizes)), sizes)
    uranium, floor = rng.normal(size=len(sizes))[county], rng.integers(0, 2, len(county))
    columns = dict(
        zip(radon.COLUMNS, (county, floor.astype(float), uranium, rng.normal(size=len(county))), strict=True)
    )
    order = rng.permutation(len(county))
    return {name: column[order] for name, column in columns.items()}


def dense(columns):
    """Rows of predictors, membership of counties, and y, one a house."""
    floor, uranium, y = (torch.as_tensor(columns[name]) for name in radon.COLUMNS[1:])
    county = torch.as_tensor(columns["county"])
    x = torch.stack([torch.ones_like(y), uranium, floor], -1)
    return x, torch.nn.functional.one_hot(county).to(y), y


def settings(**changed):
    """What ``train`` reads."""
    return Namespace(**({"seed": 0, "steps": 1, "num_particles": 8, "batch_size": 3, "draws": 500} | changed))


def test_given_the_deviations_all_is_as_in_one_dense_gaussian():
    columns, log_s = houses(), torch.tensor([[-1.0, 0.2], [0.5, -0.7]])
    found = radon.condition(radon.Statistics(radon.arrange(columns, "cpu")), log_s)
    x, member, y = dense(columns)
    for i, (s_alpha, s_y) in enumerate(log_s.exp()):
        rows = torch.cat([x, member], 1)  # of the coefficients and of each county's deviation from its line
        prior = torch.cat([torch.full((3,), radon.SCALE), s_alpha.expand(4)]).square().diag()
        covariance = rows @ prior @ rows.T + s_y.square() * torch.eye(len(y))
        log_prior = dist.HalfNormal(1.0).log_prob(log_s[i].exp()).sum() + log_s[i].sum()
        expected = dist.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y) + log_prior
        torch.testing.assert_close(found.log_joint[i], expected)
        gain = prior @ rows.T @ covariance.inverse()
        mean, left = gain @ y, prior - gain @ rows @ prior
        torch.testing.assert_close(found.mean[i], mean[:3])
        torch.testing.assert_close(found.covariance[i], left[:3, :3])
        uranium = radon.arrange(columns, "cpu").uranium
        alpha = torch.cat([torch.stack([torch.ones(4), uranium, torch.zeros(4)], -1), torch.eye(4)], 1)
        torch.testing.assert_close(found.alpha[i], alpha @ mean)
        torch.testing.assert_close(found.alpha_variance[i], (alpha @ left @ alpha.T).diagonal())


def test_evidence_and_moments_are_those_of_weighted_prior_draws():
    data = radon.arrange(houses(), "cpu")
    hold_to_weighted_prior_draws(data.model, radon.integrate(data))


def test_quadrature_has_converged_and_finds_what_made_the_data():
    data = radon.arrange(radon.simulate(85, 919, 3), "cpu")
    coarse, fine = (radon.integrate(data, nodes) for nodes in (121, 201))
    assert coarse.log_evidence == pytest.approx(fine.log_evidence, abs=1e-5)
    assert torch.trapezoid(coarse.density, coarse.log_s_alpha).item() == pytest.approx(1, abs=1e-5)
    for site, value in radon.TRUTH.items():
        mean, sd = fine.moments[site]
        torch.testing.assert_close(coarse.moments[site].mean, mean)
        assert abs(mean - value) < 4 * sd


def test_padding_changes_nothing():
    data = radon.arrange(houses(), "cpu")
    more = torch.nn.functional.pad
    wide = data._replace(y=more(data.y, (0, 0, 0, 3), value=9.0), floor=more(data.floor, (0, 0, 0, 3), value=1.0))
    wide = wide._replace(seen=more(data.seen, (0, 0, 0, 3)))
    assert radon.integrate(wide).log_evidence == pytest.approx(radon.integrate(data).log_evidence)
    torch.testing.assert_close(wide.features, data.features)
    trace = poutine.trace(data.model).get_trace()
    values = {name: trace.nodes[name]["value"] for name in radon.integrate(data).moments}
    again = poutine.trace(poutine.condition(wide.model, values)).get_trace()
    torch.testing.assert_close(again.log_prob_sum(), trace.log_prob_sum())


@pytest.mark.parametrize("name", ["dense", "normal-local", "plated", "plated-stl"])
def test_losses_estimate_bounds_below_the_evidence(name):
    data = radon.arrange(houses(), "cpu")
    guide, _, loss = radon.make_objective(name, data, 8)
    exact = radon.integrate(data).log_evidence
    whole = -torch.tensor([loss.loss(data.model, guide) for _ in range(49)])
    assert whole.mean() < exact + 4 * whole.std() / 7
    if name == "normal-local":  # by single draws of everything, the ELBO is lower
        elbo = -torch.tensor([radon.Trace_ELBO().loss(data.model, guide) for _ in range(100)])
        assert whole.mean() - elbo.mean() > 4 * math.hypot(whole.std() / 7, elbo.std() / 10)
    if name == "plated":  # minibatches of two counties of four
        parts = -torch.tensor([loss.loss(data.model, guide, 2) for _ in range(100)])
        error = math.hypot(whole.std() / 7, parts.std() / 10)
        assert abs(whole.mean() - parts.mean()) < 4 * error


@pytest.mark.convergence
@pytest.mark.parametrize(("name", "near"), [("normal-local", 10.0), ("plated-batch", 3.0)])
def test_trained_guides_come_near(name, near):
    data = radon.arrange(houses((4, 6, 9, 12, 5, 7)), "cpu")
    exact = radon.integrate(data).log_evidence
    kl = [exact - radon.train(name, data, settings(steps=steps)).report.bounds[0].value for steps in (1, 100)]
    assert [value < near for value in kl] == [False, True]  # nats: 34 and 63 before, 5.8 and 1 after


def test_simulated_counties_are_as_unequal_as_said():
    columns, again, other = (radon.simulate(85, 919, seed) for seed in (0, 0, 1))
    sizes = np.bincount(columns["county"])
    assert (len(sizes), sizes.sum(), sizes.min()) == (85, 919, 1)
    assert sizes.max() > 40
    assert np.median(sizes) < 8
    assert all((columns[name] == again[name]).all() for name in columns)
    assert (columns["log_radon"] != other["log_radon"]).any()


@pytest.mark.parametrize("suffix", ["csv", "npz"])
def test_houses_of_a_file_are_those_of_the_columns(suffix, tmp_path):
    columns, path = houses(), tmp_path / f"houses.{suffix}"
    named = columns | {"county": np.array(["Aitkin", "Lac qui Parle, MN", "Anoka", "St. Louis"])[columns["county"]]}
    if suffix == "npz":
        np.savez(path, **named, other=np.zeros(3))
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", *named])
            writer.writerows(zip(range(11), *named.values(), strict=True))
    data, expected = radon.arrange(radon.read(path), "cpu"), radon.arrange(columns, "cpu")
    order = [0, 2, 1, 3]  # of the names, by letter
    for found, wanted in zip(data, expected, strict=True):
        torch.testing.assert_close(found, wanted[..., order])


def bad_files(folder):
    """Files that are no houses, by name."""
    good = houses()
    (folder / "text.npz").write_text("no archive")
    (folder / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    (folder / "words.csv").write_text("county,floor,log_uranium,log_radon\nA,first,0,0\nB,0,0,0\n")
    (folder / "short.csv").write_text("county,floor,log_uranium,log_radon\nA,1,0\nB,0,0,0\n")
    (folder / "other.csv").write_text("county,floor\nA,1\n")
    np.savez(folder / "missing.npz", **{name: good[name] for name in radon.COLUMNS[:3]})
    np.savez(folder / "lengths.npz", **(good | {"floor": good["floor"][1:]}))
    np.savez(folder / "nan.npz", **(good | {"floor": good["floor"] * np.nan}))
    np.savez(folder / "one.npz", **(good | {"county": 0 * good["county"]}))
    np.savez(folder / "uranium.npz", **(good | {"log_uranium": good["log_radon"]}))


BAD = {
    "absent": (["--data", "{}/absent.csv"], "does not exist"),
    "folder": (["--data", "{}"], "does not exist"),
    "text": (["--data", "{}/text.npz"], "no .csv or .npz file"),
    "bytes": (["--data", "{}/bytes.csv"], "no .csv or .npz file"),
    "words": (["--data", "{}/words.csv"], "no .csv or .npz file of numbers"),
    "short": (["--data", "{}/short.csv"], "NaN or infinite numbers"),
    "other": (["--data", "{}/other.csv"], "has no column 'log_uranium'"),
    "missing": (["--data", "{}/missing.npz"], "has no column"),
    "lengths": (["--data", "{}/lengths.npz"], "columns have shapes [(10,), (11,)]"),
    "nan": (["--data", "{}/nan.npz"], "NaN or infinite"),
    "one": (["--data", "{}/one.npz"], "1 counties; give 2 or more"),
    "uranium": (["--data", "{}/uranium.npz"], "log_uranium differs"),
    "counties": (["--counties", "1"], "--counties 1: give a whole number of 2"),
    "houses": (["--counties", "9", "--houses", "8"], "--houses 8: give one or more for each of 9 counties"),
    "particles": (["--num-particles", "2"], "--num-particles 2: give a whole number of 4"),
    "draws": (["--draws", "100"], "--draws 100: give a whole number of 200"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_refused_in_one_line(case, tmp_path, capsys):
    bad_files(tmp_path)
    arguments, message = BAD[case]
    assert message in refusal("radon", tmp_path, capsys, *(a.format(tmp_path) for a in arguments))
