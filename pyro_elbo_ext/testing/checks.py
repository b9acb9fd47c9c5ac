r"""The checks of the conformance suite."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import ClippedAdam
from torch import Tensor

from pyro_elbo_ext.testing.discrete import belief_checks, bit_minibatches, plate_checks, rebar_checks, toy_checks
from pyro_elbo_ext.testing.measure import Check, MakeELBO, compare, sample_gradients, spread_slope
from pyro_elbo_ext.testing.problems import (
    GAP_CONSTANT,
    GOLDEN_GRADIENT,
    GOLDEN_HIERARCHY,
    GOLDEN_IWAE,
    GOLDEN_SCALE_GRADIENT,
    LOG_EVIDENCE,
    amortised_mixture,
    conjugate_normal,
    hierarchical_guide,
    many_normals,
)
from pyro_elbo_ext.tracing import forked_rng

__all__ = ["Check", "conformance"]


def _golden(make: MakeELBO, size: int, gradient: str | None, scored: bool, min_particles: int) -> list[Check]:
    checks = []
    for k, expected in GOLDEN_IWAE.items():
        if k < min_particles:
            continue
        problem = conjugate_normal(size, scored=scored)
        values, grads = sample_gradients(make(num_particles=k), problem, calls=20, seed=k)
        checks.append(compare(f"golden value, K = {k}", values, expected))
        if gradient is not None:
            kind = "iwae" if gradient == "bound" else gradient
            checks.append(compare(f"golden gradient in the mean, K = {k}", grads["m"], GOLDEN_GRADIENT[kind][k]))
        if gradient == "bound":
            checks.append(compare(f"golden gradient in the scale, K = {k}", grads["s"], GOLDEN_SCALE_GRADIENT[k]))
    return checks


def _hierarchy(make: MakeELBO, size: int) -> list[Check]:
    _, grads = sample_gradients(make(num_particles=3), hierarchical_guide(size), calls=20, seed=5)
    return [
        compare(f"two-layer guide, {name}", grads[name], expected, rounding=4e-4)
        for name, expected in GOLDEN_HIERARCHY.items()
    ]


def _gap(make: MakeELBO, size: int) -> Check:
    values, _ = sample_gradients(make(num_particles=16), conjugate_normal(size, 0.6, math.sqrt(0.6)), calls=40, seed=7)
    exact = GAP_CONSTANT / 32
    # The constant is the leading term; the next one is smaller by a factor of order 1/K.
    return compare("gap to the evidence, 2 K gap -> Var(w) / Z^2", LOG_EVIDENCE - values, exact, rounding=exact / 8)


def _below_evidence(make: MakeELBO, size: int) -> Check:
    values, _ = sample_gradients(make(num_particles=4), conjugate_normal(size), calls=20, seed=11)
    error = float(values.std()) / math.sqrt(values.numel())
    mean = float(values.mean())
    detail = f"{mean:.4f} +- {error:.4f}, evidence {LOG_EVIDENCE:.4f}"
    return Check("value <= evidence", mean < LOG_EVIDENCE + 4 * error, detail)


def _gradient_of_value(make: MakeELBO, size: int, scored: bool) -> Check:
    """Compare the mean gradient with a central difference of the value at common random numbers."""
    step = 1e-3
    elbo = make(num_particles=4)
    problem = conjugate_normal(size, scored=scored)
    ends = []
    for sign in (1, -1):
        moved = problem._replace(params={**problem.params, "m": problem.params["m"] + sign * step})
        ends.append(sample_gradients(elbo, moved, calls=20, seed=13)[0])
    slopes = (ends[0] - ends[1]) / (2 * step)
    _, grads = sample_gradients(elbo, problem, calls=20, seed=17)
    per_call = grads["m"].reshape(20, -1).mean(1)
    error = math.sqrt((float(slopes.var()) + float(per_call.var())) / 20)
    distance = abs(float(slopes.mean()) - float(per_call.mean()))
    detail = f"gradient {float(per_call.mean()):.4f}, slope of the value {float(slopes.mean()):.4f} +- {error:.4f}"
    return Check("gradient is the value's", distance < 4 * max(error, 1e-9), detail)


def _subsampling(make: MakeELBO, size: int) -> list[Check]:
    problem, evidence = many_normals(max(size // 100, 50))
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for batch in (20, 4, 1):
        elbo = make(num_particles=8)
        values, found = sample_gradients(elbo, problem, batch, calls=200, seed=19 + batch)
        results[batch] = values, found["m"].reshape(200, -1).mean(1)
    full_value, full_grad = results[20]
    checks = []
    for batch, (values, grads) in results.items():
        error = math.sqrt((float(values.var()) + float(full_value.var())) / 200)
        shift = float(values.mean() - full_value.mean())
        slack = math.sqrt((float(grads.var()) + float(full_grad.var())) / 200)
        drift = float(grads.mean() - full_grad.mean())
        held = (
            abs(shift) <= 4 * error + 1e-6
            and abs(drift) <= 4 * slack + 1e-6
            and float(values.mean()) < evidence + 4 * error
        )
        detail = f"value {float(values.mean()):.2f}, gradient {float(grads.mean()):.2f}, evidence {evidence:.2f}"
        if batch < 20:
            detail += f"; full batch {float(full_value.mean()):.2f}, {float(full_grad.mean()):.2f}"
        checks.append(Check(f"minibatch of {batch} in 20", held, detail))
    return checks


def _landing(make: MakeELBO, size: int, scored: bool) -> Check:
    posterior = conjugate_normal(min(size, 1000), 0.75, math.sqrt(0.5), scored=scored)
    _, grads = sample_gradients(make(num_particles=4), posterior, seed=23)
    largest = max(float(grad.abs().max()) for grad in grads.values())
    return Check("no variance at the posterior", largest < 1e-6, f"largest gradient {largest:.1e}")


def _improves(make: MakeELBO) -> Check:
    """Train an encoder of a mixture with few and many particles; a step that does nothing stays above 0.5."""
    errors = {}
    for k in (2, 20):
        with forked_rng(), pyro.get_param_store().scope():
            torch.manual_seed(47)
            mixture = amortised_mixture()
            svi = SVI(mixture.model, mixture.guide, ClippedAdam({"lr": 0.01}), make(num_particles=k))
            for _ in range(1500):
                svi.step(mixture.sample(100))
            errors[k] = mixture.error()
    held = errors[20] < 0.15 and errors[20] < 0.8 * errors[2]
    return Check("mixture improves with particles", held, f"error {errors[2]:.3f} at K = 2, {errors[20]:.3f} at K = 20")


def conformance(
    make: MakeELBO,
    bound: str | None = None,
    gradient: str | None = "bound",
    zero_variance: bool = False,
    slope: tuple[float, float] | None = None,
    size: float = 1.0,
    scored: bool = False,
    improves: bool = False,
    min_particles: int = 1,
) -> list[Check]:
    """Run a loss through the suite.

    Parameters, random state and settings are left as they were. What a loss refuses on bits by a ValueError or a
    NotImplementedError does not apply to it.

    Args:
        make: returns the loss for ``num_particles=K``.
        bound: ``"iwae"`` or ``"elbo"`` to hold values and gradients to that bound's; None for any.
        gradient: what the guide's gradient estimates: ``"bound"``, ``"rws"``, ``"iwae+rws"``, or None to leave it out.
        zero_variance: the gradient has no variance where the guide is the posterior.
        slope: interval for the slope of log sd against log K.
        size: factor on the number of replicates; 1 makes 10^6 draws a golden value.
        scored: hold the gradient to continuous problems whose guide is not to be reparameterised.
        improves: train a mixture's encoder, which gets better with particles under wake-sleep.
        min_particles: fewest particles that the loss takes.

    Returns:
        The checks, a failure of the loss itself among them.
    """
    replicates = max(int(50_000 * size), 200)
    jobs: list[tuple[str, Callable[[], list[Check]]]] = [
        ("value <= evidence", lambda: [_below_evidence(make, replicates)]),
        ("minibatches", lambda: _subsampling(make, replicates)),
    ]
    if gradient == "bound":
        jobs.append(("gradient is the value's", lambda: [_gradient_of_value(make, replicates, scored)]))
    if bound == "iwae":
        jobs.append(("golden values", lambda: _golden(make, replicates, gradient, scored, min_particles)))
        jobs.append(("gap", lambda: [_gap(make, replicates)]))
        if gradient == "bound" and not scored:
            jobs.append(("two-layer guide", lambda: _hierarchy(make, replicates)))
    if zero_variance:
        jobs.append(("no variance at the posterior", lambda: [_landing(make, replicates, scored)]))
    if slope is not None:
        jobs.append(("slope", lambda: [_slope(make, slope, scored)]))
    if improves:
        jobs.append(("mixture improves with particles", lambda: [_improves(make)]))
    return [check for name, job in jobs for check in _run(name, job, refusable=False)] + [
        check for name, job in _discrete(make, replicates, bound, gradient) for check in _run(name, job, refusable=True)
    ]


def _discrete(
    make: MakeELBO, replicates: int, bound: str | None, gradient: str | None
) -> list[tuple[str, Callable[[], list[Check]]]]:
    jobs: list[tuple[str, Callable[[], list[Check]]]] = [
        ("belief network, summed over all states", lambda: belief_checks(make, replicates, bound, gradient)),
        ("minibatch of 3 in 12, bits", lambda: bit_minibatches(make, replicates)),
        ("gradient of a row, bits", lambda: plate_checks(make, replicates)),
    ]
    if bound == "iwae" and gradient == "bound":
        jobs.append(("one bit", lambda: toy_checks(make, replicates)))
    if bound == "elbo" and gradient == "bound":
        jobs.append(("(b - 0.499)^2", lambda: rebar_checks(make, replicates)))
    return jobs


def _run(name: str, job: Callable[[], list[Check]], refusable: bool) -> list[Check]:
    try:
        return job()
    except Exception as error:  # whatever a foreign loss raises is its result
        refused = refusable and isinstance(error, (ValueError, NotImplementedError))
        detail = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
        return [Check(name, None if refused else False, detail)]


def _slope(make: MakeELBO, interval: tuple[float, float], scored: bool) -> Check:
    slope = spread_slope(make, scored=scored)
    held = interval[0] <= slope <= interval[1]
    return Check("slope of log sd in log K", held, f"{slope:.2f}, expected in [{interval[0]}, {interval[1]}]")
