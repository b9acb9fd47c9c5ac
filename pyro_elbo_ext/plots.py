r"""Plots of a fit and of what it is worth: traces, bounds, signal-to-noise, k-hat, posteriors, images.

Every function takes ``ax=`` (or ``axes=``) to draw into, makes a figure of its own where none is given, and returns
what it drew into, from which ``ax.figure.savefig("file.png")`` writes a file. No function touches ``pyplot`` or
``rcParams``, so nothing has to be closed and a user's style stays. Needs matplotlib:
``pip install pyro-elbo-ext[viz]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_elbo_ext.diagnostics.weights import good_k
from pyro_elbo_ext.export.chains import histories

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_bounds",
    "plot_khat",
    "plot_pairs",
    "plot_reconstructions",
    "plot_snr",
    "plot_trace",
    "plot_traversals",
]

# Okabe and Ito's colours, told apart by colour-blind readers, in print and in black and white by their markers.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "os^Dv*P"
GREY = "0.45"
LINES = 0.3  # grey between images


def plot_trace(history: Any, window: int | None = None, ax: Axes | None = None) -> Axes:
    """Draw the bound of every step, its running mean with standard error, and where stages begin.

    The vertical range shows the last nine tenths of the steps: what happens first is mostly far below. The standard
    error counts the steps of a window as independent, so a trend inside the window widens it.

    Args:
        history: mapping with ``loss`` in nats per step and, if there is one, ``stage``; or an object whose attribute
            ``history`` is one, such as the result of ``fit``.
        window: steps of the running mean; by default a fiftieth of all, but at least 10.
        ax: where to draw.

    Raises:
        ValueError: the history has no losses, or columns of different lengths.
    """
    columns = _history(history)
    bound = -columns["loss"]
    window = min(len(bound), max(10, len(bound) // 50) if window is None else window)
    mean, error = _running(bound, window)
    steps = np.arange(1, len(bound) + 1)
    ax = _axes(ax)
    ax.plot(steps, bound, color=COLOURS[0], alpha=0.25, linewidth=0.7, label="each step")
    smooth = steps[window - 1 :]
    ax.fill_between(smooth, mean - error, mean + error, color=COLOURS[1], alpha=0.35, linewidth=0)
    ax.plot(smooth, mean, color=COLOURS[1], label=f"mean of {window} steps ± standard error")
    stage = columns.get("stage", np.zeros(0))
    for i, start in enumerate(np.flatnonzero(np.diff(stage)) + 1):
        ax.axvline(start + 0.5, color=GREY, linestyle=":", linewidth=1.2, label=None if i else "new stage")
    late = bound[len(bound) // 10 :]
    low, high = np.nanquantile(late[np.isfinite(late)], (0.005, 0.995)) if np.isfinite(late).any() else (0.0, 1.0)
    margin = 0.08 * (high - low) or 1.0
    ax.set(ylim=(low - margin, high + margin), xlabel="step", ylabel="bound (nats)", title="Training")
    return _finish(ax, legend="lower right")


def plot_bounds(
    num_particles: Sequence[int] | Tensor,
    bounds: Any,
    se: Any = None,
    evidence: float | tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw bounds on the log-evidence against the number of particles K.

    Args:
        num_particles: the K of each value.
        bounds: in nats, one value for each K; or a mapping of several such curves by label.
        se: their standard errors, of the same form.
        evidence: the log-evidence in nats where it is known, or a lower and an upper bound on it.
        ax: where to draw.

    Raises:
        ValueError: a curve has not one value for each K.
    """
    particles = _array(num_particles)
    curves = _curves(bounds, particles, "bounds")
    errors = {} if se is None else _curves(se, particles, "se")
    ax = _axes(ax)
    for i, (label, values) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": COLOURS[i % 7], "marker": MARKERS[i % 7], "markersize": 5, "capsize": 3}
        ax.errorbar(particles, values, errors.get(label), label=label or "bound ± standard error", **style)
    if isinstance(evidence, (tuple, list)):
        ax.axhspan(*evidence, color=GREY, alpha=0.3, linewidth=0, label="log-evidence lies here")
    elif evidence is not None:
        ax.axhline(float(evidence), color=GREY, linestyle="--", label="log-evidence")
    _log_axis(ax, particles)
    ax.set(xlabel="particles K", ylabel="bound $L_K$ (nats)", title="Bound against number of particles")
    return _finish(ax, legend="lower right")


