"""The model's joint density as a function of one vector: the coordinates that an AutoFlow draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import init_to_median
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_elbo_ext.diagnostics.sampling import make_sampler
from pyro_elbo_ext.guides.bases import make_base
from pyro_elbo_ext.guides.flow import AutoFlow
from pyro_elbo_ext.guides.flows import Affine, Flow
from pyro_elbo_ext.particles import Draw, Particles
from pyro_elbo_ext.plates import plate_nesting
from pyro_elbo_ext.sites import base_name, plate_factor
from pyro_elbo_ext.tracing import PARTICLE_PLATE, Traces, forked_rng, run_pair

__all__ = ["Frame", "affine_flow", "inspect", "make_guide"]

LATENT = "latent"  # block of an AutoFlow


class Identity(nn.Module):
    """A transform that changes nothing, so that a flow is its outer affine map alone."""

    def forward(self, context: Tensor | None = None) -> Identity:
        """Return the transform given a context."""
        return self

    @property
    def inv(self) -> Identity:
        """Itself."""
        return self

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the value and a log-determinant of zero."""
        return x, x.new_zeros(x.shape[:-1])


def affine_flow(loc: Tensor, triangle: Tensor, base: str = "normal") -> Flow:
    """Return noise under a dense affine map: of normal noise, a full-rank Gaussian."""
    features = loc.shape[-1]
    noise = make_base(base, features).to(loc.device, loc.dtype)
    return Flow(Identity(), noise, Affine(loc, triangle, dense=True), features, 0)


def make_guide(model: Callable, flow: Flow, args: tuple, kwargs: dict, init_loc_fn: Callable = init_to_median) -> Any:
    """Return an AutoFlow made of a flow with a dense affine map, which keeps its values."""
    loc, triangle = (part.detach().clone() for part in (flow.affine.loc, flow.affine.triangle))  # type: ignore[union-attr]
    guide = AutoFlow(model, flow=flow, init_loc_fn=init_loc_fn)
    guide.build(*args, **kwargs)
    flow.affine.restart(loc, triangle)  # type: ignore[union-attr]
    return guide


def inspect(model: Callable, args: tuple, kwargs: dict) -> bool:
    """Refuse models that autofit is not for, and tell whether latent sites stand in a subsampled plate.

    Raises:
        ValueError: a discrete latent site, a parameter that no fit has learned yet, no latent site; it is named.
    """
    known = set(pyro.get_param_store().keys())
    with forked_rng(), poutine.block(), torch.no_grad():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    nodes: dict[str, Any] = dict(trace.nodes.items())
    for name, node in nodes.items():
        if node["type"] == "param" and name not in known:
            raise ValueError(
                f"the model has parameter '{name}', which autofit would leave as it is made: it infers latent sites "
                "and learns nothing of the model. Give it a prior, or learn it by pyro.infer.SVI first and keep it in "
                "the param store."
            )
    sampled = {n: s for n, s in nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}
    latents = {n: s for n, s in sampled.items() if not s["is_observed"]}
    if not latents:
        raise ValueError("the model has no latent sites: there is nothing to infer")
    for name, node in latents.items():
        if node["fn"].support.is_discrete:
            raise ValueError(
                f"latent site '{name}' is a {base_name(node['fn'])}, which is discrete, and autofit's guides are "
                "continuous. Sum it out in the model's own density, as MixtureSameFamily does, or fit by "
                "pyro.infer.SVI with TraceEnum_ELBO or ScoreFunction_ELBO."
            )
    return any(plate_factor(f) != 1 for site in sampled.values() for f in site["cond_indep_stack"])


