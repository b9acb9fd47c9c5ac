"""Finds out from values which bound a loss is, and from gradients what they estimate."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pyro_elbo_ext.testing.measure import MakeELBO, sample_gradients, z_score
from pyro_elbo_ext.testing.problems import GOLDEN_GRADIENT, GOLDEN_IWAE, conjugate_normal

__all__ = ["Recognised", "recognise"]


class Recognised(NamedTuple):
    """What a loss was seen to be.

    Attributes:
        bound: ``"iwae"``, ``"elbo"`` or None.
        gradient: ``"bound"``, ``"rws"`` or ``"iwae+rws"``; ``"bound"`` too where it fits none, to be held to that.
        min_particles: fewest particles, of 1 to 4, that it takes.
        values: mean value by number of particles, in nats.
    """

    bound: str | None
    gradient: str
    min_particles: int
    values: dict[int, float]


def recognise(make: MakeELBO, size: float = 0.2, scored: bool = False) -> Recognised:
    """Return which bound a loss is: IWAE if its values and the golden ones agree at K = 2 and 4, or the ELBO.

    Args:
        make: returns the loss for ``num_particles=K``.
        size: factor on the number of replicates.
        scored: look at the gradient where the guide is not to be reparameterised.

    Raises:
        Exception: what the loss raises with four particles on a normal model.
    """
    replicates = max(int(50_000 * size), 200)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for k in (4, 2, 1):
        try:
            problem = conjugate_normal(replicates, scored=scored)
            values, grads = sample_gradients(make(num_particles=k), problem, calls=20, seed=113 + k)
        except (ValueError, NotImplementedError):
            if k == 4:
                raise
            continue
        found[k] = values, grads["m"]
    pairs = [found[k] + (k,) for k in found if k > 1]
    bound, gradient = None, "bound"
    if all(z_score(values, GOLDEN_IWAE[k], 1e-6) < 4.5 for values, _, k in pairs):
        bound = "iwae"
        kinds = {"bound": "iwae", "rws": "rws", "iwae+rws": "iwae+rws"}
        fits = (
            name
            for name, kind in kinds.items()
            if all(z_score(grads, GOLDEN_GRADIENT[kind][k], 1e-6) < 4.5 for _, grads, k in pairs)
        )
        gradient = next(fits, "bound")
    elif all(z_score(values, GOLDEN_IWAE[1], 1e-6) < 4.5 for values, _, _ in pairs):
        bound = "elbo"
    means = {k: float(values.mean()) for k, (values, _) in sorted(found.items())}
    return Recognised(bound, gradient, min(found), means)