def plot_snr(num_particles: Sequence[int] | Tensor, snr: Any, ax: Axes | None = None) -> Axes:
    """Draw the signal-to-noise ratio of gradient estimators, |mean| over standard deviation, against K.

    Below 1 a single gradient does not know its sign; a reparameterised IWAE gradient of the guide falls as
    ``K ** -0.5`` (Rainforth et al. 2018, arXiv:1802.04537).

    Args:
        num_particles: the K of each value.
        snr: one value for each K; or a mapping of such curves by the estimator's name.
        ax: where to draw.

    Raises:
        ValueError: a curve has not one value for each K.
    """
    particles = _array(num_particles)
    ax = _axes(ax)
    for i, (label, values) in enumerate(_curves(snr, particles, "snr").items()):
        ax.plot(particles, values, color=COLOURS[i % 7], marker=MARKERS[i % 7], markersize=5, label=label or None)
    ax.set_yscale("log")
    ax.axhline(1.0, color=GREY, linestyle="--", linewidth=1, label="signal = noise")
    _log_axis(ax, particles)
    ax.set(xlabel="particles K", ylabel="signal / noise of the gradient", title="Gradient quality")
    return _finish(ax)


def plot_khat(khat: Any, num_samples: int | None = None, ax: Axes | None = None) -> Axes:
    """Draw Pareto k-hat of every datum, and the lines it should stay below.

    Weights of ``k < 0.5`` have a finite variance; below 0.7, or ``min(1 - 1/log10 S, 0.7)`` for S draws, averages
    under smoothed weights can be trusted (Vehtari et al. 2024, arXiv:1507.02646).

    Args:
        khat: shape of the weights' tail by datum; any shape.
        num_samples: number of draws S it was estimated from.
        ax: where to draw.
    """
    values = _array(khat).astype(float).reshape(-1)
    limit = 0.7 if num_samples is None else good_k(num_samples)
    ax = _axes(ax)
    index, finite = np.arange(len(values)), np.isfinite(values)
    low, high = min([-0.1, *values[finite]]) - 0.05, max([0.8, *values[finite]]) + 0.05
    groups = {
        "trusted": (finite & (values <= limit), values, "o", COLOURS[0]),
        "not trusted": (finite & (values > limit), values, "X", COLOURS[1]),
        "no tail (all weights equal)": (values == -math.inf, np.full_like(values, low), "v", COLOURS[0]),
        "no estimate (a few draws carry all)": (~finite & (values != -math.inf), np.full_like(values, high), "^", "k"),
    }
    for label, (chosen, heights, marker, colour) in groups.items():
        if chosen.any():
            style: dict[str, Any] = {"s": 22, "color": colour, "marker": marker, "clip_on": False, "zorder": 3}
            ax.scatter(index[chosen], heights[chosen], label=f"{chosen.sum()} {label}", **style)
    ax.axhline(0.5, color=GREY, linestyle=":", linewidth=1.2, label="0.5: finite variance below")
    ax.axhline(0.7, color=GREY, linestyle="--", linewidth=1.2, label="0.7: usable below")
    if limit != 0.7:
        ax.axhline(limit, color=COLOURS[2], linewidth=1.2, label=f"{limit:.2f}: limit for {num_samples} draws")
    ax.set(ylim=(low, high), xlabel="datum", ylabel=r"Pareto $\hat{k}$", title="Reliability of importance weights")
    return _finish(ax, below=True)


