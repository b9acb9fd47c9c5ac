r"""Gradients at Gaussian sites from a linear model of the score: regressed, or by second derivatives.

Write a site's values as :math:`z = \mu + L \epsilon`, and r for the derivative of the ELBO's terms in
:math:`\epsilon`, the site's own arguments held: the score of the model plus :math:`\epsilon`. If
:math:`r \approx c + B \epsilon` then, with B's symmetric part,

.. math:: \nabla_\mu \mathrm{ELBO} = L^{-\top} c, \qquad \nabla_L \mathrm{ELBO} = \mathrm{tril}(L^{-\top} B)

which is exact where the model's log-density is quadratic, at any number of draws that determine c and B: no noise is
left for the optimiser to average. Otherwise B and c are estimates of :math:`E[\partial r / \partial \epsilon]` and
:math:`E[r]` (the theorems of Price and Bonnet), unbiased as each particle is held against a fit to the others.

References:
    Fixed-Form Variational Posterior Approximation through Stochastic Linear Regression (Salimans, Knowles, 2013,
    arXiv:1206.6679); The Variational Gaussian Approximation Revisited (Opper, Archambeau, 2009).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_elbo_ext.families import MULTIVARIATE_NORMAL, NORMAL, Recognized, precise, recognize, symmetric
from pyro_elbo_ext.gradients.costs import without_particles
from pyro_elbo_ext.sites import plate_factor, vectorized_plates

__all__ = [
    "GaussianSite",
    "Linear",
    "element_derivative",
    "is_gaussian",
    "joint_derivative",
    "linear_fit",
    "newton",
]


SMALLEST_REST = 1e-13  # 1 - leverage: below it there is rounding only


class Linear(NamedTuple):
    """A function of noise as an intercept ``[*batch, n]`` and slopes ``[*batch, n, n]``."""

    intercept: Tensor
    slopes: Tensor


def is_gaussian(found: Recognized | None) -> bool:
    """Tell whether a site's values are a normal distribution's, none of them masked by the distribution itself."""
    return found is not None and found.direct and not found.masked and found.family in (NORMAL, MULTIVARIATE_NORMAL)


@dataclass
class GaussianSite:
    """A Gaussian site at a step's particles.

    Args:
        node: its record in the guide's trace.
        nesting: plate dimensions.

    Attributes:
        arguments: of its family, attached, ``[*plates, *event]`` and a Cholesky factor with one dimension more.
        event_dim: dimensions of one value.
        plates: names of the plates around it.
        subsampled: True where one of them holds a part of its elements only.
    """

    node: Any
    nesting: int

    def __post_init__(self) -> None:
        """Give the arguments a common shape without particles, which share them."""
        self.name = self.node["name"]
        self.found: Recognized = recognize(self.node["fn"])  # type: ignore[assignment]
        frames = vectorized_plates(self.node)
        self.plates = set(frames)
        self.subsampled = any(plate_factor(frame) != 1 for frame in frames.values())
        self.event_dim = self.found.event_dim + self.found.family.arguments["loc"]
        self.arguments = {
            name: without_particles(value, self.found.event_dim + self.found.family.arguments[name], self.nesting)
            for name, value in self.found.arguments().items()
        }
        self._detached = {name: value.detach() for name, value in self.arguments.items()}

    @property
    def full_rank(self) -> bool:
        """True for a multivariate normal."""
        return self.found.family is MULTIVARIATE_NORMAL

    @property
    def unit_size(self) -> int:
        """Coordinates of one distribution of the family."""
        return self.arguments["loc"].shape[-1] if self.full_rank else 1

    def noise(self, values: Tensor) -> Tensor:
        """Whiten values ``[num_particles, *plates, *event]``; the result has one flat event dimension."""
        centred = self.centred(values)
        if self.full_rank:
            columns = centred.movedim(0, -1)  # one system for all particles
            white = torch.linalg.solve_triangular(self._detached["scale_tril"], columns, upper=False).movedim(-1, 0)
        else:
            white = centred / self._detached["scale"]
        return self._flat(white)

    def centred(self, values: Tensor) -> Tensor:
        """Return values less their mean."""
        return values - self._detached["loc"]

    def residual(self, grads: Tensor) -> Tensor:
        """Turn derivatives in values into derivatives in the noise, of the same shape as the noise."""
        if self.full_rank:
            white = (self._detached["scale_tril"].mT @ grads.movedim(0, -1)).movedim(-1, 0)
        else:
            white = grads * self._detached["scale"]
        return self._flat(white)

    def _flat(self, t: Tensor) -> Tensor:
        return t.flatten(-self.event_dim) if self.event_dim else t[..., None]

    def log_prob(self, values: Tensor) -> Tensor:
        """Return the log-density with the arguments held, summed over the event."""
        log_prob = self.found.family.log_prob(self._detached, values)
        dims = self.found.event_dim
        return log_prob.sum(tuple(range(-dims, 0))) if dims else log_prob

    def blocks(self, slopes: Tensor) -> Tensor:
        """Return what a site needs of slopes ``[*plates, size, size]``: the diagonal, or one matrix for each unit."""
        if not self.full_rank:
            return slopes.diagonal(dim1=-2, dim2=-1)
        own = self.unit_size
        units = slopes.shape[-1] // own
        parted = slopes.reshape(slopes.shape[:-2] + (units, own, units, own))
        return parted.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)

    def surrogate(self, intercept: Tensor, blocks: Tensor) -> Tensor:
        """Return a scalar whose gradient in the arguments is that of the ELBO, of an intercept and :meth:`blocks`."""
        loc, plates = self.arguments["loc"], intercept.shape[: self.nesting]
        mean = intercept.reshape(plates + loc.shape[self.nesting :])
        if not self.full_rank:
            scale, spread = self._detached["scale"], blocks.reshape(mean.shape)
            return (mean / scale * loc + spread / scale * self.arguments["scale"]).sum()
        factor = self._detached["scale_tril"]
        blocks = symmetric(blocks).reshape(mean.shape + mean.shape[-1:])
        in_loc = torch.linalg.solve_triangular(factor.mT, mean[..., None], upper=True)[..., 0]
        in_factor = torch.linalg.solve_triangular(factor.mT, blocks, upper=True).tril()
        return (in_loc * loc).sum() + (in_factor * self.arguments["scale_tril"]).sum()


def linear_fit(noise: Tensor, residual: Tensor) -> Linear:
    r"""Estimate the mean of a residual and its mean slope, ``[*batch, num_particles, n]`` both; unbiased.

    The least-squares line serves as a control variate, for each particle that of the others:
    :math:`c = \frac{1}{K} \sum_k (r_k - B_{-k} \epsilon_k)` and :math:`B = \frac{1}{K} \sum_k (f_k \epsilon_k^\top +
    B_{-k})` with :math:`f_k` the residual of k from the others' line, for :math:`E[\epsilon \epsilon^\top] = I`. Where
    the residual is linear that is the line. With n + 1 particles there are no others to fit, and the line is taken.
    """
    particles, dtype = noise.shape[-2], noise.dtype
    noise, residual = precise(noise), precise(residual)
    noise_mean, residual_mean = noise.mean(-2, keepdim=True), residual.mean(-2, keepdim=True)
    q, r = torch.linalg.qr(noise - noise_mean)
    line = q.mT @ (residual - residual_mean)
    slopes = torch.linalg.solve_triangular(r, line, upper=True).mT
    solved = torch.linalg.solve_triangular(r, q.mT, upper=True).mT  # what dropping a particle changes, [*, K, n]
    others = left_out(residual - residual_mean - q @ line, 1 / particles + q.square().sum(-1, keepdim=True))
    intercept = (residual_mean - noise_mean @ slopes.mT)[..., 0, :]
    intercept = intercept + (others * (noise * solved).sum(-1, keepdim=True)).mean(-2)
    return Linear(intercept.to(dtype), (slopes + others.mT @ (noise - solved) / particles).to(dtype))


def left_out(errors: Tensor, leverage: Tensor) -> Tensor:
    """Return each particle's error from the fit to the others; 0 where it alone determines a coefficient."""
    rest = 1 - leverage
    return torch.where(rest > SMALLEST_REST, errors / rest.clamp(min=SMALLEST_REST), 0.0)


