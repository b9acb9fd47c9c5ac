r"""Automatic non-centring: where a prior is a location-scale family given other latents, the guide works on its noise.

With u the unconstrained value of a site whose prior is u = a + B e, e standard, given other latents, the flow draws w
and

.. math:: u = a + B^{1-c} (w - c a)

for a learned weight c per site: c = 0 is non-centred, c = 1 centred, u = w. For a triangular B, whose powers are dear,
the matrix is (1 - c) B + c I.

References:
    Automatic Reparameterisation of Probabilistic Programs (Gorinova, Moore, Hoffman, 2020, arXiv:1906.03028);
    Model-Informed Flows for Bayesian Inference of Probabilistic Programs (Ko, Domke, 2025, arXiv:2505.24243).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = ["LocationScale", "PriorRun", "center", "known_prior", "location_scale", "whiten"]


class LocationScale(NamedTuple):
    """Location and scale of a site's unconstrained value under its prior; scale is a triangle if ``matrix``."""

    loc: Tensor
    scale: Tensor
    matrix: bool = False


_REAL = (dist.Normal, dist.StudentT, dist.Laplace, dist.Cauchy, dist.Logistic, dist.Gumbel)
_POSITIVE: dict[type, Callable[[Any], Tensor]] = {  # a scale on the positive line is a location of the logarithm
    dist.HalfNormal: lambda fn: fn.scale,
    dist.HalfCauchy: lambda fn: fn.scale,
    dist.Exponential: lambda fn: 1 / fn.rate,
    dist.Gamma: lambda fn: 1 / fn.rate,
    dist.InverseGamma: lambda fn: fn.rate,
    dist.Weibull: lambda fn: fn.scale,
}


def location_scale(fn: Any) -> LocationScale | None:
    """Return location and scale of a distribution's unconstrained value, None where it is no such family.

    Args:
        fn: a distribution; ``to_event``, ``mask`` and ``expand`` are seen through.
    """
    wrapped = (torch.distributions.Independent, dist.torch_distribution.MaskedDistribution)
    while isinstance(fn, (*wrapped, dist.torch_distribution.ExpandedDistribution)):
        fn = fn.base_dist
    if isinstance(fn, dist.MultivariateNormal):
        return LocationScale(fn.loc, fn.scale_tril, matrix=True)
    if isinstance(fn, _REAL):
        return LocationScale(fn.loc, fn.scale)
    if isinstance(fn, dist.LogNormal):
        return LocationScale(fn.loc, fn.scale)
    for family, scale in _POSITIVE.items():
        if isinstance(fn, family):
            loc = scale(fn).log()
            return LocationScale(loc, torch.ones_like(loc))
    return None


def known_prior(name: str, fn: Any) -> LocationScale:
    """Return location and scale of a site's prior.

    Raises:
        RuntimeError: it is no such family any more; the site is named.
    """
    prior = location_scale(fn)
    if prior is None:
        raise RuntimeError(
            f"the prior of latent site '{name}' was of a location-scale family when the guide was built and now is a "
            f"{type(fn).__name__}: give the guide noncenter=False."
        )
    return prior


def center(w: Tensor, c: Tensor, prior: LocationScale) -> tuple[Tensor, Tensor]:
    """Return u and the log-determinant of w to u, one term per coordinate (the last dimension's, for a triangle)."""
    moved = w - c * prior.loc
    if prior.matrix:
        matrix = _matrix(c, prior.scale)
        return prior.loc + (matrix @ moved.unsqueeze(-1)).squeeze(-1), matrix.diagonal(dim1=-1, dim2=-2).log()
    ladj = (1 - c) * prior.scale.log()
    return prior.loc + ladj.exp() * moved, ladj


def whiten(u: Tensor, c: Tensor, prior: LocationScale) -> Tensor:
    """Return the w that :func:`center` takes to u."""
    if prior.matrix:
        moved = torch.linalg.solve_triangular(_matrix(c, prior.scale), (u - prior.loc).unsqueeze(-1), upper=False)
        return moved.squeeze(-1) + c * prior.loc
    return (u - prior.loc) * ((c - 1) * prior.scale.log()).exp() + c * prior.loc


def _matrix(c: Tensor, scale: Tensor) -> Tensor:
    c = c.unsqueeze(-1) if c.dim() else c
    return (1 - c) * scale + c * torch.eye(scale.shape[-1], dtype=scale.dtype, device=scale.device)


class _Found(Exception):  # noqa: N818
    """All that a run of the model was for is known."""


class PriorRun(Messenger):
    """Runs the model up to the last of some sites, with each site's value made when its prior is known.

    Args:
        wanted: the sites to meet.
        value: returns a site's value from its name and prior, or None to draw it from its prior.
        indices: rows of subsampled plates, by plate.
    """

    def __init__(
        self, wanted: set[str], value: Callable[[str, Any], Tensor | None], indices: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.wanted, self.value, self.indices = set(wanted), value, indices or {}

    def _process_message(self, msg: Any) -> None:
        msg["stop"] = True  # what goes on in here is nobody's business outside
        super()._process_message(msg)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.indices:
            msg["value"], msg["done"] = self.indices[msg["name"]], True
        if msg["done"] or msg["is_observed"]:
            return
        value = self.value(msg["name"], msg["fn"])
        if value is not None:
            msg["value"], msg["done"] = value, True
        if msg["name"] in self.wanted:
            self.wanted.discard(msg["name"])
            if not self.wanted:
                raise _Found

    def run(self, model: Callable, args: tuple, kwargs: dict) -> None:
        """Run the model, hidden from all handlers outside.

        Raises:
            RuntimeError: a site was not met.
        """
        try:
            with self:
                model(*args, **kwargs)
        except _Found:
            return
        if self.wanted:
            raise RuntimeError(
                f"the model did not come to latent site '{min(self.wanted)}', which it had when first run"
            )
