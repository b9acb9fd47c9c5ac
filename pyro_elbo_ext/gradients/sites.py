r"""How the gradient at a guide's sampled sites is formed, for the ELBO.

A :class:`SiteGradient` draws the step's particles and returns a surrogate whose gradient is that of the sampled sites.
The plain one multiplies each site's score by its cost less a baseline. Those for Bernoulli sites estimate the gradient
g in the site's logits :math:`\alpha` outright, and their surrogate is :math:`\sum g\,\alpha` with g detached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_elbo_ext.dependencies import Dependencies, descendants
from pyro_elbo_ext.gradients.costs import Costs, Graph
from pyro_elbo_ext.gradients.memory import Memory
from pyro_elbo_ext.particles import Draw, ParticleSampler
from pyro_elbo_ext.sites import base_distribution, base_name, is_reparameterized

__all__ = ["BernoulliGradient", "Bits", "SiteGradient", "Step"]


@dataclass
class Step:
    """One step's particles and what they cost.

    Attributes:
        sampler: that drew them.
        draws: the draws.
        costs: the terms of the ELBO.
        plain: returns a site's surrogate by its score, cost and baseline.
    """

    sampler: ParticleSampler
    draws: Sequence[Draw]
    costs: Costs
    plain: Callable[[str], Tensor]

    @property
    def graph(self) -> Graph:
        """What is known of the pair's structure."""
        return self.costs.graph


class Bits:
    """A Bernoulli site at a step's particles, every tensor ``[num_particles, *plates, *event]``.

    Attributes:
        value: 0 or 1.
        logits: attached.
        event_dim: dimensions of one value.
    """

    def __init__(self, step: Step, name: str) -> None:
        nodes = [draw.traces.guide.nodes[name] for draw in step.draws]
        self.event_dim = nodes[0]["fn"].event_dim
        self.value = step.costs.along_particles([node["value"] for node in nodes], self.event_dim).detach()
        logits = step.costs.along_particles([base_distribution(node["fn"]).logits for node in nodes], self.event_dim)
        self.logits = logits.expand(self.value.shape)

    @property
    def probs(self) -> Tensor:
        """Detached."""
        return self.logits.detach().sigmoid()

    def per_event(self, cost: Tensor) -> Tensor:
        """Give a cost ``[num_particles, *plates]`` the event's dimensions."""
        return cost.reshape(cost.shape + (1,) * self.event_dim)

    def over_event(self, value: Tensor) -> Tensor:
        """Sum a tensor over the event's dimensions."""
        return value.sum(tuple(range(-self.event_dim, 0))) if self.event_dim else value


class SiteGradient(Memory):
    """The plain score function: every sampled site's score times its cost less a baseline.

    Attributes:
        name: what ``gradient=`` calls it.
        runs_of: how many particles one run of the pair stands for.
    """

    name: str = "score"
    runs_of: int = 1

    def draw(self, sampler: ParticleSampler, find: Callable[[Draw], Dependencies], *handlers: Messenger) -> list[Draw]:
        """Return the step's draws; ``find`` tells the dependencies of a guide's run."""
        return sampler.draw(*handlers)

    def check(self, graph: Graph, nodes: Mapping[Any, Any], num_particles: int) -> None:
        """Refuse a guide for which the gradient would be wrong; the site is named."""

    def plain_sites(self, graph: Graph, draw: Draw) -> tuple[str, ...]:
        """Names of the sampled sites that take the plain score, and so a baseline."""
        return graph.scored

    def surrogate(self, step: Step) -> Any:
        """Return a scalar whose gradient is that of the sampled sites."""
        return sum(step.plain(name) for name in step.graph.scored)


class BernoulliGradient(SiteGradient):
    """Base of gradients for guides whose sampled sites are all Bernoulli."""

    def plain_sites(self, graph: Graph, draw: Draw) -> tuple[str, ...]:
        """None: the estimator is its own control."""
        return ()

    def check(self, graph: Graph, nodes: Mapping[Any, Any], num_particles: int) -> None:
        """Refuse sites that are not binary, or enumerated ones beside them."""
        for name in graph.scored:
            fn = nodes["guide", name]["fn"]
            if not isinstance(base_distribution(fn), torch.distributions.Bernoulli):
                raise ValueError(
                    f"guide site '{name}' is a {base_name(fn)}, and gradient=\"{self.name}\" is for binary sites only. "
                    'Use a Bernoulli, or gradient="score".'
                )
        for name in graph.enumerated:
            raise ValueError(
                f"guide site '{name}' is enumerated, for which gradient=\"{self.name}\" has no proven rule. Use "
                'gradient="score", which sums it exactly.'
            )


def sampled_ancestors(name: str, draw: Draw, found: Dependencies) -> list[str]:
    """Return the sampled, not reparameterised sites that a site descends from in the guide."""
    nodes = draw.traces.guide.nodes
    scored = [other for other in draw.leaves if not is_reparameterized(nodes[other])]
    return [other for other in scored if other != name and name in descendants({other}, found)]


def undisturbed(draw: Draw, found: Dependencies) -> dict[str, Tensor]:
    """Return the values of the reparameterised leaves that descend from no sampled site."""
    nodes = draw.traces.guide.nodes
    scored = [name for name in draw.leaves if not is_reparameterized(nodes[name])]
    below = descendants(scored, found)
    return {name: value for name, value in draw.leaves.items() if name not in below}