def plot_pairs(
    guide: Mapping[str, Any],
    reference: Mapping[str, Any] | None = None,
    var_names: Sequence[str] | None = None,
    labels: tuple[str, str] = ("guide", "reference"),
    axes: Any = None,
) -> np.ndarray:
    """Draw a guide's samples over those of a reference, such as MCMC: each pair of coordinates, each coordinate alone.

    Args:
        guide: draws by site, ``[samples, ...]``; coordinates of a site are drawn apart.
        reference: draws of the same sites, any number of them.
        var_names: sites to draw, in this order; by default all.
        labels: what the two are called.
        axes: a square array of axes, one row and column for each coordinate.

    Returns:
        The array of axes ``[coordinates, coordinates]``; those above the diagonal are hidden.

    Raises:
        ValueError: an unknown site, a reference without one, no or more than 12 coordinates, axes of another number.
    """
    names = list(guide) if var_names is None else list(var_names)
    sets = [(_coordinates(guide, names, "guide"), labels[0], COLOURS[1])]
    if reference is not None:
        sets.insert(0, (_coordinates(reference, names, "reference"), labels[1], COLOURS[0]))
    titles = list(sets[-1][0])
    if list(sets[0][0]) != titles:
        raise ValueError(f"guide and reference differ in their coordinates: {titles} and {list(sets[0][0])}.")
    if not 0 < len(titles) <= 12:
        raise ValueError(f"{len(titles)} coordinates are too few or too many for a readable plot; choose by var_names.")
    grid = _grid(axes, len(titles))
    for row, column in np.ndindex(*grid.shape):
        if column > row:
            grid[row, column].set_axis_off()
        else:
            _draw_pair(grid[row, column], sets, titles[row], titles[column])
            _label_pair(grid[row, column], titles[row], titles[column], row == len(titles) - 1, column == 0)
    legend = grid[0, 0].get_legend_handles_labels()
    grid[0, -1 if len(titles) > 1 else 0].legend(*legend, loc="upper right", frameon=len(titles) == 1)
    return grid


def plot_reconstructions(
    images: Tensor,
    reconstructions: Tensor,
    shape: tuple[int, int] | None = None,
    columns: int = 8,
    ax: Axes | None = None,
) -> Axes:
    """Draw images, each above its reconstruction, on one grey scale from 0 (white) to 1 (black).

    Args:
        images: ``[n, pixels]`` or ``[n, height, width]``.
        reconstructions: of the same shape, such as means of the likelihood.
        shape: height and width of flat images; by default they are taken as square.
        columns: images in a row.
        ax: where to draw.

    Raises:
        ValueError: the two differ in shape, or flat images are not of that shape.
    """
    if _array(images).shape != _array(reconstructions).shape:
        raise ValueError(
            f"images have shape {_array(images).shape}, their reconstructions {_array(reconstructions).shape}; "
            "give one reconstruction of each, such as the likelihood's mean averaged over draws."
        )
    pair = np.stack([_as_images(images, shape), _as_images(reconstructions, shape)])  # [2, n, height, width]
    columns = min(columns, pair.shape[1])
    missing = -pair.shape[1] % columns
    pair = np.pad(pair.astype(float), ((0, 0), (0, missing), (0, 0), (0, 0)), constant_values=LINES)
    rows = pair.reshape(2, -1, columns, *pair.shape[2:]).swapaxes(0, 1)
    return _show(_axes(ax), rows.reshape(-1, *rows.shape[2:]), "Images above their reconstructions")


