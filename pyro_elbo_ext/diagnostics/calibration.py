r"""Simulation-based calibration: is the fitted posterior right on average over data that the model makes?

If :math:`\theta^* \sim p(\theta)` and :math:`y \sim p(y | \theta^*)`, then the rank of :math:`\theta^*` among draws of
the exact posterior given y is uniform. Too many ranks at both ends: the guide is too narrow. In the middle: too wide. A
slope: it is shifted. A guide of the wrong shape but unshifted has ranks that are symmetric about their middle though
not uniform.

References:
    Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts, Betancourt, Simpson, Vehtari,
    Gelman, 2018, arXiv:1804.06788); Yes, but Did It Work?: Evaluating Variational Inference (Yao, Vehtari, Simpson,
    Gelman, 2018, arXiv:1802.02538), for the test of symmetry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_elbo_ext.diagnostics.sampling import posterior_draws, seeded
from pyro_elbo_ext.diagnostics.simulate import Simulation, condition_on, simulate

__all__ = ["Calibration", "calibrate", "symmetry_p_value", "uniformity_p_value"]

Fitted = Callable | Mapping[str, Tensor]


@dataclass(frozen=True)
class Calibration:
    """Ranks of the true values among posterior draws, and what they say.

    Attributes:
        ranks: by latent site, ``[num_simulations, components]``, from 0 to ``num_draws``.
        uniform: p-value of uniform ranks, ``[components]``: the posterior is right on average.
        symmetric: p-value of symmetric ranks, ``[components]``: it is not shifted.
        num_draws: posterior draws of each simulation.
    """

    ranks: dict[str, Tensor]
    uniform: dict[str, Tensor]
    symmetric: dict[str, Tensor]
    num_draws: int

    @property
    def p_value(self) -> float:
        """The smallest p-value of uniformity times their number (Bonferroni), at most 1."""
        every = torch.cat(list(self.uniform.values()))
        return min(1.0, float(every.min()) * every.numel())

    def describe(self, level: float = 0.01) -> dict[str, str]:
        """Say what is wrong with each component that is not uniform at this level, corrected for their number."""
        total = sum(p.numel() for p in self.uniform.values())
        found = {}
        for name, p_values in self.uniform.items():
            for i in (p_values * total < level).nonzero().flatten().tolist():
                key = name if p_values.numel() == 1 else f"{name}[{i}]"
                found[key] = self._what(self.ranks[name][:, i])
        return found

    def _what(self, ranks: Tensor) -> str:
        unit = (ranks.double() + 0.5) / (self.num_draws + 1) - 0.5
        num = unit.shape[0]
        shift = float(unit.mean()) * math.sqrt(12 * num)
        width = (float(unit.square().mean()) * 12 - 1) * math.sqrt(5 * num / 4)  # a uniform's square: sd 2 / sqrt 5
        if abs(shift) > 3 and abs(shift) > abs(width):
            return "draws too low" if shift > 0 else "draws too high"
        if abs(width) > 3:
            return "draws too narrow" if width > 0 else "draws too wide"
        return "draws of another shape"


@torch.no_grad()
def calibrate(
    model: Callable,
    refit: Callable[[dict[str, Tensor]], Fitted],
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_simulations: int = 100,
    num_draws: int = 99,
    seed: int | None = None,
) -> Calibration:
    """Fit many data sets drawn from the model, and rank the values behind each among the posterior's draws.

    Args:
        model: a Pyro model that data can be drawn from; the arguments give it their sizes.
        refit: fits given observations, by site, and returns a guide that is called with the model's arguments, or
            draws ``[num_draws, *plates, *event]`` by latent site. An encoder is not fitted anew:
            ``lambda data: lambda *_: guide(data["x"])``. Gradients are enabled while it runs.
        args: the model's positional arguments.
        kwargs: its keyword arguments.
        num_simulations: data sets.
        num_draws: posterior draws of each, best one less than a number with many divisors.
        seed: of the simulations and draws, and of what ``refit`` draws from torch's global state, which is given back.

    Raises:
        ValueError: a model that no data can be drawn from, or a latent that the fit returns no draws of.
    """
    if num_simulations < 10 or num_draws < 9:
        raise ValueError(
            "calibration needs num_simulations >= 10 and num_draws >= 9, got "
            f"{num_simulations} and {num_draws}: fewer ranks show nothing"
        )
    ranks: dict[str, list[Tensor]] = {}
    with seeded(seed):
        for _ in range(num_simulations):
            simulation = simulate(model, args, kwargs)
            for name, rank in _ranks(model, refit, args, kwargs, simulation, num_draws).items():
                ranks.setdefault(name, []).append(rank)
        stacked = {name: torch.stack(rows) for name, rows in ranks.items()}
        uniform = {name: uniformity_p_value(rows, num_draws) for name, rows in stacked.items()}
        symmetric = {name: symmetry_p_value(rows, num_draws) for name, rows in stacked.items()}
    return Calibration(stacked, uniform, symmetric, num_draws)


def _ranks(
    model: Callable,
    refit: Callable,
    args: tuple,
    kwargs: Mapping[str, Any] | None,
    simulation: Simulation,
    num_draws: int,
) -> dict[str, Tensor]:
    """Return each latent's ranks ``[components]``; ties are broken at random."""
    with torch.enable_grad():
        fitted = refit(simulation.observations)
    if isinstance(fitted, Mapping):
        values: Mapping[str, Tensor] = fitted
    else:
        pair = condition_on(model, simulation.observations), fitted
        values = posterior_draws(*pair, args, kwargs, num_draws, plates=()).values
    found = {}
    for name, truth in simulation.latents.items():
        if name not in values or values[name].shape[0] != num_draws:
            raise ValueError(
                f"the fit has no {num_draws} draws of latent site '{name}'; it has "
                f"{ {n: tuple(v.shape) for n, v in values.items()} }."
            )
        draws, flat = values[name].reshape(num_draws, -1), truth.reshape(-1)
        if draws.shape[1] != flat.shape[0]:
            raise ValueError(
                f"draws of latent site '{name}' have shape {tuple(values[name].shape)}, but the model draws it with "
                f"shape {tuple(truth.shape)}: expected [{num_draws}, *that]."
            )
        ties = (draws == flat).sum(0)
        found[name] = (draws < flat).sum(0) + (torch.rand_like(ties.double()) * (ties + 1)).floor().long()
    return found


