r"""Antithetic pairs for Bernoulli sites.

Two values b, b' of one Bernoulli are drawn from one uniform number u: b = [u < p], b' = [1 - u < p]. With
:math:`\alpha` the logit and f the ELBO's terms downstream,

.. math:: g = \tfrac12 (f(b) - f(b'))\,(b - b')\,\sigma(|\alpha|)

is an unbiased gradient in :math:`\alpha`, with no variance where p = 1/2 in one dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_elbo_ext.dependencies import Dependencies
from pyro_elbo_ext.gradients.costs import Graph
from pyro_elbo_ext.gradients.sites import BernoulliGradient, Bits, Step, sampled_ancestors, undisturbed
from pyro_elbo_ext.particles import Draw, ParticleSampler
from pyro_elbo_ext.sites import base_distribution, is_reparameterized

__all__ = ["DisARM"]


class DisARM(BernoulliGradient):
    """DisARM, also known as U2G: half as many pairs as particles.

    Sites that descend from no sampled site are drawn in antithetic pairs. Those below them, whose logits differ
    between the two of a pair, are drawn independently and take the baseline, leave-one-out by default, over all
    particles. Reparameterised sites above are shared by a pair. Costs one run of the guide more than the plain score.

    References:
        DisARM: An Antithetic Gradient Estimator for Binary Latent Variables (Dong, Mnih, Tucker, 2020,
        arXiv:2006.10680); Probabilistic Best Subset Selection via Gradient-Based Optimization (Yin, Ho, Yan, Qian,
        Zhou, 2020, arXiv:2006.06448).
    """

    name = "disarm"
    runs_of = 2

    def draw(self, sampler: ParticleSampler, find: Callable[[Draw], Dependencies], *handlers: Messenger) -> list[Draw]:
        """Return the first of every pair, then the seconds."""
        firsts = sampler.draw(*handlers)
        return firsts + [sampler.draw_given(_partner(first, find(first)), *handlers) for first in firsts]

    def check(self, graph: Graph, nodes: Mapping[Any, Any], num_particles: int) -> None:
        """Refuse an odd number of particles as well."""
        super().check(graph, nodes, num_particles)
        if num_particles % 2 and graph.scored:
            raise ValueError(
                f"guide site '{graph.scored[0]}' is drawn in antithetic pairs under gradient=\"disarm\", which needs "
                f"an even num_particles, got {num_particles}. Give it one more."
            )

    def surrogate(self, step: Step) -> Any:
        """Return the pairs' surrogate at the roots, the plain one below them."""
        plain = self.plain_sites(step.graph, step.draws[0])
        return sum(step.plain(name) if name in plain else _paired(step, name) for name in step.graph.scored)

    def plain_sites(self, graph: Graph, draw: Draw) -> tuple[str, ...]:
        """Sites below other sampled ones."""
        return tuple(name for name in graph.scored if sampled_ancestors(name, draw, graph.found))


def _partner(first: Draw, found: Dependencies) -> dict[str, Tensor]:
    """Return the values of the sites that a pair's second run is given."""
    values = undisturbed(first, found)
    for name in first.leaves:
        node = first.traces.guide.nodes[name]
        if not is_reparameterized(node) and not sampled_ancestors(name, first, found):
            base = base_distribution(node["fn"])
            if isinstance(base, torch.distributions.Bernoulli):  # all else is refused once the pair was scored
                values[name] = _antithetic(node["value"], base.probs.detach())
    return values


def _antithetic(b: Tensor, p: Tensor) -> Tensor:
    """Draw the second of a pair given the first."""
    tiny = torch.finfo(p.dtype).tiny
    after_one, after_zero = (2 * p - 1).clamp(min=0) / p.clamp(min=tiny), (p / (1 - p).clamp(min=tiny)).clamp(max=1)
    return torch.bernoulli(torch.where(b == 1, after_one, after_zero))


def _paired(step: Step, name: str) -> Tensor:
    bits = Bits(step, name)
    (b, second), (logits, _) = bits.value.chunk(2), bits.logits.chunk(2)
    f, other = step.costs.downstream(name).detach().chunk(2, step.costs.particle_dim)
    coefficient = 0.5 * bits.per_event(f - other) * (b - second) * logits.detach().abs().sigmoid()
    return (coefficient * logits).sum() / len(b)
