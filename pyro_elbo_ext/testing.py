r"""A conformance suite for losses of ``pyro.infer.SVI``: exact answers any ELBO class can be held to.

:func:`conformance` runs a loss through problems whose evidence, bounds and gradients are known to many digits, and
returns a list of :class:`Check`. Every statement is a z-test at a fixed seed over many replicates, which one vectorised
run holds in a plate of their own.

>>> from pyro_elbo_ext import IWAE_ELBO
>>> all(check.passed for check in conformance(IWAE_ELBO, bound="iwae", size=0.05))
True

From a shell, ``python -m pyro_elbo_ext.testing module:ClassName`` prints the table for a class that takes
``num_particles``, and exits with 0 only if nothing failed.

The golden values are those of z ~ N(0, 1), x ~ N(z, 1), x = 1.5 and q = N(0.2, 0.9^2), by 80-node Gauss-Hermite
quadrature. The slopes are those of Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018,
arXiv:1802.04537) and Doubly Reparameterized Gradient Estimators (Tucker et al., 2018, arXiv:1810.04152); the gap
constant is Theorem 3 of Importance Weighting and Variational Inference (Domke, Sheldon, 2018, arXiv:1808.09034); the
linear VAE's optimum is that of Don't Blame the ELBO! (Lucas et al., 2019, arXiv:1911.02469).
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_elbo_ext.tracing import forked_rng

__all__ = [
    "Check",
    "GOLDEN_GRADIENT",
    "GOLDEN_IWAE",
    "LOG_EVIDENCE",
    "Problem",
    "conformance",
    "conjugate_normal",
    "hierarchical_guide",
    "linear_vae_optimum",
    "main",
    "many_normals",
    "sample_gradients",
    "spread_slope",
    "z_score",
]

LOG_EVIDENCE = -1.828012
GOLDEN_IWAE = {1: -2.199299, 2: -1.972623, 3: -1.914307, 4: -1.889118}
# Gradient of the objective in the mean of q, by number of particles. "iwae+rws" is what sticking-the-landing estimates.
GOLDEN_GRADIENT = {
    "iwae": {1: 1.100000, 2: 0.493536, 3: 0.299964, 4: 0.211743},
    "iwae+rws": {1: 1.100000, 2: 0.867897, 3: 0.793814, 4: 0.760050},
}
GOLDEN_SCALE_GRADIENT = {1: -0.688889, 2: -0.065883, 3: 0.010639, 4: 0.023391}  # of IWAE, in the scale of q
GAP_CONSTANT = 0.047313  # relative variance of a weight under q = N(0.6, 0.6), the second a variance
# Gradient of IWAE with K = 3 for the two-layer guide: 2.5 10^7 draws of plain tensor code, standard error 2e-4.
GOLDEN_HIERARCHY = {"m": 0.0632, "log_s1": 0.0001, "a": 0.2316, "c": 0.4674, "log_s2": 0.2481}

MakeELBO = Callable[..., ELBO]


class Check(NamedTuple):
    """One statement and whether it held.

    Attributes:
        name: what was asked.
        passed: whether it held; None where it does not apply.
        detail: the numbers.
    """

    name: str
    passed: bool | None
    detail: str


class Problem(NamedTuple):
    """A model/guide pair of which everything is known.

    Attributes:
        model: takes the size of the minibatch where it has one.
        guide: likewise.
        params: initial values of the guide's parameters; each replicate has its own along the first dimension.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    params: Mapping[str, Tensor]


def _full(size: int, value: float) -> Tensor:
    return torch.full((size,), value, dtype=torch.float64)


def conjugate_normal(replicates: int, loc: float = 0.2, scale: float = 0.9, x: float = 1.5) -> Problem:
    """Return z ~ N(0, 1), x ~ N(z, 1) with q = N(m, s^2), once for each replicate."""
    observed = _full(replicates, x)

    def model() -> None:
        with pyro.plate("replicates", replicates, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(observed), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=observed)

    def guide() -> None:
        m, s = pyro.param("m"), pyro.param("s")
        with pyro.plate("replicates", replicates, dim=-1):
            pyro.sample("z", dist.Normal(m, s))

    return Problem(model, guide, {"m": _full(replicates, loc), "s": _full(replicates, scale)})


