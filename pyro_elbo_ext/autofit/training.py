r"""Rung two: a flow that starts as the best Gaussian and bends, :math:`w = \mu + L\, T(\epsilon)`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_elbo_ext.autofit.frame import Frame
from pyro_elbo_ext.autofit.gaussian import Gaussian
from pyro_elbo_ext.autofit.proposal import Proposal
from pyro_elbo_ext.bounds import log_mean_exp
from pyro_elbo_ext.guides.flows import make_flow

__all__ = ["train_flow"]

RATE, LAST = 4e-3, 0.02  # Adam's first rate, and the share of it at the end
CLIP = 10.0  # largest norm of a gradient


def train_flow(
    frame: Frame,
    gaussian: Gaussian,
    *,
    kind: str = "iaf",
    rate: float = RATE,
    num_steps: int = 1000,
    num_particles: int = 64,
    tighten: float = 0.3,
    group: int = 8,
    on_step: Callable[[], bool] = lambda: True,
) -> Proposal:
    """Train an inverse autoregressive flow in the Gaussian's coordinates, and the frame's centring weights with it.

    Most steps climb the ELBO. The last ones climb the importance-weighted bound of small groups of particles, whose
    optimum covers more of the tails, so that the weights have lighter ones.

    Args:
        frame: the coordinates.
        gaussian: where the flow starts.
        kind: of the flow.
        rate: Adam's first learning rate; it falls along half a cosine.
        num_steps: number of steps.
        num_particles: of each step.
        tighten: share of the steps that climb the tighter bound.
        group: its number of particles.
        on_step: called before each step; False ends the training.
    """
    width = max(64, min(2 * frame.size, 512))
    flow = make_flow(kind, frame.size, hidden_features=(width,) if width > 64 else (64, 64), affine="tril")
    flow = flow.to(gaussian.loc.device, gaussian.loc.dtype)
    flow.affine.restart(gaussian.loc, gaussian.triangle)  # type: ignore[union-attr]
    flow.affine.requires_grad_(False)  # type: ignore[union-attr]
    frame.centering = gaussian.centering
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
        noise = flow.base.rsample(torch.Size([num_particles]))  # type: ignore[operator]
        points, ladj = flow.push(noise)
        log_w = frame.log_joint(points) - flow.base.log_prob(noise) + ladj  # type: ignore[operator]
        _ascend(optim, learned, log_w, group if step >= (1 - tighten) * num_steps else 1)
    if frame.num_centred:
        frame.guide.centering.requires_grad_(False)
    return Proposal(f"flow ({kind})", frame, flow.requires_grad_(False), frame.centering)


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