def uniformity_p_value(ranks: Tensor, num_draws: int) -> Tensor:
    """Return the p-value of a chi-square test of uniform ranks.

    Args:
        ranks: ``[num_simulations, components]``, from 0 to ``num_draws``.
        num_draws: posterior draws of each simulation.

    Returns:
        ``[components]``.
    """
    num = ranks.shape[0]
    bins = max(2, min(num // 10, 20, num_draws + 1))
    edges = torch.linspace(0, num_draws + 1, bins + 1, device=ranks.device, dtype=torch.float64).round()
    share = edges.diff() / (num_draws + 1)
    which = torch.bucketize(ranks.double(), edges[1:-1], right=True)
    counts = torch.nn.functional.one_hot(which, bins).sum(0).double()
    statistic = ((counts - num * share).square() / (num * share)).sum(-1)
    return torch.special.gammaincc(torch.full_like(statistic, (bins - 1) / 2), statistic / 2)


def symmetry_p_value(ranks: Tensor, num_draws: int, num_flips: int = 999) -> Tensor:
    """Return the p-value of ranks that are symmetric about their middle.

    The statistic is the largest distance between the distribution functions of the ranks and of their mirror images;
    its distribution is that under random reflections, so the level is exact at any size.

    Args:
        ranks: ``[num_simulations, components]``, from 0 to ``num_draws``.
        num_draws: posterior draws of each simulation.
        num_flips: reflections of all ranks.

    Returns:
        ``[components]``.
    """
    centred = ranks.double() - num_draws / 2
    signs = torch.randint(0, 2, (num_flips, ranks.shape[0], 1), device=ranks.device).double() * 2 - 1
    observed = _asymmetry(centred.unsqueeze(0))[0]
    flipped = torch.cat([_asymmetry(centred * part) for part in signs.split(100)])
    return ((flipped >= observed - 1e-9).sum(0) + 1).double() / (num_flips + 1)


def _asymmetry(centred: Tensor) -> Tensor:
    """Return the largest distance between the distribution functions of values and of their negatives, along dim 1."""
    order = centred.abs().argsort(1, descending=True)
    signs = centred.sign().gather(1, order)  # from the ends inwards: by how many one side leads
    return signs.cumsum(1).abs().amax(1)
