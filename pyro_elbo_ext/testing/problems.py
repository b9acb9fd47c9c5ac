"""Model/guide pairs of which everything is known: evidence, bounds and gradients, to many digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
# Gradient of IWAE with K = 3 for the two-layer guide: 2.5 10^7 draws of plain tensor code, standard error 2e-4.
GOLDEN_HIERARCHY = {"m": 0.0632, "log_s1": 0.0001, "a": 0.2316, "c": 0.4674, "log_s2": 0.2481}


__all__ = [
    "BELIEF_STATES",
    "GAP_CONSTANT",
    "GOLDEN_GRADIENT",
    "GOLDEN_HIERARCHY",
    "GOLDEN_IWAE",
    "GOLDEN_SCALE_GRADIENT",
    "LOG_EVIDENCE",
    "Mixture",
    "Problem",
    "ScoredNormal",
    "TOY_STATES",
    "amortised_mixture",
    "belief_network",
    "bernoulli_toy",
    "conjugate_normal",
    "equal_rows",
    "hierarchical_guide",
    "linear_vae_optimum",
    "many_bits",
    "many_normals",
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


def _full(size: int, value: float) -> Tensor:
    return torch.full((size,), value, dtype=torch.float64)


class ScoredNormal(dist.Normal):
    """A normal that is not to be reparameterised, so that its gradient is a score function's."""

    has_rsample = False


def conjugate_normal(
    replicates: int, loc: float = 0.2, scale: float = 0.9, x: float = 1.5, scored: bool = False
) -> Problem:
    """Return z ~ N(0, 1), x ~ N(z, 1) with q = N(m, s^2), reparameterised or not, once for each replicate."""
    normal = ScoredNormal if scored else dist.Normal
    observed = _full(replicates, x)

    def model() -> None:
        with pyro.plate("replicates", replicates, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(observed), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=observed)

    def guide() -> None:
        m, s = pyro.param("m"), pyro.param("s")
        with pyro.plate("replicates", replicates, dim=-1):
            pyro.sample("z", normal(m, s))

    return Problem(model, guide, {"m": _full(replicates, loc), "s": _full(replicates, scale)})


def hierarchical_guide(replicates: int) -> Problem:
    """Return z1 ~ N(0, 1), z2 ~ N(z1, 1), x ~ N(z2, 1), x = 1.2, with q(z1) q(z2 | z1)."""
    observed = _full(replicates, 1.2)
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

    return Problem(model, guide, {name: _full(replicates, value) for name, value in start.items()})


