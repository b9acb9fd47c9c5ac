"""The ELBO with gradients at Gaussian sites from a regression of scores on noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_elbo_ext.elbo.gaussian import Gaussian_ELBO, flat_fit
from pyro_elbo_ext.gradients.gaussian import GaussianSite, linear_fit, newton
from pyro_elbo_ext.plates import Layout

__all__ = ["ScoreRegression_ELBO"]


class ScoreRegression_ELBO(Gaussian_ELBO):
    r"""The ELBO, with gradients at Gaussian sites from a linear regression of scores on noise.

    Where the posterior is Gaussian, K > d particles give the exact gradient in the mean and covariance of d
    coordinates, so that a :class:`~pyro_elbo_ext.NaturalGradient` step with ``lr=1`` lands on it. On other posteriors
    the noise that is left is that of what is not quadratic, and the gradient is unbiased from K = d + 2 on: each
    particle is held against the regression of the others. Costs one run of the pair and one backward, and
    :math:`O(K d^2)`. The gradient is an ordinary one: any optimiser takes it.

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
            parts = flat_fit([sites[i] for i in whole], [noise[i] for i in whole], fit)
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
