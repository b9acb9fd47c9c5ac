r"""Control variates for Bernoulli sites that look at the model between 0 and 1.

All estimate the gradient g in the logits :math:`\alpha` of a site with value b and mean :math:`\mu = \sigma(\alpha)`;
f are the terms of the ELBO downstream of it. The score in :math:`\alpha` is :math:`b - \mu`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_elbo_ext.dependencies import Dependencies, Key
from pyro_elbo_ext.gradients.costs import Costs, Graph
from pyro_elbo_ext.gradients.memory import Trained
from pyro_elbo_ext.gradients.sites import BernoulliGradient, Bits, Step, undisturbed
from pyro_elbo_ext.handlers import Differentiable
from pyro_elbo_ext.particles import Draw, ParticleSampler

__all__ = ["RELAX", "DoubleControlVariates", "REBAR"]


def _not_differentiable(name: str, graph: Graph) -> list[Key]:
    """Return the model's terms that a site acts on directly, but that have no derivative in its value."""
    found = graph.found
    return [key for key, up in found.log_prob.items() if key[0] == "model" and name in up - found.differentiable[key]]


class DoubleControlVariates(BernoulliGradient):
    r"""Leave-one-out, with a Taylor expansion of f as a second control variate in both of its places.

    With :math:`d_k` the mean of :math:`\partial f/\partial b` at the other particles and
    :math:`c_k(b) = d_k \cdot (b - \mu)`,

    .. math:: g_k = \Big[ f_k - a\,c_k(b_k) - \frac{1}{K-1} \sum_{j \ne k} (f_j - a\,c_k(b_j)) \Big] (b_k - \mu_k)
        + a\,d_k\,\mu_k (1 - \mu_k)

    The factor a is fitted to past steps, per site, so that the spread is least; it is 0 at the first. Needs K >= 2 and
    a model with a derivative in the bits, which it asks for at 0 and 1 only. Costs about one backward more. It gains
    most where one bit changes f little, as with many bits or a decoder not yet trained, and with few particles.

    Args:
        decay: share of the past kept in the fit of a, in [0, 1).

    References:
        Double Control Variates for Gradient Estimation in Discrete Latent Variable Models (Titsias, Shi, 2021,
        arXiv:2111.05300).
    """

    name = "double-cv"

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay

    def draw(self, sampler: ParticleSampler, find: Callable[[Draw], Dependencies], *handlers: Messenger) -> list[Draw]:
        """Return the draws, their bits being start points of differentiation."""
        return sampler.draw(*handlers, Differentiable())

    def check(self, graph: Graph, nodes: Mapping[Any, Any], num_particles: int) -> None:
        """Refuse one particle, and a model without a derivative in a site's value."""
        super().check(graph, nodes, num_particles)
        for name in graph.scored:
            if num_particles < 2:
                raise ValueError(
                    f"guide site '{name}' takes its control variates from the other particles under "
                    f'gradient="double-cv", which needs num_particles >= 2, got {num_particles}. '
                    'Raise num_particles, or use gradient="score" with baseline="running-mean".'
                )
            direct = [key for key, up in graph.found.log_prob.items() if key[0] == "model" and name in up]
            missing = _not_differentiable(name, graph)
            if missing and len(missing) == len([key for key in direct if key != ("model", name)]):
                raise ValueError(_no_fractions(name, missing[0], self.name))

    def surrogate(self, step: Step) -> Any:
        """Return the sum of every site's g times its logits."""
        drawn = {name: [draw.leaves[name] for draw in step.draws] for name in step.graph.scored}
        values = [value for values in drawn.values() for value in values]
        found = iter(torch.autograd.grad(step.costs.total(), values, retain_graph=True, allow_unused=True))
        total: Any = 0.0
        for name in step.graph.scored:
            slopes = [torch.zeros_like(v) if s is None else s for v, s in zip(drawn[name], found, strict=False)]
            total = total + self._site(step, name, slopes)
        return total

    def _site(self, step: Step, name: str, slopes: Sequence[Tensor]) -> Tensor:
        bits = Bits(step, name)
        f = step.costs.downstream(name).detach()
        slope = step.costs.along_particles(slopes, bits.event_dim)
        k, mu = len(f), bits.probs
        score = bits.value - mu
        others = (slope.sum(0) - slope) / (k - 1)  # d_k
        # c[k, j] = d_k . (b_j - mu_j); the mean over j != k is linear in b_j - mu_j.
        own = bits.over_event(others * score)
        rest = bits.over_event(others * (score.sum(0) - score) / (k - 1))
        plain = bits.per_event(f - (f.sum(0) - f) / (k - 1)) * score
        control = bits.per_event(own - rest) * score - others * mu * (1 - mu)
        g = plain - self._fit(name, plain.mean(0), control.mean(0)) * control
        return (g * bits.logits).sum() / k

    def _fit(self, name: str, plain: Tensor, control: Tensor) -> Tensor:
        """Return a from the steps before this one, then take this one in."""
        cross, square = self.recall(f"{name}.cross", plain), self.recall(f"{name}.square", plain)
        a = cross / square.clamp(min=torch.finfo(square.dtype).tiny)
        self.average(cross, (plain * control).sum(), self.decay)
        self.average(square, control.square().sum(), self.decay)
        return a


