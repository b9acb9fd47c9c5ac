"""Checks C6 and C10 on bits: everything is summed over all states, so value and gradient are exact for any bound."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pyro_elbo_ext.bounds import ELBO, IWAE
from pyro_elbo_ext.testing.measure import Check, Claims, compare, enumerated_gradient, sample_gradients, z_score
from pyro_elbo_ext.testing.problems import (
    BELIEF_STATES,
    TOY_STATES,
    auxiliary_bit,
    auxiliary_states,
    belief_network,
    bernoulli_toy,
    rebar_toy,
)

__all__ = ["auxiliary", "belief", "rebar", "toy"]

BOUNDS: dict[str, Callable[[Tensor], Tensor]] = {"elbo": ELBO(), "iwae": IWAE()}
UNKNOWN = "neither an ELBO nor IWAE, and no attribute bound"


def belief(c: Claims) -> list[Check]:
    """Compare value and gradient on a belief network of three bits with the sum over all states."""
    k = max(2, c.min_particles)
    if k > 6:
        return [Check("belief network, summed over all states", None, f"K = {k} makes too many states")]
    elbo = c.loss(k)
    values, grads = sample_gradients(elbo, belief_network(max(c.replicates // 5, 200)), calls=25, seed=29)
    known = _known(c, elbo, values, k)
    if known is None:
        return [Check("belief network, summed over all states", None, UNKNOWN)]
    estimated = c.gradient if known is BOUNDS["iwae"] or c.gradient == "bound" else None  # rws is IWAE's alone
    value, exact = enumerated_gradient(belief_network, BELIEF_STATES, known, k, estimated or "bound")
    checks = [compare("belief network, value", values, value)]
    for name, expected in exact.items():
        if estimated or name == "theta":  # the model's parameter follows the value whatever the guide does
            checks.append(compare(f"belief network, gradient in {name}", grads[name], expected))
    return checks


def _known(c: Claims, elbo: object, values: Tensor, k: int) -> Callable[[Tensor], Tensor] | None:
    """Return the bound of a loss: as claimed, its own if it says so, or the one whose exact value it has."""
    if c.bound is not None:
        return BOUNDS[c.bound]
    own = getattr(elbo, "bound", None)
    if callable(own):
        return own
    for bound in BOUNDS.values():
        if z_score(values, enumerated_gradient(belief_network, BELIEF_STATES, bound, k)[0]) < 4:
            return bound
    return None


def toy(c: Claims) -> list[Check]:
    """Compare the gradient on one bit with its sum over all states."""
    checks = []
    for k in (2, 4):
        if k < c.min_particles:
            continue
        bound = BOUNDS[c.bound or "iwae"]
        exact = enumerated_gradient(bernoulli_toy, TOY_STATES, bound, k, c.gradient or "bound")[1]["logit"]
        _, grads = sample_gradients(c.make(num_particles=k), bernoulli_toy(c.replicates), calls=4, seed=31 + k)
        checks.append(compare(f"one bit, gradient, K = {k}", grads["logit"], exact))
    return checks


def auxiliary(c: Claims) -> list[Check]:
    """Compare value and gradient where an auxiliary site of the guide follows a bit with sum and quadrature."""
    k = max(2, c.min_particles)
    if k > 4:
        return [Check("auxiliary site after a bit", None, f"K = {k} makes too many states")]
    elbo = c.loss(k)
    values, grads = sample_gradients(elbo, auxiliary_bit(c.replicates), calls=4, seed=109)
    own = getattr(elbo, "bound", None)
    known = BOUNDS[c.bound] if c.bound is not None else own if callable(own) else None
    if known is None:
        return [Check("auxiliary site after a bit", None, UNKNOWN)]
    states, log_measure = auxiliary_states(16 if k > 2 else 24)
    value, exact = enumerated_gradient(auxiliary_bit, states, known, k, c.gradient or "bound", log_measure)
    checks = [compare("auxiliary site after a bit, value", values, value, rounding=1e-4)]
    if c.gradient is not None:
        checks.append(compare("auxiliary site after a bit, gradient", grads["logit"], exact["logit"], rounding=1e-4))
    return checks


def rebar(c: Claims) -> list[Check]:
    """Compare an ELBO's gradient with that of E (b - 0.499)^2, and report its spread."""
    checks = []
    for theta, exact in ((0.0, 5.0e-4), (2.0, 2.09987e-4)):
        _, grads = sample_gradients(c.loss(2), rebar_toy(c.replicates, theta), calls=4, seed=37)
        check = compare(f"(b - 0.499)^2, theta = {theta:g}, K = 2", grads["theta"], exact, rounding=1e-9)
        checks.append(check._replace(detail=f"{check.detail}, sd {float(grads['theta'].std()):.2e}"))
    return checks
