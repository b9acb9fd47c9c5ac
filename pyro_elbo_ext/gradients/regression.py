r"""Gradients from a regression of log-densities on sufficient statistics: values alone, no derivative of the model.

For a site of an exponential family with statistics T, and f the terms of the ELBO downstream of it, the gradient in
the expectation parameters is

.. math:: \nabla_m \mathrm{ELBO} = \mathrm{Cov}(T, T)^{-1} \, \mathrm{Cov}(T, f)

Least squares of f on T over the particles estimates both covariances from the same draws, and so is exact where f is
linear in T: in conjugate models. Elsewhere it would be biased by what is not linear, so for each particle the fit to
the others, with slopes :math:`\beta_{-k}`, is a control variate, and the rest takes the score function:

.. math:: \nabla \Big[ \frac{1}{K} \sum_k \beta_{-k}^\top E_q[T] + f_k^{\mathrm{rest}} \log q(x_k) \Big]

which has the ELBO's gradient as its mean at any number of particles, in any parameters that q is computed from.

References:
    Fixed-Form Variational Posterior Approximation through Stochastic Linear Regression (Salimans, Knowles, 2013,
    arXiv:1206.6679).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_elbo_ext.families import Recognized, precise, recognize
from pyro_elbo_ext.gradients.costs import Graph, without_particles
from pyro_elbo_ext.gradients.gaussian import left_out
from pyro_elbo_ext.gradients.sites import SiteGradient, Step
from pyro_elbo_ext.particles import Draw

__all__ = ["Regression", "least_squares", "regressable"]

RIDGE = 1e-15  # of continuous statistics, for rounding alone
DISCRETE_RIDGE = 1e-8  # all values of a site may be the same, or one the only of its kind


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
            argument: without_particles(precise(value), self.event_dim + self.family.arguments[argument], nesting)
            for argument, value in found.arguments().items()  # type: ignore[union-attr]
        }
        self.reference = {argument: value.detach() for argument, value in self.arguments.items()}
        self.values = values = precise(values) if values.is_floating_point() else values
        statistics = self.family.statistics(values, self.reference)
        batch = statistics.shape[: nesting + 1]
        self.columns = statistics.reshape(batch + (-1, statistics.shape[-1])).movedim(0, nesting)
        cost = precise(step.costs.downstream(name).detach())
        self.cost = cost.reshape(cost.shape[-nesting - 1 :]).movedim(0, nesting)[..., None]
        self.num_particles = self.columns.shape[nesting]

    @property
    def size(self) -> int:
        """Statistics of one plate element."""
        return self.columns.shape[-1] * self.columns.shape[-2]

    @property
    def ridge(self) -> Tensor:
        """Relative ridge of each statistic."""
        return self.columns.new_full((self.size,), DISCRETE_RIDGE if self.family.discrete else RIDGE)

    def surrogate(self, slopes: Tensor) -> Tensor:
        """Return a scalar whose gradient in the arguments is that of the ELBO, for slopes ``[*plates, size]``."""
        mean = self.family.expectation(self.arguments, self.reference)
        slopes = slopes.reshape(slopes.shape[:-1] + mean.shape[mean.dim() - self.event_dim - 1 :])
        return (slopes.detach() * mean).sum()

    def score(self, errors: Tensor) -> Tensor:
        """Return a scalar whose gradient is the score times errors ``[*plates, num_particles or units, ...]``."""
        log_q = self.family.log_prob(self.arguments, self.values)
        nesting = self.columns.dim() - 3
        log_q = log_q.flatten(nesting + 1) if log_q.dim() > nesting + 1 else log_q[..., None]
        return (errors.detach() * log_q.movedim(0, nesting)).sum() / self.num_particles


def _regress(sites: Sequence[_SiteStatistics]) -> Tensor:
    """Regress the costs of sites in the same plates on their statistics, as jointly as the particles allow."""
    particles, size = sites[0].num_particles, sum(site.size for site in sites)
    if particles < 2 * size:
        return torch.stack([_regress([site]) for site in sites]).sum() if len(sites) > 1 else _regress_units(sites[0])
    columns, ridge = _broadcast_cat([site.columns.flatten(-2) for site in sites]), torch.cat([s.ridge for s in sites])
    fit = least_squares(columns, _broadcast_cat([site.cost for site in sites]), ridge)
    slopes = fit.slopes.split([site.size for site in sites], -2)
    terms = [site.surrogate(slopes[i][..., i]) + site.score(fit.errors[..., i, None]) for i, site in enumerate(sites)]
    return torch.stack(terms).sum()


def _regress_units(site: _SiteStatistics) -> Tensor:
    units, statistics = site.columns.shape[-2:]
    if site.num_particles <= statistics:
        raise ValueError(
            f"guide site '{site.name}' is a {site.family.name} with {statistics} statistics, whose regression needs "
            f"num_particles >= {statistics + 1}, better {2 * statistics} or more, got {site.num_particles}. Raise "
            "num_particles; at Gaussian sites ScoreRegression_ELBO needs far fewer."
        )
    fit = least_squares(site.columns.movedim(-2, -3), site.cost[..., None, :, :], site.ridge[:statistics])
    slopes = fit.slopes.reshape(fit.slopes.shape[:-3] + (units * statistics,))
    return site.surrogate(slopes) + site.score(fit.errors[..., 0].mT)


def _broadcast_cat(tensors: Sequence[Tensor]) -> Tensor:
    batch = torch.broadcast_shapes(*(t.shape[:-1] for t in tensors))
    return torch.cat([t.expand(batch + t.shape[-1:]) for t in tensors], -1)


class Fit(NamedTuple):
    """What a regression of y on x found.

    Attributes:
        slopes: mean over rows of the slopes that all other rows have, ``[*batch, n, r]``.
        errors: of each row from the fit to the others, ``[*batch, rows, r]``.
    """

    slopes: Tensor
    errors: Tensor


def least_squares(x: Tensor, y: Tensor, ridge: Tensor) -> Fit:
    """Regress y ``[*batch, rows, r]`` on x ``[*batch, rows, n]`` and an intercept, with relative ridges ``[n]``."""
    x, y = x - x.mean(-2, keepdim=True), y - y.mean(-2, keepdim=True)
    scale = x.square().mean(-2, keepdim=True).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    rows = x.shape[-2]
    below = (ridge * rows).sqrt().diag()
    q, r = torch.linalg.qr(torch.cat([x / scale, below.expand(x.shape[:-2] + below.shape)], -2))
    q = q[..., :rows, :]
    line = q.mT @ y
    errors = left_out(y - q @ line, 1 / rows + q.square().sum(-1, keepdim=True))
    if rows == x.shape[-1] + 1:  # no others to fit: where a ridge would decide what they predict, the line is taken
        errors = torch.where(ridge.max() < DISCRETE_RIDGE, 0.0, errors)
    slopes = torch.linalg.solve_triangular(r, line - q.mT @ errors / rows, upper=True) / scale.mT
    return Fit(slopes, errors)
