"""Which sites depend on which random values, found by running the pair on tensors that carry their provenance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_elbo_ext.plates import is_leaf
from pyro_elbo_ext.tracing import forked_rng, run_guide, run_model

__all__ = ["Dependencies", "dependencies"]


class _TagLeaves(Messenger):
    """Replaces each leaf's value by one that knows its name; only direct dependencies are seen downstream."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_leaf(msg):
            msg["value"] = ProvenanceTensor(detach_provenance(msg["value"]), frozenset({msg["name"]}))


class Dependencies(NamedTuple):
    """Direct dependencies on leaves, by ``(origin, site name)``.

    Attributes:
        parents: leaves that the site's distribution, mask or scale is computed from.
        log_prob: the same, and those that its value is computed from.
    """

    parents: dict[tuple[str, str], frozenset[str]]
    log_prob: dict[tuple[str, str], frozenset[str]]


def dependencies(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Dependencies:
    """Run the pair once, leaving random state and parameters alone, and read off which leaves each site depends on."""
    with forked_rng(), pyro.validation_enabled(False), pyro.poutine.block():
        with _TagLeaves():
            traces = run_guide(guide, args, kwargs, {})
        traces = run_model(model, args, kwargs, traces, {})
    parents, log_prob = {}, {}
    for origin, trace in (("guide", traces.guide), ("model", traces.model)):
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            outside = get_provenance([site["mask"], site["scale"]])
            plain = detach_provenance(site["value"])
            parents[origin, name] = outside | get_provenance(site["fn"].log_prob(plain))
            log_prob[origin, name] = parents[origin, name] | get_provenance(site["value"])
    return Dependencies(parents, log_prob)
