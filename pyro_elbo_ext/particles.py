r"""Runs a model/guide pair for K particles and returns their log-weights, per plate and unscaled.

Everything an importance-weighted or score-function objective needs is one tensor, the log-weights
``log_w[num_particles, *plates]``. Two steps make it, so that an estimator can come between them:

1. :meth:`ParticleSampler.draw` runs the guide and keeps the values of its *leaves*, the sites that are truly random
   (everything but ``Delta`` sites, observed sites and subsample indices).
2. :meth:`ParticleSampler.evaluate` scores guide and model at those values, or at any others put in their place, such
   as detached copies whose gradient is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from pyro.util import check_site_shape
from torch import Tensor

from pyro_elbo_ext.dependencies import Dependencies, dependencies
from pyro_elbo_ext.plates import Layout, check_pair, common_scale, decide_layout, site_scales
from pyro_elbo_ext.sites import Site, is_flow, is_leaf, is_reparameterized
from pyro_elbo_ext.tracing import PARTICLE_PLATE, Traces, run_guide, run_model, run_pair

__all__ = ["Draw", "ParticleSampler", "Particles", "make_draw"]

SMALL = 1024  # numbers in a term up to which calls cost more than memory


@dataclass(frozen=True)
class Draw:
    """One run of the guide: all K particles if they are vectorised, one of them if not.

    Attributes:
        traces: of the guide, and of the model where the guide runs it itself.
        leaves: values of the random sites, attached to the guide's parameters.
        patched: True where a leaf no longer is what the guide drew.
        flow_log_prob: log-density of flows, taken at once: their caches hold the last draw only.
        noise: what flows that can be scored without an inverse made their leaves of.
    """

    traces: Traces
    leaves: dict[str, Tensor]
    patched: bool = False
    flow_log_prob: dict[str, Tensor] = field(default_factory=dict)
    noise: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Particles:
    """What the K particles of one step weigh.

    Attributes:
        log_joint: model log-density, less the guide's deterministic terms (the Jacobians in its ``Delta`` sites);
            ``[num_particles, *plates]``, where a dimension summed out has size 1.
        log_guide: the guide's log-density at its random leaves, of the same shape.
        scale: what stands outside the bound: subsampling's N/B times the user's scale; broadcasts with ``[*plates]``.
        constant: scaled log-density of sites that do not depend on any random value, a scalar.
        annealed: True where the user's scale differs between sites and so stands inside the weights.
        leaf_scales: the scale of each leaf inside the weights.
        layout: which plates are kept, and which sites are constants.
        runs: every scored site of every run, for reports and error messages.
    """

    log_joint: Tensor
    log_guide: Tensor
    scale: Tensor | float
    constant: Tensor | float
    annealed: bool | Tensor
    leaf_scales: dict[str, Tensor | float]
    layout: Layout
    runs: list[list[Site]] = field(repr=False)

    @property
    def leaf_scale(self) -> Tensor | float | None:
        """The scale inside the weights that the leaves share; None where they differ."""
        return common_scale(list(self.leaf_scales.values()))

    @property
    def log_weight(self) -> Tensor:
        """Log-weights ``[num_particles, *plates]`` in nats."""
        return self.log_joint - self.log_guide

    def total(self, value: Tensor) -> Tensor:
        """Return the nats of the whole from those of each plate element: scaled, added up, with the constants."""
        if isinstance(self.scale, Tensor) or self.scale != 1:
            value = value * self.scale
        value = value.sum()
        return value + self.constant if isinstance(self.constant, Tensor) or self.constant else value


@dataclass
class ParticleSampler:
    """Draws and scores the particles of one step.

    All particles share one minibatch: subsample indices are drawn once.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: their positional arguments.
        kwargs: their keyword arguments.
        num_particles: K.
        vectorize: run once with K along a plate left of all others, or K times.
        max_plate_nesting: dimensions that the pair's own plates take.
        plates: names of the plates to factorise over, or None to decide by the structure.
        linear: the bound is an average, so scales may stand inside the weights.
        layouts: cache of decided layouts, by structure.
        passed: what was checked once, by structure.

    Attributes:
        structure: what the last scored run's layout depends on, for caches of what else depends on it.
    """

    model: Callable
    guide: Callable
    args: tuple
    kwargs: dict
    num_particles: int
    vectorize: bool
    max_plate_nesting: int
    plates: Sequence[str] | None = None
    linear: bool = False
    layouts: dict[Any, Layout] = field(default_factory=dict)
    passed: set[Any] = field(default_factory=set)
    structure: Any = field(default=None, init=False)
    _indices: dict[str, Tensor] = field(default_factory=dict)
    _example: Tensor = field(default_factory=lambda: torch.zeros(()), init=False)  # for dtype and device
    _dropped: Tensor | None = None  # [num_particles, *plates], True where a weight counts as zero

    @property
    def particle_dims(self) -> int:
        """Dimensions that vectorised particles take, left of the plates."""
        return int(self.vectorize and self.num_particles > 1)

    @property
    def indices(self) -> dict[str, Tensor]:
        """Rows of the step's minibatch, by subsampled plate."""
        return self._indices

    def _wrapped(self, fn: Callable) -> Callable:
        if self.num_particles == 1 or not self.vectorize:
            return fn
        return pyro.plate(PARTICLE_PLATE, self.num_particles, dim=-self.max_plate_nesting - 1)(fn)

    def draw(self, *handlers: Messenger) -> list[Draw]:
        """Run the guide, under some handlers, and return its draws: one of K particles, or K of one."""
        return [self.draw_given({}, *handlers) for _ in range(1 if self.vectorize else self.num_particles)]

    def draw_given(self, values: Mapping[str, Tensor], *handlers: Messenger) -> Draw:
        """Run the guide once, with the values of some of its sites given."""
        with ExitStack() as stack:
            for handler in handlers:
                stack.enter_context(handler)
            traces = run_guide(self._wrapped(self.guide), self.args, self.kwargs, {**self._indices, **values})
        self._indices = {**traces.indices, **self._indices}
        return make_draw(traces)

    def evaluate(self, draws: Sequence[Draw], leaves: Sequence[dict[str, Tensor]] | None = None) -> Particles:
        """Score guide and model, and add up the log-weights.

        Args:
            draws: from :meth:`draw`.
            leaves: values to score at, one dict per draw; by default the drawn ones.

        Raises:
            ValueError: the pair does not match, or a plate's scale would stand inside the log; site or plate is named.
        """
        return self._weigh(*self.score(draws, leaves))

    def score(
        self, draws: Sequence[Draw], leaves: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[Layout, list[list[Site]]]:
        """Score guide and model as :meth:`evaluate` does, and return the layout and every run's sites."""
        layouts, runs = [], []
        for i, draw in enumerate(draws):
            scored: Mapping[str, Tensor] = {}
            if leaves is not None:
                traces = self._traces_at(leaves[i])
            elif draw.patched:
                traces = self._traces_at(draw.leaves)
            else:
                scored = draw.flow_log_prob
                traces = run_model(self._wrapped(self.model), self.args, self.kwargs, draw.traces, self._indices)
            self._indices = {**traces.indices, **self._indices}
            layouts.append(self._layout(traces))
            runs.append(self._score(traces, scored, draw.noise))
        if any(layout != layouts[0] for layout in layouts):
            raise ValueError(
                "particles of one step differ in their plates: the model's structure changes with its random values. "
                "One bound over them has no common shape; use num_particles=1, or pyro.infer.Trace_ELBO."
            )
        return layouts[0], runs

    def _traces_at(self, leaves: dict[str, Tensor]) -> Traces:
        model, guide = self._wrapped(self.model), self._wrapped(self.guide)
        return run_pair(model, guide, self.args, self.kwargs, {**self._indices, **leaves})

    def _layout(self, traces: Traces) -> Layout:
        sites = tuple(
            (trace is traces.guide, name, site["is_observed"], *_frames(site))
            for trace in (traces.guide, traces.model)
            for name, site in trace.nodes.items()
            if site["type"] == "sample"
        )
        key = self.structure = (self.model, self.guide, self.switches(), sites)
        layout = self.layouts.get(key)
        if layout is None:
            check_pair(traces)
            if len(self.layouts) > 100:  # models made anew for every call must not pile up
                self.layouts.clear()
                self.passed.clear()
            layout = self.layouts[key] = self._decide(traces)
        return layout

    def once(self, what: str, check: Callable[[], None]) -> None:
        """Check what has not passed before for the structure of the last scored run; a refusal is met every time."""
        if (what, self.structure) not in self.passed:
            check()
            self.passed.add((what, self.structure))

    def switches(self) -> tuple[str | bool | None, ...]:
        """What may change the dependencies and leave the sites: arguments that are no numbers, train or eval mode."""
        given = (*self.args, *self.kwargs.values())
        flags = [repr(value) if isinstance(value, (bool, str)) or value is None else "" for value in given]
        return (*flags, *self.kwargs, *(getattr(fn, "training", None) for fn in (self.model, self.guide)))

    def _decide(self, traces: Traces) -> Layout:
        return decide_layout(traces, self.plates, self.linear, self._dependencies, self.max_plate_nesting)

    def _dependencies(self) -> dict[tuple[str, str], frozenset[str]]:
        return self.find_dependencies().log_prob

    def find_dependencies(self) -> Dependencies:
        """Return what the sites of a run with this step's minibatch depend on."""
        return dependencies(self.model, self.guide, self.args, self.kwargs, self._indices)

    def _score(self, traces: Traces, scored: Mapping[str, Tensor], noise: Mapping[str, Tensor]) -> list[Site]:
        sites = []
        for origin, trace in (("guide", traces.guide), ("model", traces.model)):
            for name, node in trace.nodes.items():
                if node["type"] != "sample" or site_is_subsample(node) or node["infer"].get("_deterministic"):
                    continue
                log_prob = scored[name] if origin == "guide" and name in scored else None
                if log_prob is None and origin == "guide" and name in noise:
                    log_prob = node["fn"].log_prob_at(node["value"], noise[name])
                log_prob = _log_prob(name, node) if log_prob is None else log_prob
                if is_validation_enabled():
                    check_site_shape({**node, "log_prob": log_prob}, self.max_plate_nesting + self.particle_dims)
                    self._check_left(name, log_prob, traces)
                if node["mask"] is not None:
                    log_prob = scale_and_mask(log_prob, 1.0, node["mask"])
                self._example = log_prob
                sites.append(Site(name, origin, log_prob, node, origin == "guide" and is_leaf(node)))
        return sites

    def _check_left(self, name: str, log_prob: Tensor, traces: Traces) -> None:
        """Refuse what Pyro's own check leaves to enumeration: dimensions left of the particles."""
        room = self.max_plate_nesting + self.particle_dims
        left = log_prob.shape[: max(log_prob.dim() - room, 0)]
        if left.numel() != 1 and not any("enumerate" in node.get("infer", ()) for node in traces.guide.nodes.values()):
            raise ValueError(
                f"at site '{name}': the log-density has shape {tuple(log_prob.shape)}, which is more than "
                f"{self.particle_dims} dimension of particles and {self.max_plate_nesting} of plates: values with the "
                "particles in front were combined in the wrong dimensions. Index events from the right, or use "
                "vectorize_particles=False."
            )

    def _weigh(self, layout: Layout, runs: list[list[Site]]) -> Particles:
        constants: list[Site] = []
        weighted = runs
        if layout.constants:
            constants = [site for sites in runs for site in sites if site.key in layout.constants]
            weighted = [[site for site in sites if site.key not in layout.constants] for sites in runs]
        every = [site for sites in weighted for site in sites]
        constant: Any = sum(site.sign * (site.log_prob * site.node["scale"]).sum() for site in constants)
        constant = constant / self.num_particles
        inside, outside, annealed = site_scales(every, layout, self.max_plate_nesting)
        leaf_scales = {site.name: s for s, site in zip(inside, every, strict=True) if site.is_leaf}
        if not layout.leaves:
            zeros = self._example.new_zeros((self.num_particles,) + (1,) * self.max_plate_nesting)
            return Particles(zeros, zeros, 1.0, constant, annealed, {}, layout, runs)
        scales = iter(inside)
        log_joint, log_guide = [], []
        for sites in weighted:
            joint, guide = self._split(sites, scales, layout)
            log_joint.append(joint)
            log_guide.append(guide)
        joint = torch.cat(log_joint) if len(runs) > 1 else log_joint[0]
        guide = torch.cat(log_guide) if len(runs) > 1 else log_guide[0]
        if self._dropped is not None:
            joint = joint.masked_fill(self._dropped, -math.inf)
        return Particles(joint, guide, outside, constant, annealed, leaf_scales, layout, runs)

    def _split(self, sites: Sequence[Site], scales: Iterator[float | Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
        """Return log-joint and log-guide of one run, ``[particles, *plates]``."""
        terms: dict[str, list[Tensor]] = {"model": [], "guide": [], "leaf": []}
        for site in sites:
            scale = next(scales)
            unit = not isinstance(scale, Tensor) and scale == 1
            terms["leaf" if site.is_leaf else site.origin].append(site.log_prob if unit else site.log_prob * scale)
        leaf = self._total(terms["leaf"], layout)
        model = self._total(terms["model"], layout)
        if terms["guide"]:
            model = model - self._total(terms["guide"], layout)
        return model, leaf

    def _total(self, terms: Sequence[Tensor], layout: Layout) -> Tensor:
        """Add terms up over all but the particle and the common plates, each of which keeps its dimension."""
        by_shape: dict[torch.Size, list[Tensor]] = {}  # terms of one shape are added first: each shape is summed once
        for term in terms:
            by_shape.setdefault(term.shape, []).append(term)
        nesting = self.max_plate_nesting
        total = None
        for shape, alike in by_shape.items():
            small = len(alike) > 2 and shape.numel() <= SMALL
            term = torch.stack(alike).sum(0) if small else sum(alike[1:], alike[0])
            if len(shape) <= nesting:
                term = term.reshape((1,) * (nesting + 1 - len(shape)) + shape)
            dims = [d for d in range(-nesting, 0) if d not in layout.dims and term.shape[d] != 1]
            term = term.sum(dims, keepdim=True) if dims else term
            total = term if total is None else total + term
        return self._example.new_zeros((1,) * (nesting + 1)) if total is None else total

    def log_scores(self, draws: Sequence[Draw], particles: Particles) -> tuple[Tensor, Tensor]:
        """Return log q of the sites that are not reparameterised, attached to the parameters and to their parents.

        Taken from the guide's own run, so that a particle left out keeps the score of what it drew.

        Returns:
            The plain density, whose gradient is the score, and the masked and scaled one that stands inside the
            log-weights; both ``[num_particles, *plates]``.
        """
        plain, weighted = [], []
        for draw in draws:
            own, inside = [], []
            for name, node in draw.traces.guide.nodes.items():
                if name in draw.leaves and not is_reparameterized(node):
                    own.append(_log_prob(name, node))
                    inside.append(scale_and_mask(own[-1], particles.leaf_scales.get(name, 1.0), node["mask"]))
            plain.append(self._total(own, particles.layout))
            weighted.append(self._total(inside, particles.layout))
        return torch.cat(plain), torch.cat(weighted)

    def drop(self, draws: Sequence[Draw], log_w: Tensor, bad: Tensor) -> list[Draw]:
        """Give the ``bad`` particles weight zero and the leaves of their heaviest neighbour.

        :meth:`evaluate` masks their weight; what is put in their place only keeps their gradient finite, for zero
        times a derivative that is not finite is not zero. The guide's density is not renormalised, so the bound stays
        one.

        Args:
            draws: the step's draws.
            log_w: their log-weights ``[num_particles, *plates]``.
            bad: of the same shape, True where the particle is to be left out.
        """
        self._dropped = bad
        donor = log_w.detach().masked_fill(bad, -math.inf).argmax(0, keepdim=True)
        patched = []
        for part in ("leaves", "noise"):
            values = [dict(getattr(draw, part)) for draw in draws]
            for name in (name for name in self._droppable(draws) if name in values[0]):
                event_dim = draws[0].traces.guide.nodes[name]["fn"].event_dim
                self._replace(values, name, event_dim, bad, donor)
            patched.append(values)
        every = zip(draws, *patched, strict=True)
        return [Draw(draw.traces, leaves, patched=True, noise=noise) for draw, leaves, noise in every]

    def _replace(self, runs: list[dict[str, Tensor]], name: str, event_dim: int, bad: Tensor, donor: Tensor) -> None:
        """Put the donor's value in the place of the bad particles', ``[num_particles, *plates]``, in every run."""
        stacked = self.particle_dims > 0
        values = runs[0][name] if stacked else torch.stack([run[name] for run in runs])
        plate_dims = values.dim() - 1 - event_dim
        mask, source = (
            t.reshape(t.shape[:1] + t.shape[t.dim() - plate_dims :] + (1,) * event_dim) for t in (bad, donor)
        )
        chosen = values.detach().take_along_dim(source.expand((1,) + values.shape[1:]), 0)
        values = torch.where(mask, chosen, values)
        for run, value in zip(runs, [values] if stacked else values.unbind(), strict=True):
            run[name] = value

    def _droppable(self, draws: Sequence[Draw]) -> Iterable[str]:
        """Leaves that a log-weight stands for alone."""
        return draws[0].leaves


def make_draw(traces: Traces) -> Draw:
    """Return a run's random guide sites."""
    leaves = {name: node for name, node in traces.guide.nodes.items() if is_leaf(node)}
    flows = {name: _log_prob(name, node) for name, node in leaves.items() if is_flow(node["fn"])}
    drawn = {name: leaves[name]["fn"] for name in flows if hasattr(leaves[name]["fn"], "noise_of")}
    noise = {name: fn.noise_of(leaves[name]["value"]) for name, fn in drawn.items() if fn.score_rounds()}
    noise = {name: value for name, value in noise.items() if value is not None}  # a value held was not drawn
    return Draw(traces, {name: node["value"] for name, node in leaves.items()}, flow_log_prob=flows, noise=noise)


def _frames(site: Any) -> list[tuple]:
    """What a layout depends on in a site's plates: not their size, so that a ragged last batch decides nothing anew."""
    return [(f.name, f.dim, f.counter, f.full_size in (None, f.size)) for f in site["cond_indep_stack"]]


def _is_own_value(delta: dist.Delta, value: Tensor) -> bool:
    """Tell whether a ``Delta`` drew a value, which then is a view of all of its point."""
    point = delta.v
    if value is point:
        return True
    if value._base is None or value._base is not (point if point._base is None else point._base):
        return False
    places = [(t.shape, t.stride(), t.storage_offset()) for t in (value, point)]
    return places[0] == places[1]


def _log_prob(name: str, node: Any) -> Tensor:
    """Return a site's log-density, or say which site has none at its value."""
    fn, value = node["fn"], node["value"]
    if type(fn) is dist.Delta and value.is_floating_point() and _is_own_value(fn, value):
        return fn.log_density
    try:
        return fn.log_prob(value, *node["args"], **node["kwargs"])
    except ValueError as error:
        raise ValueError(f"at site '{name}': {error}") from error
    except (NotImplementedError, KeyError) as error:
        raise NotImplementedError(
            f"at site '{name}': {type(node['fn']).__name__} has no log_prob at a value it did not just draw, as a flow "
            "without an inverse has none. Use gradient='pathwise', which never needs one."
        ) from error
