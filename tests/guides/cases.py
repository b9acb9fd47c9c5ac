"""Models for the flow guides, and what is done with them."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from pyro_elbo_ext import AutoFlow, AutoPlatedFlow
from tests.cases import NUM_DATA

Y = torch.tensor([2.8, 0.8, -0.3, 0.7])


def schools():
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(1.0)))
    with pyro.plate("schools", 4):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=Y.to(theta))


def rows(batch=NUM_DATA):
    return pyro.plate("data", NUM_DATA, subsample_size=batch)


def levels():
    """Three levels, non-centred at two of them; a latent site after the plates in the model's order."""
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
    tau = pyro.sample("tau", dist.LogNormal(torch.tensor(0.0), 0.5))
    with pyro.plate("groups", 3, dim=-1):
        group = pyro.sample("group", dist.Normal(mu, tau))
        with pyro.plate("members", 2, dim=-3):  # dimension -2 is left free
            member = pyro.sample("member", dist.StudentT(4.0, group, tau))
            pyro.sample("x", dist.Normal(member, 1.0), obs=torch.arange(6.0).reshape(2, 1, 3))
    pyro.sample("noise", dist.Exponential(1 / tau))


def perturb(guide, amount=0.3):
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            parameter.add_((0.02 if name == "centering" else amount / 3) * torch.randn_like(parameter))
    return guide


def log_weight(model, guide, *args):
    trace = poutine.trace(guide).get_trace(*args)
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(*args)
    return replayed.log_prob_sum() - trace.log_prob_sum(), trace


GUIDES = {"joint": AutoFlow, "plated": AutoPlatedFlow}


def perturb_built(guide):
    guide.build()
    return perturb(guide)
