"""What a graph changes in place, such as running means and counters, made results of it."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["CompileError", "is_same", "return_changes"]


class CompileError(ValueError):
    """A model, guide, loss or optimiser whose step is no fixed graph of tensor operations."""


def is_same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are one, or one is the other detached."""
    if one is other:
        return True
    return one.numel() > 0 and one.data_ptr() == other.data_ptr() and one.shape == other.shape


def return_changes(module: fx.GraphModule, buffers: Mapping[str, Tensor]) -> list[Tensor]:
    """Replace operations that change what a graph holds by such that return the new value, and return it at the end.

    Args:
        module: changed; its results grow by one for each tensor that it changed.
        buffers: what may be changed, by name.

    Returns:
        The tensors that were changed, those of ``buffers`` themselves.

    Raises:
        CompileError: another tensor is changed, or by an operation that has no such form.
    """
    graph, latest = module.graph, _Latest(module, buffers)
    for node in list(graph.nodes):
        if node.op == "output":
            results = node.args[0]
            node.args = ((*results, *latest.values.values()),)
        elif node.op == "call_function":
            node.args = fx.map_arg(node.args, latest.of)
            if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
                latest.replace(node)
            elif node.target is torch.ops.aten.native_batch_norm.default and node.args[5]:
                latest.replace_batch_norm(node)  # whose schema keeps quiet about what it changes
    graph.eliminate_dead_code()
    module.recompile()
    return [buffers[name] for name in latest.values]


class _Latest:
    """The nodes that hold the present values of what a graph changes."""

    def __init__(self, module: fx.GraphModule, buffers: Mapping[str, Tensor]) -> None:
        self._module, self._buffers = module, buffers
        self.values: dict[str, fx.Node] = {}
        self._names: dict[fx.Node, str] = {}
        for node in module.graph.nodes:
            if node.op == "get_attr":
                value = getattr(module, str(node.target))
                name = next((name for name, buffer in buffers.items() if is_same(buffer, value)), None)
                if name is not None:
                    self._names[node] = name

    def of(self, node: fx.Node) -> fx.Node:
        """Return the node that holds the present value of what a node held at first."""
        return self.values.get(self._names[node], node) if node in self._names else node

    def replace(self, node: fx.Node) -> None:
        """Put an operation without side effects in the place of one that changes its first argument."""
        target: Any = node.target
        subject = node.args[0]
        written = [a for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if not isinstance(subject, fx.Node):
            return
        name = self._names.get(subject)
        if name is None:
            if subject.op == "get_attr":
                shape = tuple(getattr(self._module, str(subject.target)).shape)
                raise CompileError(
                    f"every step changes a tensor of shape {shape} that model or guide holds in place: make it a "
                    "buffer of a module, or train by pyro.infer.SVI."
                )
            return  # made in the step itself
        plain = _without_effects(target)
        if len(written) != 1 or plain is None:
            raise CompileError(
                f"every step changes '{name}' by {target}, which a compiled step cannot: train by pyro.infer.SVI."
            )
        with self._module.graph.inserting_before(node):
            new = self._module.graph.call_function(plain, node.args, node.kwargs)
            new = self._module.graph.call_function(torch.ops.aten.copy.default, (subject, new))  # its dtype and shape
        self.values[name] = new
        node.replace_all_uses_with(new)
        self._names[new] = name
        self._module.graph.erase_node(node)

    def replace_batch_norm(self, node: fx.Node) -> None:
        """The same for batch normalisation in training, which changes its running mean and variance."""
        kept = [self._names.get(arg) for arg in node.args[3:5] if isinstance(arg, fx.Node)]
        if not kept:
            return
        functional = torch.ops.aten._native_batch_norm_legit_functional.default
        with self._module.graph.inserting_before(node):
            new = self._module.graph.call_function(functional, node.args)
            for place, name in enumerate(kept, start=3):
                if name is None:
                    raise CompileError(
                        "batch normalisation changes running means that are no buffers of model or guide: give SVI "
                        "modules, or methods of one, as model and guide."
                    )
                part = self._module.graph.call_function(operator.getitem, (new, place))
                self.values[name] = part
                self._names[part] = name
        node.replace_all_uses_with(new)  # its three results come first
        self._module.graph.erase_node(node)


def _without_effects(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """Return the form of an operation that returns what the other writes."""
    name = target._schema.name.split("::")[1]
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    return getattr(packet, target._overloadname, None)
