r"""Locally enhanced bounds: the log is taken inside a plate, the rest is averaged.

For a model with global latents g and, in a plate, local ones :math:`z_i`,

.. math::
    E_{g \sim q} \Big[ \log \frac{p(g)}{q(g)} + \frac{N}{B} \sum_i E_{z_{i1..M} \sim q(\cdot | g)}
    \log \frac{1}{M} \sum_m \frac{p(x_i, z_{im} | g)}{q(z_{im} | g)} \Big]

is a bound, on minibatches too, since the outer expectation is linear. One joint log-mean-exp would gain ever less as
the plate grows, and put the scale N/B inside its log.

References:
    Variational Inference with Locally Enhanced Bounds for Hierarchical Models (Geffner, Domke, 2022, arXiv:2203.04432).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.plate_messenger import PlateMessenger
from torch import Tensor

from pyro_elbo_ext.bounds import Bound
from pyro_elbo_ext.gradients.pathwise import Estimate, Estimator, finite, with_leaf_scale
from pyro_elbo_ext.gradients.refusals import check_once
from pyro_elbo_ext.particles import Draw, Particles, ParticleSampler
from pyro_elbo_ext.plates import Layout, decide_local_layout, site_scales
from pyro_elbo_ext.sites import Site
from pyro_elbo_ext.tracing import LOCAL_PLATE, Traces

__all__ = ["LocalParticles", "LocalSampler", "local_attached", "local_replayed"]


class _LocalPlate(PlateMessenger):
    """A plate that only holds sites inside some other plates: local ones get M draws, global ones keep one."""

    def __init__(self, size: int, dim: int, within: Sequence[str]) -> None:
        super().__init__(LOCAL_PLATE, size, dim=dim)
        self.within = set(within)

    def _process_message(self, msg: Any) -> None:
        if self.within <= {f.name for f in msg["cond_indep_stack"]}:
            super()._process_message(msg)


@dataclass(frozen=True)
class LocalParticles(Particles):
    """Weights of M local particles for each of K global ones.

    ``log_joint`` and ``log_guide`` are those of the local sites, ``[local_particles, num_particles, *plates]``.

    Attributes:
        global_joint: of the global sites, ``[num_particles]``.
        global_guide: of the global leaves, ``[num_particles]``.
    """

    global_joint: Tensor
    global_guide: Tensor


@dataclass
class LocalSampler(ParticleSampler):
    """Draws M local particles, inside ``plates``, for each of K global ones.

    Args:
        local_particles: M.
    """

    local_particles: int = 2

    @property
    def particle_dims(self) -> int:
        """Dimensions that vectorised particles take, left of the plates."""
        return 2 if self.vectorize else 0

    def _wrapped(self, fn: Callable) -> Callable:
        if not self.vectorize:
            return fn
        local = _LocalPlate(self.local_particles, -self.max_plate_nesting - 2, self.plates or ())
        return local(super()._wrapped(fn))

    def draw(self, *handlers: Messenger) -> list[Draw]:
        """Run the guide once for all particles, or for each: K runs of M each, which share their global leaves."""
        if self.vectorize:
            return super().draw(*handlers)
        draws = []
        for _ in range(self.num_particles):
            shared: dict[str, Tensor] = {}
            for _ in range(self.local_particles):
                draw = self.draw_given(shared, *handlers)
                nodes = draw.traces.guide.nodes
                shared = {name: z for name, z in draw.leaves.items() if not self._is_inside(nodes[name])}
                draws.append(draw)
        return draws

    def _is_inside(self, node: Any) -> bool:
        return set(self.plates or ()) <= {f.name for f in node["cond_indep_stack"]}

    def local_leaves(self, draws: Sequence[Draw]) -> list[str]:
        """Return the names of the leaves inside the plates."""
        return [name for name in draws[0].leaves if self._is_inside(draws[0].traces.guide.nodes[name])]

    def _droppable(self, draws: Sequence[Draw]) -> Iterable[str]:
        if not self.vectorize:
            raise ValueError(
                "a local log-weight is not finite, and particles run one by one cannot be left out of a locally "
                "enhanced bound: set vectorize_particles=True."
            )
        return self.local_leaves(draws)

    def _decide(self, traces: Traces) -> Layout:
        return decide_local_layout(traces, self.plates or (), self.linear, self._dependencies, self.max_plate_nesting)

    def _weigh(self, layout: Layout, runs: list[list[Site]]) -> LocalParticles:
        local = [[site for site in sites if self._is_inside(site.node)] for sites in runs]
        inside, outside, annealed = site_scales(sum(local, []), layout, self.max_plate_nesting)
        leaf_scales = {site.name: s for s, site in zip(inside, sum(local, []), strict=True) if site.is_leaf}
        scales = iter(inside)
        joint, guide = self._stacked([self._split(sites, scales, layout) for sites in local], layout)
        if self._dropped is not None:
            joint = joint.masked_fill(self._dropped, -math.inf)
        every = 1 if self.vectorize else self.local_particles
        nothing_kept = Layout((), frozenset(), frozenset(), ())
        outer = []
        for sites in runs[::every]:
            own = [site for site in sites if not self._is_inside(site.node)]
            # The outer expectation is linear, so a global site keeps its whole scale.
            outer.append(self._split(own, iter([site.node["scale"] for site in own]), nothing_kept))
        global_joint, global_guide = (
            torch.cat([pair[part].reshape(-1).expand(self.num_particles // len(outer)) for pair in outer])
            for part in (0, 1)
        )
        return LocalParticles(
            joint, guide, outside, 0.0, annealed, leaf_scales, layout, runs, global_joint, global_guide
        )

    def _stacked(self, pairs: list[tuple[Tensor, Tensor]], layout: Layout) -> tuple[Tensor, Tensor]:
        if self.vectorize:
            return pairs[0]
        joint, guide = (torch.cat([pair[part] for pair in pairs]) for part in (0, 1))
        shape = (self.num_particles, self.local_particles, *joint.shape[1:])
        return joint.reshape(shape).transpose(0, 1), guide.reshape(shape).transpose(0, 1)


def _totals(particles: LocalParticles, bound: Callable[[Tensor], Tensor]) -> Tensor:
    """Return each global particle's log-weight with its local bounds added, ``[num_particles]``."""
    inner = bound(particles.log_weight) * particles.scale
    return inner.flatten(1).sum(1) + particles.global_joint - particles.global_guide


