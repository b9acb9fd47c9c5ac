"""Checks on bits: everything is summed over all states, so value and gradient are exact for any bound."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from pyro_elbo_ext.bounds import ELBO, IWAE
from pyro_elbo_ext.testing.measure import Check, MakeELBO, compare, enumerated_gradient, sample_gradients, z_score
from pyro_elbo_ext.testing.problems import (
    BELIEF_STATES,
    TOY_STATES,
    belief_network,
    bernoulli_toy,
    equal_rows,
    many_bits,
    rebar_toy,
)

__all__ = ["belief_checks", "bit_minibatches", "plate_checks", "rebar_checks", "toy_checks"]

BOUNDS: dict[str, Callable[[Tensor], Tensor]] = {"elbo": ELBO(), "iwae": IWAE()}


def belief_checks(make: MakeELBO, size: int, bound: str | None, gradient: str | None) -> list[Check]:
    """Compare value and gradient on a belief network of three bits with the sum over all states, K = 2."""
    elbo = make(num_particles=2)
    replicates = max(size // 5, 200)
    values, grads = sample_gradients(elbo, belief_network(replicates), calls=25, seed=29)
    known = BOUNDS[bound] if bound else _recognise(elbo, values)
    if known is None:
        return [
            Check("belief network, summed over all states", None, "neither an ELBO nor IWAE, and no attribute bound")
        ]
    value, exact = enumerated_gradient(belief_network, BELIEF_STATES, known, 2)
    checks = [compare("belief network, value", values, value)]
    for name, expected in exact.items():
        if gradient == "bound" or name == "theta":  # the model's parameter follows the value whatever the guide does
            checks.append(compare(f"belief network, gradient in {name}", grads[name], expected))
    return checks


def _recognise(elbo: object, values: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return the bound of a loss: its own if it says so, or the one whose exact value it has."""
    own = getattr(elbo, "bound", None)
    if callable(own):
        return own
    for bound in BOUNDS.values():
        if z_score(values, enumerated_gradient(belief_network, BELIEF_STATES, bound, 2)[0]) < 4:
            return bound
    return None


def toy_checks(make: MakeELBO, size: int) -> list[Check]:
    """Compare IWAE's gradient on one bit with its sum over all states."""
    checks = []
    for k in (2, 5):
        exact = enumerated_gradient(bernoulli_toy, TOY_STATES, IWAE(), k)[1]["logit"]
        _, grads = sample_gradients(make(num_particles=k), bernoulli_toy(size), calls=4, seed=31 + k)
        checks.append(compare(f"one bit, gradient, K = {k}", grads["logit"], exact))
    return checks


def rebar_checks(make: MakeELBO, size: int) -> list[Check]:
    """Compare an ELBO's gradient with that of E (b - 0.499)^2, and report its spread."""
    checks = []
    for theta, exact in ((0.0, 5.0e-4), (2.0, 2.09987e-4)):
        _, grads = sample_gradients(make(num_particles=2), rebar_toy(size, theta), calls=4, seed=37)
        check = compare(f"(b - 0.499)^2, theta = {theta:g}, K = 2", grads["theta"], exact, rounding=1e-9)
        checks.append(check._replace(detail=f"{check.detail}, sd {float(grads['theta'].std()):.2e}"))
    return checks


def plate_checks(make: MakeELBO, size: int) -> list[Check]:
    """Compare the gradient of one row with that of a hundred equal ones, over a hundred.

    One replicate a call: a loss with one weight for the whole plate would pool the replicates too.
    """
    calls = max(size // 80, 100)
    found = {}
    for num_data in (1, 100):
        _, grads = sample_gradients(make(num_particles=4), equal_rows(1, num_data), calls=calls, seed=41)
        found[num_data] = grads["logit"] / num_data
    one, many = found[1], found[100]
    error = math.sqrt(float(one.var() + many.var()) / calls)
    held = abs(float(one.mean() - many.mean())) < 4 * max(error, 1e-9)
    detail = f"{float(one.mean()):.4f} alone, {float(many.mean()):.4f} of a hundred +- {error:.4f}"
    return [Check("gradient of a row, bits", held, detail)]


def bit_minibatches(make: MakeELBO, size: int) -> list[Check]:
    """Compare value and gradient on minibatches of bits with those on the full batch."""
    problem, evidence = many_bits(max(size // 100, 50))
    found = {}
    for batch in (12, 3):
        values, grads = sample_gradients(make(num_particles=4), problem, batch, calls=200, seed=43 + batch)
        found[batch] = [values, *(grad.reshape(200, -1).mean(1) for grad in grads.values())]
    held = float(found[3][0].mean()) < evidence + 4 * float(found[3][0].std()) / math.sqrt(200)
    for full, part in zip(found[12], found[3], strict=True):
        error = math.sqrt(float(full.var() + part.var()) / 200)
        held = held and abs(float(full.mean() - part.mean())) < 4 * error
    means = [", ".join(f"{float(t.mean()):.2f}" for t in found[batch]) for batch in (3, 12)]
    return [Check("minibatch of 3 in 12, bits", held, f"value, gradient {means[0]}; full batch {means[1]}")]
