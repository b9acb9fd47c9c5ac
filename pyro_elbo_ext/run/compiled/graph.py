"""An ELBO and its gradient as one graph of tensor operations, taken down from one run of model and guide."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_elbo_ext.run.buffers import unchanged
from pyro_elbo_ext.run.compiled.call import Call
from pyro_elbo_ext.run.compiled.mutation import CompileError, is_same, return_changes
from pyro_elbo_ext.tracing import forked_rng

__all__ = ["CompileError", "LossGraph", "record"]

LIBRARIES = tuple(str(Path(str(file)).parent) for file in (torch.__file__, pyro.__file__, Path(__file__).parents[1]))


class LossGraph(NamedTuple):
    """A loss and its gradient.

    Attributes:
        module: from parameters, the call's values, ``held`` and ``memory`` to loss, gradients and new memory.
        leaves: the unconstrained parameters, by name, that the loss depends on.
        held: tensors that model and guide hold themselves, such as data in a closure: read anew in every call.
        memory: those that a step changes, such as running means and counters.
    """

    module: fx.GraphModule
    leaves: dict[str, Tensor]
    held: list[Tensor]
    memory: list[Tensor]


def record(
    elbo: Any,
    model: Callable,
    guide: Callable,
    leaves: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    call: Call,
) -> LossGraph:
    """Take down the graph of an ELBO at some arguments, and hold it against the ELBO itself.

    Random numbers are drawn anew whenever the graph runs. Everything that is no tensor operation happens now, once.

    Args:
        elbo: with a ``differentiable_loss`` of tensor code.
        model: a Pyro model.
        guide: its guide.
        leaves: unconstrained parameters by name, all there already.
        buffers: by name, what a run may change besides; they are left as they are.
        call: arguments of model and guide.

    Raises:
        CompileError: a branch on a random value, ``.item()``, in-place changes of what model or guide hold, or numbers
            that do not come from torch; the line is named.
    """
    names, tensors = list(leaves), call.values()

    def loss_and_grads(*values: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = call.rebuild(values)
        loss = elbo.differentiable_loss(model, guide, *args, **kwargs)
        grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        used.clear()
        used.extend(name for name, grad in zip(names, grads, strict=True) if grad is not None)
        return (loss.detach(), *(grad for grad in grads if grad is not None))

    used: list[str] = []
    numbers = _other_generators()
    with forked_rng(), pyro.validation_enabled(False), unchanged(buffers.values()):
        expected = _seeded(loss_and_grads, tensors)
    if _other_generators() != numbers:
        raise CompileError("model, guide or loss draws random numbers of Python or NumPy: use pyro.sample or torch.")
    with forked_rng(), pyro.validation_enabled(False), unchanged(buffers.values()):
        try:
            module = make_fx(loss_and_grads)(*(value.clone() for value in tensors))  # apart, if given twice
        except Exception as error:
            raise CompileError(_explain(error)) from error
    mine = {name: leaves[name] for name in used}
    memory = return_changes(module, buffers)
    held = _lift(module, mine, memory)
    with forked_rng(), torch.no_grad():
        found = _seeded(module, [*mine.values(), *tensors, *held, *memory])
    _compare(expected, found[: len(expected)], ["the loss", *(f"the gradient of '{name}'" for name in used)])
    return LossGraph(module, mine, held, memory)


def _other_generators() -> str:
    """Tell the states of generators that are not torch's apart."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  # Pyro seeds this one
    return repr((random.getstate(), name, np.asarray(keys).tobytes(), rest))


def _seeded(call: Callable, values: Sequence[Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    return [part.detach().clone() for part in call(*values)]


def _compare(expected: Sequence[Tensor], found: Sequence[Tensor], what: Sequence[str]) -> None:
    if len(expected) != len(found):
        raise CompileError("the parameters that the loss depends on change from run to run, which no graph can follow.")
    for eager, traced, name in zip(expected, found, what, strict=True):
        tolerance = 50 * torch.finfo(eager.dtype).eps
        size = float(eager.abs().nan_to_num(0.0, 0.0).max()) if eager.numel() else 0.0
        if not torch.allclose(eager, traced, rtol=tolerance, atol=tolerance * size, equal_nan=True):
            raise CompileError(
                f"from one random state {name} is {_short(eager)} and in the graph {_short(traced)}: model, guide or "
                "loss uses what is no tensor operation, such as Python's or NumPy's random numbers, a counter, or a "
                "baseline that remembers. Draw by pyro.sample or torch, or train by pyro.infer.SVI."
            )


def _short(value: Tensor) -> str:
    return f"{value.item():.6g}" if value.numel() == 1 else f"{value.flatten()[:3].tolist()}..."


def _explain(error: Exception) -> str:
    """Say at which line of the user's the tracing failed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_library(frame.filename)]
    where = f" at {Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line}" if frames else ""
    what = str(error).split("\n")[0]
    if "value out of a tracing tensor" in str(error) or "data-dependent" in str(error).lower():
        what = "a number was taken out of a tensor (item(), float(), bool(), or a branch on it)"
    return (
        f"this step cannot be compiled{where or f' ({type(error).__name__})'}: {what}. Keep to tensor operations, as "
        "torch.where for a branch; Pyro's own ELBOs take numbers out of tensors, IWAE_ELBO(1) is their like. Or train "
        'by pyro.infer.SVI, or with fallback="eager".'
    )


def _is_library(filename: str) -> bool:
    return filename.startswith(LIBRARIES) or filename.startswith("<") or "contextlib" in filename


def _lift(module: fx.GraphModule, leaves: Mapping[str, Tensor], memory: Sequence[Tensor]) -> list[Tensor]:
    """Make inputs of all that a graph takes from outside: parameters first, then the call's, held tensors, memory.

    Returns:
        The tensors that are held.
    """
    graph = module.graph
    first = next(node for node in graph.nodes)
    with graph.inserting_before(first):
        inputs = {id(leaf): graph.placeholder(f"leaf_{i}") for i, leaf in enumerate(leaves.values())}
    attributes = [(node, getattr(module, str(node.target))) for node in graph.nodes if node.op == "get_attr"]
    sources = [_source(value, [*leaves.values(), *memory]) for _, value in attributes]
    outside = [_is_outside(node, value) for node, value in attributes]
    held = {id(v): v for v, found in zip(sources, outside, strict=True) if found}
    held = {key: v for key, v in held.items() if not any(v is other for other in (*leaves.values(), *memory))}
    place = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for i, (key, _) in enumerate([*held.items(), *((id(value), value) for value in memory)]):
        with graph.inserting_after(place):
            place = inputs[key] = graph.placeholder(f"outside_{i}")
    for (node, _), value in zip(attributes, sources, strict=True):
        if id(value) in inputs:
            node.replace_all_uses_with(inputs[id(value)])
            graph.erase_node(node)
    module.recompile()
    return [value.detach() for value in held.values()]


def _source(value: Tensor, known: Sequence[Tensor]) -> Tensor:
    """Return which of some tensors a graph's constant is, or itself."""
    return next((other for other in known if is_same(other, value)), value)


def _is_outside(node: fx.Node, value: Tensor) -> bool:
    """Tell a tensor that was there before from a number that the model writes into one, which is copied afresh."""
    return value.numel() > 0 and not all("lift_fresh" in str(user.target) for user in node.users)
