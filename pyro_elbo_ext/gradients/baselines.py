r"""Baselines: what is subtracted from a site's cost before it multiplies the score.

:math:`E[b\,\nabla \log q(s)] = 0` for every b that is not a function of s, so a baseline changes the spread of a
gradient and not its mean. All are in nats per plate element without N/B, so one and the same value serves every
minibatch size. What a baseline remembers are buffers of its own, never parameters: it goes into ``state_dict()``, moves
with ``to()``, and no optimiser touches it. Networks are parameters, registered in Pyro's param store by the loss, and
trained by the optimiser of ``SVI`` on the squared distance to the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_elbo_ext.gradients.costs import SiteCost
from pyro_elbo_ext.gradients.memory import Memory, Trained

__all__ = [
    "NVIL",
    "Baseline",
    "CallableBaseline",
    "LeaveOneOut",
    "Neural",
    "PyroBaseline",
    "RunningMean",
    "make_baseline",
]


class Baseline(Trained):
    """No baseline, and the base of all others, which override :meth:`forward`.

    Parameters of a subclass are trained by the optimiser of ``SVI`` on the squared distance of :meth:`forward` to the
    cost, through its gradient; what it remembers otherwise goes into buffers, changed in :meth:`update`.

    Attributes:
        min_particles: fewest particles it can be formed from.
    """

    min_particles: int = 1

    def forward(self, site: SiteCost) -> Tensor | float:
        """Return what is subtracted, broadcastable to ``site.cost``; never a function of the site's own value."""
        return 0.0

    def factor(self, site: SiteCost, signal: Tensor) -> Tensor | float:
        """Return what the signal, cost less baseline, is multiplied by; 1 unless the estimator rescales its step."""
        return 1.0

    def update(self, site: SiteCost, signal: Tensor) -> None:
        """Take note of a step's cost and signal, in place, after both were used."""

    def unit(self, site: SiteCost) -> float:
        """Return what costs are multiplied by in the squared distance that a network is trained on."""
        return 1.0


class LeaveOneOut(Baseline):
    r"""The mean cost of the other particles at the same element: RLOO, and VarGrad's gradient.

    Needs no state and no tuning; no variance where the guide is the posterior.

    References:
        Buy 4 REINFORCE Samples, Get a Baseline for Free! (Kool, van Hoof, Welling, 2019); VarGrad: A Low-Variance
        Gradient Estimator for Variational Inference (Richter, Boustati, Nüsken, Ruiz, Akyildiz, 2020,
        arXiv:2010.10436).
    """

    min_particles = 2

    def forward(self, site: SiteCost) -> Tensor:
        """Return the mean of the others."""
        dim = site.particle_dim
        return (site.cost.sum(dim, keepdim=True) - site.cost) / (site.cost.shape[dim] - 1)


