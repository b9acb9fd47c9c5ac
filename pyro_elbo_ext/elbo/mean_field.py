r"""The ELBO as reconstruction less KL, with the KL in closed form wherever that is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import biject_to, kl_divergence

from pyro_elbo_ext.dependencies import completed
from pyro_elbo_ext.elbo.base import ParticleELBO
from pyro_elbo_ext.gradients.pathwise import Estimate
from pyro_elbo_ext.gradients.refusals import check_reparameterized
from pyro_elbo_ext.particles import Draw, ParticleSampler
from pyro_elbo_ext.plates import Layout
from pyro_elbo_ext.sites import Site

__all__ = ["BoundTerms", "MeanField_ELBO"]

_SUFFIX = "_unconstrained"  # the auxiliary site in which AutoNormal draws a constrained latent


class BoundTerms(NamedTuple):
    """The two terms of the ELBO, in nats, scaled for subsampling; their difference is the bound.

    Attributes:
        reconstruction: expected log-likelihood of the observed sites.
        kl: by latent site; a joint auxiliary site of a guide has an entry of its own.
        closed_form: latent sites whose KL was computed in closed form.
    """

    reconstruction: float
    kl: dict[str, float]
    closed_form: tuple[str, ...]

    @property
    def elbo(self) -> float:
        """Reconstruction less KL."""
        return self.reconstruction - sum(self.kl.values())


class MeanField_ELBO(ParticleELBO):
    r""":math:`E_q \log p(x|z) - \beta \sum_j \mathrm{KL}(q(z_j | \cdot) \| p(z_j | \cdot))`.

    A site's KL is taken in closed form where torch registers one and no model parent of the site descends from it in
    the guide, and by Monte Carlo elsewhere; both are right, the first has less variance far from the posterior.
    Dependency is found by running the pair on tensors that carry their provenance, not by the order of sites.
    ``AutoNormal``'s sites are reached through the auxiliary normal they are drawn from.

    Args:
        num_particles: K, averaged.
        beta: weight of the KL; the value is a bound at 1, an annealed objective below, below the bound above.
        free_bits: nats per plate element under which a site's KL, averaged over plates and particles, is not pushed:
            one number, or one per site. The value is then no longer the bound; :meth:`terms` reports the bound's terms.
        vectorize_particles: run all particles at once.
        max_plate_nesting: plate dimensions of the pair.
        retain_graph: passed to ``backward``.

    Raises:
        ValueError: ``beta`` or ``free_bits`` negative or not finite; when run, free bits of an unknown site, or with a
            guide that draws several sites jointly, whose KL has no parts.

    References:
        beta-VAE (Higgins et al., 2017); Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al.,
        2016, arXiv:1606.04934) for free bits.
    """

    def __init__(
        self,
        num_particles: int = 1,
        beta: float = 1.0,
        free_bits: float | Mapping[str, float] = 0.0,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(
            num_particles, None, vectorize_particles, max_plate_nesting, nonfinite="raise", retain_graph=retain_graph
        )
        given = free_bits.values() if isinstance(free_bits, Mapping) else [free_bits]
        for name, value in [("beta", beta), *(("free_bits", value) for value in given)]:
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        self.beta = beta
        self.free_bits = free_bits
        self._closed: dict[Any, frozenset[str]] = {}

    _can_drop = False

    @property
    def _linear(self) -> bool:
        return True

    def _estimate(self, sampler: ParticleSampler, draws: Sequence[Draw]) -> Estimate:
        check_reparameterized(draws, "pathwise")
        particles = sampler.evaluate(draws)
        closed = self._closed_forms(sampler, particles.layout, particles.runs[0])
        reconstruction, kl = _terms(particles.runs, closed)
        penalty: Any = 0.0
        for name, (value, count) in kl.items():
            floor = self._floor(name, set(kl), particles.runs[0])
            penalty = penalty + (torch.clamp(value / count, min=floor) * count if floor else value)
        objective = (reconstruction - self.beta * penalty) / self.num_particles
        return Estimate(objective, particles)

    def _floor(self, name: str, names: set[str], sites: Sequence[Site]) -> float:
        """Free nats of a site; refuses names that are not there and KLs that have no parts."""
        if not self.free_bits:
            return 0.0
        latents = {site.name for site in sites if site.origin == "model"}
        joint = sorted(names - latents)
        if joint:
            raise ValueError(
                f"free_bits needs a KL per site, but guide site '{joint[0]}' draws several at once. Use AutoNormal or "
                "a hand-written guide, or beta."
            )
        if not isinstance(self.free_bits, Mapping):
            return self.free_bits
        unknown = sorted(set(self.free_bits) - names)
        if unknown:
            raise ValueError(f"free_bits names site '{unknown[0]}', but the latent sites are {sorted(names)}")
        return self.free_bits.get(name, 0.0)

    @torch.no_grad()
    def terms(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> BoundTerms:
        """Estimate reconstruction and KL per site, in nats, without beta and free bits."""
        sampler = self._sampler(model, guide, args, kwargs)
        particles = sampler.evaluate(sampler.draw())
        closed = self._closed_forms(sampler, particles.layout, particles.runs[0])
        reconstruction, kl = _terms(particles.runs, closed)
        parts = {name: float(value) / self.num_particles for name, (value, _) in kl.items()}
        return BoundTerms(float(reconstruction) / self.num_particles, parts, tuple(sorted(closed)))

    def _closed_forms(self, sampler: ParticleSampler, layout: Layout, sites: Sequence[Site]) -> frozenset[str]:
        by_key = {site.key: site for site in sites}
        latents = [name for origin, name in by_key if origin == "model" and ("guide", name) in by_key]
        alike = frozenset(name for name in latents if _alike(name, by_key))  # looked at anew: scales and masks change
        kinds = tuple((site.key, type(site.node["fn"])) for site in sites)
        key = (sampler.model, sampler.guide, layout, alike, kinds)
        if key not in self._closed:
            if len(self._closed) > 100:  # models made anew for every call must not pile up
                self._closed.clear()
            found = completed(sampler.find_dependencies(), by_key, layout.leaves)
            self._closed[key] = frozenset(name for name in alike if _has_closed_form(name, by_key, found))
        return self._closed[key]


def _terms(runs: Sequence[Sequence[Site]], closed: frozenset[str]) -> tuple[Tensor, dict[str, tuple[Tensor, Any]]]:
    """Return the reconstruction and, by site, the KL and the number of elements, each summed over particles."""
    reconstruction: Any = 0.0
    kl: dict[str, tuple[Any, Any]] = {}
    for sites in runs:
        by_key = {site.key: site for site in sites}
        for site in sites:
            name = site.name
            if site.origin == "model" and ("guide", name) not in by_key:
                reconstruction = reconstruction + (site.log_prob * site.node["scale"]).sum()
                continue
            owner = name.removesuffix(_SUFFIX)
            if name != owner and ("model", owner) in by_key and ("model", name) not in by_key:
                name = owner  # the auxiliary site belongs to the latent it was drawn for
            value, count = kl.get(name, (0.0, 0.0))
            if name in closed:
                if site.origin == "model":
                    divergence = _divergence(name, by_key)
                    value = value + (divergence * site.node["scale"]).sum()
            else:
                value = value - site.sign * (site.log_prob * site.node["scale"]).sum()
            if site.origin == "model":
                count = count + (torch.ones_like(site.log_prob) * site.node["scale"]).sum()
            kl[name] = value, count
    return reconstruction, kl


def _divergence(name: str, by_key: Mapping[tuple[str, str], Site]) -> Tensor:
    """Return a latent's KL per element, on the space where the guide is a registered distribution."""
    divergence = kl_divergence(*_comparable(name, by_key))
    return scale_and_mask(divergence, 1.0, by_key["model", name].node["mask"])


