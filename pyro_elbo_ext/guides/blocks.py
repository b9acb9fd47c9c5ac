"""Blocks of latent sites, each drawn by one flow, and what a run of a flow guide draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_elbo_ext.guides.noncentering import whiten
from pyro_elbo_ext.guides.structure import Latent, constrain, finite

__all__ = ["Block", "Draw", "Slot", "Standard", "broadcast", "first_location", "make_slot", "module_key", "summary"]


class Slot(NamedTuple):
    """The coordinates of one latent site in its block.

    Attributes:
        latent: the site.
        shape: of the unconstrained value inside the block's plates.
        size: number of coordinates.
        weight: index of the site's centring weight, None where it is not non-centred.
    """

    latent: Latent
    shape: torch.Size
    size: int
    weight: int | None = None

    @property
    def name(self) -> str:
        """Name of the site."""
        return self.latent.name


class Block(NamedTuple):
    """Latent sites that one flow draws, inside some plates.

    Attributes:
        key: of its flow among the guide's.
        plates: names of its plates, that of dimension -1 first.
        slots: its sites, in the model's order.
        uppers: keys of the blocks whose plates are a part of its own, on which it is conditioned.
    """

    key: str
    plates: tuple[str, ...]
    slots: tuple[Slot, ...]
    uppers: tuple[str, ...]

    @property
    def features(self) -> int:
        """Number of coordinates."""
        return sum(slot.size for slot in self.slots)


class Draw:
    """One run of a guide: what its blocks drew, and the unconstrained values made of it so far."""

    def __init__(self) -> None:
        self.blocks: dict[str, Tensor] = {}  # [*batch, features], by block
        self.pending: dict[str, tuple[Slot, Tensor]] = {}  # drawn, but its prior is not known yet
        self.unconstrained: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.ladj: dict[str, Tensor] = {}  # of non-centring, [*batch]

    def settle(self, slot: Slot, u: Tensor) -> Tensor:
        """Note a site's unconstrained value, and return the constrained one."""
        self.unconstrained[slot.name] = u
        self.values[slot.name] = constrain(slot.latent.transform, u)
        return self.values[slot.name]


def module_key(key: str) -> str:
    """Return what a block's module is called, which no plate's name can make an attribute of a dictionary's."""
    return f"block_{key}"


def make_slot(latent: Latent, inside: bool, weight: int | None) -> Slot:
    """Return a site's coordinates in a block, whose plates are around the flow if ``inside``, or a part of the vector.

    Raises:
        ValueError: a dimension of the site that is no plate's, inside; the site is named.
    """
    start = latent.start
    batch, event = start.shape[: latent.batch_dim], start.shape[latent.batch_dim :]
    if not inside:
        return Slot(latent, start.shape, start.numel(), weight)
    dims = {frame.dim for frame in latent.frames}
    for dim in range(-latent.batch_dim, 0):
        if batch[dim] > 1 and dim not in dims:
            raise ValueError(
                f"latent site '{latent.name}' has batch shape {tuple(batch)}, of which dimension {dim} is no plate's: "
                "declare it by .to_event(...) or by a plate."
            )
    return Slot(latent, event, event.numel(), weight)


class Standard(nn.Module):
    """By what the values of a block's non-centred sites are scaled for the blocks below, from their first priors.

    Args:
        block: the block.
    """

    loc: Tensor
    scale: Tensor
    chosen: Tensor

    def __init__(self, block: Block) -> None:
        super().__init__()
        pairs = [_first_prior(slot) for slot in block.slots]
        self.register_buffer("loc", torch.cat([loc for loc, _ in pairs]))
        self.register_buffer("scale", torch.cat([scale for _, scale in pairs]))
        chosen = [torch.full((slot.size,), slot.weight is not None) for slot in block.slots]
        self.register_buffer("chosen", torch.cat(chosen).to(self.loc.device))


def _first_prior(slot: Slot) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of a site's coordinates under its first prior, over the plates."""
    start, prior = slot.latent.start, slot.latent.prior
    if prior is None:
        return start.new_zeros(slot.size), start.new_ones(slot.size)
    scale = prior.scale.square().sum(-1).sqrt() if prior.matrix else prior.scale
    loc, scale = (part.expand(start.shape).reshape(-1, slot.size) for part in (prior.loc, scale))
    deviation = (scale.square().mean(0) + loc.var(0, unbiased=False)).sqrt()
    return finite(loc.mean(0)), finite(deviation, 1.0)


def summary(block: Block, draw: Draw, white: Tensor, standard: Standard | None) -> Tensor:
    """Return what the blocks below are told of a block: its coordinates ``[*batch, features]``, of about unit size.

    Args:
        block: the block.
        draw: the run so far.
        white: the block's draw before its outer affine map.
        standard: scales the values of non-centred sites, whose draws alone would not say where they are.
    """
    if standard is None:
        return white
    values = [draw.unconstrained[slot.name].reshape(white.shape[:-1] + (slot.size,)) for slot in block.slots]
    return torch.where(standard.chosen, (torch.cat(values, -1) - standard.loc) / standard.scale, white)


def first_location(slot: Slot, weight: float) -> Tensor:
    """Return a site's first coordinates ``[size]``, averaged over the block's plates.

    Args:
        slot: the site.
        weight: logit of the first centring weight.
    """
    latent = slot.latent
    start = latent.start
    if slot.weight is not None and latent.prior is not None:
        start = whiten(start, torch.sigmoid(start.new_tensor(weight)), latent.prior)
    return finite(start.expand(latent.start.shape)).reshape(-1, slot.size).mean(0)


def broadcast(shapes: Sequence[torch.Size]) -> torch.Size:
    """Return what shapes broadcast to, at a tenth of the time of torch's function, which runs at every step."""
    joined = [1] * max(map(len, shapes))
    for shape in shapes:
        for dim, size in enumerate(reversed(shape), start=1):
            joined[-dim] = size if size != 1 else joined[-dim]
    return torch.Size(joined)