class RunningMean(Memory, Baseline):
    r"""An exponential moving average of the cost: one number a site, or one for every element of some plates.

    With plates the number belongs to the element, found by its index where the plate is subsampled, and not to its
    place in the minibatch.

    Args:
        decay: share of the past kept at each step, in [0, 1).
        plates: names of the plates each of whose elements has a mean of its own.

    Raises:
        ValueError: ``decay`` outside [0, 1); when run, a plate that is not around a site.
    """

    def __init__(self, decay: float = 0.9, plates: Sequence[str] = ()) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        if isinstance(plates, str):
            raise ValueError(f"plates must be a sequence of names, got the string {plates!r}")
        self.decay = decay
        self.plates = tuple(plates)

    def _tables(self, site: SiteCost) -> tuple[Tensor, Tensor]:
        """Weighted sum of past costs and the sum of their weights: their ratio is unbiased from the first step on."""
        for plate in self.plates:
            if plate not in site.plates:
                raise ValueError(
                    f"the running mean has plates={self.plates}, but site '{site.name}' is in {sorted(site.plates)}: "
                    "name plates around every site that is not reparameterised."
                )
        shape = [site.sizes[plate] for plate in self.plates]
        return self.recall(f"{site.name}.sum", site.cost, shape), self.recall(f"{site.name}.weight", site.cost, shape)

    def _rows(self, site: SiteCost) -> tuple[Tensor, ...]:
        """Index of the step's elements in a table."""
        rows = []
        for i, plate in enumerate(self.plates):
            index = site.indices.get(plate)
            size = site.cost.shape[site.plates[plate]]
            index = torch.arange(size, device=site.cost.device) if index is None else index.to(site.cost.device)
            rows.append(index.reshape((-1,) + (1,) * (len(self.plates) - 1 - i)))
        return tuple(rows)

    def _gather(self, table: Tensor, site: SiteCost) -> Tensor:
        """Lay a table's rows along the plates of the cost."""
        if not self.plates:
            return table
        found = table[self._rows(site)]
        dims = [site.plates[plate] for plate in self.plates]
        order = sorted(range(len(dims)), key=lambda i: dims[i])
        shape = [1] * -min(dims)
        for i in order:
            shape[dims[i]] = found.shape[i]
        return found.permute(order).reshape(shape)

    def forward(self, site: SiteCost) -> Tensor:
        """Return the mean of the steps before this one, 0 at the first."""
        total, weight = self._tables(site)
        mean = total / weight.clamp(min=torch.finfo(weight.dtype).tiny)
        return self._gather(mean, site)

    @torch.no_grad()
    def update(self, site: SiteCost, signal: Tensor) -> None:
        """Average the step's cost in."""
        self._average(site, site.cost)

    def _average(self, site: SiteCost, observed: Tensor) -> None:
        total, weight = self._tables(site)
        mean = observed.mean() if not self.plates else self._means(site, observed)
        one = torch.where(mean.isfinite(), torch.ones_like(mean), mean)
        if not self.plates:
            self.average(total, mean, self.decay)
            self.average(weight, one, self.decay)
            return
        rows = self._rows(site)
        for table, seen in ((total, mean), (weight, one)):
            part = table[rows]
            self.average(part, seen, self.decay)
            table[rows] = part

    def _means(self, site: SiteCost, observed: Tensor) -> Tensor:
        """Average over all but the named plates, in the order of their names."""
        dims = [site.plates[plate] for plate in self.plates]
        others = [d for d in range(-observed.dim(), 0) if d not in dims]
        mean = observed.mean(others) if others else observed
        order = sorted(range(len(dims)), key=lambda i: dims[i])
        return mean.permute([order.index(i) for i in range(len(dims))])


class Neural(Baseline):
    """A network's prediction of the cost from the data, or from anything that is not downstream of the site.

    With ``loss(model, guide)`` and an optimiser of torch, give that optimiser ``net.parameters()`` as well.

    Args:
        net: maps the inputs to the cost; its output, less a last dimension of size 1, broadcasts to ``[*plates]``.
        inputs: what to give it at a site, such as ``lambda site: site.args[0][site.indices["data"]]``.
        name: under which the network stands in Pyro's param store; two of one name are one network.

    References:
        Neural Variational Inference and Learning in Belief Networks (Mnih, Gregor, 2014, arXiv:1402.0030).
    """

    def __init__(self, net: nn.Module, inputs: Callable[[SiteCost], Tensor], name: str = "baseline") -> None:
        super().__init__()
        self.net = net
        self.inputs = inputs
        self.param_name = name

    def forward(self, site: SiteCost) -> Tensor:
        """Return the prediction, attached to the network's parameters only."""
        found = self.net(self.inputs(site).detach())
        return found.squeeze(-1) if found.dim() and found.shape[-1] == 1 else found


class NVIL(Baseline):
    r"""Centring, and division by the signal's standard deviation, on top of an input-dependent baseline if given.

    The signal :math:`f - b(x) - c` with the running mean c of :math:`f - b(x)` is divided by
    :math:`\max(1, \sigma)` with the running standard deviation :math:`\sigma`. That rescales the step and so is no
    longer the bound's gradient, but a multiple of it for each site.

    Args:
        baseline: subtracted first, such as :class:`Neural`.
        decay: share of the past kept at each step, in [0, 1).
        normalize: divide by the standard deviation; False leaves the gradient unbiased.

    References:
        Neural Variational Inference and Learning in Belief Networks (Mnih, Gregor, 2014, arXiv:1402.0030).
    """

    def __init__(self, baseline: Baseline | None = None, decay: float = 0.8, normalize: bool = True) -> None:
        super().__init__()
        self.baseline = Baseline() if baseline is None else make_baseline(baseline)
        self.min_particles = self.baseline.min_particles
        self.centre, self.spread = RunningMean(decay), RunningMean(decay)
        self.normalize = normalize

    def forward(self, site: SiteCost) -> Tensor | float:
        """Return the inner baseline and the centre of what it leaves."""
        return self.baseline(site) + self.centre(site)

    def factor(self, site: SiteCost, signal: Tensor) -> Tensor | float:
        """Return one over the standard deviation of past signals, at most 1."""
        return self.spread(site).clamp(min=1.0).rsqrt() if self.normalize else 1.0

    @torch.no_grad()
    def update(self, site: SiteCost, signal: Tensor) -> None:
        """Average centre and spread in."""
        self.spread.update(site._replace(cost=signal.square()), signal)
        self.centre.update(site._replace(cost=signal + self.centre(site)), signal)
        self.baseline.update(site, signal)

    def register(self) -> None:
        """Register the inner baseline's parameters."""
        self.baseline.register()


