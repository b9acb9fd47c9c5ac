r"""The Wishart distribution, in coordinates whitened by its scale matrix.

With scale matrix :math:`V = C C^\top` and degrees of freedom :math:`\nu`, T(X) = (log det X, X) and the natural
parameters are affine in (:math:`\nu`, :math:`V^{-1}`). For a loss with gradients :math:`g_\nu, G_V`

.. math:: \nabla_{m_1} = \frac{g_\nu - \langle G_V, V \rangle / \nu}{\psi_p'(\nu / 2) / 2 - p / \nu}, \qquad
    \nabla_{m_2} = (G_V - \nabla_{m_1} V^{-1}) / \nu

where :math:`\psi_p'` is the derivative of the multivariate digamma function.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_elbo_ext.families.base import Family, Params, lift, triangle
from pyro_elbo_ext.families.gaussian import by_matrix, inverse_factor

__all__ = ["WISHART"]


class Wishart(Family):
    """The Wishart distribution over positive definite matrices, by a Cholesky factor of its scale matrix."""

    name = "Wishart"
    arguments = {"df": 0, "scale_tril": 2}
    coordinates = {"df": 0, "precision": 2}
    parametrizations = by_matrix("df", 0)

    def make(self, q: Params) -> Distribution:
        """Return torch's distribution."""
        return torch.distributions.Wishart(q["df"], scale_tril=q["scale_tril"], validate_args=False)

    def direction(self, q: Params, grad: Params) -> dict[str, Tensor]:
        """Return the natural gradients of (df, V^-1), the second whitened."""
        df, size = q["df"], q["scale_tril"].shape[-1]
        whitened = (q["scale_tril"].mT @ grad["scale_tril"]).tril()
        in_scale = (whitened + whitened.tril(-1).mT) / 2  # C' G_V C
        trace = in_scale.diagonal(dim1=-2, dim2=-1).sum(-1)
        first = (grad["df"] - trace / df) / (_multi_trigamma(df / 2, size) / 2 - size / df)
        eye = torch.eye(size, dtype=df.dtype, device=df.device)
        return {"df": 2 * first, "precision": -2 * (in_scale - lift(first, 2) * eye) / lift(df, 2)}

    def move(self, q: Params, direction: Params, step: Tensor) -> dict[str, Tensor]:
        """Step in df and V^-1."""
        change = lift(step, 2) * direction["precision"]
        size = change.shape[-1]
        eye = torch.eye(size, dtype=change.dtype, device=change.device)
        df = q["df"] - step * direction["df"]
        scale_tril = q["scale_tril"] @ inverse_factor(eye - change)
        return {"df": torch.where(df > size - 1, df, math.nan), "scale_tril": scale_tril}

    def slope(self, q: Params, direction: Params, grad: Params) -> Tensor:
        """Gradient times natural gradient."""
        whitened = (q["scale_tril"].mT @ grad["scale_tril"]).tril()
        in_scale = (whitened + whitened.tril(-1).mT) / 2
        # of V, for a change -X of the whitened V^-1, is X
        return direction["df"] * grad["df"] - (direction["precision"] * in_scale).sum((-2, -1))

    def kl(self, new: Params, old: Params) -> Tensor:
        """Return KL(new || old)."""
        size = new["scale_tril"].shape[-1]
        ratio = torch.linalg.solve_triangular(old["scale_tril"], new["scale_tril"], upper=False)
        log_det = 2 * ratio.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        gammas = torch.special.multigammaln(old["df"] / 2, size) - torch.special.multigammaln(new["df"] / 2, size)
        digamma = _multi_digamma(new["df"] / 2, size)
        spread = ratio.square().sum((-2, -1)) - size
        return gammas + ((new["df"] - old["df"]) * digamma - old["df"] * log_det + new["df"] * spread) / 2

    def natural(self, q: Params) -> dict[str, Tensor]:
        """Return df and V^-1."""
        return {"df": q["df"], "precision": torch.cholesky_inverse(q["scale_tril"])}

    def from_natural(self, eta: Params) -> dict[str, Tensor]:
        """Return df and the Cholesky factor of V."""
        return {"df": eta["df"], "scale_tril": inverse_factor(eta["precision"])}

    def statistics(self, x: Tensor, reference: Params) -> Tensor:
        """Return log det X, and the lower triangle of X whitened and in units of the reference's mean."""
        half = torch.linalg.solve_triangular(reference["scale_tril"], x, upper=False)
        whitened = torch.linalg.solve_triangular(reference["scale_tril"], half.mT, upper=False)
        log_det = torch.linalg.slogdet(x).logabsdet
        return torch.cat([log_det[..., None], triangle(whitened) / lift(reference["df"], 1)], -1)

    def expectation(self, q: Params, reference: Params) -> Tensor:
        """Return their means."""
        size = q["scale_tril"].shape[-1]
        factor = torch.linalg.solve_triangular(reference["scale_tril"], q["scale_tril"], upper=False)
        log_det = 2 * q["scale_tril"].diagonal(dim1=-2, dim2=-1).log().sum(-1)
        first = _multi_digamma(q["df"] / 2, size) + size * math.log(2) + log_det
        mean = triangle(factor @ factor.mT) * lift(q["df"] / reference["df"], 1)
        return torch.cat([first[..., None], mean], -1)


def _halves(x: Tensor, size: int) -> Tensor:
    return x[..., None] - torch.arange(size, dtype=x.dtype, device=x.device) / 2


def _multi_digamma(x: Tensor, size: int) -> Tensor:
    return torch.digamma(_halves(x, size)).sum(-1)


def _multi_trigamma(x: Tensor, size: int) -> Tensor:
    return torch.special.polygamma(1, _halves(x, size)).sum(-1)


WISHART = Wishart()
