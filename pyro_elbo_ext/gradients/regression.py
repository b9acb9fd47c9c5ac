r"""Gradients from a regression of log-densities on sufficient statistics: values alone, no derivative of the model.

For a site of an exponential family with statistics T, and f the terms of the ELBO downstream of it, the gradient in
the expectation parameters is

.. math:: \nabla_m \mathrm{ELBO} = \mathrm{Cov}(T, T)^{-1} \, \mathrm{Cov}(T, f)

Least squares of f on T over the particles estimates both covariances from the same draws, and so is exact where f is
linear in T: in conjugate models. What is returned is the surrogate :math:`\beta^\top E_q[T]`, whose gradient in any
parameters is the ordinary one.

References:
    Fixed-Form Variational Posterior Approximation through Stochastic Linear Regression (Salimans, Knowles, 2013,
    arXiv:1206.6679).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_elbo_ext.families import Recognized, recognize
from pyro_elbo_ext.gradients.costs import Graph, without_particles
from pyro_elbo_ext.gradients.sites import SiteGradient, Step
from pyro_elbo_ext.particles import Draw

__all__ = ["Regression", "least_squares", "regressable"]

RIDGE = 1e-15  # relative, for statistics that are constant over the particles, as one value of a discrete site


class Regression(SiteGradient):
    """The regression at every site of a known family that descends from no other; the plain score elsewhere.

    Sites in the same plates are regressed jointly where there are at least twice as many particles as statistics, which
    removes the noise that each makes in the others' costs; else each site, or each coordinate, by itself.
    """

    name = "regression"

    def plain_sites(self, graph: Graph, draw: Draw) -> tuple[str, ...]:
        """Sites of no known family, or whose distribution depends on another site."""
        nodes = draw.traces.guide.nodes
        return tuple(
            name
            for name in graph.scored
            if graph.found.parents["guide", name] or regressable(nodes[name]["fn"]) is None
        )

    def surrogate(self, step: Step) -> Any:
        """Return the regressed sites' surrogate and the plain one of all others."""
        plain = self.plain_sites(step.graph, step.draws[0])
        total: Any = sum(step.plain(name) for name in plain)
        groups: dict[frozenset[str], list[_SiteStatistics]] = {}
        for name in step.graph.scored:
            if name not in plain:
                site = _SiteStatistics(step, name)
                groups.setdefault(frozenset(step.graph.plates["guide", name]), []).append(site)
        dtype = next(iter(step.costs.terms.values())).dtype
        return total + sum(_regress(sites).to(dtype) for sites in groups.values())


def regressable(fn: Any) -> Recognized | None:
    """Return the family of a distribution whose values are that family's own, None if there is none."""
    found = recognize(fn)
    return found if found is not None and found.direct else None


class _SiteStatistics:
    """A site's statistics and cost at every particle, in float64.

    Attributes:
        columns: ``[*plates, num_particles, units, statistics]``.
        cost: ``[*plates, num_particles, 1]``.
    """

    def __init__(self, step: Step, name: str) -> None:
        self.name = name
        nodes = [draw.traces.guide.nodes[name] for draw in step.draws]
        found = regressable(nodes[0]["fn"])
        self.family, self.event_dim = found.family, found.event_dim  # type: ignore[union-attr]
        nesting = -step.costs.particle_dim - 1
        value_dim = nodes[0]["fn"].event_dim
        values = step.costs.along_particles([node["value"].detach() for node in nodes], value_dim)
        self.arguments = {
            argument: without_particles(value, self.event_dim + self.family.arguments[argument], nesting).double()
            for argument, value in found.arguments().items()  # type: ignore[union-attr]
        }
        self.reference = {argument: value.detach() for argument, value in self.arguments.items()}
        values = values.double() if values.is_floating_point() else values
        statistics = self.family.statistics(values, self.reference)
        batch = statistics.shape[: nesting + 1]
        self.columns = statistics.reshape(batch + (-1, statistics.shape[-1])).movedim(0, nesting)
        cost = step.costs.downstream(name).detach().double()
        self.cost = cost.reshape(cost.shape[-nesting - 1 :]).movedim(0, nesting)[..., None]
        self.num_particles = self.columns.shape[nesting]

    @property
    def size(self) -> int:
        """Statistics of one plate element."""
        return self.columns.shape[-1] * self.columns.shape[-2]

    def surrogate(self, slopes: Tensor) -> Tensor:
        """Return a scalar whose gradient in the arguments is that of the ELBO, for slopes ``[*plates, size]``."""
        mean = self.family.expectation(self.arguments, self.reference)
        slopes = slopes.reshape(slopes.shape[:-1] + mean.shape[mean.dim() - self.event_dim - 1 :])
        return (slopes.detach() * mean).sum()


def _regress(sites: Sequence[_SiteStatistics]) -> Tensor:
    """Regress the costs of sites in the same plates on their statistics, as jointly as the particles allow."""
    particles, size = sites[0].num_particles, sum(site.size for site in sites)
    if particles >= 2 * size:
        columns = _broadcast_cat([site.columns.flatten(-2) for site in sites])
        slopes = least_squares(columns, _broadcast_cat([site.cost for site in sites]))
        parts = zip(sites, slopes.split([site.size for site in sites], -2), strict=True)
        return torch.stack([site.surrogate(part[..., i]) for i, (site, part) in enumerate(parts)]).sum()
    return torch.stack([_regress_alone(site) for site in sites]).sum()


def _regress_alone(site: _SiteStatistics) -> Tensor:
    units, statistics = site.columns.shape[-2:]
    if site.num_particles >= 2 * site.size:
        return site.surrogate(least_squares(site.columns.flatten(-2), site.cost)[..., 0])
    if site.num_particles <= statistics:
        raise ValueError(
            f"guide site '{site.name}' is a {site.family.name} with {statistics} statistics, whose regression needs "
            f"num_particles >= {statistics + 1}, better {2 * statistics} or more, got {site.num_particles}. Raise "
            "num_particles; at Gaussian sites ScoreRegression_ELBO needs far fewer."
        )
    slopes = least_squares(site.columns.movedim(-2, -3), site.cost[..., None, :, :])
    return site.surrogate(slopes.reshape(slopes.shape[:-3] + (units * statistics,)))


def _broadcast_cat(tensors: Sequence[Tensor]) -> Tensor:
    batch = torch.broadcast_shapes(*(t.shape[:-1] for t in tensors))
    return torch.cat([t.expand(batch + t.shape[-1:]) for t in tensors], -1)


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """Return the slopes ``[*batch, n, r]`` of y ``[*batch, rows, r]`` on x ``[*batch, rows, n]``, with an intercept."""
    x, y = x - x.mean(-2, keepdim=True), y - y.mean(-2, keepdim=True)
    scale = x.square().mean(-2, keepdim=True).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    rows, size = x.shape[-2:]
    eye = torch.eye(size, dtype=x.dtype, device=x.device) * (RIDGE * rows) ** 0.5
    q, r = torch.linalg.qr(torch.cat([x / scale, eye.expand(x.shape[:-2] + eye.shape)], -2))
    return torch.linalg.solve_triangular(r, q[..., :rows, :].mT @ y, upper=True) / scale.mT
