"""Checkpoints of an SVI: tensors and plain values in one file, written whole or not at all."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import SVI
from pyro.infer.util import zero_grads
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_elbo_ext.elbo.base import NonFiniteError
from pyro_elbo_ext.natural.optim import NaturalGradient
from pyro_elbo_ext.tracing import forked_rng

__all__ = ["get_rng_state", "load_checkpoint", "read_checkpoint", "save_checkpoint", "set_rng_state"]

FORMAT = 1  # of the file; a later one that reads differently counts up
PLAIN = (type(None), bool, int, float, str, bytes)


def save_checkpoint(path: str | os.PathLike, svi: SVI, **extra: Any) -> None:
    """Write all that the next step of an SVI depends on to one file.

    That is: unconstrained parameters by name, buffers of a model and guide that are modules, what the optimiser and
    the ELBO remember, and the random state of Python, NumPy and torch, CPU and GPUs. The file replaces an older one
    in one move after it was written and synced, so that a kill at any moment leaves one of the two. It loads under
    ``torch.load(weights_only=True)``: no pickled code.

    Args:
        path: the file.
        svi: what to save; its parameters are those of Pyro's param store.
        **extra: more to keep under these names: tensors, numbers, strings, and lists and dictionaries of them.

    Raises:
        TypeError: a part is none of those; it is named, and nothing is written.
        ValueError: parameters are kept in modules, by Pyro's ``module_local_params``.
    """
    _refuse_local_params()
    content = {"format": FORMAT, "kind": _kind(svi), **_state(svi), "rng": get_rng_state(), "extra": extra}
    _check_plain(content, "checkpoint")
    path = Path(path)
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


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file of :func:`save_checkpoint`, on the CPU.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is truncated, of another kind, or of a later version.
    """
    data = io.BytesIO(Path(path).read_bytes())
    try:
        content = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, by where the file ends
        raise ValueError(
            f"'{path}' cannot be read as a checkpoint: it is truncated, or another kind of file. Nothing was changed. "
            "Remove it, or name another file, to start anew."
        ) from error
    if not isinstance(content, dict) or not {"format", "params", "optimizer", "rng", "extra"} <= set(content):
        raise ValueError(f"'{path}' is no checkpoint of this package: it was not written by save_checkpoint.")
    if content["format"] > FORMAT:
        raise ValueError(
            f"'{path}' has format {content['format']}, and this version reads up to {FORMAT}: update pyro_elbo_ext."
        )
    return content


def load_checkpoint(path: str | os.PathLike, svi: SVI, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Put an SVI where :func:`save_checkpoint` found it: a fresh one in a fresh process, or one that has run.

    The loss is run once, for lazily built guides to make their parameters; then everything is copied in, the random
    state last, so that the next step is the one that the saved SVI would have taken, bit for bit.

    Args:
        path: the file.
        svi: of the same model, guide, optimiser and ELBO.
        *args: arguments of model and guide, as for ``svi.step``; only their shapes matter.
        **kwargs: likewise.

    Returns:
        What was given to :func:`save_checkpoint` as ``extra``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or is of another model, guide, optimiser or ELBO; parameters are named,
            and those that were there keep their values.
    """
    _refuse_local_params()
    content = read_checkpoint(path)
    restore(svi, content, str(path), args, kwargs)
    set_rng_state(content["rng"])
    return content["extra"]


def restore(svi: SVI, content: Mapping[str, Any], path: str, args: tuple, kwargs: dict) -> None:
    """Copy everything but the random state from a checkpoint that was read."""
    if content["kind"] != _kind(svi):
        raise ValueError(
            f"'{path}' was saved with {_listed(content['kind'])}, and this SVI has {_listed(_kind(svi))}. "
            "Make it as it was when the checkpoint was saved, or name another file."
        )
    _make_parameters(svi, args, kwargs)
    leaves, saved = dict(pyro.get_param_store()._params), content["params"]
    _check_same(leaves, saved, path, "parameter")
    buffers = dict(_buffers(svi))
    _check_same(buffers, content["buffers"], path, "buffer")
    with torch.no_grad():
        for name, value in [*saved.items(), *content["buffers"].items()]:
            (leaves if name in leaves else buffers)[name].copy_(value)
    _forget(svi.optim)
    svi.optim.set_state(content["optimizer"])
    memory = _memory(svi)
    if memory is not None:
        memory.load_state_dict(content["loss"])


def get_rng_state() -> dict[str, Any]:
    """Return the random state of Python, NumPy and torch, CPU and GPUs, in tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002  # Pyro seeds this one
    version, numbers, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "python": [version, list(numbers), gauss],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Take over what :func:`get_rng_state` returned. GPUs that are not there are passed over."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, own in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(own, device)
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


def _state(svi: SVI) -> dict[str, Any]:
    memory = _memory(svi)
    return {
        "params": {name: leaf.detach() for name, leaf in pyro.get_param_store()._params.items()},
        "buffers": {name: buffer.detach() for name, buffer in _buffers(svi)},
        "optimizer": svi.optim.get_state(),
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
        module = getattr(part, "__self__", part)
        if isinstance(module, nn.Module):
            for name, buffer in module.named_buffers():
                if id(buffer) not in seen:
                    seen.add(id(buffer))
                    yield f"{role} buffer {name}", buffer


def _make_parameters(svi: SVI, args: tuple, kwargs: dict) -> None:
    """Run the loss once, so that everything that is made when first met is there."""
    with forked_rng(), pyro.poutine.trace(param_only=True) as capture, suppress(NonFiniteError):
        svi.loss_and_grads(svi.model, svi.guide, *args, **kwargs)
    nodes: Mapping[str, Any] = capture.trace.nodes
    zero_grads({site["value"].unconstrained() for site in nodes.values()})


def _forget(optim: PyroOptim) -> None:
    """Make an optimiser take the state that it is given for parameters it has seen, too."""
    optim.optim_objs.clear()
    optim.grad_clip.clear()
    if isinstance(optim, NaturalGradient):
        _forget(optim.inner)


def _check_same(ours: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: str, what: str) -> None:
    for name in [*saved, *ours]:
        here, there = (
            f"{tuple(v.shape)} {v.dtype}" if (v := side.get(name)) is not None else "missing" for side in (ours, saved)
        )
        if here != there:
            raise ValueError(
                f"'{path}' is of another model or guide: {what} '{name}' is {there} there and {here} here. Nothing was "
                "changed. Make model and guide as they were, clear the param store of others' parameters, or name "
                "another file."
            )


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, Tensor) or type(value) in PLAIN:  # a NumPy scalar is a float by isinstance, and not plain
        return
    if isinstance(value, Mapping):
        for key, part in value.items():
            _check_plain(part, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            _check_plain(part, f"{where}[{index}]")
    else:
        raise TypeError(
            f"{where} is a {type(value).__name__}: a checkpoint holds tensors, numbers, strings, and lists and "
            "dictionaries of them, so that it can be read without running code. Nothing was written."
        )


def _refuse_local_params() -> None:
    if pyro.settings.get("module_local_params"):
        raise ValueError(
            "checkpoints keep Pyro's param store, which is empty under module_local_params: save the state_dict of "
            "model, guide and optimiser with torch.save instead."
        )
