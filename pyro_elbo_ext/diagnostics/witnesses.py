r"""What speaks for or against a guide beside the tail of its weights.

A guide that never draws where the posterior has mass has weights that look fine: k-hat below 0.7 has been seen with
means wrong by more than a standard deviation. Each witness here looks another way:

- :func:`corrected`: do smoothed importance weights move means and standard deviations?
- :func:`score_balance`: :math:`E_q[\nabla \log p - \nabla \log q]` is zero if q is the posterior, by Stein's identity,
  and at the optimum of any guide that can be shifted. It sees a slope under the guide, however far away the mass,
  and by how much a guide is too narrow.
- :func:`drift`: do chains that anneal from guide to posterior end elsewhere than they began?
- :func:`against`: draws of the posterior from elsewhere.

None sees a mode that neither draws nor chains reach; restarts or a reference do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_elbo_ext.diagnostics.bracket import Bracket
from pyro_elbo_ext.diagnostics.sampling import PosteriorDraws, make_sampler, seeded
from pyro_elbo_ext.diagnostics.target import Target
from pyro_elbo_ext.diagnostics.weights import effective_sample_size, psis

__all__ = ["Effects", "against", "corrected", "drift", "score_balance"]


class Effects(NamedTuple):
    """How far each coordinate of each latent is from where a witness puts it; all ``[*plates, *event]`` by site.

    Attributes:
        shift: of the mean, in standard deviations.
        log_sd: log of the guide's standard deviation over the witness's.
        noise: standard error of both.
    """

    shift: dict[str, Tensor]
    log_sd: dict[str, Tensor]
    noise: dict[str, Tensor]

    @property
    def size(self) -> float:
        """The larger of shift and log ratio, as far as it stands out of the noise, of the worst site.

        One in twenty coordinates of a site may exceed it, none of a smaller site: a global latent is not lost among
        many local ones. How far noise reaches is taken for the largest of as many as count.
        """
        num = sum(min(value.numel(), 20) for value in self.shift.values())
        reach = float(torch.special.ndtri(torch.tensor(1 - 0.025 / num, dtype=torch.float64)))
        sizes = [(self._largest(name) - reach * self.noise[name]).flatten().clamp(min=0.0) for name in self.shift]
        return max(float(torch.quantile(size, 0.95, interpolation="higher")) for size in sizes)

    @property
    def worst(self) -> tuple[str, float, float, float]:
        """Name of the coordinate that stands out most, its shift, its ratio of standard deviations, and the noise."""
        above = {name: (self._largest(name) - 2 * self.noise[name]).flatten() for name in self.shift}
        name = max(above, key=lambda name: float(above[name].max()))
        flat = int(above[name].argmax())
        index = [int(i) for i in torch.unravel_index(torch.tensor(flat), self.shift[name].shape)]
        label = name + (f"{index}" if index else "")
        shift, log_sd, noise = (float(part[name].flatten()[flat]) for part in self)
        return label, shift, math.exp(log_sd), noise

    def _largest(self, name: str) -> Tensor:
        return torch.maximum(self.shift[name].abs(), self.log_sd[name].abs())


def corrected(draws: PosteriorDraws) -> Effects | None:
    """Compare the guide's moments with those of its draws under smoothed weights, on the reals; None without latents.

    To be believed as far as k-hat allows. Each element of the kept plates has weights of its own.

    Args:
        draws: of the guide.
    """
    log_w, _ = psis(draws.log_weight)
    noise = effective_sample_size(draws.log_weight).rsqrt()
    shift, log_sd, noises = {}, {}, {}
    for name, values in _numbers(draws).items():
        own = draws.site_plates[name]
        sizes = zip(own, values.shape[1 : 1 + len(own)], strict=True)
        shape = [size if plate in draws.plates else 1 for plate, size in sizes] + [1] * (values.dim() - 1 - len(own))
        weights = log_w.exp().reshape(-1, *shape)
        mean, sd = _moments(values, torch.full_like(weights, 1 / values.shape[0]))
        new_mean, new_sd = _moments(values, weights)
        shift[name], log_sd[name] = _compare(mean, sd, new_mean, new_sd)
        noises[name] = noise.reshape(shape).expand_as(mean)
    return Effects(shift, log_sd, noises) if shift else None


def _numbers(draws: PosteriorDraws) -> dict[str, Tensor]:
    """Return values on the reals, or as they are where discrete."""
    return {name: draws.unconstrained.get(name, value).double() for name, value in draws.values.items()}


def _moments(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    mean = (weights * values).sum(0)
    return mean, (weights * (values - mean).square()).sum(0).sqrt()


def _compare(mean: Tensor, sd: Tensor, other: Tensor, other_sd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shift in the other's standard deviations and the log ratio; zero where neither varies."""
    varies = (sd > 0) & (other_sd > 0)
    shift = torch.where(varies, (mean - other) / torch.where(varies, other_sd, 1.0), 0.0)
    return shift, torch.where(varies, torch.where(varies, sd / other_sd, 1.0).log(), 0.0)