def local_attached(sampler: LocalSampler, draws: Sequence[Draw], bound: Bound, outer: Bound) -> Estimate:
    """Return the locally enhanced bound with its total derivative.

    Args:
        sampler: the step's sampler.
        draws: its draws.
        bound: of the local particles.
        outer: of the global particles.
    """
    particles = cast(LocalParticles, sampler.evaluate(draws))
    return Estimate(outer(_totals(particles, bound)), particles)


def local_replayed(
    sampler: LocalSampler, draws: Sequence[Draw], bound: Bound, outer: Bound, estimator: Estimator
) -> Estimate:
    r"""Return the locally enhanced bound with the gradient of an estimator that scores at detached leaves.

    With V the outer path weights and r, c the local path and doubly reparameterised weights, a local leaf's slope is
    that of :math:`V c\,\ell`, and a global leaf's that of its own log-weight times V and, since the local guides'
    density given g is part of the score that c already accounts for, of :math:`V r \log p` alone under "dreg" and of
    :math:`V r\,\ell` under "stl".
    """
    with torch.enable_grad():
        copies = {id(z): z.detach().requires_grad_() for draw in draws for z in draw.leaves.values()}
        leaves = [{name: copies[id(z)] for name, z in draw.leaves.items()} for draw in draws]
        particles = cast(LocalParticles, sampler.evaluate(draws, leaves))
        log_w = particles.log_weight
        own = particles.global_joint - particles.global_guide
    check_once(sampler, draws, particles, estimator.doubly)
    totals = _totals(particles, bound).detach()
    share = outer.path_weights(totals)
    each = share.reshape((1, -1) + (1,) * (log_w.dim() - 2)) * particles.scale
    weights = with_leaf_scale(estimator.weights(bound, log_w.detach()), estimator, particles)
    local_names = set(sampler.local_leaves(draws))
    drawn = {id(z): (name in local_names, z) for draw in draws for name, z in draw.leaves.items()}
    through = particles.log_joint if estimator.doubly else log_w
    surrogate = (each * weights.model * finite(particles.log_joint)).sum() + (share * particles.global_joint).sum()
    for is_local in (True, False):
        keys = [key for key, (local, _) in drawn.items() if local == is_local]
        if not keys:
            continue
        outputs = [log_w] if is_local else [through, own]
        cotangents = [each * weights.path] if is_local else [each * weights.model, share]
        if not log_w.requires_grad:  # nothing there depends smoothly on the leaves
            continue
        slopes = torch.autograd.grad(
            outputs, [copies[key] for key in keys], cotangents, retain_graph=True, allow_unused=True
        )
        for key, slope in zip(keys, slopes, strict=True):
            if slope is not None:
                surrogate = surrogate + (slope * drawn[key][1]).sum()
    value = outer(totals)
    return Estimate(value + (surrogate - surrogate.detach()), particles)
