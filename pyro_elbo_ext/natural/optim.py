"""Natural-gradient steps as an ordinary Pyro optimiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_elbo_ext.families import NORMAL
from pyro_elbo_ext.natural.arguments import SCHEDULES, check_arguments, check_mode
from pyro_elbo_ext.natural.blocks import Block, Rate, natural_step
from pyro_elbo_ext.natural.discovery import discover
from pyro_elbo_ext.natural.ivon import ivon_step
from pyro_elbo_ext.natural.memory import SiteMemory
from pyro_elbo_ext.natural.report import BlockReport, Report

__all__ = ["NaturalGradient"]


class NaturalGradient(PyroOptim):
    r"""Natural-gradient steps on the variational distributions of a guide, for ``pyro.infer.SVI(optim=...)``.

    .. math:: \eta^+ = \eta - \rho_t \, F(\eta)^{-1} \nabla_\eta \mathrm{loss}

    in the natural parameters of every site whose distribution is made of parameters alone: normal, multivariate
    normal, gamma, beta, Dirichlet, exponential, Bernoulli, categorical and Wishart sites, those of ``AutoNormal``,
    ``AutoDiagonalNormal`` and ``AutoMultivariateNormal`` among them, under any constraint. It turns the gradient that
    any ELBO left in ``.grad`` into the natural one; all other parameters go to an inner optimiser. With ``lr=1`` and
    one of the regression ELBOs, conjugate models are exact after one step; with others the gradient's noise asks for
    a smaller one. What it did is in :meth:`report`.

    Sites inside a subsampled plate are stepped row by row, those of the minibatch alone, as if each were the whole
    data. A ``poutine.scale`` around the whole guide multiplies the step.

    Args:
        guide: the guide, or None to take it, and its arguments, from the SVI that calls this. Outside of
            ``SVI.step`` call :meth:`discover` first.
        lr: step size, for a schedule to multiply.
        schedule: ``"inverse"`` (full steps, then 1/t: :math:`1 / (1 + \max(0, t - 6) / 4)`), ``"constant"``, or a
            function from the number of the step, counted from 0, to a factor.
        max_kl: largest KL(new || old) of one site's step in nats, for each element of the site's plates, or None.
            It is exact: a step is shortened until it fits. What counts as one element's is all its ``to_event``
            dimensions.
        optim: a Pyro optimiser for all other parameters.
        retreat: number of opening steps of which those that overshoot are taken back in part, and the size of later
            steps limited: lr = 1 then holds on posteriors that are no Gaussian, or correlated where the guide is not.
            Not for rows of a minibatch. 0 for never.
        average_after: number of steps after which the iterates are averaged in natural coordinates, or None; see
            :meth:`averaged`.
        mode: ``"natural"``, or ``"ivon"`` for the weights of networks under mean-field guides: one noisy gradient a
            step, momentum, and a step of its own for the precision.
        precision_lr: of the IVON mode, step size of the precision.
        momentum: of the IVON mode, for the mean's gradient.
        clip_radius: of the IVON mode, largest change of one mean in standard deviations, or None.
        clip_args: refused.

    Raises:
        ValueError: a bad argument; when first run, a guide without a site that is recognised, or a parameter that two
            sites share; site and parameter are named.

    References:
        Stochastic Variational Inference (Hoffman, Blei, Wang, Paisley, 2013, arXiv:1206.7051); Conjugate-Computation
        Variational Inference (Khan, Lin, 2017, arXiv:1703.04265); Natural Gradients in Practice (Salimbeni,
        Eleftheriadis, Hensman, 2018, arXiv:1803.09151).
    """

    def __init__(
        self,
        guide: Callable | None = None,
        lr: float = 1.0,
        schedule: str | Callable[[int], float] = "inverse",
        max_kl: float | None = None,
        optim: PyroOptim | None = None,
        retreat: int = 50,
        average_after: int | None = None,
        mode: str = "natural",
        precision_lr: float | None = None,
        momentum: float | None = None,
        clip_radius: float | None = None,
        clip_args: Any = None,
    ) -> None:
        check_arguments(guide, lr, schedule, max_kl, retreat, optim, average_after, clip_args)
        super().__init__(torch.optim.SGD, {"lr": lr})
        self.guide = guide
        self.lr = float(lr)
        self.schedule = schedule
        self.max_kl = max_kl
        self.retreat = retreat
        self.inner = pyro.optim.Adam({"lr": 1e-2}) if optim is None else optim  # type: ignore[attr-defined]
        self.average_after = average_after
        self.ivon = check_mode(mode, max_kl, precision_lr, momentum, clip_radius)
        self.num_steps = 0
        self.blocks: dict[str, Block] = {}
        self.others: dict[str, str] = {}
        self._memory: dict[str, SiteMemory] = {}
        self._leaves: dict[str, Tensor] = {}  # as last seen: a cleared param store has others of the same names
        self._averaging = False
        self._pending: Mapping[str, Any] | None = None

    def discover(self, guide: Callable, *args: Any, **kwargs: Any) -> None:
        """Find the sites of a guide that can take natural steps.

        Args:
            guide: the guide.
            *args: its arguments, of which shapes matter.
            **kwargs: its keyword arguments.

        Raises:
            ValueError: no site is recognised, a parameter is shared by two, or a loaded state is of another guide.
        """
        found = discover(guide, args, kwargs)
        if not found.blocks:
            why = list(dict.fromkeys(found.others.values()))
            reasons = "; ".join(why) if why else "it has no parameters"
            raise ValueError(
                f"the guide has no site that NaturalGradient can step: {reasons}. Make a distribution's arguments "
                "parameters themselves, as in dist.Normal(pyro.param('loc', ...), pyro.param('scale', ...)), or use "
                "pyro.optim.Adam."
            )
        for site, block in found.blocks.items():
            if self.ivon is not None and block.family is not NORMAL:
                raise ValueError(
                    f"guide site '{site}' is a {block.family.name}, and mode='ivon' is for normal sites. Use "
                    "mode='natural'."
                )
        changed = [name for name, b in found.blocks.items() if name in self.blocks and not b.like(self.blocks[name])]
        for site in changed:
            self._memory.pop(site, None)
        before = self.blocks, self.others
        self.blocks, self.others = self.blocks | found.blocks, found.others
        if self._pending is not None:
            try:
                self._restore(self._pending)
            except ValueError:  # the next step is to say so, too
                self.blocks, self.others = before
                raise
            self._pending = None

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Step the parameters by their gradients.

        Args:
            params: unconstrained parameters, as SVI hands them over.
            *args: for the inner optimiser.
            **kwargs: for the inner optimiser.
        """
        self.check_can_step()
        store = pyro.get_param_store()
        params = list(params)
        leaves = {name: p for p in params if (name := store.param_name(p)) is not None}
        self.look(leaves)
        rate = self._rate()
        self.num_steps += 1
        natural: set[str] = set()
        for site, block in self.blocks.items():
            own = {argument: leaves[name] for argument, name in block.names.items() if name in leaves}
            if len(own) == len(block.names):
                natural |= set(block.names.values())
                if any(leaf.grad is not None for leaf in own.values()):
                    self._step(site, block, own, rate)
            elif own:
                missing = next(name for argument, name in block.names.items() if argument not in own)
                self.others |= {block.names[argument]: f"'{missing}' is not trained beside it" for argument in own}
        rest = [p for p in params if store.param_name(p) not in natural]
        if rest:
            self.inner(rest, *args, **kwargs)

    def check_can_step(self) -> None:
        """Raise where a step would be lost.

        Raises:
            ValueError: within :meth:`averaged`.
        """
        if self._averaging:
            raise ValueError("a step inside averaged() would be lost at its end. Step outside, or call use_average().")

    def _rate(self) -> Rate:
        """Return this step's size; a schedule of ours counts the steps of an element that were not taken back."""
        if isinstance(self.schedule, str):
            schedule = SCHEDULES[self.schedule]
            return lambda clock: self.lr * schedule(clock)
        factor = float(self.schedule(self.num_steps))
        return lambda clock: torch.full_like(clock, self.lr * factor)

    def _natural_names(self) -> set[str]:
        return {name for block in self.blocks.values() for name in block.names.values()}

    def look(self, leaves: Mapping[str, Tensor], svi: Any = None, args: tuple = (), kwargs: Any = None) -> None:
        """Look at the guide when there are parameters that were not there before.

        Args:
            leaves: unconstrained parameters by name.
            svi: whose step is under way, and the next two its arguments; None to look for it.
            args: positional arguments.
            kwargs: keyword arguments.
        """
        known = self._natural_names() | set(self.others) >= set(leaves)
        if self.blocks and known and all(self._leaves.get(name) is leaf for name, leaf in leaves.items()):
            return
        self._leaves.update(leaves)
        svi, given, named = _caller() if svi is None else (svi, args, kwargs or {})
        guide = self.guide if self.guide is not None else getattr(svi, "guide", None)
        if guide is None and not self.blocks:
            raise ValueError(
                "NaturalGradient does not know the guide outside of SVI.step: call optim.discover(guide, *args) first."
            )
        if svi is not None or not self.blocks:
            self.discover(guide, *given, **named)  # type: ignore[arg-type]
        for name in set(leaves) - self._natural_names():
            self.others.setdefault(name, "no parameter of the guide")

    @torch.no_grad()
    def _step(self, site: str, block: Block, leaves: Mapping[str, Tensor], rate: Rate) -> None:
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in leaves.items()}
        memory = self._memory.setdefault(site, SiteMemory())
        if self.ivon is None:
            watched = self.retreat > 0 and block.share == 1  # rows come and go with the minibatch
            settings = rate, self.max_kl, memory.trail, watched, self.num_steps <= self.retreat
            new, move, memory.trail = natural_step(block, leaves, grads, *settings)
        else:
            new, move, memory.momentum = ivon_step(
                block, leaves, grads, rate, self.ivon, memory.momentum, memory.num_steps
            )
        for name, leaf in leaves.items():
            leaf.copy_(new[name])
        memory.note(move)
        if self.average_after is not None and self.num_steps > self.average_after:
            memory.add_to_average(block.family.natural(block.read(leaves)))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the guide's parameters are those of the averaged iterates.

        Raises:
            ValueError: no step has been averaged.
        """
        store = pyro.get_param_store()
        saved = {name: store._params[name].detach().clone() for name in self._natural_names()}
        trails = {site: memory.trail for site, memory in self._memory.items()}
        self.use_average()
        self._averaging = True
        try:
            yield
        finally:
            self._averaging = False
            for site, trail in trails.items():
                self._memory[site].trail = trail
            with torch.no_grad():
                for name, value in saved.items():
                    store._params[name].copy_(value)

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the averaged iterates in the place of the guide's parameters for good.

        Raises:
            ValueError: no step has been averaged.
        """
        averages = {site: memory.average for site, memory in self._memory.items() if memory.average is not None}
        if not averages:
            raise ValueError(
                f"no iterate has been averaged after {self.num_steps} steps with average_after={self.average_after}: "
                "give NaturalGradient(average_after=...) a number below that of the steps you take."
            )
        store = pyro.get_param_store()
        for site, natural in averages.items():
            block = self.blocks[site]
            for argument, value in block.write(block.family.from_natural(natural)).items():
                store._params[block.names[argument]].copy_(value)
            self._memory[site].trail = None

    def report(self) -> Report:
        """Say for each site what the last step did, and for each other parameter why the inner optimiser has it."""
        blocks = {}
        for site, block in self.blocks.items():
            memory = self._memory.get(site, SiteMemory())
            found = memory.numbers()
            counts = (round(found[name]) for name in ("backtracks", "retreats", "rejected"))
            names = tuple(block.names.values())
            last = found["step"], found["kl"], found["largest_kl"]
            blocks[site] = BlockReport(site, block.family.name, names, memory.num_steps, *last, *counts)
        return Report(blocks, dict(self.others))

    def _described(self) -> dict[str, dict[str, Any]]:
        """Return what must be the same in a guide for a saved state to fit it."""
        leaves = pyro.get_param_store()._params
        return {
            site: block.describe({argument: leaves[name] for argument, name in block.names.items()})
            for site, block in self.blocks.items()
        }

    def get_state(self) -> dict[str, Any]:
        """Return everything that the next step depends on, besides the parameters: tensors, numbers and strings."""
        memory = {site: self._memory.get(site, SiteMemory()).get_state() for site in self.blocks}
        sites = self._described()
        return {"num_steps": self.num_steps, "sites": sites, "memory": memory, "inner": self.inner.get_state()}

    def set_state(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`get_state` returned; in a fresh optimiser, from the first step on.

        Raises:
            ValueError: the state is of another guide, or of another optimiser; now, or at the first step.
        """
        if set(state_dict) != {"num_steps", "sites", "memory", "inner"}:
            raise ValueError(
                f"this is no state of a NaturalGradient: it has the keys {sorted(map(str, state_dict))}. Save and load "
                "the same optimiser."
            )
        if self.blocks:
            self._restore(state_dict)
        else:
            self._pending = state_dict

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Look whether a state is of the guide that was discovered.

        Raises:
            ValueError: it is of another; the site is named.
        """
        ours, theirs = self._described(), state["sites"]
        for site in sorted(set(ours) | set(theirs)):
            if ours.get(site) != theirs.get(site):
                raise ValueError(
                    f"the state is of another guide: site '{site}' is {theirs.get(site, 'missing')} there, and "
                    f"{ours.get(site, 'missing')} here. Make the guide as it was when the state was saved."
                )

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.check_state(state)
        self.num_steps = state["num_steps"]
        leaves, self._memory = pyro.get_param_store()._params, {}
        for site, kept in state["memory"].items():
            name = next(iter(self.blocks[site].names.values()))
            self._memory[site] = SiteMemory.from_state(kept, leaves[name].device)
        self.inner.set_state(state["inner"])


def _caller() -> tuple[Any, tuple, dict]:
    """Return the SVI whose step is under way, and the arguments of that step."""
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, SVI) and frame.f_code is SVI.step.__code__:
            return found, frame.f_locals["args"], frame.f_locals["kwargs"]
        frame = frame.f_back
    return None, (), {}
