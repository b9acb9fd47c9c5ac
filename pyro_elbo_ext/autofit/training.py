r"""Rung two: a flow that starts as the best Gaussian and bends, :math:`w = \mu + L\, T(\epsilon)`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_elbo_ext.autofit.frame import Frame
from pyro_elbo_ext.autofit.gaussian import Gaussian
from pyro_elbo_ext.autofit.proposal import Proposal
from pyro_elbo_ext.bounds import log_mean_exp
from pyro_elbo_ext.guides.flows import make_flow

__all__ = ["new_flow", "train_flow"]

LAST = 0.02  # share of Adam's first rate that is left at the end
TIGHTEN = 0.4  # share of the steps that climb the tighter bound
PARTICLES, GROUPS = 64, (4, 32)  # of the first steps, of the last ones
CLIP = 10.0  # largest norm of a gradient


def new_flow(frame: Frame, gaussian: Gaussian) -> Proposal:
    """Return an inverse autoregressive flow that still is a Gaussian, in whose coordinates it will bend."""
    width = max(64, min(2 * frame.size, 512))
    flow = make_flow("iaf", frame.size, hidden_features=(width,) if width > 64 else (64, 64), affine="tril")
    flow = flow.to(gaussian.loc.device, gaussian.loc.dtype)
    flow.affine.restart(gaussian.loc, gaussian.triangle)  # type: ignore[union-attr]
    return Proposal("flow", frame, flow.requires_grad_(False), gaussian.centering)


def train_flow(
    proposal: Proposal,
    rate: float,
    num_steps: int,
    on_step: Callable[[], bool] = lambda: True,
) -> Proposal:
    """Train a copy of a flow, and the frame's centring weights with it; the outer affine map stays.

    The first steps climb the ELBO. The last ones climb the importance-weighted bound of groups of particles, whose
    optimum covers more of the tails, so that the weights have lighter ones.

    Args:
        proposal: a flow, trained already or not.
        rate: Adam's first learning rate; it falls along half a cosine.
        num_steps: number of steps.
        on_step: asked before each step; False ends the training.
    """
    frame, flow = proposal.frame, copy.deepcopy(proposal.flow).requires_grad_(True)
    flow.affine.requires_grad_(False)  # type: ignore[union-attr]
    frame.centering = proposal.centering
    learned: list[Tensor] = [p for p in flow.parameters() if p.requires_grad]
    if frame.num_centred:
        frame.guide.centering.requires_grad_(True)
        learned.append(frame.guide.centering)
    optim = torch.optim.Adam(learned, lr=rate, betas=(0.9, 0.99))
    for step in range(num_steps):
        if not on_step():
            break
        share = 0.5 * (1 + math.cos(math.pi * step / num_steps))
        optim.param_groups[0]["lr"] = rate * (LAST + (1 - LAST) * share)
        groups = (PARTICLES, 1) if step < (1 - TIGHTEN) * num_steps else GROUPS
        noise = flow.base.rsample(torch.Size([math.prod(groups)]))  # type: ignore[operator]
        points, ladj = flow.push(noise)
        log_w = frame.log_joint(points) - flow.base.log_prob(noise) + ladj  # type: ignore[operator]
        _ascend(optim, learned, log_w, groups[1])
    if frame.num_centred:
        frame.guide.centering.requires_grad_(False)
    return Proposal("flow", frame, flow.requires_grad_(False), frame.centering)


def _ascend(optim: torch.optim.Optimizer, learned: Sequence[Tensor], log_w: Tensor, group: int) -> None:
    """Step along the gradient of the bound of groups of particles; those without density are left out."""
    usable = torch.isfinite(log_w)
    if group == 1:
        objective = torch.where(usable, log_w, 0.0).sum() / usable.sum().clamp(min=1)
    else:
        worst = torch.where(usable, log_w, torch.inf).min().detach()
        objective = log_mean_exp(torch.where(usable, log_w, worst - 100).view(group, -1)).mean()
    slopes = torch.autograd.grad(-objective, learned, allow_unused=True, materialize_grads=True)
    for parameter, slope in zip(learned, slopes, strict=True):
        parameter.grad = slope.nan_to_num(0.0, 0.0, 0.0)
    torch.nn.utils.clip_grad_norm_(learned, CLIP)
    optim.step()
