"""Draws of a guide with what they weigh, in chunks of vectorised particles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_elbo_ext.bounds import log_mean_exp
from pyro_elbo_ext.particles import Particles, ParticleSampler
from pyro_elbo_ext.plates import Layout, plate_nesting
from pyro_elbo_ext.sites import Site, vectorized_plates
from pyro_elbo_ext.tracing import forked_rng

__all__ = ["PosteriorDraws", "latent_values", "make_sampler", "posterior_draws", "seeded"]


@dataclass(frozen=True)
class PosteriorDraws:
    """S draws of a guide and what they weigh.

    Attributes:
        values: by latent site of the model, ``[num_samples, *plates, *event]`` with the site's own plates only.
        unconstrained: the same on the reals, by the bijection of the site's prior support, ``[num_samples, *plates,
            *unconstrained event]``; continuous sites only. Moments are better behaved there.
        site_plates: names of those plates, from left to right, by site.
        log_joint: model log-density, less the guide's Jacobians, ``[num_samples, *plates]`` with the kept plates only.
        log_guide: the guide's log-density, of the same shape.
        plates: names of the kept plates, from left to right: those that all random sites share, over which weights
            factorise. Empty where there are latents outside every plate.
        scale: what stands outside a bound: N/B of subsampled plates times the user's scale; broadcasts with
            ``[*plates]``.
        constant: scaled log-density in nats of sites that depend on no random value.
        annealed: the user's scales differ between sites and stand inside the weights, which then are those of another
            posterior.
        layout: which plates are kept, and which sites are constants.
        indices: rows of the minibatch, by subsampled plate; all draws share one.
    """

    values: dict[str, Tensor]
    unconstrained: dict[str, Tensor]
    site_plates: dict[str, tuple[str, ...]]
    log_joint: Tensor
    log_guide: Tensor
    plates: tuple[str, ...]
    scale: Tensor | float
    constant: float
    annealed: bool
    layout: Layout = field(repr=False)
    indices: dict[str, Tensor] = field(repr=False)

    @property
    def num_samples(self) -> int:
        """Number of draws S."""
        return self.log_joint.shape[0]

    @property
    def log_weight(self) -> Tensor:
        """Log-weights ``[num_samples, *plates]`` in nats, unscaled."""
        return self.log_joint - self.log_guide

    @property
    def joint_log_weight(self) -> Tensor:
        """Log-weights ``[num_samples]`` of whole draws, unscaled; of the minibatch where a plate is subsampled."""
        return self.log_weight.flatten(1).sum(1) if self.plates else self.log_weight

    def bound(self, value: Tensor) -> Tensor:
        """Return the sum over plates of a value per plate element ``[..., *plates]``, scaled, constants added."""
        total = (value * self.scale).flatten(value.dim() - len(self.plates)).sum(-1) if self.plates else value
        return (total if self.plates else total * self.scale) + self.constant

    @property
    def elbo(self) -> float:
        """The mean log-weight, summed over plates and scaled, in nats."""
        return float(self.bound(self.log_weight.mean(0)))

    @property
    def importance_weighted(self) -> float:
        """The bound with all draws in one log-mean-exp, in nats."""
        return float(self.bound(log_mean_exp(self.log_weight)))


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw from a random state of our own, and give back the one found; with None, draw from that."""
    if seed is None:
        yield
        return
    with forked_rng():
        torch.manual_seed(seed)
        yield


def make_sampler(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: Mapping[str, Any] | None,
    num_particles: int,
    plates: Sequence[str] | None = None,
    vectorize: bool = True,
    max_plate_nesting: int | None = None,
    linear: bool = False,
) -> ParticleSampler:
    """Return a sampler for a pair, its plate dimensions counted by one run if not given."""
    if isinstance(plates, str):
        raise ValueError(f"plates must be a sequence of names, got the string {plates!r}; write plates=({plates!r},)")
    kwargs = dict(kwargs or {})
    if max_plate_nesting is None:
        max_plate_nesting = plate_nesting(model, guide, args, kwargs)
    return ParticleSampler(
        model,
        guide,
        args,
        kwargs,
        num_particles=num_particles,
        vectorize=vectorize,
        max_plate_nesting=max_plate_nesting,
        plates=plates,
        linear=linear,
    )


