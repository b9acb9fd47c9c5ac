"""NumPyro's ELBO classes under the identities that have a small program there; ``conformance.py`` prints the table.

NumPyro's programs are not Pyro's, so what is ported are the conjugate normal (C1, C4, C13), many normals on minibatches
(C8) and one bit (C10). Every number is the mean over independent keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import torch
from jax import numpy as jnp
from numpyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from pyro_elbo_ext.bounds import ELBO, IWAE
from pyro_elbo_ext.testing import (
    GOLDEN_GRADIENT,
    GOLDEN_IWAE,
    IDENTITIES,
    LOG_EVIDENCE,
    TOY_STATES,
    Check,
    bernoulli_toy,
    enumerated_gradient,
)
from pyro_elbo_ext.testing.measure import agree, compare

__all__ = ["columns"]

CLASSES: dict[str, tuple[Callable[[int], Any], str | None]] = {
    "Trace": (lambda k: Trace_ELBO(num_particles=k), "elbo"),
    "TraceGraph": (lambda k: TraceGraph_ELBO(num_particles=k), "elbo"),
    "TraceMeanField": (lambda k: TraceMeanField_ELBO(num_particles=k), "elbo"),
    "Renyi(0)": (lambda k: RenyiELBO(alpha=0, num_particles=k), "iwae"),
    "Renyi(0.5)": (lambda k: RenyiELBO(alpha=0.5, num_particles=k), None),
}
DATA = jnp.linspace(-1.5, 2.5, 20)


def normal_model() -> None:
    """Draw z ~ N(0, 1), x ~ N(z, 1), x = 1.5."""
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.sample("x", dist.Normal(z, 1.0), obs=1.5)


def normal_guide() -> None:
    """Draw z ~ N(m, s)."""
    numpyro.sample("z", dist.Normal(numpyro.param("m", 0.2), numpyro.param("s", 0.9)))


def many_model(batch: int) -> None:
    """Draw z_i ~ N(0, 1), x_i ~ N(z_i, 1) on a minibatch of 20."""
    with numpyro.plate("data", 20, subsample_size=batch) as rows:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=DATA[rows])


def many_guide(batch: int) -> None:
    """Draw z_i ~ N(m, s) on a minibatch of 20."""
    m, s = numpyro.param("m", 0.1), numpyro.param("s", 0.8)
    with numpyro.plate("data", 20, subsample_size=batch):
        numpyro.sample("z", dist.Normal(m, s))


def bit_model() -> None:
    """Draw d ~ Bernoulli(1/2), x ~ N(2 d, 1), x = 2."""
    d = numpyro.sample("d", dist.Bernoulli(0.5))
    numpyro.sample("x", dist.Normal(2.0 * d, 1.0), obs=2.0)


def bit_guide() -> None:
    """Draw d ~ Bernoulli of a logit."""
    numpyro.sample("d", dist.Bernoulli(logits=numpyro.param("logit", 0.3)))


def draw(
    elbo: Any, pair: tuple[Callable, Callable], params: dict[str, float], size: int, *args: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return the value and the gradients of an objective, ``[size]`` of each."""

    def objective(values: dict[str, Any], key: Any) -> Any:
        return -elbo.loss(key, values, *pair, *args)

    run = jax.jit(jax.vmap(jax.value_and_grad(objective), in_axes=(None, 0)))
    values, grads = run(
        {name: jnp.asarray(value) for name, value in params.items()}, jax.random.split(jax.random.key(seed), size)
    )
    return {name: torch.tensor(np.asarray(t), dtype=torch.float64) for name, t in {"value": values, **grads}.items()}


def normal_rows(make: Callable[[int], Any], bound: str | None, size: int) -> list[Check]:
    """Return the rows of the conjugate normal."""
    pair, rows = (normal_model, normal_guide), []
    for k in (1, 2, 4) if bound else ():
        found, known = draw(make(k), pair, {"m": 0.2, "s": 0.9}, size, seed=k), 1 if bound == "elbo" else k
        rows.append(compare(f"golden value, K = {k}", found["value"], GOLDEN_IWAE[known]))
        exact = GOLDEN_GRADIENT["iwae"][known]
        rows.append(compare(f"golden gradient in the mean, K = {k}", found["m"], exact))
    rows = [row._replace(identity="C1") for row in rows]
    posterior = draw(make(4), pair, {"m": 0.75, "s": math.sqrt(0.5)}, size, seed=5)
    rows += [
        compare(f"no drift at the posterior, {name}", posterior[name], 0.0)._replace(identity="C4") for name in "ms"
    ]
    value = draw(make(4), pair, {"m": 0.2, "s": 0.9}, size, seed=6)["value"]
    mean, error = float(value.mean()), float(value.std()) / math.sqrt(size)
    detail = f"{mean:.4f} +- {error:.4f}, evidence {LOG_EVIDENCE:.4f}"
    held = mean < LOG_EVIDENCE + 4 * error
    return [*rows, Check("value <= evidence", held, detail, "C13", mean, error, LOG_EVIDENCE)]


def minibatch_rows(make: Callable[[int], Any], size: int) -> list[Check]:
    """Return the rows of many normals."""
    pair, params, rows = (many_model, many_guide), {"m": 0.1, "s": 0.8}, []
    whole = draw(make(8), pair, params, size, 20, seed=7)
    for batch in (4, 1):
        part = draw(make(8), pair, params, size, batch, seed=7 + batch)
        rows += [agree(f"minibatch of {batch} in 20, {name}", part[name], whole[name]) for name in whole]
    return [row._replace(identity="C8") for row in rows]


def bit_rows(make: Callable[[int], Any], bound: str | None, size: int) -> list[Check]:
    """Return the rows of one bit."""
    rows = []
    for k in (2, 4) if bound else ():
        exact = enumerated_gradient(bernoulli_toy, TOY_STATES, ELBO() if bound == "elbo" else IWAE(), k)
        found = draw(make(k), (bit_model, bit_guide), {"logit": 0.3}, size, seed=31 + k)
        rows.append(compare(f"one bit, value, K = {k}", found["value"], exact[0]))
        rows.append(compare(f"one bit, gradient, K = {k}", found["logit"], exact[1]["logit"]))
    return [row._replace(identity="C10") for row in rows]


def attempt(identity: str, job: Callable[[], list[Check]]) -> list[Check]:
    """Run some rows; what NumPyro refuses does not apply."""
    try:
        return job()
    except (ValueError, NotImplementedError, AssertionError) as error:
        return [
            Check(IDENTITIES[identity], None, f"{type(error).__name__}: {str(error).splitlines()[0][:90]}", identity)
        ]


def columns(size: float, quick: bool = False) -> dict[str, list[Check]]:
    """Return the rows of every class, or of two of them, at a factor on the number of draws."""
    numpyro.enable_x64()
    draws, found = max(int(200_000 * size), 4_000), {}
    for name, (make, bound) in CLASSES.items():
        if quick and name not in ("Trace", "Renyi(0)"):
            continue
        rows = attempt("C1", lambda make=make, bound=bound: normal_rows(make, bound, draws))
        rows += attempt("C8", lambda make=make: minibatch_rows(make, draws // 4))
        rows += attempt("C10", lambda make=make, bound=bound: bit_rows(make, bound, draws))
        ran = {row.identity for row in rows}
        missing = [
            Check(what, None, "not ported to NumPyro", key) for key, what in IDENTITIES.items() if key not in ran
        ]
        found[f"{name}"] = rows + missing
    return found
