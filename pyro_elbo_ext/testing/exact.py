"""Checks on normal models: values and gradients known by quadrature, in closed form, or from the value itself."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_elbo_ext.testing.measure import (
    Check,
    Claims,
    agree,
    compare,
    per_call,
    sample_gradients,
    spread_slope,
    z_score,
)  # fmt: skip
from pyro_elbo_ext.testing.problems import (
    GAP_CONSTANT,
    GOLDEN_GRADIENT,
    GOLDEN_HIERARCHY,
    GOLDEN_HIERARCHY_RWS,
    GOLDEN_IWAE,
    GOLDEN_SCALE_GRADIENT,
    LOG_EVIDENCE,
    Problem,
    conjugate_normal,
    hierarchical_guide,
    linear_gaussian,
)

__all__ = [
    "below_evidence", "drift", "gap", "golden", "gradient_of_value", "hierarchy", "landing", "mean_recognised",
    "rises", "scored_gradient", "slope",
]  # fmt: skip


def golden_gradient(c: Claims, k: int) -> float:
    """Return what the guide's gradient in the mean of q is, by quadrature."""
    return GOLDEN_GRADIENT[c.kind][1 if c.bound == "elbo" else k]


def golden(c: Claims) -> list[Check]:
    """Compare values and gradients with quadrature; the ELBO's are IWAE's with one particle, whatever K."""
    checks = []
    for k in GOLDEN_IWAE:
        if k < c.min_particles:
            continue
        known = 1 if c.bound == "elbo" else k
        problem = conjugate_normal(c.replicates, scored=c.scored)
        values, grads = sample_gradients(c.make(num_particles=k), problem, calls=20, seed=k)
        checks.append(compare(f"golden value, K = {k}", values, GOLDEN_IWAE[known]))
        if c.gradient is not None:
            checks.append(compare(f"golden gradient in the mean, K = {k}", grads["m"], golden_gradient(c, k)))
        if c.gradient == "bound":
            exact = GOLDEN_SCALE_GRADIENT[known]
            checks.append(compare(f"golden gradient in the scale, K = {k}", grads["s"], exact))
    return checks


def mean_recognised(c: Claims) -> list[Check]:
    """Check that among the means a guide's gradient may have, it has the claimed one and no other."""
    k = max(3, c.min_particles)
    if k not in GOLDEN_IWAE:
        return []
    problem = conjugate_normal(c.replicates, scored=c.scored)
    _, grads = sample_gradients(c.make(num_particles=k), problem, calls=20, seed=61)
    known = {"iwae": "bound", "rws": "rws", "iwae+rws": "iwae+rws"}
    fitting = [name for kind, name in known.items() if z_score(grads["m"], GOLDEN_GRADIENT[kind][k], 1e-6) < 4]
    check = compare(f"gradient's mean is {c.gradient}'s alone, K = {k}", grads["m"], GOLDEN_GRADIENT[c.kind][k])
    detail = f"{check.detail}; fits {', '.join(fitting) or 'none'} of {', '.join(known.values())}"
    return [check._replace(passed=fitting == [c.gradient], detail=detail)]


def scored_gradient(c: Claims) -> list[Check]:
    """Compare the gradient with quadrature where the guide is not to be reparameterised."""
    k = max(2, c.min_particles)
    problem = conjugate_normal(c.replicates, scored=True)
    _, grads = sample_gradients(c.make(num_particles=k), problem, calls=20, seed=67)
    return [compare(f"guide without a path, gradient, K = {k}", grads["m"], golden_gradient(c, k))]


def _central_difference(c: Claims, problem: Problem, name: str, k: int, calls: int = 20) -> tuple[Tensor, Tensor]:
    """Return slopes of the value at common random numbers, and gradients, ``[calls]`` of each."""
    step = 1e-3
    elbo = c.loss(k)
    ends = []
    for sign in (1, -1):
        moved = problem._replace(params={**problem.params, name: problem.params[name] + sign * step})
        ends.append(sample_gradients(elbo, moved, calls=calls, seed=13)[0])
    _, grads = sample_gradients(elbo, problem, calls=calls, seed=17)
    return (ends[0] - ends[1]) / (2 * step), per_call(grads[name], calls)


def gradient_of_value(c: Claims) -> list[Check]:
    """Compare the mean gradient with a central difference of the value at common random numbers."""
    slopes, grads = _central_difference(c, conjugate_normal(c.replicates, scored=c.scored), "m", 4)
    return [agree("gradient is the value's", grads, slopes, rounding=1e-5)]


def drift(c: Claims) -> list[Check]:
    """Check that where the guide is the posterior the gradient's mean vanishes."""
    posterior = conjugate_normal(c.replicates, 0.75, math.sqrt(0.5), scored=c.scored)
    _, grads = sample_gradients(c.loss(4), posterior, calls=4, seed=23)
    return [compare(f"no drift at the posterior, {name}", grad, 0.0) for name, grad in grads.items()]


