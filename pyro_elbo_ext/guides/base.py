"""What the flow guides share: blocks of latent sites, each drawn by one flow, and what turns a draw into values."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoGuide, init_to_median
from torch import Tensor, nn

from pyro_elbo_ext.guides.blocks import Block, Draw, Slot, Standard, make_slot, module_key, summary
from pyro_elbo_ext.guides.distribution import FlowDistribution
from pyro_elbo_ext.guides.flows import RATE, Affine, Flow, as_flow, make_flow
from pyro_elbo_ext.guides.noncentering import LocationScale, PriorRun, center, location_scale, whiten
from pyro_elbo_ext.guides.packing import Packing, zero_nonfinite
from pyro_elbo_ext.guides.structure import Latent, finite, inspect_model, is_identity
from pyro_elbo_ext.guides.summaries import covariance_triangle, gaussian_draws, many_draws
from pyro_elbo_ext.guides.summaries import quantiles as _quantiles
from pyro_elbo_ext.tracing import forked_rng

__all__ = ["FlowGuide"]

START = -4.0  # logit of the first centring weight, 0.018: not yet by how much priors of different rows differ


class FlowGuide(AutoGuide):
    """Base of guides whose latent sites are drawn in blocks, one flow for each.

    A subclass sorts the sites into blocks and says what a block's flow is conditioned on. Parameters are made when the
    guide first runs, or by :meth:`build`; a state loaded before that is kept until then.

    Args:
        model: a Pyro model whose latent sites are continuous.
        flow: ``"iaf"``, ``"coupling"``, ``"spline"``, or a function of (features, context) that returns a flow made by
            :func:`~pyro_elbo_ext.guides.make_flow` or by zuko.
        base: noise of flows given by name.
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
        if not isinstance(flow, str) and base != "normal":
            raise ValueError("base= is for flows given by name; give the function's own flow its base")
        if not isinstance(flow, str) and not callable(flow):
            raise ValueError(f"flow must be a name or a function of (features, context), got {flow!r}")
        self._make: Any = (flow,)  # not registered as a submodule
        self._base, self._affine, self._affine_rate = base, affine, affine_rate
        self._init_loc_fn, self._init_scale, self._noncenter = init_loc_fn, init_scale, noncenter
        self._blocks: tuple[Block, ...] = ()
        self._packing: Packing | None = None
        self._registered = self._loaded = False
        self._unloaded: dict[str, Tensor] | None = None

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
        self._check_rows(structure.given & set(self._prototype_frames), args, kwargs)
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

    def _check_rows(self, given: frozenset[str], args: tuple, kwargs: dict) -> None:
        """Refuse plates whose rows the model is given and the guide would draw for itself."""
        owner = self if self.master is None else self.master()
        made: Any = ()
        if given and owner.create_plates is not None:
            with poutine.block():
                made = owner.create_plates(*args, **kwargs)
        names = {plate.name for plate in ([made] if isinstance(made, pyro.plate) else made)}
        if given - names:
            plate = min(given - names)
            raise ValueError(
                f"plate '{plate}' is given its rows in the model (subsample=...), but the guide would draw its own, "
                "and train each row on the data of another. Use AutoPlatedFlow with create_plates=lambda *args: "
                f"pyro.plate('{plate}', size, subsample=...)."
            )

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
        loc = torch.cat([self._first_location(block, slot) for slot in block.slots])
        flow, features = self._make[0], block.features
        if isinstance(flow, str):
            made = make_flow(flow, features, context, base=self._base, affine=None).to(loc.device, loc.dtype)
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

    def _first_location(self, block: Block, slot: Slot) -> Tensor:
        """Return a site's first coordinates, averaged over the block's plates."""
        start, latent = slot.latent.start, slot.latent
        if slot.weight is not None and latent.prior is not None:
            start = whiten(start, torch.sigmoid(start.new_tensor(START)), latent.prior)
        start = finite(start.expand(latent.start.shape))
        return start.reshape(-1, slot.size).mean(0)

    def _register(self) -> None:
        """Make the parameters known to Pyro's param store, or take over what it has been loaded with."""
        self._registered = True
        if pyro.settings.get("module_local_params"):
            return
        store = pyro.get_param_store()
        start = self._pyro_get_fullname("start")
        modules = [
            self._modules[name] for name in ("flows", "rows") if name in self._modules
        ]  # which registers nothing
        buffers = [b for module in modules if module for b in module.buffers() if b.is_floating_point()]
        for name, parameter in self.named_parameters():
            head, _, tail = name.partition(".")
            full = self._pyro_get_fullname(head) + (f"$$${tail}" if tail else "")
            if full not in store:
                continue
            stored = store[full].detach()
            if self._loaded:
                del store[full]
                continue
            if stored.shape != parameter.shape or start not in store:
                raise ValueError(
                    f"the param store holds '{full}' of shape {tuple(stored.shape)}, where this guide's has "
                    f"{tuple(parameter.shape)}: it is another guide's. Call pyro.clear_param_store() first."
                )
            parameter.data.copy_(stored)
            del store[full]  # to be registered as this guide's own
        if self._loaded and start in store:
            del store[start]
        self._loaded = False
        if start in store:
            for buffer, part in zip(buffers, store[start].detach().split([b.numel() for b in buffers]), strict=True):
                buffer.copy_(part.reshape(buffer.shape))
        else:  # an optimiser leaves alone what no loss depends on
            pyro.param(start, torch.cat([buffer.reshape(-1) for buffer in buffers]))

    def _supersede(self) -> None:
        """Let what the guide has now replace what the param store has, at the next run."""
        self._loaded, self._registered = True, False

    # Sampling

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site, and return the values by name."""
        if not self._blocks:
            self.build(*args, **kwargs)
        if not self._registered:
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
        shape = _broadcast([part.shape[:-1] for part in parts])
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
                prior = _prior(name, fn)
                c = weights[slot.weight].expand(w.shape)
                if c.requires_grad:
                    c.register_hook(zero_nonfinite)
                u, ladj = center(w, c, prior)
                dims = slot.latent.unconstrained_event_dim
                draw.ladj[name] = sum_rightmost(ladj.expand(u.shape), dims)
                return draw.settle(slot, u)
            return draw.values.get(name)

        self._run_priors(set(draw.pending), value, plates, args, kwargs)

    def _run_priors(
        self, wanted: set[str], value: Callable, plates: Mapping[str, Any], args: tuple, kwargs: dict
    ) -> None:
        if self.model is None:
            raise RuntimeError(
                f"this {type(self).__name__} was restored without its model, which could not be pickled, and needs it "
                "to know the priors that it works with: set guide.model = model."
            )
        indices = {name: plate.indices for name, plate in plates.items() if plate.subsample_size < plate.size}
        PriorRun(wanted, value, indices).run(self.model, args, kwargs)

    def _emit(self, draw: Draw, plates: Mapping[str, Any]) -> dict[str, Tensor]:
        """Make the model's sites, each a point mass whose weight is the Jacobian of what was done to the draw."""
        result = {}
        for slot in (slot for block in self._blocks for slot in block.slots):
            latent, value = slot.latent, draw.values[slot.name]
            density: Tensor | float = -draw.ladj[slot.name] if slot.weight is not None else 0.0
            if not is_identity(latent.transform) and poutine.get_mask() is not False:
                jacobian = latent.transform.inv.log_abs_det_jacobian(value, draw.unconstrained[slot.name])
                density = density + sum_rightmost(jacobian, jacobian.dim() - value.dim() + latent.event_dim)
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
        flows: Any = self.flows.values() if self._blocks else ()
        return sum(int(flow.dropped) for flow in flows)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of every latent coordinate by name, from ``num_quantile_samples`` draws."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return quantiles of every latent coordinate by name, ``[quantile, *plates, *event]``, as median does."""
        levels = torch.as_tensor(quantiles)
        if levels.dim() != 1 or (levels < 0).any() or (levels > 1).any():
            raise ValueError(f"quantiles must be a sequence of numbers between 0 and 1, got {quantiles}")
        if not self._blocks:
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
        if not self._blocks:
            self.build(*args, **kwargs)
        draws = gaussian_draws(self, source, num_steps, num_samples, args, kwargs)
        values = {slot.name: draws.get(slot.name) for block in self._blocks for slot in block.slots}
        missing = sorted(name for name, value in values.items() if value is None)
        if missing:
            raise ValueError(f"the guide to start from has no site '{missing[0]}'")
        white = self._whitened(values, args, kwargs)
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

    def _whitened(self, values: Mapping[str, Any], args: tuple, kwargs: dict) -> dict[str, Tensor]:
        """Return what the flows would have drawn for some values, ``[rows, size]`` by site."""
        slots = {slot.name: slot for block in self._blocks for slot in block.slots}
        unconstrained = {name: slot.latent.transform.inv(values[name]) for name, slot in slots.items()}
        weights = self._weights()

        def value(name: str, fn: Any) -> Tensor | None:
            slot = slots.get(name)
            if slot is not None and slot.weight is not None and weights is not None:
                unconstrained[name] = whiten(unconstrained[name], weights[slot.weight], _prior(name, fn))
            return values.get(name)

        wanted = {name for name, slot in slots.items() if slot.weight is not None}
        if wanted:
            self._run_priors(wanted, value, self._create_plates(*args, **kwargs), args, kwargs)
        return {name: unconstrained[name].reshape(-1, slot.size) for name, slot in slots.items()}

    # Saving and loading

    @property
    def model(self) -> Any:
        """The model, None where it could not be pickled with the guide."""
        return self._model[0]

    @model.setter
    def model(self, model: Callable) -> None:
        self._model = (model,)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what cannot be pickled: weak references, and a model that is not importable."""
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)
        if self._packing is not None:
            self._packing.cut()
        state = self.__dict__.copy()
        state["master"] = None
        state["prototype_trace"] = None
        for name in ("_model", "_make"):
            try:
                pickle.dumps(state[name])
            except (pickle.PicklingError, AttributeError, TypeError):
                state[name] = (None,)
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> FlowGuide:
        """Copy all but the model and the flow's maker, which two guides may share."""
        shared = {name: self.__dict__[name] for name in ("_model", "_make")}
        state = {name: value for name, value in self.__getstate__().items() if name not in shared}
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(state, memo) | shared)
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Keep a state that comes before the parameters are made until they are."""
        self._supersede()
        if self._blocks:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        else:
            own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
            self._unloaded = {name: value.detach().clone() for name, value in own.items()}


def _broadcast(shapes: Sequence[torch.Size]) -> torch.Size:
    """Return what shapes broadcast to, at a tenth of the time of torch's function, which runs at every step."""
    joined = [1] * max(map(len, shapes))
    for shape in shapes:
        for dim, size in enumerate(reversed(shape), start=1):
            joined[-dim] = size if size != 1 else joined[-dim]
    return torch.Size(joined)


def _inside(names: Iterable[str], plates: Mapping[str, Any]) -> ExitStack:
    stack = ExitStack()
    for name in names:
        stack.enter_context(plates[name])
    return stack


def _prior(name: str, fn: Any) -> LocationScale:
    prior = location_scale(fn)
    if prior is None:
        raise RuntimeError(
            f"the prior of latent site '{name}' was of a location-scale family when the guide was built and now is a "
            f"{type(fn).__name__}: give the guide noncenter=False."
        )
    return prior
