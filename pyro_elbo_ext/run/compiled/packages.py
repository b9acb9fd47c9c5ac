"""Compiled calls on disk, for other processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

__all__ = ["PackageStore", "fingerprint"]

KEPT = 200  # packages of about two megabytes; the longest unused go first


def fingerprint(graph: fx.GraphModule, example: Sequence[Tensor], *others: object) -> str:
    """Return a name for what compiling a graph gives on this machine.

    It is made of operations, constants, the form of inputs, versions, settings of torch and the CPU.
    """
    found = hashlib.sha256(graph.code.encode())
    for name in sorted({str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}):
        value = getattr(graph, name)
        found.update(repr((name, _form(value))).encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    forms = [_form(value) for value in example]
    found.update(repr((forms, _settings(), _cpu(), others)).encode())
    return found.hexdigest()[:40]


def _form(value: Tensor) -> tuple:
    return tuple(value.shape), value.stride(), str(value.dtype), str(value.device)


def _settings() -> tuple:
    """Return what a compiled graph depends on besides itself."""
    from torch._inductor import config

    return (
        torch.__version__,
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        os.environ.get("ATEN_CPU_CAPABILITY"),
        config.save_config_portable(),
    )


def _cpu() -> str:
    """Describe the processor that machine code is made for."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return repr(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return repr((platform.node(), platform.processor(), torch.backends.cpu.get_cpu_capability()))


class PackageStore:
    """A folder of packages: ``$TORCHINDUCTOR_CACHE_DIR/pyro_elbo_ext``, else in the user's cache folder.

    Without such a folder, or where it cannot be written to, nothing is kept: no package is loaded from where others
    may put one.
    """

    def __init__(self) -> None:
        own = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
        home = Path(os.path.expanduser("~"))
        if own is None and home.is_absolute() and home != Path(home.anchor):
            own = str(home / ".cache")
        self.folder = Path(own) / "pyro_elbo_ext" if own else None

    def load(self, name: str) -> Callable[[list[Tensor]], list[Tensor]] | None:
        """Return a call that was saved, or None."""
        if self.folder is None:
            return None
        path = self.folder / f"{name}.pt2"
        try:
            found = _loaded(path)
        except (OSError, RuntimeError):
            return None
        with contextlib.suppress(OSError):
            path.touch()  # it is in use
        return found

    def save(self, name: str, make: Callable[[Path], object]) -> Callable[[list[Tensor]], list[Tensor]]:
        """Have a package made, keep it, and return its call."""
        folder = self._writable()
        with tempfile.TemporaryDirectory(dir=folder, prefix="making-") as making:
            made = Path(making) / f"{name}.pt2"
            make(made)
            if folder is None:
                return _loaded(made)
            made.replace(folder / made.name)  # whole or not at all, whoever else makes it
        _prune(folder)
        return _loaded(folder / made.name)

    def _writable(self) -> Path | None:
        if self.folder is not None:
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
            if os.access(self.folder, os.W_OK):
                return self.folder
        return None


def _prune(folder: Path) -> None:
    """Remove the longest unused packages, and what a process that was killed left behind."""
    with contextlib.suppress(OSError):
        packages = sorted(folder.glob("*.pt2"), key=lambda path: path.stat().st_mtime)
        for path in packages[:-KEPT]:
            path.unlink(missing_ok=True)
        for path in folder.glob("making-*"):
            if path.stat().st_mtime < time.time() - 3600:
                shutil.rmtree(path, ignore_errors=True)


def _loaded(path: Path) -> Callable[[list[Tensor]], list[Tensor]]:
    """Load a package by torch's own loader, which imports nothing, unlike what torch wraps around it."""
    if not path.is_file():
        raise FileNotFoundError(path)
    from torch._C import _aoti  # private, and what torch._inductor.aoti_load_package calls

    return _aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1).run
