"""Runs a model/guide pair and returns what happened at each site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["LOCAL_PLATE", "PARTICLE_PLATE", "Hold", "Traces", "forked_rng", "run_guide", "run_model", "run_pair"]

PARTICLE_PLATE = "num_particles_vectorized"  # Pyro's own name for it
LOCAL_PLATE = "local_particles_vectorized"


class Traces(NamedTuple):
    """One run of a pair: its traces, and the indices that its subsampled plates drew, by plate."""

    guide: Any
    model: Any  # None until the model was run
    indices: dict[str, Tensor]


class Hold(Messenger):
    """Fixes latent sites and subsample indices at given values.

    Unlike ``poutine.replay`` it leaves a site's ``infer`` dict alone, in which guides built as effect handlers keep
    their prior.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        value = self.values.get(msg["name"])
        if value is None or msg["is_observed"]:
            return
        if msg["value"] is not None and site_is_subsample(msg) and is_validation_enabled():
            _check_indices(msg["name"], msg["value"], value)
        msg["value"] = value
        msg["done"] = True


def _check_indices(plate: str, given: Any, held: Tensor) -> None:
    given = torch.as_tensor(given, device=held.device)
    if given.shape != held.shape or not torch.equal(given, held):
        raise ValueError(
            f"plate '{plate}' was given its subsample indices in the model, but the guide, which runs first, drew "
            "other ones: parameters of one row would be trained on the data of another. Give the guide the same "
            f"indices, for an AutoGuide by create_plates=lambda *args: pyro.plate('{plate}', ...)."
        )


def _indices(trace: Any) -> dict[str, Tensor]:
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site_is_subsample(site) and name not in (PARTICLE_PLATE, LOCAL_PLATE)
    }


def run_guide(guide: Callable, args: tuple, kwargs: dict, held: Mapping[str, Tensor]) -> Traces:
    """Run the guide with some values held; a guide that runs the model itself returns the model's trace too."""
    unwrapped = poutine.unwrap(guide)
    if isinstance(unwrapped, poutine.guide.GuideMessenger):
        with Hold(held):
            guide(*args, **kwargs)
        indices = _indices(unwrapped.trace)
        model_trace, guide_trace = unwrapped.get_traces()
        return Traces(guide_trace, model_trace, indices)
    with Hold(held) if held else nullcontext():
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return Traces(trace, None, _indices(trace))


def run_model(model: Callable, args: tuple, kwargs: dict, traces: Traces, held: Mapping[str, Tensor]) -> Traces:
    """Run the model at the values of a guide's run, unless that run holds the model's trace already."""
    if traces.model is not None:
        return traces
    values = {**held, **traces.indices}
    values |= {name: site["value"] for name, site in traces.guide.nodes.items() if site["type"] == "sample"}
    with Hold(values):
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    return Traces(traces.guide, trace, {**_indices(trace), **traces.indices})


def run_pair(
    model: Callable, guide: Callable, args: tuple, kwargs: dict, held: Mapping[str, Tensor] | None = None
) -> Traces:
    """Run the guide, then the model at the guide's values.

    Args:
        model: a Pyro model.
        guide: its guide, a function or an effect handler such as ``AutoNormalMessenger``.
        args: their positional arguments.
        kwargs: their keyword arguments.
        held: values for guide sites and subsample indices, by name; drawn afresh where missing.
    """
    held = held or {}
    return run_model(model, args, kwargs, run_guide(guide, args, kwargs, held), held)


def forked_rng() -> AbstractContextManager[None]:
    """Leave the random state of CPU and GPUs as it was, so that looking at a pair does not change what it draws."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0))
