"""Random programs, held to exact sums over everything they can draw; see `tests/programs.py` and `tests/exact.py`."""

import math
import time
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from pyro.infer import Trace_ELBO

from pyro_elbo_ext import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    VRIWAE_ELBO,
    MeanField_ELBO,
    ReweightedWakeSleep_ELBO,
    ScoreFunction_ELBO,
)
from pyro_elbo_ext.gradients import VIMCO
from tests.exact import CAP, Exact, Found, expected_value, gaussian_evidence, minibatches, sampled_gradient, wake_phi
from tests.programs import DISCRETE, KNOWN, REPLICATES, conjugates, programs

KINDS = {
    "discrete": ("bernoulli", "categorical"),
    "continuous": ("normal", "normal", "scored"),
    "mixed": ("normal", "bernoulli", "normal", "categorical"),
}


class Case:
    """One loss and what it is to give.

    Args:
        name: of the loss.
        make: returns it for keyword arguments.
        bound: whose value it has.
        follows: what its guide's gradient is: a bound's name, "rws" or "stl"; that of the value by default.
        integrates: holds for the integral over normal sites only, not for every rule.
        calls: how many steps it takes.
        enumerated: guide sites that it sums out itself.
    """

    def __init__(self, name, make, bound, follows=None, integrates=False, calls=1, enumerated=(), same_draws=True):
        self.name, self.make, self.bound, self.follows = name, make, bound, follows or bound
        self.integrates, self.calls, self.enumerated, self.same_draws = integrates, calls, enumerated, same_draws


def kinds_of(program):
    """Tell whether a program has reparameterised sites, and sites that need a score."""
    kinds = {site.kind for site in program.drawn.values()}
    return "normal" in kinds, bool(kinds - {"normal"})


def gradients(program, k):
    """Names of importance-weighted gradients for a program, each with what it follows and whether it integrates."""
    path, score = kinds_of(program)
    integrates = any(site.kind == "scored" for site in program.drawn.values())
    if not score:
        yield from [("pathwise", None, False), ("dreg", None, True)]
        if k == 1 or program.scale in ("", "all"):
            yield "stl", None if k == 1 else "stl", True
    signals = ["vimco", "ovis", "score", VIMCO("arithmetic")] if k > 1 else ["score"]
    if score and not path:
        yield from [(signal, None, integrates) for signal in signals]
    if score and path:
        yield from [(("pathwise", signal), None, integrates) for signal in signals[:2]]
        yield "dreg+" + signals[-2 % len(signals)], None, True
    yield "auto", None, integrates or (path and k > 1)


def cases(program, k):
    """The losses that apply to a program with k particles."""
    yield from weighted_cases(program, k)
    yield from linear_cases(program, k)


def weighted_cases(program, k):
    """Functions of the importance weights; with one particle all are the ELBO."""

    def of(bound):
        return bound if k > 1 else "elbo"

    path, score = kinds_of(program)
    several = list(gradients(program, k))
    for gradient, follows, integral in several:
        yield Case(f"IWAE {gradient}", partial(IWAE_ELBO, k, gradient), of("iwae"), follows, integral)
    plain, _, integral = several[0]
    yield Case(f"CIWAE {plain}", partial(CIWAE_ELBO, 0.3, k, gradient=plain), of("ciwae"), None, integral)
    gradient, _, integral = program.choose("gradient", [one for one in several if one[1] != "stl"])
    yield Case(f"VRIWAE {gradient}", partial(VRIWAE_ELBO, 0.4, k, gradient=gradient), of("vr"), None, integral)
    if k % 2 == 0:
        if k == 2 and "ovis" in str(gradient).lower():  # a lone particle in each half has no zero weight beside it
            gradient, _, integral = several[0]
        yield Case(f"MIWAE {gradient}", partial(MIWAE_ELBO, k, gradient=gradient), "miwae", None, integral)
        yield Case(f"PIWAE {gradient}", partial(PIWAE_ELBO, k, gradient=gradient), "iwae", "miwae", integral)
    if k > 1:
        yield Case("wake-sleep", partial(ReweightedWakeSleep_ELBO, k), "iwae", "rws")
    if k > 1 and not score:
        make = partial(ReweightedWakeSleep_ELBO, k, wake_phi="dreg")
        yield Case("wake-sleep dreg", make, "iwae", "rws", True)


