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

from pyro_elbo_ext.run.compiled.noise import Noise, draw_ahead
from pyro_elbo_ext.run.compiled.packages import PackageStore, fingerprint
from pyro_elbo_ext.run.compiled.step import Carried, Inputs

__all__ = ["BLOCK", "Block", "Outcome", "compile_block"]

BLOCK = 256  # steps of one call at most: the losses' buffer, and how long an interruption waits
SMALL = 1024  # numbers of a tensor, none of which is worth keeping that can be computed again
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


class _Joined:
    """Tensors of the first's dtype as one: each that a loop carries costs a step an allocation."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._shapes = [part.shape for part in like]
        self._within = [part.dtype == like[0].dtype and part.is_contiguous() for part in like]
        self._sizes = [part.numel() for part, within in zip(like, self._within, strict=True) if within]

    def join(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return one vector, and the tensors that are not in it, none of them any that were given."""
        vector = torch.cat([p.reshape(-1) for p, within in zip(parts, self._within, strict=True) if within])
        return [vector, *(p.clone() for p, within in zip(parts, self._within, strict=True) if not within)]

    def split(self, vector: Tensor, *others: Tensor) -> list[Tensor]:
        """Return the parts that were joined, in their order."""
        inside, outside = iter(vector.split(self._sizes)), iter(others)
        each = zip(self._shapes, self._within, strict=True)
        return [next(inside).view(shape) if within else next(outside) for shape, within in each]


class _Loop(nn.Module):
    """Steps until so many were taken or one was not finite."""

    def __init__(self, step: fx.GraphModule, num_tables: int, num_given: int) -> None:
        super().__init__()
        self._step, self._num_tables, self._num_given = step, num_tables, num_given

    def forward(self, num: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        from torch._higher_order_ops.while_loop import while_loop  # a private name, imported here alone

        tables, given = values[: self._num_tables], values[self._num_tables : self._num_tables + self._num_given]
        start = values[self._num_tables + self._num_given :]
        losses = torch.zeros(BLOCK, dtype=start[0].dtype, device=num.device)
        joined = _Joined([losses, *start])

        def goes_on(count: Tensor, *_: Tensor) -> Tensor:
            return count < num

        def body(count: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
            losses, *carried = joined.split(*parts)
            entries = [table.index_select(0, count.reshape(1))[0] for table in tables]
            fine = torch.ones((), dtype=torch.bool, device=num.device)
            loss, ok, *carried = self._step(*entries, *given, fine, *carried)
            losses = torch.where(torch.arange(BLOCK, device=num.device) == count, loss, losses)
            count = count + torch.where(ok, 1, 1 + BLOCK)  # beyond any number of steps ends the loop
            return (count, *joined.join([losses, *carried]))

        zero = torch.zeros((), dtype=torch.int64, device=num.device)
        count, *parts = while_loop(goes_on, body, (zero, *joined.join([losses, *start])))
        return (count, *(part.clone() for part in joined.split(*parts)))


_SOURCES = _Loop.forward, _Joined.__init__, _Joined.join, _Joined.split  # what a package is made of, besides the step


def _packaged_loop(step: fx.GraphModule, inputs: Inputs, say: Callable[[str], None]) -> Block:
    """Load the loop, or compile it for this process and others."""
    step, noise = draw_ahead(step)
    tables = [*([torch.zeros(BLOCK, noise.width, **noise.kind)] if noise else []), *inputs.tables]
    flat = [*tables, *inputs.given, *inputs.carried]
    options = _options(step)
    how = BLOCK, len(tables), len(inputs.given), options, *(_described(f.__code__) for f in _SOURCES)
    store, name = PackageStore(), fingerprint(step, flat, *how)
    call = store.load(name)
    if call is not None:
        try:
            block = _calling(call, noise)
            block(1, inputs)
            return block
        except RuntimeError:  # another's, or damaged: made anew in its place
            logger.warning("a compiled loop in %s cannot be run, and is made anew", store.folder)
    say("compiling")
    loop = _Loop(step, len(tables), len(inputs.given))
    return _calling(store.save(name, lambda path: _package(loop, flat, options, path)), noise)


def _options(step: fx.GraphModule) -> dict[str, Any]:
    """Settings of Inductor: where all tensors are small, computing a number twice costs less than keeping it."""
    found = [node.meta.get("val") for node in step.graph.nodes]
    if any(isinstance(value, Tensor) and value.numel() > SMALL for value in found):
        return {}
    return {"realize_opcount_threshold": 100, "realize_reads_threshold": 16, "realize_acc_reads_threshold": 24}


def _calling(call: Callable[[list[Tensor]], list[Tensor]], noise: Noise | None) -> Block:
    def block(num: int, inputs: Inputs) -> Outcome:
        first = torch.tensor(num, device=inputs.carried[0].device)
        tables = inputs.tables
        if noise is not None:
            tables = (nn.functional.pad(noise.rows(num), (0, 0, 0, BLOCK - num)), *tables)
        count, losses, *carried = call([first, *tables, *inputs.given, *inputs.carried])
        taken = int(count)
        return Outcome(tuple(carried), losses[: (taken - 1) % BLOCK + 1], taken <= BLOCK)

    return block


def _described(code: types.CodeType) -> tuple:
    """Return what a piece of code does, the same in every process."""
    inside = [_described(part) if isinstance(part, types.CodeType) else repr(part) for part in code.co_consts]
    return code.co_code, code.co_names, inside


def _package(loop: nn.Module, example: Sequence[Tensor], options: dict[str, Any], path: Path) -> None:
    """Compile a module ahead of time."""
    from torch._inductor import aoti_compile_and_package, config  # imports for seconds
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list
    from torch._inductor.exc import CppCompileError, InductorError

    with torch.no_grad():
        exported = torch.export.export(loop, (torch.tensor(1, device=example[-1].device), *example), strict=False)
    with config.patch({"aot_inductor.metadata": {}}):  # which it writes to
        try:  # trusting the compiler with the CPU's vectors, which to try out takes seconds
            aoti_compile_and_package(
                exported, package_path=str(path), inductor_configs={**options, "cpp.vec_isa_ok": True}
            )
        except (CppCompileError, InductorError):
            valid_vec_isa_list.cache_clear()
            aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)


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
