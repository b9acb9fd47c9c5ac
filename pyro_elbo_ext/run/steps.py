"""Single steps of an SVI, seen from outside: what the loss and the gradient were, and whether they were finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import SVI
from pyro.infer.util import zero_grads
from torch import Tensor

from pyro_elbo_ext.elbo.base import NonFiniteError
from pyro_elbo_ext.run.compiled import CompiledSVI
from pyro_elbo_ext.tracing import forked_rng, run_pair

__all__ = ["Step", "Steps"]

POLICIES = ("raise", "skip")
MAX_SKIPPED = 100  # in a row, after which a run is given up
TRIES = 20  # runs of the pair in search of the site that is not finite


class Step(NamedTuple):
    """What one step did: loss in nats, Euclidean norm of the gradient, and whether it was skipped."""

    loss: float
    grad_norm: float
    skipped: bool


class Steps:
    """Takes an SVI's own steps, and leaves out those whose loss or gradient is not finite.

    While :meth:`watching`, the SVI's ``loss_and_grads`` is wrapped: ``svi.step`` itself is called, so that subclasses,
    and optimisers that look for it, see what they always do. A step is left out by taking the gradients away, without
    which Pyro's and torch's optimisers leave a parameter, and what they remember of it, alone.

    Args:
        svi: whose steps to take.
        nonfinite: ``"raise"`` an error that names what is not finite, or ``"skip"`` such a step.

    Attributes:
        num_skipped: how many steps were left out.
        in_a_row: how many of them since the last that was not.
        names: of the parameters that the loss has met.
        has_succeeded: a step has been finite.

    Raises:
        ValueError: another policy.
    """

    def __init__(self, svi: SVI, nonfinite: str = "raise") -> None:
        if nonfinite not in POLICIES:
            raise ValueError(f'nonfinite must be "raise" or "skip", got {nonfinite!r}')
        self.svi = svi
        self.nonfinite = nonfinite
        self.num_skipped = 0
        self.in_a_row = 0
        self.names: set[str] = set()
        self.has_succeeded = False
        self._seen = Step(math.nan, math.nan, False)
        self._watched = False  # the step under way

    @property
    def params(self) -> dict[str, Tensor]:
        """Unconstrained parameters by name, of those in the param store that the loss has met."""
        store = pyro.get_param_store()._params
        return {name: store[name] for name in sorted(self.names) if name in store}

    @property
    def tolerated(self) -> tuple[type[Exception], ...]:
        """Errors that stand for a loss that is not finite; under ``"skip"`` also those of Pyro's validation.

        Those are ValueErrors, as of a misuse, which is not passed over: it fails in the first step.
        """
        if self.nonfinite == "skip" and self.has_succeeded:
            return (NonFiniteError, ValueError, torch.linalg.LinAlgError)
        return (NonFiniteError,)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the SVI, and give it back as it was."""
        self._loss_and_grads = self.svi.loss_and_grads
        self.svi.loss_and_grads = self._watch
        try:
            yield
        finally:
            self.svi.loss_and_grads = self._loss_and_grads

    def take(self, args: tuple, kwargs: Mapping[str, Any]) -> Step:
        """Take one step.

        Raises:
            NonFiniteError: loss or gradient is not finite, or has not been for ``MAX_SKIPPED`` steps.
            TypeError: an SVI whose steps are taken without ``loss_and_grads``.
        """
        self._watched = False
        self.svi.step(*args, **kwargs)
        if not self._watched:
            raise TypeError(
                f"{type(self.svi).__name__}.step does not call loss_and_grads, where fit looks at loss and gradient: "
                "use pyro.infer.SVI, or a loop of one's own."
            )
        return self._account()

    def _account(self) -> Step:
        """Count the step that was watched, and return what was seen."""
        self.has_succeeded |= not self._seen.skipped
        self.in_a_row = self.in_a_row + 1 if self._seen.skipped else 0
        self.num_skipped += self._seen.skipped
        return self._seen

    def at_once(self, num: int) -> int:
        """Return how many of so many steps can be taken at once: one where they are not compiled, or may be skipped."""
        return num if isinstance(self.svi, CompiledSVI) and self.nonfinite == "raise" else 1

    def take_several(self, num: int, args: tuple, kwargs: Mapping[str, Any]) -> list[Step]:
        """Take compiled steps, which leave no gradient to look at: its norm is NaN.

        Raises:
            NonFiniteError: as :meth:`take`.
        """
        svi: Any = self.svi
        self._watched = False
        try:
            losses = svi.run(num, *args, **kwargs)
        except NonFiniteError:
            self.in_a_row += 1
            if self.nonfinite == "raise" or self.in_a_row >= MAX_SKIPPED:
                raise
            self.num_skipped += 1
            return [Step(math.nan, math.nan, True)]
        if svi.how == "eager" and self._watched:
            return [*(Step(float(loss), math.nan, False) for loss in losses[:-1]), self._account()]
        self.in_a_row, self.has_succeeded = 0, True
        self.names.update(svi.names)
        return [Step(float(loss), math.nan, False) for loss in losses]

    def _watch(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Any:
        with pyro.poutine.trace(param_only=True) as capture:
            error, loss = None, math.nan
            try:
                loss = self._loss_and_grads(model, guide, *args, **kwargs)
            except self.tolerated as raised:
                error = raised
        nodes: Mapping[str, Any] = capture.trace.nodes
        params = {name: nodes[name]["value"].unconstrained() for name in sorted(nodes)}
        self.names.update(params)
        value, norm = _number(loss), _norm(params.values())
        finite = math.isfinite(value) and math.isfinite(norm)
        self._seen, self._watched = Step(value, norm, not finite), True
        if not finite:
            self._refuse(params, error, args, kwargs)
            for p in params.values():
                p.grad = None
        return loss

    def _refuse(self, params: Mapping[str, Tensor], error: Exception | None, args: tuple, kwargs: Mapping) -> None:
        """Raise, unless this step may be skipped."""
        if self.nonfinite == "skip" and self.in_a_row + 1 < MAX_SKIPPED:
            return
        why = str(error) if error is not None else self._explain(params, args, kwargs)
        zero_grads(params.values())
        if self.nonfinite == "raise":
            raise NonFiniteError(f'{why} nonfinite="skip" leaves out single steps.') from error
        raise NonFiniteError(f"{MAX_SKIPPED} steps in a row were not finite. {why}") from error

    def _explain(self, params: Mapping[str, Tensor], args: tuple, kwargs: Mapping[str, Any]) -> str:
        bad = [name for name, p in params.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
        loss, norm, _ = self._seen
        found = [f"The loss is {loss} and the norm of its gradient {norm}; nothing was updated."]
        found += [text] if (text := _find_site(self.svi, args, kwargs)) else []
        found += [f"Gradients of {', '.join(map(repr, bad))} are not finite."] if bad else []
        return " ".join([*found, "Look for an overflow there, or take smaller steps;"])


def _number(loss: Any) -> float:
    """Return a loss as a number, the first where there are several, as of reweighted wake-sleep."""
    return float(loss[0] if isinstance(loss, tuple) else loss)


def _norm(params: Iterable[Tensor]) -> float:
    grads = [p.grad.detach() for p in params if p.grad is not None]
    if not grads:
        return 0.0
    norms = [torch.linalg.vector_norm(grad) for grad in grads]
    return float(torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms])))


@torch.no_grad()
def _find_site(svi: SVI, args: tuple, kwargs: Mapping[str, Any]) -> str:
    """Run the pair anew until a site is not finite, and name it."""
    for name, value in pyro.get_param_store().items():
        if not torch.isfinite(value).all():
            return f"Parameter '{name}' is not finite."
    with suppress(Exception), forked_rng(), pyro.validation_enabled(False), pyro.poutine.block():  # an explanation only
        for _ in range(TRIES):
            traces = run_pair(svi.model, svi.guide, args, dict(kwargs))
            for origin, trace in (("guide", traces.guide), ("model", traces.model)):
                for name, site in trace.nodes.items():
                    if site["type"] == "sample" and not torch.isfinite(site["fn"].log_prob(site["value"])).all():
                        return f"Drawn again, {origin} site '{name}' has a log-density that is not finite."
    return ""
