"""The one place that imports zuko: its transforms, near the identity at first, in the direction that samples fast.

zuko switches argument validation off for all of torch.distributions when it is imported; here the import is undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

__all__ = ["FLOWS", "bisects", "import_zuko", "is_zuko_flow", "lazy_transform", "near_identity", "steps", "take_mask"]

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


def lazy_transform(
    kind: str,
    features: int,
    context: int,
    transforms: int | None,
    hidden_features: Sequence[int],
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
        hidden_features: widths of the networks' hidden layers.
        activation: of the networks.
        bins: of the splines.
        scale_bound: largest log-scale of an affine layer.
    """
    zuko = import_zuko()
    if kind not in FLOWS:
        known = ", ".join(f'"{name}"' for name in FLOWS)
        raise ValueError(f"flow must be one of {known}, or a function of (features, context); got {kind!r}")
    bound = scale_bound or (2.0 if kind == "coupling" else -math.log(1e-3))
    network: dict[str, Any] = {"hidden_features": tuple(hidden_features), "activation": activation}
    affine = {"univariate": partial(zuko.transforms.MonotonicAffineTransform, slope=math.exp(-bound))}
    if kind == "spline" or features + context == 1:  # one affine coordinate alone would be a plain Gaussian
        flow = zuko.flows.NSF(
            features, context, bins=bins, transforms=transforms or 3, **_fitting(network, features, context)
        )
    elif kind == "iaf" or features == 1:
        flow = zuko.flows.MAF(features, context, transforms=transforms or 3, **affine, **network)
    else:
        flow = zuko.flows.NICE(features, context, transforms=transforms or 8, **affine, **network)
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
