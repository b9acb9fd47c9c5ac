"""Runs a model again at given draws of its latents: what follows from them, and what they predict.

All draws of a chunk run at once, along a plate left of the model's own, and each site's values come back as
``[num_samples, *plates, *event]`` with the site's own plates only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from pyro_elbo_ext.plates import check_pair
from pyro_elbo_ext.sites import is_leaf, plate_factor, vectorized_plates
from pyro_elbo_ext.tracing import PARTICLE_PLATE, Hold, Traces, forked_rng, run_pair

__all__ = ["Place", "Replayer", "Survey", "survey"]


class Place(NamedTuple):
    """Where the values of a site lie in one run of the model.

    Attributes:
        shape: of one run, ``[*batch, *event]``.
        batch: number of batch dimensions.
        labels: for each dimension of what is returned, the plate's name, or None for one of the event.
        kept: those dimensions of ``shape``; the others have size 1.
    """

    shape: tuple[int, ...]
    batch: int
    labels: tuple[str | None, ...]
    kept: tuple[int, ...]

    def of_log_prob(self) -> Place:
        """Where the site's log-density lies."""
        kept = tuple(axis for axis in self.kept if axis < self.batch)
        return Place(self.shape[: self.batch], self.batch, self.labels[: len(kept)], kept)

    def spread(self, value: Tensor, num: int) -> Tensor:
        """Bring the values of ``num`` draws to ``[num, *plates, *event]``; one that all share is repeated.

        Raises:
            RuntimeError: they don't lie there.
        """
        extra = max(value.dim() - len(self.shape), 0)
        lead = math.prod(value.shape[:extra])
        value = value.reshape(lead, *(1,) * (len(self.shape) - value.dim()), *value.shape[extra:])
        return value.expand(num, *self.shape).reshape(num, *(self.shape[axis] for axis in self.kept))

    def lift(self, value: Tensor, nesting: int) -> Tensor:
        """Bring ``[num, *plates, *event]`` to where a vectorised run has them, left of ``nesting`` plates."""
        return value.reshape(len(value), *(1,) * (nesting - self.batch), *self.shape)


def _place(node: Any) -> Place:
    frames = {f.dim: f for f in vectorized_plates(node).values()}
    value, fn = node["value"], node["fn"]
    if not node["infer"].get("_deterministic"):
        batch, shape = len(fn.batch_shape), (*fn.batch_shape, *value.shape[value.dim() - fn.event_dim :])
    elif fn.event_dim < value.dim():
        batch, shape = value.dim() - fn.event_dim, tuple(value.shape)
    else:  # pyro.deterministic takes all dimensions for the event's unless told otherwise
        batch, shape = _leading_plates(value.shape, frames), tuple(value.shape)
    plates = {i: frames[i - batch] for i in range(batch) if i - batch in frames}
    plates = {i: f for i, f in plates.items() if shape[i] == f.size}  # a deterministic value need not vary in a plate
    kept = tuple(i for i, size in enumerate(shape) if i >= batch or i in plates or size > 1)
    labels = tuple(plates[i].name if i in plates else None for i in kept)
    return Place(shape, batch, labels, kept)


def _leading_plates(shape: tuple[int, ...], frames: Mapping[int, Any]) -> int:
    """How many dimensions of a shape, from the left, are those of the plates around it."""
    for depth in range(min(len(shape), max((-dim for dim in frames), default=0)), 0, -1):
        sizes = [frames[dim].size if dim in frames else 1 for dim in range(-depth, 0)]
        if list(shape[:depth]) == sizes:
            return depth
    return 0


@dataclass(frozen=True)
class Survey:
    """What one run of a pair shows, its plates all seen in full.

    Attributes:
        traces: of that run.
        nesting: dimensions that the plates take.
        places: where each site of the model lies.
        latents: names of the model's latent sites.
        deterministic: names of ``pyro.deterministic`` sites.
        observed: names of observed sites, factors left out.
        plates: size of each vectorised plate.
    """

    traces: Traces
    nesting: int
    places: dict[str, Place]
    latents: tuple[str, ...]
    deterministic: tuple[str, ...]
    observed: tuple[str, ...]
    plates: dict[str, int]

    @property
    def is_point(self) -> bool:
        """The guide has no random site."""
        return not any(is_leaf(node) for node in self.traces.guide.nodes.values())


def survey(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Survey:
    """Run a pair once, the random state left as it was.

    Raises:
        ValueError: the pair does not match, or a plate is subsampled; site or plate is named.
    """
    with forked_rng(), poutine.block(), torch.no_grad():
        traces = run_pair(model, guide, args, kwargs)
    check_pair(traces)
    nodes = [node for trace in traces[:2] for node in trace.nodes.values() if node["type"] == "sample"]
    frames = {f.name: f for node in nodes for f in node["cond_indep_stack"] if f.name != PARTICLE_PLATE}
    for frame in frames.values():
        if plate_factor(frame) != 1:
            raise ValueError(
                f"plate '{frame.name}' has size {frame.full_size} and {frame.size} were seen: pass the full data, or "
                f"have the plate take all of it (subsample_size={frame.full_size} or None), in model and guide."
            )
    sites = {
        name: node
        for name, node in traces.model.nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node) and not site_is_factor(node)
    }
    deterministic = tuple(name for name, node in sites.items() if node["infer"].get("_deterministic"))
    return Survey(
        traces=traces,
        nesting=-min((f.dim for f in frames.values() if f.vectorized), default=0),
        places={name: _place(node) for name, node in sites.items()},
        latents=tuple(name for name, node in sites.items() if not node["is_observed"]),
        deterministic=deterministic,
        observed=tuple(name for name, node in sites.items() if node["is_observed"] and name not in deterministic),
        plates={name: f.size for name, f in frames.items() if f.vectorized},
    )


