"""A sigmoid belief network with two stochastic layers, and the handwritten digits it learns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

PIXELS, BATCH = 64, 100


class Digits(NamedTuple):
    """Binary images, ``[images, pixels]``."""

    train: Tensor
    test: Tensor

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Yield minibatches without end; a last, smaller one of an epoch is left out.

        Pyro's decaying average has one slot for each position in the minibatch and raises on one of another size.
        """
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train), generator=generator).to(self.train.device)
            yield from (self.train[rows] for rows in order.split(BATCH) if len(rows) == BATCH)


def load(device: str) -> Digits:
    """Return scikit-learn's 1797 digits, 1 from half of the largest grey level upwards, a random 80 % to train on."""
    images = torch.as_tensor(load_digits().data, dtype=torch.get_default_dtype())
    images = (images >= images.max() / 2).to(images.dtype)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    cut = 4 * len(images) // 5
    return Digits(images[order[:cut]].to(device), images[order[cut:]].to(device))


def bernoulli(logits: Tensor) -> dist.Distribution:
    """Return independent bits."""
    return dist.Bernoulli(logits=logits).to_event(1)


class BeliefNetwork(nn.Module):
    """The pair of model and guide, linear between the layers.

    Model: ``z2 ~ Bernoulli(sigmoid(b))``, ``z1 | z2`` and ``x | z1`` the same with an affine map. The guide goes up
    from x to z1 to z2.

    Args:
        widths: bits of z1 and z2.
        infer: ``infer=`` of the guide's sites, Pyro's place for a site's baseline.
    """

    def __init__(self, widths: tuple[int, int], infer: dict[str, Any] | None = None) -> None:
        super().__init__()
        first, second = widths
        self.down = nn.ModuleDict({"z1": nn.Linear(second, first), "x": nn.Linear(first, PIXELS)})
        self.down.register_parameter("z2", nn.Parameter(torch.zeros(second)))
        self.up = nn.ModuleDict({"z1": nn.Linear(PIXELS, first), "z2": nn.Linear(first, second)})
        self.infer = infer or {}

    def model(self, x: Tensor) -> None:
        """Sample from p(x, z1, z2)."""
        pyro.module("down", self.down)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", bernoulli(self.down.z2))
            z1 = pyro.sample("z1", bernoulli(self.down["z1"](z2)))
            pyro.sample("x", bernoulli(self.down["x"](z1)), obs=x)

    def guide(self, x: Tensor) -> None:
        """Sample from q(z1, z2 | x)."""
        pyro.module("up", self.up)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", bernoulli(self.up["z1"](x)), infer=self.infer)
            pyro.sample("z2", bernoulli(self.up["z2"](z1)), infer=self.infer)

    @torch.no_grad()
    def bound(self, x: Tensor, num_particles: int) -> float:
        """Return the ELBO in nats per image, without an ELBO class; the same random numbers at every call."""
        generator = torch.Generator(x.device).manual_seed(0)
        q1 = bernoulli(self.up["z1"](x).expand(num_particles, -1, -1))
        z1 = torch.bernoulli(q1.mean, generator=generator)
        q2 = bernoulli(self.up["z2"](z1))
        z2 = torch.bernoulli(q2.mean, generator=generator)
        joint = bernoulli(self.down.z2).log_prob(z2) + bernoulli(self.down["z1"](z2)).log_prob(z1)
        joint = joint + bernoulli(self.down["x"](z1)).log_prob(x)
        return float((joint - q1.log_prob(z1) - q2.log_prob(z2)).mean())
