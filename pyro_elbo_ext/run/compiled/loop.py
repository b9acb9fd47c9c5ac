"""Many steps inside one compiled call."""

from __future__ import annotations

import logging
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.distributions import Distribution

from pyro_elbo_ext.run.compiled.packages import PackageStore, fingerprint
from pyro_elbo_ext.run.compiled.step import Carried, Inputs

__all__ = ["BLOCK", "Block", "Outcome", "compile_block"]

BLOCK = 256  # steps of one call at most: the losses' buffer, and how long an interruption waits
logger = logging.getLogger("pyro_elbo_ext")

Block = Callable[[int, Inputs], "Outcome"]


class Outcome(NamedTuple):
    """What a block of steps did.

    Attributes:
        carried: what goes on to the next.
        losses: one for each step taken.
        ok: whether all were finite.
    """

    carried: Carried
    losses: Tensor
    ok: bool


def compile_block(step: fx.GraphModule, inputs: Inputs, say: Callable[[str], None]) -> tuple[Block, str]:
    """Compile up to ``BLOCK`` steps into one call, or load what an earlier process compiled.

    Where torch cannot compile a loop the compiled step runs in a Python loop; where there is no C++ compiler the graph
    runs operation by operation. Steps end where a loss or gradient is not finite, with the coordinates before it.

    Args:
        step: one step.
        inputs: of the first block.
        say: is told what is being done.

    Returns:
        The call, and how it runs: ``"loop"``, ``"step"`` or ``"graph"``.
    """
    on_gpu = inputs.carried[0].is_cuda
    ways: list[tuple[str, Callable[[], Block]]] = [("step", lambda: _python_loop(_compiled(step, on_gpu)))]
    if not on_gpu:
        ways.insert(0, ("loop", lambda: _packaged_loop(step, inputs, say)))
    for name, make in ways:
        try:
            with _quietly():
                block = make()
                block(1, inputs)  # the step itself is thrown away
            return block, name
        except Exception as error:
            said = " ".join(str(error).split("\n\n")[0].split())
            logger.warning("compiling the %s failed (%s); going on without", name, said)
    return _python_loop(step), "graph"


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep to itself what torch does when it first compiles: warn of itself, and switch validation off for all."""
    validation = Distribution._validate_args
    talking = [logging.getLogger(name) for name in ("torch._inductor", "torch.export")]
    levels = [talker.level for talker in talking]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for talker in talking:
                talker.setLevel(logging.CRITICAL)
            yield
    finally:
        for talker, level in zip(talking, levels, strict=True):
            talker.setLevel(level)
        Distribution.set_default_validate_args(validation)


def _compiled(step: fx.GraphModule, on_gpu: bool) -> Callable:
    options: dict[str, Any] = {"triton.cudagraphs": True} if on_gpu else {"cpp_wrapper": True}
    return torch.compile(_own_code(step.forward), fullgraph=True, dynamic=False, options=options)


def _own_code(method: Any) -> Callable:
    """Give a method code of its own: torch counts what it compiles by the code that it was given."""
    function = method.__func__
    code, outside = function.__code__.replace(), function.__globals__
    own = types.FunctionType(code, outside, function.__name__, function.__defaults__, function.__closure__)
    return types.MethodType(own, method.__self__)


class _Loop(nn.Module):
    """Steps until so many were taken or one was not finite."""

    def __init__(self, step: fx.GraphModule, num_tables: int, num_given: int) -> None:
        super().__init__()
        self._step, self._num_tables, self._num_given = step, num_tables, num_given

    def forward(self, num: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        from torch._higher_order_ops.while_loop import while_loop  # a private name, imported here alone

        tables, given = values[: self._num_tables], values[self._num_tables : self._num_tables + self._num_given]
        start = values[self._num_tables + self._num_given :]
        steps = torch.arange(BLOCK, device=num.device)

        def goes_on(count: Tensor, ok: Tensor, *_: Any) -> Tensor:
            return (count < num) & ok

        def body(count: Tensor, ok: Tensor, losses: Tensor, *carried: Tensor) -> tuple[Tensor, ...]:
            entries = [table.index_select(0, count.reshape(1))[0] for table in tables]
            loss, ok, *carried_on = self._step(*entries, *given, ok, *carried)
            losses = torch.where(steps == count, loss, losses)
            return (count + 1, ok, losses.clone(), *(part.clone() for part in carried_on))

        zero = torch.zeros((), dtype=torch.int64, device=num.device)
        fine = torch.ones((), dtype=torch.bool, device=num.device)
        losses = torch.zeros(BLOCK, dtype=start[0].dtype, device=num.device)
        return while_loop(goes_on, body, (zero, fine, losses, *start))


def _packaged_loop(step: fx.GraphModule, inputs: Inputs, say: Callable[[str], None]) -> Block:
    """Load the loop, or compile it for this process and others."""
    flat = [*inputs.tables, *inputs.given, *inputs.carried]
    store, name = (
        PackageStore(),
        fingerprint(step, flat, BLOCK, len(inputs.tables), len(inputs.given), _described(_Loop.forward.__code__)),
    )
    call = store.load(name)
    if call is not None:
        try:
            block = _calling(call)
            block(1, inputs)
            return block
        except RuntimeError:  # another's, or damaged: made anew in its place
            logger.warning("a compiled loop in %s cannot be run, and is made anew", store.folder)
    say("compiling")
    loop = _Loop(step, len(inputs.tables), len(inputs.given))
    return _calling(store.save(name, lambda path: _package(loop, flat, path)))


def _calling(call: Callable[[list[Tensor]], list[Tensor]]) -> Block:
    def block(num: int, inputs: Inputs) -> Outcome:
        first = torch.tensor(num, device=inputs.carried[0].device)
        count, ok, losses, *carried = call([first, *inputs.tables, *inputs.given, *inputs.carried])
        return Outcome(tuple(carried), losses[: int(count)], bool(ok))

    return block


def _described(code: types.CodeType) -> tuple:
    """Return what a piece of code does, the same in every process."""
    inside = [_described(part) if isinstance(part, types.CodeType) else repr(part) for part in code.co_consts]
    return code.co_code, code.co_names, inside


def _package(loop: nn.Module, example: Sequence[Tensor], path: Path) -> None:
    """Compile a module ahead of time."""
    from torch._inductor import aoti_compile_and_package, config  # imports for seconds
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list
    from torch._inductor.exc import CppCompileError, InductorError

    with torch.no_grad():
        exported = torch.export.export(loop, (torch.tensor(1, device=example[-1].device), *example), strict=False)
    with config.patch({"aot_inductor.metadata": {}}):  # which it writes to
        try:  # trusting the compiler with the CPU's vectors, which to try out takes seconds
            aoti_compile_and_package(exported, package_path=str(path), inductor_configs={"cpp.vec_isa_ok": True})
        except (CppCompileError, InductorError):
            valid_vec_isa_list.cache_clear()
            aoti_compile_and_package(exported, package_path=str(path))


def _python_loop(step: Callable) -> Block:
    def block(num: int, inputs: Inputs) -> Outcome:
        carried: Sequence[Tensor] = inputs.carried
        seen, ok = [], torch.ones((), dtype=torch.bool, device=carried[0].device)
        with torch.no_grad():
            for i in range(num):  # without a look at a value: a GPU need not be waited for
                entries = [table[i] for table in inputs.tables]
                loss, ok, *carried = step(*entries, *inputs.given, ok, *carried)
                ok, carried = ok.clone(), [part.clone() for part in carried]  # a CUDA graph reuses its results
                seen.append(torch.stack([loss, ok.to(loss)]))
        losses, fine = torch.stack(seen).unbind(1)
        taken = min(int(fine.sum()) + 1, num)
        return Outcome(tuple(carried), losses[:taken], bool(ok))

    return block
