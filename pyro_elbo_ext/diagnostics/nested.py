r"""k-hat of each plate element's own latents, the latents outside the plate given.

One joint weight over N data has a tail that grows with N however good the guide is for each of them. Where latents
:math:`\theta` outside a plate tie its elements together, the elements are apart once these are given: for some draws
:math:`\theta_j` of the guide, S draws of each element's latents weigh
:math:`\log p(x_i, z_i | \theta_j) - \log q(z_i | \theta_j)`.

Nothing of the machinery is special to this: the model is conditioned on :math:`\theta_j`, the guide holds it and hides
it, and what is left is a pair of which the plate is common to all random sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_elbo_ext.diagnostics.sampling import posterior_draws, seeded
from pyro_elbo_ext.diagnostics.weights import good_k, pareto_k
from pyro_elbo_ext.plates import plate_nesting
from pyro_elbo_ext.sites import is_leaf, vectorized_plates
from pyro_elbo_ext.tracing import Hold, Traces, run_pair

__all__ = ["LocalTails", "candidate_plates", "local_k", "pair_given"]


@dataclass(frozen=True)
class LocalTails:
    """k-hat per element of some plates.

    Attributes:
        plates: their names, from left to right.
        given: for each draw of the latents outside the plates, ``[num_globals, *plates]``; one row where there are
            none outside.
        num_samples: draws behind each.
    """

    plates: tuple[str, ...]
    given: Tensor
    num_samples: int

    @property
    def k(self) -> Tensor:
        """k-hat ``[*plates]``: the median over the draws of the latents outside.

        The median speaks of a typical draw. A largest value would mostly report the noise of single fits, whose
        standard error is about 0.1 at 1000 draws.
        """
        return self.given.median(0).values

    @property
    def share_above(self) -> float:
        """The share of elements whose k-hat is above what :func:`good_k` allows."""
        return float((self.k > good_k(self.num_samples)).double().mean())


def candidate_plates(traces: Traces) -> dict[str, list[str]]:
    """Return the plates with random guide sites inside, and the names of these, those with most first."""
    inside: dict[str, list[str]] = {}
    for name, node in traces.guide.nodes.items():
        for plate in vectorized_plates(node) if node["type"] == "sample" and is_leaf(node) else ():
            inside.setdefault(plate, []).append(name)
    return dict(sorted(inside.items(), key=lambda item: -len(item[1])))


def pair_given(model: Callable, guide: Callable, traces: Traces, plate: str) -> tuple[Callable, Callable]:
    """Return the pair given what the guide drew outside a plate in one run, minibatch included."""
    nodes = {
        name: node
        for name, node in traces.guide.nodes.items()
        if node["type"] == "sample" and plate not in vectorized_plates(node) and name not in traces.indices
    }
    held = {name: node["value"].detach() for name, node in nodes.items()}
    latents = {n: v for n, v in held.items() if n in traces.model.nodes and not traces.model.nodes[n]["is_observed"]}

    def model_given(*args: Any, **kwargs: Any) -> Any:
        with Hold(traces.indices), poutine.condition(data=latents):
            return model(*args, **kwargs)

    def guide_given(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(poutine.block(hide=list(held)))
            stack.enter_context(Hold({**held, **traces.indices}))
            return guide(*args, **kwargs)

    return model_given, guide_given


@torch.no_grad()
def local_k(
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 500,
    num_globals: int = 5,
    *,
    plate: str | None = None,
    chunk_size: int = 100,
    seed: int | None = None,
) -> LocalTails:
    """Return k-hat of each plate element's latents, those outside the plate given.

    It speaks of the guide's conditional: a guide that draws local latents without looking at the global ones is
    measured at single values of these. A minibatch is looked at as it comes, and no scale enters.

    Args:
        model: a Pyro model.
        guide: its guide.
        args: their positional arguments.
        kwargs: their keyword arguments.
        num_samples: draws S of the local latents.
        num_globals: draws of the latents outside the plate.
        plate: its name, or None for the one that holds most of the guide's random sites.
        chunk_size: draws made in one run.
        seed: of these draws alone; by default they use the global random state.

    Raises:
        ValueError: no random guide site inside the plate, as in a guide that draws all latents at once; elements that
            are not independent given what is outside; or a guide built as an effect handler.
    """
    kwargs = dict(kwargs or {})
    if isinstance(poutine.unwrap(guide), poutine.guide.GuideMessenger):
        raise ValueError(
            f"{type(guide).__name__} is an effect handler that runs the model itself: its global sites cannot be held "
            "while the local ones are drawn anew. Use the AutoGuide of the same family."
        )
    nesting = plate_nesting(model, guide, args, kwargs)
    given = []
    plates: tuple[str, ...] = ()
    held: dict[str, Tensor] = {}
    with seeded(seed):
        for _ in range(num_globals):
            traces = run_pair(model, guide, args, kwargs, held)
            plate = plate or _first_candidate(traces)
            held = traces.indices  # one minibatch for all
            _check_inside(traces, plate)
            pair = pair_given(model, guide, traces, plate)
            draws = posterior_draws(*pair, args, kwargs, num_samples, chunk_size=chunk_size, max_plate_nesting=nesting)
            if plate not in draws.plates:
                raise ValueError(
                    f"the elements of plate '{plate}' are not independent given the latents outside it: a site outside "
                    "depends on a value inside. They have no weights of their own."
                )
            plates = draws.plates
            given.append(pareto_k(draws.log_weight))
            if not _has_globals(traces, plate):
                break
    return LocalTails(plates, torch.stack(given), num_samples)


def _first_candidate(traces: Traces) -> str:
    candidates = candidate_plates(traces)
    if not candidates:
        raise ValueError(
            "no random site of the guide is inside a plate: it draws all latents at once, as AutoDiagonalNormal does, "
            "or there are no local ones. AutoNormal or AutoPlatedFlow draw them plate by plate."
        )
    return next(iter(candidates))


def _check_inside(traces: Traces, plate: str) -> None:
    candidates = candidate_plates(traces)
    if plate not in candidates:
        raise ValueError(
            f"no random site of the guide is inside plate '{plate}'; plates with such sites: {sorted(candidates)}."
        )


def _has_globals(traces: Traces, plate: str) -> bool:
    return any(
        node["type"] == "sample" and is_leaf(node) and plate not in vectorized_plates(node)
        for node in traces.guide.nodes.values()
    )
