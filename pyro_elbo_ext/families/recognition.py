"""Which family a distribution belongs to, whatever it is wrapped in."""

from __future__ import annotations

from typing import NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions import transforms as torch_transforms

from pyro_elbo_ext.families.base import Family
from pyro_elbo_ext.families.conjugate import (
    BERNOULLI,
    BETA,
    CATEGORICAL,
    DIRICHLET,
    EXPONENTIAL,
    GAMMA,
    ONE_HOT_CATEGORICAL,
)
from pyro_elbo_ext.families.gaussian import MULTIVARIATE_NORMAL, NORMAL
from pyro_elbo_ext.families.wishart import WISHART

__all__ = ["Recognized", "recognize"]

FAMILIES: dict[type[Distribution], Family] = {
    torch.distributions.Normal: NORMAL,
    torch.distributions.MultivariateNormal: MULTIVARIATE_NORMAL,
    torch.distributions.Gamma: GAMMA,
    torch.distributions.Exponential: EXPONENTIAL,
    torch.distributions.Dirichlet: DIRICHLET,
    torch.distributions.Beta: BETA,
    torch.distributions.Bernoulli: BERNOULLI,
    torch.distributions.Categorical: CATEGORICAL,
    torch.distributions.OneHotCategorical: ONE_HOT_CATEGORICAL,
    torch.distributions.Wishart: WISHART,
}


WRAPPERS = (
    torch.distributions.Independent,
    torch.distributions.TransformedDistribution,
    ExpandedDistribution,
    dist.MaskedDistribution,
)


class Recognized(NamedTuple):
    """A distribution seen as a member of a family.

    Attributes:
        family: its family.
        fn: the distribution of that family inside the wrappers.
        event_dim: dimensions on the right of ``fn``'s batch that belong to one value.
        direct: True where values of the site are values of ``fn``, False where they are transformed.
        masked: True where a mask hides some of its elements.
    """

    family: Family
    fn: Distribution
    event_dim: int
    direct: bool
    masked: bool

    def arguments(self) -> dict[str, Tensor]:
        """Return the family's arguments, attached."""
        return self.family.read(self.fn)


def recognize(fn: Distribution) -> Recognized | None:
    """Look through masks, events, plates and fixed transforms; None where no family is known inside.

    A standard normal under an affine transform, as in ``AutoDiagonalNormal`` and ``AutoMultivariateNormal``, is the
    normal distribution that it makes.
    """
    event_dim = len(fn.event_shape)
    inner, direct, masked = fn, True, False
    while isinstance(inner, WRAPPERS):
        if isinstance(inner, torch.distributions.TransformedDistribution):
            if not all(transform.bijective for transform in inner.transforms):
                return None
            affine = _affine(inner)
            direct = direct and affine is not None and len(inner.transforms) == 1
            if affine is not None:
                inner = affine
                break
        masked = masked or isinstance(inner, dist.MaskedDistribution)
        inner = inner.base_dist
    family = next((FAMILIES[kind] for kind in type(inner).__mro__ if kind in FAMILIES), None)
    if family is None:
        return None
    own = len(inner.event_shape)
    return Recognized(family, inner, max(event_dim - own, 0), direct, masked)


def _affine(fn: torch.distributions.TransformedDistribution) -> Distribution | None:
    """Return the normal distribution that an affine transform makes of one, before any others."""
    base, transform = fn.base_dist, fn.transforms[0] if fn.transforms else None
    while hasattr(base, "base_dist"):
        base = base.base_dist
    if not isinstance(base, torch.distributions.Normal):
        return None
    if isinstance(transform, dist.transforms.LowerCholeskyAffine):
        loc, scale_tril = transform.loc, transform.scale_tril
        loc = loc + (scale_tril @ base.loc[..., None])[..., 0]
        made = torch.distributions.MultivariateNormal(
            loc, scale_tril=scale_tril * base.scale[..., None, :], validate_args=False
        )
        return made.expand(fn.batch_shape)
    if isinstance(transform, torch_transforms.AffineTransform) and isinstance(transform.scale, Tensor):
        loc, scale = transform.loc + transform.scale * base.loc, transform.scale.abs() * base.scale
        return torch.distributions.Normal(loc, scale, validate_args=False).expand(fn.batch_shape + fn.event_shape)
    return None
