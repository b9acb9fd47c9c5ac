"""Reweighted wake-sleep: the guide learns from importance weights or from dreams, with no gradient through either."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_elbo_ext.bounds import IWAE
from pyro_elbo_ext.elbo.base import ParticleELBO
from pyro_elbo_ext.gradients.pathwise import DoublyReparameterized, Estimate, Weights, finite, replayed
from pyro_elbo_ext.gradients.refusals import check_not_enumerated, check_reparameterized
from pyro_elbo_ext.handlers import DetachLeaves
from pyro_elbo_ext.particles import Draw, ParticleSampler
from pyro_elbo_ext.sites import base_distribution, is_leaf
from pyro_elbo_ext.tracing import PARTICLE_PLATE, forked_rng, run_guide

__all__ = ["ReweightedWakeSleep_ELBO"]


class _WakePhi(DoublyReparameterized):
    r"""Wake-phi turned into a path derivative, :math:`v - v^2` in place of the score's v.

    The guide's own bound is constant, so that of the doubly reparameterised path weight only the slope is left, minus;
    a scale b inside the weights then multiplies it as it does the score.
    """

    name = "wake-phi dreg"

    def __init__(self, share: float) -> None:
        self.share = share

    def weights(self, bound: Any, log_w: Tensor) -> Weights:
        v = bound.path_weights(log_w)
        slope = v - bound.doubly_reparameterized_weights(log_w)
        return Weights(v, self.share * slope, None, torch.zeros_like(v))


class ReweightedWakeSleep_ELBO(ParticleELBO):
    r"""Reweighted wake-sleep, with one weight for every element of the common plates.

    Three gradients, with normalised weights v of K particles drawn from the guide:

    - wake-theta, to the model: :math:`\sum_k v_k \nabla_\theta \log p(x, z_k)`, that of the importance-weighted bound;
    - wake-phi, to the guide: :math:`\sum_k v_k \nabla_\phi \log q(z_k | x)`, towards the posterior in
      :math:`\mathrm{KL}(p \| q)`, with a bias of order 1/K;
    - sleep-phi, to the guide: :math:`E_{p(x, z)} \nabla_\phi \log q(z | x)`, on data dreamt by the model.

    The value is the importance-weighted bound; the guide's gradient is **not** that of the value, and there is no
    single function whose gradient all this is. The guide may be discrete, mixed or not reparameterised, and gets better
    with K, where score-function gradients of a tighter bound get noisier. Costs one run of the pair and one backward;
    ``wake_phi="dreg"`` scores guide and model once more, as the doubly reparameterised gradient does.

    Args:
        num_particles: K, at least 2.
        insomnia: share of wake-phi, the rest is sleep-phi; in [0, 1]. Below 1 the guide must take ``observations=``, a
            dict from site to value that replaces the data it conditions on, as in Pyro.
        num_sleep_particles: dreams a step, K by default.
        wake_phi: ``"score"``, or ``"dreg"`` for a reparameterised guide: the same mean, no variance where the guide is
            the posterior.
        plates: names of the plates with a weight for each element, or None to decide by the structure.
        vectorize_particles: run all particles at once.
        max_plate_nesting: plate dimensions of the pair.
        nonfinite: ``"raise"`` or ``"drop"``.
        retain_graph: passed to ``backward``.

    Raises:
        ValueError: fewer than two particles, ``insomnia`` outside [0, 1]; when run, a guide that cannot dream, one
            whose parameters act through a ``Delta`` site on a random value (``AutoStructured``, non-centred guides), or
            one that is not reparameterised under "dreg".

    References:
        Reweighted Wake-Sleep (Bornschein, Bengio, 2014, arXiv:1406.2751); Revisiting Reweighted Wake-Sleep for Models
        with Stochastic Control Flow (Le, Kosiorek, Siddharth, Teh, Wood, 2018, arXiv:1805.10469); Doubly
        Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker, Lawson, Gu, Maddison, 2018,
        arXiv:1810.04152).
    """

    def __init__(
        self,
        num_particles: int = 2,
        insomnia: float = 1.0,
        num_sleep_particles: int | None = None,
        wake_phi: str = "score",
        plates: Sequence[str] | None = None,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        nonfinite: str = "raise",
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(num_particles, plates, vectorize_particles, max_plate_nesting, nonfinite, retain_graph)
        if num_particles < 2:
            raise ValueError(
                f"wake-sleep weighs particles against each other and needs num_particles >= 2, got {num_particles}"
            )
        if not 0 <= insomnia <= 1:
            raise ValueError(f"insomnia must lie in [0, 1], got {insomnia}: 1 is wake-phi, 0 sleep-phi")
        if wake_phi not in ("score", "dreg"):
            raise ValueError(f'wake_phi must be "score" or "dreg", got {wake_phi!r}')
        if num_sleep_particles is not None and num_sleep_particles < 1:
            raise ValueError(f"num_sleep_particles must be a positive integer, got {num_sleep_particles}")
        self.insomnia = insomnia
        self.num_sleep_particles = num_particles if num_sleep_particles is None else num_sleep_particles
        self.wake_phi = wake_phi
        self.bound = IWAE()

    @property
    def _linear(self) -> bool:
        return False

    def _draw(self, sampler: ParticleSampler) -> list[Draw]:
        return sampler.draw() if self.wake_phi == "dreg" else sampler.draw(DetachLeaves())

    def _estimate(self, sampler: ParticleSampler, draws: Sequence[Draw]) -> Estimate:
        check_not_enumerated(draws)
        estimate = self._wake(sampler, draws)
        if not torch.is_grad_enabled():
            return estimate
        if draws[0].leaves:
            sampler.once("deltas", lambda: _check_deltas(sampler))
        if self.insomnia == 1:
            return estimate
        dreams = (1 - self.insomnia) * self._sleep(sampler)
        return estimate._replace(objective=estimate.objective + (dreams - dreams.detach()))

    def _wake(self, sampler: ParticleSampler, draws: Sequence[Draw]) -> Estimate:
        if self.wake_phi == "dreg" and torch.is_grad_enabled():
            check_reparameterized(draws, 'wake_phi="dreg"', 'wake_phi="score"')
            estimator = _WakePhi(self.insomnia)
            return replayed(sampler, draws, self.bound, estimator, lambda log_w: estimator.weights(self.bound, log_w))
        particles = sampler.evaluate(draws)
        log_w = particles.log_weight.detach()
        v = self.bound.path_weights(log_w) * particles.scale
        surrogate = (v * finite(particles.log_joint)).sum() + self.insomnia * (v * particles.log_guide).sum()
        surrogate = surrogate + particles.constant
        value = particles.total(self.bound(log_w)).detach()
        return Estimate(value + (surrogate - surrogate.detach()), particles)

    def _sleep(self, sampler: ParticleSampler) -> Tensor:
        """Return log q of what the model dreams, averaged over dreams, with N/B as on data."""
        _check_dreams(sampler.guide)
        size, dim = self.num_sleep_particles, -sampler.max_plate_nesting - 1
        total: Any = 0.0
        for _ in range(1 if sampler.vectorize else size):

            def wrapped(fn: Callable) -> Callable:
                return pyro.plate(PARTICLE_PLATE, size, dim=dim)(fn) if sampler.vectorize and size > 1 else fn

            with torch.no_grad():
                traces = run_guide(
                    wrapped(poutine.uncondition(sampler.model)), sampler.args, sampler.kwargs, sampler.indices
                )
            for name, site in traces.guide.nodes.items():
                if site["type"] == "sample" and isinstance(base_distribution(site["fn"]), pyro.distributions.Unit):
                    raise ValueError(
                        f"model site '{name}' is a pyro.factor, which cannot be dreamt. Write it as an observation, or "
                        "use insomnia=1."
                    )
            dream = {name: site for name, site in traces.guide.nodes.items() if site["type"] == "sample"}
            seen = {name: site["value"] for name, site in dream.items() if site["infer"].get("was_observed")}
            held = {name: site["value"] for name, site in dream.items() if name not in seen}
            kwargs = {**sampler.kwargs, "observations": seen}
            guide = run_guide(wrapped(sampler.guide), sampler.args, kwargs, held).guide
            for name, site in guide.nodes.items():
                if is_leaf(site):
                    if name not in held:
                        raise ValueError(
                            f"guide site '{name}' is not a latent site of the model, so the model cannot dream its "
                            "value. Use insomnia=1, or a guide that samples the model's own sites."
                        )
                    total = (
                        total + scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"]).sum()
                    )
        return total / size


def _check_deltas(sampler: ParticleSampler) -> None:
    """Refuse a guide whose parameters act on a latent through a ``Delta``, where they have no density to learn from."""
    with forked_rng():
        nodes = sampler.draw_given({}, DetachLeaves()).traces.guide.nodes
    for name, site in nodes.items():
        if site["type"] != "sample" or is_leaf(site) or site["is_observed"] or site_is_subsample(site):
            continue
        parts = (site["value"], getattr(base_distribution(site["fn"]), "log_density", None))
        attached = any(isinstance(part, Tensor) and part.requires_grad for part in parts)
        if attached and sampler.find_dependencies().log_prob["guide", name]:
            raise ValueError(
                f"guide site '{name}' is computed from a random value by parameters of the guide, as in a non-centred "
                "guide: they have no density at a given value, so wake-sleep cannot train them. Draw the site from a "
                "distribution with those parameters, or use IWAE_ELBO."
            )


def _check_dreams(guide: Callable) -> None:
    takes = inspect.signature(getattr(guide, "forward", guide)).parameters
    if "observations" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        raise ValueError(
            "insomnia < 1 calls the guide with observations={site: dreamt value}, an argument that this guide does not "
            "take. Add observations=None to it and condition on those values where they are given, or use insomnia=1."
        )
