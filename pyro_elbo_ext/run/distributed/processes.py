"""The processes of one run, and what they do together: add, gather, broadcast."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Bucket", "Processes", "Slot", "fill", "flatten", "make_slot"]

Bucket = tuple[str, torch.dtype]  # type of device and what is added in


class Slot(NamedTuple):
    """What must agree between processes for a tensor to be added: its name, shape, dtype and type of device."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @property
    def bucket(self) -> Bucket:
        """The buffer it travels in; halves are added in float32."""
        return self.device, torch.float32 if self.dtype in (torch.float16, torch.bfloat16) else self.dtype


def make_slot(name: str, tensor: Tensor) -> Slot:
    """Describe a tensor."""
    return Slot(name, tuple(tensor.shape), tensor.dtype, tensor.device.type)


def flatten(tensors: Iterable[Tensor], bucket: Bucket, out: Tensor | None = None) -> Tensor:
    """Return one flat buffer with copies of the tensors, the one given if there is one."""
    return torch.cat([tensor.detach().reshape(-1).to(bucket[1]) for tensor in tensors], out=out)


def fill(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Copy what :func:`flatten` laid out back into the tensors, in place."""
    with torch.no_grad():
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(part.reshape(tensor.shape))


class Processes:
    """The processes of a ``torch.distributed`` group; one, where there is none.

    Under ``torchrun`` a group is made if the script has made none: gloo on the CPU, nccl for tensors on GPUs.

    Args:
        group: a process group, or None for the default one.

    Attributes:
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(self, group: Any = None) -> None:
        _join_torchrun()
        self._group = group
        running = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if running else 0
        self.world_size = dist.get_world_size(group) if running else 1
        self._lost = ""

    @property
    def home(self) -> torch.device:
        """A device that the group can add on when there is no tensor yet."""
        return torch.device("cuda" if dist.get_backend(self._group) == "nccl" else "cpu")

    def add(self, buffer: Tensor) -> None:
        """Replace a buffer by its sum over processes."""
        self._guard(lambda: dist.all_reduce(buffer, group=self._group))

    def gather(self, item: Any) -> list[Any]:
        """Return every process's item, by rank."""
        items: list[Any] = [None] * self.world_size
        self._guard(lambda: dist.all_gather_object(items, item, group=self._group))
        return items

    def broadcast(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite tensors by those of rank 0, all of one kind at once."""
        kinds: dict[Bucket, list[Tensor]] = {}
        for name in sorted(tensors):
            dtype = torch.uint8 if tensors[name].dtype is torch.bool else tensors[name].dtype
            kinds.setdefault((tensors[name].device.type, dtype), []).append(tensors[name])
        source = 0 if self._group is None else dist.get_global_rank(self._group, 0)
        for kind in sorted(kinds, key=str):
            flat = flatten(kinds[kind], kind)
            self._guard(lambda flat=flat: dist.broadcast(flat, source, group=self._group))  # type: ignore[misc]
            fill(kinds[kind], flat)

    def _guard(self, collective: Callable[[], Any]) -> None:
        """Run a collective, and say what has happened where it fails.

        Raises:
            RuntimeError: another process is gone, or did not come within the group's timeout.
        """
        if not self._lost:
            try:
                collective()
                return
            except RuntimeError as error:
                text = str(error).partition("\n")[0].partition(". This is typically")[0]
                self._lost = re.sub(r"^\[\S*\] ", "", text)  # without the line of gloo's source
                raise RuntimeError(self._message()) from error
        raise RuntimeError(self._message())

    def _message(self) -> str:
        return (
            f"rank {self.rank} of {self.world_size} lost the others: {self._lost.rstrip('.')}. A process has ended "
            "(killed, out of memory, an error of its own), or did not come within the group's timeout. Nothing was "
            "updated here in this step. Start all processes again from the last checkpoint; any number of them can go "
            "on from it."
        )


def _join_torchrun() -> None:
    if not dist.is_available() or dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
