"""What a trace's sample sites are: random, reparameterised, in which plates, at what scale."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_elbo_ext.tracing import LOCAL_PLATE, PARTICLE_PLATE

__all__ = [
    "Site",
    "base_distribution",
    "base_name",
    "plate_factor",
    "is_flow",
    "is_leaf",
    "is_reparameterized",
    "own_scale",
    "vectorized_plates",
]


class Site(NamedTuple):
    """A scored sample site: masked, unscaled log-density and the trace's own record."""

    name: str
    origin: str  # "guide" or "model"
    log_prob: Tensor
    node: Any
    is_leaf: bool

    @property
    def key(self) -> tuple[str, str]:
        """Origin and name."""
        return self.origin, self.name

    @property
    def sign(self) -> int:
        """+1 for a term of the model, -1 for one of the guide."""
        return 1 if self.origin == "model" else -1


def is_leaf(site: Any) -> bool:
    """Tell whether a guide site is truly random: a sample, not observed, no subsample index, no ``Delta``."""
    if site["type"] != "sample" or site["is_observed"] or site_is_subsample(site):
        return False
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return not isinstance(fn, dist.Delta)


def base_distribution(fn: Any) -> Any:
    """Return the distribution that others are wrapped around."""
    while hasattr(fn, "base_dist") and not isinstance(fn, dist.Rejector):
        fn = fn.base_dist
    return fn


def base_name(fn: Any) -> str:
    """Name the distribution that others are wrapped around."""
    return type(base_distribution(fn)).__name__


def is_reparameterized(site: Any) -> bool:
    """Tell whether a leaf's whole gradient flows through its value; a ``Rejector``'s does only in part."""
    return site["fn"].has_rsample and not isinstance(base_distribution(site["fn"]), dist.Rejector)


def vectorized_plates(site: Any) -> dict[str, Any]:
    """Return the vectorised plates of a site by name, without those that hold the particles."""
    return {f.name: f for f in site["cond_indep_stack"] if f.vectorized and f.name not in (PARTICLE_PLATE, LOCAL_PLATE)}


def is_flow(fn: Any) -> bool:
    """Tell whether a distribution is a learned flow, whose inverse may be slow or missing."""
    if hasattr(base_distribution(fn), "noise_of"):
        return True
    while not hasattr(fn, "transforms") and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return any(isinstance(t, torch.nn.Module) for t in getattr(fn, "transforms", ()))


def plate_factor(frame: Any) -> float:
    """Return N/B of a plate."""
    return 1.0 if frame.full_size is None or frame.full_size == frame.size else frame.full_size / frame.size


def own_scale(site: Any) -> float:
    """Return N/B of all plates around a site."""
    return math.prod(plate_factor(frame) for frame in site["cond_indep_stack"])
