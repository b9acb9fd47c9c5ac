"""A flow as a Pyro distribution, for guides and models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_elbo_ext.guides.flows import Flow, as_flow
from pyro_elbo_ext.guides.zuko import bisects

__all__ = ["FlowDistribution"]


class _Drawn(NamedTuple):
    value: Tensor
    noise: Tensor
    log_prob: Tensor


def _not_finite(value: Tensor) -> Tensor:
    """Tell which values are infinite or not a number, in two operations, where ``isfinite`` alone takes four."""
    return (value - value) != 0


class _DropNonfinite(torch.autograd.Function):
    """Gives draws that are not finite weight zero, and leaves draws out of the gradient whose slope is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_prob: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        ctx.bad = _not_finite(x.sum(-1) + log_prob)
        ctx.dropped = dropped
        return x.masked_fill(ctx.bad.unsqueeze(-1), 0.0), log_prob.masked_fill(ctx.bad, math.inf)

    @staticmethod
    def backward(ctx: Any, slope: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, None]:
        bad = _not_finite(slope.sum(-1) + weight) | ctx.bad
        ctx.dropped.add_(bad.sum())
        return slope.masked_fill(bad.unsqueeze(-1), 0.0), weight.masked_fill(bad, 0.0), None


class FlowDistribution(TorchDistribution):
    r"""A distribution over real vectors: ``x = T(noise | context)``, ``log q(x) = log p_0(noise) - log |det dT|``.

    Use it in a hand-written guide, as ``pyro.sample("z", FlowDistribution(flow, encoder(x)))`` with
    ``pyro.module("flow", flow)``, or in a model. ``log_prob`` of the last draw costs nothing; of any other value it
    takes the flow's inverse, one pass for coupling layers, one for each coordinate for autoregressive ones. The density
    is the true one in either case.

    Draws through whose value a gradient comes back that is not finite are left out of it and counted in
    ``flow.dropped``, so that a model that fails at single draws does not end a fit; their values are left alone. A draw
    that overflows is a zero of infinite density, so of weight zero.

    Args:
        flow: made by :func:`~pyro_elbo_ext.guides.make_flow`, or one of ``zuko.flows``, in zuko's direction.
        context: ``[*batch_shape, context]``, or None.
        batch_shape: of the distribution, by default that of the context.
        validate_args: as in every distribution.

    Raises:
        ValueError: a context of the wrong size.
    """

    arg_constraints: dict = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        flow: Flow | Any,
        context: Tensor | None = None,
        batch_shape: Sequence[int] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.flow, self.context = as_flow(flow), context
        self.flow.check_context(context)
        if batch_shape is None:
            batch_shape = () if context is None else context.shape[:-1]
        if self.flow.features is None:
            self.flow.features = self._features(context)
        self._drawn: _Drawn | None = None
        super().__init__(torch.Size(batch_shape), torch.Size((self.flow.features,)), validate_args=validate_args)

    def _features(self, context: Tensor | None) -> int:
        row = None if context is None else context.detach().reshape(-1, context.shape[-1])[0]
        try:
            features = self.flow.base.lazy(row).event_shape[0]  # type: ignore[operator]
            forward: Any = self.flow.transform.inv
            slow = bisects(forward, row, features)
        except RuntimeError as error:
            raise ValueError(
                f"the flow does not take a context of {0 if row is None else len(row)} features"
            ) from error

        if slow:
            raise ValueError(
                "this zuko flow draws by bisection, so that its draws are not exactly of its density, which no bound "
                "stands. Use one with an inverse in closed form: NSF, MAF, NICE; or make_flow."
            )
        return features

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowDistribution:
        """Return the same distribution with another batch shape, which the context's broadcasts to."""
        new = self._get_checked_instance(FlowDistribution, _instance)
        new.flow, new.context, new._drawn = self.flow, self.context, None
        super(FlowDistribution, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw values ``[*sample_shape, *batch_shape, features]``; their log-densities come with them."""
        shape = torch.Size(sample_shape) + self.batch_shape
        noise = self.flow.base.rsample(shape, self.context)  # type: ignore[operator]
        x, log_prob = self._push(noise)
        x, log_prob = _DropNonfinite.apply(x, log_prob, self.flow.dropped)
        self._drawn = _Drawn(x, noise, log_prob)
        return x

    def _push(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self._run(self.flow.push, noise)
        return x, self.flow.base.log_prob(noise, self.context) - ladj  # type: ignore[operator]

    def _run(self, direction: Callable, value: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return direction(value, self.context)
        except RuntimeError as error:
            size = 0 if self.context is None else self.context.shape[-1]
            raise ValueError(f"the flow could not be run with a context of {size} features: {error}") from error

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density in nats."""
        if self._drawn is not None and value is self._drawn.value:
            return self._drawn.log_prob
        if self._validate_args:
            self._validate_sample(value)
        noise, ladj = self._run(self.flow.pull, value)
        return self.flow.base.log_prob(noise, self.context) + ladj  # type: ignore[operator]

    def noise_of(self, value: Tensor) -> Tensor | None:
        """Return the noise of the last draw, None if that is not the value."""
        return self._drawn.noise.detach() if self._drawn is not None and value is self._drawn.value else None

    def score_rounds(self) -> int | None:
        """Return how many backward passes through a layer :meth:`log_prob_at` takes, None where it is not there."""
        return self.flow.score_rounds(self.context)

    def log_prob_at(self, value: Tensor, noise: Tensor) -> Tensor:
        r"""Return the log-density at a value whose noise is known, without an inverse.

        With s the score in x, held,

        .. math:: \log p_0(\epsilon) - \log |\det \partial T / \partial \epsilon| + s^\top (x - T(\epsilon))

        has the value and, at :math:`x = T(\epsilon)`, every first derivative of :math:`\log q(x)`: in x, in the
        context and in the parameters.

        References:
            Path-Gradient Estimators for Continuous Normalizing Flows (Vaitl, Nicoli, Nakajima, Kessel, 2022,
            arXiv:2206.09016); Fast and unified path gradient estimators for normalizing flows (Vaitl, Winkler,
            Richter, Kessel, 2024, arXiv:2403.15881), whose recursion for coupling layers :meth:`Flow.score` is.
        """
        noise = noise.detach()
        x, log_prob = self._push(noise)
        lost = _not_finite(x.detach().sum(-1) + log_prob.detach())  # as when it was drawn
        if torch.is_grad_enabled():
            score = self.flow.score(noise, self.context).masked_fill(lost.unsqueeze(-1), 0.0)
            log_prob = log_prob + ((value - x) * score).sum(-1)
        return log_prob.masked_fill(lost, math.inf)
