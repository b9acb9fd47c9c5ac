"""The report: right verdicts where the truth is known, kinds of models it works for, what it says, what it leaves."""

import doctest

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, AutoNormalMessenger

from pyro_elbo_ext import AutoFlow, AutoPlatedFlow
from pyro_elbo_ext.diagnostics import Verdict, diagnose
from pyro_elbo_ext.diagnostics.verdict import Finding, advise, decide
from tests.cases import NUM_DATA, data, global_guide, global_model, local_guide, local_model

QUICK = {"num_samples": 400, "temperatures": 8, "seed": 0}
SD = 0.5**0.5


def mean():
    return torch.tensor([1.0, -1.0])


def model():
    """The posterior of z is N(mean, 1/2) in each coordinate."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=2 * mean())


def normal(shift, width, correlation=0.0):
    """Off by ``shift`` posterior standard deviations, ``width`` of them wide."""
    cov = torch.tensor([[1.0, correlation], [correlation, 1.0]]) * (width * SD) ** 2

    def guide():
        pyro.sample("z", dist.MultivariateNormal(mean() + shift * SD, cov))

    return guide


VERDICTS = {
    "exact": ((0.0, 1.0), Verdict.GOOD),
    "nearly exact": ((0.05, 1.05), Verdict.GOOD),
    "a little off": ((0.5, 1.1), Verdict.REWEIGHT),
    "wide": ((0.0, 2.5), Verdict.REWEIGHT),
    "correlated": ((0.0, 1.2, 0.7), Verdict.REWEIGHT),
    "narrow": ((0.0, 0.4), Verdict.BAD),
    "far": ((5.0, 1.0), Verdict.BAD),
    "narrow and far, with even weights": ((3.0, 0.01), Verdict.BAD),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_verdicts(case):
    settings, verdict = VERDICTS[case]
    report = diagnose(model, normal(*settings), **{**QUICK, "num_samples": 1000})
    assert report.verdict is verdict, str(report)
    assert report.trusted == (verdict is Verdict.GOOD)
    assert f"{verdict.name}: {verdict.value}" in str(report)
    assert bool(report.advice) == (verdict is not Verdict.GOOD)


def two_modes():
    """Half of the posterior is at -5, the rest at 5."""
    z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 10.0))
    pyro.factor("modes", torch.logaddexp(-2 * (z - 5) ** 2, -2 * (z + 5) ** 2) + z**2 / 200)


def one_mode():
    pyro.sample("z", dist.Normal(torch.tensor(5.0), 0.5))


def test_a_mode_that_nothing_reaches_needs_a_reference():
    report = diagnose(two_modes, one_mode, **QUICK)
    assert report.k < 0.5 and report.trusted  # documented: neither draws nor chains get there
    reference = 5 * torch.randn(500).sign() + 0.5 * torch.randn(500)
    assert diagnose(two_modes, one_mode, reference={"z": reference}, **QUICK).verdict is Verdict.BAD


def test_reference_and_refits_are_heard():
    exact, wrong = (mean() + shift * SD + SD * torch.randn(500, 2) for shift in (0.0, 1.0))
    report = diagnose(model, normal(0.0, 1.0), reference={"z": exact}, **QUICK)
    assert report.trusted and report.bracket.upper is not None and "from above" in str(report)
    report = diagnose(model, normal(0.0, 1.0), reference={"z": wrong}, **{**QUICK, "temperatures": 0})
    assert report.verdict is Verdict.BAD and "reference contradicts" in report.reason

    def refit(width):
        return lambda seen: {"z": seen["x"] / 2 + width * SD * torch.randn(99, 2)}

    settings = {**QUICK, "temperatures": 0}
    assert diagnose(model, normal(0.0, 1.0), refit=refit(1.0), **settings).trusted
    report = diagnose(model, normal(0.0, 1.0), refit=refit(0.5), **settings)
    assert report.verdict is Verdict.BAD and "draws too narrow" in str(report)


def discrete_model():
    with pyro.plate("data", 5):
        b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("x", dist.Normal(b, 1.0), obs=torch.arange(5.0) / 3)


def discrete_guide():
    with pyro.plate("data", 5):
        pyro.sample("b", dist.Bernoulli(torch.tensor([0.2, 0.25, 0.35, 0.4, 0.5])))


def exact_local(batch=NUM_DATA):
    with pyro.plate("data", NUM_DATA, subsample_size=batch) as rows:
        pyro.sample("z", dist.Normal(data()[rows] / 2, SD))


KINDS = {
    "globals": (model, lambda: normal(0.0, 1.0), ()),
    "locals": (local_model, lambda: exact_local, ()),
    "minibatch": (local_model, lambda: exact_local, (4,)),
    "globals and locals": (global_model, lambda: global_guide, ()),
    "AutoNormal": (global_model, lambda: AutoNormal(global_model), ()),
    "AutoMultivariateNormal": (global_model, lambda: AutoMultivariateNormal(global_model), ()),
    "AutoNormalMessenger": (global_model, lambda: AutoNormalMessenger(global_model), ()),
    "discrete": (discrete_model, lambda: discrete_guide, ()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind):
    pair_model, make, args = KINDS[kind]
    report = diagnose(pair_model, make(), *args, **{**QUICK, "num_samples": 200, "temperatures": 2})
    text = str(report)
    assert "ELBO" in text and "k-hat" in text and "verdict" in text
    if kind in ("globals", "locals", "minibatch"):
        assert report.trusted, text
    if kind in ("locals", "minibatch", "globals and locals", "AutoNormal"):
        assert report.local[0].plates == ("data",) and "per element of data" in text
    if kind == "discrete":
        assert report.verdict is Verdict.UNCLEAR and report.score is None and report.bracket is None
        assert "'b' is discrete" in report.skipped["annealing"]
    if kind == "minibatch":
        assert report.draws.log_weight.shape == (200, 4) and report.draws.scale == 2
        rows = report.draws.indices["data"]
        exact = 2 * float(dist.Normal(0.0, 2**0.5).log_prob(data()[rows]).sum())
        assert report.bracket.lower == pytest.approx(exact)  # all witnesses look at the same rows
        assert report.terms.elbo == pytest.approx(exact) and report.bounds[0].value == pytest.approx(exact)


@pytest.mark.parametrize("make", [AutoFlow, AutoPlatedFlow])
def test_flows(make):
    report = diagnose(global_model, make(global_model), **{**QUICK, "num_samples": 100, "temperatures": 0})
    assert report.score is not None and "temperatures=0" in str(report)


def test_what_takes_too_long_is_left_out():
    report = diagnose(model, normal(0.0, 1.0), **{**QUICK, "max_seconds": 1e-6})
    assert report.bracket is None and "more than max_seconds" in report.skipped["annealing"]


def test_one_by_one():
    report = diagnose(local_model, local_guide, vectorize=False, num_samples=100, seed=0)
    assert report.score is None and "vectorised" in str(report) and report.local


def test_keyword_arguments_reach_the_pair_and_gradients_are_measured():
    pyro.clear_param_store()
    report = diagnose(local_model, local_guide, batch=4, loss=Trace_ELBO(), **{**QUICK, "temperatures": 0})
    assert report.draws.log_weight.shape == (400, 4)
    assert set(report.gradients) == {"m", "s"} and "gradient SNR" in str(report)


def test_nothing_is_changed_and_seeds_repeat():
    guide = AutoNormal(global_model)
    guide()
    before, state = {n: p.clone() for n, p in pyro.get_param_store().items()}, torch.get_rng_state()
    first, second = (str(diagnose(global_model, guide, **{**QUICK, "temperatures": 2})) for _ in range(2))
    assert first == second
    assert all(torch.equal(before[name], value) for name, value in pyro.get_param_store().items())
    assert before.keys() == set(pyro.get_param_store().keys())
    assert all(param.grad is None for param in guide.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_the_example_is_true():
    found = doctest.DocTestFinder().find(diagnose, "diagnose", globs={"torch": torch, "diagnose": diagnose})
    runner = doctest.DocTestRunner()
    results = [runner.run(test) for test in found]
    assert sum(result.attempted for result in results) == 5 and not any(result.failed for result in results)


def findings(**levels):
    return [Finding(name, level, "") for name, level in {"weights": 0, "gap": 0, **levels}.items()]


RULES = {
    "only weights": ({"correction": 0}, Verdict.UNCLEAR),
    "all agree": ({"correction": 0, "score": 0, "chains": 0}, Verdict.GOOD),
    "chains alone": ({"correction": 0, "chains": 2}, Verdict.BAD),
    "slope alone": ({"correction": 0, "score": 2}, Verdict.UNCLEAR),
    "slope, but chains stay": ({"correction": 0, "score": 2, "chains": 0}, Verdict.REWEIGHT),
    "slope and chains": ({"correction": 0, "score": 2, "chains": 1}, Verdict.UNCLEAR),
    "correction and chains": ({"correction": 2, "chains": 2}, Verdict.REWEIGHT),
    "mass beyond": ({"correction": 2, "annealing": 2}, Verdict.BAD),
    "gap": ({"gap": 2, "score": 0}, Verdict.REWEIGHT),
    "weights": ({"weights": 2, "score": 0}, Verdict.BAD),
    "weights, but chains stay": ({"weights": 2, "score": 0, "chains": 0}, Verdict.UNCLEAR),
    "weights, and chains go": ({"weights": 2, "score": 0, "chains": 1}, Verdict.BAD),
    "reference": ({"reference": 2, "correction": 0, "score": 0}, Verdict.BAD),
    "calibration": ({"calibration": 2, "correction": 0, "score": 0}, Verdict.BAD),
    "slightly": ({"correction": 1, "score": 0}, Verdict.REWEIGHT),
}


@pytest.mark.parametrize("case", RULES)
def test_rules(case):
    levels, verdict = RULES[case]
    found = findings(**levels)
    assert decide(found)[0] is verdict
    assert bool(advise(verdict, found)) == (verdict is not Verdict.GOOD)


def test_an_unsure_k_hat_asks_for_draws():
    found = [Finding("weights", 2, "", sure=False), *findings(score=0, chains=1)[1:]]
    assert decide(found)[0] is Verdict.UNCLEAR
    assert any("num_samples" in text for text in advise(Verdict.UNCLEAR, found))


def no_latents():
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


def nan_model():
    z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.factor("f", z.log())


@pyro.validation_enabled(False)
def unchecked(*pair):
    return diagnose(*pair)


def nan_guide():
    pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))


BAD = {
    "no latents": (lambda: diagnose(no_latents, lambda: None), "no random site"),
    "point": (lambda: diagnose(model, AutoDelta(model)), "AutoDelta, has no posterior"),
    "few": (lambda: diagnose(model, normal(0.0, 1.0), num_samples=50), "num_samples >= 100, got 50"),
    "globals and minibatch": (lambda: diagnose(global_model, global_guide, 4), r"'data' is subsampled \(4 of 8\)"),
    "nan": (lambda: unchecked(nan_model, nan_guide), "is nan, and .* of 1000"),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
