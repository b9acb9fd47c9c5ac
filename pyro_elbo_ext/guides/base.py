"""What the flow guides share: blocks of latent sites, each drawn by one flow, and what turns a draw into values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import init_to_median
from torch import Tensor, nn

from pyro_elbo_ext.guides.blocks import (
    Block,
    Draw,
    Standard,
    broadcast,
    first_location,
    make_slot,
    module_key,
    summary,
)
from pyro_elbo_ext.guides.distribution import FlowDistribution
from pyro_elbo_ext.guides.flows import RATE, Affine, Flow, as_flow, make_flow
from pyro_elbo_ext.guides.noncentering import PriorRun, center, known_prior, whiten
from pyro_elbo_ext.guides.packing import Packing, zero_nonfinite
from pyro_elbo_ext.guides.saving import SavedGuide
from pyro_elbo_ext.guides.structure import Latent, check_rows, inspect_model, inverse_log_det, is_identity
from pyro_elbo_ext.guides.summaries import covariance_triangle, gaussian_draws, many_draws
from pyro_elbo_ext.guides.summaries import quantiles as _quantiles
from pyro_elbo_ext.tracing import forked_rng

__all__ = ["FlowGuide"]

START = -4.0  # logit of the first centring weight, 0.018: not yet by how much priors of different rows differ


class FlowGuide(SavedGuide):
    """Base of guides whose latent sites are drawn in blocks, one flow for each.

    A subclass sorts the sites into blocks and says what a block's flow is conditioned on. Parameters are made when the
    guide first runs, or by :meth:`build`; a state loaded before that is kept until then.

    Args:
        model: a Pyro model whose latent sites are continuous.
        flow: ``"iaf"``, ``"coupling"``, ``"spline"``, or a function of (features, context) that returns a flow made by
            :func:`~pyro_elbo_ext.guides.make_flow` or by zuko.
        base: noise of flows given by name.
        hidden_features: widths of the hidden layers of their networks, by default as in
            :func:`~pyro_elbo_ext.guides.make_flow`.
        affine: ``"diag"`` or ``"tril"``, the outer affine map, or None.
        affine_rate: its learning rate in units of the networks'.
        init_loc_fn: first value of a site, as in Pyro's AutoGuides.
        init_scale: first scale of unconstrained values.
        noncenter: ``"auto"`` to let flows draw the noise of sites whose prior is a location-scale family given other
            latent sites, or False.
        create_plates: as in Pyro's AutoGuides.
    """

    num_quantile_samples = 1000  # draws that median and quantiles take

    def __init__(
        self,
        model: Callable,
        flow: Any = "iaf",
        *,
        base: str = "normal",
        hidden_features: Sequence[int] | None = None,
        affine: str | None = "diag",
        affine_rate: float = RATE,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.5,
        noncenter: str | bool = "auto",
        create_plates: Callable | None = None,
    ) -> None:
        super().__init__(model, create_plates=create_plates)
        if not init_scale > 0 or not math.isfinite(init_scale):
            raise ValueError(f"init_scale must be positive, got {init_scale}")
        if noncenter not in ("auto", False):
            raise ValueError(f'noncenter must be "auto" or False, got {noncenter!r}')
        if not isinstance(flow, str) and (base != "normal" or hidden_features is not None):
            name = "base" if base != "normal" else "hidden_features"
            raise ValueError(f"{name}= is for flows given by name; give it to the function's own flow")
        if not isinstance(flow, str) and not callable(flow):
            raise ValueError(f"flow must be a name or a function of (features, context), got {flow!r}")
        self._make: Any = (flow,)  # not registered as a submodule
        self._base, self._hidden_features = base, hidden_features
        self._affine, self._affine_rate = affine, affine_rate
        self._init_loc_fn, self._init_scale, self._noncenter = init_loc_fn, init_scale, noncenter
        self._blocks: tuple[Block, ...] = ()

    # Structure

    def _sort(self, latents: Mapping[str, Latent]) -> list[tuple[str, tuple[str, ...], list[Latent]]]:
        """Sort latent sites into blocks, each a key, its plates and its sites, those drawn first in front."""
        raise NotImplementedError

    def _build_context(self, args: tuple, kwargs: dict) -> dict[str, int]:
        """Make what blocks are conditioned on beside each other, and return its number of features by block."""
        return {}

    def _rows(self, block: Block, plates: Mapping[str, Any], args: tuple, kwargs: dict) -> list[Tensor]:
        """Return what a block is conditioned on beside other blocks, ``[*batch, features]`` each."""
        return []

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        structure = inspect_model(self.model, self._init_loc_fn, args, kwargs)
        self.prototype_trace = structure.trace
        if self.master is not None:
            self.master()._check_prototype(structure.trace)
        self._prototype_frames = {f.name: f for latent in structure.latents.values() for f in latent.frames}
        owner = self if self.master is None else self.master()
        check_rows(structure, owner.create_plates, args, kwargs)
        blocks: list[Block] = []
        weights = 0
        for key, plates, latents in self._sort(structure.latents):
            while key in {block.key for block in blocks}:
                key += "_"
            uppers = tuple(other.key for other in blocks if set(other.plates) < set(plates))
            seen = {s.name for other in blocks if other.key in uppers for s in other.slots} | {s.name for s in latents}
            slots = []
            for latent in latents:
                apart = self._noncenter == "auto" and latent.parents and latent.parents <= seen
                slots.append(make_slot(latent, bool(plates), weights if apart else None))
                weights += bool(apart)
            blocks.append(Block(key, plates, tuple(slots), uppers))
        self._blocks = tuple(blocks)
        self._num_weights = weights

    @torch.no_grad()
    def build(self, *args: Any, **kwargs: Any) -> None:
        """Make the parameters, from one look at the model with these arguments; random state is left as it was."""
        with forked_rng():
            torch.manual_seed(int(torch.randint(2**62, ())))  # networks are not made of the numbers drawn next
            self._setup_prototype(*args, **kwargs)
            rows = self._build_context(args, kwargs)
            flows = nn.ModuleDict()
            for block in self._blocks:
                above = sum(other.features for other in self._blocks if other.key in block.uppers)
                flows[module_key(block.key)] = self._new_flow(block, above + rows.get(block.key, 0))
        example = self._blocks[0].slots[0].latent.start
        flows = flows.to(example.device, example.dtype)
        if not isinstance(self._make[0], nn.Module):  # a flow that is the user's own keeps its parameters
            self._packing = Packing(flows)
            self.register_parameter("weights", nn.Parameter(self._packing.first))
            self.register_buffer("mask", self._packing.mask, persistent=False)
        self.add_module("flows", flows)
        if self._num_weights:
            weights = torch.zeros(self._num_weights, dtype=example.dtype, device=example.device)
            self.register_parameter("centering", nn.Parameter(weights))
        if self._unloaded is not None:
            state, self._unloaded = self._unloaded, None
            self.load_state_dict(state)

    def _new_flow(self, block: Block, context: int) -> Flow:
        loc = torch.cat([first_location(slot, START) for slot in block.slots])
        flow, features = self._make[0], block.features
        if isinstance(flow, str):
            options: Any = {"base": self._base, "hidden_features": self._hidden_features, "affine": None}
            made = make_flow(flow, features, context, **options).to(loc.device, loc.dtype)
        else:
            made = as_flow(flow if isinstance(flow, nn.Module) else flow(features, context), context=context)
            made = made.to(loc.device, loc.dtype)
            shape = FlowDistribution(made, loc.new_zeros(context) if context else None).event_shape
            if shape != (features,):
                sites = ", ".join(f"'{slot.name}' {slot.size}" for slot in block.slots)
                raise ValueError(f"the flow has {shape[0]} features, but the model {features} coordinates: {sites}")
        scale = torch.full_like(loc, self._init_scale)
        if made.affine is not None:
            made.affine.restart(loc, scale)
        elif self._affine is not None:
            if self._affine not in ("diag", "tril"):
                raise ValueError(f'affine must be "diag", "tril" or None, got {self._affine!r}')
            made.affine = Affine(loc, scale, dense=self._affine == "tril", rate=self._affine_rate)
        if len(self._blocks) > 1 and any(slot.weight is not None for slot in block.slots):
            made.standard = Standard(block)
        return made

    # Sampling

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site, and return the values by name."""
        if not self._built:
            self.build(*args, **kwargs)
        if not self._is_registered():
            self._register()
        plates = self._create_plates(*args, **kwargs)
        draw = Draw()
        flows, weights = self._unpacked(), self._weights()
        for block in self._blocks:
            if any(slot.name in draw.pending for other in self._uppers(block) for slot in other.slots):
                self._settle(draw, weights, plates, args, kwargs)
            context = self._context(block, draw, flows, plates, args, kwargs)
            with _inside(block.plates, plates):
                name = f"_{self._pyro_name}_{block.key}"
                drawn = pyro.sample(
                    name, FlowDistribution(flows[module_key(block.key)], context), infer={"is_auxiliary": True}
                )
            self._unpack(block, drawn, draw)
        if draw.pending:
            self._settle(draw, weights, plates, args, kwargs)
        return self._emit(draw, plates)

    def _unpacked(self) -> Any:
        """Return the flows with their parameters in place, registered with Pyro."""
        if self._packing is not None:
            self._packing.unpack(self.weights, self.mask)
            return self._modules["flows"]  # which has no parameters for Pyro to look for
        return self.flows

    def _weights(self) -> Tensor | None:
        return torch.sigmoid(START + RATE * self.centering) if self._num_weights else None

    def _uppers(self, block: Block) -> list[Block]:
        return [other for other in self._blocks if other.key in block.uppers]

    def _context(
        self, block: Block, draw: Draw, flows: Any, plates: Mapping[str, Any], args: tuple, kwargs: dict
    ) -> Tensor | None:
        """Return what a block's flow is conditioned on, ``[*batch, context]``."""
        parts = []
        for other in self._uppers(block):
            white = flows[module_key(other.key)].whiten(draw.blocks[other.key])
            parts.append(summary(other, draw, white, flows[module_key(other.key)].standard))
        parts += self._rows(block, plates, args, kwargs)
        if not parts:
            return None
        if len(parts) == 1:
            return parts[0]
        shape = broadcast([part.shape[:-1] for part in parts])
        return torch.cat([part.expand(shape + part.shape[-1:]) for part in parts], -1)

    def _unpack(self, block: Block, drawn: Tensor, draw: Draw) -> None:
        """Split a block's draw into its sites' values."""
        draw.blocks[block.key] = drawn
        for slot, part in zip(block.slots, drawn.split([slot.size for slot in block.slots], -1), strict=True):
            event = slot.shape[len(slot.shape) - slot.latent.unconstrained_event_dim :]
            own = slot.shape[: len(slot.shape) - len(event)]  # plates, for which the draw has dimensions of size 1
            part = part.reshape(drawn.shape[: max(drawn.dim() - 1 - len(own), 0)] + own + event)
            if slot.weight is None:
                draw.settle(slot, part)
            else:
                draw.pending[slot.name] = (slot, part)

    def _settle(self, draw: Draw, weights: Tensor | None, plates: Mapping[str, Any], args: tuple, kwargs: dict) -> None:
        """Run the model far enough to know the priors of all sites that wait for theirs, and make their values."""

        def value(name: str, fn: Any) -> Tensor | None:
            if name in draw.pending and weights is not None:
                slot, w = draw.pending.pop(name)
                prior = known_prior(name, fn)
                c = weights[slot.weight].expand(w.shape)
                if c.requires_grad:
                    c.register_hook(zero_nonfinite)
                u, ladj = center(w, c, prior)
                dims = slot.latent.unconstrained_event_dim
                draw.ladj[name] = sum_rightmost(ladj.expand(u.shape), dims)
                return draw.settle(slot, u)
            return draw.values.get(name)

        indices = {name: plate.indices for name, plate in plates.items()}
        self._run_priors(set(draw.pending), value, indices, args, kwargs)

    def _run_priors(
        self, wanted: set[str], value: Callable, indices: Mapping[str, Tensor], args: tuple, kwargs: dict
    ) -> None:
        if self.model is None:
            raise RuntimeError(
                f"this {type(self).__name__} was restored without its model, which could not be pickled, and needs it "
                "to know the priors that it works with: set guide.model = model."
            )
        with pyro.validation_enabled(False):  # a draw that overflows is for the loss to drop or to refuse
            PriorRun(wanted, value, indices).run(self.model, args, kwargs)

    def _emit(self, draw: Draw, plates: Mapping[str, Any]) -> dict[str, Tensor]:
        """Make the model's sites, each a point mass whose weight is the Jacobian of what was done to the draw."""
        result = {}
        for slot in (slot for block in self._blocks for slot in block.slots):
            latent, value = slot.latent, draw.values[slot.name]
            density: Tensor | float = -draw.ladj[slot.name] if slot.weight is not None else 0.0
            if not is_identity(latent.transform) and poutine.get_mask() is not False:
                density = density + inverse_log_det(latent, value, draw.unconstrained[slot.name])
            with _inside(latent.plates, plates):
                fn = dist.Delta(value, log_density=density, event_dim=latent.event_dim)
                result[slot.name] = pyro.sample(slot.name, fn)
        return result

    # What was learned

    @property
    def centering_weights(self) -> dict[str, float]:
        """Learned centring weight of each site that is non-centred automatically: 0 non-centred, 1 centred."""
        slots = [slot for block in self._blocks for slot in block.slots if slot.weight is not None]
        weights = self._weights()
        return {} if weights is None else {slot.name: float(weights[slot.weight].detach()) for slot in slots}

    @property
    def num_dropped(self) -> int:
        """Draws left out of gradients so far because theirs was not finite."""
        flows: Any = self.flows.values() if self._built else ()
        return sum(int(flow.dropped) for flow in flows)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of every latent coordinate by name, from ``num_quantile_samples`` draws."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles of every latent coordinate by name, ``[quantile, *plates, *event]``, as median does."""
        levels = torch.as_tensor(quantiles)
        if levels.dim() != 1 or (levels < 0).any() or (levels > 1).any():
            raise ValueError(f"quantiles must be a sequence of numbers between 0 and 1, got {quantiles}")
        if not self._built:
            self.build(*args, **kwargs)
        draws = many_draws(self, self._nesting, self.num_quantile_samples, args, kwargs)
        sites = {slot.name for block in self._blocks for slot in block.slots}
        return {name: _quantiles(self._aligned(name, draws[name]), levels) for name in sites}

    @property
    def _nesting(self) -> int:
        return max((-frame.dim for frame in self._prototype_frames.values()), default=0)

    def _aligned(self, name: str, value: Tensor) -> Tensor:
        """Take out the dimensions between the draws and a site's own."""
        latent = next(slot.latent for block in self._blocks for slot in block.slots if slot.name == name)
        own = latent.batch_dim + latent.event_dim
        return value.reshape(value.shape[:1] + value.shape[value.dim() - own :])

    @torch.no_grad()
    def warm_start(
        self, source: str | Callable, *args: Any, num_steps: int = 1000, num_samples: int = 1000, **kwargs: Any
    ) -> None:
        """Start the outer affine maps from the means and covariances of another guide. Call it before training.

        Args:
            source: a trained guide of the same model; or ``"normal"`` or ``"laplace"`` to fit Pyro's ``AutoNormal`` or
                ``AutoLaplaceApproximation`` first, which leaves the param store as it was.
            *args: the model's positional arguments.
            num_steps: Adam steps of that fit, at a rate that falls from 0.05 to 0.0005.
            num_samples: draws from the guide.
            **kwargs: the model's keyword arguments.

        Raises:
            ValueError: an unknown source, one without all latent sites, or a flow without an affine map.
        """
        if not self._built:
            self.build(*args, **kwargs)
        draws = gaussian_draws(self, source, num_steps, num_samples, args, kwargs)
        values = {slot.name: draws.get(slot.name) for block in self._blocks for slot in block.slots}
        missing = sorted(name for name, value in values.items() if value is None)
        if missing:
            raise ValueError(f"the guide to start from has no site '{missing[0]}'")
        indices = {name: draws[name] for name in self._prototype_frames if name in draws}
        white = self._whitened(values, indices, args, kwargs)
        flows = self._unpacked()
        for block in self._blocks:
            affine: Any = flows[module_key(block.key)].affine
            if affine is None:
                raise ValueError("a flow without an affine map, affine=None, has nothing to start from a Gaussian")
            rows = torch.cat([white[slot.name] for slot in block.slots], -1)
            affine.restart(rows.mean(0), covariance_triangle(rows))
        if self._packing is not None:
            self.weights.copy_(self._packing.pack())
        self._supersede()

    def _whitened(
        self, values: Mapping[str, Any], indices: Mapping[str, Tensor], args: tuple, kwargs: dict
    ) -> dict[str, Tensor]:
        """Return what the flows would have drawn for some values, ``[rows, size]`` by site."""
        slots = {slot.name: slot for block in self._blocks for slot in block.slots}
        unconstrained = {name: slot.latent.transform.inv(values[name]) for name, slot in slots.items()}
        weights = self._weights()

        def value(name: str, fn: Any) -> Tensor | None:
            slot = slots.get(name)
            if slot is not None and slot.weight is not None and weights is not None:
                unconstrained[name] = whiten(unconstrained[name], weights[slot.weight], known_prior(name, fn))
            return values.get(name)

        wanted = {name for name, slot in slots.items() if slot.weight is not None}
        if wanted:
            self._run_priors(wanted, value, indices, args, kwargs)
        return {name: unconstrained[name].reshape(-1, slot.size) for name, slot in slots.items()}


def _inside(names: Iterable[str], plates: Mapping[str, Any]) -> ExitStack:
    stack = ExitStack()
    for name in names:
        stack.enter_context(plates[name])
    return stack
