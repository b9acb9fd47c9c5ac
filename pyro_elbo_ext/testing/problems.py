"""Model/guide pairs of which everything is known: evidence, bounds and gradients, to many digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

LOG_EVIDENCE = -1.828012
GOLDEN_IWAE = {1: -2.199299, 2: -1.972623, 3: -1.914307, 4: -1.889118}
# Gradient of the objective in the mean of q, by number of particles. "rws" is reweighted wake-sleep's wake-phi,
# "iwae+rws" what sticking-the-landing estimates.
GOLDEN_GRADIENT = {
    "iwae": {1: 1.100000, 2: 0.493536, 3: 0.299964, 4: 0.211743},
    "rws": {1: 0.0, 2: 0.374360, 3: 0.493849, 4: 0.548307},
    "iwae+rws": {1: 1.100000, 2: 0.867897, 3: 0.793814, 4: 0.760050},
}
GOLDEN_SCALE_GRADIENT = {1: -0.688889, 2: -0.065883, 3: 0.010639, 4: 0.023391}  # of IWAE, in the scale of q
GAP_CONSTANT = 0.047313  # relative variance of a weight under q = N(0.6, 0.6), the second a variance
# Gradient with K = 3 for the two-layer guide: 2.5 10^7 draws or more of plain tensor code, standard error 2e-4.
GOLDEN_HIERARCHY = {"m": 0.0632, "log_s1": 0.0001, "a": 0.2316, "c": 0.4674, "log_s2": 0.2481}  # of IWAE
GOLDEN_HIERARCHY_RWS = {"m": 0.0401, "log_s1": -0.0103, "a": 0.2509, "c": 0.6022, "log_s2": 0.0832}  # of wake-phi


__all__ = [
    "BELIEF_STATES",
    "GAP_CONSTANT",
    "GOLDEN_GRADIENT",
    "GOLDEN_HIERARCHY",
    "GOLDEN_HIERARCHY_RWS",
    "GOLDEN_IWAE",
    "GOLDEN_SCALE_GRADIENT",
    "LOG_EVIDENCE",
    "Problem",
    "ScoredNormal",
    "TOY_STATES",
    "belief_network",
    "bernoulli_toy",
    "auxiliary_bit",
    "auxiliary_states",
    "conjugate_normal",
    "full",
    "hierarchical_guide",
    "linear_gaussian",
    "rebar_toy",
]


class Problem(NamedTuple):
    """A model/guide pair of which everything is known.

    Attributes:
        model: takes the size of the minibatch where it has one.
        guide: likewise.
        params: initial values of the guide's parameters; each replicate has its own along the first dimension.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    params: Mapping[str, Tensor]


def full(size: int, value: float) -> Tensor:
    """Return a parameter's value in every replicate."""
    return torch.full((size,), value, dtype=torch.float64)


class ScoredNormal(dist.Normal):
    """A normal that is not to be reparameterised, so that its gradient is a score function's."""

    has_rsample = False


def conjugate_normal(
    replicates: int, loc: float = 0.2, scale: float = 0.9, x: float = 1.5, scored: bool = False
) -> Problem:
    """Return z ~ N(0, 1), x ~ N(z, 1) with q = N(m, s^2), reparameterised or not, once for each replicate."""
    normal = ScoredNormal if scored else dist.Normal
    observed = full(replicates, x)

    def model() -> None:
        with pyro.plate("replicates", replicates, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(observed), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=observed)

    def guide() -> None:
        m, s = pyro.param("m"), pyro.param("s")
        with pyro.plate("replicates", replicates, dim=-1):
            pyro.sample("z", normal(m, s))

    return Problem(model, guide, {"m": full(replicates, loc), "s": full(replicates, scale)})


def hierarchical_guide(replicates: int) -> Problem:
    """Return z1 ~ N(0, 1), z2 ~ N(z1, 1), x ~ N(z2, 1), x = 1.2, with q(z1) q(z2 | z1)."""
    observed = full(replicates, 1.2)
    start = {"m": 0.3, "log_s1": -0.2, "a": 0.4, "c": 0.1, "log_s2": -0.35}

    def model() -> None:
        with pyro.plate("replicates", replicates, dim=-1):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros_like(observed), 1.0))
            z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
            pyro.sample("x", dist.Normal(z2, 1.0), obs=observed)

    def guide() -> None:
        p = {name: pyro.param(name) for name in start}
        with pyro.plate("replicates", replicates, dim=-1):
            z1 = pyro.sample("z1", dist.Normal(p["m"], p["log_s1"].exp()))
            pyro.sample("z2", dist.Normal(p["a"] * z1 + p["c"], p["log_s2"].exp()))

    return Problem(model, guide, {name: full(replicates, value) for name, value in start.items()})


def bernoulli_toy(replicates: int, logit: float = 0.3) -> Problem:
    """Return d ~ Bernoulli(1/2), x ~ N(2 d, 1), x = 2, with q = Bernoulli of some logit."""
    observed = full(replicates, 2.0)

    def model() -> None:
        with pyro.plate("replicates", replicates, dim=-1):
            d = pyro.sample("d", dist.Bernoulli(torch.full_like(observed, 0.5)))
            pyro.sample("x", dist.Normal(2 * d, 1.0), obs=observed)

    def guide() -> None:
        logit = pyro.param("logit")
        with pyro.plate("replicates", replicates, dim=-1):
            pyro.sample("d", dist.Bernoulli(logits=logit))

    return Problem(model, guide, {"logit": full(replicates, logit)})


