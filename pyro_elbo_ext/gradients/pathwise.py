r"""Gradients through reparameterised samples: total derivative, sticking-the-landing, doubly reparameterised.

Write a particle's log-weight as :math:`\ell_k = \log p_\theta(x, z_k) - \log q_\phi(z_k)` with
:math:`z_k = z(\epsilon_k, \phi)`. An estimator is three weights per particle:

.. math::
    \sum_k m_k \, \partial_\theta \log p_\theta(x, z_k)
    + c_k \, \frac{\partial \ell_k}{\partial z_k} \frac{dz_k}{d\phi}
    + d_k \, \partial_\phi \log q_\phi(z_k)

with :math:`v_k = dB/d\ell_k` the bound's own weights:

====================== ========= ======================= ==========
estimator              m (model) c (path)                d (score)
====================== ========= ======================= ==========
pathwise               v         v                       -v
sticking-the-landing   v         v                       0
doubly reparameterised v         :math:`v - dv_k/d\ell_k` 0
====================== ========= ======================= ==========

The partial derivative :math:`\partial \ell_k/\partial z_k` is taken by scoring guide and model again at detached copies
of the guide's random leaves, so nothing about the inside of a guide need be known: a hierarchy's lower layers reach the
upper ones through their values, which detaching the layers one by one would get wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_elbo_ext.bounds import Bound
from pyro_elbo_ext.gradients.refusals import check_once
from pyro_elbo_ext.particles import Draw, Particles, ParticleSampler
from pyro_elbo_ext.sites import is_reparameterized

__all__ = [
    "DoublyReparameterized",
    "Estimate",
    "Estimator",
    "Pathwise",
    "StickingTheLanding",
    "Weights",
    "attached",
    "finite",
    "with_leaf_scale",
    "replayed",
]


class Weights(NamedTuple):
    """Weights of the three parts of a gradient, each ``[num_particles, *plates]``; None leaves the score part out.

    ``path_weights`` are those of the guide's bound where that is not the model's.
    """

    model: Tensor
    path: Tensor
    score: Tensor | None
    path_weights: Tensor | None = None


class Estimate(NamedTuple):
    """An objective's value with the estimator's gradient attached, in nats, and the particles it came from."""

    objective: Tensor
    particles: Particles


class Estimator:
    """How a bound's gradient is estimated; a subclass is one choice of :class:`Weights`.

    Attributes:
        name: what ``gradient=`` calls it.
        replays: True where guide and model are scored at detached leaves.
        doubly: True where a score is turned into a path derivative, so that what the guide's density is multiplied by
            inside the weights must be known.
    """

    name: str
    replays: bool = True
    doubly: bool = False

    def weights(self, bound: Bound, log_w: Tensor) -> Weights:
        """Return the weights at detached log-weights ``[num_particles, *plates]``."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Pathwise(Estimator):
    """The total derivative: unbiased, cheapest, and noisy about the guide as the number of particles grows.

    References:
        Auto-Encoding Variational Bayes (Kingma, Welling, 2013, arXiv:1312.6114).
    """

    name = "pathwise"
    replays = False

    def weights(self, bound: Bound, log_w: Tensor) -> Weights:
        """Return (v, v, -v)."""
        path = bound.path_weights(log_w)
        return Weights(path, path, -path)


class StickingTheLanding(Estimator):
    """Leaves the score out: no variance where the guide is the posterior.

    Unbiased for the ELBO. For an importance-weighted bound of K >= 2 particles its expectation is another gradient,
    that of IWAE plus that of reweighted wake-sleep: useful in practice, but with another fixed point.

    References:
        Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational Inference
        (Roeder, Wu, Duvenaud, 2017, arXiv:1703.09194).
    """

    name = "stl"

    def weights(self, bound: Bound, log_w: Tensor) -> Weights:
        """Return (v, v, none)."""
        path = bound.path_weights(log_w)
        return Weights(path, path, None)


class DoublyReparameterized(Estimator):
    """Turns the score into a path derivative once more: unbiased, no variance where the guide is the posterior.

    Its standard deviation falls as K^-3/2 near the posterior, where the total derivative's falls as K^-1/2. Costs
    about a quarter more than the total derivative on a VAE.

    References:
        Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker, Lawson, Gu, Maddison, 2018,
        arXiv:1810.04152); Generalized Doubly Reparameterized Gradient Estimators (Bauer, Mnih, 2021,
        arXiv:2101.11046), whose warning about hierarchies is met by scoring at detached leaves.
    """

    name = "dreg"
    doubly = True

    def weights(self, bound: Bound, log_w: Tensor) -> Weights:
        """Return (v, v - dv/dl, none)."""
        return Weights(bound.path_weights(log_w), bound.doubly_reparameterized_weights(log_w), None)


