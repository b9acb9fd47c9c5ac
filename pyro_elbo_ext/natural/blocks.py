r"""The parameters of one variational site, and the natural-gradient step they take together.

A block reads its site's arguments from the unconstrained parameters, turns the gradient that an ELBO left there into
the gradient in the arguments, and takes the family's step. It does so for every element of the site's plates at once.
Writing :math:`\theta = w(q)` for the map from a family's arguments to the parameters, the gradient in the arguments is
:math:`(\partial w / \partial q)^\top g_\theta`, whatever the constraints; the path of q does not depend on them.

All is tensor code without a branch on a value, in float64: closed-form Fisher information cancels badly in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_elbo_ext.families import Family, Parametrization, Params, every, lift, precise
from pyro_elbo_ext.natural.retreat import Trail, judge, no_trail

__all__ = ["Block", "Gradient", "Move", "Rate", "natural_step"]

TRIED = (1.0, 0.5, 0.25, 0.1, 0.02)  # parts of the wanted step that are tried at once, beside one always possible
SAFE_KL = 0.1  # nats: a step this short in the Fisher metric stays inside the domain of every family here


Rate = Callable[[Tensor], Tensor]


class Move(NamedTuple):
    """What a step did, by plate element, all tensors.

    Attributes:
        step: the step size taken, 0 where none was.
        kl: KL(new || old) in nats.
        backtracks: times that the step was shortened.
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
        counted: count the elements that a minibatch has by their gradient.
    """

    site: str
    family: Family
    parametrization: Parametrization
    names: Mapping[str, str]
    constraints: Mapping[str, Any]
    event_dim: int
    divisor: float
    share: float
    counted: bool

    def describe(self, leaves: Params) -> dict[str, Any]:
        """Return what must agree for a saved state to fit."""
        shapes = {name: list(leaves[argument].shape) for argument, name in self.names.items()}
        return {"family": self.family.name, "parameters": shapes}

    def like(self, other: Block) -> bool:
        """Tell whether the same parameters stand for the same family."""
        return self.family is other.family and self.names == other.names

    def read(self, leaves: Params) -> dict[str, Tensor]:
        """Return the family's arguments, from the unconstrained parameters by argument."""
        return self.parametrization.read(
            {name: transform_to(self.constraints[name])(precise(leaf.detach())) for name, leaf in leaves.items()}
        )

    def write(self, q: Params) -> dict[str, Tensor]:
        """Return the unconstrained parameters, by argument."""
        given = self.parametrization.write(q)
        return {name: _unconstrain(self.constraints[name], value) for name, value in given.items()}

    def gradient(self, leaves: Params, grads: Params) -> Gradient:
        """Turn the gradient in the parameters into the gradient in the family's arguments."""
        q = {name: value.detach() for name, value in self.read(leaves).items()}
        with torch.enable_grad():
            attached = {name: value.requires_grad_() for name, value in q.items()}
            written = self.write(attached)
            outputs = [written[name] for name in grads]
            found = torch.autograd.grad(outputs, list(attached.values()), [precise(g.detach()) for g in grads.values()],
                                        allow_unused=True, materialize_grads=True)  # fmt: skip
        visited = torch.stack([self.units(name, grads[name] != 0).any(-1) for name in grads]).any(0)
        divisor: Any = self.divisor
        if self.counted:  # the minibatch may be of another size today
            met = self.over_element(visited.double()) > 0
            divisor = divisor * (self.share * met.numel() / met.sum().clamp(min=1))
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

    def write_like(self, leaves: Params, q: Params) -> dict[str, Tensor]:
        """Return the unconstrained parameters in the parameters' own precision."""
        return {name: value.to(leaves[name].dtype) for name, value in self.write(q).items()}

    def replace(self, leaf: Tensor, tried: Tensor, which: Tensor, wanted: Tensor, name: str) -> Tensor:
        """Put the tried value with number ``which`` of each element into the units of a parameter that are wanted."""
        own = self.parametrization.event_dims[name]
        return torch.where(lift(wanted, own), tried.take_along_dim(lift(self.to_units(which), own), 0)[0], leaf)

    def rise(self, here: Params, grad: Params, start: Params) -> Tensor:
        """Return by how much a whole step like the last would raise the loss from here, by element, in nats."""
        with torch.enable_grad():
            eta = {name: value.detach().requires_grad_() for name, value in here.items()}
            q = self.family.from_natural(eta)
            slopes = torch.autograd.grad([q[name] for name in grad], list(eta.values()), list(grad.values()))
        total: Any = 0.0
        for (name, value), slope in zip(here.items(), slopes, strict=True):
            product = slope * (value - start[name])
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

    def finite(self, values: Params, own: Mapping[str, int]) -> Tensor:
        """Tell which elements have finite numbers only, each of ``own`` dimensions a unit."""
        flags = [every(torch.isfinite(value), own[name]) for name, value in values.items()]
        return self.over_element((~torch.stack(flags).all(0)).double()) == 0