# All values of the belief network's bits, and of the toy's.
BELIEF_STATES = {
    "z1": torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)[:, :2],
    "z2": torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)[:, 2],
}
TOY_STATES = {"d": torch.tensor([0.0, 1.0], dtype=torch.float64)}


def belief_network(replicates: int) -> Problem:
    """Return a sigmoid belief network of three bits, z2 -> (a, b) -> x, with q(a, b) q(z2 | a, b).

    Small enough to sum over all its states, deep enough that a bit has a parent in the guide.
    """
    observed = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(replicates, 2)
    start = {"first": 0.3, "top": -0.2, "weight": 0.8, "theta": 0.5}

    def model() -> None:
        theta = pyro.param("theta")
        with pyro.plate("replicates", replicates, dim=-1):
            top = pyro.sample("z2", dist.Bernoulli(logits=theta))
            low = pyro.sample("z1", dist.Bernoulli(logits=_columns(1.2 * top - 0.3, 0.4 - 1.5 * top)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=2 * low - 0.5 * low.flip(-1)).to_event(1), obs=observed)

    def guide() -> None:
        first, offset, weight = pyro.param("first"), pyro.param("top"), pyro.param("weight")
        with pyro.plate("replicates", replicates, dim=-1):
            low = pyro.sample("z1", dist.Bernoulli(logits=_columns(first, -first + 0.1)).to_event(1))
            pyro.sample("z2", dist.Bernoulli(logits=offset + weight * (low[..., 0] - 2 * low[..., 1])))

    return Problem(model, guide, {name: full(replicates, value) for name, value in start.items()})


def _columns(*entries: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*entries), -1)


def rebar_toy(replicates: int, theta: float) -> Problem:
    """Return the problem E (b - 0.499)^2 with b ~ Bernoulli(sigmoid(theta)), as the ELBO of a pair.

    References:
        REBAR: Low-variance, unbiased gradient estimates for discrete latent variable models (Tucker et al., 2017,
        arXiv:1703.07370).
    """

    def model() -> None:
        with pyro.plate("replicates", replicates, dim=-1):
            b = pyro.sample("b", dist.Bernoulli(logits=pyro.param("theta").detach()))
            pyro.factor("f", (b - 0.499) ** 2)

    def guide() -> None:
        with pyro.plate("replicates", replicates, dim=-1):
            pyro.sample("b", dist.Bernoulli(logits=pyro.param("theta")))

    return Problem(model, guide, {"theta": full(replicates, theta)})


AUXILIARY_SCALES = (0.5, 1.5)


def auxiliary_bit(replicates: int) -> Problem:
    """Return d ~ Bernoulli(1/2), y ~ N(0, 1), x ~ N(y + d, 1), x = 1, with an auxiliary site after the guide's bit.

    The guide draws d, then u ~ N(0, s_d), marked ``is_auxiliary``, and sets y = u: what the bit costs includes
    -log q(u | d), of a site that the model does not have.
    """
    observed = full(replicates, 1.0)
    scales = torch.tensor(AUXILIARY_SCALES, dtype=torch.float64)

    def model() -> None:
        with pyro.plate("replicates", replicates, dim=-1):
            d = pyro.sample("d", dist.Bernoulli(torch.full_like(observed, 0.5)))
            y = pyro.sample("y", dist.Normal(torch.zeros_like(observed), 1.0))
            pyro.sample("x", dist.Normal(y + d, 1.0), obs=observed)

    def guide() -> None:
        logit = pyro.param("logit")
        with pyro.plate("replicates", replicates, dim=-1):
            d = pyro.sample("d", dist.Bernoulli(logits=logit))
            scale = scales[0] + (scales[1] - scales[0]) * d
            u = pyro.sample("u", dist.Normal(torch.zeros_like(scale), scale), infer={"is_auxiliary": True})
            pyro.sample("y", dist.Delta(u))

    return Problem(model, guide, {"logit": full(replicates, 0.3)})


def auxiliary_states(nodes: int = 24) -> tuple[dict[str, Tensor], Tensor]:
    """Return values of bit and auxiliary site by Gauss-Hermite quadrature, and what makes their density a weight."""
    points, weights = (torch.tensor(t) for t in np.polynomial.hermite_e.hermegauss(nodes))
    bits = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat_interleave(nodes)
    scale = torch.tensor(AUXILIARY_SCALES, dtype=torch.float64).repeat_interleave(nodes)
    log_measure = weights.log().repeat(2) + 0.5 * points.square().repeat(2) + scale.log()
    return {"d": bits, "u": scale * points.repeat(2)}, log_measure


def linear_gaussian(replicates: int) -> tuple[Problem, float]:
    """Return z ~ N(0, I), x ~ N(A z, I / 2) in six dimensions with a mean-field guide, and the log evidence."""
    dims = 6
    matrix = torch.eye(dims, dtype=torch.float64) + 0.5 * torch.ones(dims, dims, dtype=torch.float64).tril(-1)
    observed = torch.linspace(-1.0, 1.5, dims, dtype=torch.float64).expand(replicates, -1)

    def model() -> None:
        with pyro.plate("replicates", replicates, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(observed), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ matrix.T, math.sqrt(0.5)).to_event(1), obs=observed)

    def guide() -> None:
        m = pyro.param("m").unsqueeze(-1).expand(-1, dims)
        with pyro.plate("replicates", replicates, dim=-1):
            pyro.sample("z", dist.Normal(m, 0.5).to_event(1))

    covariance = matrix @ matrix.T + 0.5 * torch.eye(dims, dtype=torch.float64)
    evidence = dist.MultivariateNormal(observed.new_zeros(dims), covariance).log_prob(observed[0])
    return Problem(model, guide, {"m": full(replicates, 0.2)}), float(evidence)
