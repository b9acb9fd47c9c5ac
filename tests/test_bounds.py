import math

import pytest
import torch

from pyro_elbo_ext.bounds import CIWAE, ELBO, IWAE, MIWAE, VRIWAE, Bound, FunctionBound

BOUNDS = {
    "elbo": ELBO(),
    "iwae": IWAE(),
    "vr-iwae-0": VRIWAE(0.0),
    "vr-iwae": VRIWAE(0.3),
    "vr-iwae-1": VRIWAE(1.0),
    "miwae": MIWAE(3),
    "ciwae": CIWAE(0.2),
    "ciwae-0": CIWAE(0.0),
}


def log_weights():
    torch.manual_seed(0)
    return 2 * torch.randn(6, 4, 1, dtype=torch.float64)


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("quantity", ["path_weights", "doubly_reparameterized_weights"])
def test_closed_form_equals_differentiation(name, quantity):
    log_w = log_weights()
    closed, derived = (getattr(b, quantity)(log_w) for b in (BOUNDS[name], FunctionBound(BOUNDS[name])))
    assert closed.shape == log_w.shape
    torch.testing.assert_close(closed, derived)


@pytest.mark.parametrize("name", BOUNDS)
def test_path_weights_add_up_to_one(name):
    """Every bound moves by c when all log-weights do."""
    torch.testing.assert_close(BOUNDS[name].path_weights(log_weights()).sum(0), torch.ones(4, 1, dtype=torch.float64))


@pytest.mark.parametrize("name", BOUNDS)
def test_equal_weights_are_their_own_bound(name):
    log_w = torch.full((6, 2), -3.25, dtype=torch.float64)
    torch.testing.assert_close(BOUNDS[name](log_w), log_w[0])
    signal = BOUNDS[name].leave_one_out(log_w)
    torch.testing.assert_close(signal, torch.zeros_like(log_w))


def test_the_family_in_order():
    log_w = log_weights()
    values = [b(log_w) for b in (ELBO(), VRIWAE(0.7), VRIWAE(0.3), IWAE())]
    for looser, tighter in zip(values, values[1:], strict=False):
        assert (looser < tighter).all()
    assert (ELBO()(log_w) < MIWAE(2)(log_w)).all() and (MIWAE(2)(log_w) < IWAE()(log_w)).all()


@pytest.mark.parametrize("alpha, reference", [(0.0, IWAE()), (1.0, ELBO()), (1 - 1e-13, ELBO())])
def test_vriwae_limits(alpha, reference):
    torch.testing.assert_close(VRIWAE(alpha)(log_weights()), reference(log_weights()), atol=1e-10, rtol=0)


def test_leave_one_out_of_the_elbo_is_rloo():
    log_w = log_weights()
    others = (log_w.sum(0) - log_w) / 5
    torch.testing.assert_close(ELBO().leave_one_out(log_w), (log_w - others) / 6)


@pytest.mark.parametrize("fill", ["geometric", "arithmetic"])
def test_leave_one_out_of_iwae_is_vimco(fill):
    log_w = log_weights()[:, 0, 0]
    for k in range(6):
        rest = torch.cat([log_w[:k], log_w[k + 1 :]])
        mean = rest.mean() if fill == "geometric" else torch.logsumexp(rest, 0) - math.log(5)
        without = torch.logsumexp(torch.cat([rest, mean[None]]), 0)
        expected = torch.logsumexp(log_w, 0) - without
        torch.testing.assert_close(IWAE().leave_one_out(log_w, fill)[k], expected)


def test_leave_one_out_signal_holds_nothing_of_its_particle():
    """B - S_k must not change with particle k, or subtracting it would add bias."""
    log_w = log_weights()[:, 0, 0]
    moved = log_w.clone()
    moved[2] += 1.7
    for bound in BOUNDS.values():
        before, after = (bound(w) - bound.leave_one_out(w)[2] for w in (log_w, moved))
        torch.testing.assert_close(before, after)


@pytest.mark.parametrize("name", ["iwae", "vr-iwae", "miwae", "ciwae-0"])
def test_minus_infinity_is_a_zero_weight(name):
    log_w = log_weights()
    log_w[1] = -math.inf
    bound = BOUNDS[name]
    assert bound(log_w).isfinite().all()
    for b in (bound, FunctionBound(bound)):
        assert (b.path_weights(log_w)[1] == 0).all()
        assert b.path_weights(log_w).isfinite().all()
        assert b.doubly_reparameterized_weights(log_w).isfinite().all()
    assert bound.leave_one_out(log_w, "arithmetic").isfinite().all()


def test_no_overflow_in_float32():
    log_w = torch.tensor([[-1e30], [-900.0], [-1000.0]], dtype=torch.float32)
    for name in ("iwae", "vr-iwae", "ciwae"):
        assert BOUNDS[name](log_w).isfinite().all()
        assert BOUNDS[name].path_weights(log_w).isfinite().all()


BAD = {
    "alpha below 0": (lambda: VRIWAE(-0.1), "alpha must lie in"),
    "alpha above 1": (lambda: VRIWAE(1.5), "alpha must lie in"),
    "beta above 1": (lambda: CIWAE(1.5), "beta must lie in"),
    "no groups": (lambda: MIWAE(0), "num_groups"),
    "unequal groups": (lambda: MIWAE(4)(log_weights()), "multiple of num_groups"),
    "one particle left out": (lambda: IWAE().leave_one_out(torch.zeros(1, 2)), "num_particles >= 2"),
    "no value": (lambda: FunctionBound(lambda log_w: None)(log_weights()), "returned NoneType"),
    "not reduced": (lambda: FunctionBound(lambda log_w: log_w)(torch.zeros(4, 3)), "shape .4, 3. at.*shape .3,.\\."),
    "reduced too far": (lambda: FunctionBound(lambda log_w: log_w.sum())(torch.zeros(4, 3)), "returned shape"),
    "unknown fill": (lambda: IWAE().leave_one_out(torch.zeros(2), "harmonic"), "fill must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_bound_without_a_call_says_so():
    with pytest.raises(NotImplementedError, match="must define __call__"):
        Bound()(torch.zeros(2))
