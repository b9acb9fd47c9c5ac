"""The ELBO taken apart: expected log-likelihood of each observed site, KL of each latent one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import biject_to, kl_divergence

from pyro_elbo_ext.dependencies import Dependencies, completed, descendants
from pyro_elbo_ext.diagnostics.sampling import make_sampler, seeded
from pyro_elbo_ext.guides.structure import is_identity
from pyro_elbo_ext.particles import ParticleSampler
from pyro_elbo_ext.sites import Site

__all__ = ["BoundTerm", "ELBOTerms", "elbo_terms"]

_SUFFIX = "_unconstrained"  # the auxiliary site in which AutoNormal draws a constrained latent


class BoundTerm(NamedTuple):
    r"""A site's part of the ELBO, in nats, scaled for subsampling.

    Attributes:
        kind: ``"observed"``; ``"latent"``, with its KL; ``"prior"``, a latent that the guide draws jointly with others,
            with :math:`-E_q \log p`; or ``"joint"``, a guide site with no latent of its own, with its negative entropy.
        value: an expected log-likelihood, which adds to the ELBO; or a KL or a part of one, which is taken off.
        se: its standard error.
        exact: the KL in closed form, averaged over its parents; None where there is none.
    """

    kind: str
    value: float
    se: float
    exact: float | None = None

    @property
    def sign(self) -> int:
        """+1 where the value adds to the ELBO, -1 where it is taken off."""
        return 1 if self.kind == "observed" else -1


@dataclass(frozen=True)
class ELBOTerms:
    """The terms of the ELBO by site.

    Attributes:
        terms: by site.
        elbo: their signed sum, on the same draws, in nats.
        se: its standard error; terms share draws, so theirs do not add up to it.
        num_samples: draws behind all of them.
    """

    terms: dict[str, BoundTerm]
    elbo: float
    se: float
    num_samples: int

    @property
    def reconstruction(self) -> float:
        """Expected log-likelihood of all observed sites."""
        return sum(term.value for term in self.terms.values() if term.sign > 0)

    @property
    def kl(self) -> float:
        """KL of all latents."""
        return sum(term.value for term in self.terms.values() if term.sign < 0)


@torch.no_grad()
def elbo_terms(
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    *,
    chunk_size: int = 100,
    seed: int | None = None,
) -> ELBOTerms:
    r"""Estimate reconstruction and KL per site by Monte Carlo.

    The terms add up to the ELBO of the same draws. Where torch registers a KL for a site's two distributions and the
    prior does not depend, at any remove, on what the guide draws there, the closed form is given as well.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: their positional arguments.
        kwargs: their keyword arguments.
        num_samples: draws.
        chunk_size: draws made in one run.
        seed: of these draws alone; by default they use the global random state.

    Raises:
        ValueError: fewer than two draws, or a pair that does not match.
    """
    if num_samples < 2 or chunk_size < 1:
        raise ValueError(f"num_samples must be at least 2 and chunk_size positive, got {num_samples} and {chunk_size}")
    sampler = make_sampler(model, guide, args, kwargs, 1, linear=True)
    num_chunks = -(-num_samples // chunk_size)
    kinds: dict[str, str] = {}
    values: dict[str, list[Tensor]] = {}
    exact: dict[str, list[Tensor]] = {}
    found: Dependencies | None = None
    with seeded(seed):
        for i in range(num_chunks):
            sampler.num_particles = (num_samples + i) // num_chunks
            layout, (sites,) = sampler.score(sampler.draw())
            if found is None:
                found = completed(sampler.find_dependencies(), [site.key for site in sites], layout.leaves)
            for name, (kind, value) in _totals(sites, sampler).items():
                kinds[name] = kind
                values.setdefault(name, []).append(value)
            for name, value in _exact(sites, found, sampler).items():
                exact.setdefault(name, []).append(value)
    totals = {name: torch.cat(parts) for name, parts in values.items()}
    closed = {name: float(torch.cat(parts).mean()) for name, parts in exact.items()}
    terms = {n: BoundTerm(kinds[n], float(t.mean()), _error(t), closed.get(n)) for n, t in totals.items()}
    total: Any = sum(terms[name].sign * value for name, value in totals.items())
    return ELBOTerms(terms, float(total.mean()), _error(total), num_samples)


def _error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(values.shape[0])


def _totals(sites: Sequence[Site], sampler: ParticleSampler) -> dict[str, tuple[str, Tensor]]:
    """Return what each site adds or takes off, ``[particles]``, and its kind."""
    guide = {site.name for site in sites if site.origin == "guide"}
    latents = {site.name for site in sites if site.origin == "model" and not site.node["is_observed"]}
    joint = {site.name for site in sites if site.is_leaf and _owner(site, latents) not in latents}
    own = {_owner(site, latents) for site in sites if site.is_leaf}
    found: dict[str, tuple[str, Tensor]] = {}
    for site in sites:
        name = _owner(site, latents)
        if site.origin == "model" and name not in guide:
            kind = "observed"
        elif name in latents:
            kind = "latent" if name in own or not joint else "prior"
        else:
            kind = "joint"
        value = _per_particle(site.log_prob * site.node["scale"], sampler)
        sign = site.sign if kind == "observed" else -site.sign
        found[name] = kind, sign * value + (found[name][1] if name in found else 0.0)
    return found


def _owner(site: Site, latents: set[str]) -> str:
    """Name the latent that a guide site is drawn for."""
    source = site.name.removesuffix(_SUFFIX)
    return source if site.name not in latents and source in latents else site.name


def _per_particle(value: Tensor, sampler: ParticleSampler) -> Tensor:
    value = value.reshape((1,) * (sampler.max_plate_nesting + 1 - value.dim()) + value.shape)
    return value.reshape(value.shape[0], -1).sum(1).expand(sampler.num_particles)


def _exact(sites: Sequence[Site], found: Dependencies, sampler: ParticleSampler) -> dict[str, Tensor]:
    """Return the KLs that have a closed form on the space where the guide draws, ``[particles]``."""
    leaves = {site.name: site for site in sites if site.is_leaf}
    closed = {}
    for site in sites:
        leaf = leaves.get(site.name)
        if leaf is None and site.name + _SUFFIX in leaves and is_identity(biject_to(site.node["fn"].support)):
            leaf = leaves[site.name + _SUFFIX]
        if site.origin != "model" or leaf is None or not _alike(site, leaf):
            continue
        if found.parents.get(site.key, frozenset()) & descendants({leaf.name}, found):
            continue
        try:
            divergence = kl_divergence(leaf.node["fn"], site.node["fn"])
        except NotImplementedError:
            continue
        if divergence.shape == site.log_prob.shape:
            closed[site.name] = _per_particle(divergence * site.node["scale"], sampler)
    return closed


def _alike(site: Site, leaf: Site) -> bool:
    """Tell whether both are unmasked and have one scale."""
    nodes = site.node, leaf.node
    plain = all(node["mask"] is None and not isinstance(node["scale"], Tensor) for node in nodes)
    return plain and site.node["scale"] == leaf.node["scale"]
