"""What a natural-gradient optimiser says it did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["BlockReport", "Report"]


class BlockReport(NamedTuple):
    """One variational site.

    Attributes:
        site: its name in the guide.
        family: of its distribution.
        parameters: their names.
        num_steps: steps taken so far.
        step: size of the last step, averaged over the elements of the site's plates.
        kl: KL(new || old) of the last step in nats, summed over elements.
        largest_kl: of one element.
        backtracks: times that an element's step was shortened so far.
        retreats: times that an element took part of its last step back so far.
        rejected: times that an element had to stay where it was so far.
    """

    site: str
    family: str
    parameters: tuple[str, ...]
    num_steps: int
    step: float
    kl: float
    largest_kl: float
    backtracks: int
    retreats: int
    rejected: int


class Report(NamedTuple):
    """All sites, and why each other parameter went to the inner optimiser."""

    blocks: dict[str, BlockReport]
    others: dict[str, str]

    def __str__(self) -> str:
        width = max([len("site"), *map(len, self.blocks)])
        line = f"{{:<{width}}}  {{:<18}} {{:>6}} {{:>9}} {{:>10}} {{:>10}} {{:>8}} {{:>8}}"
        rows = [line.format("site", "family", "steps", "step", "KL (nats)", "backtracks", "retreats", "rejected")]
        rows += [
            line.format(
                b.site, b.family, b.num_steps, f"{b.step:.3g}", f"{b.kl:.3g}", b.backtracks, b.retreats, b.rejected
            )
            for b in self.blocks.values()
        ]
        rows += _reasons(self.others)
        return "\n".join(rows)


def _reasons(others: Mapping[str, str]) -> list[str]:
    return [f"inner optimiser: {name} ({why})" for name, why in others.items()]
