"""Sampling-importance-resampling: draws of a guide become draws of the posterior, as far as their weights allow."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_elbo_ext.diagnostics.sampling import PosteriorDraws
from pyro_elbo_ext.diagnostics.weights import effective_sample_size, good_k, psis

__all__ = ["MIN_EFFICIENCY", "Resampled", "check_scales", "resample", "systematic"]

MIN_EFFICIENCY = 0.05  # of a joint weight: below, each draw would appear twenty times on average


class Resampled(NamedTuple):
    """Draws that weigh the same, and the model's log-density at them as in :class:`PosteriorDraws`."""

    values: dict[str, Tensor]
    log_joint: Tensor


def resample(draws: PosteriorDraws) -> Resampled:
    r"""Draw every element of the common plates anew, by its own Pareto smoothed weights.

    Given no latent outside, elements are independent in the posterior as in the guide, so an element's draws may come
    from other runs of the guide than its neighbour's, and its weights vary as one element's do. Where there are latents
    outside every common plate, whole draws are drawn by their joint weight instead.

    References:
        Using the SIR algorithm to simulate posterior distributions (Rubin, 1988); Reinterpreting Importance-Weighted
        Autoencoders (Cremer, Morris, Duvenaud, 2017, arXiv:1704.02916).

    Args:
        draws: of the guide.

    Returns:
        As many draws, of which some repeat.

    Raises:
        ValueError: the weights are those of an annealed model, or a joint weight whose k-hat or effective sample size
            says that a few draws carry it.
    """
    check_scales(draws)
    log_weights, khat = psis(draws.log_weight)
    if draws.plates:
        _warn(draws.plates, khat)
    else:
        _check_joint(draws, float(khat))
    chosen = systematic(log_weights)
    values = {name: _take(draws, name, value, chosen) for name, value in draws.values.items()}
    return Resampled(values, draws.log_joint.expand_as(chosen).gather(0, chosen))


def systematic(log_weights: Tensor) -> Tensor:
    """Draw as many indices as there are weights, with one random number for each element, in random order.

    Every index is drawn in proportion to its weight, rounded up or down (Carpenter, Clifford, Fearnhead, 1999).

    Args:
        log_weights: ``[num_samples, *rest]``.

    Returns:
        Indices into the first dimension, of the same shape.
    """
    num = log_weights.shape[0]
    columns = log_weights.double().reshape(num, -1).T
    cumulative = (columns - columns.amax(-1, keepdim=True)).exp().cumsum(-1)
    start = torch.rand(len(columns), 1, dtype=torch.float64, device=columns.device)
    places = (torch.arange(num, dtype=torch.float64, device=columns.device) + start) / num * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative.contiguous(), places.contiguous(), right=True).clamp(max=num - 1)
    order = torch.rand(chosen.shape, device=columns.device).argsort(-1)
    return chosen.gather(-1, order).T.reshape(log_weights.shape)


def _take(draws: PosteriorDraws, name: str, value: Tensor, chosen: Tensor) -> Tensor:
    """Take the chosen draws of a site; one outside the common plates depends on no draw, and stays."""
    own = draws.site_plates[name]
    if not set(draws.plates) <= set(own):
        return value
    sizes = [value.shape[1 + i] if plate in draws.plates else 1 for i, plate in enumerate(own)]
    index = chosen.reshape(len(value), *sizes, *(1,) * (value.dim() - 1 - len(own)))
    return value.gather(0, index.expand_as(value))


def check_scales(draws: PosteriorDraws) -> None:
    """Refuse weights of an annealed model.

    Raises:
        ValueError: the user's scales differ between sites.
    """
    if draws.annealed:
        raise ValueError(
            "the user's scales differ between sites, as in KL annealing, so these weights are those of another "
            "posterior. Export with the scales that the posterior is meant to have, all equal."
        )


def _check_joint(draws: PosteriorDraws, khat: float) -> None:
    limit, num = good_k(draws.num_samples), draws.num_samples
    ess = float(effective_sample_size(draws.log_weight))
    if khat <= limit and ess >= MIN_EFFICIENCY * num:
        return
    raise ValueError(
        f"the joint weights of {num} draws have k-hat {khat:.2f} (usable up to {limit:.2f}) and an effective sample "
        f"size of {ess:.1f}: a few draws would stand for all, as happens where many latents share one weight. Latents "
        f"are {', '.join(draws.values)}, and no plate holds all of them. Use correct=None, raise num_samples, or fit a "
        "guide nearer to the posterior (AutoPlatedFlow, or locals that depend on the globals)."
    )


def _warn(plates: tuple[str, ...], khat: Tensor) -> None:
    bad = int((khat > 0.7).sum())
    if bad:
        warnings.warn(
            f"{bad} of {khat.numel()} elements of plate {', '.join(map(repr, plates))} have weights of k-hat > 0.7 "
            f"(largest {float(khat.max()):.2f}): their resampled draws still are far from the posterior. Raise "
            "num_samples, or fit a guide nearer to the posterior.",
            stacklevel=3,
        )
