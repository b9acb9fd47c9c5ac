"""Checkpoints of an SVI: tensors and plain values in one file, written whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from pyro.infer.util import zero_grads
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_elbo_ext.elbo.base import NonFiniteError
from pyro_elbo_ext.gradients.memory import Memory
from pyro_elbo_ext.natural.optim import NaturalGradient
from pyro_elbo_ext.run.buffers import module_buffers, unchanged
from pyro_elbo_ext.run.random_state import get_rng_state, set_rng_state
from pyro_elbo_ext.run.rates import get_rates, set_rates
from pyro_elbo_ext.tracing import forked_rng

__all__ = ["load_checkpoint", "save_checkpoint"]

FORMAT = 1  # of the file; a later one that reads differently counts up
KEYS = {"format", "kind", "params", "buffers", "optimizer", "rates", "loss", "rng", "extra"}
PLAIN = (type(None), bool, int, float, str, bytes)  # exact types: those derived from them need code to be read
LISTS, MAPPINGS = (list, tuple, torch.Size), (dict, OrderedDict, Counter)


def save_checkpoint(path: str | os.PathLike, svi: SVI, **extra: Any) -> None:
    """Write all that the next step of an SVI depends on to one file.

    That is: the param store, unconstrained, buffers of a model and guide that are modules, what the optimiser and the
    ELBO remember, and the random state of Python, NumPy and torch, CPU and GPUs, of every process. The file replaces
    an older one in one move after it was written and synced, so that a kill at any moment leaves one of the two. It
    loads under ``torch.load(weights_only=True)``: no pickled code.

    Args:
        path: the file.
        svi: what to save; of a :class:`~pyro_elbo_ext.DistributedSVI` all processes make the same call, and that of
            rank 0 writes.
        **extra: more to keep under these names: tensors, numbers, strings, and lists and dictionaries of them.

    Raises:
        TypeError: a part is none of those; it is named, and nothing is written.
        ValueError: parameters are kept in modules, by Pyro's ``module_local_params``, or the file is a folder.
    """
    write_checkpoint(path, svi, pyro.get_param_store()._params, extra)


def write_checkpoint(path: str | os.PathLike, svi: SVI, params: Mapping[str, Tensor], extra: dict[str, Any]) -> None:
    """Write a checkpoint with these unconstrained parameters."""
    check_path(path)
    content = {"format": FORMAT, "kind": _kind(svi), **_state(svi, params), "extra": extra}
    _check_plain(content, "checkpoint")
    content["rng"] = gathered(svi, get_rng_state())
    if getattr(svi, "rank", 0) == 0:
        _replace(Path(path), content)
    if getattr(svi, "world_size", 1) > 1:
        svi.barrier()  # type: ignore[attr-defined]  # what is read next is there


def check_path(path: str | os.PathLike) -> None:
    """Raise where there can be no checkpoint."""
    if pyro.settings.get("module_local_params"):
        raise ValueError(
            "checkpoints keep Pyro's param store, which is empty under module_local_params: save the state_dict of "
            "model, guide and optimiser with torch.save instead."
        )
    if Path(path).is_dir():
        raise ValueError(f"'{path}' is a folder, and a checkpoint is a file: name one in it, such as 'run.pt'.")


def _replace(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    if hasattr(os, "O_DIRECTORY"):  # the move itself reaches the disk with the folder
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def gathered(svi: SVI, value: Any) -> list[Any]:
    """Return a value of every process, in the order of their ranks."""
    return svi.gather(value) if getattr(svi, "world_size", 1) > 1 else [value]  # type: ignore[attr-defined]


def read_checkpoint(path: str | os.PathLike, svi: SVI) -> dict[str, Any] | None:
    """Read a file of :func:`save_checkpoint`, on the CPU; None where there is none, for any process of the SVI.

    Raises:
        ValueError: it is truncated, of another kind, of a later version, or not the same for all processes.
    """
    check_path(path)
    data = Path(path).read_bytes() if Path(path).exists() else None
    found = gathered(svi, None if data is None else hashlib.blake2b(data, digest_size=16).hexdigest())
    if len(set(found)) > 1:
        others = [rank for rank, digest in enumerate(found) if digest != found[0]]
        raise ValueError(
            f"'{path}' is {'missing' if found[0] is None else 'there'} on rank 0 and "
            f"{'missing' if found[others[0]] is None else 'another file'} on rank {', '.join(map(str, others))}: all "
            "processes go on from one file. Name one on a disk that they share, or copy rank 0's to the others."
        )
    return None if data is None else _read(path, data)


def _read(path: str | os.PathLike, data: bytes) -> dict[str, Any]:
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, by where the file ends
        raise ValueError(
            f"'{path}' cannot be read as a checkpoint: it is truncated, or another kind of file. Nothing was changed. "
            "Remove it, or name another file, to start anew."
        ) from error
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"'{path}' is no checkpoint of this package: it was not written by save_checkpoint.")
    if content["format"] > FORMAT:
        raise ValueError(
            f"'{path}' has format {content['format']}, and this version reads up to {FORMAT}: update pyro_elbo_ext."
        )
    if not set(content) >= KEYS:
        raise ValueError(f"'{path}' is no checkpoint of this package: it lacks {sorted(KEYS - set(content))}.")
    return content


def load_checkpoint(path: str | os.PathLike, svi: SVI, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Put an SVI where :func:`save_checkpoint` found it: a fresh one in a fresh process, or one that has run.

    The loss is run once, for lazily built guides to make their parameters; then everything is copied in, the random
    state last, so that the next step is the one that the saved SVI would have taken, bit for bit. Parameters of others
    in the param store are left alone. Of a :class:`~pyro_elbo_ext.DistributedSVI` all processes make the same call;
    on another number of them than had saved, each begins with new random numbers.

    Args:
        path: the file.
        svi: of the same model, guide, optimiser and ELBO. Its step size becomes that of the file.
        *args: arguments of model and guide, as for ``svi.step``; only their shapes matter.
        **kwargs: likewise.

    Returns:
        What was given to :func:`save_checkpoint` as ``extra``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or is of another model, guide, optimiser or ELBO; parameters are named,
            and those that were there keep their values.
    """
    content = read_checkpoint(path, svi)
    if content is None:
        raise FileNotFoundError(f"there is no checkpoint '{path}'")
    check_content(svi, content, str(path), args, kwargs)
    put_content(svi, content)
    return content["extra"]


