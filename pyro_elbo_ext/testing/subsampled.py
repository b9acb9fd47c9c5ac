"""Checks C8 and C9: minibatches, scales, masks and plates change a bound as they should, and not otherwise."""

from __future__ import annotations

import math
from typing import Any

from pyro import poutine
from torch import Tensor

from pyro_elbo_ext.testing.exact import below
from pyro_elbo_ext.testing.measure import Check, Claims, agree, compare, per_call, sample_gradients
from pyro_elbo_ext.testing.plated import (
    equal_normals,
    equal_rows,
    grouped_normals,
    joint_guide,
    many_bits,
    many_normals,
    masked_normals,
    nested_normals,
)
from pyro_elbo_ext.testing.problems import Problem

__all__ = ["bits", "joint", "looped", "masked", "nested", "rows_of_bits", "rows_of_normals", "scaled", "subsampling"]

USER_SCALE = 0.5


def _size(c: Claims) -> int:
    """Return how many replicates share a minibatch."""
    return max(c.replicates // 25, 100)


def _measure(
    c: Claims, problem: Problem, *batch: int, seed: int, full: bool = False, k: int = 4, **kwargs: Any
) -> dict[str, Tensor]:
    """Return by name value and gradients, one number a call; a full batch has no draw that all replicates share."""
    calls = max(c.calls // 2, 30) if full else c.calls
    values, grads = sample_gradients(c.loss(k, **kwargs), problem, *batch, calls=calls, seed=seed)
    return {"value": values, **{f"gradient in {name}": per_call(grad, calls) for name, grad in grads.items()}}


def _equal(name: str, found: dict[str, Tensor], expected: dict[str, Tensor], c: Claims, factor: float = 1.0) -> Check:
    """Compare value and gradients in one check, whose numbers are those of the one that is furthest off."""
    keep = [key for key in found if key == "value" or c.gradient is not None]
    checks = {key: agree(key, found[key], factor * expected[key], rounding=1e-6) for key in keep}
    ratios = {
        key: abs(float(t.found) - float(t.expected)) / max(float(t.error), 1e-9)  # type: ignore[arg-type]
        for key, t in checks.items()
    }
    worst = checks[max(ratios, key=lambda key: math.inf if math.isnan(ratios[key]) else ratios[key])]
    passed = all(check.passed for check in checks.values())
    return worst._replace(name=name, passed=passed, detail=f"{worst.name} {worst.detail}")


def subsampling(c: Claims) -> list[Check]:
    """Compare value and gradients on minibatches with those on the full batch, and values with the evidence."""
    problem, evidence = many_normals(_size(c))
    whole = _measure(c, problem, 20, seed=39, full=True, k=8)
    checks = [below("full batch, value <= evidence", whole["value"], evidence)]
    for batch in (4, 1):
        part = _measure(c, problem, batch, seed=19 + batch, k=8)
        check, bounded = _equal(f"minibatch of {batch} in 20", part, whole, c), below("", part["value"], evidence)
        detail = f"{check.detail}; value {bounded.detail}"
        checks.append(check._replace(passed=bool(check.passed and bounded.passed), detail=detail))
    return checks


def scaled(c: Claims) -> list[Check]:
    """Check that a scale of the user's own on the whole pair multiplies value and gradients, minibatch or not."""
    problem, _ = many_normals(_size(c))
    whole = _measure(c, problem, 20, seed=73, full=True)
    model, guide = (poutine.scale(f, scale=USER_SCALE) for f in (problem.model, problem.guide))
    pair = problem._replace(model=model, guide=guide)
    return [
        _equal(f"scale of {USER_SCALE}, {name}", _measure(c, pair, batch, seed=79, full=full), whole, c, USER_SCALE)
        for name, batch, full in (("full batch", 20, True), ("minibatch of 4 in 20", 4, False))
    ]


def masked(c: Claims) -> list[Check]:
    """Check that masked rows count as if they were left out, minibatch or not."""
    size = _size(c)
    without = _measure(c, masked_normals(size, mask=False), 6, seed=83, full=True)
    problem = masked_normals(size, mask=True)
    return [
        _equal(f"rows masked, {name}", _measure(c, problem, batch, seed=89, full=full), without, c)
        for name, batch, full in (("full batch", 12, True), ("minibatch of 4 in 12", 4, False))
    ]


def nested(c: Claims) -> list[Check]:
    """Check minibatches of groups and rows at once, and of groups that share a latent."""
    size = _size(c)
    checks = []
    for name, (problem, evidence), full, part in (
        ("minibatch of 2 in 4 groups and 3 in 5 rows", nested_normals(size), (4, 5), (2, 3)),
        ("minibatch of 2 in 4 groups, a latent each", grouped_normals(size), (4,), (2,)),
    ):
        whole, batch = _measure(c, problem, *full, seed=97, full=True), _measure(c, problem, *part, seed=101)
        check, bounded = _equal(name, batch, whole, c), below("", batch["value"], evidence)
        checks.append(check._replace(passed=bool(check.passed and bounded.passed)))
    return checks


def looped(c: Claims) -> list[Check]:
    """Compare particles run one after the other with particles run at once, on minibatches."""
    problem, _ = many_normals(_size(c))
    runs = []
    for vectorize in (True, False):
        try:
            c.loss(2, vectorize_particles=vectorize)
        except TypeError:
            return [Check("looped as vectorised", None, "the loss takes no vectorize_particles")]
        runs.append(_measure(c, problem, 10, seed=103 + vectorize, k=2, vectorize_particles=vectorize))
    return [_equal("looped as vectorised, minibatch of 10 in 20", runs[1], runs[0], c)]


def bits(c: Claims) -> list[Check]:
    """Compare value and gradients on minibatches of bits with those on the full batch."""
    problem, evidence = many_bits(_size(c))
    whole, part = _measure(c, problem, 12, seed=55, full=True), _measure(c, problem, 3, seed=46)
    check, bounded = _equal("minibatch of 3 in 12, bits", part, whole, c), below("", part["value"], evidence)
    return [check._replace(passed=bool(check.passed and bounded.passed))]


def _rows(c: Claims, name: str, make_problem: Any, parameter: str) -> list[Check]:
    """Compare the gradient of one row with that of a hundred equal ones, over a hundred.

    One replicate a call: a loss with one weight for the whole plate would pool the replicates too.
    """
    calls = max(c.replicates // 80, 100)
    found = {}
    for num_data in (1, 100):
        _, grads = sample_gradients(c.loss(4), make_problem(1, num_data), calls=calls, seed=41)
        found[num_data] = grads[parameter] / num_data
    check = agree(name, found[100], found[1], rounding=1e-9)
    one = float(found[1].std())
    spread = 100 * float(found[100].std()) / one if one > 1e-9 else 10.0
    detail = f"{check.detail}; spread of the sum {spread:.1f} times a row's"  # independent rows: sqrt(100)
    return [check._replace(passed=bool(check.passed) and spread < 20, detail=detail)]


def rows_of_normals(c: Claims) -> list[Check]:
    """Compare the gradient of a row with that of a hundred, normals."""
    return _rows(c, "gradient of a row", equal_normals, "m")


def rows_of_bits(c: Claims) -> list[Check]:
    """Compare the gradient of a row with that of a hundred, bits."""
    return _rows(c, "gradient of a row, bits", equal_rows, "logit")


def joint(c: Claims) -> list[Check]:
    """Check the value where a guide draws the rows of a plate jointly, outside it."""
    problem, evidence, elbo = joint_guide(c.replicates)
    values, _ = sample_gradients(c.loss(4), problem, calls=20, seed=107)
    check = below("guide that is joint over a plate, value", values, evidence)
    if c.bound == "elbo":
        return [compare(check.name, values, elbo)]
    return [check]
