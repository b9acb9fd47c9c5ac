"""The ELBO with gradients from a regression of log-densities on sufficient statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from pyro_elbo_ext.dependencies import Key
from pyro_elbo_ext.elbo.score_function import ScoreFunction_ELBO
from pyro_elbo_ext.gradients.baselines import Baseline
from pyro_elbo_ext.gradients.costs import SiteCost
from pyro_elbo_ext.gradients.regression import Regression, regressable
from pyro_elbo_ext.particles import Draw, ParticleSampler
from pyro_elbo_ext.sites import is_reparameterized

__all__ = ["Regression_ELBO", "checked_chunk"]


class Regression_ELBO(ScoreFunction_ELBO):
    r"""The ELBO, with gradients from a regression of log-densities on sufficient statistics: values only.

    .. math:: \nabla_m \mathrm{ELBO} = \mathrm{Cov}(T, T)^{-1} \, \mathrm{Cov}(T, \log p - \log q)

    with both covariances from the same particles, so exact where the log-density is linear in the sites' statistics T,
    and unbiased elsewhere with two particles more than statistics: what is not linear takes the score function. In
    conjugate models one :class:`~pyro_elbo_ext.NaturalGradient` step with ``lr=1`` lands on the posterior. It needs no
    derivative of the model, and takes normal, multivariate normal, gamma, beta, Dirichlet, exponential, Bernoulli,
    categorical and Wishart sites that descend from no other, each with what is downstream of it and each plate element
    by itself; sites in the same plates jointly, where there are twice as many particles as statistics. Other sites
    take a path, or the plain score with a baseline. Costs one run of the pair and, at a site with n statistics,
    :math:`O(K n^2)`. The gradient is an ordinary one: any optimiser takes it.

    Args:
        num_particles: K. Twice the number of a plate element's statistics is a good choice, one more than those of its
            largest unit the least: 2 for a normal, gamma or beta, K for a Dirichlet or categorical of K,
            d (d + 3) / 2 for a multivariate normal, where :class:`ScoreRegression_ELBO` needs d + 1.
        baseline: of sites with the plain score, as in :class:`ScoreFunction_ELBO`.
        chunk_size: particles that are run at once.
        vectorize_particles: run the particles of a chunk at once.
        max_plate_nesting: plate dimensions of the pair.
        retain_graph: passed to ``backward``.

    Raises:
        ValueError: when run, too few particles for a site's statistics; the site is named.

    References:
        Fixed-Form Variational Posterior Approximation through Stochastic Linear Regression (Salimans, Knowles, 2013,
        arXiv:1206.6679).
    """

    def __init__(
        self,
        num_particles: int = 64,
        baseline: str | Baseline | Callable[[SiteCost], Tensor] | None = "leave-one-out",
        chunk_size: int | None = None,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(
            num_particles, baseline, Regression(), vectorize_particles, max_plate_nesting, retain_graph=retain_graph
        )
        self._roots = Roots()
        self.chunk_size = checked_chunk(chunk_size, num_particles, vectorize_particles)

    def _make_sampler(self, *args: Any, **kwargs: Any) -> ParticleSampler:
        return super()._make_sampler(*args, **(kwargs | {"num_particles": self.chunk_size or kwargs["num_particles"]}))

    def _is_scored(self, sampler: ParticleSampler) -> Callable[[Any], bool]:
        parents = self._roots.parents(sampler)

        def scored(node: Any) -> bool:
            if not is_reparameterized(node):
                return True
            return not parents.get(("guide", node["name"]), True) and regressable(node["fn"]) is not None

        return scored

    def _draw(self, sampler: ParticleSampler) -> list[Draw]:
        draws = self._runs(sampler)
        return self._runs(sampler) if self._roots.met_new_sites(sampler, draws) else draws

    def _runs(self, sampler: ParticleSampler) -> list[Draw]:
        draws: list[Draw] = []
        for _ in range(self.num_particles // sampler.num_particles):
            draws += super()._draw(sampler)
        return draws


class Roots:
    """Remembers which sites of a guide descend from no other, also where a minibatch's sites are named by its rows."""

    def __init__(self) -> None:
        self._parents: dict[Any, dict[Key, frozenset[str]]] = {}

    def parents(self, sampler: ParticleSampler) -> dict[Key, frozenset[str]]:
        """Return the random sites that each site met so far is drawn from."""
        key = sampler.model, sampler.guide, sampler.switches()
        if key not in self._parents:
            if len(self._parents) > 100:  # models made anew for every call must not pile up
                self._parents.clear()
            self._parents[key] = dict(sampler.find_dependencies().parents)
        return self._parents[key]

    def met_new_sites(self, sampler: ParticleSampler, draws: Sequence[Draw]) -> bool:
        """Look again where some draws have sites that were not there before; tell whether they had."""
        parents = self.parents(sampler)
        if all(("guide", name) in parents for draw in draws for name in draw.leaves):
            return False
        parents |= sampler.find_dependencies().parents
        return all(("guide", name) in parents for draw in draws for name in draw.leaves)


def checked_chunk(chunk_size: int | None, num_particles: int, vectorize: bool) -> int | None:
    """Return the particles of one run, None for all, or refuse what is no part of them."""
    if chunk_size is None:
        return None
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1 or num_particles % chunk_size:
        raise ValueError(
            f"chunk_size must be a whole number that divides num_particles={num_particles}, got {chunk_size!r}"
        )
    if not vectorize:
        raise ValueError("chunk_size is for vectorised particles; in a loop each is a chunk of its own. Leave it out.")
    return chunk_size
