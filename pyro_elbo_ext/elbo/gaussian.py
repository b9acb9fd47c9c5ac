"""What ELBOs share that differentiate Gaussian sites by a linear model of the score around them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_elbo_ext.dependencies import Dependencies
from pyro_elbo_ext.elbo.base import ParticleELBO
from pyro_elbo_ext.elbo.regression import Roots, checked_chunk
from pyro_elbo_ext.families import recognize
from pyro_elbo_ext.gradients.costs import Costs, Graph
from pyro_elbo_ext.gradients.gaussian import GaussianSite, Linear, is_gaussian
from pyro_elbo_ext.gradients.linearized import graph_leaves, linearized
from pyro_elbo_ext.gradients.pathwise import Estimate
from pyro_elbo_ext.handlers import Differentiable
from pyro_elbo_ext.particles import Draw, Particles, ParticleSampler
from pyro_elbo_ext.plates import Layout
from pyro_elbo_ext.sites import Site, base_name, is_reparameterized

__all__ = ["Gaussian_ELBO", "flat_fit"]


class _Part(NamedTuple):
    """What one chunk of particles says.

    Attributes:
        by_particle: the ELBO's value, ``[num_particles, 1...]``.
        sites: the Gaussian sites.
        noise: of each site, ``[num_particles, *plates, size]``.
        residual: derivative of the ELBO's terms in it.
        slopes: sum over particles of the residual's derivative, where it was asked for.
        leaves: parameters met on the way, but for those of the Gaussian sites.
        grads: gradient in them.
    """

    by_particle: Tensor
    sites: tuple[GaussianSite, ...] = ()
    noise: tuple[Tensor, ...] = ()
    residual: tuple[Tensor, ...] = ()
    slopes: Any = None
    leaves: tuple[Tensor, ...] = ()
    grads: tuple[Tensor, ...] = ()


class Gaussian_ELBO(ParticleELBO):
    """Base of ELBOs that differentiate a guide's Gaussian sites by a linear model of the score around them."""

    _can_drop = False

    def __init__(
        self,
        num_particles: int,
        chunk_size: int | None = None,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
    ) -> None:
        super().__init__(num_particles, None, vectorize_particles, max_plate_nesting)
        self.chunk_size = checked_chunk(chunk_size, num_particles, vectorize_particles)
        self._roots = Roots()

    @property
    def _linear(self) -> bool:
        return True

    def _make_sampler(self, *args: Any, **kwargs: Any) -> ParticleSampler:
        return super()._make_sampler(*args, **(kwargs | {"num_particles": self.chunk_size or kwargs["num_particles"]}))

    def _is_fitted(self, sampler: ParticleSampler) -> Callable[[Any], bool]:
        """Return what tells the Gaussian sites that descend from no other."""
        parents = self._roots.parents(sampler)

        def fitted(node: Any) -> bool:
            return not parents.get(("guide", node["name"]), True) and is_gaussian(recognize(node["fn"]))

        return fitted

    def _draw(self, sampler: ParticleSampler) -> list[Draw]:
        if not torch.is_grad_enabled():
            return self._runs(sampler)
        draws = self._runs(sampler, Differentiable(self._is_fitted(sampler)))
        if self._roots.met_new_sites(sampler, draws):
            draws = self._runs(sampler, Differentiable(self._is_fitted(sampler)))
        return draws

    def _runs(self, sampler: ParticleSampler, *handlers: Messenger) -> list[Draw]:
        return [draw for _ in range(self.num_particles // sampler.num_particles) for draw in sampler.draw(*handlers)]

    def _estimate(self, sampler: ParticleSampler, draws: Sequence[Draw]) -> Estimate:
        parts, runs, layout = [], [], None
        for draw in draws:  # the graph of one run at a time
            part, layout, scored = self._part(sampler, draw)
            parts.append(part)
            runs.append(scored)
        by_particle = torch.cat([part.by_particle for part in parts])
        objective = by_particle.sum() / self.num_particles
        if parts[0].sites:
            sites = parts[0].sites
            noise = [torch.cat([part.noise[i] for part in parts]) for i in range(len(sites))]
            residual = [torch.cat([part.residual[i] for part in parts]) for i in range(len(sites))]
            surrogate = self._surrogate(sites, noise, residual, [part.slopes for part in parts], layout)
            objective = objective + (surrogate - surrogate.detach())
        for part in parts:
            objective = objective + linearized(part.leaves, part.grads) / self.num_particles
        whole = Layout((), frozenset(), frozenset(), layout.leaves)  # type: ignore[union-attr]
        weights = Particles(by_particle, torch.zeros_like(by_particle), 1.0, 0.0, False, {}, whole, runs)
        return Estimate(objective, weights)

    def _part(self, sampler: ParticleSampler, draw: Draw) -> tuple[_Part, Layout, list[Site]]:
        """Score one run, and differentiate it where gradients are enabled."""
        nodes, nesting = draw.traces.guide.nodes, sampler.max_plate_nesting
        names = [n for n in draw.leaves if torch.is_grad_enabled() and self._is_fitted(sampler)(nodes[n])]
        sites = tuple(GaussianSite(nodes[n], nesting) for n in names)
        held = {site.name: site.log_prob(draw.leaves[site.name]) for site in sites}
        layout, runs = sampler.score([replace(draw, flow_log_prob={**draw.flow_log_prob, **held})])
        sampler.once("paths", lambda: _check_paths(draw, type(self).__name__))
        size = sampler.num_particles if sampler.vectorize else 1
        costs = Costs(runs, _NO_GRAPH, nesting, size)
        _, by_particle = costs.objective()
        by_particle = by_particle.expand((size,) + by_particle.shape[1:])
        if not torch.is_grad_enabled():
            return _Part(by_particle), layout, runs[0]
        return self._differentiate(costs, draw, sites, by_particle, layout), layout, _detached(runs[0])

    def _differentiate(
        self, costs: Costs, draw: Draw, sites: tuple[GaussianSite, ...], by_particle: Tensor, layout: Layout
    ) -> _Part:
        total = costs.total()
        if not total.requires_grad:
            return _Part(by_particle)
        values = [draw.leaves[site.name] for site in sites]
        leaves = [leaf for leaf in graph_leaves(total) if not any(leaf is value for value in values)]
        found = torch.autograd.grad(
            total,
            values + leaves,
            retain_graph=True,  # a part of it may be someone else's, too
            create_graph=self._second_order,
            allow_unused=True,
            materialize_grads=True,
        )
        slopes = self._slopes(costs, sites, values, found[: len(sites)], layout)

        def along(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(costs.along_particles([t.detach()], s.event_dim) for s, t in zip(sites, tensors, strict=True))

        noise = tuple(site.noise(value) for site, value in zip(sites, along(values), strict=True))
        residual = tuple(site.residual(grad) for site, grad in zip(sites, along(found[: len(sites)]), strict=True))
        grads = tuple(grad.detach() for grad in found[len(sites) :])
        return _Part(by_particle, sites, noise, residual, slopes, tuple(leaves), grads)

    _second_order = False

    def _slopes(
        self,
        costs: Costs,
        sites: Sequence[GaussianSite],
        values: Sequence[Tensor],
        grads: Sequence[Tensor],
        layout: Layout,
    ) -> Any:
        return None

    @abstractmethod
    def _surrogate(
        self,
        sites: Sequence[GaussianSite],
        noise: Sequence[Tensor],
        residual: Sequence[Tensor],
        slopes: Sequence[Any],
        layout: Layout | None,
    ) -> Tensor:
        """Return a scalar whose gradient is the ELBO's in the sites' arguments."""


_NO_GRAPH = Graph(Dependencies({}, {}, {}), {}, {}, (), {})


def _detached(sites: Sequence[Site]) -> list[Site]:
    return [site._replace(log_prob=site.log_prob.detach()) for site in sites]


def _check_paths(draw: Draw, elbo: str) -> None:
    for name in draw.leaves:
        node = draw.traces.guide.nodes[name]
        if not is_reparameterized(node):
            raise ValueError(
                f"guide site '{name}' is a {base_name(node['fn'])}, which is not reparameterised: {elbo} needs the "
                "model's derivative there. Use Regression_ELBO, which needs values only."
            )


def flat_fit(
    sites: Sequence[GaussianSite], noise: Sequence[Tensor], fit: Linear
) -> Iterator[tuple[GaussianSite, Tensor, Tensor]]:
    """Yield each site's intercept and blocks of a fit in which every plate was flattened."""
    start = 0
    for site, n in zip(sites, noise, strict=True):
        stop = start + n[0].numel()
        own, count = n.shape[-1], n[0].numel() // n.shape[-1]
        slopes = fit.slopes[start:stop, start:stop].reshape(count, own, count, own)
        slopes = slopes.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        blocks = site.blocks(slopes.reshape(n.shape[1:] + (own,)))
        yield site, fit.intercept[start:stop].reshape(n.shape[1:]), blocks
        start = stop