def newton(fit: Linear) -> Linear:
    """Replace the intercept so that a mean-field natural-gradient step moves the mean as Newton's method would.

    The model's negative Hessian in the noise is :math:`I - B`; where it is not positive definite nothing changes.
    """
    eye = torch.eye(fit.slopes.shape[-1], dtype=fit.slopes.dtype, device=fit.slopes.device)
    hessian = eye - symmetric(fit.slopes)
    factor, info = torch.linalg.cholesky_ex(hessian)
    step = torch.cholesky_solve(fit.intercept[..., None], factor)[..., 0]
    wanted = hessian.diagonal(dim1=-2, dim2=-1) * step
    return fit._replace(intercept=torch.where((info == 0)[..., None], wanted, fit.intercept))


Part = tuple[GaussianSite, Tensor, Tensor]  # a site, its values, and their gradients in full shape, attached
Along = Callable[[GaussianSite, Tensor], Tensor]  # gives a gradient in a site's values its full shape


def joint_derivative(parts: Sequence[Part], along: Along) -> Tensor | None:
    """Return the slopes of all sites' residuals in all sites' noise, summed over particles, ``[n, n]``.

    Args:
        parts: the sites; a full shape is ``[num_particles, *plates, *event]``.
        along: see there.
    """
    if not parts:
        return None
    values, rows = [value for _, value, _ in parts], []
    for _, _, grads in parts:
        for column in grads.reshape(len(grads), -1).unbind(-1):
            found = _row(column.sum(), values)
            rows.append([along(site, t).sum(0) for (site, _, _), t in zip(parts, found, strict=True)])
    once = _whitened(parts, [torch.stack(column) for column in zip(*rows, strict=True)])
    columns = once.mT.split([grads[0].numel() for _, _, grads in parts], -1)
    return _whitened(
        parts, [c.reshape(c.shape[:1] + grads.shape[1:]) for c, (_, _, grads) in zip(columns, parts, strict=True)]
    )