def _comparable(name: str, by_key: Mapping[tuple[str, str], Site]) -> tuple[Any, Any]:
    """Return the guide's distribution of a latent and its prior, both on the space where the guide draws.

    A KL does not change under a bijection of both its arguments, so a transform that the two share is left out.
    """
    prior = by_key["model", name].node["fn"]
    leaf = _leaf(name, by_key).node["fn"]
    if ("guide", name + _SUFFIX) in by_key:
        return leaf, _without(prior, _parts(biject_to(_base(prior).support)))
    if isinstance(_base(leaf), torch.distributions.TransformedDistribution):
        parts = [part for transform in _base(leaf).transforms for part in _parts(transform)]
        return _without(leaf, parts), _without(prior, parts)
    return leaf, prior


def _leaf(name: str, by_key: Mapping[tuple[str, str], Site]) -> Site:
    """Return the random site that a latent is drawn from in the guide."""
    return by_key.get(("guide", name + _SUFFIX), by_key["guide", name])


def _base(fn: Any) -> Any:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def _parts(transform: Any) -> list[Any]:
    """Return the elementwise transforms that a transform is made of, without identities."""
    transform = getattr(transform, "base_transform", transform)
    if isinstance(transform, torch.distributions.ComposeTransform):
        return [part for inner in transform.parts for part in _parts(inner)]
    identity = isinstance(transform, torch.distributions.AffineTransform) and (transform.loc, transform.scale) == (0, 1)
    return [] if identity else [transform]


