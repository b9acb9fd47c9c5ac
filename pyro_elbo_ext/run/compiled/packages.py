"""Compiled calls on disk, for other processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

__all__ = ["PackageStore", "fingerprint"]

KEPT = 200  # packages of about two megabytes; the longest unused go first


def fingerprint(graph: fx.GraphModule, example: Sequence[Tensor], *others: object) -> str:
    """Return a name for what compiling a graph gives on this machine: operations, constants, shapes, versions, CPU."""
    found = hashlib.sha256(graph.code.encode())
    for name, value in sorted({**dict(graph.named_buffers()), **_constants(graph)}.items()):
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    shapes = [(tuple(t.shape), t.stride(), str(t.dtype), str(t.device)) for t in example]
    found.update(repr((shapes, torch.__version__, torch.get_num_threads(), _cpu(), others)).encode())
    return found.hexdigest()[:40]


def _constants(graph: fx.GraphModule) -> dict[str, Tensor]:
    names = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    values = {name: getattr(graph, name) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _cpu() -> str:
    """Describe the processor that machine code is made for."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return repr(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return repr((platform.node(), platform.processor(), torch.backends.cpu.get_cpu_capability()))


class PackageStore:
    """A folder of packages: ``$TORCHINDUCTOR_CACHE_DIR/pyro_elbo_ext``, else the user's cache folder.

    A folder that cannot be written to is one without packages.
    """

    def __init__(self) -> None:
        own, user = os.environ.get("TORCHINDUCTOR_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
        with contextlib.suppress(RuntimeError):  # a user without a home
            user = user or str(Path.home() / ".cache")
        self.folder = Path(own or user or tempfile.gettempdir()) / "pyro_elbo_ext"

    def load(self, name: str) -> Callable[[list[Tensor]], list[Tensor]] | None:
        """Return a call that was saved, or None."""
        path = self.folder / f"{name}.pt2"
        try:
            found = _loaded(path)
            path.touch()  # it is in use
        except (OSError, RuntimeError):
            return None
        return found

    def save(self, name: str, make: Callable[[Path], object]) -> Callable[[list[Tensor]], list[Tensor]]:
        """Have a package made, keep it, and return its call."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        folder = self.folder if os.access(self.folder, os.W_OK) else None
        with tempfile.TemporaryDirectory(dir=folder, prefix="making-") as making:
            made = Path(making) / f"{name}.pt2"
            make(made)
            if folder is None:
                return _loaded(made)
            made.replace(folder / made.name)  # whole or not at all, whoever else makes it
        self._prune()
        return _loaded(folder / made.name)

    def _prune(self) -> None:
        with contextlib.suppress(OSError):
            packages = sorted(self.folder.glob("*.pt2"), key=lambda path: path.stat().st_mtime)
            for path in packages[:-KEPT]:
                path.unlink(missing_ok=True)


def _loaded(path: Path) -> Callable[[list[Tensor]], list[Tensor]]:
    """Load a package by torch's own loader, without the seconds that importing its compiler takes."""
    if not path.is_file():
        raise FileNotFoundError(path)
    from torch._C import _aoti  # private, and what torch._inductor.aoti_load_package calls

    return _aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1).run