def _whitened(parts: Sequence[Part], rows: Sequence[Tensor]) -> Tensor:
    return torch.cat([site.residual(r).flatten(1) for (site, _, _), r in zip(parts, rows, strict=True)], -1)


def shifts(parts: Sequence[Part], along: Along) -> list[Tensor]:
    """Return each site's residual slopes times its own noise, summed over particles, ``[*plates, size]``.

    The slopes are those of the residual in the noise of all the sites given, of each particle by itself.
    """
    if not parts:
        return []
    total: Any = 0.0
    for site, value, grads in parts:
        total = total + (grads * site.centred(along(site, value))).sum()
    found = _row(total, [value for _, value, _ in parts])
    return [site.residual(along(site, t)).sum(0) for (site, _, _), t in zip(parts, found, strict=True)]


def element_derivative(site: GaussianSite, value: Tensor, grads: Tensor, along: Along) -> Tensor:
    """Return the slopes of a site's residual in its own noise, summed over particles, ``[*plates, size, size]``.

    Right where an element of the site's plates has no second derivative with another.
    """
    flat = grads.flatten(-site.event_dim) if site.event_dim else grads[..., None]
    rows = torch.stack([along(site, _row(column.sum(), [value])[0]).sum(0) for column in flat.unbind(-1)])
    once = site.residual(rows).transpose(0, -1)  # [size, *plates, rows]
    return site.residual(once.reshape(rows.shape)).movedim(0, -1)


def _row(total: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if not total.requires_grad:
        return tuple(torch.zeros_like(value) for value in values)
    return torch.autograd.grad(total, list(values), retain_graph=True, allow_unused=True, materialize_grads=True)
