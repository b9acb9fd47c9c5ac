r"""What an exponential family must know for natural-gradient variational inference.

A family with statistics T, natural parameters :math:`\eta` and log-normaliser A has the expectation parameters
:math:`m = E[T] = \nabla A(\eta)` and the Fisher information :math:`F = \nabla^2 A(\eta)`. The natural gradient of a
loss L is :math:`F^{-1} \nabla_\eta L = \nabla_m L`. A step of size rho along it is taken in :math:`\eta`:

.. math:: \eta^+ = \eta - \rho \, \nabla_m L

Every family has one set of arguments in which this is done (``arguments``), as tensors ``[*batch, *event]``. All tensor
code is free of branches on values; what leaves the family's domain comes back as NaN, for the caller to refuse.

References:
    Conjugate-Computation Variational Inference (Khan, Lin, 2017, arXiv:1703.04265); The Bayesian Learning Rule (Khan,
    Rue, 2023, arXiv:2107.04562).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

__all__ = ["AffineFamily", "Family", "Params", "Parametrization", "every", "lift", "precise", "triangle"]

Params = Mapping[str, Tensor]


def _same(params: Params) -> dict[str, Tensor]:
    return dict(params)


class Parametrization(NamedTuple):
    """Arguments by which users make a distribution of a family.

    Attributes:
        event_dims: by argument, the dimensions that one element takes.
        read: turns them into the family's own arguments.
        write: the inverse, differentiable.
        normalize: what the distribution does to an argument before it keeps it.
    """

    event_dims: Mapping[str, int]
    read: Callable[[Params], dict[str, Tensor]] = _same
    write: Callable[[Params], dict[str, Tensor]] = _same
    normalize: Callable[[Tensor], Tensor] = torch.Tensor.clone


class Family(ABC):
    """An exponential family: its coordinates, its Fisher information and its steps.

    Attributes:
        name: for reports.
        arguments: by name, the dimensions that one element takes.
        coordinates: the same of :meth:`natural`.
        parametrizations: the arguments that users may give instead, the family's own first.
        discrete: samples may leave the statistics' covariance singular.
    """

    name: str
    arguments: Mapping[str, int]
    coordinates: Mapping[str, int]
    parametrizations: tuple[Parametrization, ...]
    discrete: bool = False

    @abstractmethod
    def make(self, q: Params) -> Distribution:
        """Return torch's distribution with these arguments, unvalidated."""

    def log_prob(self, q: Params, x: Tensor) -> Tensor:
        """Return the log-density of each unit, attached."""
        return self.make(q).log_prob(x)

    def given(self, fn: Distribution, names: Mapping[str, int]) -> dict[str, Tensor] | None:
        """Return the arguments of one parametrisation that a distribution was made with, None if it was not."""
        found = {name: vars(fn).get(name) for name in names}  # what is derived lazily is no argument
        return found if all(isinstance(value, Tensor) for value in found.values()) else None  # type: ignore[return-value]

    def read(self, fn: Distribution) -> dict[str, Tensor]:
        """Return a distribution's arguments in the family's own coordinates, attached."""
        return {name: getattr(fn, name) for name in self.arguments}

    @abstractmethod
    def direction(self, q: Params, grad: Params) -> dict[str, Tensor]:
        """Return the natural gradient, in a form that :meth:`move` takes, from a loss's gradient in the arguments."""

    @abstractmethod
    def move(self, q: Params, direction: Params, step: Tensor) -> dict[str, Tensor]:
        """Return the arguments after a step, NaN where the step leaves the domain; leading dimensions broadcast."""

    @abstractmethod
    def slope(self, q: Params, direction: Params, grad: Params) -> Tensor:
        r"""Return :math:`\nabla L^\top F^{-1} \nabla L` of each element: twice the KL of a short unit step."""

    def kl(self, new: Params, old: Params) -> Tensor:
        """Return KL(new || old) in nats of each element."""
        return kl_divergence(self.make(new), self.make(old))

    @abstractmethod
    def natural(self, q: Params) -> dict[str, Tensor]:
        """Return coordinates that are affine in the natural parameters, in which iterates may be averaged."""

    @abstractmethod
    def from_natural(self, eta: Params) -> dict[str, Tensor]:
        """Return the arguments that belong to :meth:`natural` coordinates."""

    @abstractmethod
    def statistics(self, x: Tensor, reference: Params) -> Tensor:
        """Return T(x) as ``[*batch, num_statistics]``, relative to reference arguments for the numbers' sake."""

    @abstractmethod
    def expectation(self, q: Params, reference: Params) -> Tensor:
        """Return E[T] under q, ``[*batch, num_statistics]``, differentiable in q."""


class AffineFamily(Family):
    """A family whose arguments are affine in its natural parameters."""

    @property
    def coordinates(self) -> Mapping[str, int]:  # type: ignore[override]
        """The arguments."""
        return self.arguments

    def move(self, q: Params, direction: Params, step: Tensor) -> dict[str, Tensor]:
        """Step in the arguments themselves."""
        moved = {name: value - lift(step, self.arguments[name]) * direction[name] for name, value in q.items()}
        inside = self.contains(moved)
        return {n: torch.where(lift(inside, self.arguments[n]), value, math.nan) for n, value in moved.items()}

    def contains(self, q: Params) -> Tensor:
        """Tell which elements are in the domain: all arguments positive, unless a family says otherwise."""
        return torch.stack([every(value > 0, self.arguments[name]) for name, value in q.items()]).all(0)

    def slope(self, q: Params, direction: Params, grad: Params) -> Tensor:
        """Add up gradient times natural gradient."""
        total: Any = 0.0
        for name, e in self.arguments.items():
            product = direction[name] * grad[name]
            total = total + (product.sum(tuple(range(-e, 0))) if e else product)
        return total

    def natural(self, q: Params) -> dict[str, Tensor]:
        """The arguments."""
        return dict(q)

    def from_natural(self, eta: Params) -> dict[str, Tensor]:
        """The arguments."""
        return dict(eta)


def lift(t: Tensor, dims: int) -> Tensor:
    """Give a tensor of elements ``dims`` more dimensions on the right."""
    return t.reshape(t.shape + (1,) * dims)


def every(flags: Tensor, dims: int) -> Tensor:
    """Tell which elements are True in all of their ``dims`` dimensions on the right."""
    return flags.flatten(-dims).all(-1) if dims else flags


def precise(t: Tensor) -> Tensor:
    """Return a tensor in float64; as it is on MPS, which has none."""
    return t if t.device.type == "mps" else t.to(torch.float64)


def triangle(m: Tensor) -> Tensor:
    """Return a symmetric matrix's lower triangle as a vector, ``[*batch, n (n + 1) / 2]``."""
    rows, columns = torch.tril_indices(m.shape[-1], m.shape[-1], device=m.device)
    return m[..., rows, columns]
