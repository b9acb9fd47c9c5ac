r"""Learning signals of the score-function estimator for any bound of K independent particles.

A site that is not reparameterised carries the gradient in its density alone. For the bound :math:`B(\ell)` of the
log-weights the coefficient of :math:`\nabla \log q(d_k)` is

.. math:: S_k - v_k, \qquad v_k = dB/d\ell_k, \qquad S_k = B(\ell) - c_k,

where the control :math:`c_k` is any function of the other particles. The choice of :math:`c_k` is a signal:

================= ============================================================== ======================
signal            control                                                        for IWAE
================= ============================================================== ======================
``"score"``       0                                                              REINFORCE
``"vimco"``       the bound with particle k replaced by a mean of the others     VIMCO
``"ovis"``        the bound with particle k given weight zero                    OVIS, gamma = 0
================= ============================================================== ======================

Mixed guides q(c) q(d | c) take a path estimator at the reparameterised sites c, and at the others the coefficient of
:math:`\log q(d_k | c_k)` with its parents *attached*: c's parameters act through that density too, and detaching it is
biased.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_elbo_ext.bounds import Bound

__all__ = ["OVIS", "VIMCO", "Reinforce", "Signal"]


class Signal:
    """What multiplies the score of a particle; a subclass is one choice of control.

    Attributes:
        name: what ``gradient=`` calls it.
        min_particles: fewest particles it can be formed from.
    """

    name: str
    min_particles: int = 2

    def __call__(self, bound: Bound, log_w: Tensor) -> Tensor:
        """Return :math:`S_k` at detached log-weights ``[num_particles, *plates]``; c_k knows the others only."""
        raise NotImplementedError

    def check(self, bound: Bound, num_particles: int, site: str) -> None:
        """Raise a ValueError where the signal cannot be formed for a bound; ``site`` is one that needs it."""
        if num_particles < self.min_particles:
            raise ValueError(
                f"guide site '{site}' is not reparameterised, and gradient=\"{self.name}\" compares each of its "
                f"particles with the others: it needs num_particles >= {self.min_particles}, got {num_particles}. "
                'Raise num_particles, or use gradient="score".'
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _or_bound(signal: Tensor, bound: Bound, log_w: Tensor) -> Tensor:
    """No control is as good as another where the others have no weight at all, which only they decide."""
    return torch.where(signal.isfinite(), signal, bound(log_w).expand_as(log_w))


class Reinforce(Signal):
    """No control: unbiased, and so noisy that it is of use with one particle only, where there is nothing else.

    References:
        Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning (Williams, 1992).
    """

    name = "score"
    min_particles = 1

    def __call__(self, bound: Bound, log_w: Tensor) -> Tensor:
        """Return the bound itself."""
        return bound(log_w).expand_as(log_w)


class VIMCO(Signal):
    """The bound with particle k replaced by a mean of the others; for the ELBO the leave-one-out estimator RLOO.

    Unbiased. The guide's signal-to-noise ratio falls as K^-1/2, as the total derivative's does.

    Args:
        fill: ``"geometric"`` (mean of log-weights, less variance) or ``"arithmetic"`` (log of the mean weight).

    References:
        Variational Inference for Monte Carlo Objectives (Mnih, Rezende, 2016, arXiv:1602.06725).
    """

    name = "vimco"

    def __init__(self, fill: str = "geometric") -> None:
        if fill not in ("geometric", "arithmetic"):
            raise ValueError(f'fill must be "geometric" or "arithmetic", got {fill!r}')
        self.fill = fill

    def __call__(self, bound: Bound, log_w: Tensor) -> Tensor:
        """Return what the bound loses with particle k replaced."""
        return _or_bound(bound.leave_one_out(log_w, self.fill), bound, log_w)


class OVIS(Signal):
    r"""Optimal control for many effective particles: with gamma = 0 the bound with particle k given weight zero.

    Unbiased for gamma = 0, with a signal-to-noise ratio that rises as K^1/2 near the posterior, as the doubly
    reparameterised gradient's does. Where one weight dominates it has the variance of ``VIMCO("arithmetic")``. For
    gamma > 0 a share of the doubled score is left out: with gamma = 1 the expectation is IWAE's gradient plus
    reweighted wake-sleep's, another fixed point, at which the variance is zero.

    Args:
        gamma: in [0, 1].

    Raises:
        ValueError: gamma outside [0, 1]; when run, a bound that is -inf with one weight of zero, as one with any share
            of the ELBO is.

    References:
        Optimal Variance Control of the Score-Function Gradient Estimator for Importance-Weighted Bounds (Liévin,
        Dittadi, Christensen, Winther, 2020, arXiv:2008.01998).
    """

    name = "ovis"

    def __init__(self, gamma: float = 0.0) -> None:
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], got {gamma}: 0 is unbiased, 1 adds the wake-sleep gradient")
        self.gamma = float(gamma)

    def __call__(self, bound: Bound, log_w: Tensor) -> Tensor:
        """Return what the bound loses without particle k; its own weight more, as far as gamma asks for bias."""
        without = _or_bound(bound.leave_one_out(log_w, "zero"), bound, log_w)
        if not self.gamma:
            return without
        mean = _or_bound(bound.leave_one_out(log_w, "arithmetic"), bound, log_w)
        return (1 - self.gamma) * without + self.gamma * (mean + bound.path_weights(log_w))

    def check(self, bound: Bound, num_particles: int, site: str) -> None:
        """Raise a ValueError for one particle, or a bound that one weight of zero makes -inf."""
        super().check(bound, num_particles, site)
        log_w = torch.zeros(num_particles)
        log_w[0] = -math.inf
        if not math.isfinite(float(bound(log_w))):
            raise ValueError(
                f"gradient=\"ovis\" at site '{site}' gives each particle weight zero in turn, which makes this bound "
                '-inf. Use "vimco".'
            )

    def __repr__(self) -> str:
        return f"OVIS(gamma={self.gamma})"