class CallableBaseline(Baseline):
    """Any function from a :class:`~pyro_elbo_ext.gradients.costs.SiteCost` to a tensor that broadcasts to its cost.

    A network inside it is trained if the function registers it by ``pyro.module``; :class:`Neural` does so itself.
    """

    def __init__(self, function: Callable[[SiteCost], Tensor | float]) -> None:
        super().__init__()
        self.function = function

    def forward(self, site: SiteCost) -> Tensor | float:
        """Return what the function says."""
        return self.function(site)


class PyroBaseline(Memory, Baseline):
    """Pyro's own keys, ``infer={"baseline": {...}}`` at a site, with their meaning in ``TraceGraph_ELBO``.

    ``nn_baseline`` with ``nn_baseline_input``, or ``baseline_value``, plus ``use_decaying_avg_baseline`` with
    ``baseline_beta``. Here the moving average is one number a site and not one for every place in the minibatch, and it
    does not go through the optimiser. As in Pyro they are in the units of the scaled cost.
    """

    KEYS = ("nn_baseline", "nn_baseline_input", "use_decaying_avg_baseline", "baseline_beta", "baseline_value")

    def forward(self, site: SiteCost) -> Tensor | float:
        """Return the sum of what the keys ask for."""
        options = site.options
        unknown = sorted(set(options) - set(self.KEYS))
        if unknown:
            raise ValueError(
                f"infer['baseline'] of site '{site.name}' has the unknown key '{unknown[0]}'; known: {self.KEYS}"
            )
        if options.get("nn_baseline") is not None and options.get("baseline_value") is not None:
            raise ValueError(
                f"infer['baseline'] of site '{site.name}' has both nn_baseline and baseline_value; give one"
            )
        value: Any = options.get("baseline_value", 0.0)
        if options.get("nn_baseline") is not None:
            value = options["nn_baseline"](_detached(options.get("nn_baseline_input")))
        if options.get("use_decaying_avg_baseline"):
            value = value + self.recall(site.name, site.cost)
        return value / site.scale

    @torch.no_grad()
    def update(self, site: SiteCost, signal: Tensor) -> None:
        """Average the scaled cost in."""
        if site.options.get("use_decaying_avg_baseline"):
            kept = self.recall(site.name, site.cost)
            self.average(kept, site.scale * site.cost.mean(), site.options.get("baseline_beta", 0.9))

    def unit(self, site: SiteCost) -> float:
        """Return N/B: Pyro's networks are trained on the scaled cost."""
        return site.scale


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (list, tuple)):
        return type(value)(_detached(item) for item in value)
    return value


NAMED: dict[str, Callable[[], Baseline]] = {
    "none": Baseline,
    "leave-one-out": LeaveOneOut,
    "running-mean": RunningMean,
    "nvil": NVIL,
}


def make_baseline(baseline: str | Baseline | Callable[[SiteCost], Tensor] | None) -> Baseline:
    """Return the baseline that a name, an object or a function stands for.

    Raises:
        ValueError: an unknown name, or something else.
    """
    if baseline is None:
        return Baseline()
    if isinstance(baseline, Baseline):
        return baseline
    if isinstance(baseline, str) and baseline in NAMED:
        return NAMED[baseline]()
    if callable(baseline):
        return CallableBaseline(baseline)
    names = ", ".join(f'"{name}"' for name in NAMED)
    raise ValueError(f"baseline must be one of {names}, a Baseline or a function of a SiteCost, got {baseline!r}")