def _no_fractions(name: str, term: Key, gradient: str) -> str:
    return (
        f"guide site '{name}' is used by {term[0]} site '{term[1]}' in a way that has no derivative, as an index or a "
        f'comparison has none, but gradient="{gradient}" needs one, for it takes the model at or between 0 and 1. '
        'Write that term as arithmetic in the value, or use gradient="disarm" or "score".'
    )


class REBAR(Trained, BernoulliGradient):
    r"""A relaxed model as control variate: unbiased, at two more evaluations of the model.

    With z logistic noise around :math:`\alpha`, b = [z > 0], :math:`\tilde z` drawn anew given b, and
    :math:`c(z) = \eta f(\sigma(z/\lambda))`,

    .. math:: g = (f(b) - c(\tilde z))(b - \mu) + \frac{\partial c(z)}{\partial \alpha}
        - \frac{\partial c(\tilde z)}{\partial \alpha}

    The factor :math:`\eta` and the temperature :math:`\lambda` of each site are trained on the spread of g, by the
    optimiser of ``SVI``: they are registered in Pyro's param store. With ``loss(model, guide)`` and an optimiser of
    torch, run the loss once and give that optimiser this object's ``parameters()`` as well. Every sampled site must be
    a Bernoulli that descends from no other; the model must take values between 0 and 1.

    Args:
        temperature: at the start, positive.
        name: under which the parameters stand in Pyro's param store; two objects of one name share them.

    References:
        REBAR: Low-variance, unbiased gradient estimates for discrete latent variable models (Tucker, Mnih, Maddison,
        Lawson, Sohl-Dickstein, 2017, arXiv:1703.07370).
    """

    name = "rebar"

    def __init__(self, temperature: float = 0.5, name: str = "rebar") -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature
        self.param_name = name
        self.log_temperature = nn.ParameterDict()
        self.factor = nn.ParameterDict()

    def draw(self, sampler: ParticleSampler, find: Callable[[Draw], Dependencies], *handlers: Messenger) -> list[Draw]:
        """Return the draws."""
        return sampler.draw(*handlers)

    def check(self, graph: Graph, nodes: Mapping[Any, Any], num_particles: int) -> None:
        """Refuse sampled sites below others, and a model that cannot take fractions."""
        super().check(graph, nodes, num_particles)
        for name in graph.scored:
            above = [other for other in graph.scored if other != name and ("guide", name) in graph.reach[other]]
            if above:
                raise ValueError(
                    f"guide site '{name}' descends from the sampled site '{above[0]}', for which "
                    f'gradient="{self.name}" has no proven rule. Use gradient="double-cv", "disarm" or "score".'
                )
            missing = _not_differentiable(name, graph)
            if missing:
                raise ValueError(_no_fractions(name, missing[0], self.name))

    def surrogate(self, step: Step) -> Any:
        """Return the sum of every site's g times its logits, and what trains the control variate."""
        bits = {name: Bits(step, name) for name in step.graph.scored}
        self._prepare(bits)
        self.register()
        alphas = {name: site.logits.detach().requires_grad_() for name, site in bits.items()}
        free, given = self._noise(bits, alphas, conditional=False), self._noise(bits, alphas, conditional=True)
        c_free, slopes_free = self._control(step, bits, alphas, free)
        c_given, slopes_given = self._control(step, bits, alphas, given)
        total: Any = 0.0
        spread: Any = 0.0
        for i, (name, site) in enumerate(bits.items()):
            f = step.costs.downstream(name).detach()
            g = site.per_event(f - c_given[name]) * (site.value - site.probs) + slopes_free[i] - slopes_given[i]
            spread = spread + g.mean(0).square().sum()
            total = total + (g.detach() * site.logits).sum() / len(f)
        return total - self._training(spread)

    def _prepare(self, bits: Mapping[str, Bits]) -> None:
        """Make a site's parameters when it is met."""
        for name, site in bits.items():
            key = name.replace(".", "_")
            if key not in self.factor:
                self.factor[key] = nn.Parameter(torch.ones_like(site.logits.flatten()[0].detach()))
                start = site.logits.new_tensor(math.log(self.temperature))
                self.log_temperature[key] = nn.Parameter(start.detach())

    def _noise(self, bits: Mapping[str, Bits], alphas: Mapping[str, Tensor], conditional: bool) -> dict[str, Tensor]:
        """Draw z given b, its derivative in the logits being that of z, or that of z given b."""
        found = {}
        for name, site in bits.items():
            alpha = alphas[name] if conditional else alphas[name].detach()
            p, v = alpha.sigmoid(), torch.rand_like(alpha)
            u = torch.where(site.value == 1, 1 - p + v * p, v * (1 - p))
            eps = torch.finfo(u.dtype).eps
            z = alpha + torch.logit(u.clamp(eps, 1 - eps))
            found[name] = z if conditional else alphas[name] + (z - alpha)
        return found

    def _control(
        self, step: Step, bits: Mapping[str, Bits], alphas: Mapping[str, Tensor], z: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
        """Return c of each site, ``[num_particles, *plates]``, and the derivative of their sum in the logits."""
        relaxed = {name: torch.sigmoid(z[name] / self._value(self.log_temperature, name).exp()) for name in z}
        costs = self._evaluate(step, relaxed)
        # A site's own factor multiplies all that is downstream of it, so each derivative is taken of f, then scaled.
        f_slopes = torch.autograd.grad(costs.total(), list(alphas.values()), create_graph=True, allow_unused=True)
        slopes = [
            self._value(self.factor, name) * (torch.zeros_like(alpha) if slope is None else slope)
            for (name, alpha), slope in zip(alphas.items(), f_slopes, strict=True)
        ]
        return {name: self._value(self.factor, name) * costs.downstream(name) for name in z}, slopes

    def _value(self, parameters: nn.ParameterDict, name: str) -> Tensor:
        return parameters[name.replace(".", "_")]

    def _evaluate(self, step: Step, values: Mapping[str, Tensor]) -> Costs:
        """Score the pair at relaxed bits; what the guide draws from them is drawn anew."""
        sampler, runs = step.sampler, []
        with pyro.validation_enabled(False):  # a Bernoulli takes no fractions under validation
            for i, draw in enumerate(step.draws):
                own = {name: _rows(value, i, step, draw, name) for name, value in values.items()}
                held = {name: value.detach() for name, value in undisturbed(draw, step.graph.found).items()}
                runs += sampler.score([sampler.draw_given({**held, **own})])[1]
        return Costs(runs, step.graph, step.costs.nesting, step.costs.run_size)

    def _training(self, spread: Tensor) -> Tensor:
        """Return a scalar whose gradient is the spread's in the control variate's parameters, and in nothing else."""
        parameters = list(self.parameters())
        slopes = torch.autograd.grad(spread, parameters, retain_graph=True, allow_unused=True)
        return torch.stack(
            [(slope.detach() * p).sum() for p, slope in zip(parameters, slopes, strict=True) if slope is not None]
        ).sum()


def _rows(value: Tensor, i: int, step: Step, draw: Draw, name: str) -> Tensor:
    """Return the particles of one run, in the shape that the run drew."""
    size = step.costs.run_size
    return value[i * size : (i + 1) * size].reshape(draw.leaves[name].shape)


class RELAX(REBAR):
    r"""REBAR with a free-form part: :math:`c(z) = \eta f(\sigma(z/\lambda)) + r(z)` with a network r for each site.

    Less spread than REBAR where r has learnt something, after enough steps. On a training set it overfits more.

    Args:
        surrogate: returns the network of a site for the size of its value; maps ``[..., size]`` to ``[..., 1]``. By
            default one hidden layer of 50 tanh units.
        temperature: as in :class:`REBAR`.
        name: as in :class:`REBAR`.

    References:
        Backpropagation through the Void: Optimizing control variates for black-box gradient estimation (Grathwohl,
        Choi, Wu, Roeder, Duvenaud, 2017, arXiv:1711.00123).
    """

    name = "relax"

    def __init__(
        self, surrogate: Callable[[int], nn.Module] | None = None, temperature: float = 0.5, name: str = "relax"
    ) -> None:
        super().__init__(temperature, name)
        if surrogate is not None and not callable(surrogate):
            raise ValueError(f"surrogate must be a function from a size to a network, got {surrogate!r}")
        self.make_surrogate = surrogate or _one_hidden_layer
        self.surrogates = nn.ModuleDict()

    def _prepare(self, bits: Mapping[str, Bits]) -> None:
        super()._prepare(bits)
        for name, site in bits.items():
            key = name.replace(".", "_")
            if key not in self.surrogates:
                size = math.prod(site.value.shape[site.value.dim() - site.event_dim :])
                self.surrogates[key] = self.make_surrogate(size).to(site.logits)

    def _control(
        self, step: Step, bits: Mapping[str, Bits], alphas: Mapping[str, Tensor], z: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
        c, slopes = super()._control(step, bits, alphas, z)
        found = {}
        for name, value in z.items():
            flat = value.reshape(value.shape[: value.dim() - bits[name].event_dim] + (-1,))
            found[name] = self.surrogates[name.replace(".", "_")](flat).squeeze(-1)
        more = torch.autograd.grad(sum(r.sum() for r in found.values()), list(alphas.values()), create_graph=True)
        return {name: c[name] + r for name, r in found.items()}, [s + m for s, m in zip(slopes, more, strict=True)]


def _one_hidden_layer(size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(size, 50), nn.Tanh(), nn.Linear(50, 1))
