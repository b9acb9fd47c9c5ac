"""A pair that breaks on demand, the losses it is trained by, and what a step must leave as it was."""

import math
from functools import partial
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints
from torch.utils import _pytree as pytree

from pyro_elbo_ext import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    VRIWAE_ELBO,
    AutoFlow,
    AutoPlatedFlow,
    CompiledSVI,
    MeanField_ELBO,
    NaturalGradient,
    Price_ELBO,
    Regression_ELBO,
    ReweightedWakeSleep_ELBO,
    ScoreFunction_ELBO,
    ScoreRegression_ELBO,
    fit,
)
from tests.cases import SoftMinimum_ELBO

X = torch.tensor([-0.5, 0.3, 1.2], dtype=torch.float64, device="cpu")
NEVER = 1e300  # a threshold that no draw exceeds


# Values by hand, from log-weights [K, plates].


def iwae(log_w):
    return log_w.logsumexp(0) - math.log(len(log_w))


def elbo(log_w):
    return log_w.mean(0)


def renyi(alpha, log_w):
    return iwae((1 - alpha) * log_w) / (1 - alpha)


def miwae(log_w):
    return sum(iwae(half) for half in log_w.chunk(2)) / 2


def ciwae(log_w):
    return 0.3 * elbo(log_w) + 0.7 * iwae(log_w)


def soft_minimum(log_w):
    first, second = (iwae(half) for half in log_w.chunk(2))
    return math.log(2) - torch.logaddexp(-first, -second)


class Loss(NamedTuple):
    """A loss by its number of particles, its value by hand, and whether it takes ``nonfinite="drop"``.

    Regressions need more particles than statistics. ``zeros``: a weight of zero is no error. ``guide``: another bound
    whose gradient the guide follows, and which has to be finite, too.
    """

    make: object
    value: object
    drops: bool = True
    zeros: bool = True
    particles: int = 6
    guide: object = None


# What needs a path through the latent values.
PATHS = {
    "auto": Loss(IWAE_ELBO, iwae),
    "pathwise": Loss(partial(IWAE_ELBO, gradient="pathwise"), iwae),
    "stl": Loss(partial(IWAE_ELBO, gradient="stl"), iwae),
    "looped": Loss(partial(IWAE_ELBO, vectorize_particles=False), iwae),
    "vr-iwae": Loss(partial(VRIWAE_ELBO, 0.4), partial(renyi, 0.4)),
    "miwae": Loss(MIWAE_ELBO, miwae),
    "ciwae": Loss(partial(CIWAE_ELBO, 0.3), ciwae, zeros=False),
    "piwae": Loss(PIWAE_ELBO, iwae, guide=miwae),
    "own bound": Loss(SoftMinimum_ELBO, soft_minimum),
    "mean-field": Loss(MeanField_ELBO, None, drops=False, zeros=False),
    "wake-sleep, dreg": Loss(partial(ReweightedWakeSleep_ELBO, wake_phi="dreg"), iwae),
    "price": Loss(Price_ELBO, None, drops=False, zeros=False),
    "score regression": Loss(ScoreRegression_ELBO, None, drops=False, zeros=False, particles=12),
}  # fmt: skip
SCORES = {
    "vimco": Loss(partial(IWAE_ELBO, gradient="vimco"), iwae),
    "ovis": Loss(partial(IWAE_ELBO, gradient="ovis"), iwae),
    "wake-sleep": Loss(ReweightedWakeSleep_ELBO, iwae),
    "leave-one-out": Loss(ScoreFunction_ELBO, elbo, drops=False, zeros=False),
    "running mean": Loss(partial(ScoreFunction_ELBO, baseline="running-mean"), elbo, drops=False, zeros=False),
    "regression": Loss(Regression_ELBO, elbo, drops=False, zeros=False, particles=12),
}
LOSSES = PATHS | SCORES
BITS = {
    **SCORES,
    "disarm": Loss(partial(ScoreFunction_ELBO, gradient="disarm"), None, drops=False, zeros=False),
    "double-cv": Loss(partial(ScoreFunction_ELBO, gradient="double-cv"), None, drops=False, zeros=False),
}
OPTIMS = {
    "adam": lambda: pyro.optim.Adam({"lr": 0.01}),
    "clipped": lambda: pyro.optim.ClippedAdam({"lr": 0.01}),
    "natural": lambda: NaturalGradient(lr=0.3),
}
ENGINES = ("svi", "compiled", "fit", "fit, skip")


class Breaking(dist.Normal):
    """A normal distribution whose log-density is another above a threshold."""

    def __init__(self, loc, scale, above, value):
        self.above, self.value = above, value
        super().__init__(loc, scale, validate_args=False)

    def expand(self, shape, _instance=None):
        return Breaking(self.loc.expand(shape), self.scale.expand(shape), self.above, self.value)

    def log_prob(self, value):
        return super().log_prob(value) + torch.where(value > self.above, self.value, 0.0)


