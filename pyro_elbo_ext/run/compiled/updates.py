"""Optimisers' steps as functions of flat tensors, and their state to and from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.optim.optim import _load_state_dict
from torch import Tensor

__all__ = ["State", "TorchUpdate", "Update"]

Slots = tuple[Tensor, ...]
Hyper = Mapping[str, Any]


class State(NamedTuple):
    """What an optimiser remembers: step sizes, numbers of steps taken, and what it keeps of each coordinate.

    Step sizes and numbers are ``[]`` where all parameters share one, else ``[coordinates]``.
    """

    rate: Tensor
    steps: Tensor
    slots: Slots


class Kind(NamedTuple):
    """One optimiser class: names of what it keeps, of settings that must be alike, of settings that are not there."""

    step: Callable[[Hyper, State, Tensor, Tensor], tuple[Tensor, State]]
    slots: tuple[str, ...]
    settings: tuple[str, ...]
    absent: tuple[str, ...]


def _adam(hyper: Hyper, state: State, flat: Tensor, grad: Tensor) -> tuple[Tensor, State]:
    (b1, b2), decay, (rate, count, (mean, square)) = hyper["betas"], hyper["weight_decay"], state
    count = count + 1
    if decay and hyper["decoupled_weight_decay"]:
        flat = flat * (1 - rate * decay)
    elif decay:
        grad = grad + decay * flat
    mean = mean + (1 - b1) * (grad - mean)
    square = b2 * square + (1 - b2) * grad * grad
    spread = square.sqrt() / (1 - b2**count).sqrt() + hyper["eps"]
    return flat - rate / (1 - b1**count) * mean / spread, State(rate, count, (mean, square))


def _clipped_adam(hyper: Hyper, state: State, flat: Tensor, grad: Tensor) -> tuple[Tensor, State]:
    (b1, b2), decay, (rate, count, (mean, square)) = hyper["betas"], hyper["weight_decay"], state
    rate, count = rate * hyper["lrd"], count + 1
    grad = grad.clamp(-hyper["clip_norm"], hyper["clip_norm"])
    if decay:
        grad = grad + decay * flat
    mean = b1 * mean + (1 - b1) * grad
    off = grad - mean if hyper["centered_variance"] else grad
    square = b2 * square + (1 - b2) * off * off
    size = rate * (1 - b2**count).sqrt() / (1 - b1**count)
    return flat - size * mean / (square.sqrt() + hyper["eps"]), State(rate, count, (mean, square))


def _sgd(hyper: Hyper, state: State, flat: Tensor, grad: Tensor) -> tuple[Tensor, State]:
    rate, count, slots = state
    if hyper["weight_decay"]:
        grad = grad + hyper["weight_decay"] * flat
    if hyper["momentum"]:
        moving = hyper["momentum"] * slots[0] + (1 - hyper["dampening"]) * grad
        moving = torch.where(count == 0, grad, moving)  # the first step's is the gradient itself
        grad, slots = grad + hyper["momentum"] * moving if hyper["nesterov"] else moving, (moving,)
    return flat - rate * grad, State(rate, count + 1, slots)


ADAM = Kind(
    _adam,
    ("exp_avg", "exp_avg_sq"),
    ("betas", "eps", "weight_decay", "decoupled_weight_decay"),
    ("amsgrad", "maximize"),
)
KINDS: dict[type, Kind] = {
    torch.optim.Adam: ADAM,
    torch.optim.AdamW: ADAM,
    torch.optim.SGD: Kind(
        _sgd, ("momentum_buffer",), ("momentum", "dampening", "weight_decay", "nesterov"), ("maximize",)
    ),
    ClippedAdam: Kind(
        _clipped_adam,
        ("exp_avg", "exp_avg_sq"),
        ("betas", "eps", "weight_decay", "clip_norm", "lrd", "centered_variance"),
        (),
    ),
}


class Update(Protocol):
    """An optimiser's step for some parameters, as a function; its state is a tree of tensors."""

    def read(self) -> Any:
        """Return the optimiser's state as it is now."""

    def tables(self, num: int, done: int) -> list[Tensor]:
        """Return what steps are told one by one, an entry for each of so many after ``done`` since the last write."""

    def step(self, state: Any, flat: Tensor, grad: Tensor, entries: Sequence[Tensor] = ()) -> tuple[Tensor, Any]:
        """Return coordinates and state after a step, given its entries of the tables: pure tensor code."""

    def write(self, state: Any) -> None:
        """Make the optimiser's own state that of a function's result."""

    def is_current(self) -> bool:
        """Tell whether the optimiser still has the parameters and settings that this was made for."""


