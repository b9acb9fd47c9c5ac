r"""Gaussians, in coordinates whitened by the present covariance.

With :math:`\Sigma = L L^\top`, g the loss's gradient in the mean and
:math:`A = 2 L^\top \nabla_\Sigma \mathrm{loss}\, L`, a step of size rho in the natural parameters is

.. math:: P^+ = L^{-\top} (I + \rho A) L^{-1}, \qquad \mu^+ = \mu - \rho\, \Sigma^+ g

with the new covariance in the mean's step. Neither the covariance nor the precision P is formed, so the conditioning of
the posterior does not enter.

References:
    Fast and Scalable Bayesian Deep Learning by Weight-Perturbation in Adam (Khan, Nielsen, Tangkaratt, Lin, Gal,
    Srivastava, 2018, arXiv:1806.04854), section 3, in natural parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_elbo_ext.families.base import Family, Parametrization, Params, lift, triangle

__all__ = ["MULTIVARIATE_NORMAL", "NORMAL", "by_matrix", "inverse_factor", "symmetric"]

SMALLEST_SHRINK = 1e-6  # of the precision in one step: below it the covariance's own linear step is taken


class Normal(Family):
    """The univariate normal distribution."""

    name = "Normal"
    arguments = {"loc": 0, "scale": 0}
    coordinates = {"shift": 0, "precision": 0}
    parametrizations = (Parametrization(arguments),)

    def make(self, q: Params) -> Distribution:
        """Return torch's distribution."""
        return torch.distributions.Normal(q["loc"], q["scale"], validate_args=False)

    def direction(self, q: Params, grad: Params) -> dict[str, Tensor]:
        """Return the gradient in the mean, and the relative change of the precision."""
        return {"loc": grad["loc"], "precision": q["scale"] * grad["scale"]}

    def move(self, q: Params, direction: Params, step: Tensor) -> dict[str, Tensor]:
        """Step in precision and precision times mean; where the precision would vanish, in the covariance."""
        change = step * direction["precision"]
        possible = 1 + change >= SMALLEST_SHRINK
        ratio = torch.where(possible, 1 + change.where(possible, torch.zeros_like(change)), 1 / (1 - change))
        scale = q["scale"] / ratio.sqrt()
        return {"loc": q["loc"] - step * scale.square() * direction["loc"], "scale": scale}

    def slope(self, q: Params, direction: Params, grad: Params) -> Tensor:
        """Squared mean gradient plus half the squared change of the precision, both whitened."""
        return (q["scale"] * direction["loc"]).square() + direction["precision"].square() / 2

    def natural(self, q: Params) -> dict[str, Tensor]:
        """Precision times mean, and precision."""
        precision = q["scale"].square().reciprocal()
        return {"shift": precision * q["loc"], "precision": precision}

    def from_natural(self, eta: Params) -> dict[str, Tensor]:
        """Return mean and standard deviation."""
        return {"loc": eta["shift"] / eta["precision"], "scale": eta["precision"].rsqrt()}

    def statistics(self, x: Tensor, reference: Params) -> Tensor:
        """Return z and its square, z the value whitened by the reference."""
        z = (x - reference["loc"]) / reference["scale"]
        return torch.stack([z, z.square()], -1)

    def expectation(self, q: Params, reference: Params) -> Tensor:
        """Return the mean of z and of its square."""
        mean = (q["loc"] - reference["loc"]) / reference["scale"]
        return torch.stack([mean, mean.square() + (q["scale"] / reference["scale"]).square()], -1)


def by_matrix(other: str, dims: int) -> tuple[Parametrization, ...]:
    """Return the ways to give a matrix, as torch has them, beside another argument of some dimensions."""
    return (
        Parametrization({other: dims, "scale_tril": 2}),
        Parametrization(
            {other: dims, "covariance_matrix": 2},
            lambda given: {other: given[other], "scale_tril": torch.linalg.cholesky_ex(given["covariance_matrix"])[0]},
            lambda q: {other: q[other], "covariance_matrix": q["scale_tril"] @ q["scale_tril"].mT},
        ),
        Parametrization(
            {other: dims, "precision_matrix": 2},
            lambda given: {other: given[other], "scale_tril": inverse_factor(given["precision_matrix"])},
            lambda q: {other: q[other], "precision_matrix": torch.cholesky_inverse(q["scale_tril"])},
        ),
    )