def linear_cases(program, k):
    """The ELBO's own losses."""
    path, score = kinds_of(program)
    integrates = any(site.kind == "scored" for site in program.drawn.values())
    if k == 1 and not (score and program.mixes_in_guide):  # there Pyro leaves terms of the plate out of the cost
        yield Case("Trace_ELBO", Trace_ELBO, "elbo", None, integrates)
    if not score:
        yield Case("mean field", partial(MeanField_ELBO, k), "elbo", None, True, same_draws=False)
        return
    baselines = {"none": "none", "running mean": "running-mean", "number": lambda site: 0.7}
    if k > 1:
        baselines["leave one out"] = "leave-one-out"
    for name, baseline in baselines.items():
        make = partial(ScoreFunction_ELBO, k, baseline)
        yield Case(f"score, {name}", make, "elbo", None, integrates, 2 if name == "running mean" else 1)
    kinds = {site.kind for site in program.drawn.values()}
    if k > 1 and kinds <= {"bernoulli", "normal"}:
        yield Case("double-cv", partial(ScoreFunction_ELBO, k, gradient="double-cv"), "elbo", None, False, 2)
    last = [s.name for s in program.guide_sites if s.kind in DISCRETE and not _has_children(program, s.name)]
    if last:
        make = partial(ScoreFunction_ELBO, k, "none")
        yield Case("enumerated", make, "elbo", None, integrates, 1, tuple(last[:1]), same_draws=False)


def _has_children(program, name):
    return any(name in site.guide_parents for site in program.guide_sites)


def is_subsampled_inside(program):
    """A subsampled plate is not common to all weights: its scale would stand inside a log."""
    sites = [*program.drawn.values(), *(site for site in program.observed if site.parents)]
    used = {name for site in sites for name in site.plates} - program.common_plates
    return any(program.frames[name].batch < program.frames[name].size for name in used)


def refusal(case, exact):
    """What a loss says where it has no right answer to give, a pattern; empty where it has one."""
    program = exact.program
    if set(case.enumerated) & set(program.summed):
        return "is enumerated"
    if is_subsampled_inside(program) and case.bound != "elbo":
        return "is subsampled"
    scales = {exact.leaf_scale(site) for site in program.drawn.values()}
    return "different scales" if "dreg" in case.name and len(scales) > 1 else ""


class Answers:
    """Exact values and gradients of a program, each computed once."""

    def __init__(self, exact):
        self.exact = exact
        self._bounds = {}

    def bound(self, name):
        if name not in self._bounds:
            self._bounds[name] = self.exact.expected(name)
        return self._bounds[name]

    def gradient(self, case):
        value = self.bound(case.bound)[1]
        if case.follows == case.bound:
            return value
        if case.follows in ("rws", "stl"):
            if "rws" not in self._bounds:
                exact = self.exact
                self._bounds["rws"] = wake_phi(exact.program, exact.num_particles, exact.rows, exact.kept, exact.nodes)
            other = self._bounds["rws"]
            if case.follows == "stl":
                other = {name: slope + value[name] for name, slope in other.items()}
        else:
            other = self.bound(case.follows)[1]
        return {**other, "theta": value["theta"]}


def close(found, expected, tolerance):
    return math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)


