"""The conformance suite, run on this package's classes and on ones known to be wrong."""

import importlib
import json
import sys
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.util import detach
from pyro.infer import SVI, RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceGraph_ELBO

from pyro_elbo_ext import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    VRIWAE_ELBO,
    MeanField_ELBO,
    Price_ELBO,
    Regression_ELBO,
    ReweightedWakeSleep_ELBO,
    ScoreFunction_ELBO,
    ScoreRegression_ELBO,
)
from pyro_elbo_ext.gradients import OVIS, VIMCO
from pyro_elbo_ext.testing import IDENTITIES, conformance, linear_vae_optimum, recognise
from pyro_elbo_ext.testing.__main__ import main

EXACT = {
    "pathwise": (partial(IWAE_ELBO, gradient="pathwise"), {"bound": "iwae"}),
    "dreg": (partial(IWAE_ELBO, gradient="dreg"), {"bound": "iwae", "zero_variance": True}),
    "stl": (partial(IWAE_ELBO, gradient="stl"), {"bound": "iwae", "gradient": "iwae+rws", "zero_variance": True}),
    "vr-iwae": (partial(VRIWAE_ELBO, 0.4), {"zero_variance": True}),
    "miwae": (MIWAE_ELBO, {"zero_variance": True}),
    "ciwae": (partial(CIWAE_ELBO, 0.3), {"zero_variance": True}),
    "mean-field": (MeanField_ELBO, {"bound": "elbo"}),
    "looped": (partial(IWAE_ELBO, vectorize_particles=False), {"bound": "iwae"}),
    "vimco": (partial(IWAE_ELBO, gradient="vimco"), {"bound": "iwae", "scored": True, "min_particles": 2}),
    "ovis": (partial(IWAE_ELBO, gradient="ovis"), {"bound": "iwae", "scored": True, "min_particles": 2}),
    "ovis, gamma = 1": (
        partial(IWAE_ELBO, gradient=OVIS(1.0)),
        {"bound": "iwae", "scored": True, "min_particles": 2, "gradient": "iwae+rws", "zero_variance": True},
    ),
    "leave-one-out": (
        ScoreFunction_ELBO, {"bound": "elbo", "scored": True, "zero_variance": True, "min_particles": 2},
    ),
    "running mean": (partial(ScoreFunction_ELBO, baseline="running-mean"), {"bound": "elbo", "scored": True}),
    "disarm": (partial(ScoreFunction_ELBO, gradient="disarm"), {"bound": "elbo"}),
    "double-cv": (partial(ScoreFunction_ELBO, gradient="double-cv"), {"bound": "elbo"}),
    "wake-sleep": (
        ReweightedWakeSleep_ELBO, {"bound": "iwae", "gradient": "rws", "min_particles": 2, "improves": True},
    ),
    "wake-sleep, dreg": (
        partial(ReweightedWakeSleep_ELBO, wake_phi="dreg"),
        {"bound": "iwae", "gradient": "rws", "min_particles": 2, "zero_variance": True},
    ),
    "piwae": (PIWAE_ELBO, {"gradient": None}),
    "price": (Price_ELBO, {"bound": "elbo", "zero_variance": True}),
    "score regression": (ScoreRegression_ELBO, {"bound": "elbo", "min_particles": 3, "zero_variance": True}),
    "regression": (Regression_ELBO, {"bound": "elbo", "min_particles": 3}),
}  # fmt: skip


# By name, as their tests show.
REFUSES_BITS = {"pathwise", "dreg", "stl", "mean-field", "wake-sleep, dreg", "price", "score regression"}
SLOW = {"looped", "piwae", "price", "score regression", "regression"}  # others of their kind are not
SLOW |= {"ciwae", "miwae", "ovis, gamma = 1", "double-cv", "wake-sleep"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in EXACT])
def test_this_package_conforms(name):
    make, claims = EXACT[name]
    checks = conformance(make, **claims, size=0.05)
    assert {"C8", "C9", "C11", "C13"} <= {check.identity for check in checks if check.passed}
    assert all(check.passed is not False for check in checks), [check for check in checks if check.passed is False]
    refused = {check.name for check in checks if check.passed is None and check.identity in ("C8", "C9")}
    assert bool(refused) == (name in REFUSES_BITS), refused