@torch.no_grad()
def plot_traversals(
    decode: Callable[[Tensor], Tensor],
    latent: Tensor,
    dims: Sequence[int] | None = None,
    span: float = 3.0,
    steps: int = 9,
    shape: tuple[int, int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw what a decoder makes of a latent vector while one of its coordinates at a time goes from -span to span.

    Args:
        decode: maps latent vectors ``[n, latent]`` to mean images ``[n, pixels]`` or ``[n, height, width]``.
        latent: the vector to start from, ``[latent]``; zeros for the middle of a standard normal prior.
        dims: coordinates to change, a row for each; by default all, but at most 10.
        span: largest absolute value a coordinate takes.
        steps: values that it takes.
        shape: height and width of flat images; by default they are taken as square.
        ax: where to draw.

    Raises:
        ValueError: the latent is not one vector, a coordinate is not one of its, or images are not of that shape.
    """
    if latent.dim() != 1:
        raise ValueError(f"latent must be one vector, got shape {tuple(latent.shape)}")
    chosen = list(range(min(len(latent), 10)) if dims is None else dims)
    unknown = [d for d in chosen if not -len(latent) <= d < len(latent)]
    if unknown:
        raise ValueError(f"dims names coordinate {unknown[0]}, but latent has {len(latent)} of them.")
    values = torch.linspace(-span, span, steps, dtype=latent.dtype, device=latent.device)
    path = latent.repeat(len(chosen), steps, 1)
    for row, d in enumerate(chosen):
        path[row, :, d] = values
    pictures = _as_images(decode(path.reshape(-1, len(latent))), shape)
    pictures = pictures.reshape(len(chosen), steps, *pictures.shape[1:])
    ax = _show(_axes(ax), pictures, "Latent traversals")
    height, width = pictures.shape[2] + 1, pictures.shape[3] + 1
    ax.set_yticks([(row + 0.5) * height for row in range(len(chosen))], [f"$z_{{{d}}}$" for d in chosen])
    shown = sorted({0, steps // 2, steps - 1})
    ax.set_xticks([(i + 0.5) * width for i in shown], [f"{float(values[i]):.3g}" for i in shown])
    ax.set_xlabel("value of the coordinate")
    return ax


def _axes(ax: Axes | None) -> Axes:
    """Return the axes given, or those of a figure of their own that belongs to no window and no list."""
    return _figure(6.4, 4.2).subplots() if ax is None else ax


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install pyro-elbo-ext[viz]") from error
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _finish(ax: Axes, legend: str = "best", below: bool = False) -> Axes:
    ax.grid(alpha=0.25)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    place: dict[str, Any] = {"loc": legend}
    if below:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2, "frameon": False}
    ax.legend(fontsize=9, framealpha=0.85, **place)
    return ax


def _log_axis(ax: Axes, particles: np.ndarray) -> None:
    """Ticks at the numbers of particles themselves, as far as they do not overlap."""
    ax.set_xscale("log")
    spaced = [particles[0]]
    for k in particles[1:]:
        if math.log(k / spaced[-1]) > 0.07 * math.log(max(particles[-1] / particles[0], 1.1)):
            spaced.append(k)
    ax.set_xticks(spaced, [f"{k:g}" for k in spaced])
    ax.set_xticks([], minor=True)


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _history(history: Any) -> dict[str, np.ndarray]:
    columns = {name: values.astype(float) for name, (_, values) in histories(history, 1).items()}
    if not len(columns.get("loss", ())):
        raise ValueError(f"history must have the loss of at least one step under 'loss'; it has {list(columns)}.")
    return columns


def _running(values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error of every ``window`` steps in a row."""
    windows = np.lib.stride_tricks.sliding_window_view(values, window)
    spread = windows.std(-1, ddof=1) if window > 1 else np.zeros(len(windows))
    return windows.mean(-1), spread / math.sqrt(window)


def _curves(values: Any, particles: np.ndarray, what: str) -> dict[str, np.ndarray]:
    curves = {k: _array(v) for k, v in (values if isinstance(values, Mapping) else {"": values}).items()}
    for label, curve in curves.items():
        if curve.shape != particles.shape:
            name = f"{what}[{label!r}]" if label else what
            raise ValueError(f"{name} has shape {curve.shape}, but there are {len(particles)} numbers of particles.")
    return curves


def _coordinates(draws: Mapping[str, Any], names: Sequence[str], what: str) -> dict[str, np.ndarray]:
    """Draws of every scalar by its title."""
    coordinates = {}
    for name in names:
        if name not in draws:
            raise ValueError(f"{what} has no site '{name}'; it has {', '.join(map(repr, draws)) or 'none'}.")
        values = _array(draws[name])
        for index in np.ndindex(*values.shape[1:]):
            title = name + (f"[{', '.join(map(str, index))}]" if index else "")
            coordinates[title] = np.moveaxis(values, 0, -1)[index]
    return coordinates


def _grid(axes: Any, size: int) -> np.ndarray:
    if axes is None:
        side = 2.1 * size if size > 1 else 4.0
        return _figure(side, side).subplots(size, size, squeeze=False)
    grid = np.asarray(axes, dtype=object)
    if grid.size != size * size:
        raise ValueError(f"axes must be {size} x {size} for {size} coordinates, got shape {grid.shape}.")
    return grid.reshape(size, size)


def _draw_pair(ax: Axes, sets: Sequence[tuple], row: str, column: str) -> None:
    ax.set_xlim(*_range(sets, column))
    if row == column:
        bins = np.linspace(*_range(sets, row), 36).tolist()
        for draws, label, colour in sets:
            ax.hist(draws[row], bins, density=True, color=colour, alpha=0.2)
            ax.hist(draws[row], bins, density=True, color=colour, histtype="step", linewidth=1.4, label=label)
        return
    thinned = [(draws, slice(None, None, len(draws[row]) // 1500 + 1), colour) for draws, _, colour in sets]
    points = np.concatenate([np.stack([draws[column][thin], draws[row][thin]], 1) for draws, thin, _ in thinned])
    colours = np.concatenate([np.full(len(draws[row][thin]), colour) for draws, thin, colour in thinned])
    order = np.random.default_rng(0).permutation(len(points))  # neither set lies on top of the other
    ax.scatter(points[order, 0], points[order, 1], s=5, c=colours[order], alpha=0.45, linewidths=0)
    ax.set_ylim(*_range(sets, row))


def _range(sets: Sequence[tuple], name: str) -> tuple[float, float]:
    """All draws of a coordinate but the last few outliers."""
    low, high = np.quantile(np.concatenate([draws[name] for draws, _, _ in sets]), (0.001, 0.999))
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


def _label_pair(ax: Axes, row: str, column: str, last: bool, first: bool) -> None:
    ax.tick_params(labelsize=8)
    if row == column:
        ax.set_yticks([])
    if last:
        ax.set_xlabel(column)
    if first:
        ax.set_ylabel("density" if row == column else row)


def _as_images(values: Tensor, shape: tuple[int, int] | None) -> np.ndarray:
    """Return ``[n, height, width]``."""
    array = _array(values)
    if array.ndim == 3 and shape is None:
        return array
    pixels = math.prod(array.shape[1:])
    side = math.isqrt(pixels)
    shape = (side, side) if shape is None else shape
    if array.ndim not in (2, 3) or math.prod(shape) != pixels:
        raise ValueError(f"images of shape {array.shape} are not {shape[0]} x {shape[1]} pixels each; give shape=.")
    return array.reshape(-1, *shape)


def _show(ax: Axes, images: np.ndarray, title: str) -> Axes:
    """Draw images ``[rows, columns, height, width]`` with grey lines between."""
    cells = np.pad(images.astype(float), ((0, 0), (0, 0), (1, 0), (1, 0)), constant_values=LINES)
    picture = cells.swapaxes(1, 2).reshape(cells.shape[0] * cells.shape[2], -1)
    picture = np.pad(picture, ((0, 1), (0, 1)), constant_values=LINES)
    ax.imshow(picture, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[], title=title)
    return ax
