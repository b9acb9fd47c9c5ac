"""The one place that imports zuko: its transforms, near the identity at first, in the direction that samples fast.

zuko switches argument validation off for all of torch.distributions when it is imported; here the import is undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints
from torch.nn.functional import hardtanh

__all__ = [
    "FLOWS",
    "ClampedAffine",
    "bisects",
    "import_zuko",
    "is_autoregressive",
    "is_zuko_flow",
    "lazy_transform",
    "near_identity",
    "push",
    "steps",
    "take_mask",
]

FLOWS = ("iaf", "coupling", "spline")


def import_zuko() -> ModuleType:
    """Import zuko and leave validation as it was.

    Raises:
        ImportError: zuko is not installed; the extra is named.
    """
    validate, constraints = Distribution._validate_args, Distribution.__dict__["arg_constraints"]
    try:
        import zuko
    except ImportError as error:
        raise ImportError(
            "flow guides need zuko, which is not installed: pip install 'pyro-elbo-ext[flows]'"
        ) from error
    finally:
        Distribution._validate_args = validate
        Distribution.arg_constraints = constraints  # type: ignore[method-assign]
    return zuko


def is_zuko_flow(flow: Any) -> bool:
    """Tell whether an object is one of zuko's flows, a lazy distribution with a transform and a base."""
    return isinstance(flow, import_zuko().lazy.Flow)


class ClampedAffine(Transform):
    """``y = shift + exp(s) x`` with the log-scale s held within bounds, and linear in its parameter inside.

    zuko's own bends the log-scale everywhere, by ``s / (1 + |s| / bound)``, which networks must first learn to undo
    where a posterior's scale is exponential in its neighbours, as a funnel's.

    Args:
        shift: ``[*batch]``.
        scale: log-scale before it is clamped.
        bound: largest absolute log-scale.
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(self, shift: Tensor, scale: Tensor, bound: float) -> None:
        super().__init__()
        self.shift, self.log_scale = shift, hardtanh(scale, -bound, bound)  # clamp's way back takes five operations

    def _call(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, self.log_scale.exp(), x)

    def _inverse(self, y: Tensor) -> Tensor:
        return (y - self.shift) * (-self.log_scale).exp()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the log-scale, of the shape of x."""
        return self.log_scale if self.log_scale.shape == x.shape else self.log_scale.expand(x.shape)


def lazy_transform(
    kind: str,
    features: int,
    context: int,
    transforms: int | None,
    hidden_features: Sequence[int] | None,
    activation: Callable[[], nn.Module],
    bins: int,
    scale_bound: float | None,
) -> nn.Module:
    """Return a zuko transform from noise to values, given a context, that is random but close to the identity.

    Args:
        kind: one of ``FLOWS``.
        features: number of coordinates.
        context: number of context features.
        transforms: number of layers; by default 3, or 8 for ``"coupling"``.
        hidden_features: widths of the networks' hidden layers; by default two of 64 units, one for ``"iaf"`` without a
            context.
        activation: of the networks.
        bins: of the splines.
        scale_bound: largest log-scale of an affine layer, towards which it bends; by default 2, and for ``"iaf"`` it is
            linear and clamped at 6.9.
    """
    zuko = import_zuko()
    if kind not in FLOWS:
        known = ", ".join(f'"{name}"' for name in FLOWS)
        raise ValueError(f"flow must be one of {known}, or a function of (features, context); got {kind!r}")
    if hidden_features is None:
        hidden_features = (64,) if kind == "iaf" and not context else (64, 64)
    network: dict[str, Any] = {"hidden_features": tuple(hidden_features), "activation": activation}
    univariate: Any = partial(zuko.transforms.MonotonicAffineTransform, slope=math.exp(-(scale_bound or 2.0)))
    if kind == "iaf" and scale_bound is None:
        univariate = partial(ClampedAffine, bound=-math.log(1e-3))
    if kind == "spline" or features + context == 1:  # one affine coordinate alone would be a plain Gaussian
        flow = zuko.flows.NSF(
            features, context, bins=bins, transforms=transforms or 3, **_fitting(network, features, context)
        )
    elif kind == "iaf" or features == 1:
        flow = zuko.flows.MAF(features, context, transforms=transforms or 3, univariate=univariate, **network)
    else:
        flow = zuko.flows.NICE(features, context, transforms=transforms or 8, univariate=univariate, **network)
    near_identity(flow.transform)
    return flow.transform


