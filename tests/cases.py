"""Registry of models, guides and losses, each by a readable name."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from torch.distributions import constraints

from pyro_elbo_ext import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    VRIWAE_ELBO,
    AutoFlow,
    AutoPlatedFlow,
    ImportanceWeighted_ELBO,
    MeanField_ELBO,
    Price_ELBO,
    Regression_ELBO,
    ReweightedWakeSleep_ELBO,
    ScoreFunction_ELBO,
    ScoreRegression_ELBO,
)

NUM_DATA = 8


def data(num=NUM_DATA):
    return torch.linspace(-1.5, 2.0, num)


def log_evidence(num=NUM_DATA):
    return float(dist.Normal(0.0, 2**0.5).log_prob(data(num)).sum())


def local_model(batch=NUM_DATA):
    """z_i ~ N(0, 1), x_i ~ N(z_i, 1), every latent in the plate."""
    with pyro.plate("data", NUM_DATA, subsample_size=batch) as rows:
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=data()[rows])


def local_guide(batch=NUM_DATA):
    m = pyro.param("m", lambda: torch.tensor(0.1))
    s = pyro.param("s", lambda: torch.tensor(0.8), constraint=constraints.positive)
    with pyro.plate("data", NUM_DATA, subsample_size=batch):
        pyro.sample("z", dist.Normal(m, s))


def global_model(batch=NUM_DATA):
    """One global latent g, local z_i ~ N(g, 1), x_i ~ N(z_i, 1)."""
    g = pyro.sample("g", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("data", NUM_DATA, subsample_size=batch) as rows:
        z = pyro.sample("z", dist.Normal(g, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=data()[rows])


def global_guide(batch=NUM_DATA):
    m = pyro.param("gm", lambda: torch.tensor(0.3))
    s = pyro.param("gs", lambda: torch.tensor(0.4), constraint=constraints.positive)
    a = pyro.param("a", lambda: torch.tensor(0.5))
    b = pyro.param("b", lambda: torch.tensor(0.4))
    c = pyro.param("c", lambda: torch.tensor(0.8), constraint=constraints.positive)
    g = pyro.sample("g", dist.Normal(m, s))
    with pyro.plate("data", NUM_DATA, subsample_size=batch) as rows:
        pyro.sample("z", dist.Normal(a * g + b * data()[rows], c))


def global_log_evidence():
    cov = torch.ones(NUM_DATA, NUM_DATA) + 2 * torch.eye(NUM_DATA)
    return float(dist.MultivariateNormal(torch.zeros(NUM_DATA), cov).log_prob(data()))


def nested_model():
    """Two nested plates, a latent in each, constrained supports, a mask and a scale."""
    x = torch.linspace(0.5, 2.0, 6).reshape(2, 3)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    with pyro.plate("inner", 3, dim=-1):
        a = pyro.sample("a", dist.LogNormal(torch.tensor(0.0), 1.0))
        with pyro.plate("outer", 2, dim=-2), pyro.poutine.mask(mask=mask):
            b = pyro.sample("b", dist.Gamma(torch.tensor(2.0), 1.0))
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.deterministic("total", a + w.sum(-1))
            pyro.sample("x", dist.Normal(a + b + w.sum(-1), 1.0), obs=x)


MODELS = {"local": local_model, "global": global_model, "nested": nested_model}

AUTO_GUIDES = {
    guide.__name__: guide
    for guide in (
        AutoDelta,
        AutoDiagonalNormal,
        AutoLowRankMultivariateNormal,
        AutoMultivariateNormal,
        AutoNormal,
        AutoNormalMessenger,
        AutoStructured,
        AutoFlow,
        AutoPlatedFlow,
    )
}


class SoftMinimum_ELBO(ImportanceWeighted_ELBO):
    """A bound that the package does not have: a soft minimum of two importance-weighted bounds."""

    def bound(self, log_w):
        first, second = (half.logsumexp(0) - math.log(len(half)) for half in log_w.chunk(2))
        return math.log(2) - torch.logaddexp(-first, -second)


ELBOS = {
    "iwae": IWAE_ELBO,
    "iwae-pathwise": partial(IWAE_ELBO, gradient="pathwise"),
    "iwae-stl": partial(IWAE_ELBO, gradient="stl"),
    "iwae-dreg": partial(IWAE_ELBO, gradient="dreg"),
    "vr-iwae": partial(VRIWAE_ELBO, 0.5),
    "miwae": MIWAE_ELBO,
    "ciwae": partial(CIWAE_ELBO, 0.3),
    "piwae": PIWAE_ELBO,
    "piwae-pathwise": partial(PIWAE_ELBO, gradient="pathwise"),
    "mean-field": MeanField_ELBO,
    "own-bound": SoftMinimum_ELBO,
    "score-function": ScoreFunction_ELBO,
    "wake-sleep": ReweightedWakeSleep_ELBO,
    "score-regression": ScoreRegression_ELBO,
    "regression": Regression_ELBO,
    "price": Price_ELBO,
    "wake-sleep-dreg": partial(ReweightedWakeSleep_ELBO, wake_phi="dreg"),
}