def check_case(case, answers):
    """Compare a loss with the exact answers at all draws at once, and in expectation."""
    exact, program = answers.exact, answers.exact.program
    options = {"vectorize_particles": program.number(case.name, "vectorize") > -0.5}
    if program.number(case.name, "nesting") > -0.6:
        options["max_plate_nesting"] = program.nesting + 1
    if case.make is Trace_ELBO:
        options = {"vectorize_particles": False}
    elbo = case.make(**options)
    reason = refusal(case, exact)
    if reason:
        with pytest.raises(ValueError, match=reason):
            Found(elbo, exact, 1, case.enumerated)
        return
    found = Found(elbo, exact, case.calls, case.enumerated)
    if case.same_draws:
        total = exact.value(case.bound).sum().item()
        assert close(found.total, total, 1e-9), f"{case.name}: value at all draws {found.total}, exact {total}"
    tolerance = exact.tolerance if case.integrates else 1e-8
    if tolerance is None:
        return
    expected = answers.gradient(case)
    worst = max(expected, key=lambda name: abs(found.gradient[name] - expected[name]))
    assert close(found.gradient[worst], expected[worst], tolerance), (
        f"{case.name}, {options}: gradient in {worst} {found.gradient[worst]}, exact {expected[worst]}"
    )


def most_particles(program, rows):
    """As many particles as can be summed over, up to four, without losing the integral over normal sites."""
    exacts = [Exact(program, k, rows) for k in (2, 3, 4) if k == 2 or program.states**k <= 4200]
    return max((exact.num_particles for exact in exacts if exact.tolerance), default=2)


