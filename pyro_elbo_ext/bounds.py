r"""Lower bounds on the evidence as pure functions of log-weights.

A bound maps the log-weights :math:`\ell_k = \log p(x, z_k) - \log q(z_k)` of K particles, a tensor
``[num_particles, *plates]``, to one value in nats per plate element, ``[*plates]``. Whatever an estimator of its
gradient needs follows by differentiation:

========================================  =============================================  ==================
quantity                                  definition                                     for IWAE
========================================  =============================================  ==================
``path_weights``                          :math:`v_k = dB/d\ell_k`                       softmax
``doubly_reparameterized_weights``        :math:`v_k - dv_k/d\ell_k`                     :math:`v_k^2`
``leave_one_out``                         :math:`B(\ell) - B(\ell` without particle k)   VIMCO's signal
========================================  =============================================  ==================

:class:`Bound` computes all three by automatic differentiation, so a new bound is one function. The bounds below
also carry closed forms, which are faster. Nothing here knows Pyro.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["CIWAE", "ELBO", "IWAE", "MIWAE", "VRIWAE", "Bound", "FunctionBound", "log_mean_exp"]


def log_mean_exp(log_w: Tensor) -> Tensor:
    r""":math:`\log \frac{1}{K} \sum_k w_k` over the first dimension; ``-inf`` is a weight of zero."""
    return log_w[0] if log_w.shape[0] == 1 else torch.logsumexp(log_w, dim=0) - math.log(log_w.shape[0])


class Bound:
    """A function of log-weights; subclasses define :meth:`__call__` and inherit everything else.

    The inherited rules hold for any function of K independent particles that treats plate elements apart.

    Attributes:
        linear: True where the bound is an average of the log-weights, so that a scale may stand on either side of it.
    """

    linear: bool = False

    def __call__(self, log_w: Tensor) -> Tensor:
        """Return the value in nats, ``[*plates]``, at log-weights ``[num_particles, *plates]``."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(log_w)")

    def check_num_particles(self, num_particles: int) -> None:
        """Raise a ValueError where the bound cannot be formed from that many particles."""

    def path_weights(self, log_w: Tensor) -> Tensor:
        r"""Return :math:`v_k = dB/d\ell_k`, the weight of each particle's gradient, ``[num_particles, *plates]``."""
        with torch.enable_grad():
            leaf = log_w.detach().requires_grad_()
            return torch.autograd.grad(self(leaf).sum(), leaf)[0]

    def doubly_reparameterized_weights(self, log_w: Tensor) -> Tensor:
        r"""Return :math:`v_k - dv_k/d\ell_k`, ``[num_particles, *plates]``.

        By default K backward passes through the bound alone, negligible beside the model's.

        References:
            Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker, Lawson, Gu, Maddison,
            2018, arXiv:1810.04152), generalised from the log-mean-exp to any differentiable bound.
        """
        with torch.enable_grad():
            leaf = log_w.detach().requires_grad_()
            path = torch.autograd.grad(self(leaf).sum(), leaf, create_graph=True)[0]
            if not path.requires_grad:  # a linear bound: its weights do not move
                return path.detach()
            slopes = [torch.autograd.grad(path[k].sum(), leaf, retain_graph=True)[0][k] for k in range(log_w.shape[0])]
        return path.detach() - torch.stack(slopes)

    def leave_one_out(self, log_w: Tensor, fill: str = "geometric") -> Tensor:
        r"""Return the learning signal :math:`S_k = B(\ell) - B(\ell_{-k})`, ``[num_particles, *plates]``.

        In :math:`\ell_{-k}` particle k is replaced by a mean of the others, or by nothing, so that nothing of particle
        k is left in the second term and subtracting it adds no bias. The coefficient of :math:`\nabla \log q(z_k)` in
        an unbiased gradient is :math:`S_k - v_k`. Averaged log-weights give the leave-one-out (RLOO) estimator, the
        log-mean-exp gives VIMCO, and OVIS with ``fill="zero"``.

        Args:
            log_w: log-weights ``[num_particles, *plates]``.
            fill: ``"geometric"`` (mean of the others' log-weights), ``"arithmetic"`` (log of their mean weight) or
                ``"zero"`` (a weight of zero).

        Raises:
            ValueError: fewer than two particles, or an unknown ``fill``.

        References:
            Variational Inference for Monte Carlo Objectives (Mnih, Rezende, 2016, arXiv:1602.06725); Optimal Variance
            Control of the Score-Function Gradient Estimator for Importance-Weighted Bounds (Liévin, Dittadi,
            Christensen, Winther, 2020, arXiv:2008.01998).
        """
        _check_fill(log_w, fill)
        num_particles = log_w.shape[0]
        own = torch.eye(num_particles, dtype=torch.bool, device=log_w.device)
        own = own.reshape(own.shape + (1,) * (log_w.dim() - 1))  # [particle, left out, 1...]
        others = log_w.unsqueeze(1).expand(own.shape[:2] + log_w.shape[1:])
        return self(log_w) - self(torch.where(own, _fill(log_w, fill), others))


