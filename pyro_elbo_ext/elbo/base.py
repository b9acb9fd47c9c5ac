"""What every ELBO class of this package shares: one primitive, two derived methods, one check of values."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_elbo_ext.gradients.pathwise import Estimate
from pyro_elbo_ext.particles import Draw, Particles, ParticleSampler
from pyro_elbo_ext.plates import plate_nesting

__all__ = ["NonFiniteError", "ParticleELBO"]


class NonFiniteError(ValueError):
    """A loss or gradient that is not finite; nothing was updated."""


class ParticleELBO(ELBO):
    """Base of losses made from weighted particles, for ``pyro.infer.SVI(model, guide, optim, loss=...)``.

    A subclass defines :meth:`_estimate`. ``differentiable_loss`` is its negative, so ``elbo(model, guide)`` is an
    ``nn.Module`` with every class; ``loss`` and ``loss_and_grads`` derive from the same estimate. Values are negative
    bounds in nats, summed over plates and scaled for subsampling.

    Args:
        num_particles: number of particles K.
        plates: names of the plates over which the bound factorises, or None to decide by the structure.
        vectorize_particles: run the pair once with all particles along a dimension left of its plates, or K times.
        max_plate_nesting: dimensions that the pair's plates take; found by one extra run if not given.
        nonfinite: ``"raise"`` to refuse a log-weight that is NaN or +inf, ``"drop"`` to count such a particle as one
            of weight zero. A log-weight of -inf is a weight of zero in either case. Pyro's validation, on by default,
            comes first: a distribution whose parameters it finds NaN raises where it is made. Where the density
            jumps to zero no path gradient sees the jump; it is right where the density vanishes continuously.
        retain_graph: passed to ``backward``.

    Attributes:
        num_dropped: particles left out so far under ``nonfinite="drop"``.
    """

    _can_drop: bool = True  # takes nonfinite="drop"

    def __init__(
        self,
        num_particles: int = 1,
        plates: Sequence[str] | None = None,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        nonfinite: str = "raise",
        retain_graph: bool | None = None,
    ) -> None:
        if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 1:
            raise ValueError(f"num_particles must be a positive integer, got {num_particles!r}")
        if nonfinite not in ("raise", "drop"):
            raise ValueError(f'nonfinite must be "raise" or "drop", got {nonfinite!r}')
        if isinstance(plates, str):
            raise ValueError(
                f"plates must be a sequence of names, got the string {plates!r}; write plates=({plates!r},)"
            )
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            retain_graph=retain_graph,
        )
        self.max_plate_nesting = max_plate_nesting + self._particle_dims
        self.plates = None if plates is None else tuple(plates)
        self.nonfinite = nonfinite
        self.num_dropped = 0
        self._layouts: dict = {}
        self._passed: set = set()

    @abstractmethod
    def _estimate(self, sampler: ParticleSampler, draws: Sequence[Draw]) -> Estimate:
        """Return the objective at some draws, its gradient attached where gradients are enabled."""

    def _draw(self, sampler: ParticleSampler) -> list[Draw]:
        """Return the step's draws."""
        return sampler.draw()

    def _make_sampler(self, *args: Any, **kwargs: Any) -> ParticleSampler:
        return ParticleSampler(*args, **kwargs)

    @property
    def _linear(self) -> bool:
        """True where scales may stand inside the weights."""
        return self.num_particles == 1

    @property
    def _zero_weight_is_fatal(self) -> bool:
        return self._linear

    def _sampler(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> ParticleSampler:
        if self.max_plate_nesting == math.inf:
            self._guess_max_plate_nesting(model, guide, args, kwargs)
        return self._make_sampler(
            model,
            guide,
            args,
            kwargs,
            num_particles=self.num_particles,
            vectorize=self.vectorize_particles or self.num_particles == 1,
            max_plate_nesting=int(self.max_plate_nesting) - self._particle_dims,
            plates=self.plates,
            linear=self._linear,
            layouts=self._layouts,
            passed=self._passed,
        )

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[Any, Any]:
        """Return model and guide trace of one run, for Pyro tools that ask an ELBO for them."""
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)

    @property
    def _particle_dims(self) -> int:
        """Dimensions that the particles take, counted in ``max_plate_nesting`` as Pyro does."""
        return int(self.vectorize_particles and self.num_particles > 1)

    def _guess_max_plate_nesting(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> None:
        self.max_plate_nesting = plate_nesting(model, guide, args, kwargs) + self._particle_dims

    def _run(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[ParticleSampler, list, Estimate]:
        sampler = self._sampler(model, guide, args, kwargs)
        try:
            draws = self._draw(sampler)
            return sampler, draws, self._estimate(sampler, draws)
        except (ValueError, RuntimeError) as error:
            nesting = plate_nesting(model, guide, args, kwargs)
            if nesting <= sampler.max_plate_nesting:
                raise
            raise ValueError(
                f"the model and guide now have {nesting} nested plates, but this ELBO was first used with "
                f"{sampler.max_plate_nesting}, and its particles lie left of those. Use a new ELBO for another model, "
                f"or give this one max_plate_nesting={nesting}."
            ) from error

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss, a scalar tensor whose gradient is the estimator's. Its values are not checked."""
        return -self._run(model, guide, args, kwargs)[2].objective

    @torch.no_grad()
    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return the loss in nats.

        Raises:
            NonFiniteError: a log-weight is not finite; site and particle are named.
        """
        return -self._checked(model, guide, args, kwargs)[1]

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return the loss in nats and add its gradient to the parameters'.

        Raises:
            NonFiniteError: a log-weight is not finite; site and particle are named. Or a gradient is not; its parameter
                is named. No gradient was added.
        """
        with _Parameters() as met:
            estimate, value = self._checked(model, guide, args, kwargs)
        if estimate.objective.requires_grad:
            leaves = {name: value.unconstrained() for name, value in met.values.items()}
            leaves = {name: leaf for name, leaf in leaves.items() if leaf.is_leaf and leaf.requires_grad}
            _add_gradient(-estimate.objective, leaves, self.retain_graph)
        return -value

    def _checked(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple[Estimate, float]:
        """Estimate the objective, having left out or refused what is not finite, at the price of one host sync."""
        sampler, draws, estimate = self._run(model, guide, args, kwargs)
        log_w = estimate.particles.log_weight.detach()
        value, total = torch.stack([estimate.objective.detach(), log_w.sum()]).tolist()
        if not math.isfinite(total):
            bad = ~torch.isfinite(log_w)
            if bad.any():  # or the sum overflowed
                return self._without(bad, sampler, draws, estimate)
        if not math.isfinite(value):
            raise NonFiniteError(_describe_constant(estimate.particles))
        return estimate, value

    def _without(
        self, bad: Tensor, sampler: ParticleSampler, draws: list, estimate: Estimate
    ) -> tuple[Estimate, float]:
        """Estimate the objective anew without some particles, or say why they cannot be left out."""
        particles = estimate.particles
        log_w = particles.log_weight.detach()
        invalid = bad & (log_w != -math.inf)
        if self.nonfinite == "raise" and invalid.any():
            hint = self._can_drop and not self._zero_weight_is_fatal
            raise NonFiniteError(_describe(particles, invalid, droppable=hint))
        if self._zero_weight_is_fatal:  # an average of logs is -inf with any one of them
            raise NonFiniteError(_describe(particles, bad))
        if bad.all(0).any():
            raise NonFiniteError(_describe(particles, bad & bad.all(0), "of every particle "))
        self.num_dropped += int(invalid.sum())
        estimate = self._estimate(sampler, sampler.drop(draws, log_w, bad))
        value = float(estimate.objective.detach())
        if not math.isfinite(value):
            raise NonFiniteError(_describe(particles, bad))
        return estimate, value


class _Parameters(Messenger):
    """Collects the parameters met by name: ``poutine.trace(param_only=True)`` without its price at every other site."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Any] = {}

    def _process_message(self, msg: Any) -> None:
        pass

    def _postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "param":
            self.values[msg["name"]] = msg["value"]


def _add_gradient(loss: Tensor, leaves: Mapping[str, Tensor], retain_graph: bool | None) -> None:
    """Add a loss's gradient to the parameters', or leave theirs as it was where it is not finite.

    A derivative can be NaN where the value is not, as of a root or a norm at 0, and one step would pass it on.
    """
    before = [leaf.grad for leaf in leaves.values()]
    for leaf in leaves.values():
        leaf.grad = None
    try:
        loss.backward(retain_graph=retain_graph)
        _check_gradient({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}, loss)
    except BaseException:
        for leaf, grad in zip(leaves.values(), before, strict=True):
            leaf.grad = grad
        raise
    for leaf, grad in zip(leaves.values(), before, strict=True):
        if grad is not None:
            leaf.grad = grad if leaf.grad is None else grad.add_(leaf.grad)


def _check_gradient(grads: Mapping[str, Tensor], loss: Tensor) -> None:
    """Look at all gradients at the price of one host sync."""
    dense = {name: grad.coalesce().values() if grad.is_sparse else grad for name, grad in grads.items()}
    dense = {name: grad for name, grad in dense.items() if grad.numel()}
    # What clip_grad_norm_ calls. The infinity norm takes twenty times as long on a CPU.
    norms = torch._foreach_norm(list(dense.values())) if dense else ()
    sizes = [size if size.device == loss.device else size.to(loss.device) for size in norms]
    if not sizes or all(map(math.isfinite, torch.stack(sizes).tolist())):
        return
    found = next(((name, grad) for name, grad in dense.items() if not grad.isfinite().all()), None)
    if found is None:  # only the squares overflowed
        return
    name, grad = found
    raise NonFiniteError(
        f"the gradient of parameter '{name}' is {grad[~grad.isfinite()][0].item()} although the loss is "
        f"{loss.item()}. Nothing was updated. Look for a derivative that is not finite, as of a root or a norm at 0, "
        "or for an overflow."
    )


def _describe(particles: Particles, bad: Tensor, whose: str = "", droppable: bool = False) -> str:
    """Name the first particle whose log-weight is not finite and the site that made it so."""
    index = bad.nonzero()[0].tolist()
    particle, element = index[0], index[1:]
    sites = particles.runs[particle if len(particles.runs) > 1 else 0]
    where = ", ".join(f"{name}={element[dim]}" for name, dim in _plate_dims(particles).items())
    value = particles.log_weight[tuple(index)].item()
    culprit = "no single site"
    for site in sites:
        log_prob = site.log_prob
        if len(particles.runs) == 1 and log_prob.dim() == bad.dim():
            log_prob = log_prob[particle]
        finite = torch.isfinite(log_prob)
        if not finite.all():
            culprit = f"{site.origin} site '{site.name}', log-density {log_prob[~finite][0].item()}"
            break
    return (
        f"the log-weight {whose}is {value} (particle {particle}{', ' + where if where else ''}); first seen at "
        f"{culprit}. Nothing was updated. Look for an overflow or a value outside the support there"
        + ("; nonfinite='drop' leaves out single particles." if droppable else ".")
    )


def _plate_dims(particles: Particles) -> dict[str, int]:
    return dict(zip(particles.layout.plates, sorted(particles.layout.dims), strict=True))


def _describe_constant(particles: Particles) -> str:
    for site in particles.runs[0]:
        if not torch.isfinite(site.log_prob).all():
            return (
                f"the loss is not finite: {site.origin} site '{site.name}' has a log-density that is not. Nothing was "
                "updated."
            )
    return (
        "the loss is not finite although every log-density is. Nothing was updated; look for a derivative that is not "
        "finite, as of a root or a norm at 0, and at scales and sizes."
    )
