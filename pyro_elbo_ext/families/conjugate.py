"""Gamma, beta, Dirichlet, exponential, Bernoulli and categorical: their Fisher information in closed form.

The Fisher information of a Gamma with a large shape is nearly singular, so callers work in float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_elbo_ext.families.base import AffineFamily, Parametrization, Params, every, lift

__all__ = ["BERNOULLI", "BETA", "CATEGORICAL", "DIRICHLET", "EXPONENTIAL", "GAMMA", "ONE_HOT_CATEGORICAL"]


def trigamma(x: Tensor) -> Tensor:
    """Return the derivative of digamma."""
    return torch.special.polygamma(1, x)


class Gamma(AffineFamily):
    """The gamma distribution; T(x) = (log x, x)."""

    name = "Gamma"
    arguments = {"concentration": 0, "rate": 0}
    parametrizations = (Parametrization(arguments),)

    def make(self, q: Params) -> Distribution:
        """Return torch's distribution."""
        return torch.distributions.Gamma(q["concentration"], q["rate"], validate_args=False)

    def direction(self, q: Params, grad: Params) -> dict[str, Tensor]:
        """Solve with the 2 x 2 Fisher information [[trigamma(a), -1/b], [-1/b, a/b^2]]."""
        a, b = q["concentration"], q["rate"]
        determinant = a * trigamma(a) - 1  # times b^2
        return {
            "concentration": (a * grad["concentration"] + b * grad["rate"]) / determinant,
            "rate": b * (grad["concentration"] + b * trigamma(a) * grad["rate"]) / determinant,
        }

    def statistics(self, x: Tensor, reference: Params) -> Tensor:
        """Return log x, and x in units of the reference's mean."""
        return torch.stack([x.log(), x * reference["rate"] / reference["concentration"]], -1)

    def expectation(self, q: Params, reference: Params) -> Tensor:
        """Return their means."""
        mean = q["concentration"] / q["rate"] * reference["rate"] / reference["concentration"]
        return torch.stack([torch.digamma(q["concentration"]) - q["rate"].log(), mean], -1)


class Exponential(AffineFamily):
    """The exponential distribution; T(x) = x."""

    name = "Exponential"
    arguments = {"rate": 0}
    parametrizations = (Parametrization(arguments),)

    def make(self, q: Params) -> Distribution:
        """Return torch's distribution."""
        return torch.distributions.Exponential(q["rate"], validate_args=False)

    def direction(self, q: Params, grad: Params) -> dict[str, Tensor]:
        """Divide by the Fisher information 1 / rate^2."""
        return {"rate": q["rate"].square() * grad["rate"]}

    def statistics(self, x: Tensor, reference: Params) -> Tensor:
        """Return x in units of the reference's mean."""
        return (x * reference["rate"])[..., None]

    def expectation(self, q: Params, reference: Params) -> Tensor:
        """Return its mean."""
        return (reference["rate"] / q["rate"])[..., None]


class Dirichlet(AffineFamily):
    """The Dirichlet distribution; T(x) = log x."""

    name = "Dirichlet"
    arguments = {"concentration": 1}
    parametrizations = (Parametrization(arguments),)

    def make(self, q: Params) -> Distribution:
        """Return torch's distribution."""
        return torch.distributions.Dirichlet(q["concentration"], validate_args=False)

    def direction(self, q: Params, grad: Params) -> dict[str, Tensor]:
        """Solve with diag(trigamma(a)) - trigamma(sum a) by the Sherman-Morrison formula, in linear time."""
        a, g = q["concentration"], grad["concentration"]
        inverse = trigamma(a).reciprocal()
        shared = (inverse * g).sum(-1, keepdim=True)
        gap = trigamma(a.sum(-1, keepdim=True)).reciprocal() - inverse.sum(-1, keepdim=True)
        return {"concentration": inverse * (g + shared / gap)}

    def statistics(self, x: Tensor, reference: Params) -> Tensor:
        """Return log x."""
        return x.log()

    def expectation(self, q: Params, reference: Params) -> Tensor:
        """Return the mean of log x."""
        a = q["concentration"]
        return torch.digamma(a) - torch.digamma(a.sum(-1, keepdim=True))


