r"""Rung one: the full-rank Gaussian nearest to the posterior, by natural-gradient steps with a line search.

A step of size r from :math:`N(\mu, \Sigma)`, with precision P, is

.. math:: P^+ = (1 - r) P - r\, E_q[\nabla^2 \log p],\qquad
    \mu^+ = \mu + r\, (P^+)^{-1} E_q[\nabla \log p],

in coordinates where q is standard normal. Both means come from gradients alone, by Stein's identity: noise is drawn as
orthogonal frames and their mirror images, which makes the estimate exact, with the fewest gradients, 2 D, where the
posterior is a Gaussian. From a narrow q the first steps are Newton's with differences for second derivatives, from a
wide one they see the posterior through a blur that hides the joint mode of a hierarchy.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_elbo_ext.autofit.frame import Frame

__all__ = ["Gaussian", "Start", "fit_gaussian", "gaussian_bound", "starts"]

SIZES = (1.0, 0.5, 0.25, 0.1, 0.03, 0.01, 0.003, 0.001)  # of steps that are tried
FLATTEN = 0.2  # a step multiplies a precision by this at the least
CHEAP = 50  # coordinates up to which fits from more starts cost next to nothing
WORST = -1e30  # stands for the log of a density of zero


class Start(NamedTuple):
    """Where a fit begins: location ``[D]``, one scale for all coordinates, and the frame's centring."""

    loc: Tensor
    scale: float
    centering: Tensor | None


class Gaussian(NamedTuple):
    """A fitted Gaussian.

    Attributes:
        loc: ``[D]``.
        triangle: Cholesky factor of its covariance ``[D, D]``.
        centering: of the frame.
        bound: ELBO in nats.
        num_steps: taken.
    """

    loc: Tensor
    triangle: Tensor
    centering: Tensor | None
    bound: float
    num_steps: int


def starts(frame: Frame, radius: float = 2.0) -> list[Start]:
    """Return where fits begin: wide and narrow at the first values, and wide at random ones, as Stan's are.

    Random starts come in pairs, mirror images of each other about the first values, so that symmetric modes are both
    found; two pairs where a fit is cheap. Where sites are non-centred automatically the wide start is made once more
    half-way to centred.
    """
    centering = frame.centering
    found = [Start(frame.start, scale, centering) for scale in (0.3, 0.01)]
    if centering is not None:
        found.append(Start(frame.start, 0.3, centering + 0.4))  # weights of one half
    for _ in range(2 if frame.size <= CHEAP else 1):
        away = radius * (2 * torch.rand_like(frame.start) - 1)
        found += [Start(frame.start + sign * away, 0.3, centering) for sign in (1, -1)]
    return found


def gaussian_bound(frame: Frame, loc: Tensor, triangle: Tensor, noise: Tensor) -> Tensor:
    """Return the ELBO's terms ``[S]`` at some noise; the entropy is exact."""
    with torch.no_grad():
        log_joint = frame.log_joint(loc + noise @ triangle.T).clamp(min=WORST)
    return log_joint + _entropy(triangle)


def _entropy(triangle: Tensor) -> Tensor:
    size = triangle.shape[-1]
    return torch.linalg.slogdet(triangle)[1] + 0.5 * size * (1 + math.log(2 * math.pi))


