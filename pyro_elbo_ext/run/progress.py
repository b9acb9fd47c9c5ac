"""A line that says how far a run is."""

from __future__ import annotations

import math
import sys
from typing import Any, TextIO

import numpy as np
from tqdm.auto import tqdm

__all__ = ["Progress", "Stages", "smoothed"]

WINDOW = 100  # losses that are averaged


class Progress:
    """A progress bar with the mean of the last losses and its standard error; nothing where nobody looks.

    Args:
        total: number of steps.
        done: those that were taken before.
        shown: False for no bar; True for one if the output is a terminal.
        file: the output, the standard error by default.
    """

    def __init__(self, total: int, done: int = 0, shown: bool = True, file: TextIO | None = None) -> None:
        self._bar: Any = tqdm(
            total=total, initial=done, disable=None if shown else True, file=file or sys.stderr, dynamic_ncols=True
        )
        self._shown = -math.inf

    def after_steps(self, num: int, losses: list[float], stage: int, skipped: int) -> None:
        """Count steps; the numbers are renewed as often as the bar itself."""
        self._bar.update(num)
        if self._bar.disable or self._bar.last_print_t == self._shown:
            return
        self._shown = self._bar.last_print_t
        mean, error = smoothed(losses)
        text = f"loss {mean:.2f} ± {error:.2f}"
        text += f", stage {stage + 1}" if stage else ""
        text += f", {skipped} skipped" if skipped else ""
        self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Leave the line as it is."""
        self._bar.close()


class Stages:
    """A line that says what is being done and for how long; nothing where nobody looks.

    Args:
        what: whose line it is.
        shown: False for none; True for one if the output is a terminal.
        file: the output, the standard error by default.
    """

    def __init__(self, what: str, shown: bool = True, file: TextIO | None = None) -> None:
        self._what = what
        self._bar: Any = tqdm(
            bar_format="{desc} [{elapsed}]", disable=None if shown else True, file=file or sys.stderr, leave=False
        )

    def __enter__(self) -> Stages:
        return self

    def say(self, text: str) -> None:
        """Name the next stage."""
        self._bar.set_description_str(f"{self._what}: {text}")

    def __exit__(self, *error: object) -> None:
        self._bar.close()


def smoothed(losses: list[float] | np.ndarray, window: int = WINDOW) -> tuple[float, float]:
    """Return the mean of the last finite losses and its standard error, both NaN where there are none."""
    last = np.asarray(losses[-window:], dtype=float)
    last = last[np.isfinite(last)]
    if not len(last):
        return math.nan, math.nan
    error = last.std(ddof=1) / math.sqrt(len(last)) if len(last) > 1 else math.nan
    return float(last.mean()), float(error)
