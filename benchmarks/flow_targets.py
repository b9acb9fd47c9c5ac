"""The posteriors that flow guides are measured on, with exact log evidence, for Pyro and for NumPyro."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

FUNNEL_DIM, MINIBATCH, MOST = 10, 20, 500
SCHOOLS = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]


@dataclass
class Target:
    """A model with exact log evidence."""

    name: str
    dim: int
    model: Callable[..., Any]
    numpyro_model: Callable[[], Callable[[], Any]]  # makes the same for NumPyro, without arguments, on all the data
    log_evidence: float
    args: tuple = ()  # on all the data
    train_args: tuple = ()  # in minibatches, if there are any
    create_plates: Callable[..., Any] | None = None
    features: dict[str, Tensor] = field(default_factory=dict)  # [elements, features], standardised, by plate


class Funnel(dist.TorchDistribution):
    """Neal's funnel, as one opaque vector: v, then the coordinates with standard deviation exp(v / 2)."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector

    def __init__(self, batch_shape: Sequence[int] = ()) -> None:
        super().__init__(torch.Size(batch_shape), torch.Size((FUNNEL_DIM,)), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Funnel:
        """Return the same with another batch shape."""
        return Funnel(batch_shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw exactly; only what guides start from is drawn."""
        noise = torch.randn(self._extended_shape(torch.Size(sample_shape)))
        v = 3 * noise[..., :1]
        return torch.cat([v, (v / 2).exp() * noise[..., 1:]], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density."""
        return funnel_density(value, value[..., :1].exp())


def normal(x: Any, variance: Any, log_variance: Any) -> Any:
    """Return the log density of a centred normal, for either library's arrays."""
    return -(x * x / variance + log_variance + math.log(2 * math.pi)) / 2


def funnel_density(z: Any, variance: Any) -> Any:
    """Return the log density of the funnel, given exp(v), for either library's arrays."""
    return normal(z[..., 0], 9.0, math.log(9.0)) + normal(z[..., 1:], variance, z[..., :1]).sum(-1)


def numpyro_funnel() -> Callable[[], None]:
    """Return the funnel for NumPyro."""
    import jax.numpy as jnp
    import numpyro
    from numpyro.distributions import ImproperUniform, constraints

    def model() -> None:
        z = numpyro.sample("z", ImproperUniform(constraints.real_vector, (), (FUNNEL_DIM,)))
        numpyro.factor("density", funnel_density(z, jnp.exp(z[..., :1])))

    return model


def funnel() -> Target:
    """Return the funnel."""

    def model() -> None:
        pyro.sample("z", Funnel())

    return Target("funnel", FUNNEL_DIM, model, numpyro_funnel, log_evidence=0.0)


def grid(y: Tensor, sigma: Tensor, tau_scale: float, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return mu, log tau and the log joint density of both and y of a hierarchical model on a grid, in float64."""
    y, sigma = y.double(), sigma.double()
    mu, log_tau = (torch.linspace(*ends, nodes, dtype=y.dtype) for ends in ((-40, 40), (-20, 12)))
    tau = log_tau.exp()
    variance = sigma.square() + tau.square()[:, None]  # of each y given mu, [nodes, elements]
    moments = [(y**power / variance).sum(-1, keepdim=True) for power in range(3)]
    squares = moments[2] - 2 * mu * moments[1] + mu.square() * moments[0]
    likelihood = -(squares + (2 * math.pi * variance).log().sum(-1, keepdim=True)) / 2
    prior = math.log(2 * tau_scale / math.pi) - (tau_scale**2 + tau**2).log() + log_tau  # of log tau
    return mu, log_tau, likelihood + prior[:, None] + normal(mu, 25.0, math.log(25.0))


def quadrature(y: Tensor, sigma: Tensor, tau_scale: float, nodes: int) -> float:
    """Return the log evidence of a hierarchical model by the trapezoidal rule over mu and log tau, in float64."""
    mu, log_tau, joint = grid(y, sigma, tau_scale, nodes)
    return (joint.logsumexp((0, 1)) + ((mu[1] - mu[0]) * (log_tau[1] - log_tau[0])).log()).item()


def exact_moments(y: Tensor, sigma: Tensor, tau_scale: float, nodes: int = 2001) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and standard deviation of each site of a hierarchical model's posterior, by the same rule."""
    mu, log_tau, joint = grid(y, sigma, tau_scale, nodes)
    weight, tau = (joint - joint.logsumexp((0, 1))).exp(), log_tau.exp()[:, None]

    def moments(mean: Tensor, variance: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        first = (weight * mean).sum()
        return first, (weight * (variance + (mean - first).square())).sum().sqrt()

    shrink = [tau.square() / (tau.square() + s.double().square()) for s in sigma]
    theta = [moments(mu + b * (x.double() - mu), b * s.double() ** 2) for x, s, b in zip(y, sigma, shrink, strict=True)]
    means, deviations = (torch.stack(found) for found in zip(*theta, strict=True))
    return {"mu": moments(mu + 0 * tau), "tau": moments(tau + 0 * mu), "theta": (means, deviations)}


def log_evidence(y: Tensor, sigma: Tensor, tau_scale: float) -> float:
    """Return the log evidence, unless it takes a finer grid; an error if half the step says otherwise."""
    if len(y) > MOST:
        return math.nan
    coarse, fine = (quadrature(y, sigma, tau_scale, nodes) for nodes in (1001, 2001))
    if abs(coarse - fine) > 1e-6:
        raise RuntimeError(f"The quadrature has not converged: {coarse} and {fine} nats.")
    return fine


def numpyro_hierarchy(plate: str, y: np.ndarray, sigma: np.ndarray, tau_scale: float) -> Callable[[], None]:
    """Return a hierarchical model for NumPyro."""
    import numpyro
    from numpyro.distributions import HalfCauchy, Normal

    def model() -> None:
        mu = numpyro.sample("mu", Normal(0.0, 5.0))
        tau = numpyro.sample("tau", HalfCauchy(tau_scale))
        with numpyro.plate(plate, len(y)):
            theta = numpyro.sample("theta", Normal(mu, tau))
            numpyro.sample("y", Normal(theta, sigma), obs=y)

    return model


def hierarchy(name: str, plate: str, data: tuple[Tensor, Tensor], tau_scale: float, batch: int | None) -> Target:
    """Return a centred hierarchical model, in minibatches if a size is given."""
    y, sigma = data

    def rows(size: int) -> pyro.plate:
        return pyro.plate(plate, len(y), subsample_size=size)

    def model(size: int) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(tau_scale))
        with rows(size) as i:
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma[i]), obs=y[i])

    columns = [(c - c.mean()) / c.std() for c in (y, sigma.log()) if c.std() > 0]
    arrays = y.cpu().numpy(), sigma.cpu().numpy()
    return Target(
        name,
        2 + len(y),
        model,
        lambda: numpyro_hierarchy(plate, *arrays, tau_scale),
        log_evidence(y, sigma, tau_scale),
        args=(len(y),),
        train_args=(batch or len(y),),
        create_plates=rows if batch else None,
        features={plate: torch.stack(columns, -1)},
    )


def eight_schools() -> Target:
    """Return the eight schools."""
    return hierarchy("eight-schools", "schools", (torch.tensor(SCHOOLS[0]), torch.tensor(SCHOOLS[1])), 5.0, None)


def group_data(number: int) -> Tensor:
    """Return y of as many groups."""
    noise = torch.randn(2, number, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return (1 + noise.sum(0)).to(torch.get_default_device())


def groups(number: int = 200) -> Target:
    """Return many groups, in minibatches."""
    y = group_data(number)
    return hierarchy("groups", "groups", (y, torch.ones_like(y)), 2.0, MINIBATCH)


TARGETS: dict[str, Callable[[], Target]] = {"eight-schools": eight_schools, "funnel": funnel, "groups": groups}
