"""The evidence between two stochastic bounds, from annealing forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_elbo_ext.bounds import log_mean_exp
from pyro_elbo_ext.diagnostics.annealing import anneal, find_schedule, refine
from pyro_elbo_ext.diagnostics.evidence import log_mean_exp_error
from pyro_elbo_ext.diagnostics.sampling import latent_values, make_sampler, seeded
from pyro_elbo_ext.diagnostics.simulate import condition_on, leaves_at, simulate
from pyro_elbo_ext.diagnostics.target import Target

__all__ = ["Bracket", "annealed_bracket", "simulated_bracket"]

_REFINEMENTS = 10  # transitions at the posterior itself, after annealing


@dataclass(frozen=True)
class Bracket:
    """Bounds on the log evidence in nats, each in expectation; scaled for subsampling.

    Attributes:
        lower: from annealing guide to posterior.
        lower_se: its standard error, propagated from the spread of the chains' weights.
        upper: from annealing posterior to guide; None without exact draws of the posterior.
        upper_se: its standard error; chains that share one exact draw do not show what that draw adds.
        acceptance: mean acceptance rate of the transitions.
        num_chains: chains in each direction.
        num_temperatures: steps of the path.
        ends: latents on the reals at the chains' ends, ``[num_chains, *plates, *event]`` by site, after ten more
            transitions at the posterior itself.
    """

    lower: float
    lower_se: float
    upper: float | None
    upper_se: float | None
    acceptance: float
    num_chains: int
    num_temperatures: int
    ends: dict[str, Tensor] = field(repr=False)


def annealed_bracket(
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_chains: int = 32,
    num_temperatures: int = 100,
    num_leapfrog: int = 5,
    reference: Mapping[str, Tensor] | None = None,
    plates: Sequence[str] | None = None,
    seed: int | None = None,
) -> Bracket:
    r"""Bound the log evidence of the given data from below, and from above where draws of the posterior are given.

    Costs about :math:`2 T (L + 1)` gradients of all chains at once, half of that again for the upper bound: T
    temperatures, L leapfrog steps. A flow without a fast inverse pays for its inverse each time. Elements of plates
    that all latents are inside are annealed apart. More temperatures narrow the bracket; its width is an error in nats
    that can be seen.

    Args:
        model: a Pyro model that can be vectorised.
        guide: its guide, with continuous random sites.
        args: their positional arguments.
        kwargs: their keyword arguments.
        num_chains: chains in each direction, at least two.
        num_temperatures: steps between guide and posterior.
        num_leapfrog: leapfrog steps of each transition.
        reference: draws of the posterior, ``[num_draws, *plates, *event]`` by latent site, of MCMC say; the upper bound
            is as good as they are.
        plates: names of the plates to keep apart, or None to decide by the structure.
        seed: of this alone; by default the global random state is used.

    Raises:
        ValueError: a discrete latent or one whose support is not fixed, fewer than two chains, a pair that does not
            match, or a reference that does not fit; site or plate is named.
    """
    if num_chains < 2 or num_temperatures < 2 or num_leapfrog < 1:
        raise ValueError(
            "annealing needs num_chains >= 2, num_temperatures >= 2 and num_leapfrog >= 1, got "
            f"{num_chains}, {num_temperatures} and {num_leapfrog}"
        )
    sampler = make_sampler(model, guide, args, kwargs, num_chains, plates)
    with seeded(seed), torch.no_grad():
        target = Target(sampler)
        if not target.start:
            raise ValueError("the guide has no random site, so there is nothing to anneal from.")
        start = None
        if reference is not None:
            start = leaves_at(target, guide, {n: _rows(value, num_chains) for n, value in reference.items()})
        schedule = find_schedule(target, num_temperatures, num_leapfrog)
        forward, end, acceptance = anneal(target, target.start, schedule)
        end = refine(target, end, schedule, _REFINEMENTS)
        backward = None if start is None else anneal(target, start, schedule, reverse=True)[0]
        ends = latent_values(target(end)[1], sampler, unconstrained=True)
    upper, upper_se = (None, None) if backward is None else _total(target, -backward, -1)
    lower, lower_se = _total(target, forward, 1)
    return Bracket(lower, lower_se, upper, upper_se, acceptance, num_chains, num_temperatures, ends)


def _rows(value: Tensor, num: int) -> Tensor:
    """Take as many rows as there are chains, evenly spaced, some more than once if there are too few."""
    picked = torch.linspace(0, value.shape[0] - 1, num, device=value.device).round().long()
    return value[picked] if value.shape[0] > 1 else value.expand(num, *value.shape[1:])


def _total(target: Target, log_w: Tensor, sign: int) -> tuple[float, float]:
    particles = target.particles
    total = float((log_mean_exp(log_w) * particles.scale).sum())
    error = log_mean_exp_error(log_w.unsqueeze(1), particles.scale)
    return sign * total + float(particles.constant), error


def simulated_bracket(
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    rebind: Callable[[dict[str, Tensor]], tuple[tuple, dict]] | None = None,
    seed: int | None = None,
    **settings: Any,
) -> Bracket:
    """Bound the log evidence of data drawn from the model, from both sides.

    The latents behind simulated data are an exact draw of their posterior, so both bounds hold. The width says how far
    annealing with these settings can be trusted on data like these, and with it the lower bound on the data at hand.

    Args:
        model: a Pyro model that data can be drawn from.
        guide: where the chains start; one fitted to other data is as valid, but starts from further away.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        rebind: returns arguments and keyword arguments for given observations, by site, where the guide reads the data
            from its arguments, as an encoder does. By default the arguments stay, and only the model's observed sites
            get the new data.
        seed: of this alone; by default the global random state is used.
        **settings: as of :func:`annealed_bracket`.

    Raises:
        ValueError: as :func:`annealed_bracket` and :func:`simulate` do, or a guide built as an effect handler.
    """
    if isinstance(poutine.unwrap(guide), poutine.guide.GuideMessenger):
        raise ValueError(
            f"{type(guide).__name__} runs its own model, so other data cannot be put into it. Use the AutoGuide of the "
            "same family."
        )
    with seeded(seed):
        latents, observations = simulate(model, args, kwargs)
        if rebind is not None:
            args, kwargs = rebind(observations)
        exact = {name: value.unsqueeze(0) for name, value in latents.items()}
        pair = condition_on(model, observations), guide
        return annealed_bracket(*pair, args, kwargs, reference=exact, **settings)
