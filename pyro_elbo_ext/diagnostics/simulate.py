"""Data drawn from the model itself, whose latents are an exact draw of their posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_elbo_ext.diagnostics.target import Target
from pyro_elbo_ext.sites import base_distribution, plate_factor, vectorized_plates

__all__ = ["Simulation", "condition_on", "leaves_at", "simulate"]


class Simulation(NamedTuple):
    """One joint draw of a model.

    Attributes:
        latents: by latent site, ``[*plates, *event]`` in the site's own shape.
        observations: by observed site.
    """

    latents: dict[str, Tensor]
    observations: dict[str, Tensor]


@torch.no_grad()
def simulate(model: Callable, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Simulation:
    """Draw latents and data from the model, with the sizes that these arguments give it.

    Args:
        model: a Pyro model whose observed sites can be sampled.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        ValueError: a factor site, which no data can be drawn from, a subsampled plate, or no observed site.
    """
    trace = poutine.trace(poutine.uncondition(model)).get_trace(*args, **(kwargs or {}))
    latents: dict[str, Tensor] = {}
    observations: dict[str, Tensor] = {}
    nodes: dict[str, Any] = dict(trace.nodes)
    for name, node in nodes.items():
        if node["type"] != "sample" or site_is_subsample(node) or node["infer"].get("_deterministic"):
            continue
        for frame in vectorized_plates(node).values():
            if plate_factor(frame) != 1:
                raise ValueError(
                    f"plate '{frame.name}' is subsampled ({frame.size} of {frame.full_size}), but data must be drawn "
                    "for all its elements. Give the model the full batch."
                )
        if isinstance(base_distribution(node["fn"]), dist.Unit):
            raise ValueError(
                f"site '{name}' is a factor: the model's density is known but no data can be drawn from it. Write the "
                "term as the log-density of an observed site."
            )
        (observations if node["infer"].get("was_observed") else latents)[name] = node["value"].detach()
    if not observations:
        raise ValueError("the model has no observed site, so there is no data to draw.")
    return Simulation(latents, observations)


def condition_on(model: Callable, observations: Mapping[str, Tensor]) -> Callable:
    """Return the model with other data at its observed sites."""
    return poutine.condition(poutine.uncondition(model), data=dict(observations))


def leaves_at(target: Target, guide: Callable, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what the guide's random sites must have drawn for its latents to have some values.

    Args:
        target: densities of the pair, with one chain for each row of the latents.
        guide: a guide whose random sites are the model's own, or a Pyro AutoGuide.
        latents: by latent site, ``[num_chains, *plates, *event]`` with the site's own plates.

    Returns:
        Unconstrained values by random site of the guide.

    Raises:
        ValueError: a latent without values, or a guide whose random sites cannot be told from the latents'.
    """
    model = {site.name: site.node for site in target.particles.runs[0] if site.origin == "model"}
    for name, node in model.items():
        if not node["is_observed"] and name not in latents:
            raise ValueError(f"the reference has no draws of latent site '{name}'; it has {sorted(latents)}.")
    point = {}
    for name, start in target.start.items():
        source = name.removesuffix("_unconstrained")
        if name in latents:
            value = target.transforms[name].inv(_in_place(latents[name], model[name], target))
        elif source in latents:
            value = biject_to(model[source]["fn"].support).inv(_in_place(latents[source], model[source], target))
        elif isinstance(poutine.unwrap(guide), AutoContinuous):
            value = _packed(cast(AutoContinuous, poutine.unwrap(guide)), latents)
        else:
            raise ValueError(
                f"guide site '{name}' is not a latent site of the model, and what it must have drawn for given latents "
                "is not known for this guide. Use a guide whose sites are the model's, or AutoNormal."
            )
        point[name] = value.reshape((-1,) + (1,) * (start.dim() - value.dim()) + value.shape[1:]).expand_as(start)
    _check_inverse(target, point, latents, model)
    return point


def _in_place(value: Tensor, node: Any, target: Target) -> Tensor:
    """Give draws ``[num_chains, *plates, *event]`` a dimension for each plate of the pair."""
    frames = {f.dim: f.size for f in vectorized_plates(node).values()}
    batch = [frames.get(dim, 1) for dim in range(-target.sampler.max_plate_nesting, 0)]
    event = value.shape[1 + len(frames) :]
    if tuple(value.shape[1 : 1 + len(frames)]) != tuple(frames[dim] for dim in sorted(frames)):
        raise ValueError(
            f"draws of site '{node['name']}' have shape {tuple(value.shape)}; expected draws along the first "
            f"dimension, then one for each of its plates {list(vectorized_plates(node))}, then those of the event."
        )
    return value.reshape(value.shape[0], *batch, *event)


def _packed(guide: AutoContinuous, latents: Mapping[str, Tensor]) -> Tensor:
    """Return the vector that an AutoGuide draws all latents from."""
    parts = []
    for name, node in cast(Any, guide.prototype_trace).iter_stochastic_nodes():
        parts.append(biject_to(node["fn"].support).inv(latents[name]).reshape(latents[name].shape[0], -1))
    return torch.cat(parts, 1)


def _check_inverse(
    target: Target, point: dict[str, Tensor], latents: Mapping[str, Tensor], model: Mapping[str, Any]
) -> None:
    with torch.no_grad():
        _, particles = target(point)
    for site in particles.runs[0]:
        if site.origin == "guide" and site.name in latents:
            wanted = _in_place(latents[site.name], model[site.name], target)
            if not torch.allclose(site.node["value"], wanted.expand_as(site.node["value"]), rtol=1e-3, atol=1e-4):
                raise ValueError(
                    f"the guide cannot be made to give latent site '{site.name}' the reference's values: it computes "
                    "the site from its random ones in a way that is not known here."
                )
