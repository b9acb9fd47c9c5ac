"""Gradients that were computed already, in a form that autograd adds to others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["graph_leaves", "linearized"]


def graph_leaves(output: Tensor) -> list[Tensor]:
    """Return the tensors that requires-grad chains from an output end in: parameters, in the order they are met."""
    found: dict[int, Tensor] = {}
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found[id(variable)] = variable
        todo.extend(parent for parent, _ in node.next_functions)
    return list(found.values())


def linearized(leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> Any:
    """Return a scalar of value zero whose gradient in each leaf is the given one."""
    return sum((grad.detach() * (leaf - leaf.detach())).sum() for leaf, grad in zip(leaves, grads, strict=True))