def drift(draws: PosteriorDraws, bracket: Bracket) -> Effects | None:
    """Compare the guide's moments with those at the ends of annealed chains, on the reals; None without latents.

    Args:
        draws: of the guide.
        bracket: of an annealing run, with the minibatch of the draws.
    """
    return _between(draws.unconstrained, bracket.ends)


def against(draws: PosteriorDraws, reference: Mapping[str, Tensor]) -> Effects | None:
    """Compare the guide's moments with those of other draws of the posterior.

    Args:
        draws: of the guide.
        reference: ``[num_draws, *plates, *event]`` by latent site; sites that are missing are not compared.

    Raises:
        ValueError: draws of another shape; the site is named.
    """
    for name in reference:
        if name in draws.values and reference[name].shape[1:] != draws.values[name].shape[1:]:
            raise ValueError(
                f"the reference's draws of site '{name}' have shape {tuple(reference[name].shape)}; expected "
                f"[num_draws, *{list(draws.values[name].shape[1:])}]."
            )
    shared = [name for name in draws.values if name in reference]
    return _between({name: draws.values[name] for name in shared}, {name: reference[name] for name in shared})


def _between(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Effects | None:
    shift, log_sd, noises = {}, {}, {}
    for name, values in own.items():
        first, second = values.double(), other[name].double()
        sd, other_sd = first.std(0), second.std(0)
        shift[name], log_sd[name] = _compare(first.mean(0), sd, second.mean(0), other_sd)
        share = log_sd[name].clamp(max=10.0).exp().square() / first.shape[0] + 1 / second.shape[0]
        noises[name] = share.sqrt()
    return Effects(shift, log_sd, noises) if shift else None


@torch.no_grad()
def score_balance(
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 200,
    *,
    chunk_size: int = 100,
    seed: int | None = None,
) -> Effects:
    r"""Return where the posterior's slope under the guide puts each random coordinate of the guide, on the reals.

    With :math:`\sigma` the guide's standard deviation, :math:`c = -E_q[(u - \bar u)\, \partial \log p]` is
    :math:`\sigma^2 / \sigma_p^2` for a Gaussian posterior, whose sd given the other coordinates is :math:`\sigma_p`,
    and :math:`-\sigma E_q[\partial \log p] / \sqrt c` the distance of the guide's mean in units of that. They are 1
    and 0 if the guide is the posterior, and at the optimum of a Gaussian guide with independent coordinates: what that
    optimum lacks they do not see. The guide's own score is the control variate, so at the posterior there is no noise.

    Args:
        model: a Pyro model that can be vectorised.
        guide: its guide, with continuous random sites.
        args: their positional arguments.
        kwargs: their keyword arguments.
        num_samples: draws.
        chunk_size: draws made in one run.
        seed: of these draws alone; by default they use the global random state.

    Raises:
        ValueError: a discrete site or one whose support is not fixed; the site is named.
    """
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    with seeded(seed):
        for _ in range(max(1, num_samples // chunk_size)):
            target = Target(make_sampler(model, guide, args, kwargs, min(chunk_size, num_samples)))
            _, (of_guide, of_model) = target.slopes(target.start, 0.0, 1.0)
            for name, value in target.start.items():
                found.setdefault(name, []).append((of_model[name], of_guide[name], value))
    shift, log_sd, noise = {}, {}, {}
    for name, parts in found.items():
        slope, own, point = (torch.cat(part).double() for part in zip(*parts, strict=True))
        shift[name], log_sd[name], noise[name] = _newton(slope, own, point - point.mean(0))
    return Effects(shift, log_sd, noise)


def _newton(slope: Tensor, of_guide: Tensor, centred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the guide's distance from the top of the parabola that its draws see, log sd ratio, and their noise."""
    root = math.sqrt(slope.shape[0])
    pull = _less_noise(slope, of_guide)
    curve = _less_noise(-centred * slope, -centred * of_guide - 1)
    ratio = curve.mean(0).clamp(min=1e-6)  # below where the posterior is not concave: as narrow as can be
    unit = centred.std(0) / ratio.sqrt()
    errors = pull.std(0) * unit, 0.5 * curve.std(0) / ratio
    return -pull.mean(0) * unit, 0.5 * ratio.log(), torch.maximum(*errors) / root


def _less_noise(values: Tensor, control: Tensor) -> Tensor:
    """Take off what a control variate of mean zero explains."""
    centred = control - control.mean(0)
    share = (centred * values).sum(0) / centred.square().sum(0).clamp(min=1e-300)
    return values - share * control
