r"""Improved variational online Newton for mean-field weights.

With g the loss's gradient in the mean and a the whitened one in the precision, whose expectation is
:math:`\hat H / P - 1` for the loss's Hessian :math:`\hat H`,

.. math:: m_t = \beta m_{t-1} + (1 - \beta) g, \qquad P^+ = P (1 + \rho a + \tfrac12 \rho^2 a^2), \qquad
    \mu^+ = \mu - \mathrm{lr}\, \frac{m_t}{1 - \beta^t} / P^+

The precision's factor is never below a half, so one noisy gradient a step is enough; rho is small. Momentum is kept for
the mean alone.

References:
    Handling the Positive-Definite Constraint in the Bayesian Learning Rule (Lin, Schmidt, Khan, 2020,
    arXiv:2002.10060); Variational Learning is Effective for Large Deep Networks (Shen, Daheim, Cong, et al., 2024,
    arXiv:2402.17641), where rho is 1 - beta_2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_elbo_ext.families import NORMAL, Params
from pyro_elbo_ext.natural.blocks import Block, Move, Rate

__all__ = ["IVON", "Momentum", "ivon_step"]


class IVON(NamedTuple):
    """How the IVON mode steps.

    Attributes:
        precision_lr: rho, the step size of the precision.
        momentum: beta, of the mean's gradient.
        clip_radius: largest change of one mean in one step, in standard deviations; None for no limit.
    """

    precision_lr: float = 1e-3
    momentum: float = 0.9
    clip_radius: float | None = None


class Momentum(NamedTuple):
    """Running mean of the mean's gradient, and the weight that has gone into it, by unit."""

    mean: Tensor
    weight: Tensor


def ivon_step(
    block: Block, leaves: Params, grads: Params, rate: Rate, ivon: IVON, memory: Momentum | None, num_steps: Any
) -> tuple[dict[str, Tensor], Move, Momentum]:
    """Return the parameters of a block of normals after one step, what it did, and the new momentum."""
    q, grad, visited = block.gradient(leaves, grads)
    change = ivon.precision_lr * q["scale"] * grad["scale"]
    scale = q["scale"] * (1 + change + change.square() / 2).rsqrt()
    usable = visited & torch.isfinite(grad["loc"]) & torch.isfinite(scale)
    if memory is None:
        memory = Momentum(torch.zeros_like(grad["loc"]), torch.zeros_like(grad["loc"]))
    mean = torch.where(usable, torch.lerp(grad["loc"], memory.mean, ivon.momentum), memory.mean)
    weight = torch.where(usable, 1 - ivon.momentum * (1 - memory.weight), memory.weight)
    lr = rate(torch.as_tensor(num_steps, dtype=scale.dtype, device=scale.device))
    shift = lr * scale.square() * mean / weight.clamp(min=torch.finfo(mean.dtype).tiny)
    if ivon.clip_radius is not None:
        shift = torch.minimum(shift.abs(), ivon.clip_radius * scale) * shift.sign()
    moved = {"loc": torch.where(usable, q["loc"] - shift, q["loc"]), "scale": torch.where(usable, scale, q["scale"])}
    written = block.write_like(leaves, moved)
    usable = usable & torch.isfinite(written["loc"]) & torch.isfinite(written["scale"])
    new = {n: torch.where(usable, written[n], leaf) for n, leaf in leaves.items()}
    rejected = block.over_element((visited & ~usable).double()) > 0
    kl = block.over_element(torch.where(usable, NORMAL.kl(moved, q), 0.0))
    step = block.over_element(usable.double()) > 0
    never = torch.zeros_like(rejected)
    return new, Move(step * lr, kl, never, never, rejected), Momentum(mean, weight)