class Beta(AffineFamily):
    """The beta distribution, a Dirichlet of two; T(x) = (log x, log(1 - x))."""

    name = "Beta"
    arguments = {"concentration1": 0, "concentration0": 0}
    parametrizations = (Parametrization(arguments),)

    def make(self, q: Params) -> Distribution:
        """Return torch's distribution."""
        return torch.distributions.Beta(q["concentration1"], q["concentration0"], validate_args=False)

    def given(self, fn: Distribution, names: Mapping[str, int]) -> dict[str, Tensor] | None:
        """Return both concentrations, which torch keeps as one Dirichlet's."""
        found = {name: getattr(fn, name) for name in names}
        return found if all(isinstance(value, Tensor) for value in found.values()) else None

    def direction(self, q: Params, grad: Params) -> dict[str, Tensor]:
        """Return the Dirichlet's."""
        pairs = [{"concentration": torch.stack([p["concentration1"], p["concentration0"]], -1)} for p in (q, grad)]
        first, second = DIRICHLET.direction(*pairs)["concentration"].unbind(-1)
        return {"concentration1": first, "concentration0": second}

    def statistics(self, x: Tensor, reference: Params) -> Tensor:
        """Return log x and log(1 - x)."""
        return torch.stack([x.log(), torch.log1p(-x)], -1)

    def expectation(self, q: Params, reference: Params) -> Tensor:
        """Return their means."""
        total = torch.digamma(q["concentration1"] + q["concentration0"])
        return torch.stack([torch.digamma(q["concentration1"]) - total, torch.digamma(q["concentration0"]) - total], -1)


class _Logits(AffineFamily):
    """A family over finitely many values, by its logits, which may be any number."""

    discrete = True

    def contains(self, q: Params) -> Tensor:
        """Tell which elements are finite."""
        return every(torch.isfinite(q["logits"]), self.arguments["logits"])


class Bernoulli(_Logits):
    """The Bernoulli distribution; T(x) = x."""

    name = "Bernoulli"
    arguments = {"logits": 0}
    parametrizations = (
        Parametrization(arguments),
        Parametrization(
            {"probs": 0}, lambda given: {"logits": given["probs"].logit()}, lambda q: {"probs": q["logits"].sigmoid()}
        ),
    )

    def make(self, q: Params) -> Distribution:
        """Return torch's distribution."""
        return torch.distributions.Bernoulli(logits=q["logits"], validate_args=False)

    def direction(self, q: Params, grad: Params) -> dict[str, Tensor]:
        """Divide by the Fisher information p (1 - p)."""
        return {"logits": grad["logits"] * (2 + 2 * torch.cosh(q["logits"]))}

    def kl(self, new: Params, old: Params) -> Tensor:
        """Return KL(new || old)."""
        p = new["logits"].sigmoid()
        normalizer = torch.nn.functional.softplus
        return p * (new["logits"] - old["logits"]) - normalizer(new["logits"]) + normalizer(old["logits"])

    def statistics(self, x: Tensor, reference: Params) -> Tensor:
        """Return x."""
        return x[..., None].to(reference["logits"].dtype)

    def expectation(self, q: Params, reference: Params) -> Tensor:
        """Return its mean."""
        return q["logits"].sigmoid()[..., None]


class Categorical(_Logits):
    """The categorical distribution; T(x) is x as a one-hot vector."""

    name = "Categorical"
    arguments = {"logits": 1}
    parametrizations = (
        Parametrization(arguments, normalize=lambda logits: logits - logits.logsumexp(-1, keepdim=True)),
        Parametrization(
            {"probs": 1},
            lambda given: {"logits": given["probs"].log()},
            lambda q: {"probs": q["logits"].softmax(-1)},
            lambda probs: probs / probs.sum(-1, keepdim=True),
        ),
    )

    def make(self, q: Params) -> Distribution:
        """Return torch's distribution."""
        return torch.distributions.Categorical(logits=q["logits"], validate_args=False)

    def direction(self, q: Params, grad: Params) -> dict[str, Tensor]:
        """Divide by the probabilities: the Fisher information but for a shift of all logits, which changes nothing."""
        log_p = q["logits"].log_softmax(-1)
        change = grad["logits"] * torch.exp(-log_p)
        return {"logits": change - (log_p.exp() * change).sum(-1, keepdim=True)}

    def statistics(self, x: Tensor, reference: Params) -> Tensor:
        """Return x as a one-hot vector."""
        size = reference["logits"].shape[-1]
        return lift(x, 1).eq(torch.arange(size, device=x.device)).to(reference["logits"].dtype)

    def expectation(self, q: Params, reference: Params) -> Tensor:
        """Return the probabilities."""
        return q["logits"].softmax(-1)


class OneHotCategorical(Categorical):
    """The categorical distribution with one-hot values; T(x) = x."""

    name = "OneHotCategorical"

    def log_prob(self, q: Params, x: Tensor) -> Tensor:
        """Return the log-density of each unit."""
        return (q["logits"].log_softmax(-1) * x).sum(-1)

    def given(self, fn: Distribution, names: Mapping[str, int]) -> dict[str, Tensor] | None:
        """Return the arguments of the categorical distribution inside."""
        return super().given(vars(fn)["_categorical"], names)

    def statistics(self, x: Tensor, reference: Params) -> Tensor:
        """Return x."""
        return x.to(reference["logits"].dtype)


GAMMA, EXPONENTIAL, DIRICHLET, BETA = Gamma(), Exponential(), Dirichlet(), Beta()
BERNOULLI, CATEGORICAL, ONE_HOT_CATEGORICAL = Bernoulli(), Categorical(), OneHotCategorical()
