"""Which sites depend on which random values.

Found twice, and either finding counts: by tensors that carry their provenance, which see through integers and
comparisons, and by automatic differentiation, which sees through assignment in place and compiled functions. A
dependency missed would let a term be taken for a constant; one too many costs a looser bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_elbo_ext.plates import is_leaf
from pyro_elbo_ext.tracing import forked_rng, run_guide, run_model, run_pair

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
    _add_differentiable(model, guide, args, kwargs, parents, log_prob)
    return Dependencies(parents, log_prob)


def _add_differentiable(
    model: Callable, guide: Callable, args: tuple, kwargs: dict, parents: dict, log_prob: dict
) -> None:
    """Add the leaves that a site's log-density has a derivative in."""
    with forked_rng(), pyro.validation_enabled(False), pyro.poutine.block(), torch.enable_grad():
        drawn = run_guide(guide, args, kwargs, {})
        values = {name: site["value"].detach() for name, site in drawn.guide.nodes.items() if is_leaf(site)}
        copies = {name: z.requires_grad_() for name, z in values.items() if z.is_floating_point()}
        if not copies:
            return
        traces = run_pair(model, guide, args, kwargs, {**drawn.indices, **values})
        for origin, trace in (("guide", traces.guide), ("model", traces.model)):
            for name, site in trace.nodes.items():
                if (origin, name) in parents:
                    plain = site["value"].detach()
                    parents[origin, name] |= _differentiable(site, plain, copies)
                    log_prob[origin, name] |= _differentiable(site, site["value"], copies)


def _differentiable(site: Any, value: Tensor, copies: dict[str, Tensor]) -> frozenset[str]:
    try:
        total = site["fn"].log_prob(value).sum()
    except (NotImplementedError, KeyError, ValueError):  # a flow without an inverse: provenance has the last word
        return frozenset()
    if not total.requires_grad:
        return frozenset()
    slopes = torch.autograd.grad(total, list(copies.values()), retain_graph=True, allow_unused=True)
    return frozenset(name for name, slope in zip(copies, slopes, strict=True) if slope is not None)
