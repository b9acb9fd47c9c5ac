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

__all__ = ["Check", "MakeELBO", "compare", "enumerated_gradient", "sample_gradients", "spread_slope", "z_score"]

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


def compare(name: str, sample: Tensor, expected: float, rounding: float = 1e-6) -> Check:
    """Return whether a sample's mean is within four standard errors of what is expected."""
    z = z_score(sample, expected, rounding)
    return Check(name, z < 4, f"{float(sample.mean()):.5f}, exact {expected:.5f}, z = {z:.1f}")


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
) -> tuple[float, dict[str, float]]:
    """Return a bound's exact value and gradient on a problem with finitely many states, by summing over them all.

    Args:
        make_problem: returns the problem for a number of replicates, one parameter value each.
        states: by latent site its value in every state, ``[states, ...]``.
        bound: from log-weights ``[num_particles, *plates]`` to a value ``[*plates]``.
        num_particles: K; the sum has as many terms as there are states to the power K.
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
        value = (log_q[draws].sum(0).exp() * bound((log_p - log_q)[draws])).sum()
        leaves = [pyro.param(name) for name in problem.params]
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
    found = zip(problem.params, grads, strict=True)
    return value.item(), {name: 0.0 if grad is None else float(grad.sum()) for name, grad in found}
