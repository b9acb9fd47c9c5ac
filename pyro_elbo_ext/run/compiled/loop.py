"""Many steps inside one compiled call."""

from __future__ import annotations

import logging
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_elbo_ext.run.compiled.graph import LossGraph
from pyro_elbo_ext.run.compiled.updates import State, Update

__all__ = ["BLOCK", "Block", "Outcome", "compile_block"]

BLOCK = 256  # steps of one call at most: the losses' buffer, and how long an interruption waits
logger = logging.getLogger("pyro_elbo_ext")

Memory = tuple[Tensor, ...]
Block = Callable[[int, Tensor, State, Memory, Sequence[Tensor]], "Outcome"]


class Outcome(NamedTuple):
    """What a block of steps did.

    Attributes:
        flat: coordinates.
        state: of the optimiser.
        memory: of model, guide and loss.
        losses: one for each step taken.
        ok: whether all were finite.
    """

    flat: Tensor
    state: State
    memory: Memory
    losses: Tensor
    ok: bool


def compile_block(
    graph: LossGraph, update: Update, flat: Tensor, state: State, memory: Memory, given: Sequence[Tensor]
) -> tuple[Block, str]:
    """Compile up to ``BLOCK`` steps into one call.

    Where torch has no loop operator the compiled step runs in a Python loop; where there is no C++ compiler the graph
    runs operation by operation. Steps end where a loss or gradient is not finite, with the coordinates before it.

    Returns:
        The call, and how it runs: ``"loop"``, ``"step"`` or ``"graph"``.
    """
    single = _single(graph, update)
    on_gpu = next(iter(graph.leaves.values())).is_cuda
    ways: list[tuple[str, Callable[[], Block]]] = [("step", lambda: _python_loop(_compiled(single, on_gpu)))]
    if not on_gpu:
        ways.insert(0, ("loop", lambda: _compiled_loop(single)))
    for name, make in ways:
        try:
            with _quietly():
                block = make()
                block(1, flat, state, memory, given)  # compiles; the step itself is thrown away
            return block, name
        except Exception as error:
            said = " ".join(str(error).split("\n\n")[0].split())
            logger.warning("compiling the %s failed (%s); going on without", name, said)
    return _python_loop(single), "graph"


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep to itself what torch does when it first compiles: warn of itself, and switch validation off for all."""
    validation = Distribution._validate_args
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Distribution.set_default_validate_args(validation)


def _single(graph: LossGraph, update: Update) -> Callable:
    """Return one step as tensor code: from what is given, whether all was finite so far, and what is carried on.

    That is ``flat, rate, count, *slots, *memory``; it stays as it is from the first step on that is not finite.
    """
    shapes = [leaf.shape for leaf in graph.leaves.values()]
    sizes = [leaf.numel() for leaf in graph.leaves.values()]
    module, num_memory, num_leaves = graph.module, len(graph.memory), len(shapes)

    def single(given: tuple[Tensor, ...], ok: Tensor, *carried: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        flat, rate, count, *rest = carried
        slots, memory = tuple(rest[: len(rest) - num_memory]), rest[len(rest) - num_memory :]
        parts = [part.reshape(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        loss, *found = module(*parts, *given, *memory)
        grad = torch.cat([part.reshape(-1) for part in found[:num_leaves]])
        flat, (rate, count, slots) = update.step(State(rate, count, slots), flat, grad)
        ok = ok & torch.isfinite(loss) & torch.isfinite(grad).all()
        after = (flat, rate, count, *slots, *found[num_leaves:])
        return loss, ok, tuple(torch.where(ok, new, old) for new, old in zip(after, carried, strict=True))

    return single


def _compiled(function: Callable, on_gpu: bool) -> Callable:
    options: dict[str, Any] = {"triton.cudagraphs": True} if on_gpu else {"cpp_wrapper": True}
    return torch.compile(_own_code(function), fullgraph=True, dynamic=False, options=options)


def _own_code(function: Any) -> Callable:
    """Give a function code of its own: torch counts what it compiles by the code that it was given."""
    code, outside = function.__code__.replace(), function.__globals__
    return types.FunctionType(code, outside, function.__name__, function.__defaults__, function.__closure__)


def _compiled_loop(single: Callable) -> Block:
    from torch._higher_order_ops.while_loop import while_loop  # a private name, imported here alone

    def loop(num: Tensor, given: tuple[Tensor, ...], *start: Tensor) -> tuple:
        flat = start[0]
        steps = torch.arange(BLOCK, device=flat.device)

        def goes_on(step: Tensor, ok: Tensor, *_: Any) -> Tensor:
            return (step < num) & ok

        def body(step: Tensor, ok: Tensor, losses: Tensor, *carried: Tensor) -> tuple:
            loss, ok, carried = single(given, ok, *carried)
            losses = torch.where(steps == step, loss, losses)
            return (step + 1, ok, losses.clone(), *(part.clone() for part in carried))

        zero = torch.zeros((), dtype=torch.int64, device=flat.device)
        fine = torch.ones((), dtype=torch.bool, device=flat.device)
        losses = torch.zeros(BLOCK, dtype=flat.dtype, device=flat.device)
        return while_loop(goes_on, body, (zero, fine, losses, *start))

    compiled = _compiled(loop, False)

    def block(num: int, flat: Tensor, state: State, memory: Memory, given: Sequence[Tensor]) -> Outcome:
        start = _laid_out(flat, state, memory)
        with torch.no_grad():
            step, ok, losses, *carried = compiled(torch.tensor(num, device=flat.device), tuple(given), *start)
        return Outcome(*_taken_apart(carried, len(memory)), losses[: int(step)], bool(ok))

    return block


def _python_loop(single: Callable) -> Block:
    def block(num: int, flat: Tensor, state: State, memory: Memory, given: Sequence[Tensor]) -> Outcome:
        carried = _laid_out(flat, state, memory)
        seen, ok = [], torch.ones((), dtype=torch.bool, device=flat.device)
        with torch.no_grad():
            for _ in range(num):  # without a look at a value: a GPU need not be waited for
                loss, ok, carried = single(tuple(given), ok, *carried)
                ok, carried = ok.clone(), tuple(part.clone() for part in carried)  # a CUDA graph reuses its results
                seen.append(torch.stack([loss, ok.to(loss)]))
        losses, fine = torch.stack(seen).unbind(1)
        taken = min(int(fine.sum()) + 1, num)
        return Outcome(*_taken_apart(carried, len(memory)), losses[:taken], bool(ok))

    return block


def _laid_out(flat: Tensor, state: State, memory: Memory) -> tuple[Tensor, ...]:
    return (flat, state.rate, state.steps, *state.slots, *memory)


def _taken_apart(carried: Sequence[Tensor], num_memory: int) -> tuple[Tensor, State, Memory]:
    flat, rate, count, *rest = carried
    split = len(rest) - num_memory
    return flat, State(rate, count, tuple(rest[:split])), tuple(rest[split:])
