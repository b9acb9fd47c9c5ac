"""How noisy a loss's gradients are: mean, variance and signal-to-noise ratio by group of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_elbo_ext.tracing import forked_rng

__all__ = ["GradientSummary", "gradient_summaries"]


class GradientSummary(NamedTuple):
    r"""What R gradients of a group of parameters look like.

    Attributes:
        num_parameters: elements of the group.
        mean_norm: norm of the mean gradient, from which the noise of the mean is not taken out.
        variance: total variance, the sum over elements.
        snr: mean over elements of :math:`|\mathrm{mean}| / \mathrm{sd}`, of those with a gradient that varies.
        noise_floor: what ``snr`` is, on average, where the true gradient is zero: :math:`\sqrt{2 / (\pi R)}`.
        num_replicates: R.
    """

    num_parameters: int
    mean_norm: float
    variance: float
    snr: float
    noise_floor: float
    num_replicates: int


def gradient_summaries(
    loss: Any,
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    num_replicates: int = 50,
    *,
    group: Callable[[str], str] | None = None,
    seed: int | None = None,
) -> dict[str, GradientSummary]:
    """Measure the gradients of any loss with ``loss_and_grads``, at the parameters as they are.

    Gradients are those of the unconstrained parameters, as an optimiser sees them. Parameters, their gradients and the
    random state are left as found, but for parameters that the pair or the loss makes on its first run.

    Args:
        loss: a loss of this package or of Pyro.
        model: a Pyro model.
        guide: its guide.
        args: their positional arguments.
        kwargs: their keyword arguments.
        num_replicates: gradients R, each with draws, and minibatch, of its own.
        group: from a parameter's name to its group's; by default each is a group of its own.
        seed: of these draws; by default they follow the random state found, which is then given back.

    Returns:
        By group, in the order in which the parameters were met.

    Raises:
        ValueError: fewer than two replicates, or no parameter was met.
        TypeError: the loss has no ``loss_and_grads``.

    References:
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018, arXiv:1802.04537).
    """
    if num_replicates < 2:
        raise ValueError(f"a variance needs num_replicates >= 2, got {num_replicates}")
    if not hasattr(loss, "loss_and_grads"):
        raise TypeError(f"expected a loss with loss_and_grads, as Trace_ELBO has, got {type(loss).__name__}")
    params: dict[str, Tensor] = {}
    rows: list[dict[str, Tensor]] = []
    with forked_rng():
        if seed is not None:
            torch.manual_seed(seed)
        for _ in range(num_replicates):
            with _everything_restored(), poutine.trace(param_only=True) as capture:
                _clear()
                loss.loss_and_grads(model, guide, *args, **(kwargs or {}))
                for name, node in capture.trace.nodes.items():
                    if node["type"] == "param" and node["value"] is not None:
                        params.setdefault(name, node["value"].unconstrained())
                rows.append({n: _gradient(p) for n, p in params.items() if p.requires_grad})
    grouped: dict[str, list[str]] = {}
    for name in rows[-1]:
        grouped.setdefault(name if group is None else group(name), []).append(name)
    if not grouped:
        raise ValueError("neither the model nor the guide has a parameter that learns, so there is no gradient.")
    return {key: _summary([_stacked(rows, name) for name in names]) for key, names in grouped.items()}


def _gradient(parameter: Tensor) -> Tensor:
    grad = parameter.grad
    return (torch.zeros_like(parameter) if grad is None else grad.detach().clone()).flatten()


def _stacked(rows: list[dict[str, Tensor]], name: str) -> Tensor:
    """Return every replicate's gradient of a parameter, zero in those that did not meet it."""
    return torch.stack([row.get(name, torch.zeros_like(rows[-1][name])) for row in rows])


def _summary(parts: list[Tensor]) -> GradientSummary:
    device = parts[0].device
    grads = torch.cat([part.to(device, torch.float64) for part in parts], 1)
    mean, sd = grads.mean(0), grads.std(0)
    varies = sd > 0
    ratio = (mean[varies].abs() / sd[varies]).mean() if varies.any() else torch.tensor(math.inf)
    replicates = grads.shape[0]
    floor = math.sqrt(2 / (math.pi * replicates))
    return GradientSummary(
        grads.shape[1], float(mean.norm()), float(sd.square().sum()), float(ratio), floor, replicates
    )


def _leaves() -> dict[str, Tensor]:
    store: Any = pyro.get_param_store()
    return {name: store[name].unconstrained() for name in store}


def _clear() -> None:
    for parameter in _leaves().values():
        parameter.grad = None


@contextmanager
def _everything_restored() -> Iterator[None]:
    """Give back values and gradients of the store's parameters: a loss's own baselines may have moved some."""
    values = {name: (p, p.detach().clone(), p.grad) for name, p in _leaves().items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, now in _leaves().items():
                if name not in values:
                    now.grad = None
                    continue
                parameter, value, grad = values[name]
                if now is parameter:
                    parameter.copy_(value)
                else:  # a buffer of a loss that was replaced
                    now.copy_(value)
                parameter.grad = grad
