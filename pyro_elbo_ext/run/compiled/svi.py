"""SVI whose steps are compiled: the same model, guide, optimiser and loss, without Python between the operations."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import PyroOptim
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_elbo_ext.elbo.base import NonFiniteError, ParticleELBO
from pyro_elbo_ext.natural import NaturalGradient
from pyro_elbo_ext.run.buffers import module_buffers
from pyro_elbo_ext.run.compiled.call import Call
from pyro_elbo_ext.run.compiled.graph import LossGraph, record
from pyro_elbo_ext.run.compiled.loop import BLOCK, Block, Outcome, compile_block
from pyro_elbo_ext.run.compiled.mutation import CompileError
from pyro_elbo_ext.run.compiled.natural import NaturalUpdate
from pyro_elbo_ext.run.compiled.step import Carried, Inputs, pack, record_step, unpack
from pyro_elbo_ext.run.compiled.updates import TorchUpdate, Update
from pyro_elbo_ext.run.distributed.averaging import running_averages
from pyro_elbo_ext.run.progress import Stages
from pyro_elbo_ext.tracing import forked_rng

__all__ = ["CompiledSVI"]

logger = logging.getLogger("pyro_elbo_ext")


class Program(NamedTuple):
    """A compiled step: its graph, the optimiser's part, the form of its state, the call, and how that runs.

    ``layout`` is the form of what the call is given, which does not look at it itself; ``modes`` those of modules.
    """

    graph: LossGraph
    update: Update
    form: pytree.TreeSpec
    layout: list[tuple]
    block: Block
    how: str
    modes: list[tuple]


class CompiledSVI(SVI):
    """SVI with compiled steps, many of them inside one call.

    The first call runs model and guide once, takes down loss, gradient and the optimiser's step as one graph of tensor
    operations, holds it against the eager loss from one random state, and compiles it, which takes tens of seconds, or
    loads it from the disk, where a process before has compiled the same, in one or two. Later calls run it: :meth:`run`
    without Python in between. Other shapes, other arguments that are no tensors, and other parameters are compiled
    anew, which is logged; tensors of the same shapes are not. After every call parameters and the optimiser's state are
    where :class:`pyro.infer.SVI` has them, so that eager code goes on from there, and back.

    For every ELBO class of this package, running baselines included; Pyro's SGD, Adam, AdamW and ClippedAdam, alone or
    in a scheduler, with step sizes by parameter; and ``NaturalGradient``. :class:`~pyro_elbo_ext.Minibatches` as the
    first argument are gone through inside. Buffers of modules, such as batch norm's running means, are carried from
    step to step. Random numbers come from the same distributions as in eager steps, not always from the same sequence.
    Pyro's validation is off inside. Numbers and tensors that model and guide take from outside are those of the first
    call: what is to change must be an argument, or a tensor that changes in place. A schedule of one's own for
    ``NaturalGradient`` is asked for the next steps, up to 256, at once. Tensors that are not contiguous are copied in
    every call. What was compiled is kept in ``$TORCHINDUCTOR_CACHE_DIR`` or else the user's cache folder, in
    ``pyro_elbo_ext``.

    Args:
        model: as in ``pyro.infer.SVI``, like the next three.
        guide: its guide.
        optim: a Pyro optimiser.
        loss: an ELBO of this package.
        fallback: what to do where a step cannot be compiled: ``"raise"``, or ``"eager"`` for SVI's own steps, which is
            logged.
        progress: False for no line that says what the first call is doing; there is none in any case where the output
            is no terminal.
        **kwargs: for ``pyro.infer.SVI``.

    Attributes:
        how: how the last call ran: ``"loop"`` for steps inside one compiled call, ``"step"`` for a Python loop over a
            compiled one, ``"graph"`` where nothing could be compiled, ``"eager"`` for SVI's own; empty before.

    Raises:
        CompileError: in the first step: a branch on a random value, ``.item()``, in-place changes, random numbers that
            are not torch's, or an optimiser that is not known; the line or the parameter is named.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: PyroOptim,
        loss: Any,
        *,
        fallback: str = "raise",
        progress: bool = True,
        **kwargs: Any,
    ) -> None:
        if fallback not in ("raise", "eager"):
            raise ValueError(f'fallback must be "raise" or "eager", got {fallback!r}')
        super().__init__(model, guide, optim, loss, **kwargs)
        self._elbo = loss
        self.fallback = fallback
        self.progress = progress
        self.how = ""
        self._programs: dict[Any, Program | None] = {}  # None where steps are eager

    @property
    def names(self) -> set[str]:
        """Names of the parameters that compiled steps have changed."""
        return {name for program in self._programs.values() if program is not None for name in program.graph.leaves}

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Take one step and return its loss in nats.

        Raises:
            NonFiniteError: the loss or its gradient is not finite; nothing was updated.
        """
        return float(self.run(1, *args, **kwargs)[0])

    def run(self, num_steps: int, *args: Any, **kwargs: Any) -> np.ndarray:
        """Take steps and return their losses in nats, ``[num_steps]``.

        An interruption ends the run after at most 256 steps, with parameters and optimiser in step.

        Args:
            num_steps: how many.
            *args: arguments of model and guide, the same in all steps; data of a subsampled plate is drawn anew, and
                each step has other ones of :class:`~pyro_elbo_ext.Minibatches`.
            **kwargs: keyword arguments.

        Raises:
            NonFiniteError: a loss or its gradient is not finite. The parameters are those before that step.
        """
        num_steps = operator.index(num_steps)
        if num_steps < 1:
            raise ValueError(f"num_steps must be a positive integer, got {num_steps}")
        call = Call(args, kwargs)
        program, inputs = self._program(call)
        if program is None:
            self.how = "eager"
            return np.array([self._eager_step(call) for _ in range(num_steps)])
        self.how = program.how
        losses: list[Tensor] = []
        done = 0
        try:
            while done < num_steps:
                found = _take_block(program, call, inputs, done, min(num_steps - done, BLOCK))
                inputs = inputs._replace(carried=found.carried)
                losses.append(found.losses)
                done += len(found.losses)
                if not found.ok:
                    raise NonFiniteError(
                        f"loss {float(found.losses[-1])} in step {done} of {num_steps}, or a gradient that "
                        "is not finite. Parameters are those before that step. Take smaller steps, or run one step by "
                        "pyro.infer.SVI, whose error names the site."
                    )
        finally:
            _write(inputs.carried, program)
        return torch.cat(losses).double().cpu().numpy()

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Return the loss in nats, of a random minibatch where there are such, without a step or a compiled graph."""
        args, kwargs = Call(args, kwargs).sample()
        return super().evaluate_loss(*args, **kwargs)

    def _eager_step(self, call: Call) -> float:
        args, kwargs = call.next()
        return super().step(*args, **kwargs)

    def _program(self, call: Call) -> tuple[Program | None, Inputs]:
        """Return the program for a call, compiled where there is none, and what it goes on from."""
        nothing = Inputs((), (), ())
        settings = _settings(self._elbo), bool(_PYRO_STACK), torch.get_default_dtype()
        key = (call.key, self.model, self.guide, self.optim, *settings)
        known = self._programs.get(key, self)
        if known is None:
            return None, nothing
        if isinstance(known, Program) and self._still_fits(known):
            inputs = Inputs((), _given(call, known.graph), pack(known.graph, known.update.read()))
            if _layout(inputs) == known.layout:
                return known, inputs
        if self._programs:
            logger.warning("compiling another step: shapes, arguments, parameters or optimiser settings are new")
        try:
            made = self._programs[key] = self._compile(call)
        except CompileError:
            if self.fallback == "raise":
                raise
            logger.warning("steps are eager, for they cannot be compiled", exc_info=True)
            self._programs[key] = None
            return None, nothing
        return made, Inputs((), _given(call, made.graph), pack(made.graph, made.update.read()))

    def _still_fits(self, program: Program) -> bool:
        store = pyro.get_param_store()._params
        same = all(store.get(name) is leaf for name, leaf in program.graph.leaves.items())
        kept = {id(value) for value in self._buffers().values()}
        same = same and all(id(value) in kept for value in program.graph.memory)
        return same and program.modes == _modes(m for m, *_ in program.modes) and program.update.is_current()

    def _compile(self, call: Call) -> Program:
        with Stages("CompiledSVI", self.progress) as stages:
            return self._compile_in_stages(call, stages.say)

    def _compile_in_stages(self, call: Call, say: Callable[[str], None]) -> Program:
        if not hasattr(self._elbo, "differentiable_loss"):
            raise CompileError(f"{type(self._elbo).__name__} has no differentiable_loss to be compiled: use IWAE_ELBO.")
        self._check(call)
        say("running model and guide")
        leaves, called = self._run_once(call)
        say("taking down the step")
        graph = record(self._elbo, self.model, self.guide, leaves, self._buffers(), call)
        update = self._make_update(graph, call)
        state = update.read()
        form = pytree.tree_structure(state)
        tables = tuple(_blank(table) for table in (*call.example_tables(), *update.tables(1, 0)))
        inputs = Inputs(tables, _given(call, graph), pack(graph, state))
        step = record_step(graph, update, form, inputs)
        with forked_rng():
            block, how = compile_block(step, inputs, say)
        return Program(graph, update, form, _layout(inputs), block, how, _modes(called))

    def _make_update(self, graph: LossGraph, call: Call) -> Update:
        if isinstance(self.optim, NaturalGradient):
            args, kwargs = call.example()
            self.optim.look(graph.leaves, self, args, kwargs)
        try:
            if isinstance(self.optim, NaturalGradient):
                return NaturalUpdate(self.optim, graph.leaves)
            return TorchUpdate(self.optim, graph.leaves)
        except ValueError as error:
            raise CompileError(str(error)) from error

    def _check(self, call: Call) -> None:
        """Refuse what a graph would not see change."""
        if _PYRO_STACK:
            raise CompileError("a compiled step knows nothing of effect handlers around it: put them around the model.")
        if type(self._elbo).loss_and_grads is not ParticleELBO.loss_and_grads:
            raise CompileError(
                f"{type(self._elbo).__name__} has a loss_and_grads of its own, which a compiled step would pass over: "
                "use an ELBO of this package, such as IWAE_ELBO(1)."
            )
        call.check()

    def _run_once(self, call: Call) -> tuple[dict[str, Tensor], list[nn.Module]]:
        """Run the loss, so that parameters are there, and return them and the modules that it called."""
        before = {name: value.detach().clone() for name, value in self._buffers().items()}
        called: dict[nn.Module, None] = {}
        args, kwargs = call.example()
        watch = nn.modules.module.register_module_forward_pre_hook(lambda module, _: called.setdefault(module))
        try:
            with forked_rng(), poutine.trace(param_only=True) as capture:
                self._elbo.differentiable_loss(self.model, self.guide, *args, **kwargs)
        finally:
            watch.remove()
        with torch.no_grad():
            for name, value in self._buffers().items():
                if name in before:
                    value.copy_(before[name])
                elif name in running_averages(self._elbo):  # one of the loss that is made now starts at zero
                    value.zero_()
        nodes: Mapping[str, Any] = capture.trace.nodes
        leaves = {name: nodes[name]["value"].unconstrained() for name in sorted(nodes)}
        kinds = {(leaf.dtype, leaf.device) for leaf in leaves.values()}
        if len(kinds) != 1:
            what = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)) or "none"
            raise CompileError(f"there must be parameters, of one dtype on one device, and these are {what}.")
        return leaves, list(called)

    def _buffers(self) -> dict[str, Tensor]:
        """Return what a step may change besides parameters: buffers of modules, and what the loss remembers."""
        found = dict(running_averages(self._elbo))
        for which, part in (("model", self.model), ("guide", self.guide)):
            found |= {f"buffer {which}.{name}": value for name, value in module_buffers(part).items()}
        return found