@torch.no_grad()
def posterior_draws(
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    *,
    plates: Sequence[str] | None = None,
    chunk_size: int = 100,
    vectorize: bool = True,
    max_plate_nesting: int | None = None,
    seed: int | None = None,
) -> PosteriorDraws:
    """Draw from the guide and weigh each draw by model and guide.

    Which plates are kept is decided as for every bound of this package: those that all random sites are inside. All
    draws share one minibatch. Parameters are only read, or made where the pair makes them on its first run.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: their positional arguments.
        kwargs: their keyword arguments.
        num_samples: number of draws S.
        plates: names of the plates to keep, or None to decide by the structure.
        chunk_size: draws made in one run.
        vectorize: run a chunk at once, or its draws one by one, for pairs that cannot be vectorised.
        max_plate_nesting: dimensions that the pair's plates take; found by one run if not given.
        seed: of these draws alone, the global random state being left as it was. By default they use that state.

    Raises:
        ValueError: no latent site, a pair that does not match, or a subsampled plate that not all latents are inside,
            whose scale would stand inside the weights; site or plate is named.
    """
    if num_samples < 1 or chunk_size < 1:
        raise ValueError(f"num_samples and chunk_size must be positive, got {num_samples} and {chunk_size}")
    sampler = make_sampler(model, guide, args, kwargs, 1, plates, vectorize, max_plate_nesting)
    num_chunks = -(-num_samples // chunk_size)
    chunks: list[_Chunk] = []
    with seeded(seed):
        for i in range(num_chunks):
            sampler.num_particles = (num_samples + i) // num_chunks
            draws = sampler.draw()
            particles = sampler.evaluate(draws)
            _check_latents(particles.layout)
            if chunks and particles.layout != chunks[0].layout:
                raise ValueError(
                    "draws differ in their sites or plates: the model's structure changes with its random values, so "
                    "their weights have no common shape."
                )
            chunks.append(_reduce(particles, sampler, len(draws)))
    return _gather(chunks, dict(sampler.indices))


def _check_latents(layout: Layout) -> None:
    if not layout.leaves:
        raise ValueError(
            "the guide has no random site, so there are no weights to look at: its sites are Delta, or it has none. A "
            "point estimate, as of AutoDelta, has no posterior to diagnose; use a guide that draws its latents."
        )


class _Chunk(NamedTuple):
    """What is kept of a chunk of draws; its traces are not."""

    layout: Layout
    values: dict[str, Tensor]
    unconstrained: dict[str, Tensor]
    site_plates: dict[str, tuple[str, ...]]
    log_joint: Tensor
    log_guide: Tensor
    scale: Tensor | float
    constant: float
    annealed: bool


def _reduce(particles: Particles, sampler: ParticleSampler, num_runs: int) -> _Chunk:
    kept = sorted(particles.layout.dims)
    scale = particles.scale
    if isinstance(scale, Tensor) and scale.dim():
        scale = _kept(scale.unsqueeze(0), kept)[0]
    return _Chunk(
        layout=particles.layout,
        values=latent_values(particles, sampler, num_runs),
        unconstrained=latent_values(particles, sampler, num_runs, unconstrained=True),
        site_plates={name: _plates_of(site) for name, site in _latents(particles.runs[0]).items()},
        log_joint=_kept(particles.log_joint, kept),
        log_guide=_kept(particles.log_guide, kept),
        scale=scale,
        constant=float(particles.constant),
        annealed=bool(particles.annealed),
    )


def _gather(chunks: Sequence[_Chunk], indices: dict[str, Tensor]) -> PosteriorDraws:
    first = chunks[0]
    return PosteriorDraws(
        values={name: torch.cat([chunk.values[name] for chunk in chunks]) for name in first.values},
        unconstrained={
            name: torch.cat([chunk.unconstrained[name] for chunk in chunks]) for name in first.unconstrained
        },
        site_plates=first.site_plates,
        log_joint=torch.cat([chunk.log_joint for chunk in chunks]),
        log_guide=torch.cat([chunk.log_guide for chunk in chunks]),
        plates=first.layout.plates,
        scale=first.scale,
        constant=first.constant,
        annealed=first.annealed,
        layout=first.layout,
        indices=indices,
    )


def _kept(value: Tensor, dims: Sequence[int]) -> Tensor:
    """Leave out the dimensions of plates that were summed over, ``[n, *nesting] -> [n, *plates]``."""
    for dim in range(1 - value.dim(), 0):
        if dim not in dims:
            value = value.narrow(dim, 0, 1)
    return value.reshape(value.shape[:1] + tuple(value.shape[dim] for dim in dims))


def _latents(sites: Sequence[Site]) -> dict[str, Site]:
    """Return the guide's sites that are latent sites of the model."""
    names = {site.name for site in sites if site.origin == "model" and not site.node["is_observed"]}
    return {site.name: site for site in sites if site.origin == "guide" and site.name in names}


def _plates_of(site: Site) -> tuple[str, ...]:
    frames = vectorized_plates(site.node)
    return tuple(sorted(frames, key=lambda name: frames[name].dim))


def latent_values(
    particles: Particles, sampler: ParticleSampler, num_runs: int = 1, unconstrained: bool = False
) -> dict[str, Tensor]:
    """Return every latent's values, ``[particles, *plates, *event]``; continuous ones only where unconstrained."""
    size = sampler.num_particles // num_runs
    runs = []
    for sites in particles.runs:
        found = _latents(sites)
        supports = {site.name: site.node["fn"].support for site in sites if site.origin == "model" and unconstrained}
        if unconstrained:
            found = {name: site for name, site in found.items() if not supports[name].is_discrete}
        runs.append({n: _value(site, size, sampler.max_plate_nesting, supports.get(n)) for n, site in found.items()})
    return {name: torch.cat([values[name] for values in runs]) for name in runs[0]}


def _value(site: Site, size: int, nesting: int, support: Any = None) -> Tensor:
    """Return one run's values of a site; what was not drawn for each particle apart is repeated."""
    value, event_dim = site.node["value"].detach(), site.node["fn"].event_dim
    split = value.dim() - event_dim
    if support is not None:
        value = biject_to(support).inv(value)
    batch, event = (1,) * (nesting + 1 - split) + value.shape[:split], value.shape[split:]
    frames = {f.dim: f.size for f in vectorized_plates(site.node).values()}
    shape = [size, *(frames.get(dim, 1) for dim in range(-nesting, 0))]
    value = value.reshape(batch + event).expand(*shape, *event)
    return value.reshape(size, *(frames[dim] for dim in sorted(frames)), *event)
