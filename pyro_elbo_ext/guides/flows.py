r"""Flows as modules: ``x = loc + scale y``, ``y = T(noise | context)``, with T from zuko.

The density of a draw comes from the forward pass alone,

.. math:: \log q(x) = \log p_0(\epsilon) - \log |\det \partial x / \partial \epsilon|,

and so does its score :math:`s = \nabla_x \log q(x)` with the parameters held: from
:math:`s_0 = \nabla \log p_0(\epsilon)` layer by layer,

.. math:: s_{l+1} = J_l^{-\top} (s_l - \nabla \log |\det J_l|).

Where a layer is elementwise given its input, J is triangular up to an order of the coordinates, and
:math:`s \leftarrow s + (r - J^\top s) / \mathrm{diag} J` is back substitution: exact after as many rounds as the
layer's inverse takes passes, two for a coupling layer, the first of which is free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_elbo_ext.guides.bases import ZukoBase, make_base
from pyro_elbo_ext.guides.zuko import is_autoregressive, is_zuko_flow, lazy_transform, push, steps

__all__ = ["Affine", "Flow", "as_flow", "make_flow"]

RATE = 10.0  # how much faster than the networks the outer affine map learns


class Affine(nn.Module):
    r"""``x = loc + scale y`` with a diagonal or a lower triangular scale, learned in multiples of its first value.

    Parameters are stored divided by ``rate``: an optimiser whose steps do not depend on the size of gradients, as
    Adam's, moves location and log-scale that many times as fast as the rest of the flow.

    Args:
        loc: first location ``[features]``.
        scale: first scale, a number, ``[features]``, or a lower triangle ``[features, features]``.
        dense: learn the lower triangle.
        rate: learning rate in units of the flow's.
    """

    loc0: Tensor
    step: Tensor
    log_scale0: Tensor
    lower0: Tensor | None

    def __init__(self, loc: Tensor, scale: Tensor | float, dense: bool = False, rate: float = RATE) -> None:
        super().__init__()
        if rate <= 0:
            raise ValueError(f"affine_rate must be positive, got {rate}")
        self.dense, self.rate = dense, rate
        square = loc.new_zeros(loc.shape + loc.shape) if dense else None
        self.register_buffer("loc0", loc)
        self.register_buffer("step", torch.zeros_like(loc))
        self.register_buffer("log_scale0", torch.zeros_like(loc))
        self.register_buffer("lower0", square)
        self.shift = nn.Parameter(torch.zeros_like(loc))
        self.log_scale = nn.Parameter(torch.zeros_like(loc))
        self.lower = nn.Parameter(torch.zeros_like(square)) if square is not None else None
        self.restart(loc, torch.as_tensor(scale, dtype=loc.dtype, device=loc.device))

    @torch.no_grad()
    def restart(self, loc: Tensor, scale: Tensor) -> None:
        """Start again from a location ``[features]`` and a scale, of any of the constructor's shapes.

        Of a triangle given to a diagonal map the variances are kept.
        """
        triangle = scale if scale.dim() == 2 else torch.diag_embed(scale.expand(loc.shape))
        if not torch.isfinite(triangle).all() or not torch.isfinite(loc).all() or (triangle.diagonal() <= 0).any():
            raise ValueError("the first location and scale of a flow must be finite, and its scales positive")
        first = triangle.diagonal() if self.dense else triangle.square().sum(-1).sqrt()
        self.loc0.copy_(loc)
        self.step.copy_(self.rate * first)
        self.log_scale0.copy_(first.log())
        if self.lower0 is not None:
            self.lower0.copy_((triangle / first[:, None]).tril(-1))
        for learned in (self.shift, self.log_scale, self.lower):
            if learned is not None:
                learned.zero_()

    @property
    def loc(self) -> Tensor:
        """Location ``[features]``."""
        return torch.addcmul(self.loc0, self.step, self.shift)

    @property
    def scale(self) -> Tensor:
        """Scales ``[features]``, the diagonal of the triangle."""
        return self._log_scale().exp()

    def _log_scale(self) -> Tensor:
        return torch.add(self.log_scale0, self.log_scale, alpha=self.rate)

    @property
    def triangle(self) -> Tensor:
        """The lower triangle ``[features, features]``."""
        scale = self.scale
        if self.lower is None or self.lower0 is None:
            return scale.diag()
        return scale[:, None] * (self.lower0 + self.rate * self.lower).tril(-1) + scale.diag()

    def push(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and the log-determinant, a scalar."""
        log_scale = self._log_scale()
        x = self.loc + y @ self.triangle.T if self.dense else torch.addcmul(self.loc, log_scale.exp(), y)
        return x, log_scale.sum()

    def pull(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and the log-determinant of this direction, a scalar."""
        centred = x - self.loc
        if self.dense:
            centred = torch.linalg.solve_triangular(self.triangle, centred.unsqueeze(-1), upper=False).squeeze(-1)
        else:
            centred = centred / self.scale
        return centred, -self._log_scale().sum()

    def pull_score(self, score: Tensor) -> Tensor:
        r"""Return :math:`A^{-\top} s` of the scale A and a score in y."""
        if not self.dense:
            return score / self.scale
        return torch.linalg.solve_triangular(self.triangle.T, score.unsqueeze(-1), upper=True).squeeze(-1)


class Flow(nn.Module):
    """A flow in the direction that it samples in.

    Args:
        transform: a zuko ``LazyTransform`` from noise to y.
        base: a module with ``rsample(shape, context)`` and ``log_prob(noise, context)``.
        affine: what follows the transform, or None.
        features: number of coordinates, None if not known.
        context: number of context features, None if not known.
    """

    def __init__(
        self,
        transform: nn.Module,
        base: nn.Module,
        affine: Affine | None = None,
        features: int | None = None,
        context: int | None = None,
    ) -> None:
        super().__init__()
        self.transform, self.base, self.affine = transform, base, affine
        self.features, self.context = features, context
        self.autoregressive = is_autoregressive(transform)
        self.standard: nn.Module | None = None  # how a guide scales values for flows below
        self.register_buffer("dropped", torch.zeros((), dtype=torch.long), persistent=False)

    def check_context(self, context: Tensor | None) -> None:
        """Refuse a context of the wrong size.

        Raises:
            ValueError: expected and given sizes are named.
        """
        given = 0 if context is None else context.shape[-1]
        if self.context is not None and given != self.context:
            raise ValueError(
                f"the flow was made for a context of {self.context} features, but was given {given}: context must be "
                f"a tensor [..., {self.context}]"
                if self.context
                else f"the flow takes no context, but was given {given} features"
            )

    def push(self, noise: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return values and log-determinants ``[*shape]`` of noise ``[*shape, features]``."""
        y, ladj = self._bend(noise, context)
        if self.affine is None:
            return y, ladj
        x, outer = self.affine.push(y)
        return x, ladj + outer

    def _bend(self, noise: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if not self.autoregressive:
            return self.transform(context).call_and_ladj(noise)
        shape = noise.shape[:-1]
        if context is not None:
            context = context.expand(shape + context.shape[-1:]).reshape(shape.numel(), context.shape[-1])
        rows = noise.reshape(shape.numel(), noise.shape[-1])  # multiplied without more ado
        y, ladj = push(self.transform.transforms, rows, context)
        return y.view(noise.shape), ladj.view(shape)

    def pull(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the noise of values, and log-determinants of this direction; the slow one."""
        outer: Tensor | float = 0.0
        if self.affine is not None:
            x, outer = self.affine.pull(x)
        noise, ladj = self.transform(context).inv.call_and_ladj(x)
        return noise, ladj + outer

    def whiten(self, x: Tensor) -> Tensor:
        """Return values less their location, over their scale."""
        return x if self.affine is None else self.affine.pull(x)[0]

    def score_rounds(self, context: Tensor | None = None) -> int | None:
        """Return how often :meth:`score` goes back through the slowest layer, None where there is no score."""
        layers = steps(self.transform(context))
        return None if layers is None else max((rounds for _, rounds in layers), default=1)

    def score(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Return :math:`\nabla_x \log q(x)` at the value that some noise is pushed to, detached; nothing is inverted.

        Raises:
            NotImplementedError: a layer that is not elementwise given its input.
        """
        context = None if context is None else context.detach()
        layers = steps(self.transform(context))
        if layers is None:
            raise NotImplementedError("this flow has layers without a score in the direction of sampling")
        with torch.enable_grad():
            h = noise.detach().requires_grad_()
            density: Any = self.base.log_prob
            (score,) = torch.autograd.grad(density(h, context).sum(), h)
            for meta, rounds in layers:
                h, score = _step(meta, rounds, h.detach(), score)
        return score if self.affine is None else self.affine.pull_score(score).detach()


def _step(meta: Callable, rounds: int, h: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Carry a score through a layer that is elementwise given its input, and return the layer's output with it."""
    given, moved = h.clone().requires_grad_(), h.clone().requires_grad_()
    y, ladj = meta(given).call_and_ladj(moved)

    def pulled(output: Tensor, weight: Tensor) -> Tensor:
        slopes = torch.autograd.grad(output, (given, moved), weight, retain_graph=True, allow_unused=True)
        return sum((slope for slope in slopes if slope is not None), torch.zeros_like(h))

    (diagonal,) = torch.autograd.grad(y.sum(), moved, retain_graph=True)
    rest = score - pulled(ladj, torch.ones_like(ladj)) if ladj.requires_grad else score
    score = rest / diagonal
    for _ in range(rounds - 1):
        score = score + (rest - pulled(y, score)) / diagonal
    return y.detach(), score.detach()


def make_flow(
    kind: str = "iaf",
    features: int = 1,
    context: int = 0,
    *,
    transforms: int | None = None,
    hidden_features: Sequence[int] | None = None,
    activation: Callable[[], nn.Module] = nn.SiLU,
    bins: int = 8,
    scale_bound: float | None = None,
    base: str | nn.Module = "normal",
    affine: str | None = "diag",
    loc: Tensor | float = 0.0,
    scale: Tensor | float = 1.0,
    affine_rate: float = RATE,
) -> Flow:
    r"""Make a flow that starts near ``loc + scale * noise``.

    ``"iaf"`` (inverse autoregressive, affine) samples in one pass, and fitted eight schools and a funnel best of the
    three; ``"coupling"`` is also evaluated at other values in one pass and gives its score cheaply; ``"spline"``
    (autoregressive rational-quadratic splines within 5 deviations) bends single coordinates, at about twice the cost.
    One coordinate without a context is a spline in any case.

    References:
        Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016, arXiv:1606.04934);
        Density estimation using Real NVP (Dinh, Sohl-Dickstein, Bengio, 2016, arXiv:1605.08803); Neural Spline Flows
        (Durkan, Bekasov, Murray, Papamakarios, 2019, arXiv:1906.04032).

    Args:
        kind: ``"iaf"``, ``"coupling"`` or ``"spline"``.
        features: number of coordinates.
        context: number of context features.
        transforms: number of layers; 3, for coupling 8.
        hidden_features: widths of the networks' hidden layers; two of 64 units, one for ``"iaf"`` without context. One
            layer fits scales that vary, as a funnel's, as well as two do, and several modes much worse.
        activation: of the networks; one with a kink gives densities with kinks, and worse fits.
        bins: of splines.
        scale_bound: largest log-scale of an affine layer, towards which it then bends; 2 for coupling. By default those
            of ``"iaf"`` are linear, and clamped at 6.9. A lower bound tames the tails of flows trained for a short
            time, and holds back those that need them, as a funnel's does.
        base: ``"normal"``, ``"studentt"``, ``"mixture"``, or a module of ``guides.bases``.
        affine: ``"diag"`` or ``"tril"`` for an outer affine map with that scale, or None.
        loc: its first location.
        scale: its first scale.
        affine_rate: its learning rate, in units of the rest's.

    Raises:
        ValueError: an unknown kind, base or affine map, or a number out of range.
        ImportError: zuko is not installed.
    """
    for name, number in (
        ("features", features),
        ("transforms", transforms),
        ("bins", bins),
        ("scale_bound", scale_bound),
    ):
        if number is not None and number <= 0:
            raise ValueError(f"{name} must be positive, got {number}")
    if isinstance(hidden_features, int):
        raise ValueError(f"hidden_features must be a sequence of widths, got {hidden_features}: ({hidden_features},)")
    if affine not in ("diag", "tril", None):
        raise ValueError(f'affine must be "diag", "tril" or None, got {affine!r}')
    transform = lazy_transform(kind, features, context, transforms, hidden_features, activation, bins, scale_bound)
    example = next(transform.parameters())
    outer = None
    if affine is not None:
        first = torch.as_tensor(loc, dtype=example.dtype).expand(features).clone()
        outer = Affine(first, scale, dense=affine == "tril", rate=affine_rate)
    return Flow(transform, make_base(base, features), outer, features, context)


def as_flow(flow: Any, features: int | None = None, context: int | None = None) -> Flow:
    """Return a :class:`Flow` of what may be one of zuko's, which is used in the direction that zuko samples in.

    Raises:
        TypeError: neither.
    """
    if isinstance(flow, Flow):
        return flow
    if is_zuko_flow(flow):
        return Flow(flow.transform.inv, ZukoBase(flow.base), None, features, context)
    raise TypeError(f"expected a flow made by make_flow or a zuko.flows flow, got {type(flow).__name__}")
