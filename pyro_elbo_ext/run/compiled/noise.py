"""All standard normal numbers of a step from one draw: every call of a generator costs a small model microseconds."""

from __future__ import annotations

import math

import torch
from torch import fx

__all__ = ["draw_at_once"]

aten = torch.ops.aten
LARGEST = 4096  # numbers of one draw that is worth joining to others


def draw_at_once(module: fx.GraphModule) -> None:
    """Replace a graph's draws of few standard normal numbers by parts of one draw for each dtype and device."""
    groups: dict[tuple, list[tuple[fx.Node, list[int]]]] = {}
    for node in module.graph.find_nodes(op="call_function", target=aten.normal_.default):
        empty = node.args[0]
        plain = len(node.args) == 1 and not node.kwargs and empty.target is aten.empty.memory_format
        if plain and len(empty.users) == 1 and math.prod(empty.args[0]) <= LARGEST:
            kind = empty.kwargs.get("dtype"), empty.kwargs.get("device")
            groups.setdefault(kind, []).append((node, empty.args[0]))
    for (dtype, device), draws in groups.items():
        if len(draws) > 1:
            _join(module.graph, draws, {"dtype": dtype, "device": device})
    module.graph.eliminate_dead_code()
    module.recompile()


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
