"""Guides that an estimator of a bound would train wrongly, or not at all, and what to do instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from pyro_elbo_ext.dependencies import descendants
from pyro_elbo_ext.particles import Draw, Particles, ParticleSampler
from pyro_elbo_ext.sites import base_name, is_reparameterized

__all__ = ["check_not_enumerated", "check_once", "check_reparameterized", "check_scored"]


def check_once(sampler: ParticleSampler, draws: Sequence[Draw], particles: Particles, doubly: bool) -> None:
    """Refuse, when a structure is first met, what would be silently wrong under an estimator that scores again.

    Args:
        sampler: the step's sampler.
        draws: its draws.
        particles: scored again at the leaves of the draws.
        doubly: the estimator turns a score into a path derivative.
    """
    if is_validation_enabled():
        sampler.once("repeatable", lambda: check_repeatable(draws, particles))
    if doubly:
        sampler.once("masks", lambda: check_masks(sampler, particles))


def check_masks(sampler: ParticleSampler, particles: Particles) -> None:
    """Refuse a masked guide site whose value acts on sites outside the mask: its score is masked, its effect is not.

    Looks at values, once for each structure.

    Raises:
        ValueError: guide site and the other site are named.
    """
    sites = {site.key: site for site in particles.runs[0]}
    masked = [site for site in sites.values() if site.is_leaf and site.node["mask"] is not None]
    if not masked:
        return
    found = sampler.find_dependencies()
    below_path = descendants({s.name for s in sites.values() if s.is_leaf and is_reparameterized(s.node)}, found)
    for site in masked:
        if site.name not in below_path:  # its gradient is all score, and nothing is turned into a path
            continue
        acting = descendants({site.name}, found)
        for key, upstream in found.log_prob.items():
            if key in sites and upstream & acting and not _same_mask(site.node["mask"], sites[key].node["mask"]):
                raise ValueError(
                    f"guide site '{site.name}' is masked, but {key[0]} site '{key[1]}', which depends on it, is not "
                    "masked alike, for which there is no doubly reparameterised gradient. Put both under one mask, or "
                    "use gradient='pathwise'."
                )


def _same_mask(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        one, other = torch.broadcast_tensors(one, other)
        return bool(torch.equal(one, other))
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


def check_repeatable(draws: Sequence[Draw], particles: Particles) -> None:
    """Refuse a guide that is random outside its sample sites, by dropout say: run twice, it is two guides.

    Raises:
        ValueError: a leaf whose log-density at one value differs between two runs; the site is named.
    """
    for draw, sites in zip(draws, particles.runs, strict=True):
        for site in sites:
            if site.is_leaf and not draw.patched:
                node = draw.traces.guide.nodes[site.name]
                drawn = scale_and_mask(node["fn"].log_prob(node["value"]), 1.0, node["mask"])
                if not torch.allclose(drawn, site.log_prob, rtol=1e-3, atol=1e-3, equal_nan=True):
                    raise ValueError(
                        f"guide site '{site.name}' has another log-density when the guide is run again at the same "
                        "values: the guide is random outside its sample sites, as by dropout. Switch that off "
                        "(guide.eval()), or use gradient='pathwise', which runs the guide once."
                    )


def check_reparameterized(draws: Sequence[Draw], estimator: str, way_out: str = "") -> None:
    """Refuse a guide that a path estimator would silently not train.

    Args:
        draws: the step's draws.
        estimator: its name.
        way_out: what works with a site that is not reparameterised.

    Raises:
        ValueError: a leaf that is not reparameterised, or only in part, or enumerated; the site is named.
    """
    check_not_enumerated(draws)
    for draw in draws:
        for name in draw.leaves:
            node = draw.traces.guide.nodes[name]
            if not is_reparameterized(node):
                raise ValueError(
                    f"guide site '{name}' is a {base_name(node['fn'])}, which is not reparameterised: the "
                    f"{estimator} gradient would leave its parameters where they are. Use a reparameterised "
                    f"distribution at the site, or {way_out or 'ScoreFunction_ELBO, whose gradient works with any'}."
                )


def check_scored(draws: Sequence[Draw]) -> str:
    """Refuse a site whose gradient is part score, part path; the site is named. Returns one that is all score."""
    found = ""
    for draw in draws:
        for name in draw.leaves:
            fn = draw.traces.guide.nodes[name]["fn"]
            if is_reparameterized(draw.traces.guide.nodes[name]):
                continue
            if fn.has_rsample:
                raise ValueError(
                    f"guide site '{name}' is a {base_name(fn)}, whose gradient is part score, part path, for which "
                    "importance-weighted bounds have no rule. Use ScoreFunction_ELBO, which takes it for all score."
                )
            found = found or name
    return found


def check_not_enumerated(draws: Sequence[Draw]) -> None:
    """Refuse a guide site that asks to be summed out; the site is named."""
    for draw in draws:
        for name in draw.leaves:
            if draw.traces.guide.nodes[name]["infer"].get("enumerate"):
                raise ValueError(
                    f"guide site '{name}' asks for enumeration, which importance-weighted bounds do not do: remove "
                    "infer={'enumerate': ...}, or use ScoreFunction_ELBO, which sums it out of the ELBO."
                )