class Breaks:
    """z_i ~ N(0, 1), x_i ~ N(z_i, 1) in a plate, whose log-density is ``value`` where a latent exceeds ``above``.

    Args:
        where: "model" or "guide": at the latent's site; "factor": at one that is observed.
        value: what the log-density becomes.
    """

    def __init__(self, where="factor", value=math.nan):
        self.where, self.value, self.seen = where, value, []

    def model(self, above):
        one = torch.ones(())
        with pyro.plate("data", 3):
            kind = Breaking(0 * one, one, above, self.value) if self.where == "model" else dist.Normal(0 * one, one)
            z = pyro.sample("z", kind)
            if self.where == "factor":
                broken = torch.where(z > above, self.value, 0.0)
                pyro.sample("broken", dist.Unit(broken, validate_args=False), obs=torch.zeros(0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X.to(z))
        self.seen.append(z.detach())

    def guide(self, above):
        m = pyro.param("m", lambda: torch.tensor([0.2, 0.0, 0.4]))
        s = pyro.param("s", lambda: torch.tensor([0.9, 1.0, 0.8]), constraint=constraints.positive)
        with pyro.plate("data", 3):
            pyro.sample("z", Breaking(m, s, above, self.value) if self.where == "guide" else dist.Normal(m, s))

    def log_weight(self, above, loc, scale):
        """By hand, ``[K, 3]`` in float64, at the values that the model saw first."""
        z = torch.cat([z.reshape(-1, 3) for z in self.seen]).double()
        standard = -0.5 * math.log(2 * math.pi)
        log_w = standard - z.square() / 2 + standard - (X.to(z) - z).square() / 2
        log_w = log_w - (standard - ((z - loc) / scale).square() / 2 - scale.log())
        bad = -self.value if self.where == "guide" else self.value
        return log_w + torch.where(z > above, bad, 0.0)


def bits_model(factor=0.0):
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)))
        pyro.sample("broken", dist.Unit(torch.where(z > 0, factor, 0.0), validate_args=False), obs=torch.zeros(0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X.to(z))


def bits_guide(factor=0.0):
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", lambda: torch.tensor([-0.3, 0.0, 0.8]))))


def root(value, at):
    """0, with a gradient of 0 where ``at`` is 1, and of NaN where it is 0."""
    return (value - value + at).sqrt() - at


def steep_model(at):
    """A loss that is finite everywhere, whose gradient is NaN at 0: a root of what a latent depends on."""
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z + root(z, at), 1.0), obs=X.to(z))


def plain_model(at):
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X.to(z))


def plain_guide(at):
    m = pyro.param("m", lambda: torch.tensor([0.2, 0.0, 0.4]))
    s = pyro.param("s", lambda: torch.tensor([0.9, 1.0, 0.8]), constraint=constraints.positive)
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(m, s))


def steep_guide(at):
    """The same, of a parameter, for losses that take no path through latent values."""
    m = pyro.param("m", lambda: torch.tensor([0.2, 0.0, 0.4]))
    s = pyro.param("s", lambda: torch.tensor([0.9, 1.0, 0.8]), constraint=constraints.positive)
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(m + root(m, at), s))


GUIDES = {
    "hand-written": lambda model: plain_guide,
    "normal": AutoNormal,
    "flow": AutoFlow,
    "plated flow": AutoPlatedFlow,
}


# What a failed step must leave.


def state_of(svi):
    """Copies of all parameters, and of what the optimiser keeps of them, but for how often it was called."""
    store = pyro.get_param_store()._params
    kept = {key: value for key, value in svi.optim.get_state().items() if key != "num_steps"}
    return pytree.tree_map(
        lambda part: part.detach().clone() if isinstance(part, torch.Tensor) else part,
        ({name: store[name] for name in sorted(store)}, {str(name): kept[name] for name in kept}),
    )


def assert_same(before, after):
    """Bitwise, NaN included."""
    (found, form), (expected, other) = pytree.tree_flatten(after), pytree.tree_flatten(before)
    assert form == other
    for now, then in zip(found, expected, strict=True):
        if isinstance(now, torch.Tensor):
            assert now.dtype == then.dtype and torch.equal(now, then)
        else:
            assert now == then


def assert_finite(svi):
    """No NaN in what the optimiser keeps; infinity is a limit not met yet."""
    params, kept = state_of(svi)
    assert all(value.isfinite().all() for value in params.values())
    assert not any(part.isnan().any() for part in pytree.tree_leaves(kept) if isinstance(part, torch.Tensor))


def make_svi(engine, model, guide, optim, loss):
    return (CompiledSVI if engine == "compiled" else SVI)(model, guide, optim, loss)


def take(engine, svi, *args):
    """One step by an engine; the loss, NaN for a step that was skipped."""
    if not engine.startswith("fit"):
        return svi.step(*args)
    policy = "skip" if "skip" in engine else "raise"
    return float(fit(svi, *args, num_steps=1, progress=False, nonfinite=policy).history["loss"][-1])
