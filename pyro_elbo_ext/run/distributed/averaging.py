"""One flat buffer of gradients, losses and running averages, averaged over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_elbo_ext.gradients.memory import Memory
from pyro_elbo_ext.run.distributed.processes import Bucket, Processes, Slot, fill, flatten, make_slot
from pyro_elbo_ext.run.distributed.sharding import Watch

__all__ = ["Agreed", "Averager", "Work", "running_averages"]


class Agreed(NamedTuple):
    """What all processes have agreed to add up; where it is as in the step before, no more words are needed.

    Attributes:
        slots: parameters, whose gradients are added, and running averages.
        plates: that the step met, with their sizes.
        num_losses: numbers that the loss returns.
    """

    slots: tuple[Slot, ...] = ()
    plates: tuple[tuple[str, tuple[int, int]], ...] = ()
    num_losses: int = 1


class Work(NamedTuple):
    """What this process has found in one call of the loss.

    Attributes:
        kind: what is being done.
        problem: the error that it met, or None.
        loss: a number or a tuple of them.
        params: unconstrained leaves by name, each once.
        memory: running averages by name.
        watch: what it took down.
    """

    kind: str
    problem: Exception | None
    loss: Any
    params: dict[str, Tensor]
    memory: dict[str, Tensor]
    watch: Watch

    @property
    def losses(self) -> tuple[float, ...]:
        """The loss as numbers."""
        loss = self.loss if isinstance(self.loss, tuple) else (self.loss,)
        return () if self.problem is not None or self.loss is None else tuple(float(part) for part in loss)

    @property
    def agreed(self) -> Agreed:
        """What this process would add up."""
        added = {**self.params, **self.memory}
        return Agreed(tuple(make_slot(n, t) for n, t in added.items()), self.watch.plates, len(self.losses))


class Averager:
    """Averages what processes have agreed on: one flat all-reduce, or one for each kind of device and dtype.

    A process that has something else to say raises a flag in the same buffer, so that no process ever waits for another
    in a different collective, and buffers of different lengths never meet.

    Args:
        processes: to average over.

    Attributes:
        agreed: on all processes alike.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.agreed = Agreed()
        self._actual: dict[Bucket, torch.device] = {}
        self._buffers: dict[Bucket, Tensor] = {}

    def agree(self, work: Work) -> None:
        """Add up such work from now on."""
        self.agreed, self._buffers = work.agreed, {}
        self._actual = {make_slot("", t).bucket: t.device for t in (*work.params.values(), *work.memory.values())}

    def add(self, work: Work | None) -> tuple[float, ...] | None:
        """Add what was agreed on over processes; None where some process has something else to say."""
        buckets: dict[Bucket, list[Slot]] = {}
        for slot in self.agreed.slots:
            buckets.setdefault(slot.bucket, []).append(slot)
        if not buckets:
            home = self.processes.home
            buckets[home.type, torch.float64] = []
            self._actual[home.type, torch.float64] = home
        head, losses, total = self._head(work), None, self.processes.world_size
        for i, bucket in enumerate(sorted(buckets, key=str)):
            slots, device = buckets[bucket], self._actual[bucket]
            parts = [_value(work, slot, device) for slot in slots]
            first = [torch.tensor(head, dtype=bucket[1], device=device)] if i == 0 else []
            buffer = self._buffers[bucket] = flatten([*first, *parts], bucket, self._buffers.get(bucket))
            self.processes.add(buffer)
            if i == 0:
                flag, *found = buffer[: len(head)].tolist()
                losses = None if flag else tuple(loss / total for loss in found[: self.agreed.num_losses])
                has_grad = dict(zip((s.name for s in self.agreed.slots), found[self.agreed.num_losses :], strict=True))
                buffer = buffer[len(head) :]
            if work is not None and losses is not None:
                _take(work, slots, buffer.div_(total), has_grad)
        return losses

    def _head(self, work: Work | None) -> list[float]:
        """Return whether there is something to say, the losses, and which parameters have a gradient."""
        if work is None:
            return [1.0] + [0.0] * (self.agreed.num_losses + len(self.agreed.slots))
        grads = [float(s.name in work.memory or work.params[s.name].grad is not None) for s in self.agreed.slots]
        return [0.0, *work.losses, *grads]


def running_averages(loss: Any) -> dict[str, Tensor]:
    """Return the running averages that a loss keeps, by name."""
    found = {}
    for attribute, part in sorted(getattr(loss, "__dict__", {}).items()):
        for path, module in part.named_modules() if isinstance(part, nn.Module) else ():
            for key, value in sorted(module._memory.items()) if isinstance(module, Memory) else ():
                found[f"running average {attribute}.{path} {key}"] = value
    return found


def _value(work: Work | None, slot: Slot, device: torch.device) -> Tensor:
    """Return this process's summand, zeros where it has none."""
    value = None
    if work is not None:
        value = work.memory[slot.name] if slot.name in work.memory else work.params[slot.name].grad
    return torch.zeros(slot.shape, dtype=slot.dtype, device=device) if value is None else value


def _take(work: Work, slots: list[Slot], mean: Tensor, has_grad: Mapping[str, float]) -> None:
    """Put the averages where the summands were."""
    targets = []
    for slot in slots:
        param = work.params.get(slot.name)
        if param is None:
            targets.append(work.memory[slot.name])
            continue
        if param.grad is None and has_grad[slot.name]:
            param.grad = torch.zeros_like(param)
        targets.append(torch.empty_like(param) if param.grad is None else param.grad)
    fill(targets, mean)
