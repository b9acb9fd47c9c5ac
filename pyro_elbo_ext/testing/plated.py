"""Model/guide pairs with plates, and what they are known by: evidence, or the same pair written another way."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from pyro_elbo_ext.testing.problems import Problem, full

__all__ = [
    "equal_normals",
    "equal_rows",
    "grouped_normals",
    "joint_guide",
    "many_bits",
    "many_normals",
    "masked_normals",
    "nested_normals",
]


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
    return Problem(model, guide, {"m": full(replicates, 0.1), "s": full(replicates, 0.8)}), evidence


def masked_normals(replicates: int, mask: bool, num_data: int = 12) -> Problem:
    """Return :func:`many_normals` with every second row masked in model and guide, or left out.

    Model and guide take the size of the minibatch. With and without the mask, value and gradients are equal.
    """
    rows_kept = torch.arange(num_data) % 2 == 0
    data = torch.linspace(0.5, 1.5, num_data, dtype=torch.float64)
    data = data if mask else data[rows_kept]

    def masked(rows: Any) -> Any:
        return poutine.mask(mask=rows_kept[rows] if mask else torch.ones(len(rows), dtype=torch.bool))  # type: ignore[call-overload]

    def model(batch: int) -> None:
        plates = pyro.plate("replicates", replicates, dim=-2), pyro.plate("data", len(data), batch, dim=-1)
        with plates[0], plates[1] as rows, masked(rows):
            z = pyro.sample("z", dist.Normal(data.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[rows].expand(replicates, -1))

    def guide(batch: int) -> None:
        m, s = pyro.param("m").unsqueeze(-1), pyro.param("s").unsqueeze(-1)
        plates = pyro.plate("replicates", replicates, dim=-2), pyro.plate("data", len(data), batch, dim=-1)
        with plates[0], plates[1] as rows, masked(rows):
            pyro.sample("z", dist.Normal(m, s))

    return Problem(model, guide, {"m": full(replicates, 0.1), "s": full(replicates, 0.8)})


def nested_normals(replicates: int) -> tuple[Problem, float]:
    """Return z_gi ~ N(0, 1), x_gi ~ N(z_gi, 1) in a plate within a plate, and the log evidence.

    Model and guide take the sizes of the minibatches, of 4 groups and of 5 rows; both scale.
    """
    data = torch.linspace(0.5, 1.5, 20, dtype=torch.float64).reshape(4, 5)

    def plates(groups: int, rows: int) -> tuple[pyro.plate, ...]:
        sizes = ("replicates", replicates, None, -3), ("groups", 4, groups, -2), ("rows", 5, rows, -1)
        return tuple(pyro.plate(name, size, batch, dim=dim) for name, size, batch, dim in sizes)

    def model(groups: int, rows: int) -> None:
        outer, middle, inner = plates(groups, rows)
        with outer, middle as g, inner as i:
            z = pyro.sample("z", dist.Normal(data.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[g][:, i].expand(replicates, -1, -1))

    def guide(groups: int, rows: int) -> None:
        m, s = pyro.param("m")[:, None, None], pyro.param("s")[:, None, None]
        outer, middle, inner = plates(groups, rows)
        with outer, middle, inner:
            pyro.sample("z", dist.Normal(m, s))

    evidence = float(dist.Normal(torch.zeros_like(data), math.sqrt(2)).log_prob(data).sum())
    return Problem(model, guide, {"m": full(replicates, 0.1), "s": full(replicates, 0.8)}), evidence


def grouped_normals(replicates: int) -> tuple[Problem, float]:
    """Return u_g ~ N(0, 1), x_gi ~ N(u_g, 1), one latent for each of 4 groups of 3 rows, and the log evidence.

    Model and guide take the size of the minibatch of groups: the weight is a group's.
    """
    data = torch.linspace(0.0, 1.0, 12, dtype=torch.float64).reshape(4, 3)

    def plates(groups: int) -> tuple[pyro.plate, pyro.plate]:
        return pyro.plate("replicates", replicates, dim=-3), pyro.plate("groups", 4, groups, dim=-2)

    def model(groups: int) -> None:
        outer, middle = plates(groups)
        with outer, middle as g:
            u = pyro.sample("u", dist.Normal(data.new_zeros(()), 1.0))
            with pyro.plate("rows", 3, dim=-1):
                pyro.sample("x", dist.Normal(u, 1.0), obs=data[g].expand(replicates, -1, -1))

    def guide(groups: int) -> None:
        m, s = pyro.param("m")[:, None, None], pyro.param("s")[:, None, None]
        outer, middle = plates(groups)
        with outer, middle:
            pyro.sample("u", dist.Normal(m, s))

    covariance = torch.eye(3, dtype=torch.float64) + 1
    evidence = dist.MultivariateNormal(data.new_zeros(3), covariance).log_prob(data).sum()
    return Problem(model, guide, {"m": full(replicates, 0.4), "s": full(replicates, 0.6)}), float(evidence)


def joint_guide(replicates: int) -> tuple[Problem, float, float]:
    """Return 4 rows z_i ~ N(0, 1), x_i ~ N(z_i, 1) under a guide that draws them jointly, evidence and ELBO.

    The guide's auxiliary site lies outside the model's plate, as those of ``AutoDiagonalNormal`` and of flows do.
    """
    data = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    scale = 0.9

    def model() -> None:
        with pyro.plate("replicates", replicates, dim=-2), pyro.plate("data", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(data.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data.expand(replicates, -1))

    def guide() -> None:
        m = pyro.param("m").reshape(-1, 1, 1).expand(-1, 1, 4)
        with pyro.plate("replicates", replicates, dim=-2):
            u = pyro.sample("u", dist.Normal(m, scale).to_event(1), infer={"is_auxiliary": True})
            with pyro.plate("data", 4, dim=-1):
                pyro.sample("z", dist.Delta(u.squeeze(-2)))

    evidence = float(dist.Normal(torch.zeros_like(data), math.sqrt(2)).log_prob(data).sum())
    posterior, q = dist.Normal(data / 2, math.sqrt(0.5)), dist.Normal(data.new_full((4,), 0.3), scale)
    gap = float(torch.distributions.kl_divergence(q, posterior).sum())
    return Problem(model, guide, {"m": full(replicates, 0.3)}), evidence, evidence - gap


def equal_rows(replicates: int, num_data: int, logit: float = 0.3) -> Problem:
    """Return :func:`bernoulli_toy` in a plate of equal rows, all under one logit a replicate."""
    observed = full(replicates, 2.0).unsqueeze(-1).expand(-1, num_data)

    def model() -> None:
        with pyro.plate("replicates", replicates, dim=-2), pyro.plate("data", num_data, dim=-1):
            d = pyro.sample("d", dist.Bernoulli(observed.new_full((), 0.5)))
            pyro.sample("x", dist.Normal(2 * d, 1.0), obs=observed)

    def guide() -> None:
        logit = pyro.param("logit").unsqueeze(-1)
        with pyro.plate("replicates", replicates, dim=-2), pyro.plate("data", num_data, dim=-1):
            pyro.sample("d", dist.Bernoulli(logits=logit))

    return Problem(model, guide, {"logit": full(replicates, logit)})


def equal_normals(replicates: int, num_data: int) -> Problem:
    """Return :func:`~pyro_elbo_ext.testing.conjugate_normal` in a plate of equal rows, under one mean a replicate."""
    observed = full(replicates, 1.5).unsqueeze(-1).expand(-1, num_data)

    def model() -> None:
        with pyro.plate("replicates", replicates, dim=-2), pyro.plate("data", num_data, dim=-1):
            z = pyro.sample("z", dist.Normal(observed.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=observed)

    def guide() -> None:
        m = pyro.param("m").unsqueeze(-1)
        with pyro.plate("replicates", replicates, dim=-2), pyro.plate("data", num_data, dim=-1):
            pyro.sample("z", dist.Normal(m, 0.9))

    return Problem(model, guide, {"m": full(replicates, 0.2)})


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
    return Problem(model, guide, {"slope": full(replicates, 0.7), "offset": full(replicates, -0.4)}), evidence