def _fitting(network: dict[str, Any], features: int, context: int) -> dict[str, Any]:
    """A single coordinate without a context has free parameters and no network."""
    return network if features > 1 or context else {}


@torch.no_grad()
def near_identity(transform: nn.Module, factor: float = 0.01) -> None:
    """Shrink what the layers add to the identity."""
    layers: Any = transform.transforms
    for layer in layers:
        last = [layer.hyper[-1]] if hasattr(layer, "hyper") else [layer]
        for parameter in (p for module in last for p in module.parameters(recurse=True)):
            parameter.mul_(factor)


def is_autoregressive(lazy: nn.Module) -> bool:
    """Tell whether a lazy transform is zuko's composition of its autoregressive layers, and of nothing else."""
    zuko = import_zuko()
    if type(lazy) is not zuko.lazy.LazyComposedTransform:
        return False
    layers: Any = lazy.transforms
    return all(type(layer) is zuko.flows.MaskedAutoregressiveTransform for layer in layers)


def push(layers: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what autoregressive layers make of x, and the log-determinant, summed over the coordinates once."""
    ladjs = []
    for layer in layers:
        x, ladj = _elementwise(layer, x, context).call_and_ladj(x)
        ladjs.append(ladj)
    return x, reduce(torch.add, ladjs).sum(-1)


def _elementwise(layer: Any, x: Tensor, context: Tensor | None) -> Any:
    """Return what an autoregressive layer does to each coordinate, without most of the views that zuko takes."""
    if any(layer.shapes):  # parameters that are vectors, as a spline's
        return layer.meta(context, x).base
    given = x if context is None else torch.cat((x, context), -1)
    return layer.univariate(*layer.hyper(given).unflatten(-1, (-1, layer.total)).unbind(-1))


def steps(transform: Transform) -> list[tuple[Callable[[Tensor], Any], int]] | None:
    """Split a transform into layers that are elementwise given their input, or return None if it has others.

    Returns:
        For each layer a function from its input to the elementwise transform, and the number of rounds after which
        back substitution through its Jacobian is exact: that matrix is triangular up to an order of the coordinates.
    """
    zuko = import_zuko()
    if isinstance(transform, zuko.transforms.ComposedTransform):
        parts = [steps(part) for part in transform.transforms]
        return None if None in parts else [layer for part in parts for layer in part or ()]
    if isinstance(transform, zuko.transforms.AutoregressiveTransform):
        return [(transform.meta, transform.passes)]
    if isinstance(transform, zuko.transforms.CouplingTransform):
        return [(partial(_Coupled, transform), 2)]
    if isinstance(transform, zuko.transforms.DependentTransform) and not hasattr(transform.base, "transforms"):
        return [(lambda _: transform, 1)]
    return None


class _Coupled:
    """A coupling layer as an elementwise transform of all coordinates, the identity on those that it conditions on."""

    def __init__(self, layer: Any, given: Tensor) -> None:
        self.layer = layer
        self.transform = layer.meta(layer.split(given)[0])
        self.base = getattr(self.transform, "base", None)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = self.layer.split(x)
        y, ladj = self.transform.call_and_ladj(moved)
        return self.layer.merge(kept, y, x.shape), ladj


def bisects(lazy: nn.Module, context: Tensor | None, features: int) -> bool:
    """Tell whether a zuko flow samples by bisection, whose density is not that of what it draws where it stops."""
    zuko = import_zuko()
    example = next(lazy.parameters())
    transform = lazy(context)
    parts = transform.transforms if isinstance(transform, zuko.transforms.ComposedTransform) else [transform]
    layers = [layer for part in parts for layer in steps(part) or ()]
    point = torch.zeros(features, dtype=example.dtype, device=example.device)
    kinds = [getattr(meta(point), "base", None) for meta, _ in layers]
    return any(isinstance(kind, zuko.transforms.MonotonicTransform) for kind in kinds)


def take_mask(module: nn.Module) -> Tensor | None:
    """Make one of zuko's masked layers a plain one, and return its mask; None for any other module."""
    if not isinstance(module, import_zuko().nn.MaskedLinear):
        return None
    module.__class__ = nn.Linear
    return module.mask