def check_content(svi: SVI, content: Mapping[str, Any], path: str, args: tuple, kwargs: dict) -> None:
    """Raise where a checkpoint is of something else; run the loss once for that, and change no value."""
    if content["kind"] != _kind(svi):
        raise ValueError(
            f"'{path}' was saved with {_listed(content['kind'])}, and this SVI has {_listed(_kind(svi))}. "
            "Make it as it was when the checkpoint was saved, or name another file."
        )
    with forked_rng(), unmoved(svi):
        names = {*_meet_parameters(svi, args, kwargs), *content["params"]}
        if isinstance(svi.optim, NaturalGradient):
            svi.optim.discover(svi.guide if svi.optim.guide is None else svi.optim.guide, *args, **kwargs)
            svi.optim.check_state(content["optimizer"])
    leaves = {name: leaf for name, leaf in pyro.get_param_store()._params.items() if name in names}
    _check_same(leaves, content["params"], path, "parameter")
    _check_same(dict(_buffers(svi)), content["buffers"], path, "buffer")
    memory = _memory(svi)
    _check_same({} if memory is None else memory.state_dict(), content["loss"], path, "the ELBO's part")


def put_content(svi: SVI, content: Mapping[str, Any]) -> None:
    """Copy everything from a checkpoint that was checked, the random state last."""
    leaves, buffers = pyro.get_param_store()._params, dict(_buffers(svi))
    with torch.no_grad():
        for name, value in content["params"].items():
            leaves[name].copy_(value)
        for name, value in content["buffers"].items():
            buffers[name].copy_(value)
    _forget(svi.optim)
    svi.optim.set_state(content["optimizer"])
    set_rates(svi.optim, content["rates"])
    memory = _memory(svi)
    if memory is not None:
        memory.load_state_dict(content["loss"])
    rank, rngs = getattr(svi, "rank", 0), content["rng"]
    if len(rngs) == getattr(svi, "world_size", 1):
        set_rng_state(rngs[rank])
    else:  # on another number of processes there is no run to repeat: new noise, different on each
        pyro.set_rng_seed(zlib.crc32(rngs[0]["torch"].numpy().tobytes()) % 2**31 + rank)


def _state(svi: SVI, params: Mapping[str, Tensor]) -> dict[str, Any]:
    memory = _memory(svi)
    return {
        "params": {name: leaf.detach() for name, leaf in params.items()},
        "buffers": {name: buffer.detach() for name, buffer in _buffers(svi)},
        "optimizer": _optimizer_state(svi.optim),
        "rates": get_rates(svi.optim),
        "loss": {} if memory is None else dict(memory.state_dict()),
    }