class _Uncondition(UnconditionMessenger):
    """Draws observed sites anew, but neither factors nor deterministic sites: those are observed in name only."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic") and not site_is_factor(msg):
            super()._pyro_sample(msg)


@dataclass(frozen=True)
class Replayer:
    """Runs a model at draws of its latents, in chunks, without gradients.

    Args:
        model: a Pyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        survey: of the model and any guide of it.
        chunk_size: draws of one run.
        vectorize: run a chunk at once, or its draws one by one.
    """

    model: Callable
    args: tuple
    kwargs: dict
    survey: Survey
    chunk_size: int = 100
    vectorize: bool = True

    def conditioned(self, values: Mapping[str, Tensor], num: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the deterministic sites and the observed sites' log-densities at some latents.

        Log-densities are those of single observations: unscaled; zero where a mask leaves one out.

        Args:
            values: of every latent, ``[num, *plates, *event]``.
            num: number of draws.

        Raises:
            ValueError: draws that are run at once do not give what each of them gives alone.
        """
        if self.vectorize:
            self._check_vectorized(values, min(num, 2))
        parts = [
            (self._values(trace, self.survey.deterministic, n), self._log_probs(trace, self.survey.observed, n))
            for n, trace in self._runs(values, num, self.vectorize)
        ]
        return _joined([part[0] for part in parts]), _joined([part[1] for part in parts])

    def predicted(self, values: Mapping[str, Tensor], num: int) -> dict[str, Tensor]:
        """Return draws of the observed sites at some latents."""
        runs = self._runs(values, num, self.vectorize, anew=True)
        return _joined([self._values(trace, self.survey.observed, n) for n, trace in runs])

    def prior(self, num: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return draws of latent and deterministic sites from the prior, and of observed ones given those.

        Raises:
            ValueError: the prior cannot be drawn from.
        """
        unknown = (*self.survey.latents, *self.survey.deterministic)
        try:
            parts = [
                (self._values(trace, unknown, n), self._values(trace, self.survey.observed, n))
                for n, trace in self._runs({}, num, self.vectorize, anew=True)
            ]
        except NotImplementedError as error:
            raise ValueError(
                "the model's prior cannot be drawn from, as an improper one or a flow without its other direction "
                "can't: leave 'prior' and 'prior_predictive' out of groups=."
            ) from error
        return _joined([part[0] for part in parts]), _joined([part[1] for part in parts])

    @torch.no_grad()
    def _runs(
        self, values: Mapping[str, Tensor], num: int, vectorize: bool, anew: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """Yield the number of draws and the trace of each run, observed sites drawn anew or not."""
        nesting, places = self.survey.nesting, self.survey.places
        size = self.chunk_size if vectorize else 1
        for start in range(0, num, size):
            n = min(size, num - start)
            held = {k: places[k].lift(v[start : start + n], nesting) for k, v in values.items()}
            if not vectorize:
                held = {name: value.reshape(places[name].shape) for name, value in held.items()}
            program = pyro.plate(PARTICLE_PLATE, n, dim=-nesting - 1)(self.model) if vectorize else self.model
            with poutine.block(), Hold(held), _Uncondition() if anew else nullcontext():
                trace = poutine.trace(program).get_trace(*self.args, **self.kwargs)
            yield n, trace

    def _values(self, trace: Any, names: tuple[str, ...], num: int) -> dict[str, Tensor]:
        return {name: self._spread(name, trace.nodes[name]["value"], num, self.survey.places[name]) for name in names}

    def _log_probs(self, trace: Any, names: tuple[str, ...], num: int) -> dict[str, Tensor]:
        log_probs = {}
        for name in names:
            node = trace.nodes[name]
            value = node["fn"].log_prob(node["value"], *node["args"], **node["kwargs"])
            value = scale_and_mask(value, 1.0, node["mask"])
            log_probs[name] = self._spread(name, value, num, self.survey.places[name].of_log_prob())
        return log_probs

    def _spread(self, name: str, value: Tensor, num: int, place: Place) -> Tensor:
        try:
            return place.spread(value.detach(), num)
        except RuntimeError as error:
            raise ValueError(
                f"site '{name}' has shape {tuple(value.shape)} for {num} draws at once and {place.shape} for one: "
                "draws were combined, or the model's shapes change with its values. Index events from the right, or "
                "use vectorize=False."
            ) from error

    def _check_vectorized(self, values: Mapping[str, Tensor], num: int) -> None:
        """Compare draws run at once with the same run one by one."""
        names = tuple(name for name in self.survey.places if name not in self.survey.deterministic)
        found = []
        for vectorize in (True, False):
            runs = list(self._runs(values, num, vectorize))
            log_probs = _joined([self._log_probs(trace, names, n) for n, trace in runs])
            found.append(log_probs | _joined([self._values(trace, self.survey.deterministic, n) for n, trace in runs]))
        together, alone = found
        for name, value in together.items():
            if not torch.allclose(value, alone[name], rtol=1e-3, atol=1e-3, equal_nan=True):
                raise ValueError(
                    f"site '{name}' differs between draws that are run at once and the same draws run one by one: the "
                    "model combines draws, as z.sum() over a plate does where z.sum(-1) is meant, or has randomness of "
                    "its own, as dropout in training mode. Index from the right and call .eval(), or use "
                    "vectorize=False."
                )


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