class MultivariateNormal(Family):
    """The multivariate normal distribution, by a Cholesky factor of its covariance."""

    name = "MultivariateNormal"
    arguments = {"loc": 1, "scale_tril": 2}
    coordinates = {"shift": 1, "precision": 2}
    parametrizations = (
        *by_matrix("loc", 1),
        # AutoMultivariateNormal's: standard deviations before correlations, scale_tril = scale[:, None] * unit_tril
        Parametrization(
            {"loc": 1, "scale": 1, "unit_tril": 2},
            lambda given: {"loc": given["loc"], "scale_tril": given["scale"][..., None] * given["unit_tril"]},
            lambda q: {
                "loc": q["loc"],
                "scale": q["scale_tril"].diagonal(dim1=-2, dim2=-1),
                "unit_tril": q["scale_tril"] / q["scale_tril"].diagonal(dim1=-2, dim2=-1)[..., None],
            },
        ),
    )

    def make(self, q: Params) -> Distribution:
        """Return torch's distribution."""
        return torch.distributions.MultivariateNormal(q["loc"], scale_tril=q["scale_tril"], validate_args=False)

    def direction(self, q: Params, grad: Params) -> dict[str, Tensor]:
        """Return the gradient in the mean, and the relative change A of the precision."""
        whitened = (q["scale_tril"].mT @ grad["scale_tril"]).tril()
        return {"loc": grad["loc"], "precision": whitened + whitened.tril(-1).mT}

    def move(self, q: Params, direction: Params, step: Tensor) -> dict[str, Tensor]:
        """Step in precision and precision times mean."""
        change = lift(step, 2) * direction["precision"]
        eye = torch.eye(change.shape[-1], dtype=change.dtype, device=change.device)
        scale_tril = q["scale_tril"] @ inverse_factor(eye + change)
        shift = scale_tril @ (scale_tril.mT @ direction["loc"][..., None])
        return {"loc": q["loc"] - lift(step, 1) * shift[..., 0], "scale_tril": scale_tril}

    def slope(self, q: Params, direction: Params, grad: Params) -> Tensor:
        """Squared mean gradient plus half the squared change of the precision, both whitened."""
        mean = (q["scale_tril"].mT @ direction["loc"][..., None]).square().sum((-2, -1))
        return mean + direction["precision"].square().sum((-2, -1)) / 2

    def kl(self, new: Params, old: Params) -> Tensor:
        """Return KL(new || old), from the two Cholesky factors."""
        ratio, z = _whiten(old, new["scale_tril"]), _whiten(old, (new["loc"] - old["loc"])[..., None])
        diagonal = ratio.diagonal(dim1=-2, dim2=-1)
        square = ratio.square().sum((-2, -1)) + z.square().sum((-2, -1))
        return (square - diagonal.shape[-1]) / 2 - diagonal.log().sum(-1)

    def natural(self, q: Params) -> dict[str, Tensor]:
        """Precision times mean, and precision."""
        precision = torch.cholesky_inverse(q["scale_tril"])
        return {"shift": (precision @ q["loc"][..., None])[..., 0], "precision": precision}

    def from_natural(self, eta: Params) -> dict[str, Tensor]:
        """Return mean and Cholesky factor."""
        scale_tril = inverse_factor(eta["precision"])
        return {
            "loc": (scale_tril @ (scale_tril.mT @ eta["shift"][..., None]))[..., 0],
            "scale_tril": scale_tril,
        }

    def statistics(self, x: Tensor, reference: Params) -> Tensor:
        """Return z and the lower triangle of z z', z the value whitened by the reference."""
        z = _whiten(reference, (x - reference["loc"])[..., None])
        return torch.cat([z[..., 0], triangle(z * z.mT)], -1)

    def expectation(self, q: Params, reference: Params) -> Tensor:
        """Return the mean of z and of the lower triangle of z z'."""
        mean = _whiten(reference, (q["loc"] - reference["loc"])[..., None])
        factor = _whiten(reference, q["scale_tril"])
        return torch.cat([mean[..., 0], triangle(mean * mean.mT + factor @ factor.mT)], -1)


def _whiten(q: Params, columns: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(q["scale_tril"], columns, upper=False)


def inverse_factor(precision: Tensor) -> Tensor:
    """Return the lower triangular L with L L' the inverse of a matrix, NaN where that is not positive definite."""
    reversed_factor, info = torch.linalg.cholesky_ex(precision.flip(-2, -1))
    upper = reversed_factor.flip(-2, -1)  # precision = upper upper'
    eye = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    inverse = torch.linalg.solve_triangular(upper, eye, upper=True).mT
    return torch.where(lift(info == 0, 2), inverse, math.nan)


def symmetric(m: Tensor) -> Tensor:
    """Return the symmetric part of a matrix."""
    return (m + m.mT) / 2


NORMAL = Normal()
MULTIVARIATE_NORMAL = MultivariateNormal()
