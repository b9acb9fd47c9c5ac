"""ELBOs whose gradients at Gaussian sites are exact where the posterior is Gaussian."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_elbo_ext.dependencies import Dependencies
from pyro_elbo_ext.elbo.base import ParticleELBO
from pyro_elbo_ext.elbo.regression import checked_chunk
from pyro_elbo_ext.families import recognize, symmetric
from pyro_elbo_ext.gradients.costs import Costs, Graph
from pyro_elbo_ext.gradients.gaussian import (
    GaussianSite,
    Linear,
    element_derivative,
    is_gaussian,
    joint_derivative,
    linear_fit,
    newton,
    shifts,
)
from pyro_elbo_ext.gradients.linearized import graph_leaves, linearized
from pyro_elbo_ext.gradients.pathwise import Estimate
from pyro_elbo_ext.handlers import Differentiable
from pyro_elbo_ext.particles import Draw, Particles, ParticleSampler
from pyro_elbo_ext.plates import Layout
from pyro_elbo_ext.sites import Site, base_name, is_reparameterized

__all__ = ["Price_ELBO", "ScoreRegression_ELBO"]


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


class _Gaussian_ELBO(ParticleELBO):
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
        self._dependencies: dict[Any, Dependencies] = {}

    @property
    def _linear(self) -> bool:
        return True

    def _make_sampler(self, *args: Any, **kwargs: Any) -> ParticleSampler:
        return super()._make_sampler(*args, **(kwargs | {"num_particles": self.chunk_size or kwargs["num_particles"]}))

    def _is_fitted(self, sampler: ParticleSampler) -> Callable[[Any], bool]:
        """Return what tells the Gaussian sites that descend from no other."""
        key = sampler.model, sampler.guide, sampler.switches()
        if key not in self._dependencies:
            if len(self._dependencies) > 100:  # models made anew for every call must not pile up
                self._dependencies.clear()
            self._dependencies[key] = sampler.find_dependencies()
        parents = self._dependencies[key].parents

        def fitted(node: Any) -> bool:
            return not parents.get(("guide", node["name"]), True) and is_gaussian(recognize(node["fn"]))

        return fitted

    def _draw(self, sampler: ParticleSampler) -> list[Draw]:
        handlers = [Differentiable(self._is_fitted(sampler))] if torch.is_grad_enabled() else []
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


def _flat_fit(
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


class ScoreRegression_ELBO(_Gaussian_ELBO):
    r"""The ELBO, with gradients at Gaussian sites from a linear regression of scores on noise.

    Where the posterior is Gaussian, K > d particles give the exact gradient in the mean and covariance of d
    coordinates, so that a :class:`~pyro_elbo_ext.NaturalGradient` step with ``lr=1`` lands on it; on other posteriors
    the noise that is left is that of what is not quadratic. Costs one run of the pair and one backward, and
    :math:`O(K d^2 + d^3)`. The gradient is an ordinary one: any optimiser takes it.

    It acts on normal and multivariate normal sites that descend from no other, those of ``AutoNormal``,
    ``AutoDiagonalNormal`` and ``AutoMultivariateNormal`` among them; a path elsewhere. All coordinates outside
    subsampled plates are regressed jointly if there are at least twice as many particles; if not, and inside subsampled
    plates, each plate element of each site by itself (and each coordinate of a normal site by itself, if it has more
    than half as many as there are particles).

    Args:
        num_particles: K. Twice the number of coordinates is a good choice, one more than those of the largest
            multivariate normal the least.
        direction: ``"gradient"``, or ``"newton"`` for mean-field guides: in the mean then stands no gradient but a
            direction that makes a natural-gradient step Newton's, which sees correlations that a mean-field Fisher
            information does not. Its fixed points are those of the gradient. Needs the joint regression.
        chunk_size: particles that are run at once; what is kept of the others is their noise and scores.
        vectorize_particles: run the particles of a chunk at once.
        max_plate_nesting: plate dimensions of the pair.

    Raises:
        ValueError: when run, too few particles, or a guide site without a path; the site is named.

    References:
        Fixed-Form Variational Posterior Approximation through Stochastic Linear Regression (Salimans, Knowles, 2013,
        arXiv:1206.6679); Sticking the Landing (Roeder, Wu, Duvenaud, 2017, arXiv:1703.09194), for the score that is
        left out.
    """

    def __init__(
        self,
        num_particles: int = 64,
        direction: str = "gradient",
        chunk_size: int | None = None,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
    ) -> None:
        super().__init__(num_particles, chunk_size, vectorize_particles, max_plate_nesting)
        if direction not in ("gradient", "newton"):
            raise ValueError(f'direction must be "gradient" or "newton", got {direction!r}')
        self.direction = direction

    def _surrogate(
        self,
        sites: Sequence[GaussianSite],
        noise: Sequence[Tensor],
        residual: Sequence[Tensor],
        slopes: Sequence[Any],
        layout: Layout | None,
    ) -> Tensor:
        whole = [i for i, site in enumerate(sites) if not site.subsampled]
        size = sum(noise[i][0].numel() for i in whole)
        joint = bool(whole) and 2 * size <= self.num_particles
        if self.direction == "newton":
            self._check_newton(sites, size)
            joint = True
        terms = []
        if joint:
            flat = [torch.cat([t[i].flatten(1) for i in whole], -1) for t in (noise, residual)]
            fit = linear_fit(*flat)
            fit = newton(fit) if self.direction == "newton" else fit
            parts = _flat_fit([sites[i] for i in whole], [noise[i] for i in whole], fit)
            terms += [site.surrogate(*rest) for site, *rest in parts]
        alone = [i for i in range(len(sites)) if not joint or i not in whole]
        return torch.stack(terms + [self._alone(sites[i], noise[i], residual[i]) for i in alone]).sum()

    def _alone(self, site: GaussianSite, noise: Tensor, residual: Tensor) -> Tensor:
        """Regress one site, each of its plate elements by itself."""
        size = noise.shape[-1]
        block = site.unit_size if site.full_rank or 2 * size > self.num_particles else size
        least = max(block + 1, 3)
        if self.num_particles < least:
            raise ValueError(
                f"guide site '{site.name}' has {block} coordinates, and the regression of their scores needs "
                f"num_particles >= {least}, better {2 * block} or more, got {self.num_particles}. Raise num_particles, "
                "with chunk_size if memory is short."
            )
        nesting = noise.dim() - 2
        parted = [
            t.reshape(t.shape[:-1] + (size // block, block)).movedim(0, -2) for t in (noise, residual)
        ]  # [*plates, blocks, num_particles, block]
        fit = linear_fit(*parted)
        intercept = fit.intercept.flatten(nesting)
        if site.full_rank:
            return site.surrogate(intercept, fit.slopes)
        return site.surrogate(intercept, fit.slopes.diagonal(dim1=-2, dim2=-1).flatten(nesting))

    def _check_newton(self, sites: Sequence[GaussianSite], size: int) -> None:
        for site in sites:
            if site.full_rank:
                raise ValueError(
                    f"guide site '{site.name}' is a multivariate normal, whose natural gradient is Newton's step "
                    "already. Use direction='gradient'."
                )
            if site.subsampled:
                raise ValueError(
                    f"guide site '{site.name}' stands in a subsampled plate, and the newton direction needs all "
                    "coordinates at once. Use direction='gradient'."
                )
        if self.num_particles <= size:
            raise ValueError(
                f"guide sites {', '.join(repr(site.name) for site in sites)} have {size} coordinates, and "
                f"direction='newton' needs num_particles >= {size + 1}, better {2 * size}, got {self.num_particles}. "
                "Raise num_particles, with chunk_size if memory is short."
            )


class Price_ELBO(_Gaussian_ELBO):
    r"""The ELBO, with gradients at Gaussian sites from the model's second derivatives.

    :math:`\nabla_\Sigma E_q[f] = \tfrac12 E_q[\nabla^2 f]` (Price) and :math:`\nabla_\mu E_q[f] = E_q[\nabla f]`
    (Bonnet), the latter corrected by the Hessian for where the draws happened to lie: exact where the log-density is
    quadratic, with a single particle. Costs d backward passes for d coordinates, those of every plate over which the
    pair does not factorise included. The gradient is an ordinary one: any optimiser takes it.

    It acts where :class:`ScoreRegression_ELBO` does; a path elsewhere. The model must be twice differentiable, which a
    sum of absolute values or a ``relu`` network is only almost everywhere: their curvature is missed, silently.

    Args:
            num_particles: K.
            chunk_size: particles that are run at once.
            vectorize_particles: run the particles of a chunk at once.
            max_plate_nesting: plate dimensions of the pair.

    Raises:
            ValueError: when run, a guide site without a path; the site is named.

    References:
            The Variational Gaussian Approximation Revisited (Opper, Archambeau, 2009); Stein's Lemma for the
            Reparameterization Trick with Exponential Family Mixtures (Lin, Khan, Schmidt, 2019, arXiv:1910.13398).
    """

    _second_order = True

    def __init__(
        self,
        num_particles: int = 8,
        chunk_size: int | None = None,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
    ) -> None:
        super().__init__(num_particles, chunk_size, vectorize_particles, max_plate_nesting)

    def _slopes(
        self,
        costs: Costs,
        sites: Sequence[GaussianSite],
        values: Sequence[Tensor],
        grads: Sequence[Tensor],
        layout: Layout,
    ) -> Any:
        """Return sums over particles: of sites taken together, and of each that factorises over its plates."""
        own = [costs.along_particles([grad], s.event_dim) for s, grad in zip(sites, grads, strict=True)]

        def along(site: GaussianSite, t: Tensor) -> Tensor:
            return costs.along_particles([t], site.event_dim).detach()

        together, alone = _parted(sites, layout)
        groups = [[(sites[i], values[i], own[i]) for i in together], *([(sites[i], values[i], own[i])] for i in alone)]
        matrices = [joint_derivative(groups[0], along), *(element_derivative(*group[0], along) for group in groups[1:])]
        moved = [shift for group in groups for shift in shifts(group, along)]
        return matrices, dict(zip([*together, *alone], moved, strict=True))

    def _surrogate(
        self,
        sites: Sequence[GaussianSite],
        noise: Sequence[Tensor],
        residual: Sequence[Tensor],
        slopes: Sequence[Any],
        layout: Layout | None,
    ) -> Tensor:
        together, alone = _parted(sites, layout)
        matrices = [
            symmetric(sum(parts)) for parts in zip(*(m for m, _ in slopes), strict=True) if parts[0] is not None
        ]
        moved = {i: sum(own[i] for _, own in slopes) for i in (*together, *alone)}
        terms = []
        if together:
            flat = [torch.cat([t[i].flatten(1) for i in together], -1).mean(0) for t in (noise, residual)]
            shift = torch.cat([moved[i].flatten() for i in together])
            fit = self._fit(matrices.pop(0), flat[0], flat[1], shift)
            parts = _flat_fit([sites[i] for i in together], [noise[i] for i in together], fit)
            terms += [site.surrogate(*rest) for site, *rest in parts]
        for i, matrix in zip(alone, matrices, strict=True):
            fit = self._fit(matrix, noise[i].mean(0), residual[i].mean(0), moved[i])
            terms.append(sites[i].surrogate(fit.intercept, sites[i].blocks(fit.slopes)))
        return torch.stack(terms).sum()

    def _fit(self, total: Tensor, noise: Tensor, residual: Tensor, shift: Tensor) -> Linear:
        """Correct a mean residual for where the noise lay, for each particle by the slopes of the others."""
        count = self.num_particles
        moved = (total @ noise[..., None])[..., 0]  # sum over particles of all slopes times the mean noise
        if count > 1:
            return Linear(residual - (moved - shift / count) / (count - 1), total / count)
        return Linear(residual - moved, total)


def _parted(sites: Sequence[GaussianSite], layout: Layout | None) -> tuple[list[int], list[int]]:
    """Part the sites into those with second derivatives across elements, and those without."""
    alone = [i for i, s in enumerate(sites) if s.plates and s.plates <= set(layout.plates)]  # type: ignore[union-attr]
    return [i for i in range(len(sites)) if i not in alone], alone
