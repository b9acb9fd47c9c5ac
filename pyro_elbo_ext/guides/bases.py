"""Base distributions of flows: the noise that a flow bends, with learned parameters where it has any."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

__all__ = ["BASES", "MixtureBase", "NormalBase", "StudentTBase", "ZukoBase", "make_base"]

BASES = ("normal", "studentt", "mixture")


class NormalBase(nn.Module):
    """Independent standard normals.

    Args:
        features: number of coordinates.
    """

    example: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("example", torch.zeros(()), persistent=False)  # for dtype and device

    def rsample(self, shape: torch.Size, context: Tensor | None = None) -> Tensor:
        """Draw noise ``[*shape, features]``."""
        return torch.randn((*shape, self.features), dtype=self.example.dtype, device=self.example.device)

    def log_prob(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the log-density ``[*shape]`` in nats."""
        return -0.5 * (noise.square().sum(-1) + self.features * math.log(2 * math.pi))


class StudentTBase(nn.Module):
    """Independent Student-t coordinates, each with learned degrees of freedom above 1, for heavy tails.

    Args:
        features: number of coordinates.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.shape = nn.Parameter(torch.full((features,), 9.0))

    def _distribution(self) -> Any:
        return dist.StudentT(1 + softplus(self.shape)).to_event(1)

    def rsample(self, shape: torch.Size, context: Tensor | None = None) -> Tensor:
        """Draw noise ``[*shape, features]``."""
        return self._distribution().rsample(shape)

    def log_prob(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the log-density ``[*shape]`` in nats."""
        return self._distribution().log_prob(noise)


class MixtureBase(nn.Module):
    """A learned mixture of diagonal normals, for posteriors of several modes.

    Draws have path derivatives in the weights as well.

    References:
        Pathwise Derivatives for Multivariate Distributions (Jankowiak, Karaletsos, 2018, arXiv:1806.01856).

    Args:
        features: number of coordinates, at least 2.
        components: number of normals.
        spread: deviation of their first locations.
    """

    def __init__(self, features: int, components: int = 4, spread: float = 2.0) -> None:
        super().__init__()
        if features < 2:
            raise ValueError('base="mixture" needs two coordinates or more, got 1: use flow="spline" for one')
        if components < 1:
            raise ValueError(f"components must be positive, got {components}")
        self.loc = nn.Parameter(spread * torch.randn(components, features))
        self.log_scale = nn.Parameter(torch.zeros(components, features))
        self.logits = nn.Parameter(torch.zeros(components))

    def rsample(self, shape: torch.Size, context: Tensor | None = None) -> Tensor:
        """Draw noise ``[*shape, features]``."""
        flat = dist.MixtureOfDiagNormals(self.loc, self.log_scale.exp(), self.logits).rsample((shape.numel(),))
        return flat.reshape(*shape, flat.shape[-1])  # Pyro's takes one sample dimension

    def log_prob(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the log-density ``[*shape]`` in nats."""
        scaled = (noise.unsqueeze(-2) - self.loc) * (-self.log_scale).exp()
        normal = -0.5 * (scaled.square() + math.log(2 * math.pi)) - self.log_scale
        return (normal.sum(-1) + self.logits.log_softmax(-1)).logsumexp(-1)


class ZukoBase(nn.Module):
    """The base of one of zuko's flows.

    Args:
        lazy: a zuko ``LazyDistribution``.
    """

    def __init__(self, lazy: nn.Module) -> None:
        super().__init__()
        self.lazy = lazy

    def rsample(self, shape: torch.Size, context: Tensor | None = None) -> Tensor:
        """Draw noise ``[*shape, features]``."""
        base = self.lazy(context)
        return base.rsample(shape[: len(shape) - len(base.batch_shape)])

    def log_prob(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the log-density ``[*shape]`` in nats."""
        return self.lazy(context).log_prob(noise)


def make_base(base: str | nn.Module, features: int) -> nn.Module:
    """Return the base that ``base=`` names, or the module that it is.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(base, nn.Module):
        return base
    if base == "normal":
        return NormalBase(features)
    if base == "studentt":
        return StudentTBase(features)
    if base == "mixture":
        return MixtureBase(features)
    known = ", ".join(f'"{name}"' for name in BASES)
    raise ValueError(f"base must be one of {known}, or a module with rsample and log_prob; got {base!r}")
