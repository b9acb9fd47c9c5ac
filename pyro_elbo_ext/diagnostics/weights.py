r"""What a sample of importance weights says about itself: Pareto's k-hat, smoothed weights, effective sample size.

Log-weights are ``[num_samples, *rest]`` in nats; everything is taken along the first dimension, for each element of
the rest alone. A log-weight of ``-inf`` is a weight of zero.

References:
    Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao, Gabry, 2015, arXiv:1507.02646); Yes, but Did It
    Work?: Evaluating Variational Inference (Yao, Vehtari, Simpson, Gelman, 2018, arXiv:1802.02538).
"""

from __future__ import annotations

import math

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

__all__ = ["MIN_SAMPLES", "check_log_weights", "effective_sample_size", "good_k", "k_error", "pareto_k", "psis"]

MIN_SAMPLES = 25  # so that the tail, a fifth of the draws at most, has the five that a fit needs


def pareto_k(log_weights: Tensor) -> Tensor:
    r"""Return k-hat, the shape of the generalised Pareto distribution fitted to the largest weights.

    The tail holds the largest :math:`\min(S / 5, 3 \sqrt S)` weights. Weights have a finite variance for k < 1/2, and
    the cost of an estimate of given accuracy explodes beyond 0.7; compare with :func:`good_k`. Bounded weights have
    k <= 0. Where no fit is possible, for weights are equal within rounding or fewer than five exceed the tail's
    threshold, as with discrete latents: ``inf`` if these few carry more than a tenth of all, else ``-inf``, no tail.

    Args:
        log_weights: ``[num_samples, *rest]``, in nats.

    Returns:
        ``[*rest]``.

    Raises:
        ValueError: fewer than 25 draws, a log-weight that is NaN or +inf, or an element whose weights are all zero.
    """
    return psis(log_weights)[1]


def psis(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Replace the largest weights by quantiles of the Pareto distribution fitted to them.

    Args:
        log_weights: ``[num_samples, *rest]``, in nats.

    Returns:
        Smoothed log-weights ``[num_samples, *rest]``, normalised to sum to one over the draws and never above the
        largest raw one before that, and k-hat ``[*rest]`` as of :func:`pareto_k`.

    Raises:
        ValueError: as :func:`pareto_k` does.
    """
    check_log_weights(log_weights, MIN_SAMPLES)
    columns = log_weights.detach().double().cpu()  # the fit is scalar work in double precision
    columns = columns.reshape(columns.shape[0], -1)
    rounding = math.sqrt(torch.finfo(log_weights.dtype).eps)
    with torch.device("cpu"):  # Pyro's fit makes tensors on the default device
        done = [_smooth(column, rounding) for column in (columns - columns.amax(0)).unbind(1)]
    smoothed = torch.stack([column for column, _ in done], 1).reshape(log_weights.shape)
    smoothed = smoothed - smoothed.logsumexp(0)
    return smoothed.to(log_weights), torch.tensor([k for _, k in done]).reshape(log_weights.shape[1:]).to(log_weights)


def _smooth(log_w: Tensor, rounding: float) -> tuple[Tensor, float]:
    """Return one column's smoothed log-weights, relative to the largest, and its k-hat."""
    num = log_w.shape[0]
    tail_size = _tail_size(num)
    order = log_w.sort()
    cutoff = max(float(order.values[-tail_size - 1]), math.log(torch.finfo(log_w.dtype).tiny))
    first = int(torch.searchsorted(order.values, cutoff, right=True))
    if -cutoff < rounding:
        return log_w, -math.inf
    if num - first < 5:
        return log_w, math.inf if order.values[first:].exp().sum() > 0.1 * log_w.exp().sum() else -math.inf
    tail = math.exp(cutoff) * torch.expm1(order.values[first:] - cutoff)  # differences near zero keep their digits
    k, sigma = fit_generalized_pareto(tail)
    if not (math.isfinite(k) and math.isfinite(sigma) and sigma > 0):
        return log_w, math.inf
    levels = (torch.arange(num - first, dtype=log_w.dtype) + 0.5) / (num - first)
    quantiles = -torch.log1p(-levels) if abs(k) < 1e-12 else torch.expm1(-k * torch.log1p(-levels)) / k
    smoothed = torch.log(sigma * quantiles + math.exp(cutoff)).clamp(max=0.0)
    return log_w.index_copy(0, order.indices[first:], smoothed), k


def _tail_size(num_samples: int) -> int:
    return math.ceil(min(0.2 * num_samples, 3 * math.sqrt(num_samples)))


def k_error(k: float, num_samples: int) -> float:
    r"""Return about the standard error of k-hat, :math:`(1 + k) / \sqrt M` for a tail of M draws."""
    return (1 + max(k, 0.0)) / math.sqrt(_tail_size(num_samples))


def good_k(num_samples: int) -> float:
    r"""Return :math:`\min(1 - 1 / \log_{10} S, 0.7)`, the k-hat up to which S draws give an estimate worth its error.

    Raises:
        ValueError: fewer than two draws.
    """
    if num_samples < 2:
        raise ValueError(f"good_k needs num_samples >= 2, got {num_samples}")
    return min(1 - 1 / math.log10(num_samples), 0.7)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""Return :math:`1 / \sum_s w_s^2` of the normalised weights, between 1 and the number of draws.

    High also where the guide misses a part of the posterior that no draw has met: a low value condemns, a high one
    does not acquit.

    Args:
        log_weights: ``[num_samples, *rest]``, in nats.

    Returns:
        ``[*rest]``.

    Raises:
        ValueError: a log-weight is NaN or +inf, or an element's weights are all zero.
    """
    check_log_weights(log_weights)
    return torch.exp(-torch.logsumexp(2 * torch.log_softmax(log_weights, 0), 0))


def check_log_weights(log_weights: Tensor, min_samples: int = 1) -> None:
    """Refuse log-weights that no estimate can be made from.

    Raises:
        ValueError: too few draws, a log-weight that is NaN or +inf, or an element whose weights are all zero.
    """
    if log_weights.dim() == 0 or log_weights.shape[0] < min_samples:
        raise ValueError(
            f"expected log-weights of at least {min_samples} draws along the first dimension, got shape "
            f"{tuple(log_weights.shape)}: a tail has too few of them to be fitted. Raise num_samples."
        )
    bad = log_weights.isnan() | (log_weights == math.inf)
    if bad.any():
        index = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"log-weight {index} is {log_weights[index].item()}, and {int(bad.sum())} of {bad.numel()} are like it: "
            "look for an overflow, or a value outside the support, in model and guide."
        )
    empty = (log_weights == -math.inf).all(0)
    if empty.any():
        where = f" of element {tuple(empty.nonzero()[0].tolist())}" if empty.dim() else ""
        raise ValueError(
            f"all log-weights{where} are -inf: the model gives no draw of the guide any density. Look for a support "
            "that the guide misses."
        )
