r"""What each random site of a guide costs: the terms of the ELBO that its value acts on.

Write the ELBO of one particle as a sum of terms :math:`t_j`, one a site: :math:`\log p` in the model,
:math:`-\log q` in the guide. For a site s that is not reparameterised

.. math:: \nabla E[t] = E\Big[\sum_j \nabla t_j + \sum_s \nabla \log q(s) \sum_{j \in D(s)} t_j\Big]

with D(s) the terms downstream of s, element by element of the plates around s (Rao-Blackwellisation: all others have
mean zero against the score). A guide site that is enumerated stands in a dimension of its own, left of the particles;
its terms are weighted by its probabilities, and summed, exactly.

References:
    Gradient Estimation Using Stochastic Computation Graphs (Schulman, Heess, Weber, Abbeel, 2015, arXiv:1506.05254);
    Black Box Variational Inference (Ranganath, Gerrish, Blei, 2014, arXiv:1401.0118).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_elbo_ext.dependencies import Dependencies, Key, completed, reach
from pyro_elbo_ext.sites import Site, is_reparameterized, own_scale, vectorized_plates

__all__ = ["Costs", "Graph", "SiteCost", "make_graph", "without_particles"]


class Graph(NamedTuple):
    """What is known of a pair's structure, found once.

    Attributes:
        found: direct dependencies.
        plates: dimension of each vectorised plate around a site, by name.
        enumerated: leaves that are summed out, with the dimension of each.
        scored: leaves that are sampled and have no path, as they are not reparameterised.
        reach: of each of these leaves, the sites it acts on and the plates that its action crosses.
    """

    found: Dependencies
    plates: dict[Key, dict[str, int]]
    enumerated: dict[str, int]
    scored: tuple[str, ...]
    reach: dict[str, dict[Key, frozenset[str]]]


class SiteCost(NamedTuple):
    """The cost of a site's value, as a baseline sees it.

    Attributes:
        name: of the site.
        cost: nats downstream of each element, without its plates' N/B, detached; ``[num_particles, *plates]``, where a
            plate that is not around the site has size 1.
        plates: dimension of each vectorised plate around the site, by name, negative.
        sizes: full size of each of them.
        indices: rows of each of them that are in the minibatch.
        parents: values of the guide's sites that the site's distribution is computed from, detached,
            ``[num_particles, *plates, *event]``.
        args: positional arguments of model and guide.
        kwargs: keyword arguments.
        scale: N/B of the site's plates.
        options: the site's ``infer["baseline"]``.
        particle_dim: dimension of the particles in the cost, negative.
    """

    name: str
    cost: Tensor
    plates: dict[str, int]
    sizes: dict[str, int]
    indices: dict[str, Tensor]
    parents: dict[str, Tensor]
    args: tuple
    kwargs: dict
    scale: float
    options: Mapping[str, Any]
    particle_dim: int


def make_graph(
    sites: Sequence[Site],
    found: Dependencies,
    enumerated: Mapping[str, int],
    is_scored: Callable[[Any], bool] = lambda node: not is_reparameterized(node),
) -> Graph:
    """Find out what each leaf of a guide acts on; ``is_scored`` tells the leaves without a path.

    Raises:
        ValueError: a subsampled plate that a cost stands outside of, or a sum over a site in a plate that does not
            part by elements; site and plate are named.
    """
    plates = {site.key: {name: f.dim for name, f in vectorized_plates(site.node).items()} for site in sites}
    names = {key: frozenset(dims) for key, dims in plates.items()}
    found = completed(found, names, [site.name for site in sites if site.is_leaf])
    for key in found.log_prob:
        names.setdefault(key, frozenset())
    scored = tuple(s.name for s in sites if s.is_leaf and is_scored(s.node) and s.name not in enumerated)
    reached = {name: reach(name, found, names) for name in (*scored, *enumerated)}
    for site in sites:
        if site.origin == "guide" and site.name in reached:
            _check_plates(site, reached[site.name], names, site.name in enumerated)
    return Graph(found, plates, dict(enumerated), scored, reached)


def _check_plates(
    site: Site, acts_on: Mapping[Key, frozenset[str]], names: Mapping[Key, frozenset[str]], summed: bool
) -> None:
    for key, crossed in acts_on.items():
        for frame in vectorized_plates(site.node).values():
            if frame.name in names[key] and frame.name not in crossed:
                continue
            where = f"{key[0]} site '{key[1]}' depends on all elements of site '{site.name}' in plate '{frame.name}'"
            if summed:
                raise ValueError(
                    f"{where}, which is enumerated: its sum has a term for every joint state of the plate. Sample the "
                    "site (remove infer={'enumerate': ...}), or move what depends on it into the plate."
                )
            if frame.full_size not in (None, frame.size):
                raise ValueError(
                    f"{where}, which is subsampled ({frame.size} of {frame.full_size}): a minibatch does not hold "
                    "what its score must be multiplied by. Use the full batch, or move what depends on the site into "
                    "the plate."
                )


@dataclass
class Costs:
    """The terms of the ELBO at one step's particles.

    Every tensor is ``[*enumerated, num_particles, *plates]`` with ``nesting`` plate dimensions.

    Args:
        runs: the scored sites of every run.
        graph: of the pair.
        nesting: plate dimensions.
        run_size: particles of each run.
    """

    runs: Sequence[Sequence[Site]]
    graph: Graph
    nesting: int
    run_size: int = 1

    def __post_init__(self) -> None:
        """Stack what every run scored."""
        self.particle_dim = -self.nesting - 1
        self.nodes = {site.key: site.node for site in self.runs[0]}
        by_key: dict[Key, list[Site]] = {key: [] for key in self.nodes}
        for sites in self.runs:
            changed = {site.key for site in sites} ^ set(by_key)
            if changed:
                raise ValueError(
                    f"site '{min(changed)[1]}' is not in every particle of a step: the program's sites change with its "
                    "random values. Use num_particles=1, which needs no common shape."
                )
            for site in sites:
                by_key[site.key].append(site)
        self.terms = {
            key: self._stack([site.log_prob for site in sites]) * (sites[0].sign * sites[0].node["scale"])
            for key, sites in by_key.items()
        }
        self.size = max((term.shape[self.particle_dim] for term in self.terms.values()), default=1)
        wanted = (*self.graph.scored, *self.graph.enumerated)
        self.scores = {name: self._stack([_score(site) for site in by_key["guide", name]]) for name in wanted}

    def _stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Join the particles of every run, each dimension in its place."""
        padded = [t.reshape((1,) * (self.nesting + 1 - t.dim()) + t.shape) for t in tensors]
        if len(padded) == 1:
            return padded[0]
        return torch.cat([_expand(t, self.particle_dim, self.run_size) for t in padded], self.particle_dim)

    def probability(self, key: Key, given: Iterable[str] = ()) -> Tensor | float:
        """Return the probability of the enumerated values that a site stands under, attached; 1 without any."""
        log_q = [
            self.scores[name]
            for name in self.graph.enumerated
            if name not in given and (key == ("guide", name) or key in self.graph.reach[name])
        ]
        return torch.stack(torch.broadcast_tensors(*log_q)).sum(0).exp() if log_q else 1.0

    def objective(self) -> tuple[Tensor, Tensor]:
        """Return the ELBO, without the score of its own sampled sites, which has mean zero, and its parts by particle.

        Returns:
            A scalar with the gradient of every path and of every sum, and ``[num_particles, 1...]``, both in nats.
        """
        by_particle: Any = 0.0
        for key, term in self.terms.items():
            term = term.detach() if key[0] == "guide" and key[1] in self.graph.scored else term
            term = self._weighted(key, term)
            dims = [d for d in range(-term.dim(), 0) if d != self.particle_dim]
            term = term.sum(dims, keepdim=True) if dims else term  # torch takes no dimensions for all of them
            by_particle = by_particle + term.reshape((-1,) + (1,) * self.nesting)
        return by_particle.mean(0).sum(), by_particle.detach()

    def _weighted(self, key: Key, term: Tensor, given: Iterable[str] = ()) -> Tensor:
        probability = self.probability(key, given)
        if not isinstance(probability, Tensor):
            return term
        return probability * torch.where(probability == 0, torch.zeros_like(term), term)

    def total(self) -> Tensor:
        """Return the sum of all terms over everything, attached."""
        return torch.stack(
            [term.sum() * (self.size / term.shape[self.particle_dim]) for term in self.terms.values()]
        ).sum()

    def downstream(self, name: str) -> Tensor:
        """Return the sum of the terms downstream of each element of a site, ``[num_particles, *plates]``.

        Enumerated sites that the site itself stands under keep their dimensions; all others are summed.
        """
        own = ("guide", name)
        above = [e for e in self.graph.enumerated if own in self.graph.reach[e]]
        total: Any = 0.0
        by_kept: dict[tuple, Any] = {}  # terms of one shape and one fate are added first
        for key, crossed in self.graph.reach[name].items():
            if key not in self.terms:
                continue
            term = self._weighted(key, self.terms[key], above)
            common = set(self.graph.plates[key]) & set(self.graph.plates[own]) - crossed
            kept = frozenset(self.graph.plates[own][plate] for plate in common)
            by_kept[kept, term.shape] = by_kept.get((kept, term.shape), 0.0) + term
        ranges = [self.graph.enumerated[e] for e in above]
        for (kept, shape), term in by_kept.items():
            dims = [
                d
                for d in range(-len(shape), 0)
                if d != self.particle_dim and d not in kept and d not in ranges and shape[d] != 1
            ]
            total = total + (term.sum(dims, keepdim=True) if dims else term)
        return total

    def _value(self, name: str) -> Tensor:
        """Return a guide site's values, detached, ``[num_particles, *plates, *event]``."""
        nodes = [site.node for sites in self.runs for site in sites if site.key == ("guide", name)]
        return self.along_particles([node["value"].detach() for node in nodes], nodes[0]["fn"].event_dim)

    def along_particles(self, tensors: Sequence[Tensor], event_dim: int) -> Tensor:
        """Join tensors with event dimensions, one a run, as ``[num_particles, *plates, *event]``."""
        dim = self.particle_dim - event_dim
        padded = [t.reshape((1,) * (-dim - t.dim()) + t.shape) for t in tensors]
        if len(padded) == 1:
            return padded[0]
        return torch.cat([_expand(t, dim, self.run_size) for t in padded], dim)

    def site_cost(self, name: str, indices: Mapping[str, Tensor], args: tuple, kwargs: dict) -> SiteCost:
        """Return what a baseline is told of a site.

        Args:
            name: of the site.
            indices: rows of the step's minibatch, by subsampled plate.
            args: positional arguments of model and guide.
            kwargs: keyword arguments.
        """
        node = self.nodes["guide", name]
        scale = own_scale(node)
        frames = vectorized_plates(node)
        cost = self.downstream(name).detach()
        parents = {
            parent: self._value(parent)
            for parent in sorted(self.graph.found.parents["guide", name])
            if ("guide", parent) in self.nodes  # a program that changes may have had others
        }
        return SiteCost(
            name,
            cost / scale if scale != 1 else cost,
            {plate: frame.dim for plate, frame in frames.items()},
            {plate: frame.full_size or frame.size for plate, frame in frames.items()},
            {plate: index for plate, index in indices.items() if plate in frames},
            parents,
            args,
            kwargs,
            scale,
            node["infer"].get("baseline") or {},
            self.particle_dim,
        )


def _expand(t: Tensor, dim: int, size: int) -> Tensor:
    return t.expand(t.shape[:dim] + (size,) + t.shape[t.dim() + dim + 1 :])


def without_particles(t: Tensor, event_dim: int, nesting: int) -> Tensor:
    """Return what all particles share as ``[*plates, *event]``, with ``nesting`` plate dimensions."""
    batch, event = t.shape[: t.dim() - event_dim], t.shape[t.dim() - event_dim :]
    if len(batch) > nesting:
        return t[(0,) * (len(batch) - nesting)]
    return t.reshape((1,) * (nesting - len(batch)) + batch + event)


def _score(site: Site) -> Tensor:
    """A leaf's plain log-density: a mask changes what it costs, not how it is drawn."""
    if site.node["mask"] is None:
        return site.log_prob
    return scale_and_mask(site.node["fn"].log_prob(site.node["value"]), 1.0, None)