def _without(fn: Any, parts: list[Any]) -> Any:
    """Return a distribution with its transforms undone, if they are ``parts``."""
    base = _base(fn)
    own: list[Any] = []
    if isinstance(base, torch.distributions.TransformedDistribution):
        own = [part for transform in base.transforms for part in _parts(transform)]
        if own == parts:
            base = base.base_dist
    if own != parts or not all(part.bijective for part in parts):
        raise NotImplementedError
    event_dim = len(fn.event_shape) - len(base.event_shape)
    return dist.Independent(base, event_dim) if event_dim else base


def _alike(name: str, by_key: Mapping[tuple[str, str], Site]) -> bool:
    """Tell whether a latent's sites in model and guide have one scale and one mask."""
    keys = [("model", name), ("guide", name), ("guide", name + _SUFFIX)]
    nodes = [by_key[key].node for key in keys if key in by_key]
    if any(node["mask"] is not nodes[0]["mask"] for node in nodes):
        return False
    return not any(isinstance(node["scale"], Tensor) or node["scale"] != nodes[0]["scale"] for node in nodes)


def _has_closed_form(name: str, by_key: Mapping[tuple[str, str], Site], found: Any) -> bool:
    """Tell whether a latent's KL may be taken in closed form, its scales and masks being alike."""
    leaf = _leaf(name, by_key)
    try:
        divergence = kl_divergence(*_comparable(name, by_key))
    except NotImplementedError:
        return False
    if divergence.shape != leaf.log_prob.shape or leaf.log_prob.shape != by_key["model", name].log_prob.shape:
        return False
    if not leaf.is_leaf or (leaf.name != name and not _is_image(by_key["guide", name], leaf, by_key["model", name])):
        return False
    return not any(leaf.name in _ancestors(parent, found) for parent in found.parents["model", name])


def _is_image(delta: Site, leaf: Site, model: Site) -> bool:
    """Check that a ``Delta`` site is its leaf's value on the prior's support, with the Jacobian as its density."""
    transform = biject_to(model.node["fn"].support)
    value = transform(leaf.node["value"])
    jacobian = transform.log_abs_det_jacobian(leaf.node["value"], value)
    event = delta.node["fn"].event_dim - (value.dim() - jacobian.dim())
    jacobian = jacobian.sum(tuple(range(-event, 0))) if event > 0 else jacobian
    unmasked = delta.node["fn"].log_prob(delta.node["value"])
    same = value.shape == delta.node["value"].shape and jacobian.expand(unmasked.shape).allclose(-unmasked, atol=1e-4)
    return bool(same and torch.allclose(value, delta.node["value"]))


def _ancestors(leaf: str, found: Any) -> set[str]:
    """Return a leaf and all leaves that it descends from in the guide."""
    seen: set[str] = set()
    pending = [leaf]
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending.extend(found.parents["guide", name])
    return seen