def fit_gaussian(frame: Frame, start: Start, max_steps: int = 100, polish: int = 20) -> Gaussian:
    """Fit a Gaussian by natural-gradient steps, each the best of several sizes, then steps of falling size.

    Args:
        frame: the coordinates.
        start: where to begin.
        max_steps: of the first phase, which ends earlier where three steps in a row gain next to nothing.
        polish: steps of the second, of sizes 1 / 2, 1 / 3, ..., which average the noise of estimates out.
    """
    frame.centering = start.centering
    loc, triangle = start.loc, start.scale * torch.eye(frame.size, dtype=start.loc.dtype, device=start.loc.device)
    idle = steps = 0
    for steps in range(1, max_steps + 1):  # noqa: B007
        loc, triangle, gain = _search(frame, loc, triangle)
        idle = idle + 1 if 0 <= gain < 0.02 + 0.002 * frame.size else 0
        if idle == 3:
            break
    noise = _mirrored(256, loc)
    first = Gaussian(loc, triangle, start.centering, float(gaussian_bound(frame, loc, triangle, noise).mean()), steps)
    for t in range(polish):
        slope, mean, finite = _moments(frame, loc, triangle)
        if finite < 1:
            break
        loc, triangle = _candidate(loc, triangle, slope, mean, 1 / (2 + t))
    bound = float(gaussian_bound(frame, loc, triangle, noise).mean())
    found = first if bound < first.bound else first._replace(loc=loc, triangle=triangle, bound=bound)
    return found._replace(triangle=_cholesky(found.triangle))


def _cholesky(factor: Tensor) -> Tensor:
    """Return the triangle of the same covariance as a square factor."""
    upper = torch.linalg.qr(factor.T)[1]
    return (upper * upper.diagonal().sign()[:, None]).T


def _mirrored(num: int, like: Tensor) -> Tensor:
    noise = torch.randn(num // 2, like.shape[-1], dtype=like.dtype, device=like.device)
    return torch.cat([noise, -noise])


def _moments(frame: Frame, loc: Tensor, triangle: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return the mean second derivative ``[D, D]`` and gradient ``[D]`` of log p in noise, and how many were finite.

    By frames of orthogonal directions of the length that normal noise has.
    """
    size = frame.size
    copies = max(1, round(32 / size))
    normal = torch.randn(2, copies, size, size, dtype=loc.dtype, device=loc.device)
    directions = torch.linalg.qr(normal[0])[0] * normal[1].norm(dim=-1, keepdim=True)
    noise = directions.reshape(-1, size)
    density, slopes = frame.slopes(loc + torch.cat([noise, -noise]) @ triangle.T)
    plus, minus = (slopes @ triangle).chunk(2)
    usable = torch.isfinite(density.view(2, -1)).all(0)[:, None]
    odd = torch.where(usable, plus - minus, 0.0) / (2 * noise.square().sum(-1, keepdim=True))
    second = odd.T @ noise / copies
    share = float(usable.float().mean())
    mean = torch.where(usable, plus + minus, 0.0).sum(0) / (2 * usable.sum().clamp(min=1))
    return (second + second.T) / 2, mean, share


def _candidate(loc: Tensor, triangle: Tensor, second: Tensor, mean: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """Return the Gaussian after a natural-gradient step."""
    curvature, axes = torch.linalg.eigh(-second)
    precision = ((1 - size) + size * curvature).clamp(min=FLATTEN)
    moved = axes @ (size * (axes.T @ mean) / precision)
    return loc + triangle @ moved, triangle @ (axes * precision.rsqrt())


def _search(frame: Frame, loc: Tensor, triangle: Tensor, num: int = 64) -> tuple[Tensor, Tensor, float]:
    """Take the step, of all sizes, with the best bound at common noise; halve the spread where none is better.

    Returns:
        Location, scale, and the gain in nats, negative where the spread was halved.
    """
    second, mean, share = _moments(frame, loc, triangle)
    if share < 0.5:
        return loc, triangle / 2, -1.0
    tried = [(loc, triangle)] + [_candidate(loc, triangle, second, mean, size) for size in SIZES]
    noise = _mirrored(num, loc)
    points = torch.cat([at + noise @ factor.T for at, factor in tried])
    with torch.no_grad():
        density = frame.log_joint(points).clamp(min=WORST).view(len(tried), num)
    bounds = density.mean(-1) + torch.stack([_entropy(factor) for _, factor in tried])
    best = int(bounds[1:].argmax()) + 1
    gain = float(bounds[best] - bounds[0])
    if gain > 0:
        return *tried[best], gain
    if float(bounds[0]) < WORST / num / 2 or float(bounds[best]) < float(bounds[0]) - frame.size - 10:
        return loc, triangle / 2, -1.0
    return loc, triangle, 0.0