def _check_fill(log_w: Tensor, fill: str) -> None:
    if fill not in ("geometric", "arithmetic", "zero"):
        raise ValueError(f'fill must be "geometric", "arithmetic" or "zero", got {fill!r}')
    if log_w.shape[0] < 2:
        raise ValueError(
            "leaving one particle out needs num_particles >= 2, got 1: a lone particle has no others to compare "
            "with. Raise num_particles."
        )


def _log_sum_exp_of_others(log_w: Tensor) -> Tensor:
    """Log of the sum of all weights but one's own, from sums over those before and after: nothing is subtracted."""
    nothing = torch.full_like(log_w[:1], -math.inf)
    before = torch.cat([nothing, log_w[:-1].logcumsumexp(0)])
    after = torch.cat([log_w[1:].flip(0).logcumsumexp(0).flip(0), nothing])
    return torch.logaddexp(before, after)


def _fill(log_w: Tensor, fill: str) -> Tensor:
    """What stands in a particle's place, from the others alone, ``[num_particles, *plates]``."""
    others = log_w.shape[0] - 1
    if fill == "zero":
        return torch.full_like(log_w, -math.inf)
    if fill == "arithmetic":
        return _log_sum_exp_of_others(log_w) - math.log(others)
    before = torch.cat([torch.zeros_like(log_w[:1]), log_w[:-1].cumsum(0)])
    after = torch.cat([log_w[1:].flip(0).cumsum(0).flip(0), torch.zeros_like(log_w[:1])])
    return (before + after) / others