def attached(
    sampler: ParticleSampler,
    draws: Sequence[Draw],
    bound: Callable[[Tensor], Tensor],
    signal: Callable[[Tensor], Tensor] | None = None,
) -> Estimate:
    """Return the bound with its total derivative, and the score of sites that are not reparameterised.

    Args:
        sampler: the step's sampler.
        draws: its draws.
        bound: gives the value, ``[*plates]``.
        signal: gives what multiplies a particle's score, at detached log-weights; None without such sites.
    """
    particles = sampler.evaluate(draws)
    objective = particles.total(bound(particles.log_weight))
    if signal is not None and torch.is_grad_enabled():
        surrogate = scored(sampler, draws, particles, signal)
        if getattr(bound, "linear", False):  # v is constant, so the score in log_weight is noise of mean zero
            share = 1 / particles.log_weight.shape[0]
            surrogate = surrogate + (share * particles.scale * sampler.log_scores(draws, particles)[1]).sum()
        objective = objective + (surrogate - surrogate.detach())
    return Estimate(objective, particles)


def scored(
    sampler: ParticleSampler, draws: Sequence[Draw], particles: Particles, signal: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return a surrogate whose gradient is that of log q at sites not reparameterised, times the signal."""
    with torch.no_grad():
        coefficient = signal(particles.log_weight) * particles.scale
    return (coefficient * sampler.log_scores(draws, particles)[0]).sum()


def replayed(
    sampler: ParticleSampler,
    draws: Sequence[Draw],
    bound: Callable[[Tensor], Tensor],
    estimator: Estimator,
    weights: Callable[[Tensor], Weights],
    signal: Callable[[Tensor], Tensor] | None = None,
) -> Estimate:
    r"""Return the bound with the gradient that ``weights`` asks for.

    At sites d that are not reparameterised the coefficient of :math:`\nabla \log q(d_k | c_k)`, its parents attached,
    is :math:`S_k - v_k`; its last part stands in ``weights.score`` where that is given, and has mean zero for a linear
    bound.

    Args:
        sampler: the step's sampler.
        draws: its draws.
        bound: gives the value, ``[*plates]``.
        estimator: whose weights they are.
        weights: gives the weights at detached log-weights.
        signal: gives what multiplies a particle's score, at detached log-weights; None without such sites.
    """
    with torch.enable_grad():
        leaves = [{name: _copy(draw, name) for name in draw.leaves} for draw in draws]
        particles = sampler.evaluate(draws, leaves)
        log_w = particles.log_weight
    check_once(sampler, draws, particles, estimator.doubly)
    weight = with_leaf_scale(weights(log_w.detach()), estimator, particles)
    pairs = [(z, leaves[i][name]) for i, draw in enumerate(draws) for name, z in draw.leaves.items()]
    drawn, copies = [z for z, copy in pairs if copy.requires_grad], [copy for _, copy in pairs if copy.requires_grad]
    slopes: Sequence[Tensor | None] = [None] * len(copies)
    if log_w.requires_grad and copies:
        cotangent = (weight.path * particles.scale).expand_as(log_w)
        slopes = torch.autograd.grad(log_w, copies, cotangent, retain_graph=True, allow_unused=True)
    surrogate = (weight.model * particles.scale * finite(particles.log_joint)).sum() + particles.constant
    if weight.score is not None:
        surrogate = surrogate + (weight.score * particles.scale * particles.log_guide).sum()
    if signal is not None:
        surrogate = surrogate + scored(sampler, draws, particles, signal)
        if weight.score is None and not getattr(bound, "linear", False):
            v = weight.model if weight.path_weights is None else weight.path_weights
            surrogate = surrogate - (v * particles.scale * sampler.log_scores(draws, particles)[1]).sum()
    for z, slope in zip(drawn, slopes, strict=True):
        if slope is not None:
            surrogate = surrogate + (slope * z).sum()
    value = particles.total(bound(log_w.detach())).detach()
    return Estimate(value + (surrogate - surrogate.detach()), particles)


def _copy(draw: Draw, name: str) -> Tensor:
    """A leaf's value, detached; to be differentiated by where the site is reparameterised."""
    copy = draw.leaves[name].detach()
    return copy.requires_grad_() if is_reparameterized(draw.traces.guide.nodes[name]) else copy


def with_leaf_scale(weights: Weights, estimator: Estimator, particles: Particles) -> Weights:
    r"""Adjust doubly reparameterised weights to a guide whose log-density is scaled inside the weights.

    With :math:`\ell = \dots - b \log q`, as under KL annealing, the score that is reparameterised once more has the
    factor b, so the path weight is :math:`v - b\,dv/d\ell`.

    Raises:
        ValueError: the guide's sites are scaled differently.
    """
    b = particles.leaf_scale
    if not estimator.doubly or (not isinstance(b, Tensor) and b == 1):
        return weights
    if b is None:
        raise ValueError(
            f"guide sites {particles.layout.leaves} have different scales (poutine.scale) inside the weights, for "
            "which there is no doubly reparameterised gradient: scale them alike, or use gradient='pathwise'."
        )
    undamped = weights.path_weights if weights.path_weights is not None else weights.model
    return weights._replace(path=undamped - b * (undamped - weights.path))


def finite(log_joint: Tensor) -> Tensor:
    """Zero for a zero weight, whose log times its weight would be NaN."""
    return log_joint.masked_fill(log_joint == -torch.inf, 0.0)
