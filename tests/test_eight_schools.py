"""models/eight_schools.py knows the exact posterior, measures guides against it, and exports the best one."""

import json
import math
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from pyro_elbo_ext.arviz import _import_arviz
from pyro_elbo_ext.diagnostics import BoundPoint
from tests.model_files import MODELS, hold_to_weighted_prior_draws, refusal

eight_schools = MODELS["eight_schools"]

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture
def schools():
    return eight_schools.Schools(torch.tensor(eight_schools.EFFECTS), torch.tensor(eight_schools.ERRORS))


def settings(**changed):
    """What ``train`` reads."""
    return Namespace(**({"seed": 0, "steps": 1, "num_particles": 8, "draws": 1000} | changed))


def test_evidence_and_moments_are_those_of_weighted_prior_draws(schools):
    hold_to_weighted_prior_draws(
        schools.model, eight_schools.integrate(schools), 20
    )  # 1e-5 of the posterior of tau is beyond


def test_quadrature_has_converged(schools):
    coarse, fine = (eight_schools.integrate(schools, nodes) for nodes in (501, 4001))
    assert coarse.log_evidence == pytest.approx(fine.log_evidence, abs=1e-9)
    for site, (mean, sd) in fine.moments.items():
        torch.testing.assert_close(coarse.moments[site].mean, mean)
        torch.testing.assert_close(coarse.moments[site].sd, sd)


def test_effects_are_pooled_for_small_tau_and_apart_for_large(schools):
    theta = eight_schools.integrate(schools).theta
    pooled = (schools.effects / schools.errors**2).sum() / (1 / 25 + (1 / schools.errors**2).sum())
    torch.testing.assert_close(theta.mean[0], pooled.expand(8))
    torch.testing.assert_close(theta.sd[0], (1 / 25 + (1 / schools.errors**2).sum()).rsqrt().expand(8))
    torch.testing.assert_close(theta.mean[-1], schools.effects, atol=1e-6, rtol=0)
    torch.testing.assert_close(theta.sd[-1], schools.errors)


def test_density_of_log_tau_sums_to_one(schools):
    exact = eight_schools.integrate(schools)
    assert torch.trapezoid(exact.density, exact.log_tau).item() == pytest.approx(1)


def test_moments_of_a_mixture_of_two():
    weight, mean, variance = torch.tensor([0.25, 0.75]), torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [3.0]])
    found = eight_schools.mixture(weight, mean, variance)
    assert found.mean.item() == 3
    assert found.sd.item() ** 2 == pytest.approx(0.25 * (1 + 9) + 0.75 * (3 + 1))


@pytest.mark.parametrize("name", eight_schools.TITLES)
def test_objectives_are_what_their_titles_say(name, schools):
    guide, _, loss = eight_schools.make_objective(name, schools, 4)
    title = eight_schools.TITLES[name]
    assert type(guide).__name__ in title
    tight = getattr(loss, "gradient", "pathwise")
    assert tight == ("dreg" if "DReG" in title else "stl" if "STL" in title else "pathwise")
    values = torch.tensor([loss.loss(schools.model, guide) for _ in range(5)])
    assert values.isfinite().all()
    if type(guide).__name__ == "AutoFlow":
        assert set(guide.centering_weights) == (set() if name == "centred" else {"theta"})


@pytest.mark.convergence
@pytest.mark.parametrize("name", ["flow-stl", "plated"])
def test_trained_flows_come_near(name, schools):
    exact = eight_schools.integrate(schools)
    before, after = (eight_schools.train(name, schools, settings(steps=steps)) for steps in (1, 120))
    kl = [exact.log_evidence - result.report.bounds[0].value for result in (before, after)]
    assert [value < 0.3 for value in kl] == [False, True]  # nats: over 0.6 before, below 0.1 after
    errors = [math.hypot(result.report.bounds[0].se, result.bound[1]) for result in (before, after)]
    own = [exact.log_evidence - result.bound[0] for result in (before, after)]  # the ELBO, too, from other draws
    assert all(abs(kl[i] - own[i]) < 4 * errors[i] for i in range(2))
    assert all(value > -4 * error for value, error in zip(kl, errors, strict=True))


def made_up(exact, values):
    """What ``train`` returns, for draws of known moments."""
    point, tight = (BoundPoint(k, exact.log_evidence - gap, gap / 5, 0, 0, 1) for k, gap in ((1, 0.5), (100, 0.25)))
    verdict = SimpleNamespace(name="GOOD")
    draws = SimpleNamespace(values=values, num_samples=2)
    report = SimpleNamespace(bounds=[point, tight], draws=draws, k=0.3, verdict=verdict)
    return eight_schools.Examined(None, None, report, (exact.log_evidence - 0.4, 0.1), 1.0)


def test_rows_hold_distances_from_the_exact_answer(schools, capsys):
    exact = eight_schools.integrate(schools)
    mean, sd = exact.moments["theta"]
    shift = torch.tensor([0.0] * 7 + [-0.4]) * sd
    values = {"mu": torch.tensor([1.0, 3.0]), "tau": torch.tensor([2.0, 2.0]), "theta": (mean + shift).expand(2, 8)}
    results = {"flow": made_up(exact, values)}
    (row,) = eight_schools.tabulate_distances(results, eight_schools.TITLES, exact, ("mu", "tau"), "theta")
    assert [row[key] for key in ("own", "own_error", "kl", "kl_error")] == pytest.approx([0.4, 0.1, 0.5, 0.1])
    assert [row[key] for key in ("tight", "tight_error")] == pytest.approx([0.25, 0.05])
    assert row["theta_off"] == pytest.approx(0.4)
    assert row["mu"] == pytest.approx([2.0, math.sqrt(2)])
    assert row["tau_off"] == pytest.approx(((exact.moments["tau"].mean - 2) / exact.moments["tau"].sd).item())
    printed = capsys.readouterr().out.splitlines()[-1].split()
    shown = "AutoFlow, ELBO 0.400 ± 0.100 0.500 ± 0.100 0.250 ± 0.050 0.30 2.00 ± 1.41 2.00 ± 0.00 0.40 1.0"
    assert printed == shown.split()


def test_one_run_is_shown_and_exported(tmp_path, capsys):
    arviz = _import_arviz()
    options = ["--quick", "--steps", "3", "--elbo", "dense", "--netcdf", "--output", str(tmp_path)]
    assert eight_schools.main(options) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [f"eight_schools.{k}" for k in ("json", "nc", "png")]
    (row,) = json.loads((tmp_path / "eight_schools.json").read_text())["table"]
    assert f"{row['kl']:.3f} ± {row['kl_error']:.3f}" in printed
    data = arviz.from_netcdf(str(tmp_path / "eight_schools.nc"))
    assert data["posterior"]["theta"].dims == ("chain", "draw", "schools")
    assert "".join(data["posterior"]["schools"].values) == "ABCDEFGH"
    assert abs(float(data["posterior"]["mu"].mean()) - row["mu"][0]) < 5 * row["mu"][1] / math.sqrt(1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--netcdf"], "--netcdf needs ArviZ: pip"), (["--draws", "10"], "--draws 10: give a whole number of 1000")],
)
def test_wrong_input_is_refused_in_one_line(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(eight_schools.importlib.util, "find_spec", lambda name: None)
    assert message in refusal("eight_schools", tmp_path, capsys, *options)