def hierarchical_guide(replicates: int) -> Problem:
    """Return z1 ~ N(0, 1), z2 ~ N(z1, 1), x ~ N(z2, 1), x = 1.2, with q(z1) q(z2 | z1)."""
    observed = _full(replicates, 1.2)
    start = {"m": 0.3, "log_s1": -0.2, "a": 0.4, "c": 0.1, "log_s2": -0.35}

    def model() -> None:
        with pyro.plate("replicates", replicates, dim=-1):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros_like(observed), 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=observed)

    def guide() -> None:
        p = {name: pyro.param(name) for name in start}
        with pyro.plate("replicates", replicates, dim=-1):
            z1 = pyro.sample("z1", dist.Normal(p["m"], p["log_s1"].exp()))
            pyro.sample("z2", dist.Normal(p["a"] * z1 + p["c"], p["log_s2"].exp()))

    return Problem(model, guide, {name: _full(replicates, value) for name, value in start.items()})


def many_normals(replicates: int, num_data: int = 20) -> tuple[Problem, float]:
    """Return z_i ~ N(0, 1), x_i ~ N(z_i, 1) in a plate that can be subsampled, and the log evidence.

    Model and guide take the size of the minibatch, which all replicates share.
    """
    data = torch.linspace(-1.5, 2.5, num_data, dtype=torch.float64)

    def model(batch: int) -> None:
        with pyro.plate("replicates", replicates, dim=-2), pyro.plate("data", num_data, batch, dim=-1) as rows:
            z = pyro.sample("z", dist.Normal(data.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[rows].expand(replicates, -1))

    def guide(batch: int) -> None:
        m, s = pyro.param("m").unsqueeze(-1), pyro.param("s").unsqueeze(-1)
        with pyro.plate("replicates", replicates, dim=-2), pyro.plate("data", num_data, batch, dim=-1):
            pyro.sample("z", dist.Normal(m, s))

    evidence = float(dist.Normal(torch.zeros_like(data), math.sqrt(2)).log_prob(data).sum())
    return Problem(model, guide, {"m": _full(replicates, 0.1), "s": _full(replicates, 0.8)}), evidence


@contextmanager
def _isolated(params: Mapping[str, Tensor], seed: int) -> Iterator[None]:
    """Use parameters and random numbers of our own, and give back what was there."""
    with forked_rng(), pyro.get_param_store().scope():
        torch.manual_seed(seed)
        for name, value in params.items():
            pyro.param(name, value.clone())
        yield


def sample_gradients(
    elbo: Any, problem: Problem, *args: Any, calls: int = 1, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what a loss gives on a problem, as an objective to be maximised.

    Args:
        elbo: the loss.
        problem: the pair, one replicate per element of its parameters.
        *args: arguments of model and guide.
        calls: how often to evaluate; random numbers differ.
        seed: of all calls together.

    Returns:
        The value per replicate of each call, ``[calls]``, and by parameter the gradient of every replicate of every
        call, ``[calls * replicates]``.
    """
    replicates = next(iter(problem.params.values())).shape[0]
    values: list[float] = []
    grads: dict[str, list[Tensor]] = {name: [] for name in problem.params}
    with _isolated(problem.params, seed):
        for _ in range(calls):
            values.append(-elbo.loss_and_grads(problem.model, problem.guide, *args) / replicates)
            for name, found in grads.items():
                leaf = pyro.param(name)
                found.append(torch.zeros_like(leaf) if leaf.grad is None else -leaf.grad.detach().clone())
                leaf.grad = None
    return torch.tensor(values, dtype=torch.float64), {name: torch.cat(found) for name, found in grads.items()}


def z_score(sample: Tensor, expected: float, rounding: float = 0.0) -> float:
    """Return how many standard errors a sample's mean is from ``expected``, forgiving its ``rounding``."""
    error = float(sample.std()) / math.sqrt(sample.numel()) if sample.numel() > 1 else math.inf
    distance = max(abs(float(sample.mean()) - expected) - rounding, 0.0)
    return distance / max(error, 1e-15)


def _compare(name: str, sample: Tensor, expected: float, rounding: float = 1e-6) -> Check:
    z = z_score(sample, expected, rounding)
    return Check(name, z < 4, f"{float(sample.mean()):.5f}, exact {expected:.5f}, z = {z:.1f}")


def spread_slope(make: MakeELBO, particles: Sequence[int] = (8, 32, 128), replicates: int = 400) -> float:
    """Return the slope of log sd of the guide's gradient against log K, close to the posterior.

    -1/2 for the total derivative of IWAE, -3/2 for the doubly reparameterised one. The problem is that of Rainforth et
    al. (20 dimensions), perturbed by 0.01.
    """
    dims, data = 20, torch.linspace(-1, 1, 20, dtype=torch.float64)

    def model() -> None:
        with pyro.plate("replicates", replicates, dim=-1):
            z = pyro.sample("z", dist.Normal(data.new_zeros(dims), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=data.expand(replicates, dims))

    def guide() -> None:
        with pyro.plate("replicates", replicates, dim=-1):
            b = pyro.param("b")
            pyro.sample("z", dist.Normal(b, math.sqrt(2 / 3)).to_event(1))

    params = {"b": (data / 2 + 0.01).expand(replicates, dims).clone()}
    spreads = []
    for k in particles:
        grads = sample_gradients(make(num_particles=k), Problem(model, guide, params), seed=k)[1]["b"]
        spreads.append(math.log(float(grads.std(0).mean())))
    logs = [math.log(k) for k in particles]
    centre = sum(logs) / len(logs)
    return sum((x - centre) * y for x, y in zip(logs, spreads, strict=True)) / sum((x - centre) ** 2 for x in logs)


def linear_vae_optimum(data: Tensor, latent_dim: int) -> float:
    """Return the largest log-likelihood of probabilistic PCA per row, in nats: the optimum of a linear VAE's ELBO.

    References:
        Probabilistic Principal Component Analysis (Tipping, Bishop, 1999).
    """
    num, dims = data.shape
    eigenvalues = torch.linalg.eigvalsh(torch.cov(data.T, correction=0)).flip(0)
    noise = eigenvalues[latent_dim:].mean()
    log_det = eigenvalues[:latent_dim].log().sum() + (dims - latent_dim) * noise.log()
    return float(-0.5 * (dims * math.log(2 * math.pi) + log_det + dims))


def _golden(make: MakeELBO, size: int, gradient: str | None) -> list[Check]:
    checks = []
    for k, expected in GOLDEN_IWAE.items():
        values, grads = sample_gradients(make(num_particles=k), conjugate_normal(size), calls=20, seed=k)
        checks.append(_compare(f"golden value, K = {k}", values, expected))
        if gradient is not None:
            kind = "iwae" if gradient == "bound" else gradient
            checks.append(_compare(f"golden gradient in the mean, K = {k}", grads["m"], GOLDEN_GRADIENT[kind][k]))
        if gradient == "bound":
            checks.append(_compare(f"golden gradient in the scale, K = {k}", grads["s"], GOLDEN_SCALE_GRADIENT[k]))
    return checks


def _hierarchy(make: MakeELBO, size: int) -> list[Check]:
    _, grads = sample_gradients(make(num_particles=3), hierarchical_guide(size), calls=20, seed=5)
    return [
        _compare(f"two-layer guide, {name}", grads[name], expected, rounding=4e-4)
        for name, expected in GOLDEN_HIERARCHY.items()
    ]


def _gap(make: MakeELBO, size: int) -> Check:
    values, _ = sample_gradients(make(num_particles=16), conjugate_normal(size, 0.6, math.sqrt(0.6)), calls=40, seed=7)
    exact = GAP_CONSTANT / 32
    # The constant is the leading term; the next one is smaller by a factor of order 1/K.
    return _compare("gap to the evidence, 2 K gap -> Var(w) / Z^2", LOG_EVIDENCE - values, exact, rounding=exact / 8)


def _below_evidence(make: MakeELBO, size: int) -> Check:
    values, _ = sample_gradients(make(num_particles=4), conjugate_normal(size), calls=20, seed=11)
    error = float(values.std()) / math.sqrt(values.numel())
    mean = float(values.mean())
    detail = f"{mean:.4f} +- {error:.4f}, evidence {LOG_EVIDENCE:.4f}"
    return Check("value <= evidence", mean < LOG_EVIDENCE + 4 * error, detail)


def _gradient_of_value(make: MakeELBO, size: int) -> Check:
    """Compare the mean gradient with a central difference of the value at common random numbers."""
    step = 1e-3
    elbo = make(num_particles=4)
    problem = conjugate_normal(size)
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
        held = abs(shift) < 4 * error and abs(drift) < 4 * slack and float(values.mean()) < evidence + 4 * error
        detail = f"value {float(values.mean()):.2f}, gradient {float(grads.mean()):.2f}, evidence {evidence:.2f}"
        if batch < 20:
            detail += f"; full batch {float(full_value.mean()):.2f}, {float(full_grad.mean()):.2f}"
        checks.append(Check(f"minibatch of {batch} in 20", held, detail))
    return checks


def _landing(make: MakeELBO, size: int) -> Check:
    posterior = conjugate_normal(min(size, 1000), 0.75, math.sqrt(0.5))
    _, grads = sample_gradients(make(num_particles=4), posterior, seed=23)
    largest = max(float(grad.abs().max()) for grad in grads.values())
    return Check("no variance at the posterior", largest < 1e-6, f"largest gradient {largest:.1e}")


def conformance(
    make: MakeELBO,
    bound: str | None = None,
    gradient: str | None = "bound",
    zero_variance: bool = False,
    slope: tuple[float, float] | None = None,
    size: float = 1.0,
) -> list[Check]:
    """Run a loss through the suite.

    Parameters, random state and settings are left as they were.

    Args:
        make: returns the loss for ``num_particles=K``.
        bound: ``"iwae"`` to hold values to IWAE's; None for any bound.
        gradient: what the gradient estimates: ``"bound"``, ``"iwae+rws"``, or None to leave it out.
        zero_variance: the gradient has no variance where the guide is the posterior.
        slope: interval for the slope of log sd against log K.
        size: factor on the number of replicates; 1 makes 10^6 draws a golden value.

    Returns:
        The checks, a failure of the loss itself among them.
    """
    replicates = max(int(50_000 * size), 200)
    jobs: list[tuple[str, Callable[[], list[Check]]]] = [
        ("value <= evidence", lambda: [_below_evidence(make, replicates)]),
        ("minibatches", lambda: _subsampling(make, replicates)),
    ]
    if gradient == "bound":
        jobs.append(("gradient is the value's", lambda: [_gradient_of_value(make, replicates)]))
    if bound == "iwae":
        jobs.append(("golden values", lambda: _golden(make, replicates, gradient)))
        jobs.append(("gap", lambda: [_gap(make, replicates)]))
        if gradient == "bound":
            jobs.append(("two-layer guide", lambda: _hierarchy(make, replicates)))
    if zero_variance:
        jobs.append(("no variance at the posterior", lambda: [_landing(make, replicates)]))
    if slope is not None:
        jobs.append(("slope", lambda: [_slope(make, slope)]))
    checks: list[Check] = []
    for name, job in jobs:
        try:
            checks.extend(job())
        except Exception as error:  # whatever a foreign loss raises is its result
            checks.append(Check(name, False, f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"))
    return checks


def _slope(make: MakeELBO, interval: tuple[float, float]) -> Check:
    slope = spread_slope(make)
    held = interval[0] <= slope <= interval[1]
    return Check("slope of log sd in log K", held, f"{slope:.2f}, expected in [{interval[0]}, {interval[1]}]")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the suite's table for ``module:ClassName`` and return 0 only if nothing failed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or arguments[0].count(":") != 1:
        sys.stderr.write("usage: python -m pyro_elbo_ext.testing module:ClassName\n")
        return 2
    module, _, name = arguments[0].partition(":")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        sys.stderr.write(f"cannot load {arguments[0]}: {error}\n")
        return 2
    checks = conformance(make, size=0.2)
    for check in checks:
        sys.stdout.write(f"{'pass' if check.passed else 'FAIL':5} {check.name:32} {check.detail}\n")
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