def failing(make, only=None, **claims):
    return {check.name for check in conformance(make, **claims, size=0.1, only=only) if check.passed is False}


class Halved_ELBO(IWAE_ELBO):
    def _estimate(self, sampler, draws):
        estimate = super()._estimate(sampler, draws)
        objective = estimate.objective
        return estimate._replace(objective=objective.detach() + 0.5 * (objective - objective.detach()))


class TooHigh_ELBO(IWAE_ELBO):
    def bound(self, log_w):
        return log_w.max(0).values


class Summed_ELBO(IWAE_ELBO):
    def bound(self, log_w):
        return log_w.logsumexp(0)


class Altered_ELBO(IWAE_ELBO):
    """A loss whose gradient is multiplied, and which may forget a scale around the pair."""

    factor, drops_scale = 1.0, False

    def loss_and_grads(self, model, guide, *args, **kwargs):
        if self.drops_scale:
            model, guide = (getattr(f, "__wrapped__", f) for f in (model, guide))
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        (self.factor * loss).backward()
        return loss.item()


class Swapped_ELBO(Altered_ELBO):
    factor = -1.0


class NoScale_ELBO(Altered_ELBO):
    drops_scale = True


class LayerWise_ELBO(Trace_ELBO):
    """Doubly reparameterised with each site's distribution detached: right for one layer, biased for two."""

    def loss_and_grads(self, model, guide, *args, **kwargs):
        model_trace, guide_trace = next(self._get_traces(model, guide, args, kwargs))
        sites = [(guide_trace.nodes[name], model_trace.nodes[name]) for name in guide_trace.stochastic_nodes]
        sites = [(q, p) for q, p in sites if not q["name"].startswith(("replicates", "num_particles"))]
        log_w = sum(p["unscaled_log_prob"] - detach(q["fn"]).log_prob(q["value"]) for q, p in sites)
        log_w = log_w + sum(model_trace.nodes[name]["unscaled_log_prob"] for name in model_trace.observation_nodes)
        weight = torch.softmax(log_w, 0).detach()
        (-(weight.square() * log_w).sum()).backward()
        return -(log_w.logsumexp(0) - torch.tensor(float(len(log_w))).log()).sum().item()


class Inert_ELBO(Altered_ELBO):
    factor = 0.0


