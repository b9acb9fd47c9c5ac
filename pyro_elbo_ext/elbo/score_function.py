"""The ELBO for guides with sites that are not reparameterised: discrete, mixed, or without a path."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_elbo_ext.dependencies import Dependencies
from pyro_elbo_ext.elbo.base import ParticleELBO
from pyro_elbo_ext.gradients.antithetic import DisARM
from pyro_elbo_ext.gradients.baselines import Baseline, PyroBaseline, make_baseline
from pyro_elbo_ext.gradients.control_variates import REBAR, RELAX, DoubleControlVariates
from pyro_elbo_ext.gradients.costs import Costs, Graph, SiteCost, make_graph
from pyro_elbo_ext.gradients.pathwise import Estimate
from pyro_elbo_ext.gradients.sites import SiteGradient, Step
from pyro_elbo_ext.handlers import DetachScored, Enumerate
from pyro_elbo_ext.particles import Draw, Particles, ParticleSampler
from pyro_elbo_ext.plates import Layout
from pyro_elbo_ext.sites import Site, is_reparameterized

__all__ = ["ScoreFunction_ELBO", "SiteExplanation"]


GRADIENTS: dict[str, type[SiteGradient]] = {
    kind.name: kind for kind in (SiteGradient, DisARM, DoubleControlVariates, REBAR, RELAX)
}


class SiteExplanation(NamedTuple):
    """What is done at a random site of the guide.

    Attributes:
        gradient: ``"pathwise"``, ``"enumerated"``, or the name of the gradient of a sampled site.
        baseline: of a site with the plain score; other estimators take none.
        downstream: sites whose terms make up a scored site's cost.
    """

    gradient: str
    baseline: str
    downstream: tuple[str, ...]


class ScoreFunction_ELBO(ParticleELBO):
    r"""The ELBO, with a gradient for any guide: score function where a site is not reparameterised, path elsewhere.

    .. math:: \nabla = \frac{1}{K} \sum_k \Big[ \sum_j \nabla t_{jk}
        + \sum_s \nabla \log q(s_k) \Big(\sum_{j \in D(s)} t_{jk} - b_s\Big) \Big]

    with the terms t of the ELBO and D(s) those downstream of s, element by element of the plates around s. Right
    where an auxiliary site follows a discrete one, on minibatches, and under masks and scales. Sites marked
    ``infer={"enumerate": "parallel"}`` in the guide are summed exactly. Costs one run of the pair and one backward.

    For guides whose sampled sites are Bernoulli, ``gradient=`` has estimators with less spread:

    ================= ================================================ ==========================================
    ``gradient=``     takes                                            costs, relative to ``"score"``
    ================= ================================================ ==========================================
    ``"score"``       any site                                         1
    ``"disarm"``      an even number of particles                      one more run of the guide
    ``"double-cv"``   a model with a derivative in the bits            one more backward
    ``"rebar"``       bits that descend from no others, and a model    two more runs of the pair, and a second
                      that takes values between 0 and 1                derivative
    ``"relax"``       the same                                         the same, and a network for each site
    ================= ================================================ ==========================================

    Args:
        num_particles: K.
        baseline: ``"leave-one-out"`` (needs K >= 2), ``"running-mean"``, ``"nvil"``, ``"none"``, a
            :class:`~pyro_elbo_ext.gradients.Baseline`, or a function from a
            :class:`~pyro_elbo_ext.gradients.SiteCost` to a tensor that broadcasts to its cost, and is no function of
            the site's own value or cost at the same particle. A site's own ``infer={"baseline": {...}}``, in Pyro's
            keys, comes first.
        gradient: a name of the table, or an object such as :class:`~pyro_elbo_ext.gradients.RELAX`; what needs no
            baseline leaves it alone.
        vectorize_particles: run all particles at once.
        max_plate_nesting: plate dimensions of the pair.
        retain_graph: passed to ``backward``.

    Raises:
        ValueError: an unknown baseline; when run, leave-one-out with one particle, a baseline that does not broadcast
            to its cost, or a subsampled plate whose elements a site outside depends on; site or plate is named.

    References:
        Gradient Estimation Using Stochastic Computation Graphs (Schulman, Heess, Weber, Abbeel, 2015,
        arXiv:1506.05254); Black Box Variational Inference (Ranganath, Gerrish, Blei, 2014, arXiv:1401.0118); Buy 4
        REINFORCE Samples, Get a Baseline for Free! (Kool, van Hoof, Welling, 2019).
    """

    def __init__(
        self,
        num_particles: int = 4,
        baseline: str | Baseline | Callable[[SiteCost], Tensor] | None = "leave-one-out",
        gradient: str | SiteGradient = "score",
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(
            num_particles, None, vectorize_particles, max_plate_nesting, nonfinite="raise", retain_graph=retain_graph
        )
        if not isinstance(gradient, SiteGradient) and gradient not in GRADIENTS:
            names = ", ".join(f'"{name}"' for name in GRADIENTS)
            raise ValueError(f"gradient must be one of {names} or a SiteGradient, got {gradient!r}")
        self.gradient = gradient if isinstance(gradient, SiteGradient) else GRADIENTS[gradient]()
        self.baseline = make_baseline(baseline)
        self.site_baseline = PyroBaseline()
        self._graphs: dict[Any, Graph] = {}
        self._dependencies: dict[Any, Dependencies] = {}
        self._enumerated: dict[str, int] = {}

    _can_drop = False

    @property
    def _linear(self) -> bool:
        return True

    def _make_sampler(self, *args: Any, **kwargs: Any) -> ParticleSampler:
        kwargs["num_particles"] = max(kwargs["num_particles"] // self.gradient.runs_of, 1)
        return super()._make_sampler(*args, **kwargs)

    def _is_scored(self, sampler: ParticleSampler) -> Callable[[Any], bool]:
        """Return what tells the sites whose gradient is not taken along a path."""
        return lambda node: not is_reparameterized(node)

    def _draw(self, sampler: ParticleSampler) -> list[Draw]:
        enumerate_sites = Enumerate(-sampler.max_plate_nesting - 2)  # left of the particles
        draws = self.gradient.draw(
            sampler,
            lambda draw: self._find(sampler, tuple(draw.leaves)),
            DetachScored(self._is_scored(sampler)),
            enumerate_sites,
        )
        self._enumerated = dict(enumerate_sites.dims)
        return draws

    def _estimate(self, sampler: ParticleSampler, draws: Sequence[Draw]) -> Estimate:
        layout, runs = sampler.score(draws)
        graph = self._graph(sampler, runs[0])
        costs = Costs(runs, graph, sampler.max_plate_nesting, sampler.num_particles if sampler.vectorize else 1)
        self.gradient.check(graph, costs.nodes, self.num_particles)
        objective, by_particle = costs.objective()
        if torch.is_grad_enabled() and graph.scored:
            self.baseline.register()

            def plain(name: str) -> Tensor:
                site = costs.site_cost(name, draws[0].traces.indices, sampler.args, sampler.kwargs)
                return self._surrogate(costs, site)

            surrogate = self.gradient.surrogate(Step(sampler, draws, costs, plain))
            objective = objective + (surrogate - surrogate.detach())
        whole = Layout((), frozenset(), frozenset(), layout.leaves)
        return Estimate(
            objective, Particles(by_particle, torch.zeros_like(by_particle), 1.0, 0.0, False, {}, whole, runs)
        )

    def _surrogate(self, costs: Costs, site: SiteCost) -> Any:
        """Return what adds the score of a site to the objective, and a baseline's own loss."""
        name, baseline = site.name, self.site_baseline if site.options else self.baseline
        if self.num_particles < baseline.min_particles:
            raise ValueError(
                f"guide site '{name}' is not reparameterised, and its leave-one-out baseline needs num_particles >= "
                f"{baseline.min_particles}, got {self.num_particles}. Raise num_particles, or use "
                'baseline="running-mean".'
            )
        value = _broadcastable(baseline(site), site)
        signal = (site.cost - value).detach()
        coefficient = signal * baseline.factor(site, signal) * site.scale
        probability = costs.probability(("guide", name))
        weight = probability.detach() if isinstance(probability, Tensor) else probability
        surrogate = (weight * coefficient * costs.scores[name]).sum() / self.num_particles
        if value.requires_grad:
            error = (site.cost - value) * baseline.unit(site)
            surrogate = surrogate - error.square().sum() / self.num_particles
        baseline.update(site, signal)
        return surrogate

    def _graph(self, sampler: ParticleSampler, sites: Sequence[Site]) -> Graph:
        key = sampler.structure, tuple(self._enumerated.items())
        if key not in self._graphs:
            if len(self._graphs) > 100:  # models made anew for every call must not pile up
                self._graphs.clear()
                self._dependencies.clear()
            found = self._find(sampler, sampler.structure)
            self._graphs[key] = make_graph(sites, found, self._enumerated, self._is_scored(sampler))
        return self._graphs[key]

    def _find(self, sampler: ParticleSampler, structure: Any) -> Dependencies:
        """Return what depends on what, found once for each structure."""
        key = sampler.model, sampler.guide, structure
        if key not in self._dependencies:
            self._dependencies[key] = sampler.find_dependencies()
        return self._dependencies[key]

    def state_dict(self) -> dict[str, Any]:
        """Return what baselines and estimators remember, and their networks; not the parameters of the pair."""
        return {name: getattr(self, name).state_dict() for name in ("baseline", "site_baseline", "gradient")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; it comes before what the param store holds."""
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)

    @torch.no_grad()
    def explain(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> dict[str, SiteExplanation]:
        """Say what this ELBO does at each random site of the guide. Runs the pair once."""
        sampler = self._sampler(model, guide, args, kwargs)
        draws = self._draw(sampler)
        _, runs = sampler.score(draws)
        graph = self._graph(sampler, runs[0])
        found = {}
        for name in draws[0].leaves:
            options = draws[0].traces.guide.nodes[name]["infer"].get("baseline")
            kind = "enumerated" if name in graph.enumerated else "pathwise"
            baseline, downstream = "", set()
            if name in graph.scored:
                kind, downstream = self.gradient.name, {site for _, site in graph.reach[name]}
            if name in self.gradient.plain_sites(graph, draws[0]):
                kind, baseline = "score", type(self.site_baseline if options else self.baseline).__name__
            found[name] = SiteExplanation(kind, baseline, tuple(sorted(downstream)))
        return found


def _broadcastable(value: Any, site: SiteCost) -> Tensor:
    try:
        value = torch.as_tensor(value, dtype=site.cost.dtype, device=site.cost.device)
        fits = torch.broadcast_shapes(value.shape, site.cost.shape) == site.cost.shape
    except TypeError as error:
        raise ValueError(
            f"the baseline of site '{site.name}' returned {type(value).__name__}; return a number or a tensor."
        ) from error
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"the baseline of site '{site.name}' has shape {tuple(value.shape)}, which does not broadcast to "
            f"{tuple(site.cost.shape)}, its cost's [num_particles, *plates] with plates {site.plates}. Return one "
            "value, one for each plate element, or one for each particle of each."
        )
    return value