class FunctionBound(Bound):
    """Any function of log-weights as a :class:`Bound`."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, log_w: Tensor) -> Tensor:
        """Return ``function(log_w)``.

        Raises:
            ValueError: it is not one value for each plate element.
        """
        value = self.function(log_w)
        if not isinstance(value, Tensor) or value.shape != log_w.shape[1:]:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"the bound returned {found} at log-weights of shape {tuple(log_w.shape)}; return one value for each "
                f"plate element, shape {tuple(log_w.shape[1:])}."
            )
        return value


class ELBO(Bound):
    r""":math:`\frac{1}{K} \sum_k \log w_k`, the evidence lower bound averaged over particles."""

    linear = True

    def __call__(self, log_w: Tensor) -> Tensor:
        """Return the mean log-weight."""
        return log_w.mean(0)

    def path_weights(self, log_w: Tensor) -> Tensor:
        """Return 1/K."""
        return torch.full_like(log_w, 1 / log_w.shape[0])

    def doubly_reparameterized_weights(self, log_w: Tensor) -> Tensor:
        """Return 1/K: for the ELBO the doubly reparameterised estimator is sticking-the-landing."""
        return self.path_weights(log_w)

    def leave_one_out(self, log_w: Tensor, fill: str = "geometric") -> Tensor:
        """Return each log-weight less what stands in its place, over K."""
        _check_fill(log_w, fill)
        return (log_w - _fill(log_w, fill)) / log_w.shape[0]


class IWAE(Bound):
    r""":math:`\log \frac{1}{K} \sum_k w_k`, the importance-weighted bound.

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2015, arXiv:1509.00519).
    """

    def __call__(self, log_w: Tensor) -> Tensor:
        """Return the log-mean-exp."""
        return log_mean_exp(log_w)

    def path_weights(self, log_w: Tensor) -> Tensor:
        """Return the normalised weights."""
        return torch.softmax(log_w, 0)

    def doubly_reparameterized_weights(self, log_w: Tensor) -> Tensor:
        """Return the squared normalised weights."""
        return torch.softmax(log_w, 0).square()

    def leave_one_out(self, log_w: Tensor, fill: str = "geometric") -> Tensor:
        """Return the signal at a cost linear in the number of particles, to the digits of the largest weight."""
        _check_fill(log_w, fill)
        log_w = log_w - log_w.detach().amax(0).clamp(min=torch.finfo(log_w.dtype).min)  # shifts both terms alike
        without = torch.logaddexp(_log_sum_exp_of_others(log_w), _fill(log_w, fill))
        return self(log_w) - (without - math.log(log_w.shape[0]))


class VRIWAE(Bound):
    r""":math:`\frac{1}{1 - \alpha} \log \frac{1}{K} \sum_k w_k^{1 - \alpha}`, from IWAE (0) to the ELBO (1).

    Args:
        alpha: in [0, 1].

    Raises:
        ValueError: ``alpha`` outside [0, 1], where the value is no lower bound or below the ELBO.

    References:
        Alpha-divergence Variational Inference Meets Importance Weighted Auto-Encoders: Methodology and Asymptotics
        (Daudel, Benton, Shi, Doucet, 2022, arXiv:2210.06226); Rényi Divergence Variational Inference
        (Li, Turner, 2016, arXiv:1602.02311).
    """

    def __init__(self, alpha: float) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(
                f"alpha must lie in [0, 1], got {alpha}: 0 is IWAE, 1 the ELBO. Below 0 the Monte Carlo value can "
                "exceed the evidence and bounds nothing; above 1 it lies below the ELBO."
            )
        self.alpha = float(alpha)
        self.linear = self.alpha == 1

    def __call__(self, log_w: Tensor) -> Tensor:
        """Return the generalised mean of the log-weights."""
        if self.linear:
            return log_w.mean(0)
        # expm1 and log1p keep the digits that 1 / (1 - alpha) would lose as alpha nears 1.
        top = log_w.detach().amax(0).clamp(min=torch.finfo(log_w.dtype).min)
        powers = torch.expm1((1 - self.alpha) * (log_w - top))
        return top + torch.log1p(powers.mean(0)) / (1 - self.alpha)

    def path_weights(self, log_w: Tensor) -> Tensor:
        """Return the normalised tempered weights."""
        return ELBO().path_weights(log_w) if self.linear else torch.softmax((1 - self.alpha) * log_w, 0)

    def doubly_reparameterized_weights(self, log_w: Tensor) -> Tensor:
        r"""Return :math:`\alpha v + (1 - \alpha) v^2`."""
        path = self.path_weights(log_w)
        return self.alpha * path + (1 - self.alpha) * path.square()


class MIWAE(Bound):
    r"""The mean of M importance-weighted bounds, each over K/M of the particles.

    A higher signal-to-noise ratio of the guide's gradient than one bound over all K, at the price of tightness.

    Args:
        num_groups: M, a divisor of the number of particles.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018, arXiv:1802.04537).
    """

    def __init__(self, num_groups: int) -> None:
        if num_groups < 1:
            raise ValueError(f"num_groups must be a positive integer, got {num_groups}")
        self.num_groups = num_groups

    def check_num_particles(self, num_particles: int) -> None:
        """Raise a ValueError unless the groups are equal."""
        if num_particles % self.num_groups:
            raise ValueError(
                f"num_particles must be a multiple of num_groups, got {num_particles} particles in "
                f"{self.num_groups} groups"
            )

    def _grouped(self, log_w: Tensor) -> Tensor:
        self.check_num_particles(log_w.shape[0])
        return log_w.reshape((self.num_groups, -1) + log_w.shape[1:]).transpose(0, 1)

    def __call__(self, log_w: Tensor) -> Tensor:
        """Return the mean of the groups' log-mean-exps."""
        return log_mean_exp(self._grouped(log_w)).mean(0)

    def _within_groups(self, log_w: Tensor) -> Tensor:
        weights = torch.softmax(self._grouped(log_w), 0)
        return weights.transpose(0, 1).reshape(log_w.shape)

    def path_weights(self, log_w: Tensor) -> Tensor:
        """Return the weights normalised within each group, over M."""
        return self._within_groups(log_w) / self.num_groups

    def doubly_reparameterized_weights(self, log_w: Tensor) -> Tensor:
        """Return the squares of the weights normalised within each group, over M."""
        return self._within_groups(log_w).square() / self.num_groups


class CIWAE(Bound):
    r""":math:`\beta\,\mathrm{ELBO} + (1 - \beta)\,\mathrm{IWAE}` on the same particles.

    Args:
        beta: the ELBO's share, in [0, 1].

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018, arXiv:1802.04537).
    """

    def __init__(self, beta: float) -> None:
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must lie in [0, 1], got {beta}: 0 is IWAE, 1 the ELBO")
        self.beta = float(beta)
        self.linear = self.beta == 1

    def __call__(self, log_w: Tensor) -> Tensor:
        """Return the mixture of the two bounds."""
        if self.beta == 0:  # an ELBO of -inf would turn the product with 0 into NaN
            return log_mean_exp(log_w)
        return self.beta * log_w.mean(0) + (1 - self.beta) * log_mean_exp(log_w)

    def path_weights(self, log_w: Tensor) -> Tensor:
        """Return the same mixture of 1/K and the normalised weights."""
        return self.beta / log_w.shape[0] + (1 - self.beta) * torch.softmax(log_w, 0)

    def doubly_reparameterized_weights(self, log_w: Tensor) -> Tensor:
        """Return the same mixture of 1/K and the squared normalised weights."""
        return self.beta / log_w.shape[0] + (1 - self.beta) * torch.softmax(log_w, 0).square()
