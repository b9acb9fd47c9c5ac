r"""Taking back opening steps that overshot, and limiting those that follow.

A full natural-gradient step is exact where the model is conjugate. Elsewhere it may overshoot, again and again: the
curvature changes on the way, or a mean-field guide does not see that its coordinates pull at the same thing. A loss is
not what an optimiser is given, so gradients must tell. Let a step lead from :math:`\eta_0` to :math:`\eta_1`. At its
beginning the loss fell by :math:`-\nabla L(\eta_0)^\top (\eta_1 - \eta_0)` a whole step; at its end it rises by
:math:`\nabla L(\eta_1)^\top (\eta_1 - \eta_0)`, which is zero at lr = 1 on a conjugate model. Where the rise is the
larger by far, or twice in a row, part of the step is taken back, to where a slope that changes evenly is zero. The next
step may be as long as what was kept; longer ones again after some that went well.

This is for the opening only. A rare large gradient opposes the small ones before it and would be taken for an overshoot
for ever, so that a fit on minibatches settled in a wrong place. Afterwards steps only become shorter, when rises have
outgrown falls for long, and longer again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["Trail", "Verdict", "judge", "no_trail"]

SHORTEST_KEPT = 0.1  # part of a step that is kept when going back
SHORTEST_NEXT = 0.2  # part of a step that the next may be after going back
LATE_RECOVERY = 1.1  # after the opening, where nothing is taken back
LONG_STREAK = 6  # steps in a row that end in a growing rise, which noise alone does not bring about
PATIENCE = 10  # steps in which the rise over fall at which one step is enough to tell grows by one, from one
WELL = 0.25  # rise over fall of a step after which longer ones are allowed
RECOVERY = 1.6  # times as long: WELL and this together stay within the factor two at which a quadratic loss diverges
SMALLEST_FALL = 1e-9  # nats: what is smaller is rounding


class Trail(NamedTuple):
    """How the steps of a block have gone, by plate element.

    Attributes:
        natural: natural coordinates at the beginning of the last step.
        fall: nats by which the whole step would have lowered the loss had that gone on as at its beginning.
        step: its size; not what was kept of it.
        streak: how many steps in a row ended in a rise larger than their fall.
        limit: largest size of the next.
        clock: steps so far that were not taken back, for the schedule.
    """

    natural: dict[str, Tensor]
    fall: Tensor
    step: Tensor
    streak: Tensor
    limit: Tensor
    clock: Tensor


class Verdict(NamedTuple):
    """Which elements go back, to which part of their last step, and how the trail goes on."""

    retreated: Tensor
    kept: Tensor
    trail: Trail


def no_trail(natural: dict[str, Tensor], example: Tensor) -> Trail:
    """Return the trail of elements, shaped as an example, that took no step yet."""
    zero = torch.zeros_like(example)
    return Trail(natural, zero, zero, zero, torch.full_like(example, math.inf), zero)


def judge(trail: Trail, rise: Tensor, opening: bool | Tensor) -> Verdict:
    """Tell which elements overshot, from the rise of the loss at the end of their last step in nats."""
    if isinstance(opening, Tensor):
        both = judge(trail, rise, True), judge(trail, rise, False)
        return tree_map(lambda early, late: torch.where(opening, early, late), *both)
    judged = trail.fall > SMALLEST_FALL
    ratio = torch.where(judged, rise / trail.fall, 0.0)
    streak = torch.where(ratio > 1, trail.streak + 1, 0.0)
    kept = (1 / (1 + ratio)).clamp(min=SHORTEST_KEPT)
    well = judged & (ratio < WELL) & (trail.streak == 0)  # what was kept of a step says nothing of the whole
    recovery = RECOVERY if opening else LATE_RECOVERY
    limit = torch.where(well, torch.maximum(trail.limit, trail.step * recovery), trail.limit)
    if not opening:
        diverging = streak >= LONG_STREAK
        after = trail._replace(
            streak=torch.where(diverging, 0.0, streak), limit=torch.where(diverging, trail.step / 2, limit)
        )
        return Verdict(torch.zeros_like(diverging), kept, after)
    retreated = (ratio > 1 + trail.clock / PATIENCE) | (streak > 1)
    after = trail._replace(
        streak=streak,
        limit=torch.where(retreated, trail.step * kept.clamp(SHORTEST_NEXT, 0.5), limit),
        clock=torch.where(retreated, (trail.clock - streak.clamp(min=1.0)).clamp(min=0.0), trail.clock),
    )
    return Verdict(retreated, kept, after)
