"""The ELBO with gradients at Gaussian sites from the model's second derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_elbo_ext.elbo.gaussian import Gaussian_ELBO, flat_fit
from pyro_elbo_ext.families import symmetric
from pyro_elbo_ext.gradients.costs import Costs
from pyro_elbo_ext.gradients.gaussian import GaussianSite, Linear, element_derivative, joint_derivative, shifts
from pyro_elbo_ext.plates import Layout

__all__ = ["Price_ELBO"]


class Price_ELBO(Gaussian_ELBO):
    r"""The ELBO, with gradients at Gaussian sites from the model's second derivatives.

    :math:`\nabla_\Sigma E_q[f] = \tfrac12 E_q[\nabla^2 f]` (Price) and :math:`\nabla_\mu E_q[f] = E_q[\nabla f]`
    (Bonnet), the latter corrected, by the other particles' Hessians, for where the draws happened to lie: exact where
    the log-density is quadratic, unbiased elsewhere. A single particle is corrected by its own Hessian, exact on
    quadratics too but biased elsewhere. Costs d + 1 backward passes for d coordinates, those of every plate over which
    the pair does not factorise included. The gradient is an ordinary one: any optimiser takes it.

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
            parts = flat_fit([sites[i] for i in together], [noise[i] for i in together], fit)
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
