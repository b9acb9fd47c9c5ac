"""Decides over which plates a bound factorises, and on which side of its log each scale stands."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pyro
import torch
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from pyro_elbo_ext.sites import Site, is_leaf, own_scale, plate_factor, vectorized_plates
from pyro_elbo_ext.tracing import Traces, forked_rng, run_pair

__all__ = [
    "Layout",
    "check_pair",
    "common_scale",
    "decide_layout",
    "decide_local_layout",
    "plate_nesting",
    "site_scales",
]


@dataclass(frozen=True)
class Layout:
    """What is decided once per structure of a model/guide pair.

    Attributes:
        plates: names of the plates over which the bound factorises.
        dims: their dimensions, negative.
        constants: ``(origin, name)`` of sites that depend on no random value and so need no weight.
        leaves: names of the guide's random sites.
    """

    plates: tuple[str, ...]
    dims: frozenset[int]
    constants: frozenset[tuple[str, str]]
    leaves: tuple[str, ...]


def _scored(trace: Any) -> dict[str, Any]:
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not site["infer"].get("_deterministic")
    }


def check_pair(traces: Traces) -> None:
    """Refuse a model and a guide that do not make a density ratio.

    Raises:
        ValueError: a latent that only one of them has, an observation in the guide, or a plate on
            whose size they differ; the site or plate is named.
    """
    model_sites, guide_sites = _scored(traces.model), _scored(traces.guide)
    latents = {name for name, site in model_sites.items() if not site["is_observed"]}
    for name, site in guide_sites.items():
        if site["is_observed"]:
            if not site_is_factor(site):
                raise ValueError(f"guide site '{name}' is observed: only the model can condition on data.")
        elif name not in latents and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"guide site '{name}' is not a latent site of the model. Rename it, or mark it "
                "infer={'is_auxiliary': True} if the guide needs it and the model does not."
            )
    missing = sorted(latents - set(guide_sites))
    if missing:
        raise ValueError(
            f"model site '{missing[0]}' is not in the guide, so it would be drawn from its prior without a weight. "
            "Sample it in the guide, or observe it; a discrete site can be summed out by pyro.infer.TraceEnum_ELBO."
        )
    guide_frames = {f.name: f for s in guide_sites.values() for f in s["cond_indep_stack"]}
    for name, site in model_sites.items():
        for f in site["cond_indep_stack"]:
            other = guide_frames.get(f.name)
            if other is not None and (f.dim, f.size, f.full_size) != (other.dim, other.size, other.full_size):
                raise ValueError(
                    f"plate '{f.name}' has (dim, size, full size) {(f.dim, f.size, f.full_size)} at model site "
                    f"'{name}', but {(other.dim, other.size, other.full_size)} in the guide: the two would be scaled "
                    "differently. Give both the same plate(name, size, subsample_size, dim)."
                )


def decide_layout(
    traces: Traces,
    requested: Sequence[str] | None,
    linear: bool,
    find_dependencies: Callable[[], Mapping[tuple[str, str], frozenset[str]]],
    max_plate_nesting: int,
) -> Layout:
    """Decide over which plates the bound of a pair factorises.

    A plate is kept where every random site of model and guide is inside it, so that its elements have weights of
    their own. A site outside it that depends on no random value is a constant; one that does forces a joint weight.

    Args:
        traces: of one run.
        requested: plates named by the user, or None for all that qualify.
        linear: scales may stand inside the bound.
        find_dependencies: returns the random sites that each site's log-density depends on; called only where it
            matters.
        max_plate_nesting: plate dimensions left for the pair.

    Raises:
        ValueError: a requested plate does not qualify, or a subsampled plate is not common to all weights.
    """
    sites, frames, leaves = _survey(traces, max_plate_nesting)
    if not leaves:
        return Layout((), frozenset(), frozenset(sites), ())
    find_dependencies_once = cache(find_dependencies)
    # A site that the dependency run did not meet, for the program changes with its values, counts as dependent.
    dependents = cache(lambda: {key for key in sites if find_dependencies_once().get(key, True)})
    outsiders = _outsiders(sites, leaves, frames, dependents)
    for plate in requested or ():
        if plate not in frames or plate in outsiders:
            raise ValueError(_not_common(plate, frames, outsiders))
    kept = set(frames) - set(outsiders) if requested is None else set(requested)
    constants = {key for key, site in sites.items() if kept - set(vectorized_plates(site))}
    for key, site in sites.items():
        inner = [f for f in site["cond_indep_stack"] if plate_factor(f) != 1 and f.name not in kept]
        if inner and not linear and key not in constants:
            if key in dependents():
                raise ValueError(_scale_inside(inner[0], key[1], outsiders))
            constants.add(key)
    plates = tuple(sorted(kept, key=lambda name: frames[name].dim))
    return Layout(plates, frozenset(frames[name].dim for name in plates), frozenset(constants), leaves)


def decide_local_layout(
    traces: Traces,
    plates: Sequence[str],
    linear: bool,
    find_dependencies: Callable[[], Mapping[tuple[str, str], frozenset[str]]],
    max_plate_nesting: int,
) -> Layout:
    """Check that a bound may take its log inside some plates only, and return the layout of what is inside.

    Args:
        traces: of one run.
        plates: names of those plates.
        linear: what stands outside is averaged, so a plate may be subsampled.
        find_dependencies: returns the random sites that each site's log-density depends on.
        max_plate_nesting: plate dimensions left for the pair.

    Raises:
        ValueError: an unknown plate, no random site inside, a site outside that depends on one inside, or a subsampled
            plate whose scale would stand inside a log; site or plate is named.
    """
    sites, frames, leaves = _survey(traces, max_plate_nesting)
    for plate in plates:
        if plate not in frames:
            raise ValueError(_not_common(plate, frames, {}))
    inside = {key for key, site in sites.items() if set(plates) <= set(vectorized_plates(site))}
    local = {name for name in leaves if ("guide", name) in inside}
    if not local:
        raise ValueError(
            f"local_particles > 1 needs a random guide site inside plates={tuple(plates)}, but there is none: every "
            "local particle would be the same. Use num_particles instead."
        )
    depends = find_dependencies()
    for key, site in sites.items():
        upstream = depends.get(key, frozenset(leaves)) & local
        if key not in inside and upstream:
            raise ValueError(
                f"{key[0]} site '{key[1]}' is outside plates={tuple(plates)} but depends on '{min(upstream)}' inside, "
                "so the elements are not independent given what is outside. Leave local_particles at 1."
            )
        for f in site["cond_indep_stack"]:
            if plate_factor(f) != 1 and ((key in inside and f.name not in plates) or not linear):
                raise ValueError(_scale_inside(f, key[1], {}))
    ordered = tuple(sorted(plates, key=lambda name: frames[name].dim))
    return Layout(ordered, frozenset(frames[name].dim for name in plates), frozenset(), leaves)


def _survey(traces: Traces, max_plate_nesting: int) -> tuple[dict, dict, tuple[str, ...]]:
    """Return the scored sites by ``(origin, name)``, the vectorised plates by name, and the names of the leaves."""
    sites = {("guide", n): s for n, s in _scored(traces.guide).items()}
    sites |= {("model", n): s for n, s in _scored(traces.model).items()}
    _check_nesting(sites.values(), max_plate_nesting)
    frames = {f.name: f for site in sites.values() for f in vectorized_plates(site).values()}
    return sites, frames, tuple(name for (origin, name), s in sites.items() if origin == "guide" and is_leaf(s))


def _outsiders(
    sites: dict[tuple[str, str], Any],
    leaves: Sequence[str],
    frames: dict[str, Any],
    dependents: Callable[[], set[tuple[str, str]]],
) -> dict[str, str]:
    """Return the plates that are not common to all random sites, each with a site outside it."""
    outsiders: dict[str, str] = {}
    for name in leaves:
        for plate in set(frames) - set(vectorized_plates(sites["guide", name])):
            outsiders.setdefault(plate, name)
    for key, site in sites.items():
        missing = set(frames) - set(outsiders) - set(vectorized_plates(site))
        if missing and key in dependents():
            outsiders |= dict.fromkeys(missing, key[1])
    return outsiders


def _check_nesting(sites: Iterable[Any], max_plate_nesting: int) -> None:
    for site in sites:
        for f in vectorized_plates(site).values():
            if -f.dim > max_plate_nesting:
                raise ValueError(
                    f"plate '{f.name}' at site '{site['name']}' takes dim {f.dim}, but this ELBO was first used with "
                    f"{max_plate_nesting} plate dimensions, and its particles lie left of those. Use a new ELBO for a "
                    f"model with more plates, or give it max_plate_nesting={-f.dim}."
                )


def _not_common(plate: str, frames: dict[str, Any], outsiders: dict[str, str]) -> str:
    if plate not in frames:
        known = ", ".join(f"'{name}'" for name in frames) or "none"
        return f"plates names '{plate}', but the model and guide have the vectorised plates {known}."
    return (
        f"the bound does not factorise over plate '{plate}': site '{outsiders.get(plate)}' is outside it and shares "
        "random values with it. Leave the plate out of plates=, or move the site inside."
    )


def _scale_inside(frame: Any, site: str, outsiders: dict[str, str]) -> str:
    outside = outsiders.get(frame.name)
    why = f"site '{outside}' is outside it" if outside else "a log is taken around it"
    return (
        f"plate '{frame.name}' is subsampled ({frame.size} of {frame.full_size}) but not common to all random sites: "
        f"{why}, so the scale of site '{site}' would stand inside the log, where the result is no bound. Use the full "
        f"batch; or IWAE_ELBO with local_particles > 1 and plates=('{frame.name}',), which takes the log inside the "
        "plate only; or an average: ScoreFunction_ELBO, or IWAE_ELBO with num_particles=1."
    )


def _user_scale(site: Site) -> float | Tensor:
    """The scale that the user put on a site, without its plates' N/B."""
    scale = site.node["scale"]
    if site.node["cond_indep_stack"]:
        scale = scale / own_scale(site.node)
    if isinstance(scale, Tensor):
        return scale
    return 1.0 if scale == 1 or math.isclose(scale, 1.0, rel_tol=1e-12) else float(scale)


