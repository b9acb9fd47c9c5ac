r"""The suite: which check belongs to which identity, to whom it applies, and what a loss's refusal means."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from pyro_elbo_ext.testing import discrete, exact, subsampled, trained
from pyro_elbo_ext.testing.measure import Check, Claims, MakeELBO

__all__ = ["IDENTITIES", "Check", "conformance"]

IDENTITIES = {
    "C1": "golden values and gradients",
    "C2": "whose gradient it is",
    "C3": "spread against particles",
    "C4": "guide at the posterior",
    "C5": "guide of two layers",
    "C6": "(b - 0.499)^2",
    "C7": "gap to the evidence",
    "C8": "minibatches, scales, masks",
    "C9": "plates",
    "C10": "bits, summed over all states",
    "C11": "linear VAE",
    "C12": "mixture under wake-sleep",
    "C13": "below the evidence",
}


class Job(NamedTuple):
    """A check and to whom it applies.

    Attributes:
        identity: ``"C1"`` to ``"C13"``.
        name: what is asked, should it not get to say so itself.
        run: returns the checks.
        missing: why it does not apply, or the empty string.
        refusable: a ValueError or NotImplementedError means that it does not apply.
    """

    identity: str
    name: str
    run: Callable[[Claims], list[Check]]
    missing: str = ""
    refusable: bool = False

    def checks(self, claims: Claims) -> list[Check]:
        """Run it; whatever a foreign loss raises is its result."""
        try:
            found = self.run(claims)
        except Exception as error:
            refused = self.refusable and isinstance(error, (ValueError, NotImplementedError))
            first = (str(error).splitlines() or [""])[0][:90]
            found = [Check(self.name, None if refused else False, f"{type(error).__name__}: {first}")]
        return [check._replace(identity=self.identity) for check in found]


def _jobs(c: Claims) -> list[Job]:
    def unless(holds: bool, why: str) -> str:
        return "" if holds else why

    known = unless(c.bound is not None, "the bound is neither claimed nor recognised")
    iwae = unless(c.bound == "iwae", "for the importance-weighted bound")
    graded = unless(c.gradient is not None, "no gradient claimed")
    own = unless(c.gradient == "bound", "the gradient is not claimed to be the bound's")
    path = graded or unless(not c.scored, "held to guides without a path instead")
    return [
        Job("C1", "golden values and gradients", exact.golden, known),
        Job("C2", "gradient is the value's", exact.gradient_of_value, own),
        Job("C2", "gradient's mean", exact.mean_recognised, iwae or graded),
        Job("C2", "guide without a path, gradient", exact.scored_gradient, known or graded, True),
        Job("C3", "slope of log sd in log K", exact.slope, unless(c.slope is not None, "no slope claimed")),
        Job("C4", "no drift at the posterior", exact.drift, graded),
        Job("C4", "no variance at the posterior", exact.landing, unless(c.zero_variance, "not claimed")),
        Job("C5", "two-layer guide", exact.hierarchy, path or (known and own)),
        Job("C6", "(b - 0.499)^2", discrete.rebar, own or unless(c.bound == "elbo", "for the ELBO"), True),
        Job("C7", "gap to the evidence", exact.gap, iwae),
        *_plate_jobs(graded),
        *_discrete_jobs(known, graded),
        Job("C11", "linear VAE at its optimum", trained.at_optimum),
        Job("C11", "linear VAE, trained", trained.reaches_optimum, unless(c.trains, "not asked for")),
        Job("C12", "mixture improves with particles", trained.improves, unless(c.improves, "a claim of wake-sleep's")),
        Job("C13", "value <= evidence", exact.below_evidence),
        Job("C13", "linear Gaussian, value <= evidence", exact.rises),
        Job("C13", "annealed importance sampling", exact.rises, "of pyro_elbo_ext.diagnostics: a loss has no chain"),
    ]


def _plate_jobs(graded: str) -> list[Job]:
    return [
        Job("C8", "minibatches", subsampled.subsampling),
        Job("C8", "scale of the user's own", subsampled.scaled, "", True),
        Job("C8", "rows masked", subsampled.masked, "", True),
        Job("C8", "nested plates", subsampled.nested, "", True),
        Job("C8", "looped as vectorised", subsampled.looped, "", True),
        Job("C8", "minibatch of 3 in 12, bits", subsampled.bits, "", True),
        Job("C9", "gradient of a row", subsampled.rows_of_normals, graded),
        Job("C9", "gradient of a row, bits", subsampled.rows_of_bits, graded, True),
        Job("C9", "guide that is joint over a plate", subsampled.joint, "", True),
    ]


def _discrete_jobs(known: str, graded: str) -> list[Job]:
    return [
        Job("C10", "belief network, summed over all states", discrete.belief, "", True),
        Job("C10", "one bit", discrete.toy, known or graded, True),
        Job("C10", "auxiliary site after a bit", discrete.auxiliary, "", True),
    ]


def conformance(
    make: MakeELBO,
    bound: str | None = None,
    gradient: str | None = "bound",
    zero_variance: bool = False,
    slope: tuple[float, float] | None = None,
    size: float = 1.0,
    scored: bool = False,
    improves: bool = False,
    min_particles: int = 1,
    trains: bool = False,
    only: Collection[str] | None = None,
    complete: bool = False,
) -> list[Check]:
    """Run a loss through the identities C1 to C13.

    Parameters, random state and settings are left as they were. What a loss refuses by a ValueError or a
    NotImplementedError does not apply to it, where an ELBO may refuse: bits, scales, masks, nested plates.

    A test of a class of your own takes five lines:

    >>> from pyro_elbo_ext.testing import conformance
    >>> def test_my_elbo_conforms(MyELBO):
    ...     checks = conformance(MyELBO, bound="iwae", size=0.1)
    ...     failed = [check for check in checks if check.passed is False]
    ...     assert not failed, failed
    >>> from pyro_elbo_ext import IWAE_ELBO
    >>> [check.identity for check in conformance(IWAE_ELBO, only=["C7"], bound="iwae", size=0.01) if check.passed]
    ['C7']

    Args:
        make: returns the loss for ``num_particles=K``.
        bound: ``"iwae"`` or ``"elbo"`` to hold values and gradients to that bound's; None for any.
        gradient: what the guide's gradient estimates: ``"bound"``, ``"rws"``, ``"iwae+rws"``, or None to leave it out.
        zero_variance: the gradient has no variance where the guide is the posterior.
        slope: interval for the slope of log sd against log K.
        size: factor on the number of replicates; 1 makes 10^6 draws a golden value.
        scored: hold the gradient to continuous problems whose guide is not to be reparameterised.
        improves: train a mixture's encoder, which gets better with particles under wake-sleep.
        min_particles: fewest particles that the loss takes.
        trains: train a linear VAE to its optimum.
        only: identities to run, all of them if None.
        complete: also return what does not apply to what is claimed, ``passed=None``, with the reason.

    Returns:
        The checks in the order of the identities, a failure of the loss itself among them.

    Raises:
        ValueError: an unknown bound, gradient or identity.
    """
    _check_names(bound, gradient, only)
    claims = Claims(
        make, bound, gradient, zero_variance, slope, scored, improves, min_particles, trains,
        max(int(50_000 * size), 200),
    )  # fmt: skip
    checks: list[Check] = []
    for job in _jobs(claims):
        if only is not None and job.identity not in only:
            continue
        if not job.missing:
            checks += job.checks(claims)
        elif complete:
            checks.append(Check(job.name, None, job.missing, job.identity))
    return checks


def _check_names(bound: str | None, gradient: str | None, only: Collection[str] | None) -> None:
    if bound not in (None, *discrete.BOUNDS):
        raise ValueError(f'bound must be "iwae", "elbo" or None, got {bound!r}')
    if gradient not in (None, "bound", "rws", "iwae+rws"):
        raise ValueError(f'gradient must be "bound", "rws", "iwae+rws" or None, got {gradient!r}')
    if bound == "elbo" and gradient not in (None, "bound"):
        raise ValueError(f'the gradient of an ELBO is "bound" or None, got {gradient!r}')
    unknown = [name for name in only or () if name not in IDENTITIES]
    if unknown:
        raise ValueError(f"identities are C1 to C13, got {', '.join(unknown)}")
