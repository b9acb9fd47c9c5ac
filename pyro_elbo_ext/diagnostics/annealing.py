r"""Annealed importance sampling from guide to posterior, and back: the evidence from below and from above.

Chains start at draws of the guide and move along :math:`\gamma_\beta = q^{1-\beta} p(x, \cdot)^\beta` by Hamiltonian
transitions that leave each step of the path invariant. Their weights are unbiased for the evidence, so the logarithm of
their mean is a bound from below; the same chains run backwards from exact draws of the posterior bound it from above.
Step sizes are adapted in a run of their own and frozen, without which neither is true.

References:
    Annealed Importance Sampling (Neal, 2001, arXiv:physics/9803008); Sandwiching the marginal likelihood using
    bidirectional Monte Carlo (Grosse, Ghahramani, Adams, 2015, arXiv:1511.02543); Measuring the reliability of MCMC
    inference with bidirectional Monte Carlo (Grosse, Ancha, Roy, 2016, arXiv:1606.02275).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_elbo_ext.diagnostics.target import Density, Target

__all__ = ["Schedule", "anneal", "find_schedule", "refine", "temperatures"]

Point = dict[str, Tensor]


@dataclass
class Schedule:
    """What the transitions of one annealing run are made of; nothing of it depends on the run itself.

    Attributes:
        betas: inverse temperatures from 0 to 1.
        scales: by site, the guide's standard deviations in unconstrained space, in which steps are measured.
        num_leapfrog: leapfrog steps of a transition.
        steps: step size per plate element at each inverse temperature.
    """

    betas: list[float]
    scales: Point
    num_leapfrog: int = 5
    steps: list[Tensor] = field(default_factory=list)


def temperatures(num: int, steepness: float = 4.0) -> list[float]:
    """Return ``num + 1`` inverse temperatures from 0 to 1, denser towards both ends.

    References:
        On the Quantitative Analysis of Decoder-Based Generative Models (Wu et al., 2016, arXiv:1611.04273).
    """
    raw = [1 / (1 + math.exp(-steepness * (2 * t / num - 1))) for t in range(num + 1)]
    return [(value - raw[0]) / (raw[-1] - raw[0]) for value in raw]


@torch.no_grad()
def find_schedule(
    target: Target, num_temperatures: int, num_leapfrog: int = 5, accept: float = 0.75, settle: int = 15
) -> Schedule:
    """Adapt step sizes in an annealing run whose weights are thrown away.

    Args:
        target: densities of the pair.
        num_temperatures: steps from guide to posterior.
        num_leapfrog: leapfrog steps of a transition.
        accept: acceptance rate aimed at, per plate element.
        settle: transitions made at the first temperature before it counts.
    """
    scales = {name: _spread_of(value) for name, value in target.start.items()}
    schedule = Schedule(temperatures(num_temperatures), scales, num_leapfrog)
    point, density = dict(target.start), target(target.start)[0]
    log_step = torch.full_like(density.joint[:1], math.log(0.5))
    for t in [1] * settle + list(range(1, num_temperatures + 1)):
        point, density, rate = _transition(target, point, schedule, schedule.betas[t], log_step.exp())
        log_step = (log_step + 0.5 * (rate.mean(0, keepdim=True) - accept)).clamp(-20.0, 10.0)
        schedule.steps.append(log_step.exp())
    schedule.steps = [schedule.steps[settle], *schedule.steps[settle:]]
    return schedule


def _spread_of(value: Tensor) -> Tensor:
    spread = value.std(0, keepdim=True)
    return torch.where((spread > 0) & spread.isfinite(), spread, torch.ones_like(spread))


@torch.no_grad()
def anneal(target: Target, start: Point, schedule: Schedule, reverse: bool = False) -> tuple[Tensor, Point, float]:
    r"""Run the chains and return their log-weights.

    Args:
        target: densities of the pair.
        start: unconstrained values, draws of the guide, or of the posterior for a ``reverse`` run.
        schedule: with adapted steps.
        reverse: run from the posterior to the guide.

    Returns:
        Log-weights ``[num_chains, *plate dims]``: the mean of :math:`w` is unbiased for the evidence in a forward run,
        that of :math:`1 / w` for its inverse in a reverse one. The chains' last values, and the mean acceptance rate.
    """
    betas, num = schedule.betas, len(schedule.betas) - 1
    point, density = dict(start), target(start)[0]
    log_w, rates = torch.zeros_like(density.joint), []
    for t in range(num, 0, -1) if reverse else range(1, num + 1):
        log_w = log_w + (betas[t] - betas[t - 1]) * density.log_weight
        following = t - 1 if reverse else t
        if 0 < following < num:
            point, density, rate = _transition(target, point, schedule, betas[following], schedule.steps[following])
            rates.append(rate.mean())
    return log_w, point, float(torch.stack(rates).mean()) if rates else math.nan


@torch.no_grad()
def refine(target: Target, point: Point, schedule: Schedule, num_transitions: int) -> Point:
    """Move chains by transitions that leave the posterior invariant."""
    for _ in range(num_transitions):
        point, _, _ = _transition(target, point, schedule, 1.0, schedule.steps[-1])
    return point


def _transition(
    target: Target, point: Point, schedule: Schedule, beta: float, step: Tensor
) -> tuple[Point, Density, Tensor]:
    """Make one Hamiltonian transition of every chain, accepted or not for each plate element alone.

    Returns:
        The values, their densities, and the acceptance probabilities ``[num_chains, *plate dims]``.
    """
    sizes = {name: target.spread(step, name) * schedule.scales[name] for name in point}
    momentum = {name: torch.randn_like(value) for name, value in point.items()}
    before, (slope,) = target.slopes(point, beta)
    energy = before.tempered(beta) - _kinetic(target, momentum)
    proposal, after = point, before
    for _ in range(schedule.num_leapfrog):
        momentum = {n: p + 0.5 * sizes[n] * slope[n] for n, p in momentum.items()}
        proposal = {n: z + sizes[n] * momentum[n] for n, z in proposal.items()}
        after, (slope,) = target.slopes(proposal, beta)
        momentum = {n: p + 0.5 * sizes[n] * slope[n] for n, p in momentum.items()}
    log_ratio = after.tempered(beta) - _kinetic(target, momentum) - energy
    log_ratio = torch.where(log_ratio.isnan(), torch.full_like(log_ratio, -math.inf), log_ratio)
    accepted = torch.rand_like(log_ratio).log() < log_ratio
    chosen = {n: torch.where(target.spread(accepted, n), proposal[n], z) for n, z in point.items()}
    density = Density(*(torch.where(accepted, new, old) for new, old in zip(after, before, strict=True)))
    return chosen, density, log_ratio.clamp(max=0.0).exp()


def _kinetic(target: Target, momentum: Point) -> Tensor:
    total = torch.zeros(())
    for name, p in momentum.items():
        total = 0.5 * target.per_element(p.square(), target.event_dim(name)) + total.to(p)
    return total
