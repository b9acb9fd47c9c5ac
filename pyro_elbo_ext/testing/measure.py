"""What a loss gives on a problem: values and gradients of many replicates, and how they spread."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_elbo_ext.testing.problems import Problem, ScoredNormal
from pyro_elbo_ext.tracing import forked_rng, run_pair

__all__ = [
    "Check",
    "Claims",
    "MakeELBO",
    "agree",
    "compare",
    "enumerated_gradient",
    "per_call",
    "sample_gradients",
    "spread_slope",
    "surrogates",
    "z_score",
]

MakeELBO = Callable[..., ELBO]


class Check(NamedTuple):
    """One statement and whether it held.

    Attributes:
        name: what was asked.
        passed: whether it held; None where it does not apply.
        detail: the numbers, or why it does not apply.
        identity: ``"C1"`` to ``"C13"``, the identity that it belongs to.
        found: the number found, in nats or nats per unit of a parameter, where there is a single one.
        error: its standard error.
        expected: what it is held to.
    """

    name: str
    passed: bool | None
    detail: str
    identity: str = ""
    found: float | None = None
    error: float | None = None
    expected: float | None = None


class Claims(NamedTuple):
    """A loss and what it is held to; the fields are the arguments of :func:`conformance`."""

    make: MakeELBO
    bound: str | None = None
    gradient: str | None = "bound"
    zero_variance: bool = False
    slope: tuple[float, float] | None = None
    scored: bool = False
    improves: bool = False
    min_particles: int = 1
    trains: bool = False
    replicates: int = 50_000

    def loss(self, num_particles: int, **kwargs: Any) -> ELBO:
        """Return the loss for a number of particles, or for the fewest it takes."""
        return self.make(num_particles=max(num_particles, self.min_particles), **kwargs)

    @property
    def kind(self) -> str:
        """Name of the golden gradient that the guide's is held to."""
        return "iwae" if self.gradient in ("bound", None) else str(self.gradient)

    @property
    def calls(self) -> int:
        """How often a minibatch is drawn, which all replicates of a call share."""
        return min(max(self.replicates // 60, 40), 200)


def compare(name: str, sample: Tensor, expected: float, rounding: float = 1e-6) -> Check:
    """Return whether a sample's mean is within four standard errors of what is expected."""
    z = z_score(sample, expected, rounding)
    mean, error = float(sample.mean()), _error(sample)
    detail = f"{mean:.5f}, exact {expected:.5f}, z = {_short(z)}"
    return Check(name, z < 4, detail, found=mean, error=error, expected=expected)


def agree(name: str, sample: Tensor, other: Tensor, rounding: float = 1e-6) -> Check:
    """Return whether the means of two samples, of tens of numbers each, are within five standard errors."""
    mean, reference = float(sample.mean()), float(other.mean())
    error = math.hypot(_error(sample), _error(other))
    z = max(abs(mean - reference) - rounding, 0.0) / max(error, 1e-15)
    detail = f"{mean:.4f}, expected {reference:.4f}, z = {_short(z)}"
    return Check(name, z < 5, detail, found=mean, error=error, expected=reference)


def _short(z: float) -> str:
    """Return a z-score's text; where nothing varies, any distance is infinitely many standard errors."""
    return "inf" if z > 1e6 else f"{z:.1f}"


def _error(sample: Tensor) -> float:
    return float(sample.std()) / math.sqrt(sample.numel()) if sample.numel() > 1 else math.inf


def per_call(grads: Tensor, calls: int) -> Tensor:
    """Return the mean over replicates of each call, ``[calls]``: those of one call share a minibatch."""
    return grads.reshape(calls, -1).mean(1)


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
    distance = max(abs(float(sample.mean()) - expected) - rounding, 0.0)
    return distance / max(_error(sample), 1e-15)


def spread_slope(
    make: MakeELBO, particles: Sequence[int] = (8, 32, 128), replicates: int = 400, scored: bool = False
) -> float:
    """Return the slope of log sd of the guide's gradient against log K, close to the posterior.

    -1/2 for the total derivative of IWAE and for VIMCO, -3/2 for the doubly reparameterised one and for OVIS. The
    problem is that of Rainforth et al. (20 dimensions), perturbed by 0.01.

    Args:
        make: returns the loss for ``num_particles=K``.
        particles: values of K.
        replicates: gradients that each spread is taken over.
        scored: the guide is not reparameterised.
    """
    dims, data = 20, torch.linspace(-1, 1, 20, dtype=torch.float64)

    def model() -> None:
        with pyro.plate("replicates", replicates, dim=-1):
            z = pyro.sample("z", dist.Normal(data.new_zeros(dims), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=data.expand(replicates, dims))

    def guide() -> None:
        with pyro.plate("replicates", replicates, dim=-1):
            b = pyro.param("b")
            normal = ScoredNormal if scored else dist.Normal
            pyro.sample("z", normal(b, math.sqrt(2 / 3)).to_event(1))

    params = {"b": (data / 2 + 0.01).expand(replicates, dims).clone()}
    spreads = []
    for k in particles:
        grads = sample_gradients(make(num_particles=k), Problem(model, guide, params), seed=k)[1]["b"]
        spreads.append(math.log(float(grads.std(0).mean())))
    logs = [math.log(k) for k in particles]
    centre = sum(logs) / len(logs)
    return sum((x - centre) * y for x, y in zip(logs, spreads, strict=True)) / sum((x - centre) ** 2 for x in logs)


def enumerated_gradient(
    make_problem: Callable[[int], Problem],
    states: Mapping[str, Tensor],
    bound: Callable[[Tensor], Tensor],
    num_particles: int,
    gradient: str = "bound",
    log_measure: Tensor | None = None,
) -> tuple[float, dict[str, float]]:
    """Return a bound's exact value and gradient on a problem with finitely many states, by summing over them all.

    Args:
        make_problem: returns the problem for a number of replicates, one parameter value each.
        states: by latent site its value in every state, ``[states, ...]``.
        bound: from log-weights ``[num_particles, *plates]`` to a value ``[*plates]``.
        num_particles: K; the sum has as many terms as there are states to the power K.
        gradient: ``"bound"``, or for the importance-weighted bound what else the guide's gradient may estimate:
            ``"rws"``, reweighted wake-sleep's wake-phi, or ``"iwae+rws"``, the sum of the two.
        log_measure: added to the states' log-density under the guide to get their log-probability, ``[states]``;
            that of a quadrature where a site is continuous.
    """
    size = next(iter(states.values())).shape[0]
    problem = make_problem(size)
    device = next(iter(problem.params.values())).device
    states = {name: value.to(device) for name, value in states.items()}
    with _isolated(problem.params, 0), torch.enable_grad():
        traces = run_pair(problem.model, problem.guide, (), {}, states)
        for trace in (traces.guide, traces.model):
            trace.compute_log_prob()
        log_q, log_p = (
            sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample")
            for trace in (traces.guide, traces.model)
        )
        draws = torch.cartesian_prod(*[torch.arange(size)] * num_particles).reshape(-1, num_particles).T
        weight = (log_q if log_measure is None else log_q + log_measure.to(device))[draws].sum(0).exp()
        value = (weight * bound((log_p - log_q)[draws])).sum()
        leaves = [pyro.param(name) for name in problem.params]
        totals = [
            torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
            for total in surrogates(gradient, value, weight, log_p[draws], log_q[draws])
        ]
    sums = [sum(float(grad.sum()) for grad in grads if grad is not None) for grads in zip(*totals, strict=True)]
    return value.item(), dict(zip(problem.params, sums, strict=True))


def surrogates(gradient: str, value: Tensor, weight: Tensor, log_p: Tensor, log_q: Tensor) -> list[Tensor]:
    """Return the tensors whose gradients add up to that of the model's and to what the guide's estimates.

    Args:
        gradient: ``"bound"``, ``"rws"`` or ``"iwae+rws"``.
        value: the bound, its gradient attached.
        weight: probability of every set of draws, ``[sets]``.
        log_p: log-density of the draws under the model, ``[num_particles, sets]``.
        log_q: the same under the guide.
    """
    if gradient == "bound":
        return [value]
    v, weight = torch.softmax(log_p - log_q, 0).detach(), weight.detach()
    wake_phi = (weight * (v * log_q)).sum()
    totals = [value if gradient == "iwae+rws" else (weight * (v * log_p)).sum(), wake_phi]
    return [total for total in totals if total.requires_grad]
