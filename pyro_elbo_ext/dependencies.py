"""Which sites depend on which random values.

Found twice, and either finding counts: by tensors that carry their provenance, which see through integers and
comparisons, and by automatic differentiation, which sees through assignment in place and compiled functions. Where the
program looks at a value, to branch on it say, all that comes after depends on it. A dependency missed would let a term
be taken for a constant; one too many costs a looser bound. What mixes the elements of a plate inside that plate, a sum
over it say, is taken for what it claims to be, independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_elbo_ext.sites import is_leaf
from pyro_elbo_ext.tracing import forked_rng, run_guide, run_model, run_pair

__all__ = ["Dependencies", "Key", "completed", "dependencies", "descendants", "reach"]

Key = tuple[str, str]  # origin ("guide" or "model") and name of a site


class _TagLeaves(Messenger):
    """Replaces each leaf's value by one that knows its name; only direct dependencies are seen downstream.

    The value of a site computed from leaves, a ``Delta``, knows its own name too: it may stand in another plate.
    """

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_leaf(msg):
            msg["value"] = ProvenanceTensor(detach_provenance(msg["value"]), frozenset({msg["name"]}))
        elif msg["type"] == "sample" and not msg["is_observed"] and get_provenance(msg["value"]):
            names = get_provenance(msg["value"]) | {msg["name"]}
            msg["value"] = ProvenanceTensor(detach_provenance(msg["value"]), names)


_LOOKS = {
    getattr(Tensor, name) for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")
}


class _Looks(TorchFunctionMode):
    """Notes which random values the program looks at, and for each site which it had looked at before."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: frozenset[str] = frozenset()
        self.before: dict[str, frozenset[str]] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _LOOKS:
            self.seen |= get_provenance(args[0])
        return func(*args, **(kwargs or {}))


class _NoteLooks(Messenger):
    """Notes at each site what was looked at before it."""

    def __init__(self, looks: _Looks) -> None:
        super().__init__()
        self.looks = looks

    def _pyro_post_sample(self, msg: Any) -> None:
        self.looks.before.setdefault(msg["name"], self.looks.seen)


class Dependencies(NamedTuple):
    """Direct dependencies on leaves, by ``(origin, site name)``.

    Attributes:
        parents: leaves that the site's distribution, mask or scale is computed from.
        log_prob: the same, and those that its value is computed from.
        differentiable: those that its log-density has a derivative in.
    """

    parents: dict[Key, frozenset[str]]
    log_prob: dict[Key, frozenset[str]]
    differentiable: dict[Key, frozenset[str]]


def descendants(leaves: Iterable[str], found: Dependencies) -> frozenset[str]:
    """Return some leaves of a guide and all sites of it that are drawn, at any remove, from their values."""
    names = frozenset(leaves)
    while True:
        more = {n for (origin, n), up in found.parents.items() if origin == "guide" and up & names} - names
        if not more:
            return names
        names = names | more


def reach(leaf: str, found: Dependencies, plates: Mapping[Key, frozenset[str]]) -> dict[Key, frozenset[str]]:
    """Return the sites whose log-density a leaf's value acts on, directly or through other leaves of the guide.

    Inside a plate that holds the leaf an element acts on its own elements of the sites downstream, unless it acts
    through a leaf outside that plate, and so on all of them.

    Args:
        leaf: name of a random guide site.
        found: direct dependencies.
        plates: names of the plates around each site.

    Returns:
        By site, the plates around the leaf that its action crosses.
    """
    acting = descendants({leaf}, found)
    crossed = {
        plate: descendants({name for name in acting if plate not in plates["guide", name]}, found)
        for plate in plates["guide", leaf]
    }
    return {
        key: frozenset(plate for plate, names in crossed.items() if up & names)
        for key, up in found.log_prob.items()
        if up & acting
    }


def dependencies(
    model: Callable, guide: Callable, args: tuple, kwargs: dict, indices: Mapping[str, Tensor] | None = None
) -> Dependencies:
    """Run the pair once, leaving random state and parameters alone, and read off which leaves each site depends on.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: their positional arguments.
        kwargs: their keyword arguments.
        indices: rows of the minibatch, by subsampled plate: sites may be named by them.
    """
    held = dict(indices or {})
    with forked_rng(), pyro.validation_enabled(False), pyro.poutine.block():
        in_guide, in_model = _Looks(), _Looks()
        with in_guide, _NoteLooks(in_guide), _TagLeaves():
            traces = run_guide(guide, args, kwargs, held)
        with in_model, _NoteLooks(in_model):
            traces = run_model(model, args, kwargs, traces, held)
    parents: dict[Key, frozenset[str]] = {}
    log_prob: dict[Key, frozenset[str]] = {}
    for origin, trace, looks in (("guide", traces.guide, in_guide), ("model", traces.model, in_model)):
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or site_is_subsample(site) or site["infer"].get("_deterministic"):
                continue
            outside = get_provenance([site["mask"], site["scale"]]) | looks.before.get(name, frozenset())
            plain = detach_provenance(site["value"])
            parents[origin, name] = (outside | get_provenance(site["fn"].log_prob(plain))) - {name}
            log_prob[origin, name] = parents[origin, name] | get_provenance(site["value"])
    slopes = _add_differentiable(model, guide, args, kwargs, held, parents, log_prob)
    return Dependencies(parents, log_prob, slopes)


def completed(found: Dependencies, keys: Iterable[Key], leaves: Iterable[str]) -> Dependencies:
    """Add sites that the run did not meet, as in a program whose sites change with its values: they depend on all."""
    every = frozenset(leaves)
    new = [key for key in keys if key not in found.log_prob]
    if not new:
        return found
    return Dependencies(
        {**found.parents, **{key: every - {key[1]} for key in new}},
        {**found.log_prob, **dict.fromkeys(new, every)},
        {**found.differentiable, **dict.fromkeys(new, frozenset())},
    )


def _add_differentiable(
    model: Callable, guide: Callable, args: tuple, kwargs: dict, held: dict, parents: dict, log_prob: dict
) -> dict[Key, frozenset[str]]:
    """Add the leaves that a site's log-density has a derivative in, and return them by site."""
    slopes: dict[Key, frozenset[str]] = {key: frozenset() for key in log_prob}
    with forked_rng(), pyro.validation_enabled(False), pyro.poutine.block(), torch.enable_grad():
        drawn = run_guide(guide, args, kwargs, held)
        values = {name: site["value"].detach() for name, site in drawn.guide.nodes.items() if is_leaf(site)}
        copies = {name: z.requires_grad_() for name, z in values.items() if z.is_floating_point()}
        if not copies:
            return slopes
        traces = run_pair(model, guide, args, kwargs, {**held, **drawn.indices, **values})
        for origin, trace in (("guide", traces.guide), ("model", traces.model)):
            for name, site in trace.nodes.items():
                if (origin, name) in parents:
                    plain = site["value"].detach()
                    parents[origin, name] |= _differentiable(site, plain, copies)
                    slopes[origin, name] = _differentiable(site, site["value"], copies)
                    log_prob[origin, name] |= slopes[origin, name]
    return slopes


def _differentiable(site: Any, value: Tensor, copies: dict[str, Tensor]) -> frozenset[str]:
    try:
        total = site["fn"].log_prob(value).sum()
    except (NotImplementedError, KeyError, ValueError):  # a flow without an inverse: provenance has the last word
        return frozenset()
    if not total.requires_grad:
        return frozenset()
    slopes = torch.autograd.grad(total, list(copies.values()), retain_graph=True, allow_unused=True)
    return frozenset(name for name, slope in zip(copies, slopes, strict=True) if slope is not None)