def _unconstrain(constraint: Any, value: Tensor) -> Tensor:
    """Invert a constraint's transform; where torch's own inverse would raise, return NaN."""
    if not isinstance(constraint, type(constraints.positive_definite)):
        return transform_to(constraint).inv(value)
    factor, info = torch.linalg.cholesky_ex(value)
    factor = torch.where(lift(info == 0, 2), factor, math.nan)
    return transform_to(constraints.lower_cholesky).inv(factor)


def natural_step(
    block: Block,
    leaves: Params,
    grads: Params,
    rate: Rate,
    max_kl: float | None,
    trail: Trail | None = None,
    watched: bool = False,
    opening: bool | Tensor = False,
) -> tuple[dict[str, Tensor], Move, Trail]:
    """Return the parameters after one natural-gradient step, what it did, and how steps have gone.

    The largest of a fixed number of step sizes is taken that keeps every element inside its family's domain, and that
    of its parameters' constraints, and within ``max_kl`` nats of where it was; an element for which there is none stays
    as it was. In the opening an element that overshot in the step before goes back part of its way instead.

    Args:
        block: whose parameters they are.
        leaves: unconstrained parameters, by argument.
        grads: gradients of the loss in them.
        rate: the wanted step size, as a function of the number of steps that an element has taken.
        max_kl: largest KL(new || old) of one element, in nats.
        trail: of the steps before, None before the first.
        watched: look out for steps that overshot, and make later ones shorter.
        opening: take them back, too; a tensor where a graph is to hold for steps of both kinds.
    """
    q, grad, visited = block.gradient(leaves, grads)
    family, here = block.family, block.family.natural(q)
    direction = family.direction(q, grad)
    slope = block.over_element(family.slope(q, direction, grad))
    retreated, after = torch.zeros_like(slope, dtype=torch.bool), no_trail(here, slope)
    if trail is not None:
        after = trail
    if trail is not None and watched:
        retreated, kept, after = judge(trail, block.rise(here, grad, trail.natural), opening)
    steps = _step_sizes(slope, torch.minimum(rate(after.clock), after.limit), max_kl)
    tried, falls = family.move(q, direction, block.to_units(steps)), steps * slope
    if trail is not None and watched and (opening is not False):
        parts = 1 - (1 - kept) * _parts(slope)
        back = family.from_natural(block.between(trail.natural, here, parts))
        tried = {name: block.where(retreated, back[name], value, name) for name, value in tried.items()}
        falls = torch.where(retreated, parts * trail.fall, falls)
        steps = torch.where(retreated, trail.step, steps)
        here = {name: block.where(retreated, trail.natural[name], value, name) for name, value in here.items()}
    kl = block.over_element(family.kl(tried, q))
    written = block.write_like(leaves, tried)
    possible = block.finite(tried, family.arguments) & block.finite(written, block.parametrization.event_dims)
    possible = possible & (torch.isfinite(kl) if max_kl is None else kl <= max_kl)
    first, rejected = possible.double().argmax(0, keepdim=True), ~possible.any(0)
    wanted = block.to_units(~rejected) & visited
    new = {name: block.replace(leaf, written[name], first, wanted, name) for name, leaf in leaves.items()}

    def taken(t: Tensor) -> Tensor:
        return t.take_along_dim(first, 0)[0].masked_fill(rejected, 0.0)

    stays = retreated | rejected
    stays = stays | (block.over_element(visited.double()) == 0)  # a row outside the minibatch has no step behind it
    clock = torch.where(stays, after.clock, after.clock + 1)
    after = after._replace(natural=here, fall=taken(falls), step=taken(steps), clock=clock)
    return new, Move(after.step.masked_fill(retreated, 0.0), taken(kl), first[0], retreated, rejected), after


def _parts(example: Tensor) -> Tensor:
    """Return the parts of a step that are tried, along a new first dimension; the last stands for the smallest."""
    return torch.stack([torch.full_like(example, part) for part in (*TRIED, TRIED[-1] / 10)])


def _step_sizes(slope: Tensor, wanted: Tensor, max_kl: float | None) -> Tensor:
    """Return the step sizes to try, falling, along a new first dimension.

    With half the slope as the KL of a unit step, to second order, the last is short enough for the radius whatever the
    family's third derivative does.
    """
    curvature = (slope / 2).clamp(min=torch.finfo(slope.dtype).tiny)
    start = wanted.expand_as(slope)
    if max_kl is not None:
        start = torch.minimum(start, 2 * (max_kl / curvature).sqrt())
    steps = start * _parts(slope)
    safe = ((SAFE_KL if max_kl is None else min(SAFE_KL, max_kl / 8)) / curvature).sqrt()
    return torch.cat([steps[:-1], torch.minimum(steps[-1:], safe[None])])
