"""The checkpoint of a run: what fit writes beside the SVI, and how it goes on from there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from pyro_elbo_ext.run.checkpoint import check_content, put_content, read_checkpoint, write_checkpoint
from pyro_elbo_ext.run.state import FitState
from pyro_elbo_ext.run.stopping import StopRule
from pyro_elbo_ext.tracing import forked_rng

__all__ = ["Saved"]


@dataclass
class Saved:
    """A run's checkpoint.

    Attributes:
        path: the file.
        state: the run.
        rule: that stops it.
        best: what is remembered of its best steps, with ``loss`` and ``params``, or None.
        seed: as given.
    """

    path: str | os.PathLike
    state: FitState
    rule: StopRule
    best: Any | None
    seed: int | None

    def _settings(self) -> dict[str, Any]:
        return {"stop": type(self.rule).__name__, "seed": self.seed, "restore_best": self.best is not None}

    def save(self, stopped: str) -> None:
        """Write the run as it is, and what has stopped it; all processes make the call."""
        steps = self.state.steps
        extra = {
            "settings": self._settings(),
            "step": self.state.step,
            "stopped": stopped,
            "history": {n: torch.tensor(v, dtype=torch.float64, device="cpu") for n, v in self.state.history.items()},
            "skipped": [steps.num_skipped, steps.in_a_row],
            "rule": self.rule.state_dict(),
            "batches": self.state.batches.state_dict(),
            "best": None if self.best is None else {"loss": self.best.loss, "params": self.best.params},
        }
        write_checkpoint(self.path, self.state.svi, self.state.params, extra)

    def load(self) -> str:
        """Go on from the file, if there is one; return what had stopped the run, unless that was a callback.

        Raises:
            ValueError: the file is of another run. Everything is looked at before anything is changed.
        """
        svi, batches = self.state.svi, self.state.batches
        content = read_checkpoint(self.path, svi)
        if content is None:
            return ""
        extra = content["extra"]
        if extra.get("settings") != self._settings():
            raise ValueError(
                f"'{self.path}' is of a run with {extra.get('settings')}, and this one has {self._settings()}. Give "
                "the same, or name another file to start anew. It is left as it is."
            )
        self.rule.load_state_dict(extra["rule"])
        with forked_rng():
            example = next(batches.samples(1))
        check_content(svi, content, str(self.path), example, dict(self.state.kwargs))
        with forked_rng():
            batches.load_state_dict(extra["batches"])
        put_content(svi, content)
        self._put(extra)
        self.state.steps.names.update(content["params"])
        return "" if extra["stopped"] == "callback" else extra["stopped"]

    def _put(self, extra: dict[str, Any]) -> None:
        self.state.step = extra["step"]
        self.state.history.update({name: values.tolist() for name, values in extra["history"].items()})
        steps = self.state.steps
        steps.num_skipped, steps.in_a_row = extra["skipped"]
        steps.has_succeeded = extra["step"] > steps.num_skipped
        if self.best is not None:
            self.best.loss, self.best.params = extra["best"]["loss"], extra["best"]["params"]
