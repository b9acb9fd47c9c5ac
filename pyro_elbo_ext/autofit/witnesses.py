r"""What speaks for or against a fit: the weights, their precision, chains that leave from it, and other restarts.

Each looks another way. k-hat and the precision of weighted moments see a guide that is too narrow where it draws.
Chains see mass beside the draws that no draw met. Restarts see modes, as far as one of them found one. None sees a mode
that no start leads to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_elbo_ext.autofit.frame import Frame, affine_flow
from pyro_elbo_ext.autofit.gaussian import Gaussian
from pyro_elbo_ext.autofit.proposal import CHUNK, Chains, Draws, Proposal, move
from pyro_elbo_ext.bounds import log_mean_exp
from pyro_elbo_ext.diagnostics.resampling import systematic

__all__ = ["Drift", "Precision", "drift", "evidence_error", "missed_mass", "precision"]


class Precision(NamedTuple):
    """Standard errors of weighted moments, in the posterior's own standard deviations, worst of all coordinates.

    Attributes:
        mean: of a mean.
        log_sd: of the logarithm of a standard deviation.
        site: where the worst is.
    """

    mean: float
    log_sd: float
    site: str


def precision(values: Mapping[str, Tensor], log_weights: Tensor) -> Precision:
    r"""Return how well weighted draws know the moments of every coordinate of every site.

    By the delta method: :math:`\sum_s w_s^2 (x_s - \bar x)^2` for a mean.

    Args:
        values: sites ``[S, *shape]``.
        log_weights: normalised, ``[S]``.
    """
    weights = log_weights.double().exp()[:, None]
    worst = Precision(0.0, 0.0, "")
    for name, value in values.items():
        x = value.double().reshape(len(value), -1)
        centred = x - (weights * x).sum(0)
        variance = (weights * centred.square()).sum(0)
        varies = variance > 1e-20 * x.square().mean(0)
        safe = torch.where(varies, variance, 1.0)
        mean = (weights * centred).square().sum(0) / safe
        log_sd = (weights * (centred.square() / safe - 1)).square().sum(0) / 4
        errors = [float(torch.where(varies, error, 0.0).amax().sqrt()) for error in (mean, log_sd)]
        if max(errors[0] / 2, errors[1] / 3) > max(worst.mean / 2, worst.log_sd / 3):
            worst = worst._replace(site=name)
        worst = worst._replace(mean=max(worst.mean, errors[0]), log_sd=max(worst.log_sd, errors[1]))
    return worst


class Drift(NamedTuple):
    """Where chains that start at the fitted posterior went.

    Attributes:
        z: largest change of a mean in standard errors, of all that is followed.
        num: means that are followed.
        shift: largest change of a coordinate's mean in standard deviations.
        accept: mean acceptance rate.
    """

    z: float
    num: int
    shift: float
    accept: float


@torch.no_grad()
def drift(
    proposal: Proposal,
    draws: Draws,
    log_weights: Tensor,
    num_chains: int,
    num_transitions: int = 15,
    num_leapfrog: int = 5,
) -> Drift:
    """Run chains from resampled draws, which do not move on average if those are the posterior's.

    Followed are coordinates, noise and its square, and the posterior's log-density, each averaged over chains.

    Args:
        proposal: what was fitted.
        draws: from it.
        log_weights: smoothed and normalised, ``[S]``.
        num_chains: chains.
        num_transitions: Hamiltonian transitions of each.
        num_leapfrog: leapfrog steps of a transition.
    """
    first = draws.noise[systematic(log_weights)[:num_chains]]
    chains = Chains.at(proposal, first)
    before = _followed(proposal, chains)
    step, accepted = 0.9 * first.shape[-1] ** -0.25, []
    for _ in range(num_transitions):
        chains, accept = move(proposal, chains, step, num_leapfrog)
        step *= math.exp(0.5 * (accept - 0.8))
        accepted.append(accept)
    change = _followed(proposal, chains) - before
    error = (change.var(0) / len(first)).sqrt()
    moved = torch.where(error > 0, change.mean(0) / error.clamp(min=1e-300), 0.0)
    size = first.shape[-1]
    shift = change[:, :size].mean(0).abs() / before[:, :size].std(0).clamp(min=1e-12)
    return Drift(float(moved.abs().max()), len(moved), float(shift.max()), sum(accepted) / len(accepted))


def _followed(proposal: Proposal, chains: Chains) -> Tensor:
    bounded = chains.noise.clamp(-10, 10)
    return torch.cat([proposal.push(chains.noise)[0], bounded, bounded.square(), chains.log_density[:, None]], -1)


def evidence_error(log_weight: Tensor) -> float:
    """Return the standard error of the log of the mean weight."""
    if not torch.isfinite(log_weight).any():
        return 0.0
    share = torch.softmax(log_weight.double(), 0)
    return float((share.square().sum() - 1 / len(share)).clamp(min=0).sqrt())


@torch.no_grad()
def missed_mass(
    best: Proposal, log_evidence: float, fits: Sequence[Gaussian], num_samples: int = 2000
) -> tuple[float, float]:
    r"""Return by how much draws of all restarts together exceed a fit's evidence, in nats, and the standard error.

    Their draws weigh :math:`p / \frac{1}{R} \sum_r q_r`, the balance heuristic, so that a mode that several of them
    found counts once. Restarts are pooled for each centring apart, in whose coordinates they are Gaussians, and the
    pool that finds most is returned.

    References:
        Safe and effective importance sampling (Owen, Zhou, 2000).

    Args:
        best: what was fitted.
        log_evidence: the log of its mean weight.
        fits: restarts.
        num_samples: draws of each.
    """
    pools: dict[tuple, list[Gaussian]] = {}
    for fit in fits:
        key = () if fit.centering is None else tuple(fit.centering.tolist())
        pools.setdefault(key, []).append(fit)
    found = [_pooled(best.frame, pool, num_samples) for pool in pools.values()]
    gain, error = max(found, key=lambda pair: pair[0] - 3 * pair[1])
    return gain - log_evidence, error


def _pooled(frame: Frame, fits: Sequence[Gaussian], num_samples: int) -> tuple[float, float]:
    flows = [affine_flow(fit.loc, fit.triangle) for fit in fits]
    size = torch.Size([num_samples])
    points = torch.cat([flow.push(flow.base.rsample(size))[0] for flow in flows])  # type: ignore[operator]
    log_q = []
    for flow in flows:
        noise, ladj = flow.pull(points)
        log_q.append(flow.base.log_prob(noise) + ladj)  # type: ignore[operator]
    frame.centering = fits[0].centering
    log_p = torch.cat([frame.log_joint(part) for part in points.split(CHUNK)])
    log_w = log_p - log_mean_exp(torch.stack(log_q))
    return float(log_mean_exp(log_w)), evidence_error(log_w)