def landing(c: Claims) -> list[Check]:
    """Check that where the guide is the posterior no single gradient is left."""
    posterior = conjugate_normal(min(c.replicates, 1000), 0.75, math.sqrt(0.5), scored=c.scored)
    _, grads = sample_gradients(c.loss(4), posterior, seed=23)
    largest = max(float(grad.abs().max()) for grad in grads.values())
    detail = f"largest gradient {largest:.1e}"
    return [Check("no variance at the posterior", largest < 1e-6, detail, found=largest, expected=0.0)]


def slope(c: Claims) -> list[Check]:
    """Check how fast the gradient's spread falls with particles."""
    low, high = c.slope or (-math.inf, math.inf)
    found = spread_slope(c.make, scored=c.scored)
    detail = f"{found:.2f}, expected in [{low}, {high}]"
    return [Check("slope of log sd in log K", low <= found <= high, detail, found=found, expected=(low + high) / 2)]


def _hierarchy_elbo() -> Mapping[str, float]:
    """Return the ELBO's gradient for the two-layer guide, in closed form up to a constant."""
    start = {name: value[0].clone().requires_grad_() for name, value in hierarchical_guide(1).params.items()}
    m, a, c = start["m"], start["a"], start["c"]
    v1, v2 = (2 * start["log_s1"]).exp(), (2 * start["log_s2"]).exp()
    squares = m**2 + v1 + ((a - 1) * m + c) ** 2 + (a - 1) ** 2 * v1 + v2  # E z1^2 + E (z2 - z1)^2
    squares = squares + (1.2 - a * m - c) ** 2 + a**2 * v1 + v2
    elbo = -squares / 2 + start["log_s1"] + start["log_s2"]
    return {name: float(g) for name, g in zip(start, torch.autograd.grad(elbo, list(start.values())), strict=True)}


def hierarchy(c: Claims) -> list[Check]:
    """Compare the gradient under a guide of two layers with the exact one, or with differences of the value."""
    problem = hierarchical_guide(c.replicates)
    if c.bound is None:
        pairs = {name: _central_difference(c, problem, name, 4, 10) for name in problem.params}
        return [agree(f"two-layer guide, {name}", g, s, rounding=1e-4) for name, (s, g) in pairs.items()]
    exact = dict(_hierarchy_elbo()) if c.bound == "elbo" else dict(GOLDEN_HIERARCHY)
    if c.bound == "iwae" and c.gradient != "bound":
        both = c.gradient == "iwae+rws"
        exact = {name: wake + both * exact[name] for name, wake in GOLDEN_HIERARCHY_RWS.items()}
    _, grads = sample_gradients(c.loss(3), problem, calls=20, seed=5)
    return [compare(f"two-layer guide, {name}", grads[name], expected, 5e-4) for name, expected in exact.items()]


def gap(c: Claims) -> list[Check]:
    """Compare the distance to the evidence with the leading term of Domke and Sheldon."""
    problem = conjugate_normal(c.replicates, 0.6, math.sqrt(0.6))
    values, _ = sample_gradients(c.make(num_particles=16), problem, calls=40, seed=7)
    exact = GAP_CONSTANT / 32
    # The constant is the leading term; the next one is smaller by a factor of order 1/K.
    return [compare("gap to the evidence, 2 K gap -> Var(w) / Z^2", LOG_EVIDENCE - values, exact, rounding=exact / 8)]


def below(name: str, values: Tensor, evidence: float) -> Check:
    """Return whether values are finite and their mean is not above the evidence."""
    mean, error = float(values.mean()), float(values.std()) / math.sqrt(values.numel())
    held = math.isfinite(mean) and mean < evidence + 4 * error + 1e-9
    return Check(name, held, f"{mean:.4f} +- {error:.4f}, evidence {evidence:.4f}", "", mean, error, evidence)


def below_evidence(c: Claims) -> list[Check]:
    """Check that a value is finite and its mean not above the evidence."""
    values, _ = sample_gradients(c.loss(4), conjugate_normal(c.replicates), calls=20, seed=11)
    return [below("value <= evidence", values, LOG_EVIDENCE)]


def rises(c: Claims) -> list[Check]:
    """Check on six correlated dimensions that the bound stays below the evidence, and does not fall with K."""
    problem, evidence = linear_gaussian(max(c.replicates // 10, 200))
    checks, last = [], None
    for k in (2, 4, 16):
        if k < c.min_particles:
            continue
        values, _ = sample_gradients(c.make(num_particles=k), problem, calls=20, seed=71 + k)
        check = below(f"linear Gaussian, value <= evidence, K = {k}", values, evidence)
        if last is not None and c.bound != "elbo":
            error = math.sqrt(float(values.var() + last.var()) / 20)
            fallen = float(last.mean() - values.mean()) > 4 * error + 1e-9
            check = check._replace(passed=bool(check.passed) and not fallen)
        checks.append(check)
        last = values
    return checks
