"""Models with subsampled plates: a plated flow, trained on minibatches and not to be judged by weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import Trace_ELBO

from pyro_elbo_ext.autofit.result import AutofitReport, AutofitResult, Rung
from pyro_elbo_ext.diagnostics.verdict import Finding
from pyro_elbo_ext.guides.plated import AutoPlatedFlow
from pyro_elbo_ext.plates import plate_nesting

__all__ = ["fit_minibatch"]

RATES = (5e-3, 1e-3)
LATE = 0.2  # share of the last steps whose losses are averaged to compare fits
TEXT = (
    "some plates are subsampled, and the weights of a minibatch are not those of the posterior: nothing was judged. "
    "Ask diagnose(model, guide), or fit the full batch."
)


def fit_minibatch(
    model: Callable,
    args: tuple,
    kwargs: dict,
    num_steps: int,
    max_seconds: float,
    progress: Callable[[str], None] | None,
) -> AutofitResult:
    """Train an AutoPlatedFlow at several rates, and keep the one with the best ELBO at the end."""
    begun = time.monotonic()
    fits: list[tuple[float, Any]] = []
    rungs = []
    for rate in RATES:
        if fits and time.monotonic() - begun > max_seconds:
            break
        lap, guide = time.monotonic(), AutoPlatedFlow(model)
        guide.build(*args, **kwargs)
        bound = _train(model, guide, args, kwargs, rate, num_steps, begun + max_seconds)
        fits.append((bound, guide))
        rungs.append(Rung(f"plated (rate {rate})", bound, math.nan, math.nan, math.nan, 0, time.monotonic() - lap))
        if progress is not None:
            progress(f"{rungs[-1].name}: ELBO {bound:.2f}, {rungs[-1].seconds:.1f} s")
    best = max(range(len(fits)), key=lambda i: fits[i][0] if math.isfinite(fits[i][0]) else -math.inf)
    bound, guide = fits[best]
    report = AutofitReport(
        trusted=False,
        findings=(Finding("minibatch", 1, TEXT, sure=False),),
        rungs=tuple(rungs),
        chosen=rungs[best].name,
        k=math.nan,
        ess=math.nan,
        log_evidence=math.nan,
        restarts=tuple(fit[0] for fit in fits),
        size=sum(block.features for block in guide._blocks),
        seconds=time.monotonic() - begun,
    )
    return AutofitResult(guide, report)


def _train(
    model: Callable, guide: Any, args: tuple, kwargs: dict, rate: float, num_steps: int, deadline: float
) -> float:
    """Climb the ELBO by Adam, and return its mean over the last steps in nats."""
    elbo = Trace_ELBO(
        num_particles=8, vectorize_particles=True, max_plate_nesting=plate_nesting(model, guide, args, kwargs)
    )
    parameters = list(guide.parameters())
    optim = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, num_steps, 0.02 * rate)
    losses: list[float] = []
    for _ in range(num_steps):
        if losses and time.monotonic() > deadline:
            break
        loss = elbo.differentiable_loss(model, guide, *args, **kwargs)
        slopes = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for parameter, slope in zip(parameters, slopes, strict=True):
            parameter.grad = slope.nan_to_num(0.0, 0.0, 0.0)
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optim.step()
        schedule.step()
        losses.append(float(loss.detach()))
    late = losses[-max(1, int(LATE * len(losses))) :]
    return -sum(late) / len(late)