class Frame:
    """Coordinates of all latent sites, unconstrained and non-centred as by :class:`~pyro_elbo_ext.AutoFlow`.

    Args:
        model: a Pyro model of continuous latent sites and full plates.
        args: its positional arguments.
        kwargs: its keyword arguments.
        init_loc_fn: first value of a site.

    Attributes:
        guide: an AutoFlow whose flow is an affine map; it only says how coordinates become sites.
        size: number of coordinates D.
        start: first coordinates ``[D]``.

    Raises:
        ValueError: the model's density at several values at once is not that at each alone, or it is scaled.
    """

    def __init__(self, model: Callable, args: tuple, kwargs: dict, init_loc_fn: Callable = init_to_median) -> None:
        self.model, self.args, self.kwargs, self.init_loc_fn = model, args, kwargs, init_loc_fn
        self.guide: Any = AutoFlow(
            model,
            flow=lambda features, _: affine_flow(torch.zeros(features), torch.eye(features)),
            init_loc_fn=init_loc_fn,
        )
        self.guide.build(*args, **kwargs)
        for parameter in self.guide.parameters():
            parameter.requires_grad_(False)
        self.start: Tensor = self.guide.flows[f"block_{LATENT}"].affine.loc.detach().clone()
        self.size = self.start.shape[-1]
        self._layouts: dict = {}
        self._passed: set = set()
        self._nesting = plate_nesting(model, self.guide, args, kwargs)
        with forked_rng(), torch.no_grad():
            draw = self._sampler(1).draw()[0]
            self._name = next(iter(draw.leaves))
            self._check(self._sampler(1).evaluate([draw]))
            self.shapes = {name: node["value"].shape for name, node in self._nodes(self.start[None]).items()}

    def _sampler(self, num: int) -> Any:
        sampler = make_sampler(self.model, self.guide, self.args, self.kwargs, num, (), True, self._nesting)
        sampler.layouts, sampler.passed = self._layouts, self._passed
        return sampler

    def _check(self, particles: Particles) -> None:
        scale = torch.as_tensor(particles.scale)
        if particles.annealed or (scale != 1).any():
            raise ValueError(
                "the model's sites are scaled, as by poutine.scale or KL annealing: its weights would be those of "
                "another posterior. Give autofit the model without the scale."
            )
        points = self.start + 0.1 * torch.randn(3, self.size, dtype=self.start.dtype, device=self.start.device)
        together = self._evaluate(points)
        apart = torch.cat([self._evaluate(point[None]) for point in points])
        tolerance = 100 * torch.finfo(together.dtype).eps ** 0.75
        if not torch.allclose(together, apart, rtol=tolerance, atol=tolerance, equal_nan=True):
            raise ValueError(
                f"the model's log-density at three values at once is {together.tolist()}, but {apart.tolist()} at each "
                "alone: its operations do not keep particles in a dimension left of its plates apart, or it draws "
                "values of its own. Index events from the right, and declare plates."
            )

    @property
    def num_centred(self) -> int:
        """Number of sites that are non-centred automatically, each with a weight."""
        return self.guide._num_weights

    @property
    def centering(self) -> Tensor | None:
        """Parameter behind those sites' centring weights, None without any."""
        return self.guide.centering.detach().clone() if self.num_centred else None

    @centering.setter
    def centering(self, value: Tensor | None) -> None:
        if value is not None:
            self.guide.centering.data.copy_(value)

    def _held(self, points: Tensor) -> dict[str, Tensor]:
        """Return the guide's vector ``[K, 1..., D]``, particles left of the plates."""
        num = points.shape[0]
        return {self._name: points.reshape(((num,) + (1,) * self._nesting if num > 1 else ()) + (self.size,))}

    def _evaluate(self, points: Tensor) -> Tensor:
        num = points.shape[0]
        none: Any = None
        with poutine.block():
            particles = self._sampler(num).evaluate([Draw(Traces(none, None, {}), {})], [self._held(points)])
        found = particles.log_joint.reshape(num) + particles.constant
        for site in particles.runs[0]:
            if site.origin == "model" and not site.node["is_observed"]:
                value = site.node["value"].detach()
                if value.shape.numel() % num == 0 and value.is_floating_point():  # held inside its support at the edge
                    edge = (value.reshape(num, -1).abs() >= torch.finfo(value.dtype).max).any(-1)
                    found = torch.where(edge, -torch.inf, found)
        return found

    def log_joint(self, points: Tensor) -> Tensor:
        """Return the log-density of data and coordinates ``[K]`` at ``[K, D]``; -inf where it is not a number."""
        with pyro.validation_enabled(False):  # a point that overflows has no density
            found = self._evaluate(points)
        return torch.where(torch.isfinite(found), found, -torch.inf)

    def slopes(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-density ``[K]`` and its gradient ``[K, D]``, zero where it has none."""
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            found = self.log_joint(points)
            finite = torch.isfinite(found)
            (slope,) = torch.autograd.grad(torch.where(finite, found, 0.0).sum(), points)
        return found.detach(), slope.nan_to_num(0.0, 0.0, 0.0)

    @torch.no_grad()
    def values(self, points: Tensor) -> dict[str, Tensor]:
        """Return latent and deterministic sites ``[K, *plates, *event]`` at coordinates ``[K, D]``."""
        found, num = {}, len(points)
        with pyro.validation_enabled(False):
            nodes = self._nodes(points)
        for name, node in nodes.items():
            value, shape = node["value"].detach(), self.shapes[name]
            if value.numel() == num * shape.numel():
                found[name] = value.reshape((num, *shape))
            elif value.numel() == shape.numel():  # depends on no latent site
                found[name] = value.reshape(shape).expand((num, *shape))
        return found

    def _nodes(self, points: Tensor) -> dict[str, Any]:
        num = points.shape[0]

        def many(fn: Callable) -> Callable:
            return pyro.plate(PARTICLE_PLATE, num, dim=-self._nesting - 1)(fn) if num > 1 else fn

        with poutine.block():
            trace = run_pair(many(self.model), many(self.guide), self.args, self.kwargs, self._held(points)).model
        return {
            name: node
            for name, node in trace.nodes.items()
            if node["type"] == "sample"
            and not site_is_subsample(node)
            and (not node["is_observed"] or node["infer"].get("_deterministic"))
        }
