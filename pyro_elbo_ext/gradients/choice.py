"""What ``gradient=`` means: names of estimators, and which one a guide is given where none is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pyro_elbo_ext.gradients.pathwise import DoublyReparameterized, Estimator, Pathwise, StickingTheLanding
from pyro_elbo_ext.gradients.score import OVIS, VIMCO, Reinforce, Signal
from pyro_elbo_ext.sites import is_flow, is_reparameterized

__all__ = ["ESTIMATORS", "SIGNALS", "Choice", "Gradient", "choose", "parse_gradient"]

ELBO_ONLY = ("disarm", "double-cv", "rebar", "relax")
ESTIMATORS: dict[str, Estimator] = {e.name: e for e in (Pathwise(), StickingTheLanding(), DoublyReparameterized())}
SIGNALS: dict[str, Signal] = {s.name: s for s in (Reinforce(), VIMCO(), OVIS())}
Gradient = str | Estimator | Signal | tuple[str | Estimator, str | Signal]


class Choice(NamedTuple):
    """The estimators for a guide: one for its reparameterised sites, a signal for the others, why, and whether both."""

    estimator: Estimator
    signal: Signal | None
    reason: str
    mixed: bool = False

    @property
    def name(self) -> str:
        """What ``gradient=`` calls what is used."""
        if self.signal is None:
            return self.estimator.name
        return f"{self.estimator.name}+{self.signal.name}" if self.mixed else self.signal.name


def parse_gradient(gradient: Gradient) -> tuple[Estimator | None, Signal | None]:
    """Return the estimator and the signal that ``gradient=`` names; None for what it leaves to choose.

    Raises:
        ValueError: an unknown name, or two of a kind.
    """
    parts: Sequence[Any] = gradient.split("+") if isinstance(gradient, str) else (gradient,)
    if isinstance(gradient, tuple):
        parts = gradient
    found = [ESTIMATORS.get(part, SIGNALS.get(part)) if isinstance(part, str) else part for part in parts]
    if gradient == "auto":
        return None, None
    if any(part in ELBO_ONLY for part in parts if isinstance(part, str)):
        raise ValueError(
            f"gradient={gradient!r} estimates the ELBO's gradient and has no rule for this bound. Use "
            f'ScoreFunction_ELBO(gradient={gradient!r}), or gradient="vimco" here.'
        )
    estimators = [part for part in found if isinstance(part, Estimator)]
    signals = [part for part in found if isinstance(part, Signal)]
    if len(estimators) > 1 or len(signals) > 1 or len(estimators) + len(signals) != len(found):
        paths, scores = (", ".join(f'"{name}"' for name in names) for names in (ESTIMATORS, SIGNALS))
        raise ValueError(
            f'gradient must be one of "auto", {paths} (reparameterised sites), {scores} (others), one of each as in '
            f'"dreg+vimco", or such objects; got {gradient!r}'
        )
    return estimators[0] if estimators else None, signals[0] if signals else None


def choose(
    estimator: Estimator | None, signal: Signal | None, automatic: bool, several: bool, nodes: Mapping[str, Any]
) -> Choice:
    """Return what a guide's gradient is estimated by.

    Args:
        estimator: asked for at reparameterised sites, or None.
        signal: asked for at the others, or None.
        automatic: choose a signal too where one is needed.
        several: the bound is over more than one particle.
        nodes: the guide's random sites by name.
    """
    reparameterized = [name for name, node in nodes.items() if is_reparameterized(node)]
    flow = next((name for name in reparameterized if _is_slow(nodes[name]["fn"])), None)
    if signal is None and automatic:
        signal = SIGNALS["vimco" if several else "score"]
    unneeded = ""
    if len(reparameterized) == len(nodes):
        unneeded = f'; every site is reparameterised, so that "{signal.name}" is not needed' if signal else ""
        signal = None
    mixed = signal is not None and bool(reparameterized)
    if estimator is not None:
        return Choice(estimator, signal, f"asked for{unneeded}", mixed)
    name, reason = "dreg", "reparameterised sites, several particles: unbiased with the least variance"
    if nodes and not reparameterized:
        name, reason = "pathwise", "no site is reparameterised: nothing but the score"
    elif not several:
        name, reason = "pathwise", "one particle: the total derivative, as Pyro's Trace_ELBO"
    elif flow is not None:
        name, reason = "pathwise", f"'{flow}' is a flow, whose score or inverse may be slow or missing"
    return Choice(ESTIMATORS[name], signal, reason + ("" if automatic else unneeded), mixed)


def _is_slow(fn: Any) -> bool:
    """Tell whether a flow's density costs much more at a value held than at its own draw: not for coupling layers."""
    rounds = fn.score_rounds() if hasattr(fn, "score_rounds") else None
    return is_flow(fn) and (rounds is None or rounds > 2)
