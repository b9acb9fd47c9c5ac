"""A fitted flow as an importance-sampling proposal, and Hamiltonian moves in the noise that it is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_elbo_ext.autofit.frame import Frame
from pyro_elbo_ext.guides.flows import Flow

__all__ = ["Chains", "Draws", "Proposal", "move"]

CHUNK = 2000  # draws scored at once


class Draws(NamedTuple):
    """Noise ``[S, D]`` and the log-weights ``[S]`` of what it is pushed to, in nats; zero weight is -inf."""

    noise: Tensor
    log_weight: Tensor

    def __add__(self, other: tuple) -> Draws:
        """Return both sets of draws in one."""
        noise, log_weight = other
        return Draws(torch.cat([self.noise, noise]), torch.cat([self.log_weight, log_weight]))


@dataclass(frozen=True)
class Proposal:
    """A flow over a frame's coordinates.

    Attributes:
        name: of the rung that fitted it.
        frame: says what coordinates mean.
        flow: from noise to coordinates.
        centering: the frame's, with which the flow was fitted.
    """

    name: str
    frame: Frame
    flow: Flow
    centering: Tensor | None

    def push(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return coordinates ``[S, D]`` and the flow's log-density ``[S]`` there."""
        points, ladj = self.flow.push(noise)
        return points, self.flow.base.log_prob(noise) - ladj  # type: ignore[operator]

    def log_weight(self, noise: Tensor) -> Tensor:
        """Return log p(data, values) - log q(values) ``[S]``, -inf where it is not a number."""
        self.frame.centering = self.centering
        points, log_q = self.push(noise)
        found = self.frame.log_joint(points) - log_q
        return torch.where(torch.isfinite(found), found, -torch.inf)

    @torch.no_grad()
    def draw(self, num: int) -> Draws:
        """Draw from the flow and weigh the draws."""
        found = []
        for start in range(0, num, CHUNK):
            noise = self.flow.base.rsample(torch.Size([min(CHUNK, num - start)]))  # type: ignore[operator]
            found.append(Draws(noise, self.log_weight(noise)))
        return Draws(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    @torch.no_grad()
    def values(self, noise: Tensor) -> dict[str, Tensor]:
        """Return latent and deterministic sites ``[S, *plates, *event]``."""
        self.frame.centering = self.centering
        parts = [self.frame.values(self.push(part)[0]) for part in noise.split(CHUNK)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class Chains(NamedTuple):
    """Where chains are in noise space, with the log of the posterior's density there and its gradient."""

    noise: Tensor
    log_density: Tensor
    slope: Tensor

    @staticmethod
    def at(proposal: Proposal, noise: Tensor) -> Chains:
        """Return chains at some noise ``[K, D]``."""
        with torch.enable_grad():
            noise = noise.detach().requires_grad_()
            base: Tensor = proposal.flow.base.log_prob(noise)  # type: ignore[operator]
            found = proposal.log_weight(noise) + base
            finite = torch.isfinite(found)
            (slope,) = torch.autograd.grad(torch.where(finite, found, 0.0).sum(), noise)
        return Chains(noise.detach(), found.detach(), slope.nan_to_num(0.0, 0.0, 0.0))


def move(proposal: Proposal, chains: Chains, step: float, num_leapfrog: int) -> tuple[Chains, float]:
    """Make one Hamiltonian transition that leaves the posterior invariant, and return the mean acceptance.

    In noise space, where a good flow makes every posterior about standard normal.

    References:
        NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport (Hoffman et al., 2019,
        arXiv:1903.03704).
    """
    momentum = torch.randn_like(chains.noise)
    before = chains.log_density - 0.5 * momentum.square().sum(-1)
    after = chains
    for _ in range(num_leapfrog):
        momentum = momentum + 0.5 * step * after.slope
        after = Chains.at(proposal, after.noise + step * momentum)
        momentum = momentum + 0.5 * step * after.slope
    log_ratio = (after.log_density - 0.5 * momentum.square().sum(-1) - before).nan_to_num(-math.inf, -math.inf)
    accepted = torch.rand_like(log_ratio).log() < log_ratio
    return Chains(
        torch.where(accepted[:, None], after.noise, chains.noise),
        torch.where(accepted, after.log_density, chains.log_density),
        torch.where(accepted[:, None], after.slope, chains.slope),
    ), float(log_ratio.clamp(max=0.0).exp().mean())