PYRO_IWAE = partial(RenyiELBO, alpha=0, vectorize_particles=True)
PYRO = {"vectorize_particles": True}
IWAE_BITS = {"bound": "iwae", "scored": True, "min_particles": 2}
# What is wrong: the class, what it claims, the identity meant for it, and a row of that which fails.
WRONG = {
    "another bound": (IWAE_ELBO, {"bound": "elbo"}, "C1", "golden value, K = 4"),
    "halved gradient": (lambda **k: Halved_ELBO(**k), {"bound": "iwae"}, "C1", "golden gradient in the mean, K = 2"),
    "halved, of a bound unknown": (lambda **k: Halved_ELBO(**k), {}, "C2", "gradient is the value's"),
    "swapped sign": (Swapped_ELBO, {}, "C2", "gradient is the value's"),
    "another gradient": (
        partial(IWAE_ELBO, gradient="stl"), {"bound": "iwae"}, "C2", "gradient's mean is bound's alone, K = 3",
    ),
    "no score term": (PYRO_IWAE, {"bound": "iwae"}, "C2", "guide without a path, gradient, K = 2"),
    "noise that does not fall": (
        partial(IWAE_ELBO, gradient="pathwise"), {"slope": (-1.7, -1.3)}, "C3", "slope of log sd in log K",
    ),
    "noise at the posterior": (
        partial(IWAE_ELBO, gradient="pathwise"), {"zero_variance": True}, "C4", "no variance at the posterior",
    ),
    "layer-wise detach": (partial(LayerWise_ELBO, **PYRO), {"bound": "iwae"}, "C5", "two-layer guide, m"),
    "a mean that includes oneself": (
        partial(ScoreFunction_ELBO, baseline=lambda site: site.cost.mean(0, keepdim=True)), {"bound": "elbo"}, "C6",
        "(b - 0.499)^2, theta = 2, K = 2",
    ),
    "a baseline that knows its bit": (
        partial(ScoreFunction_ELBO, baseline=lambda site: 0.5 * site.cost), {"bound": "elbo"}, "C10",
        "belief network, gradient in first",
    ),
    "half the particles": (MIWAE_ELBO, {"bound": "iwae"}, "C7", "gap to the evidence, 2 K gap -> Var(w) / Z^2"),
    "scale inside the log": (PYRO_IWAE, {"bound": "iwae"}, "C8", "minibatch of 4 in 20"),
    "dropped user scale": (NoScale_ELBO, {}, "C8", "scale of 0.5, full batch"),
    "pooled plates": (
        lambda **k: FloatLoss(**k), {"bound": "iwae", "gradient": "rws", "min_particles": 2}, "C9",
        "gradient of a row, bits",
    ),
    "plates of the model alone": (PYRO_IWAE, {}, "C9", "guide that is joint over a plate, value"),
    "biased leave-one-out": (
        lambda **k: IWAE_ELBO(gradient=NoPathWeight(), **k), IWAE_BITS, "C10", "belief network, gradient in first",
    ),
    "auxiliary site left out of the cost": (
        partial(Trace_ELBO, **PYRO), {"bound": "elbo"}, "C10", "auxiliary site after a bit, gradient",
    ),
    "a step that does nothing": (Inert_ELBO, {"trains": True}, "C11", "linear VAE, trained to its optimum"),
    "sum instead of mean": (Summed_ELBO, {}, "C13", "value <= evidence"),
    "largest weight": (TooHigh_ELBO, {}, "C13", "linear Gaussian, value <= evidence, K = 16"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_fails_the_identity_meant_for_it(wrong):
    make, claims, identity, row = WRONG[wrong]
    assert row in failing(make, [identity], **claims)


def test_pyros_graph_elbo_knows_what_an_auxiliary_site_costs():
    assert not failing(partial(TraceGraph_ELBO, **PYRO), ["C10"], bound="elbo")


def test_a_layer_wise_detach_is_right_for_one_layer():
    assert not failing(partial(LayerWise_ELBO, **PYRO), ["C1", "C7"], bound="iwae", min_particles=2)


def test_the_fewest_particles_of_a_regression_of_values_are_exact_on_a_conjugate_model():
    """One more than statistics: there are no others to hold a particle against, and a ridge must not stand in."""
    checks = conformance(Regression_ELBO, only=["C1"], bound="elbo", min_particles=3, size=0.02)
    assert all(check.passed for check in checks), checks
    assert all(check.error < 1e-5 for check in checks if "gradient" in check.name)


@pytest.mark.slow
def test_a_step_that_does_nothing_leaves_the_mixture_where_it_was():
    claims = {"bound": "iwae", "gradient": "rws", "min_particles": 2, "improves": True}
    assert failing(Inert_ELBO, ["C12"], **claims) == {"mixture improves with particles"}


class FloatLoss(ReweightedWakeSleep):
    """Pyro's wake-sleep, whose loss is a pair of numbers."""

    def loss_and_grads(self, model, guide, *args, **kwargs):
        return super().loss_and_grads(model, guide, *args, **kwargs)[0]


class NoPathWeight(VIMCO):
    """A signal with the particle's own weight added back: S in place of S - v."""

    def __call__(self, bound, log_w):
        return super().__call__(bound, log_w) + bound.path_weights(log_w)


def test_a_loss_that_raises_fails_instead_of_stopping_the_suite():
    assert failing(lambda num_particles: Trace_ELBO(no_such_argument=1))


def test_what_does_not_apply_says_why():
    checks = conformance(partial(IWAE_ELBO, gradient="pathwise"), size=0.01, complete=True)
    assert list(dict.fromkeys(check.identity for check in checks)) == list(IDENTITIES)
    assert all(check.detail for check in checks if check.passed is None)
    why = {check.identity: check.detail for check in checks if check.passed is None}
    assert why["C1"] == "the bound is neither claimed nor recognised"
    assert why["C3"] == "no slope claimed"
    assert "not reparameterised" in why["C10"]


def test_a_check_carries_its_numbers():
    (check,) = conformance(IWAE_ELBO, bound="iwae", size=0.02, only=["C7"])
    assert check[:2] == ("gap to the evidence, 2 K gap -> Var(w) / Z^2", True)
    assert check.identity == "C7"
    assert abs(check.found - check.expected) < 4 * check.error + check.expected / 8


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"bound": "tvo"}, "bound must be"),
        ({"gradient": "dreg"}, "gradient must be"),
        ({"bound": "elbo", "gradient": "rws"}, "gradient of an ELBO"),
        ({"only": ["C14"]}, "C1 to C13"),
    ],
)
def test_unknown_claims_are_refused(claims, message):
    with pytest.raises(ValueError, match=message):
        conformance(IWAE_ELBO, **claims)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (IWAE_ELBO, ("iwae", "bound", 1)),
        (partial(IWAE_ELBO, gradient="stl"), ("iwae", "iwae+rws", 1)),
        (ReweightedWakeSleep_ELBO, ("iwae", "rws", 2)),
        (MeanField_ELBO, ("elbo", "bound", 1)),
        (PYRO_IWAE, ("iwae", "bound", 1)),
        (partial(Trace_ELBO, **PYRO), ("elbo", "bound", 1)),
        (partial(VRIWAE_ELBO, 0.5), (None, "bound", 1)),
        (lambda **k: Halved_ELBO(**k), ("iwae", "bound", 1)),
    ],
)
def test_bounds_are_recognised_from_values(make, expected):
    assert recognise(make, size=0.1)[:3] == expected


