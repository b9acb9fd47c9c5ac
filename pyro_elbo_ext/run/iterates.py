"""Averages of parameters over many steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Iterates"]

MAX_BLOCKS = 16  # whose means are kept apart


class _Block(NamedTuple):
    """Mean of so many blocks of iterates."""

    size: int
    mean: dict[str, Tensor]


class Iterates:
    """Means of parameters over blocks of steps, of which the later half can be averaged.

    Where there are 16 blocks, neighbours become one, and later ones as large, so that what is kept does not grow with
    the steps.

    Attributes:
        blocks: means of those that ended.
    """

    def __init__(self) -> None:
        self.blocks: list[_Block] = []
        self._sum: dict[str, Tensor] = {}  # of the block under way
        self._num = 0

    @torch.no_grad()
    def add(self, params: Mapping[str, Tensor]) -> None:
        """Add one step's parameters; those that are first met within a block count from the next."""
        self._num += 1
        if self._num == 1:
            self._sum = {name: leaf.detach().clone() for name, leaf in params.items()}
            return
        for name, total in self._sum.items():
            self._sum[name] = total.to(params[name].device).add_(params[name])  # a checkpoint's is on the CPU

    def end_block(self) -> None:
        """Take the mean of a block."""
        block = _Block(1, {name: total / self._num for name, total in self._sum.items()})
        self._sum, self._num = {}, 0
        if self.blocks and self.blocks[-1].size < self.blocks[0].size:
            self.blocks[-1] = _joined([self.blocks[-1], block])
            return
        if len(self.blocks) == MAX_BLOCKS:
            self.blocks = [_joined(self.blocks[at : at + 2]) for at in range(0, MAX_BLOCKS, 2)]
        self.blocks.append(block)

    def average(self) -> dict[str, Tensor]:
        """Return the mean over the later half of the blocks that ended, of which there must be one."""
        blocks = list(self.blocks)
        left_out = sum(block.size for block in blocks) // 2
        while blocks[0].size <= left_out:
            left_out -= blocks.pop(0).size
        return _joined(blocks).mean

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        return {"blocks": [list(block) for block in self.blocks], "sum": self._sum, "num": self._num}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.blocks = [_Block(*block) for block in state["blocks"]]
        self._sum, self._num = dict(state["sum"]), state["num"]


def _joined(blocks: Sequence[_Block]) -> _Block:
    """Return neighbouring blocks as one, of the parameters that all have."""
    total, mean = sum(block.size for block in blocks), {}
    for name, last in blocks[-1].mean.items():
        if all(name in block.mean for block in blocks):
            parts = [block.mean[name].to(last.device) * (block.size / total) for block in blocks]
            mean[name] = sum(parts[1:], parts[0])
    return _Block(total, mean)