class TorchUpdate:
    """The step of one of Pyro's torch optimisers.

    Args:
        optim: the optimiser; one for each parameter is made where there is none yet.
        leaves: its parameters by name, all of one dtype on one device.

    Raises:
        ValueError: an optimiser that is not known here, or settings that differ between parameters.
    """

    def __init__(self, optim: PyroOptim, leaves: Mapping[str, Tensor]) -> None:
        if type(optim).__call__ not in (PyroOptim.__call__, PyroLRScheduler.__call__):
            raise ValueError(f"a compiled step cannot follow {type(optim).__name__}, whose steps are its own.")
        self._optim = optim
        self._own = [_own(optim, leaf) for leaf in leaves.values()]
        self._leaves = list(leaves.values())
        groups = [own.param_groups[0] for own in self._own]
        kinds = {type(own) for own in self._own}
        found = next((KINDS[kind] for kind in kinds if kind in KINDS), None)
        if found is None or len(kinds) > 1:
            known = ", ".join(kind.__name__ for kind in KINDS)
            raise ValueError(f"a compiled step knows {known}, not {', '.join(sorted(k.__name__ for k in kinds))}.")
        if any(clip is not None for clip in optim.grad_clip.values()):
            raise ValueError("a compiled step knows no clip_args: use pyro.optim.ClippedAdam, which clips by itself.")
        for name in found.settings:
            if any(group.get(name) != groups[0].get(name) for group in groups):
                raise ValueError(f"'{name}' differs between parameters, which a compiled step cannot have; lr may.")
        for name in found.absent:
            if groups[0].get(name):
                raise ValueError(f"a compiled step has no {name}=True.")
        self._kind, self._several = found, (False, False)
        self._sizes = [leaf.numel() for leaf in self._leaves]
        self.hyper = {name: groups[0].get(name, False) for name in found.settings}
        self._several = self.read().rate.dim() > 0, self.read().steps.dim() > 0

    def is_current(self) -> bool:
        """Tell whether the optimiser still has the parameters and settings that this was made for."""
        for leaf, own in zip(self._leaves, self._own, strict=True):
            found = self._optim.optim_objs.get(leaf)
            if getattr(found, "optimizer", found) is not own:
                return False
            if any(own.param_groups[0].get(name, False) != value for name, value in self.hyper.items()):
                return False
        return True

    def tables(self, num: int, done: int) -> list[Tensor]:
        """Nothing: step sizes are part of the state, and schedulers are stepped outside."""
        return []

    def step(self, state: State, flat: Tensor, grad: Tensor, entries: Sequence[Tensor] = ()) -> tuple[Tensor, State]:
        """Return coordinates and state after a step: pure tensor code."""
        return self._kind.step(self.hyper, state, flat, grad)

    @property
    def _slots(self) -> tuple[str, ...]:
        return () if self._kind.step is _sgd and not self.hyper["momentum"] else self._kind.slots

    def read(self) -> State:
        """Return the optimiser's state as it is now."""
        rate = self._spread([float(own.param_groups[0]["lr"]) for own in self._own], 0)
        slots = []
        for slot in self._slots:
            kept = [own.state.get(p, {}).get(slot) for own, p in zip(self._own, self._leaves, strict=True)]
            parts = [torch.zeros_like(p) if k is None else k for k, p in zip(kept, self._leaves, strict=True)]
            slots.append(torch.cat([part.detach().reshape(-1) for part in parts]))
        return State(rate, self._spread(self._counts(), 1), tuple(slots))

    def _counts(self) -> list[float]:
        counts = []
        for own, p in zip(self._own, self._leaves, strict=True):
            kept = own.state.get(p, {})
            met = kept.get("momentum_buffer") is not None  # SGD counts no steps
            counts.append(float(kept.get("step", met)))
        return counts

    def _spread(self, values: Sequence[float], which: int) -> Tensor:
        example = self._leaves[0]
        if len(set(values)) == 1 and not self._several[which]:
            return torch.tensor(values[0], dtype=example.dtype, device=example.device)
        parts = [torch.full_like(p, value).reshape(-1) for p, value in zip(self._leaves, values, strict=True)]
        return torch.cat(parts).detach()

    @torch.no_grad()
    def write(self, state: State) -> None:
        """Make the optimiser's own state that of a function's result."""
        rates, counts = (_gathered(part, self._sizes) for part in (state.rate, state.steps))
        slots = [part.split(self._sizes) for part in state.slots]
        for i, (own, p) in enumerate(zip(self._own, self._leaves, strict=True)):
            if self._kind.step is _clipped_adam:
                own.param_groups[0]["lr"] = rates[i]
            own._opt_called = True  # type: ignore[attr-defined]  # for schedulers, which else warn of steps before it
            kept = own.state[p]
            for slot, parts in zip(self._slots, slots, strict=True):
                kept[slot] = parts[i].view(p.shape)
            if self._kind.step is _clipped_adam:
                kept["step"] = int(counts[i])
            elif self._kind.step is _adam:
                kept["step"] = torch.tensor(counts[i], dtype=torch.get_default_dtype(), device="cpu")


def _own(optim: PyroOptim, leaf: Tensor) -> torch.optim.Optimizer:
    """Return a parameter's own torch optimiser, made as Pyro would make it at the first step."""
    if leaf not in optim.optim_objs:
        optim.optim_objs[leaf] = optim._get_optim(leaf)
        optim.grad_clip[leaf] = optim._get_grad_clip(leaf)  # type: ignore[arg-type]
        waiting = optim._state_waiting_to_be_consumed.pop(pyro.get_param_store().param_name(leaf), None)
        if waiting is not None:
            _load_state_dict(optim.optim_objs[leaf], waiting)
    own = optim.optim_objs[leaf]
    return getattr(own, "optimizer", own)  # within a scheduler


def _gathered(part: Tensor, sizes: Sequence[int]) -> list[float]:
    """Return one number for each parameter."""
    if part.dim() == 0:
        return [part.item()] * len(sizes)
    firsts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    return part[firsts.to(part.device)].tolist()
