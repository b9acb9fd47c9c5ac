"""The guide's and the model's log-density at any values of the continuous random sites, in unconstrained space.

Sites keep their own supports; each is moved by its bijection to the reals, whose Jacobian belongs to both densities.
Plate elements that are independent stay apart: a density is ``[num_chains, *plate dims]``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_elbo_ext.particles import Draw, Particles, ParticleSampler
from pyro_elbo_ext.sites import is_leaf
from pyro_elbo_ext.tracing import Traces

__all__ = ["Density", "Target"]


class Density(NamedTuple):
    """Log-densities in nats, ``[num_chains, *plate dims]`` with size 1 where a plate was summed over."""

    joint: Tensor
    guide: Tensor
    jacobian: Tensor

    @property
    def log_weight(self) -> Tensor:
        """Log p - log q."""
        return self.joint - self.guide

    def tempered(self, beta: float) -> Tensor:
        """Return the log-density of the geometric path from guide (0) to model (1), in unconstrained space."""
        if beta in (0, 1):  # zero times a density of zero has no logarithm
            return self.jacobian + (self.joint if beta else self.guide)
        return self.jacobian + (1 - beta) * self.guide + beta * self.joint


class Target:
    """Densities of a pair as functions of unconstrained values.

    Args:
        sampler: of the pair, with vectorised particles, one per chain.

    Attributes:
        start: unconstrained values of the guide's draws, by random site.
        particles: what the draws weigh.

    Raises:
        ValueError: a discrete site, or one whose support depends on other random values; the site is named.
    """

    def __init__(self, sampler: ParticleSampler) -> None:
        if not sampler.particle_dims:
            raise ValueError("densities of many chains need vectorised particles, at least two.")
        self.sampler = sampler
        with torch.no_grad():
            draws = sampler.draw()
            self.nodes = {n: node for n, node in draws[0].traces.guide.nodes.items() if is_leaf(node)}
            self.transforms = {name: _transform(name, node) for name, node in self.nodes.items()}
            self._check_supports(draws[0])
            self.particles: Particles = sampler.evaluate(draws)
            self.start = self.unconstrain(draws[0].leaves)
        self._traces: Traces = draws[0].traces

    def _check_supports(self, draw: Draw) -> None:
        """Refuse supports that another draw would have elsewhere."""
        other = self.sampler.draw()[0].traces.guide.nodes
        for name in self.nodes:
            value = draw.leaves[name]
            points = [t.inv(value) for t in (self.transforms[name], _transform(name, other[name]))]
            if points[0].shape != points[1].shape or not torch.equal(points[0].nan_to_num(), points[1].nan_to_num()):
                raise ValueError(
                    f"the support of guide site '{name}' depends on other random values, and chains that move all of "
                    "them at once would leave it. Draw the site on the unit interval or the reals and transform it."
                )

    def unconstrain(self, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return values moved to the reals, by site."""
        return {name: transform.inv(leaves[name]).detach() for name, transform in self.transforms.items()}

    def constrain(self, point: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return values on their own supports, by site."""
        return {name: transform(point[name]) for name, transform in self.transforms.items()}

    def __call__(self, point: dict[str, Tensor]) -> tuple[Density, Particles]:
        """Return both log-densities at unconstrained values; what is not a number is a density of zero."""
        values = self.constrain(point)
        jacobian: Any = 0.0
        for name, transform in self.transforms.items():
            term = transform.log_abs_det_jacobian(point[name], values[name])
            jacobian = jacobian + self.per_element(term, term.dim() - self._batch_dims(name))
        with pyro.validation_enabled(False):  # a proposal may overflow, and is rejected then
            particles = self.sampler.evaluate([Draw(self._traces, values)], [values])
        return Density(particles.log_joint, particles.log_guide, jacobian), particles

    def slopes(self, point: dict[str, Tensor], *betas: float) -> tuple[Density, list[dict[str, Tensor]]]:
        """Return the densities and the gradients of those tempered by some betas, in unconstrained space."""
        with torch.enable_grad():
            leaves = {name: value.detach().requires_grad_() for name, value in point.items()}
            density, _ = self(leaves)
            found = []
            for beta in betas:
                total = density.tempered(beta)
                total = torch.where(total.isfinite(), total, torch.zeros_like(total)).sum()
                grads = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
                zeros = zip(leaves, grads, leaves.values(), strict=True)
                found.append({n: torch.zeros_like(z) if g is None else g.nan_to_num(0, 0, 0) for n, g, z in zeros})
        return Density(*(part.detach() for part in density)), found

    def per_element(self, value: Tensor, event_dim: int) -> Tensor:
        """Add a value per site element up over all but chains and kept plates, ``[num_chains, *plate dims]``."""
        nesting = self.sampler.max_plate_nesting
        value = value.flatten(value.dim() - event_dim).sum(-1) if event_dim else value
        if value.dim() < nesting + 1:
            value = value.reshape((1,) * (nesting + 1 - value.dim()) + value.shape)
        dims = [d for d in range(-nesting, 0) if d not in self.particles.layout.dims]
        return value.sum(dims, keepdim=True) if dims else value

    def spread(self, element: Tensor, name: str) -> Tensor:
        """Give a value per element, ``[num_chains, *plate dims]``, the dimensions of a site."""
        return element.reshape(element.shape + (1,) * self.event_dim(name))

    def event_dim(self, name: str) -> int:
        """Event dimensions of a site's unconstrained value."""
        return self.start[name].dim() - self._batch_dims(name)

    def _batch_dims(self, name: str) -> int:
        return self.sampler.max_plate_nesting + 1


def _transform(name: str, node: Any) -> Any:
    support = node["fn"].support
    if support.is_discrete:
        raise ValueError(
            f"guide site '{name}' is discrete: annealing and score checks move along gradients, which it has none of. "
            "Sum it out of the model (TraceEnum_ELBO's models), or rely on the importance-weighted bound."
        )
    return biject_to(support)
