r"""Particles of one bound spread over processes: each holds K/R of them, and all K stand in the log.

Every process sends its log-weights :math:`\ell_k` to all others, so that the bound's value and the weights
:math:`v_k = dB/d\ell_k` of its own particles are those of all K. Its share of the gradient is
:math:`\sum_{k \text{ own}} v_k \nabla \ell_k`; it is handed over times R, for gradients are averaged.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from pyro_elbo_ext.bounds import Bound
from pyro_elbo_ext.elbo.base import NonFiniteError
from pyro_elbo_ext.elbo.importance import ImportanceWeighted_ELBO
from pyro_elbo_ext.run.distributed.processes import Processes

__all__ = ["Elsewhere", "SharedBound", "share"]


class Elsewhere(Exception):
    """Another process could not send its log-weights; holds what every process sent: kind and error."""

    def __init__(self, kinds: list[str], problems: list[tuple[str, str] | None]) -> None:
        super().__init__()
        self.kinds = kinds
        self.problems = problems


class SharedBound(Bound):
    """A bound over the particles of all processes, as a function of those of this one.

    Args:
        bound: over all particles.
        processes: that share them.
    """

    def __init__(self, bound: Bound, processes: Processes) -> None:
        self.inner = bound
        self.linear = bound.linear
        self.processes = processes
        self._kind = "step"
        self._sent: tuple[Any, Tensor] | None = None

    def start(self, kind: str) -> None:
        """Begin a call of the loss."""
        self._kind, self._sent = kind, None

    @property
    def met(self) -> bool:
        """True where the processes have exchanged something in this call."""
        return self._sent is not None

    def exchange(self, own: Tensor | None, problem: tuple[str, str] | None = None) -> list[Any]:
        """Meet the other processes once in this call, with log-weights or with an error.

        Raises:
            Elsewhere: another process has an error, or does something else.
            NonFiniteError: another process has a log-weight that is not finite.
        """
        sent = None if own is None else own.detach().cpu()
        self._sent = (None, torch.empty(0))
        kinds, problems, found = zip(*self.processes.gather((self._kind, problem, sent)), strict=True)
        shapes = {tuple(log_w.shape) for log_w in found if log_w is not None}
        if len(set(kinds)) > 1 or any(p is not None for p in problems):
            raise Elsewhere(list(kinds), list(problems))
        if len(shapes) > 1:
            text = (
                f"the log-weights [num_particles, *plates] have the shapes {sorted(shapes)} on different processes: "
                "with particles='shared' all must be handed the same rows."
            )
            raise Elsewhere(list(kinds), [("ValueError", text)] * len(kinds))
        for rank, log_w in enumerate(found):
            if log_w is not None and rank != self.processes.rank and (log_w.isnan() | (log_w == torch.inf)).any():
                raise NonFiniteError(
                    f"the log-weight of a particle on rank {rank} is nan or inf; its error names the site."
                )
        return list(found)

    def _all(self, log_w: Tensor) -> tuple[Tensor, slice]:
        """Return the log-weights of all processes, this one's attached, and where those are."""
        key = (log_w.data_ptr(), log_w.shape)
        if self._sent is None:
            found = self.exchange(log_w)
            self._sent = (key, torch.cat(found).to(log_w))
        elif self._sent[0] != key:
            raise RuntimeError("a loss with shared particles has weighed two sets of them in one call")
        own = slice(self.processes.rank * len(log_w), (self.processes.rank + 1) * len(log_w))
        full = self._sent[1]
        return torch.cat([full[: own.start], log_w, full[own.stop :]]), own

    def _own(self, weights: Tensor, own: slice) -> Tensor:
        return self.processes.world_size * weights[own]

    def __call__(self, log_w: Tensor) -> Tensor:
        """Return the value over all particles; its gradient is this process's share, times R."""
        value = self.inner(self._all(log_w)[0])
        return value + (self.processes.world_size - 1) * (value - value.detach()) if value.requires_grad else value

    def path_weights(self, log_w: Tensor) -> Tensor:
        """Return R times the weights of this process's particles."""
        full, own = self._all(log_w)
        return self._own(self.inner.path_weights(full), own)

    def doubly_reparameterized_weights(self, log_w: Tensor) -> Tensor:
        """Return R times the weights of this process's particles."""
        full, own = self._all(log_w)
        return self._own(self.inner.doubly_reparameterized_weights(full), own)

    def leave_one_out(self, log_w: Tensor, fill: str = "geometric") -> Tensor:
        """Refuse."""
        raise ValueError(
            "the guide has a site that is not reparameterised, whose signal compares each particle with all others: "
            "with particles='shared' they are on other processes. Use particles='own'."
        )


def share(loss: Any, processes: Processes) -> tuple[ImportanceWeighted_ELBO, SharedBound]:
    """Return a loss like another, with a process's part of its particles, and the bound that joins the parts.

    Raises:
        ValueError: a loss for which there is no such part.
    """
    world_size = processes.world_size
    usable = isinstance(loss, ImportanceWeighted_ELBO) and getattr(loss, "local_particles", 1) == 1
    if not usable or type(loss)._guide_bound is not ImportanceWeighted_ELBO._guide_bound:
        raise ValueError(
            f"particles='shared' is for one bound over all particles: IWAE_ELBO (local_particles=1), VRIWAE_ELBO, "
            f"CIWAE_ELBO, MIWAE_ELBO and bounds of your own, got {type(loss).__name__}. Use particles='own'."
        )
    if loss.num_particles % world_size or loss.num_particles < 2 * world_size:
        raise ValueError(
            f"particles='shared' gives every process two or more particles, and as many: num_particles must be a "
            f"multiple of {world_size} and at least {2 * world_size}, got {loss.num_particles}."
        )
    if loss._signal is not None or loss.nonfinite != "raise":
        which = f"gradient={loss.gradient!r}" if loss._signal is not None else f"nonfinite={loss.nonfinite!r}"
        raise ValueError(
            f"{which} needs all particles on one process. With particles='shared' use gradient='pathwise', 'stl' or "
            "'dreg' and nonfinite='raise'."
        )
    part, bound = copy.copy(loss), SharedBound(loss._bound, processes)
    part.num_particles = loss.num_particles // world_size
    part.bound = bound
    part._layouts, part._passed, part._known_signals = {}, set(), set()
    return part, bound
