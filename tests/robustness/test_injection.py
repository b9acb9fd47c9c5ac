"""What is not finite ends in an error that names it, leaves everything as it was, and the next good step works."""

import math

import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from pyro.infer import SVI

from pyro_elbo_ext.elbo.base import NonFiniteError
from tests.robustness.cases import (
    BITS,
    ENGINES,
    GUIDES,
    LOSSES,
    NEVER,
    OPTIMS,
    PATHS,
    Breaks,
    assert_finite,
    assert_same,
    bits_guide,
    bits_model,
    make_svi,
    plain_guide,
    plain_model,
    state_of,
    steep_guide,
    steep_model,
    take,
)

RANDOM = {
    "derandomize": True, "database": None, "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}  # fmt: skip


def expected(loss, policy, log_w):
    """The loss by hand where a step is to succeed, else None."""
    bad = ~log_w.isfinite()
    invalid = bad & (log_w != -math.inf)
    if (policy == "raise" and invalid.any()) or (bad.any() and not loss.zeros) or bad.all(0).any():
        return None
    values = [f(log_w.masked_fill(bad, -math.inf)).sum() for f in (loss.value, loss.guide) if f is not None]
    return -float(values[0]) if all(map(math.isfinite, values)) else None  # no weight is left in half of them, say


@st.composite
def injections(draw, names=tuple(LOSSES)):
    name = draw(st.sampled_from(names))
    policy = draw(st.sampled_from(["raise", "drop"] if LOSSES[name].drops else ["raise"]))
    where = draw(st.sampled_from(["factor", "model", "guide"]))
    value = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    return name, policy, where, value, draw(st.floats(-1.5, 2.5)), draw(st.integers(0, 10**6))


def check_injection(name, policy, where, value, above, seed):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    loss, pair = LOSSES[name], Breaks(where, value)
    elbo = loss.make(num_particles=loss.particles, **({"nonfinite": policy} if loss.drops else {}))
    svi = SVI(pair.model, pair.guide, OPTIMS["adam"](), elbo)
    assert math.isfinite(svi.step(NEVER))
    before, loc, scale = state_of(svi), *(pyro.param(n).detach().double().clone() for n in ("m", "s"))
    pair.seen.clear()
    site = "broken" if where == "factor" else "z"
    try:
        found = svi.step(above)
    except NonFiniteError as error:
        found = None
        assert f"{'guide' if where == 'guide' else 'model'} site '{site}'" in str(error)
        assert "Nothing was updated" in str(error)
        assert_same(before, state_of(svi))
    if loss.value is not None:
        pair.seen = pair.seen[: loss.particles if name == "looped" else 1]
        hand = expected(loss, policy, pair.log_weight(above, loc, scale))
        note(f"{found} where {hand} is expected")
        assert (found is None) == (hand is None)
        assert found is None or found == pytest.approx(hand, rel=1e-9)
    assert found is None or math.isfinite(found)
    assert_finite(svi)
    assert math.isfinite(svi.step(NEVER))
    assert_finite(svi)


@given(injections())
@settings(max_examples=150, **RANDOM)
def test_random_log_densities_that_are_not_finite(injection):
    check_injection(*injection)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_many_random_log_densities_that_are_not_finite(name):
    @given(injections((name,)))
    @settings(max_examples=300, **RANDOM)
    def check(injection):
        check_injection(*injection)

    check()


def check_failing(engine, svi, good, bad, match):
    """A good step, a bad one, which changes nothing, and a good one."""
    assert math.isfinite(take(engine, svi, good))
    before = state_of(svi)
    if engine == "fit, skip":
        assert math.isnan(take(engine, svi, bad))
    else:
        with pytest.raises(NonFiniteError, match=match):
            take(engine, svi, bad)
    assert_same(before, state_of(svi))
    assert math.isfinite(take(engine, svi, good))
    assert_finite(svi)
    with pytest.raises(AssertionError):
        assert_same(before, state_of(svi))


ONE, ZERO = torch.ones(()), torch.zeros(())


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_that_is_not_finite_of_a_loss_that_is(name):
    """A root at 0, of a parameter."""
    loss = LOSSES[name]
    svi = SVI(plain_model, steep_guide, OPTIMS["adam"](), loss.make(num_particles=loss.particles))
    check_failing("svi", svi, ONE, ZERO, "gradient of parameter 'm' is nan although the loss|a derivative that is not")


@pytest.mark.parametrize("name", PATHS)
def test_a_path_that_is_not_finite(name):
    """A root at 0, of a latent value."""
    loss = LOSSES[name]
    svi = SVI(steep_model, plain_guide, OPTIMS["adam"](), loss.make(num_particles=loss.particles))
    check_failing("svi", svi, ONE, ZERO, "gradient of parameter '[ms]' is nan|a derivative that is not finite")


WIDE = [
    pytest.param(name, engine, optim, marks=() if name == "stl" and optim != "clipped" else pytest.mark.slow)
    for name in LOSSES
    for engine in ENGINES
    for optim in OPTIMS
]


@pytest.mark.parametrize(("name", "engine", "optim"), WIDE)
def test_every_engine_and_optimiser_refuses_it(name, engine, optim, uncompiled):
    loss = LOSSES[name]
    elbo = loss.make(num_particles=loss.particles)
    check_failing(engine, make_svi(engine, plain_model, steep_guide, OPTIMS[optim](), elbo), ONE, ZERO, "finite|is nan")


FAST = ["svi", pytest.param("compiled", marks=pytest.mark.slow), "fit, skip"]


@pytest.mark.parametrize("guide", [name for name in GUIDES if "flow" not in name])
@pytest.mark.parametrize("engine", FAST)
def test_every_guide_stays_as_it_was(guide, engine, uncompiled):
    svi = make_svi(engine, steep_model, GUIDES[guide](steep_model), OPTIMS["adam"](), LOSSES["pathwise"].make(4))
    check_failing(engine, svi, ONE, ZERO, "finite|is nan")


@pytest.mark.parametrize("guide", [name for name in GUIDES if "flow" in name])
@pytest.mark.parametrize("engine", FAST)
def test_flows_leave_such_draws_out_and_count_them(guide, engine, uncompiled):
    guide = GUIDES[guide](steep_model)
    svi = make_svi(engine, steep_model, guide, OPTIMS["adam"](), LOSSES["pathwise"].make(4))
    assert math.isfinite(take(engine, svi, ONE))
    assert guide.num_dropped == 0
    assert math.isfinite(take(engine, svi, ZERO))
    assert guide.num_dropped > 0
    assert_finite(svi)
    assert math.isfinite(take(engine, svi, ONE))
    assert_finite(svi)


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bits_that_cannot_be_weighed(name, value):
    loss = BITS[name]
    svi = SVI(bits_model, bits_guide, OPTIMS["adam"](), loss.make(num_particles=loss.particles))
    check_failing("svi", svi, 0.0, value, "site 'broken'|gradient of parameter 'logits'|not finite")


@pytest.mark.parametrize("name", ["stl", "leave-one-out", "mean-field", "price"])
@pytest.mark.parametrize("validate", [True, False], ids=["validated", "not validated"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["m", "s"])
def test_a_parameter_that_is_not_finite(name, validate, value, which):
    """Refused, by Pyro's validation where that looks, and the parameter can be put right."""
    loss = LOSSES[name]
    svi = SVI(plain_model, plain_guide, OPTIMS["adam"](), loss.make(num_particles=loss.particles))
    svi.step(ONE)
    good, leaf = state_of(svi), pyro.get_param_store()._params[which]
    with torch.no_grad():
        leaf[1] = value
    with (
        pyro.validation_enabled(validate),
        pytest.raises(ValueError, match="site '[xz]'|parameters? (loc|scale)|Nothing"),
    ):
        svi.step(ONE)
    assert not leaf[1].isfinite()
    with torch.no_grad():
        leaf.copy_(good[0][which])
    assert_same(good, state_of(svi))
    assert math.isfinite(svi.step(ONE))
    assert_finite(svi)


def test_what_was_there_of_a_gradient_stays():
    """Added to where it is finite, and left alone where it is not."""
    elbo = LOSSES["pathwise"].make(2)
    elbo.loss_and_grads(plain_model, steep_guide, ONE)
    before = {name: leaf.grad for name, leaf in pyro.get_param_store().named_parameters()}
    kept = {name: grad.clone() for name, grad in before.items()}
    with pytest.raises(NonFiniteError):
        elbo.loss_and_grads(plain_model, steep_guide, ZERO)
    for name, leaf in pyro.get_param_store().named_parameters():
        assert leaf.grad is before[name] and torch.equal(leaf.grad, kept[name])
    torch.manual_seed(1)
    elbo.loss_and_grads(plain_model, steep_guide, ONE)
    added = {name: leaf.grad.clone() for name, leaf in pyro.get_param_store().named_parameters()}
    for _, leaf in pyro.get_param_store().named_parameters():
        leaf.grad = None
    torch.manual_seed(1)
    elbo.loss_and_grads(plain_model, steep_guide, ONE)
    for name, leaf in pyro.get_param_store().named_parameters():
        torch.testing.assert_close(added[name], kept[name] + leaf.grad)
