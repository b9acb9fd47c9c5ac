"""One conditional flow for each plate block of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_elbo_ext.guides.base import FlowGuide
from pyro_elbo_ext.guides.blocks import Block
from pyro_elbo_ext.guides.structure import Latent

__all__ = ["AutoPlatedFlow"]

EMBEDDING = 8  # features of a learned embedding where nothing is said
Source = int | Tensor | Callable


class AutoPlatedFlow(FlowGuide):
    r"""A flow for each set of plates that holds latent sites, inside those plates and shared by their elements.

    .. math:: q(z) = q(z_\emptyset) \prod_{S} \prod_{i \in S} q_S(z_{S,i} \mid z_{S'}, S' \subset S;\ h_{S,i})

    Each block of sites with the same plates S is drawn by one conditional flow, given the values of the blocks whose
    plates are part of S, and features or an embedding h of the element. So the density of every site lies in its
    plates: minibatches are scaled right, element i gets its own whatever the minibatch, importance weights exist for
    each element where all latents are local, and with features the number of parameters does not depend on that of
    elements. Sites whose prior is a location-scale family given other latent sites are non-centred, with a learned
    weight.

    References:
        Amortized Variational Inference for Simple Hierarchical Models (Agrawal, Domke, 2021, arXiv:2111.03144); PAVI:
        Plate-Amortized Variational Inference (Rouillard et al., 2022, arXiv:2206.05111); Automatic Reparameterisation
        of Probabilistic Programs (Gorinova, Moore, Hoffman, 2020, arXiv:1906.03028); Model-Informed Flows for Bayesian
        Inference of Probabilistic Programs (Ko, Domke, 2025, arXiv:2505.24243).

    Args:
        model: a Pyro model whose latent sites are continuous.
        amortize: by plate, or by a tuple of plates, what tells its elements apart: an integer for a learned embedding
            of that size; a tensor of features ``[N, features]``, or ``[N_1, N_2, features]`` for a tuple; or a function
            of the model's arguments, a module say, that returns such rows of all elements, or of the minibatch in its
            order, for which its first minibatch must be smaller than the plate. Every plate with latent sites needs
            some. None for a learned embedding of size 8 for each block. Features are standardised by the rows met
            first.
        create_plates: as in Pyro's AutoGuides: returns the subsampled plates of a minibatch.
        flow: ``"iaf"``, ``"coupling"``, ``"spline"``, or a function of (features, context), called once a block.
        **kwargs: ``base``, ``hidden_features``, ``affine``, ``affine_rate``, ``init_loc_fn``, ``init_scale``,
            ``noncenter``, as in :class:`~pyro_elbo_ext.guides.base.FlowGuide`.

    Raises:
        ValueError: when first run: a discrete latent site, a support that is not fixed, a plate without features;
            later: features of another size, or a plate that has grown beyond its embedding.
        ImportError: zuko is not installed.
    """

    def __init__(
        self,
        model: Callable,
        amortize: Mapping[str | tuple[str, ...], Source] | None = None,
        *,
        create_plates: Callable | None = None,
        flow: Any = "iaf",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, flow, create_plates=create_plates, **kwargs)
        if isinstance(flow, nn.Module):
            raise ValueError("AutoPlatedFlow needs a flow for each block: give a function of (features, context)")
        sources = {} if amortize is None else {_plates(key): source for key, source in amortize.items()}
        for key, source in sources.items():
            if isinstance(source, bool) or not (callable(source) or isinstance(source, (int, Tensor))):
                raise ValueError(f"amortize[{_name(key)}] must be a number, a tensor or a function, got {source!r}")
            if isinstance(source, Tensor) and source.requires_grad:
                raise ValueError(f"amortize[{_name(key)}] is a tensor that learns: give a function that returns it")
            if isinstance(source, int) and source < 1:
                raise ValueError(f"amortize[{_name(key)}] must be a positive number of features, got {source}")
        self._sources: tuple = (None if amortize is None else sources,)  # modules among them are registered when built

    def _sort(self, latents: Mapping[str, Latent]) -> list[tuple[str, tuple[str, ...], list[Latent]]]:
        blocks: dict[tuple[str, ...], list[Latent]] = {}
        for latent in latents.values():
            blocks.setdefault(latent.plates, []).append(latent)
        ordered = sorted(blocks.items(), key=lambda item: len(item[0]))
        return [("_".join(plates).replace(".", "_") or "global", plates, sites) for plates, sites in ordered]

    def _build_context(self, args: tuple, kwargs: dict) -> dict[str, int]:
        with poutine.block():
            plates = self._create_plates(*args, **kwargs)
        blocks = [block for block in self._blocks if block.plates]
        sources = self._sources[0]
        if sources is None:
            sources = {block.plates: EMBEDDING for block in blocks}
        example = self._blocks[0].slots[0].latent.start
        rows: dict[tuple[str, ...], Any] = {}
        for key, source in sources.items():
            unknown = sorted(set(key) - set(self._prototype_frames))
            if unknown:
                known = sorted(self._prototype_frames)
                raise ValueError(f"amortize names plate '{unknown[0]}', but the plates with latent sites are {known}")
            dims = {name: self._prototype_frames[name].dim for name in key}
            if isinstance(source, int):
                rows[key] = _Embedding(dims, [plates[name].size for name in key], source)
            else:
                rows[key] = _Features(dims, source, args, kwargs)
        self._keys = {f"rows_{i}": key for i, key in enumerate(rows)}
        modules = nn.ModuleDict(dict(zip(self._keys, rows.values(), strict=True)))
        self.add_module("rows", modules.to(example.device, example.dtype))
        self._check_covered(blocks)
        return {b.key: sum(rows[key].size for key in rows if set(key) <= set(b.plates)) for b in blocks}

    def _check_covered(self, blocks: list[Block]) -> None:
        for block in blocks:
            found = [key for key in self._keys.values() if set(key) <= set(block.plates)]
            missing = sorted(set(block.plates).difference(*found))
            if missing:
                raise ValueError(
                    f"latent site '{block.slots[0].name}' is in plate '{missing[0]}', for which amortize has no "
                    "features and no embedding, so that all its elements would share one posterior. Add "
                    f"{missing[0]!r}: a tensor of features [N, features], a function, or a number for a learned "
                    "embedding of that size."
                )

    def _rows(self, block: Block, plates: Mapping[str, Any], args: tuple, kwargs: dict) -> list[Tensor]:
        if not block.plates:
            return []
        modules = self.rows
        own = [name for name, key in self._keys.items() if set(key) <= set(block.plates)]
        return [modules[name](plates, args, kwargs) for name in own]


def _plates(key: str | tuple[str, ...]) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(key)


def _name(key: Iterable[str]) -> str:
    names = tuple(key)
    return repr(names[0] if len(names) == 1 else names)


def _along(rows: Tensor, dim: int) -> Tensor:
    """Return row numbers along a plate's dimension."""
    return rows.reshape((-1,) + (1,) * (-dim - 1))


class _Embedding(nn.Module):
    """A learned vector for each element of some plates."""

    def __init__(self, frames: Mapping[str, int], sizes: list[int], size: int) -> None:
        super().__init__()
        self.dims, self.size = frames, size
        self.table = nn.Parameter(0.1 * torch.randn(*sizes, size))

    def forward(self, plates: Mapping[str, Any], args: tuple, kwargs: dict) -> Tensor:
        """Return ``[*batch, size]``."""
        for name, full in zip(self.dims, self.table.shape, strict=False):
            if plates[name].size != full:
                raise ValueError(
                    f"plate '{name}' has {plates[name].size} elements, but the guide's embedding was made for {full}. "
                    "Make a new guide, or amortize by features, which fit any number."
                )
        indices = [_along(plates[name].indices.to(self.table.device), dim) for name, dim in self.dims.items()]
        return self.table[tuple(indices)]


class _Features(nn.Module):
    """Features of each element of some plates, standardised by the rows met first."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, dims: Mapping[str, int], source: Any, args: tuple, kwargs: dict) -> None:
        super().__init__()
        self.dims = dims
        self.by_batch: set[str] = set()  # plates of which a function was seen to return the minibatch's rows
        if isinstance(source, Tensor):
            self.register_buffer("table", source.detach(), persistent=False)
        else:
            self.table = None
        self.source = source if isinstance(source, nn.Module) else None
        self._function = (None if isinstance(source, (nn.Module, Tensor)) else source,)
        rows = self._given(args, kwargs)
        if rows.dim() != len(dims) + 1:
            raise ValueError(
                f"the features of {_name(dims)} have shape {tuple(rows.shape)}; expected [{', '.join(dims)}, features]"
            )
        self.size = rows.shape[-1]
        flat = rows.detach().reshape(-1, self.size)
        deviation = flat.std(0, unbiased=False)
        self.register_buffer("mean", flat.mean(0))
        varies = deviation > 1e-6 * flat.abs().amax(0)
        self.register_buffer("deviation", torch.where(varies, deviation, torch.ones_like(deviation)))

    def _given(self, args: tuple, kwargs: dict) -> Tensor:
        source = self.source if self.source is not None else self._function[0]
        rows = self.table if source is None else source(*args, **kwargs)
        if not isinstance(rows, Tensor) or not rows.is_floating_point():
            raise ValueError(
                f"the features of {_name(self.dims)} must be a tensor of floats, got {type(rows).__name__}"
            )
        return rows

    def forward(self, plates: Mapping[str, Any], args: tuple, kwargs: dict) -> Tensor:
        """Return ``[*batch, size]``."""
        rows = self._given(args, kwargs).to(self.mean.dtype)
        if rows.dim() != len(self.dims) + 1 or rows.shape[-1] != self.size:
            raise ValueError(
                f"the features of {_name(self.dims)} have shape {tuple(rows.shape)}, but the guide was built for "
                f"[{', '.join(self.dims)}, {self.size}]"
            )
        indices = []
        for (name, dim), given in zip(self.dims.items(), rows.shape, strict=False):
            plate = plates[name]
            if given not in (plate.subsample_size, plate.size):
                raise ValueError(
                    f"the features of plate '{name}' have {given} rows, but its minibatch has {plate.subsample_size} "
                    f"elements of {plate.size}: give the guide the model's minibatch by create_plates"
                )
            if given != plate.size:
                self.by_batch.add(name)  # and so for a full batch in another order
            own = torch.arange(given) if name in self.by_batch else plate.indices
            indices.append(_along(own.to(rows.device), dim))
        return (rows[tuple(indices)] - self.mean) / self.deviation
