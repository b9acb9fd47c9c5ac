"""What the models in this folder report: bounds of images, distances from exact posteriors; tables, pictures, JSON."""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_elbo_ext import __version__, diagnose

CURVE = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # particles of the reported bounds; the last is L_1000
TIGHT = 100  # of the bound on one posterior that stands beside the ELBO


class Result(NamedTuple):
    """A trained pair of model and guide, its L_K in nats as ``[len(CURVE), test images]``, and the seconds it took."""

    pair: Any
    bounds: Tensor
    seconds: float


@torch.no_grad()
def log_weights(vae: Any, x: Tensor, num_particles: int) -> Tensor:
    """``log p(x, z) - log q(z | x)`` for K draws from the guide of a VAE, ``[num_particles, images]``."""
    chunks = []
    for part in x.split(20):
        q = vae.posterior(part)
        z = q.sample((num_particles,))
        chunks.append(vae.prior(part).log_prob(z) + vae.likelihood(z).log_prob(part) - q.log_prob(z))
    return torch.cat(chunks, -1)


def bound(log_w: Tensor, num_particles: int) -> Tensor:
    """L_K of each image, averaged over as many disjoint groups of K particles as there are."""
    groups = len(log_w) // num_particles
    log_w = log_w[: groups * num_particles].reshape(groups, num_particles, -1)
    return (log_w.logsumexp(1) - math.log(num_particles)).mean(0)


def bounds(log_w: Tensor) -> Tensor:
    """L_K of each image for every K of ``CURVE``."""
    return torch.stack([bound(log_w, k) for k in CURVE])


def tabulate(results: Mapping[str, Result], titles: Mapping[str, str]) -> list[dict[str, Any]]:
    """Print L_1000 per test image, the gain on the first objective (paired image by image), and seconds."""
    rows, first, width = [], next(iter(results)), max(12, *(len(titles[name]) for name in results))
    line = f"{{:<{width}}} {{:>19}} {{:>{max(19, len(titles[first]) + 8)}}} {{:>13}}"
    print(line.format("objective", "test L_1000 (nats)", f"gain on {titles[first]}", "training (s)"))
    for name, (_, values, seconds) in results.items():
        row: dict[str, Any] = {"objective": titles[name], "seconds": seconds}
        for key, nats in (("bound", values[-1]), ("gain", values[-1] - results[first].bounds[-1])):
            row |= {key: nats.mean().item(), f"{key}_error": nats.std().item() / math.sqrt(len(nats))}
        value = f"{row['bound']:.2f} ± {row['bound_error']:.2f}"
        gain = f"{row['gain']:+.2f} ± {row['gain_error']:.2f}" if name != first else "-"
        print(line.format(titles[name], value, gain, f"{seconds:.1f}"))
        rows.append(row)
    return rows


class Moments(NamedTuple):
    """Means and standard deviations, ``[coordinates]`` both."""

    mean: Tensor
    sd: Tensor


def mixture(weight: Tensor, mean: Tensor, variance: Tensor) -> Moments:
    """Moments of a mixture, from the ``[components]`` weights and the components' ``[components, coordinates]``."""
    centre = weight @ mean
    return Moments(centre, (weight @ (variance + (mean - centre).square())).sqrt())


class Examined(NamedTuple):
    """A trained guide, what ``diagnose`` reports of it, its own loss's bound with a standard error, and seconds."""

    guide: Any
    parameters: Any
    report: Any
    bound: tuple[float, float]
    seconds: float


def examine(svi: Any, parameters: Any, seconds: float, num_draws: int, seed: int) -> Examined:
    """Look at a trained guide, by its own loss twenty times and by ``diagnose`` with L_1, L_10 and L_100."""
    own = -torch.tensor([svi.evaluate_loss() for _ in range(20)], dtype=torch.float64)
    particles = (1, 10, TIGHT)
    report = diagnose(svi.model, svi.guide, num_samples=num_draws, particles=particles, temperatures=0, seed=seed)
    return Examined(svi.guide, parameters, report, (own.mean().item(), own.std().item() / math.sqrt(len(own))), seconds)


def distances(result: Examined, exact: Any) -> dict[str, Any]:
    """What a guide misses of an exact ``log_evidence`` and of ``moments`` by site.

    The gaps of its own bound, of the ELBO, which is KL(q || p), and of L_100, in nats; k-hat; means and deviations of
    its draws; and how far the worst mean of a site is off, in deviations of the posterior.
    """
    report = result.report
    found = (("own", result.bound), ("kl", report.bounds[0][1:3]), ("tight", report.bounds[-1][1:3]))
    row: dict[str, Any] = {"k": report.k, "verdict": report.verdict.name, "seconds": result.seconds}
    for key, (value, error) in found:
        row |= {key: exact.log_evidence - value, f"{key}_error": error}
    for site, (mean, sd) in exact.moments.items():
        draws = report.draws.values[site].double().reshape(report.draws.num_samples, -1)
        row[f"{site}_off"] = ((draws.mean(0) - mean) / sd).abs().max().item()
        row[site] = [part.squeeze().tolist() for part in (draws.mean(0), draws.std(0))]
    return row