def site_scales(
    sites: Sequence[Site], layout: Layout, max_plate_nesting: int
) -> tuple[list[float | Tensor], float | Tensor, bool | Tensor]:
    """Split each site's scale into a part inside the weights and one part outside the bound.

    The user's scale, equal on all sites of an element, stands outside; where it differs by site, as in KL annealing,
    it stands inside and the value is annealed. N/B of a common plate stands outside; that of any other plate is
    allowed for linear bounds only and stands inside.

    Returns:
        The scale inside for each site, the scale outside, and whether the value is annealed.
    """
    if not sites:
        return [], 1.0, False
    user = [_user_scale(site) for site in sites]
    subsampled = {f.name: f for site in sites for f in site.node["cond_indep_stack"] if f.name in layout.plates}
    outside: float | Tensor = math.prod(plate_factor(f) for f in subsampled.values())
    inside: list[float | Tensor]
    annealed: bool | Tensor
    if any(isinstance(scale, Tensor) for scale in user):
        shared, annealed = _shared_scale(user, layout, max_plate_nesting)
        inside = [scale / shared for scale in user]
        outside = shared * outside
    else:
        annealed = any(not math.isclose(scale, user[0], rel_tol=1e-9) for scale in user)
        inside = list(user) if annealed else [1.0] * len(user)
        outside = outside if annealed else outside * user[0]
    for i, site in enumerate(sites):
        if not site.node["cond_indep_stack"]:
            continue
        factor = math.prod(plate_factor(f) for f in site.node["cond_indep_stack"] if f.name not in layout.plates)
        if factor != 1:
            inside[i] = inside[i] * factor
    return inside, outside, annealed