def many_normals(replicates: int, num_data: int = 20) -> tuple[Problem, float]:
    """Return z_i ~ N(0, 1), x_i ~ N(z_i, 1) in a plate that can be subsampled, and the log evidence.

    Model and guide take the size of the minibatch, which all replicates share.
    """
    data = torch.linspace(-1.5, 2.5, num_data, dtype=torch.float64)

    def model(batch: int) -> None:
        with pyro.plate("replicates", replicates, dim=-2), pyro.plate("data", num_data, batch, dim=-1) as rows:
            z = pyro.sample("z", dist.Normal(data.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[rows].expand(replicates, -1))

    def guide(batch: int) -> None:
        m, s = pyro.param("m").unsqueeze(-1), pyro.param("s").unsqueeze(-1)
        with pyro.plate("replicates", replicates, dim=-2), pyro.plate("data", num_data, batch, dim=-1):
            pyro.sample("z", dist.Normal(m, s))

    evidence = float(dist.Normal(torch.zeros_like(data), math.sqrt(2)).log_prob(data).sum())
    return Problem(model, guide, {"m": _full(replicates, 0.1), "s": _full(replicates, 0.8)}), evidence


def equal_rows(replicates: int, num_data: int, logit: float = 0.3) -> Problem:
    """Return :func:`bernoulli_toy` in a plate of equal rows, all under one logit a replicate."""
    observed = _full(replicates, 2.0).unsqueeze(-1).expand(-1, num_data)

    def model() -> None:
        with pyro.plate("replicates", replicates, dim=-2), pyro.plate("data", num_data, dim=-1):
            d = pyro.sample("d", dist.Bernoulli(observed.new_full((), 0.5)))
            pyro.sample("x", dist.Normal(2 * d, 1.0), obs=observed)

    def guide() -> None:
        logit = pyro.param("logit").unsqueeze(-1)
        with pyro.plate("replicates", replicates, dim=-2), pyro.plate("data", num_data, dim=-1):
            pyro.sample("d", dist.Bernoulli(logits=logit))

    return Problem(model, guide, {"logit": _full(replicates, logit)})


class Mixture(NamedTuple):
    """A mixture whose components an encoder infers: a pair that takes the data, a source of data, and its error.

    Attributes:
        model: learns the components' weights.
        guide: an encoder of 16 tanh units.
        sample: returns data of a given size.
        error: returns the mean distance between the encoder's and the true probabilities of the components.
    """

    model: Callable[[Tensor], Any]
    guide: Callable[[Tensor], Any]
    sample: Callable[[int], Tensor]
    error: Callable[[], float]


def amortised_mixture(num_components: int = 5) -> Mixture:
    """Return components at 0, 10, 20, ... with deviation 5 and weights that rise.

    References:
        Revisiting Reweighted Wake-Sleep for Models with Stochastic Control Flow (Le et al., 2018, arXiv:1805.10469),
        whose mixture has twenty components.
    """
    means = 10.0 * torch.arange(num_components)
    weights = torch.arange(num_components) + 2.0
    top = float(means[-1])
    encoder = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, num_components))

    def encode(x: Tensor) -> dist.Categorical:
        return dist.Categorical(logits=encoder(2 * x.unsqueeze(-1) / top - 1))

    def model(x: Tensor) -> None:
        logits = pyro.param("logits", torch.zeros(num_components))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=logits))
            pyro.sample("x", dist.Normal(means[c], 5.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("c", encode(x))

    def sample(size: int) -> Tensor:
        return dist.Normal(means[dist.Categorical(weights).sample((size,))], 5.0).sample()

    @torch.no_grad()
    def error() -> float:
        x = torch.linspace(-10, top + 10, 61)
        exact = torch.softmax(weights.log() + dist.Normal(means, 5.0).log_prob(x.unsqueeze(-1)), -1)
        return float((encode(x).probs - exact).norm(dim=-1).mean())

    return Mixture(model, guide, sample, error)


def bernoulli_toy(replicates: int, logit: float = 0.3) -> Problem:
    """Return d ~ Bernoulli(1/2), x ~ N(2 d, 1), x = 2, with q = Bernoulli of some logit."""
    observed = _full(replicates, 2.0)

    def model() -> None:
        with pyro.plate("replicates", replicates, dim=-1):
            d = pyro.sample("d", dist.Bernoulli(torch.full_like(observed, 0.5)))
            pyro.sample("x", dist.Normal(2 * d, 1.0), obs=observed)

    def guide() -> None:
        logit = pyro.param("logit")
        with pyro.plate("replicates", replicates, dim=-1):
            pyro.sample("d", dist.Bernoulli(logits=logit))

    return Problem(model, guide, {"logit": _full(replicates, logit)})


def many_bits(replicates: int, num_data: int = 12) -> tuple[Problem, float]:
    """Return d_i ~ Bernoulli(1/2), x_i ~ N(2 d_i, 1) in a plate that can be subsampled, and the log evidence.

    Model and guide take the size of the minibatch, which all replicates share.
    """
    data = torch.linspace(-1.0, 3.0, num_data, dtype=torch.float64)

    def model(batch: int) -> None:
        with pyro.plate("replicates", replicates, dim=-2), pyro.plate("data", num_data, batch, dim=-1) as rows:
            d = pyro.sample("d", dist.Bernoulli(data.new_full((), 0.5)))
            pyro.sample("x", dist.Normal(2 * d, 1.0), obs=data[rows].expand(replicates, -1))

    def guide(batch: int) -> None:
        slope, offset = pyro.param("slope").unsqueeze(-1), pyro.param("offset").unsqueeze(-1)
        with pyro.plate("replicates", replicates, dim=-2), pyro.plate("data", num_data, batch, dim=-1) as rows:
            pyro.sample("d", dist.Bernoulli(logits=slope * data[rows] + offset))

    ends = torch.stack([dist.Normal(mean, 1.0).log_prob(data) for mean in (0.0, 2.0)])
    evidence = float((torch.logsumexp(ends, 0) - math.log(2)).sum())
    return Problem(model, guide, {"slope": _full(replicates, 0.7), "offset": _full(replicates, -0.4)}), evidence


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

    return Problem(model, guide, {name: _full(replicates, value) for name, value in start.items()})


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

    return Problem(model, guide, {"theta": _full(replicates, theta)})


def linear_vae_optimum(data: Tensor, latent_dim: int) -> float:
    """Return the largest log-likelihood of probabilistic PCA per row, in nats: the optimum of a linear VAE's ELBO.

    References:
        Probabilistic Principal Component Analysis (Tipping, Bishop, 1999).
    """
    num, dims = data.shape
    eigenvalues = torch.linalg.eigvalsh(torch.cov(data.T, correction=0)).flip(0)
    noise = eigenvalues[latent_dim:].mean()
    log_det = eigenvalues[:latent_dim].log().sum() + (dims - latent_dim) * noise.log()
    return float(-0.5 * (dims * math.log(2 * math.pi) + log_det + dims))
