"""Importance-weighted bounds: one class = a bound x a gradient estimator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_elbo_ext.bounds import CIWAE, ELBO, IWAE, MIWAE, VRIWAE, Bound, FunctionBound
from pyro_elbo_ext.elbo.base import ParticleELBO
from pyro_elbo_ext.elbo.local import LocalSampler, local_attached, local_replayed
from pyro_elbo_ext.gradients.choice import ESTIMATORS, Choice, Gradient, choose, parse_gradient
from pyro_elbo_ext.gradients.pathwise import (
    DoublyReparameterized,
    Estimate,
    StickingTheLanding,
    Weights,
    attached,
    replayed,
)
from pyro_elbo_ext.gradients.refusals import check_not_enumerated, check_reparameterized, check_scored
from pyro_elbo_ext.gradients.score import Signal
from pyro_elbo_ext.particles import Draw, ParticleSampler

__all__ = [
    "CIWAE_ELBO",
    "Explanation",
    "IWAE_ELBO",
    "ImportanceWeighted_ELBO",
    "MIWAE_ELBO",
    "PIWAE_ELBO",
    "VRIWAE_ELBO",
]


class Explanation(NamedTuple):
    """What an ELBO does with a model/guide pair.

    Attributes:
        gradient: the estimator's name, and the signal's where the guide has sites that need one.
        reason: why ``gradient="auto"`` chose it, or that it was asked for.
        plates: plates over which the bound factorises; none means one joint weight.
        constants: sites that need no weight, for they depend on no random value.
        annealed: True where a scale of the user's differs by site, so that the value is no bound.
    """

    gradient: str
    reason: str
    plates: tuple[str, ...]
    constants: tuple[str, ...]
    annealed: bool


class ImportanceWeighted_ELBO(ParticleELBO):
    r"""Base of bounds that are a function of the log-weights of K particles.

    A subclass defines ``bound(self, log_w)``, one function from log-weights ``[num_particles, *plates]`` to a value in
    nats per plate element, and gets every estimator, minibatches, and any mix of plates. A
    :class:`~pyro_elbo_ext.bounds.Bound` as attribute does as well, and brings its closed forms.

    Args:
        num_particles: K.
        gradient: for reparameterised sites ``"pathwise"``, ``"stl"`` or ``"dreg"``; for the others ``"vimco"``,
            ``"ovis"`` or ``"score"``; for a guide with both ``"dreg+vimco"`` and the like. What is not named is chosen,
            and ``"auto"`` chooses everything: doubly reparameterised and VIMCO for two particles or more, the total
            derivative and the plain score for one, the total derivative for flows. An
            :class:`~pyro_elbo_ext.gradients.Estimator`, a :class:`~pyro_elbo_ext.gradients.Signal` or a pair of them
            does as well.
        plates: as in :class:`~pyro_elbo_ext.elbo.base.ParticleELBO`, like all that follow.
        vectorize_particles: run all particles at once.
        max_plate_nesting: plate dimensions of the pair.
        nonfinite: ``"raise"`` or ``"drop"``.
        retain_graph: passed to ``backward``.
    """

    bound: Callable[[Tensor], Tensor]

    def __init__(
        self,
        num_particles: int = 8,
        gradient: Gradient = "auto",
        plates: Sequence[str] | None = None,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        nonfinite: str = "raise",
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(num_particles, plates, vectorize_particles, max_plate_nesting, nonfinite, retain_graph)
        self._estimator, self._signal = parse_gradient(gradient)
        self._known_signals: set[Signal] = set()
        if not hasattr(self, "bound"):
            raise TypeError(f"{type(self).__name__} must define bound(self, log_w), a function of log-weights")
        self.gradient = gradient
        self._bound.check_num_particles(num_particles)

    @property
    def _guide_bound(self) -> Bound:
        """The bound that the guide's gradient follows."""
        return self._bound

    @property
    def _bound(self) -> Bound:
        return self.bound if isinstance(self.bound, Bound) else FunctionBound(self.bound)

    @property
    def _linear(self) -> bool:
        return self.num_particles == 1 or self._bound.linear

    @property
    def _several(self) -> bool:
        """True where the bound is over more than one particle."""
        return self.num_particles > 1

    def _choose(self, draws: Sequence[Draw]) -> Choice:
        nodes = {name: draws[0].traces.guide.nodes[name] for name in draws[0].leaves}
        automatic = self.gradient == "auto" and self._scores
        return choose(self._estimator, self._signal, automatic, self._several, nodes)

    @property
    def _scores(self) -> bool:
        """True where sites that are not reparameterised may be left to a signal."""
        return True

    def _check(self, draws: Sequence[Draw], choice: Choice) -> None:
        """Refuse a guide that the choice would train wrongly or not at all."""
        if choice.signal is None:
            name = choice.estimator.name
            way_out = f'gradient="{name}+vimco"' if self._several and self._scores else ""
            check_reparameterized(draws, name, way_out)
            return
        check_not_enumerated(draws)
        site = check_scored(draws)
        if choice.signal not in self._known_signals:  # a look at values, once
            choice.signal.check(self._guide_bound, self.num_particles, site)
            self._known_signals.add(choice.signal)
        if choice.mixed and isinstance(choice.estimator, StickingTheLanding) and not self._guide_bound.linear:
            raise ValueError(
                f'gradient="{choice.name}" has no proven rule for several particles of a guide with both kinds of '
                f'sites; use "dreg+{choice.signal.name}" or "pathwise+{choice.signal.name}".'
            )

    def _estimate(self, sampler: ParticleSampler, draws: Sequence[Draw]) -> Estimate:
        choice = self._choose(draws)
        self._check(draws, choice)
        bound, estimator, signal = self._bound, choice.estimator, self._bind(choice.signal)
        if not estimator.replays or not draws[0].leaves or not torch.is_grad_enabled():
            return attached(sampler, draws, bound, signal)
        return replayed(sampler, draws, bound, estimator, lambda log_w: estimator.weights(bound, log_w), signal)

    def _bind(self, signal: Signal | None) -> Callable[[Tensor], Tensor] | None:
        """The signal of the guide's bound, as a function of log-weights."""
        bound = self._guide_bound
        return None if signal is None else lambda log_w: signal(bound, log_w)

    @torch.no_grad()
    def explain(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Explanation:
        """Say what this ELBO does with a pair: estimator, plates, constants, annealing. Runs the pair once."""
        sampler = self._sampler(model, guide, args, kwargs)
        draws = sampler.draw()
        particles = sampler.evaluate(draws)
        choice = self._choose(draws)
        constants = tuple(name for _, name in sorted(particles.layout.constants))
        return Explanation(choice.name, choice.reason, particles.layout.plates, constants, bool(particles.annealed))


class IWAE_ELBO(ImportanceWeighted_ELBO):
    r""":math:`E \sum_i \log \frac{1}{K} \sum_k w_{ik}`, the importance-weighted bound.

    One weight per element i of the plates common to all random sites. Tighter than the ELBO, and tighter with every
    particle; right on minibatches. The default when the value matters.

    With global latents beside local ones no plate is common. ``local_particles=M`` with ``plates=`` then takes the log
    inside those plates only, over M local particles for each of K global ones, which are averaged: the locally
    enhanced bound, right on minibatches too.

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2015, arXiv:1509.00519); Variational Inference
        with Locally Enhanced Bounds for Hierarchical Models (Geffner, Domke, 2022, arXiv:2203.04432).

    Args:
        num_particles: K; the ELBO at 1.
        gradient: as in :class:`ImportanceWeighted_ELBO`.
        plates: plates to factorise over; with local particles name every plate around them, or what is outside stands
            inside their log, where the bound is looser.
        local_particles: M; needs ``plates``.
        global_bound: ``"elbo"`` averages the global particles; ``"iwae"`` takes a log-mean-exp over them too, for full
            batches and without "dreg".
        **kwargs: as in :class:`ImportanceWeighted_ELBO`.

    Raises:
        ValueError: ``local_particles`` without ``plates``; or, when run, plates that do not qualify.
    """

    bound = IWAE()

    def __init__(
        self,
        num_particles: int = 8,
        gradient: Gradient = "auto",
        plates: Sequence[str] | None = None,
        local_particles: int = 1,
        global_bound: str = "elbo",
        **kwargs: Any,
    ) -> None:
        if isinstance(local_particles, bool) or not isinstance(local_particles, int) or local_particles < 1:
            raise ValueError(f"local_particles must be a positive integer, got {local_particles!r}")
        if global_bound not in ("elbo", "iwae"):
            raise ValueError(f'global_bound must be "elbo" or "iwae", got {global_bound!r}')
        self.local_particles = local_particles
        self.global_bound: Bound = ELBO() if global_bound == "elbo" else IWAE()
        super().__init__(num_particles, gradient, plates, **kwargs)
        if local_particles > 1 and not self.plates:
            raise ValueError("local_particles > 1 needs plates=(...,): the plates inside which the log is taken")
        if local_particles == 1 and global_bound != "elbo":
            raise ValueError("global_bound needs local_particles > 1; num_particles alone is IWAE over all latents")
        if local_particles > 1 and self._signal is not None:
            raise ValueError(
                f'gradient="{self._signal.name}" has no proven rule for local_particles > 1; leave it at 1, or use '
                "ScoreFunction_ELBO."
            )
        if global_bound == "iwae" and isinstance(self._estimator, DoublyReparameterized):
            raise ValueError("gradient='dreg' has no proven weights for global_bound='iwae'; use 'pathwise' or 'stl'")

    @property
    def _zero_weight_is_fatal(self) -> bool:
        return super()._zero_weight_is_fatal if self.local_particles == 1 else False

    def _make_sampler(self, *args: Any, **kwargs: Any) -> ParticleSampler:
        if self.local_particles == 1:
            return super()._make_sampler(*args, **kwargs)
        kwargs["linear"] = self.num_particles == 1 or self.global_bound.linear
        kwargs["local_particles"] = self.local_particles
        return LocalSampler(*args, **kwargs)

    @property
    def _particle_dims(self) -> int:
        return super()._particle_dims if self.local_particles == 1 else 2 * int(self.vectorize_particles)

    @property
    def _several(self) -> bool:
        return self.num_particles * self.local_particles > 1

    @property
    def _scores(self) -> bool:
        return self.local_particles == 1

    def _choose(self, draws: Sequence[Draw]) -> Choice:
        if self.local_particles > 1 and self.gradient == "auto" and not self.global_bound.linear:
            reason = "a log over the global particles too: no doubly reparameterised weights"
            return Choice(ESTIMATORS["pathwise"], None, reason)
        return super()._choose(draws)

    def _estimate(self, sampler: ParticleSampler, draws: Sequence[Draw]) -> Estimate:
        if not isinstance(sampler, LocalSampler):
            return super()._estimate(sampler, draws)
        choice = self._choose(draws)
        self._check(draws, choice)
        estimator = choice.estimator
        if not estimator.replays or not torch.is_grad_enabled():
            return local_attached(sampler, draws, self.bound, self.global_bound)
        return local_replayed(sampler, draws, self.bound, self.global_bound, estimator)


class VRIWAE_ELBO(ImportanceWeighted_ELBO):
    r""":math:`E \sum_i \frac{1}{1-\alpha} \log \frac{1}{K} \sum_k w_{ik}^{1-\alpha}`: IWAE at 0, the ELBO at 1.

    Between the two it trades tightness for a guide gradient that keeps more of its signal.

    References:
        Alpha-divergence Variational Inference Meets Importance Weighted Auto-Encoders: Methodology and Asymptotics
        (Daudel, Benton, Shi, Doucet, 2022, arXiv:2210.06226).

    Args:
        alpha: in [0, 1].
        num_particles: K.
        **kwargs: as in :class:`ImportanceWeighted_ELBO`.

    Raises:
        ValueError: ``alpha`` outside [0, 1], where Renyi's value is no lower bound or below the ELBO.
    """

    def __init__(self, alpha: float, num_particles: int = 8, **kwargs: Any) -> None:
        self.bound = VRIWAE(alpha)
        super().__init__(num_particles, **kwargs)


class MIWAE_ELBO(ImportanceWeighted_ELBO):
    r"""The mean of M importance-weighted bounds over K/M particles each.

    Looser than IWAE on all K, with a higher signal-to-noise ratio of the guide's pathwise gradient.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018, arXiv:1802.04537).

    Args:
        num_particles: K, over all groups.
        num_groups: M, a divisor of K.
        **kwargs: as in :class:`ImportanceWeighted_ELBO`.
    """

    def __init__(self, num_particles: int = 8, num_groups: int = 2, **kwargs: Any) -> None:
        self.bound = MIWAE(num_groups)
        super().__init__(num_particles, **kwargs)


class CIWAE_ELBO(ImportanceWeighted_ELBO):
    r""":math:`\beta\,\mathrm{ELBO} + (1 - \beta)\,\mathrm{IWAE}` on the same particles.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018, arXiv:1802.04537).

    Args:
        beta: the ELBO's share, in [0, 1].
        num_particles: K.
        **kwargs: as in :class:`ImportanceWeighted_ELBO`.
    """

    def __init__(self, beta: float, num_particles: int = 8, **kwargs: Any) -> None:
        self.bound = CIWAE(beta)
        super().__init__(num_particles, **kwargs)


class PIWAE_ELBO(ImportanceWeighted_ELBO):
    r"""IWAE on all K particles for the model, the mean of M bounds on K/M particles for the guide.

    The value is the model's bound. There is no single function whose gradient this is: the model's parameters follow
    the tighter bound, the guide's the one with the better signal. What the log-joint depends on with the latent values
    held counts as the model.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018, arXiv:1802.04537).

    Args:
        num_particles: K, over all groups.
        num_groups: M, a divisor of K.
        **kwargs: as in :class:`ImportanceWeighted_ELBO`.
    """

    bound = IWAE()

    def __init__(self, num_particles: int = 8, num_groups: int = 2, **kwargs: Any) -> None:
        self._grouped = MIWAE(num_groups)
        self._grouped.check_num_particles(num_particles)
        super().__init__(num_particles, **kwargs)

    @property
    def _guide_bound(self) -> Bound:
        return self._grouped

    def _estimate(self, sampler: ParticleSampler, draws: Sequence[Draw]) -> Estimate:
        choice = self._choose(draws)
        self._check(draws, choice)
        estimator = choice.estimator
        if not draws[0].leaves or not torch.is_grad_enabled():
            return attached(sampler, draws, self._bound)

        def weights(log_w: Tensor) -> Weights:
            model = estimator.weights(self._bound, log_w)
            guide = estimator.weights(self._guide_bound, log_w)
            return Weights(model.model, guide.path, guide.score, guide.model)

        return replayed(sampler, draws, self._bound, estimator, weights, self._bind(choice.signal))