def _shared_scale(scales: Sequence[float | Tensor], layout: Layout, max_plate_nesting: int) -> tuple[Tensor, Tensor]:
    """The scale that all sites of an element share, 1 where they share none, and whether any element has none."""
    example = next(scale for scale in scales if isinstance(scale, Tensor))
    lows, highs = [], []
    for scale in scales:
        scale = torch.as_tensor(scale, dtype=example.dtype, device=example.device)
        scale = scale.reshape((1,) * (max_plate_nesting - scale.dim()) + scale.shape)
        dims = [d for d in range(-scale.dim(), 0) if d not in layout.dims]
        lows.append(scale.amin(dims, keepdim=True) if dims else scale)
        highs.append(scale.amax(dims, keepdim=True) if dims else scale)
    low, high = lows[0], highs[0]
    for next_low, next_high in zip(lows[1:], highs[1:], strict=True):
        low, high = torch.minimum(low, next_low), torch.maximum(high, next_high)
    shared = torch.isclose(low, high, rtol=1e-6, atol=0.0)
    return torch.where(shared & (high != 0), high, torch.ones_like(high)), ~shared.all()


def common_scale(scales: Sequence[float | Tensor]) -> float | Tensor | None:
    """Return the one scale of all, None if they differ. Looks at values, but only where scales are tensors."""
    first = scales[0] if scales else 1.0
    if isinstance(first, Tensor):
        same = all(s is first or (isinstance(s, Tensor) and torch.equal(s, first)) for s in scales[1:])
    else:
        same = all(not isinstance(s, Tensor) and math.isclose(s, first, rel_tol=1e-9) for s in scales)
    return first if same else None


def plate_nesting(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> int:
    """Return how many dimensions a pair's plates take, from one run that leaves the random state alone."""
    with forked_rng(), pyro.poutine.block(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mismatches are refused with a better text when the pair is run for good
        traces = run_pair(model, guide, args, kwargs)
    sites = [site for trace in (traces.guide, traces.model) for site in trace.nodes.values()]
    dims = [f.dim for site in sites if site["type"] == "sample" for f in vectorized_plates(site).values()]
    return -min(dims, default=0)
