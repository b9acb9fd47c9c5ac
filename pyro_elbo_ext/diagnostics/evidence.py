r"""How the importance-weighted bound rises with its number of particles, and an estimate from above.

:math:`L_K = E \log \frac{1}{K} \sum_k w_k` rises from the ELBO to the log evidence. The rise
:math:`L_K - L_1` is, in expectation, no larger than :math:`KL(q \| p)`: the guide is at least that far from the
posterior. Where it still rises at the largest K the evidence is out of reach of the guide's draws.

References:
    Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2015, arXiv:1509.00519); Importance Weighting and
    Variational Inference (Domke, Sheldon, 2018, arXiv:1808.09034).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from pyro_elbo_ext.bounds import log_mean_exp
from pyro_elbo_ext.diagnostics.sampling import PosteriorDraws
from pyro_elbo_ext.diagnostics.weights import check_log_weights, effective_sample_size

__all__ = ["BoundPoint", "cubo", "importance_bounds", "log_mean_exp_error"]

_FEW_GROUPS = 8  # below, the spread between groups says little about its own error


class BoundPoint(NamedTuple):
    r"""The bound at one number of particles, in nats, summed over plates and scaled.

    Attributes:
        num_particles: K.
        value: :math:`L_K`.
        se: its standard error.
        gain: :math:`L_K - L_1` on the same draws, never negative.
        gain_se: its standard error.
        groups: how many disjoint groups of K draws were averaged.
    """

    num_particles: int
    value: float
    se: float
    gain: float
    gain_se: float
    groups: int


def importance_bounds(draws: PosteriorDraws, particles: Sequence[int] = (1, 2, 5, 10, 20, 50, 100)) -> list[BoundPoint]:
    """Estimate the bound for several numbers of particles from one set of draws.

    The S draws are cut into disjoint groups of K. The standard error is that between groups; with fewer than eight of
    them it is propagated from the spread of the weights within, which heavy tails make too small.

    Args:
        draws: of the guide.
        particles: numbers K; those above S are left out.

    Raises:
        ValueError: a K below 1, or a log-weight that is NaN or +inf.
    """
    if min(particles, default=1) < 1:
        raise ValueError(f"particles must be positive integers, got {tuple(particles)}")
    check_log_weights(draws.log_weight)
    return [_point(draws, k) for k in sorted(set(particles)) if k <= draws.num_samples]


def _point(draws: PosteriorDraws, num_particles: int) -> BoundPoint:
    groups = draws.num_samples // num_particles
    log_w = draws.log_weight[: groups * num_particles]
    log_w = log_w.reshape(groups, num_particles, *log_w.shape[1:]).transpose(0, 1)
    tight = log_mean_exp(log_w)
    value = draws.bound(tight)
    gain = draws.bound(tight - log_w.mean(0)) - draws.constant
    if groups >= _FEW_GROUPS:
        return BoundPoint(num_particles, *_mean(value), *_mean(gain), groups)
    error = log_mean_exp_error(log_w, draws.scale) / math.sqrt(groups)
    return BoundPoint(num_particles, float(value.mean()), error, float(gain.mean()), error, groups)


def _mean(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(values.shape[0])


def log_mean_exp_error(log_w: Tensor, scale: Tensor | float) -> float:
    r"""Return the standard error of a log-mean-exp over the first dimension, summed over the others.

    By propagation, per element :math:`\sqrt{1 / \mathrm{ESS} - 1 / K}`; further dimensions after the first are groups
    to be averaged, then elements to be added up.

    Args:
        log_w: ``[num_particles, groups, *plates]``.
        scale: of each element, broadcasts with ``[*plates]``.
    """
    variance = (1 / effective_sample_size(log_w) - 1 / log_w.shape[0]).clamp(min=0.0)
    variance = variance * (scale * scale)
    return math.sqrt(float(variance.sum()) / variance.shape[0])


def cubo(draws: PosteriorDraws, order: float = 2.0) -> float:
    r"""Return an *estimate* of the chi upper bound :math:`\frac{1}{n} \log E_q w^n`, in nats.

    The bound holds for the expectation inside the log. Its Monte Carlo estimate is too low whenever the largest
    weights have not been drawn, which is where an upper bound would matter: from ten draws it fell below the evidence
    more often than not. Bidirectional annealing bounds from above in expectation,
    :func:`pyro_elbo_ext.diagnostics.simulated_bracket`.

    Args:
        draws: of the guide.
        order: n > 1.

    Raises:
        ValueError: ``order`` not above 1, or a log-weight that is NaN or +inf.

    References:
        Variational Inference via chi Upper Bound Minimization (Dieng, Tran, Ranganath, Paisley, Blei, 2017,
        arXiv:1611.00328).
    """
    if not order > 1:
        raise ValueError(f"order must be above 1, got {order}: at 1 it is the importance-weighted bound")
    check_log_weights(draws.log_weight)
    return float(draws.bound(log_mean_exp(order * draws.log_weight) / order))
