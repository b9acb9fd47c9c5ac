r"""The parameters of one variational site, and the natural-gradient step they take together.

A block reads its site's arguments from the unconstrained parameters, turns the gradient that an ELBO left there into
the gradient in the arguments, and takes the family's step. It does so for every element of the site's plates at once.
Writing :math:`\theta = w(q)` for the map from a family's arguments to the parameters, the gradient in the arguments is
:math:`(\partial w / \partial q)^\top g_\theta`, whatever the constraints; the path of q does not depend on them.

All is tensor code without a branch on a value, in float64: closed-form Fisher information cancels badly in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_elbo_ext.families import Family, Parametrization, Params, every, lift

__all__ = ["Block", "Gradient", "Move", "Start", "natural_step", "precise"]

NUM_STEPS = 10  # step sizes tried at once: the wanted one, its halves, and one that is always possible
OVERSHOT = 1.5  # a loss that rises at a step's end so many times as fast as it fell at its beginning
SHORTEST_KEPT = 0.1  # part of a step that is kept when going back
SAFE_KL = 0.1  # nats: a step this short in the Fisher metric stays inside the domain of every family here


class Move(NamedTuple):
    """What a step did, by plate element, all tensors.

    Attributes:
        step: the step size taken, 0 where none was.
        kl: KL(new || old) in nats.
        backtracks: times that the step was halved.
        retreated: True where part of the step before was taken back instead.
        rejected: True where no step was possible and the parameters stayed as they were.
    """

    step: Tensor
    kl: Tensor
    backtracks: Tensor
    retreated: Tensor
    rejected: Tensor


class Gradient(NamedTuple):
    """A block's arguments, the loss's gradient in them, and which units have one.

    Attributes:
        q: the family's arguments.
        grad: gradient of the loss in them, of a single element without the scale of its plates.
        visited: True for each unit whose gradient is not exactly zero.
    """

    q: dict[str, Tensor]
    grad: dict[str, Tensor]
    visited: Tensor


class Start(NamedTuple):
    """Where the last step of a block began.

    Attributes:
        natural: natural coordinates.
        fall: nats by which the whole step would have lowered the loss had that gone on falling as at its beginning,
            by plate element; 0 where there was no step.
    """

    natural: dict[str, Tensor]
    fall: Tensor


@dataclass(frozen=True)
class Block:
    """The parameters of one site.

    A *unit* is one distribution of the family, an *element* all units of one plate element: a normal site of ten
    dimensions has ten units and one element.

    Attributes:
        site: its name in the guide.
        family: its family.
        parametrization: the arguments that the parameters stand for.
        names: of the parameters, by argument.
        constraints: of the parameters, by argument.
        event_dim: dimensions of units that belong to one element.
        divisor: N/B of the site's plates, times the number of its values that share a unit.
        share: of the units, which part the minibatch had for which ``divisor`` was found.
    """

    site: str
    family: Family
    parametrization: Parametrization
    names: Mapping[str, str]
    constraints: Mapping[str, Any]
    event_dim: int
    divisor: float
    share: float

    def describe(self, leaves: Params) -> dict[str, Any]:
        """Return what must agree for a saved state to fit."""
        shapes = {name: list(leaves[argument].shape) for argument, name in self.names.items()}
        return {"family": self.family.name, "parameters": shapes}

    def read(self, leaves: Params) -> dict[str, Tensor]:
        """Return the family's arguments, from the unconstrained parameters by argument."""
        return self.parametrization.read(
            {name: transform_to(self.constraints[name])(precise(leaf)) for name, leaf in leaves.items()}
        )

    def write(self, q: Params) -> dict[str, Tensor]:
        """Return the unconstrained parameters, by argument."""
        given = self.parametrization.write(q)
        return {name: transform_to(self.constraints[name]).inv(value) for name, value in given.items()}

    def gradient(self, leaves: Params, grads: Params) -> Gradient:
        """Turn the gradient in the parameters into the gradient in the family's arguments."""
        q = {name: value.detach() for name, value in self.read(leaves).items()}
        with torch.enable_grad():
            attached = {name: value.requires_grad_() for name, value in q.items()}
            written = self.write(attached)
            outputs = [written[name] for name in grads]
            found = torch.autograd.grad(outputs, list(attached.values()), [precise(g) for g in grads.values()],
                                        allow_unused=True, materialize_grads=True)  # fmt: skip
        visited = torch.stack([self.units(name, grads[name] != 0).any(-1) for name in grads]).any(0)
        divisor: Any = self.divisor
        if self.share < 1:  # the minibatch may be of another size today
            divisor = divisor * (self.share * visited.numel() / visited.sum().clamp(min=1))
        q = {name: value.detach() for name, value in q.items()}
        return Gradient(q, {name: g / divisor for name, g in zip(q, found, strict=True)}, visited)

    def units(self, argument: str, t: Tensor) -> Tensor:
        """Flatten the dimensions of one unit's argument, ``[*units, size]``."""
        own = self.parametrization.event_dims[argument]
        return t.reshape(t.shape[: t.dim() - own] + (-1,))

    def over_element(self, t: Tensor) -> Tensor:
        """Sum over the units of each element."""
        return t.sum(tuple(range(-self.event_dim, 0))) if self.event_dim else t

    def to_units(self, t: Tensor) -> Tensor:
        """Give a tensor of elements the dimensions of units."""
        return lift(t, self.event_dim)

    def replace(self, leaves: Params, q: Params, wanted: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Write arguments into the parameters of the units that are wanted and stay finite; return which those are."""
        written = {name: value.to(leaves[name].dtype) for name, value in self.write(q).items()}
        for name, value in written.items():
            wanted = wanted & torch.isfinite(self.units(name, value)).all(-1)
        dims = self.parametrization.event_dims
        return {n: torch.where(lift(wanted, dims[n]), written[n], leaf) for n, leaf in leaves.items()}, wanted

    def rise(self, here: Params, grad: Params, start: Start) -> Tensor:
        """Return how fast the loss rises at the end of the last step, in the units of its fall at the beginning."""
        with torch.enable_grad():
            eta = {name: value.detach().requires_grad_() for name, value in here.items()}
            q = self.family.from_natural(eta)
            slopes = torch.autograd.grad([q[name] for name in grad], list(eta.values()), list(grad.values()))
        total: Any = 0.0
        for (name, value), slope in zip(here.items(), slopes, strict=True):
            product = slope * (value - start.natural[name])
            total = total + (product.flatten(-own).sum(-1) if (own := self.own(name)) else product)
        return self.over_element(total)

    def own(self, name: str) -> int:
        """Return the dimensions of one unit's argument or natural coordinate."""
        return {**self.family.arguments, **self.family.coordinates}[name]

    def between(self, first: Params, second: Params, part: Tensor) -> dict[str, Tensor]:
        """Return natural coordinates ``part`` of the way from the first to the second."""
        part = self.to_units(part)
        return {n: first[n] + lift(part, self.own(n)) * (second[n] - first[n]) for n in first}

    def where(self, flags: Tensor, first: Tensor, second: Tensor, name: str) -> Tensor:
        """Choose by element between two values of an argument or coordinate."""
        return torch.where(lift(self.to_units(flags), self.own(name)), first, second)

    def finite(self, q: Params) -> Tensor:
        """Tell which elements have finite arguments only."""
        flags = [every(torch.isfinite(value), self.own(name)) for name, value in q.items()]
        return self.over_element((~torch.stack(flags).all(0)).double()) == 0

    def pick(self, tried: Tensor, which: Tensor, name: str) -> Tensor:
        """Take the tried value of an argument with number ``which``, by element."""
        return tried.take_along_dim(lift(self.to_units(which), self.own(name)), 0)[0]


def precise(t: Tensor) -> Tensor:
    """Return a tensor in float64, detached; as it is on MPS, which has none."""
    return t.detach() if t.device.type == "mps" else t.detach().to(torch.float64)


def natural_step(
    block: Block, leaves: Params, grads: Params, lr: Tensor, max_kl: float | None, start: Start | None = None
) -> tuple[dict[str, Tensor], Move, Start]:
    """Return the parameters after one natural-gradient step, what it did, and where it began.

    The largest of a fixed number of step sizes is taken that keeps every element inside its family's domain and within
    ``max_kl`` nats of where it was; an element for which there is none stays as it was. An element that overshot in
    the step before goes back part of its way instead.

    Args:
        block: whose parameters they are.
        leaves: unconstrained parameters, by argument.
        grads: gradients of the loss in them.
        lr: the wanted step size, a scalar.
        max_kl: largest KL(new || old) of one element, in nats.
        start: of the step before, or None to go on from wherever it led.
    """
    q, grad, visited = block.gradient(leaves, grads)
    family, here = block.family, block.family.natural(q)
    direction = family.direction(q, grad)
    slope = block.over_element(family.slope(q, direction, grad))
    steps = _step_sizes(slope, lr, max_kl)
    tried = family.move(q, direction, block.to_units(steps))
    fall, retreated = steps * slope, torch.zeros_like(slope, dtype=torch.bool)
    if start is not None:
        ratio = block.rise(here, grad, start) / start.fall
        retreated = (start.fall > 0) & (ratio > OVERSHOT)
        kept = (1 / (1 + ratio)).clamp(min=SHORTEST_KEPT)  # where a loss whose slope grows evenly is lowest
        kept = 1 - (1 - kept) * _halves(slope)
        back = family.from_natural(block.between(start.natural, here, kept))
        tried = {name: block.where(retreated, back[name], value, name) for name, value in tried.items()}
        fall = torch.where(retreated, kept * start.fall, fall)
        here = {name: block.where(retreated, start.natural[name], value, name) for name, value in here.items()}
    kl = block.over_element(family.kl(tried, q))
    possible = block.finite(tried) & (torch.isfinite(kl) if max_kl is None else kl <= max_kl)
    first, rejected = possible.double().argmax(0, keepdim=True), ~possible.any(0)
    chosen = {name: block.pick(value, first, name) for name, value in tried.items()}
    chosen = {name: block.where(rejected, q[name], value, name) for name, value in chosen.items()}
    wanted = block.to_units(~rejected) & visited
    new, written = block.replace(leaves, chosen, wanted)
    rejected = rejected | (block.over_element((wanted & ~written).double()) > 0)

    def taken(t: Tensor) -> Tensor:
        return t.take_along_dim(first, 0)[0].masked_fill(rejected, 0.0)

    step = taken(steps).masked_fill(retreated, 0.0)
    return new, Move(step, taken(kl), first[0], retreated, rejected), Start(here, taken(fall))


def _halves(example: Tensor) -> Tensor:
    """Return 1, 1/2, 1/4, ... along a new first dimension."""
    powers = torch.arange(NUM_STEPS, dtype=example.dtype, device=example.device)
    return lift(0.5**powers, example.dim())


def _step_sizes(slope: Tensor, lr: Tensor, max_kl: float | None) -> Tensor:
    """Return the step sizes to try, ``[NUM_STEPS, *elements]``, falling.

    With half the slope as the KL of a unit step, to second order, the last is short enough for the radius whatever the
    family's third derivative does.
    """
    curvature = (slope / 2).clamp(min=torch.finfo(slope.dtype).tiny)
    start = lr.to(slope).expand_as(slope)
    if max_kl is not None:
        start = torch.minimum(start, 2 * (max_kl / curvature).sqrt())
    steps = start * _halves(slope)
    safe = ((SAFE_KL if max_kl is None else min(SAFE_KL, max_kl / 8)) / curvature).sqrt()
    return torch.cat([steps[:-1], torch.minimum(steps[-1:], safe[None])])
