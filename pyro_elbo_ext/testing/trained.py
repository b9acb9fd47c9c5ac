"""Checks C11 and C12: optima known in closed form, and training that has to reach them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.optim import ClippedAdam
from torch import Tensor

from pyro_elbo_ext.testing.measure import Check, Claims, compare, sample_gradients, z_score
from pyro_elbo_ext.testing.problems import Problem
from pyro_elbo_ext.tracing import forked_rng

__all__ = [
    "LinearVAE", "Mixture", "amortised_mixture", "at_optimum", "improves", "linear_vae", "linear_vae_optimum",
    "reaches_optimum",
]  # fmt: skip


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


class LinearVAE(NamedTuple):
    """A linear VAE and where its bound is largest.

    Attributes:
        problem: the pair; the parameters are the optimum's, those of model and guide.
        start: parameters more than a nat a row below it.
        optimum: the largest log-likelihood, in nats.
        num_data: rows of the data.
    """

    problem: Problem
    start: dict[str, Tensor]
    optimum: float
    num_data: int


def linear_vae(num_data: int = 100, dims: int = 4, latent_dim: int = 2) -> LinearVAE:
    """Return probabilistic PCA with a diagonal normal guide, whose bound is exact at the principal axes.

    References:
        Don't Blame the ELBO! A Linear VAE Perspective on Posterior Collapse (Lucas et al., 2019, arXiv:1911.02469).
    """
    generator = torch.Generator("cpu").manual_seed(3)  # the same data on every device
    scales = torch.linspace(2.0, 0.5, dims, dtype=torch.float64)
    data = torch.randn(num_data, dims, dtype=torch.float64, generator=generator, device="cpu").to(scales) * scales
    data = data - data.mean(0)

    def model() -> None:
        w, noise = pyro.param("w"), pyro.param("log_noise").exp()
        with pyro.plate("data", num_data):
            z = pyro.sample("z", dist.Normal(data.new_zeros(latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ w.T, noise).to_event(1), obs=data)

    def guide() -> None:
        v, scale = pyro.param("v"), pyro.param("log_scale").exp()
        with pyro.plate("data", num_data):
            pyro.sample("z", dist.Normal(data @ v, scale).to_event(1))

    values, vectors = torch.linalg.eigh(torch.cov(data.T, correction=0))
    values, vectors = values.flip(0), vectors.flip(1)
    noise, top = values[latent_dim:].mean(), values[:latent_dim]
    w = vectors[:, :latent_dim] * (top - noise).sqrt()
    best = {"w": w, "log_noise": noise.log().reshape(1) / 2, "v": w / top, "log_scale": (noise / top).log() / 2}
    start = {
        "w": torch.linspace(-0.5, 0.5, w.numel(), dtype=w.dtype).reshape(w.shape).cos() * w.sign() * 0.3,
        "log_noise": torch.zeros_like(best["log_noise"]),
        "v": torch.zeros_like(w),
        "log_scale": torch.zeros_like(best["log_scale"]),
    }
    return LinearVAE(Problem(model, guide, best), start, num_data * linear_vae_optimum(data, latent_dim), num_data)


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


def at_optimum(c: Claims) -> list[Check]:
    """Check that at a linear VAE's optimum the value is the log-likelihood, and no gradient is left."""
    vae = linear_vae()
    rows = next(iter(vae.problem.params.values())).shape[0]  # that the values are divided by
    values, grads = sample_gradients(c.loss(4), vae.problem, calls=40, seed=53)
    checks = [compare("linear VAE, value at its optimum", rows * values / vae.num_data, vae.optimum / vae.num_data)]
    worst = 0.0
    for grad in grads.values():
        per_call = grad.reshape(40, -1) / vae.num_data
        worst = max(worst, *(z_score(column, 0.0, 1e-6) for column in per_call.T))
    detail = f"largest of {sum(g.reshape(40, -1).shape[1] for g in grads.values())} z = {worst:.1f}"
    return [*checks, Check("linear VAE, no gradient at its optimum", worst < 5, detail, found=worst, expected=0.0)]


def reaches_optimum(c: Claims) -> list[Check]:
    """Train a linear VAE to the closed-form optimum; a step that does nothing stays more than a nat below."""
    vae = linear_vae()
    with forked_rng(), pyro.get_param_store().scope():
        torch.manual_seed(59)
        for name, value in vae.start.items():
            pyro.param(name, value.clone())
        svi = SVI(vae.problem.model, vae.problem.guide, ClippedAdam({"lr": 0.1, "lrd": 0.995}), c.loss(16))
        start = -float(svi.evaluate_loss()) / vae.num_data
        for _ in range(800):
            svi.step()
        trained = {name: pyro.param(name).detach().clone() for name in vae.start}
        values = torch.tensor([-float(svi.evaluate_loss()) for _ in range(50)], dtype=torch.float64) / vae.num_data
    best, mean = vae.optimum / vae.num_data, float(values.mean())
    error = float(values.std()) / math.sqrt(50)
    moved = max(float((trained[name] - vae.start[name]).abs().max()) for name in trained)
    held = abs(mean - best) < 5e-3 + 4 * error and moved > 0.1
    detail = f"{mean:.4f} nats a row after {start:.2f}, optimum {best:.4f}"
    return [Check("linear VAE, trained to its optimum", held, detail, found=mean, error=error, expected=best)]


def improves(c: Claims) -> list[Check]:
    """Train an encoder of a mixture with few and many particles; a step that does nothing stays above 0.5."""
    errors = {}
    for k in (2, 20):
        with forked_rng(), pyro.get_param_store().scope():
            torch.manual_seed(47)
            mixture = amortised_mixture()
            svi = SVI(mixture.model, mixture.guide, ClippedAdam({"lr": 0.01}), c.loss(k))
            for _ in range(1500):
                svi.step(mixture.sample(100))
            errors[k] = mixture.error()
    held = errors[20] < 0.15 and errors[20] < 0.8 * errors[2]
    detail = f"error {errors[2]:.3f} at K = 2, {errors[20]:.3f} at K = 20"
    return [Check("mixture improves with particles", held, detail, found=errors[20])]
