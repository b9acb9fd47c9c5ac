"""What the models of images in this folder report: the bound as a table, a picture and JSON."""

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

from pyro_elbo_ext import __version__

CURVE = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # particles of the reported bounds; the last is L_1000


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
