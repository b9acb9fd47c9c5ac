"""A whole step, loss, gradient and optimiser, as one graph."""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from pyro_elbo_ext.run.compiled.graph import LossGraph
from pyro_elbo_ext.run.compiled.noise import draw_at_once
from pyro_elbo_ext.run.compiled.updates import Update
from pyro_elbo_ext.tracing import forked_rng

__all__ = ["Carried", "Inputs", "pack", "record_step", "unpack"]

Carried = tuple[Tensor, ...]


class Inputs(NamedTuple):
    """What a block of steps is given.

    Attributes:
        tables: what differs from step to step, each ``[BLOCK, ...]``.
        given: what does not: the call's tensors, and what model and guide hold.
        carried: coordinates, the optimiser's state, and what model, guide and loss remember.
    """

    tables: tuple[Tensor, ...]
    given: tuple[Tensor, ...]
    carried: Carried


def pack(graph: LossGraph, state: Any) -> Carried:
    """Return what is carried from step to step, as it is now, no two in one place; ``state`` is the optimiser's."""
    flat = torch.cat([leaf.detach().reshape(-1) for leaf in graph.leaves.values()])
    return (flat, *(part.clone() for part in (*pytree.tree_leaves(state), *graph.memory)))


def unpack(graph: LossGraph, form: pytree.TreeSpec, carried: Carried) -> tuple[list[Tensor], Any, Carried]:
    """Return the parameters, the optimiser's state, of such a form, and memory."""
    flat, *rest = carried
    leaves = list(graph.leaves.values())
    parts = flat.split([leaf.numel() for leaf in leaves])
    own, memory = rest[: form.num_leaves], tuple(rest[form.num_leaves :])
    shaped = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return shaped, pytree.tree_unflatten(own, form), memory


def record_step(graph: LossGraph, update: Update, form: pytree.TreeSpec, inputs: Inputs) -> fx.GraphModule:
    """Take down one step.

    Returns:
        A graph from an entry of each table, ``given``, whether all was finite so far, and what is carried, to the loss,
        whether all is finite, and what is carried on. That stays as it is from the first step on that is not finite.
    """
    num_tables, num_given = len(inputs.tables), len(inputs.given)
    num_own = len(update.tables(1, 0))

    def step(*values: Tensor) -> tuple[Tensor, ...]:
        entries, given = values[:num_tables], values[num_tables : num_tables + num_given]
        ok, *carried = values[num_tables + num_given :]
        leaves, own, memory = unpack(graph, form, tuple(carried))
        rows, entries = entries[: num_tables - num_own], entries[num_tables - num_own :]
        loss, *found = graph.module(*leaves, *rows, *given, *memory)
        grad = torch.cat([part.reshape(-1) for part in found[: len(leaves)]])
        flat, own = update.step(own, carried[0], grad, entries)
        ok = ok & torch.isfinite(loss) & torch.isfinite(grad).all()
        after = (flat, *pytree.tree_leaves(own), *found[len(leaves) :])
        return (loss, ok, *(torch.where(ok, new, old) for new, old in zip(after, carried, strict=True)))

    fine = torch.ones((), dtype=torch.bool, device=inputs.carried[0].device)
    example = [*(table[0] for table in inputs.tables), *inputs.given, fine, *inputs.carried]
    with forked_rng(), pyro.validation_enabled(False), torch.no_grad():
        module = make_fx(step)(*(value.detach().clone() for value in example))  # one given twice would be one input
    draw_at_once(module)
    return module