def _memory(svi: SVI) -> Any | None:
    """Return the ELBO where it remembers something, as running baselines do."""
    elbo = getattr(svi.loss, "__self__", None)
    return elbo if hasattr(elbo, "state_dict") and hasattr(elbo, "load_state_dict") else None


def _kind(svi: SVI) -> dict[str, str]:
    elbo = getattr(svi.loss, "__self__", svi.loss)
    optim = type(svi.optim).__name__
    if type(svi.optim) is PyroOptim:
        optim += f"({getattr(svi.optim.pt_optim_constructor, '__name__', 'of a function')})"
    return {"optimiser": optim, "ELBO": getattr(elbo, "__name__", type(elbo).__name__)}


def _listed(kind: Mapping[str, str]) -> str:
    return " and ".join(f"{what} {name}" for what, name in sorted(kind.items(), reverse=True))


def _buffers(svi: SVI) -> Iterator[tuple[str, Tensor]]:
    """Yield buffers of a model and guide that are modules, or methods of one, such as running means."""
    seen: set[int] = set()
    for role, part in (("model", svi.model), ("guide", svi.guide)):
        for name, buffer in module_buffers(part).items():
            if id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{role} buffer {name}", buffer


@contextmanager
def unmoved(svi: SVI) -> Iterator[None]:
    """Leave buffers and the ELBO's running averages as they were, so that looking at a loss changes no later one."""
    elbo = getattr(svi.loss, "__self__", svi.loss)
    parts = [elbo, *getattr(elbo, "__dict__", {}).values()]
    modules = [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]
    buffers = dict(_buffers(svi)) | {str(id(b)): b for module in modules for b in module.buffers()}
    averages = [(module, module.get_extra_state()) for module in modules if isinstance(module, Memory)]
    try:
        with unchanged(buffers.values()):
            yield
    finally:
        for module, state in averages:
            module.set_extra_state(state)


def _meet_parameters(svi: SVI, args: tuple, kwargs: dict) -> set[str]:
    """Run the loss once, so that everything that is made when first met is there; return the parameters' names."""
    with pyro.poutine.trace(param_only=True) as capture, suppress(NonFiniteError):
        svi.loss_and_grads(svi.model, svi.guide, *args, **kwargs)
    nodes: Mapping[str, Any] = capture.trace.nodes
    zero_grads({site["value"].unconstrained() for site in nodes.values()})
    return set(nodes)


def _optimizer_state(optim: PyroOptim) -> dict[str, Any]:
    """Return an optimiser's state, with what was loaded for parameters that it has not stepped since."""
    if isinstance(optim, NaturalGradient):
        return {**optim.get_state(), "inner": _optimizer_state(optim.inner)}
    own = {name: state for name, state in optim.get_state().items() if name is not None}  # of a cleared param store
    return {**optim._state_waiting_to_be_consumed, **own}


def _forget(optim: PyroOptim) -> None:
    """Make an optimiser take the state that it is given for parameters it has seen, too."""
    optim.optim_objs.clear()
    optim.grad_clip.clear()
    optim._state_waiting_to_be_consumed.clear()
    if isinstance(optim, NaturalGradient):
        _forget(optim.inner)


def _check_same(ours: Mapping[str, Any], saved: Mapping[str, Any], path: str, what: str) -> None:
    for name in [*saved, *ours]:
        here, there = (_described(side[name]) if name in side else "missing" for side in (ours, saved))
        if here != there:
            late = "If a later step meets it first, and not these arguments, it has to be made before. "
            late = late if (what, here) == ("parameter", "missing") else ""
            raise ValueError(
                f"'{path}' is of another model or guide: {what} '{name}' is {there} there and {here} here. Nothing was "
                f"changed. {late}Make model and guide as they were, or name another file."
            )


def _described(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _check_plain(value: Any, where: str) -> None:
    kind = type(value)
    if kind in PLAIN or kind in (Tensor, nn.Parameter):
        return
    if kind in MAPPINGS and all(type(key) in PLAIN for key in value):
        for key, part in value.items():
            _check_plain(part, f"{where}[{key!r}]")
    elif kind in LISTS:
        for index, part in enumerate(value):
            _check_plain(part, f"{where}[{index}]")
    else:
        keys = " with other keys than numbers and strings" if kind in MAPPINGS else ""
        raise TypeError(
            f"{where} is a {kind.__name__}{keys}: a checkpoint holds tensors, numbers, strings, and lists and "
            "dictionaries of them, so that it can be read without running code. Nothing was written."
        )