def _settings(elbo: Any) -> tuple:
    """Return an ELBO's public settings, less what it finds out and counts by itself."""
    found = {name: value for name, value in vars(elbo).items() if not name.startswith("_")}
    found = {name: value for name, value in found.items() if name not in ("max_plate_nesting", "num_dropped")}
    return tuple((name, repr(value)) for name, value in found.items() if not isinstance(value, nn.Module))


def _modes(modules: Iterable[nn.Module]) -> list[tuple]:
    """Return what a step that calls these modules depends on besides values."""
    return [(m, m.training, tuple((p, p.requires_grad) for p in m.parameters(False))) for m in modules]


def _apart(values: list[Tensor]) -> list[Tensor]:
    """Copy tensors that share memory with one before them, which a loop's inputs may not."""
    seen: set[int] = set()
    found = []
    for value in values:
        shared = value.untyped_storage().data_ptr() in seen
        seen.add(value.untyped_storage().data_ptr())
        found.append(value.clone() if shared else value)
    return found


def _given(call: Call, graph: LossGraph) -> tuple[Tensor, ...]:
    return tuple(_apart([*call.tensors, *(value.contiguous() for value in graph.held)]))


def _layout(inputs: Inputs) -> list[tuple]:
    """Return the form of what a compiled call takes as it comes, without a look at it."""
    return [(part.shape, part.stride(), part.dtype, part.device) for part in (*inputs.given, *inputs.carried)]


def _take_block(program: Program, call: Call, inputs: Inputs, done: int, num: int) -> Outcome:
    """Take some steps, before which ``done`` were taken since the optimiser's state was written."""
    rows, taken = call.tables(num), 0
    try:
        tables = tuple(_whole(table) for table in (*rows, *program.update.tables(num, done)))
        found = program.block(num, inputs._replace(tables=tables))
        taken = len(found.losses)
        return found
    finally:
        call.put_back(rows, taken)


def _whole(table: Tensor) -> Tensor:
    """Return a table of a block's full length, the rest of which is not looked at."""
    whole = _blank(table)
    whole[: len(table)] = table
    return whole


def _blank(table: Tensor) -> Tensor:
    return table.new_zeros(BLOCK, *table.shape[1:])


@torch.no_grad()
def _write(carried: Carried, program: Program) -> None:
    """Put a result where eager code looks for it."""
    graph = program.graph
    values, state, memory = unpack(graph, program.form, carried)
    for leaf, value in zip(graph.leaves.values(), values, strict=True):
        leaf.copy_(value)
    for kept, value in zip(graph.memory, memory, strict=True):
        kept.copy_(value)
    program.update.write(state)