def test_the_suite_leaves_no_trace():
    pyro.param("mine", torch.tensor(1.0))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    conformance(IWAE_ELBO, size=0.01)
    assert set(pyro.get_param_store().keys()) == {"mine"}
    assert torch.equal(state, torch.get_rng_state())


QUICK = ["--size", "0.05", "--no-train"]


def test_from_a_shell(capsys, tmp_path):
    file = tmp_path / "table.json"
    assert main(["pyro_elbo_ext:IWAE_ELBO", *QUICK, "--only", "C8,C10,C13", "--json", str(file)]) == 0
    first, *rows, last = capsys.readouterr().out.splitlines()
    assert "recognised as the importance-weighted bound" in first
    assert "none failed" in last
    found = json.loads(file.read_text())
    assert found["exit"] == 0
    assert len(found["rows"]) == len(rows)
    assert {row["identity"] for row in found["rows"]} == {"C8", "C10", "C13"}
    assert main(["pyro.infer:RenyiELBO", *QUICK, "--arg", "alpha=0", "--only", "C8"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("rows failed, of C8")


def test_a_table_that_shows_too_little_is_no_pass(capsys):
    """It takes no bits, so that the gradient was not seen to hold there."""
    assert main(["pyro_elbo_ext:MeanField_ELBO", *QUICK, "--only", "C8,C10,C13"]) == 1
    printed = capsys.readouterr().out
    assert "recognised as the ELBO" in printed and "n/a" in printed and "FAIL" not in printed
    assert "not shown: the guide's gradient equal to the sum over all states" in printed


def test_claims_come_before_what_is_seen(capsys):
    table = ["pyro_elbo_ext:IWAE_ELBO", *QUICK, "--only", "C3,C4", "--zero-variance", "--slope", "-1.7", "-1.2"]
    assert main([*table, "--bound", "any", "--arg", "gradient=dreg"]) == 1  # for want of rows, not for a failing one
    printed = capsys.readouterr().out
    assert "claimed as no bound of those known" in printed
    assert "pass C3" in printed and "pass C4   no variance" in printed and "FAIL" not in printed


@pytest.mark.slow
def test_whole_tables_from_a_shell(capsys):
    for name in ("IWAE_ELBO", "ScoreFunction_ELBO", "ReweightedWakeSleep_ELBO"):
        assert main([f"pyro_elbo_ext:{name}"]) == 0, capsys.readouterr().out
        assert "FAIL" not in capsys.readouterr().out
    assert main(["pyro.infer:RenyiELBO"]) == 1
    assert "FAIL" in capsys.readouterr().out


BAD = {
    "nothing": ([], "required"),
    "no class": (["pyro_elbo_ext"], "expected module:ClassName"),
    "no module": (["no_such_module:X"], "cannot load no_such_module:X: ModuleNotFoundError"),
    "no name": (["pyro_elbo_ext:No"], "cannot load pyro_elbo_ext:No: AttributeError"),
    "no ELBO": (["pyro.infer:SVI"], "no subclass of pyro.infer.ELBO"),
    "not callable": (["pyro_elbo_ext:__version__"], "is a str"),
    "another thing made": (["pyro_elbo_ext.testing:equal_rows", "--arg", "replicates=1"], "cannot be made"),
    "an argument missing": (["pyro_elbo_ext:CIWAE_ELBO"], "give what else it needs by --arg"),
    "an argument too many": (["pyro_elbo_ext:IWAE_ELBO", "--arg", "typo=1"], "unexpected keyword argument 'typo'"),
    "an argument without value": (["pyro_elbo_ext:IWAE_ELBO", "--arg", "gradient"], "--arg takes NAME=VALUE"),
    "a module that raises": (["breaks_on_import:X"], "RuntimeError: on purpose"),
    "an unknown bound": (["pyro_elbo_ext:IWAE_ELBO", "--bound", "tvo"], "invalid choice"),
    "an unknown identity": (["pyro_elbo_ext:IWAE_ELBO", "--size", "0.01", "--only", "C99"], "C1 to C13"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_a_shell_gives_that_is_no_class_is_refused(bad, capsys, tmp_path, monkeypatch):
    arguments, message = BAD[bad]
    (tmp_path / "breaks_on_import.py").write_text("raise RuntimeError('on purpose')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_linear_vae_reaches_the_closed_form_optimum():
    """The best bound is the log-likelihood of probabilistic PCA; a step that does nothing is more than a nat off."""
    torch.manual_seed(0)
    num, dims, latent = 200, 5, 2
    loadings = torch.tensor([[1.5, 1.0, -1.0, 0.0, 0.5], [0.0, 1.0, 0.8, -1.2, 0.3]])
    data = torch.randn(num, latent) @ loadings + 0.5 * torch.randn(num, dims)
    data = data - data.mean(0)
    optimum = linear_vae_optimum(data, latent)

    def model():
        w = pyro.param("w", lambda: torch.randn(dims, latent))
        noise = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", num):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ w.T, noise).to_event(1), obs=data)

    def guide():
        v = pyro.param("v", lambda: 0.1 * torch.randn(dims, latent))
        tril = pyro.param("tril", 0.5 * torch.eye(latent), constraint=dist.constraints.lower_cholesky)
        with pyro.plate("data", num):
            pyro.sample("z", dist.MultivariateNormal(data @ v, scale_tril=tril))

    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.997}), loss=IWAE_ELBO(1, "stl"))
    start = -svi.evaluate_loss() / num
    for _ in range(2000):
        svi.step()
    end = -sum(svi.evaluate_loss() for _ in range(200)) / 200 / num
    assert start < optimum - 1
    assert end == pytest.approx(optimum, abs=1e-3)


@pytest.mark.slow
def test_the_table_of_pyros_own_classes_shows_what_is_known(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    script = importlib.import_module("conformance")
    file = tmp_path / "table.md"
    assert script.main(["--quick", "--only", "Pyro", "--markdown", str(file)]) == 0
    text = file.read_text()
    assert text.count(": shown by C") == len(script.KNOWN)
    assert script.main(["--quick", "--only", "IWAE"]) == 0
    assert "Failing rows: none." in capsys.readouterr().out


SLOPES = {"pathwise": (-0.6, -0.4), "dreg": (-1.7, -1.3), "vimco": (-0.65, -0.4), "ovis": (-1.8, -1.3)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pathwise", "dreg", "stl", "vr-iwae", "miwae", "ciwae", "vimco", "ovis"])
def test_this_package_conforms_at_full_size(name):
    make, claims = EXACT[name]
    checks = conformance(make, **claims, slope=SLOPES.get(name))
    assert all(check.passed is not False for check in checks), [check for check in checks if check.passed is False]
