"""Standard normal numbers drawn together: every call of a generator costs a small model microseconds."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

__all__ = ["Noise", "draw_ahead", "draw_at_once"]

aten = torch.ops.aten
LARGEST = 4096  # numbers of one draw that is worth joining to others
FEW = 1024  # numbers of a step that are drawn ahead, for a block of steps
TOGETHER = 16  # torch's generator makes so many at a time: rows of them are the same, drawn one by one or at once


class Noise(NamedTuple):
    """What steps are given of a generator's numbers: a row each.

    Attributes:
        width: numbers of a row.
        kind: their dtype and device.
    """

    width: int
    kind: dict[str, Any]

    def rows(self, num: int) -> Tensor:
        """Draw rows ``[num, width]``."""
        return torch.randn(num, self.width, **self.kind)


def draw_at_once(module: fx.GraphModule) -> None:
    """Replace a graph's draws of few standard normal numbers by parts of one draw for each dtype and device."""
    groups: dict[tuple, list[tuple[fx.Node, list[int]]]] = {}
    for node in module.graph.find_nodes(op="call_function", target=aten.normal_.default):
        if _is_standard(node) and math.prod(node.args[0].args[0]) <= LARGEST:
            kind = node.args[0].kwargs.get("dtype"), node.args[0].kwargs.get("device")
            groups.setdefault(kind, []).append((node, node.args[0].args[0]))
    for (dtype, device), draws in groups.items():
        if len(draws) > 1:
            _join(module.graph, draws, {"dtype": dtype, "device": device})
    module.graph.eliminate_dead_code()
    module.recompile()


def draw_ahead(module: fx.GraphModule) -> tuple[fx.GraphModule, Noise | None]:
    """Make the numbers that a graph draws its first argument, where they are few, standard normal and of one draw.

    Other draws keep their place among those of a step, so that a run is the same however it is divided into calls.

    Returns:
        The graph, and what to give it first, or the graph as it is and None.
    """
    random = torch.Tag.nondeterministic_seeded
    draws = [node for node in module.graph.nodes if random in getattr(node.target, "tags", ())]
    if len(draws) != 1 or not _is_standard(draws[0]) or math.prod(draws[0].args[0].args[0]) > FEW:
        return module, None
    module = copy.deepcopy(module)
    node = next(node for node in module.graph.nodes if node.name == draws[0].name)
    empty = node.args[0]
    shape, size = empty.args[0], math.prod(empty.args[0])
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        row = module.graph.placeholder("noise")
    with module.graph.inserting_before(node):
        part = module.graph.call_function(aten.slice.Tensor, (row, 0, 0, size))
        node.replace_all_uses_with(module.graph.call_function(aten.view.default, (part, shape)))
    module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    kind = {name: empty.kwargs[name] for name in ("dtype", "device") if empty.kwargs.get(name) is not None}
    return module, Noise(math.ceil(size / TOGETHER) * TOGETHER, kind)


def _is_standard(node: fx.Node) -> bool:
    """Tell whether a draw fills a new tensor, all of whose numbers it makes, with standard normal ones."""
    if node.target is not aten.normal_.default or len(node.args) != 1 or node.kwargs:
        return False
    empty = node.args[0]
    return isinstance(empty, fx.Node) and empty.target is aten.empty.memory_format and len(empty.users) == 1


def _join(graph: fx.Graph, draws: list[tuple[fx.Node, list[int]]], kind: dict) -> None:
    sizes = [math.prod(shape) for _, shape in draws]
    with graph.inserting_before(draws[0][0].args[0]):  # type: ignore[arg-type]
        empty = graph.call_function(aten.empty.memory_format, ([sum(sizes)],), kind)
        whole = graph.call_function(aten.normal_.default, (empty,))
        start = 0
        for (node, shape), size in zip(draws, sizes, strict=True):
            part = graph.call_function(aten.slice.Tensor, (whole, 0, start, start + size))
            node.replace_all_uses_with(graph.call_function(aten.view.default, (part, shape)))
            graph.erase_node(node)
            start += size