def check(program, room):
    """Hold some losses to the exact answers on one minibatch, and the bounds to the evidence and to all minibatches."""
    rows = program.choose("minibatch", minibatches(program))
    for k in (1, most_particles(program, rows)):
        exact = Exact(program, k, rows)
        answers = Answers(exact)
        found = sorted(cases(program, k), key=lambda case: program.number("case", case.name))
        for case in found[: room if k > 1 else room // 2]:
            check_case(case, answers)
    if {site.kind for site in program.drawn.values()} == {"bernoulli"}:
        check_random(program, rows)
    if kinds_of(program) == (True, False) and program.scale in ("", "all"):
        check_local(program, rows)
    if program.is_gaussian and program.scale in ("", "all"):
        evidence = gaussian_evidence(program)
        assert Exact(program, 1).expected("elbo")[0] <= evidence + 1e-9  # of second degree: exact with two nodes
        whole = Exact(program, k)
        if whole.tolerance:
            assert whole.expected("iwae")[0] <= evidence + whole.tolerance
    if not is_subsampled_inside(program):
        check_bounds(program, k, rows)
        check_minibatches(program, k)


def check_random(program, rows):
    """Hold estimators with noise of their own to the exact gradient.

    Of some 20,000 comparisons of a mean of 2000 with its exact value, one beyond seven standard errors is expected by
    chance once in 10^7 runs if means are normal, and well below once in 10^3 with the tails of these bounded draws.
    """
    exact = Exact(program, 1, rows)
    expected = exact.expected("elbo")[1]
    roots = not any(site.guide_parents for site in program.guide_sites)
    for gradient in ["disarm"] + ["rebar"] * roots:
        elbo = ScoreFunction_ELBO(2, gradient=gradient, max_plate_nesting=program.nesting + 1)
        for name, sample in sampled_gradient(elbo, exact, 2000).items():
            error = float(sample.std()) / math.sqrt(len(sample)) if len(sample) > 1 else 0.0
            distance = abs(float(sample.mean()) - expected[name])
            assert distance <= 7 * error + 1e-9, (
                f"{gradient}: gradient in {name} {float(sample.mean())}, exact {expected[name]}, z {distance / error}"
            )


def local_plates(program):
    """Plates inside which a bound may take its log: nothing outside them depends on what is inside."""
    found = []
    for plates in [{"a"}, {"b"}, {"a", "b"}]:
        inside = {site.name for site in program.drawn.values() if plates <= set(site.plates)}
        shared = {site.name for site in program.drawn.values()} - inside
        outside = [site for site in (*program.model_sites, *program.guide_sites) if not plates <= set(site.plates)]
        above = {name for site in outside for name in (*site.parents, *getattr(site, "guide_parents", ()))}
        others = {name for site in program.model_sites if plates <= set(site.plates) for name in site.plates} - plates
        whole = all(program.frames[name].batch == program.frames[name].size for name in others)
        if inside and shared and not above & inside and whole:
            found.append((tuple(sorted(plates)), shared))
    return found


def check_local(program, rows):
    """Hold the bound with its log inside some plates to its exact value and gradient."""
    choices = local_plates(program)
    if not choices:
        return
    plates, shared = program.choose("local", choices)
    exact = Exact(program, 2, rows, kept=frozenset(plates), shared=shared)
    if exact.size > 2 * CAP:  # plates of the weights that this log is not taken inside have elements of their own
        return
    value = exact.local_value()
    expected = exact.gradient((exact.log_probability.exp() * value).sum())
    for gradient in ("pathwise", "dreg"):
        vectorize = program.number("local", gradient) > -0.5
        elbo = IWAE_ELBO(1, gradient, (REPLICATES, *plates), local_particles=2, vectorize_particles=vectorize)
        if gradient == "dreg" and len({exact.leaf_scale(site) for site in program.drawn.values()}) > 1:
            continue
        found = Found(elbo, exact)
        assert close(found.total, value.sum().item(), 1e-9), f"local {gradient}: {found.total}, exact {value.sum()}"
        tolerance = exact.tolerance if gradient == "dreg" else 1e-8
        for name, slope in expected.items():
            assert tolerance is None or close(found.gradient[name], slope, tolerance), (
                f"local {gradient}: gradient in {name} {found.gradient[name]}, exact {slope}"
            )


def check_bounds(program, k, rows):
    """Hold a loss's expected values to the evidence, and to those with fewer particles."""
    if program.scale in ("kl", "obs"):  # annealed: what weighs the combinations would stand inside the log
        return
    nodes = Exact(program, k, rows).nodes
    values = []
    for fewer in range(1, k + 1):
        exact = Exact(program, fewer, rows, nodes=nodes)
        values.append(expected_value(IWAE_ELBO(fewer, max_plate_nesting=program.nesting + 1), exact))
        assert close(values[-1], exact.expected("iwae")[0], 1e-8), f"IWAE, K = {fewer}: {values[-1]}"
    chain = [*values, exact.evidence()]
    assert all(low <= high + 1e-9 for low, high in zip(chain, chain[1:], strict=False)), f"not in order: {chain}"


def check_minibatches(program, k):
    """Average value and gradient over all minibatches, and compare with those on all rows."""
    batches = minibatches(program)
    if len(batches) == 1:
        return
    whole = Exact(program, k)
    nodes, tolerance = whole.nodes, whole.tolerance
    those = [c for c in cases(program, k) if c.follows == c.bound and (tolerance or not c.integrates)]
    those = [c for c in those if not refusal(c, whole)]
    if not those:
        return
    case = program.choose("minibatch case", those)
    value, gradient = whole.expected(case.bound)
    parts = [Exact(program, k, rows, nodes=nodes) for rows in batches]
    exact = [part.expected(case.bound)[0] for part in parts]
    assert close(sum(exact) / len(exact), value, 1e-8)
    found = [
        Found(case.make(max_plate_nesting=program.nesting + 1), part, case.calls, case.enumerated) for part in parts
    ]
    for name, slope in gradient.items():
        mean = sum(f.gradient[name] for f in found) / len(found)
        assert close(mean, slope, tolerance if case.integrates else 1e-8), (
            f"{case.name}: gradient in {name} over minibatches {mean}, on all rows {slope}"
        )


SETTINGS = settings(
    database=None,
    deadline=None,
    derandomize=True,
    print_blob=False,
    report_multiple_bugs=False,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


def run(kind, examples, shard, room=6, patience=20.0):
    """Check distinct programs and return how many; the search for a smaller one that fails ends after some seconds."""
    passed, failed = set(), set()
    until = math.inf

    def one(program):
        nonlocal until
        name = repr(program)
        if name in passed or (time.monotonic() > until and name not in failed):
            return
        note(name)
        try:
            check(program, room)
        except BaseException:
            failed.add(name)
            until = min(until, time.monotonic() + patience)
            raise
        passed.add(name)

    seed(shard)(settings(SETTINGS, max_examples=examples)(given(programs(KINDS[kind]))(one)))()
    return len(passed)


@pytest.mark.parametrize("name", KNOWN)
def test_known_programs_are_exact(name):
    check(KNOWN[name], room=100)


@pytest.mark.parametrize("kind", KINDS)
def test_random_programs_are_exact(kind):
    assert run(kind, 16, 0) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(1, 22))
def test_two_thousand_random_programs_are_exact(shard):
    """At least 100 a shard, so 2100 in all."""
    assert run(list(KINDS)[shard % 3], 140, shard, room=5) >= 100


CONJUGATE_LOSSES = {
    "pathwise": partial(IWAE_ELBO, gradient="pathwise"),
    "stl": partial(IWAE_ELBO, gradient="stl"),
    "dreg": partial(IWAE_ELBO, gradient="dreg"),
    "vr": partial(VRIWAE_ELBO, 0.4),
    "ciwae": partial(CIWAE_ELBO, 0.3),
    "piwae": partial(PIWAE_ELBO, num_groups=1),
}


def conjugate_gradient(elbo, program, factor, replicates=1, noise=0):
    """Return the value per replicate and the gradient of each."""
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(noise)
        param = pyro.param("factor", torch.full((replicates, 1), factor))
        value = -elbo.loss_and_grads(*program.pair(replicates)) / replicates
        return value, -param.grad.flatten()


def check_conjugate(program, k):
    """At the posterior a bound is the evidence at every draw; elsewhere it lies below, and gradients agree in mean."""
    note(repr(program))
    scale = program.size / len(program.rows)
    evidence = scale * program.evidence()[list(program.rows)].sum().item()
    vectorize = program.seed % 3 > 0
    for name, make in CONJUGATE_LOSSES.items():
        value, gradient = conjugate_gradient(make(num_particles=k, vectorize_particles=vectorize), program, 1.0)
        assert close(value, evidence, 1e-8), f"{name}: {value}, evidence {evidence}"
        if name in ("stl", "dreg", "vr"):  # "auto" is doubly reparameterised for several particles
            assert k == 1 and name == "vr" or close(gradient.item(), 0.0, 1e-8), f"{name}: gradient {gradient.item()}"
    elbo = IWAE_ELBO(k, max_plate_nesting=2)
    values = [conjugate_gradient(elbo, program, 0.8, 100, i)[0] for i in range(16)]
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / 4
    assert mean <= evidence + 8 * error, f"{mean} +- {error}, evidence {evidence}"  # Student's t at 15: 4e-7
    gradients = [conjugate_gradient(IWAE_ELBO(k, g), program, 0.8, 2000)[1] for g in ("pathwise", "dreg")]
    difference = gradients[0] - gradients[1]  # at the same draws; see `check_random` for the threshold
    error = float(difference.std()) / math.sqrt(len(difference))
    assert abs(float(difference.mean())) <= 7 * error, f"{float(difference.mean())} +- {error}"


def test_conjugate_programs():
    case = given(conjugates(), st.integers(1, 4))(check_conjugate)
    seed(0)(settings(SETTINGS, max_examples=10)(case))()


@pytest.mark.slow
def test_two_hundred_conjugate_programs():
    case = given(conjugates(), st.integers(1, 4))(check_conjugate)
    seed(1)(settings(SETTINGS, max_examples=200)(case))()


def test_a_value_that_is_only_kept_has_no_elements_to_sum():
    """`pyro.deterministic` has no density: it makes no cost, and no plate too small for one."""

    def model():
        with pyro.plate("rows", 4, 2):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(2))

    def guide():
        with pyro.plate("rows", 4, 2):
            z = pyro.sample("z", dist.Bernoulli(pyro.param("p", torch.tensor(0.5))))
            pyro.deterministic("half", z / 2)

    assert ScoreFunction_ELBO(2).explain(model, guide)["z"].downstream == ("x", "z")
    assert math.isfinite(ScoreFunction_ELBO(2).loss_and_grads(model, guide))
