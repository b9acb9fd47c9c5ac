"""Pairs to train, small and of every kind that a run must take up again exactly."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_elbo_ext import IWAE_ELBO, AutoFlow, NaturalGradient, ScoreFunction_ELBO, ScoreRegression_ELBO

X = torch.linspace(-1.0, 1.0, 20, dtype=torch.float64, device="cpu")[:, None] ** torch.arange(3, device="cpu")
Y = X.sum(-1) + 0.3 * torch.sin(50 * X[:, 1])


def leaves_of():
    """The store's unconstrained parameters in the order of their names."""
    store = pyro.get_param_store()._params
    return {name: store[name] for name in sorted(store)}


def params():
    """Copies of them."""
    return {name: leaf.detach().clone() for name, leaf in leaves_of().items()}


def regression(batch=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(X), subsample_size=batch) as rows:
        pyro.sample("y", dist.Normal((w * X.to(w)[rows]).sum(-1), sigma), obs=Y.to(w)[rows])


def coins(x=None):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("coins", 5):
        pyro.sample("face", dist.Bernoulli(p))


def coins_guide(x=None):
    p = pyro.param("p_loc", torch.tensor(0.4), constraint=dist.constraints.unit_interval)
    pyro.sample("p", dist.Beta(5 * p, 5 * (1 - p)))
    with pyro.plate("coins", 5):
        pyro.sample("face", dist.Bernoulli(logits=pyro.param("logits", torch.zeros(5))))


class Coder(nn.Module):
    """A small VAE with batch norm, whose running means are part of its state."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 4))
        self.decode = nn.Linear(2, 4)

    def model(self, x):
        pyro.module("decode", self.decode)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encode", self.encode)
        with pyro.plate("rows", len(x)):
            loc, scale = self.encode(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    def model_of_x(self):
        self.model(self.x)

    def guide_of_x(self):
        self.guide(self.x)


def lazily_built():
    return SVI(regression, AutoNormal(regression), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO()), (7,), None


def natural():
    optim = NaturalGradient(lr=0.3, optim=pyro.optim.Adam({"lr": 0.02}))
    return SVI(regression, AutoNormal(regression), optim, ScoreRegression_ELBO(8)), (), None


def flow():
    return SVI(regression, AutoFlow(regression), pyro.optim.ClippedAdam({"lr": 0.01}), IWAE_ELBO(4, "stl")), (), None


def score_function():
    loss = ScoreFunction_ELBO(4, baseline="running-mean")
    return SVI(coins, coins_guide, pyro.optim.Adam({"lr": 0.05}), loss), (), None


def scheduled():
    schedule = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-3}, "gamma": 0.97}
    return SVI(regression, AutoNormal(regression), pyro.optim.ExponentialLR(schedule), TraceGraph_ELBO()), (5,), None


def shuffled_minibatches():
    torch.set_default_device(None)  # of a GPU, where torch's loaders cannot draw; given back after the test
    pyro.set_rng_seed(5)
    coder = Coder()
    generator = torch.Generator().manual_seed(3)
    rows = torch.utils.data.TensorDataset(torch.randn(22, 4, generator=generator, device="cpu"))
    loader = torch.utils.data.DataLoader(rows, batch_size=5, shuffle=True)
    return SVI(coder.model, coder.guide, pyro.optim.Adam({"lr": 0.01}), IWAE_ELBO(3)), (), loader


CASES = {case.__name__: case for case in (lazily_built, natural, flow, score_function, scheduled, shuffled_minibatches)}