def tabulate_distances(
    results: Mapping[str, Examined], titles: Mapping[str, str], exact: Any, sites: tuple[str, ...], worst: str
) -> list[dict[str, Any]]:
    """Print the distances, with means and deviations of some sites and the worst mean of another."""
    width = max(len(title) for title in titles.values())
    line = f"{{:<{width}}}" + " {:>15}" * 3 + " {:>6}" + " {:>13}" * len(sites) + f" {{:>{4 + len(worst)}}} {{:>7}}"
    print(f"log evidence {exact.log_evidence:.4f} nats; {worst}'s worst mean is off by so many standard deviations")
    columns = "its own bound", "KL = ELBO's", f"L_{TIGHT}", "k-hat", *sites, f"{worst} off", "s"
    print(line.format("log evidence less", *columns))
    cells = [f"{exact.moments[site].mean.item():.2f} ± {exact.moments[site].sd.item():.2f}" for site in sites]
    print(line.format("exact", "-", "0", "0", "-", *cells, "0", "-"))
    rows = []
    for name, result in results.items():
        row = {"run": titles[name]} | distances(result, exact)
        cells = [f"{row['own']:.3f} ± {row['own_error']:.3f}", f"{row['kl']:.3f} ± {row['kl_error']:.3f}"]
        cells += [f"{row['tight']:.3f} ± {row['tight_error']:.3f}", f"{row['k']:.2f}"]
        cells += ["{:.2f} ± {:.2f}".format(*row[site]) for site in sites]
        print(line.format(row["run"], *cells, f"{row[f'{worst}_off']:.2f}", f"{result.seconds:.1f}"))
        rows.append(row)
    return rows


def plot_distances(axes: Any, rows: list[dict[str, Any]]) -> None:
    """KL of each run, and the gap of its own bound where that is another, on a logarithmic axis."""
    shown = []
    for i, row in enumerate(rows):
        axes.text(0.02, i - 0.3, row["run"], transform=axes.get_yaxis_transform(), fontsize=11)
        for key, style in (("own", "C1|"), ("kl", "C0o")):
            ends = [max(row[key] + sign * 2 * row[f"{key}_error"], 1e-4) for sign in (-1, 1)]
            shown += ends
            axes.plot(ends, [i, i], style[:2], linestyle="-", linewidth=2)
            axes.plot([max(row[key], 1e-4)], [i], style, markersize=7 if key == "kl" else 12)
    axes.set(xscale="log", yticks=[], ylim=(len(rows) - 0.5, -0.8), title="Distance from the posterior")
    axes.set_xlim(10 ** math.floor(math.log10(min(shown))), 10 ** math.ceil(math.log10(max(shown))))  # whole decades
    axes.tick_params(axis="x", which="minor", labelbottom=False)
    axes.set_xlabel("nats: o KL(q || p), | gap of its own bound")
    axes.grid(alpha=0.3)


def write(path: Path, args: argparse.Namespace, **contents: Any) -> None:
    """Settings, versions and what else is given, as JSON."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "pyro": pyro.__version__}
    report = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "versions": versions | {"pyro_elbo_ext": __version__},
        **contents,
    }
    path.write_text(json.dumps(report, indent=2) + "\n")


def curves(results: Mapping[str, Result]) -> dict[str, Any]:
    """L_K averaged over the test images against K, by objective."""
    return {"K": CURVE} | {name: result.bounds.mean(-1).tolist() for name, result in results.items()}


def tile(images: Tensor, shape: tuple[int, int], columns: int = 8) -> np.ndarray:
    """Images in rows of ``columns``, as one picture with grey lines between."""
    cells = nn.functional.pad(images.reshape(-1, columns, *shape), (1, 0, 1, 0), value=0.3)
    picture = cells.transpose(1, 2).reshape(-1, columns * (shape[1] + 1))
    return nn.functional.pad(picture, (0, 1, 0, 1), value=0.3).cpu().numpy()


class Picture(NamedTuple):
    """Ink probabilities to show: 64 samples from the prior, 32 images and their reconstructions."""

    samples: Tensor
    images: Tensor
    reconstructions: Tensor


def plot(
    path: Path, results: Mapping[str, Result], titles: Mapping[str, str], picture: Picture, shape: tuple[int, int]
) -> None:
    """Three panels: samples and reconstructions of the last objective, bounds of all."""
    from matplotlib.figure import Figure  # draws with Agg: no display, no global state

    figure = Figure(figsize=(15, 5.4), dpi=110, layout="constrained")
    *pictures, curves = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    pairs = torch.stack([picture.images.view(4, 8, -1), picture.reconstructions.view(4, 8, -1)], 1)
    note = f"trained under {titles[list(results)[-1]]}"
    captions = "Samples from the prior", "Test images above reconstructions"
    for axes, title, shown in zip(pictures, captions, (picture.samples, pairs), strict=True):
        axes.imshow(tile(shown, shape), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[], title=title, xlabel=f"ink probability,\n{note}")
    for key, marker in zip(results, "os^D", strict=False):
        curves.semilogx(CURVE, results[key].bounds.mean(-1).cpu(), f"{marker}-", label=f"trained under {titles[key]}")
    curves.set(title="Bound against number of particles", xlabel="particles K")
    curves.set_ylabel("bound $L_K$ (nats per test image)")
    curves.legend(fontsize=13)
    curves.grid(alpha=0.3)
    enlarge(figure)
    figure.savefig(path)


def enlarge(figure: Any) -> None:
    """Titles and labels in a size that is read without zooming."""
    for axes in figure.axes:
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_fontsize(13)
