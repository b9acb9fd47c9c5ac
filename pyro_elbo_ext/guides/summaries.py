"""Draws of a guide, and the moments and quantiles of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoNormal
from torch import Tensor

__all__ = ["covariance_triangle", "gaussian_draws", "many_draws", "quantiles"]


@torch.no_grad()
def many_draws(guide: Callable, nesting: int, num_samples: int, args: tuple, kwargs: dict) -> dict[str, Tensor]:
    """Return many draws of a guide's sites by name, ``[draws, *plates, *event]``, and its minibatch's rows by plate."""
    with poutine.block(), pyro.plate("_many_draws", num_samples, dim=-nesting - 1):
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    sites: dict[str, Any] = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    return {name: site["value"] for name, site in sites.items() if not site["infer"].get("is_auxiliary")}


def quantiles(values: Tensor, levels: Tensor) -> Tensor:
    """Return quantiles ``[levels, *shape]`` of draws ``[draws, *shape]``, linear between order statistics."""
    ordered = values.sort(0).values
    place = levels.to(values.device, values.dtype) * (len(values) - 1)
    low, high = place.floor().long(), place.ceil().long()
    share = (place - low).reshape((-1,) + (1,) * (values.dim() - 1))
    return torch.lerp(ordered[low], ordered[high], share)


def covariance_triangle(rows: Tensor) -> Tensor:
    """Return the Cholesky factor of the covariance of rows ``[rows, features]``, of full rank in any case."""
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / max(len(rows) - 1, 1)
    floor = covariance.diagonal().clamp_min(torch.finfo(rows.dtype).tiny ** 0.5) * 1e-6
    return torch.linalg.cholesky(covariance + floor.diag())


def gaussian_draws(
    guide: Any, source: str | Callable, num_steps: int, num_samples: int, args: tuple, kwargs: dict
) -> dict[str, Tensor]:
    """Return draws of a Gaussian guide, which is fitted first if it is named.

    Raises:
        ValueError: an unknown name.
    """
    if callable(source):
        return many_draws(source, guide._nesting, num_samples, args, kwargs)
    if source not in ("normal", "laplace"):
        raise ValueError(f'warm_start takes "normal", "laplace" or a trained guide, got {source!r}')
    store = pyro.get_param_store()
    mine = {name for name in store if name.startswith(("AutoNormal.", "AutoLaplaceApproximation."))}
    found: Any = store.get_state()
    state: Any = {part: {k: v for k, v in values.items() if k not in mine} for part, values in found.items()}
    with store.scope(state), poutine.block(), torch.enable_grad():
        if source == "normal":
            other: Any = AutoNormal(guide.model, create_plates=guide.create_plates)
        else:
            other = AutoLaplaceApproximation(guide.model)
        other(*args, **kwargs)
        optim = torch.optim.Adam(other.parameters(), lr=0.05)  # of the guide alone: the model stays as it is
        schedule = torch.optim.lr_scheduler.ExponentialLR(optim, 0.01 ** (1 / max(num_steps, 1)))
        for _ in range(num_steps):
            loss = Trace_ELBO().differentiable_loss(guide.model, other, *args, **kwargs)
            for parameter, slope in zip(other.parameters(), _slopes(loss, other), strict=True):
                parameter.grad = slope
            optim.step()
            schedule.step()
        if source == "laplace":
            other = other.laplace_approximation(*args, **kwargs)
        return many_draws(other, guide._nesting, num_samples, args, kwargs)


def _slopes(loss: Tensor, guide: torch.nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(guide.parameters()), materialize_grads=True)
