"""What a run of very many steps takes, and where it ends."""

import gc
import math
import resource

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal

from pyro_elbo_ext import IWAE_ELBO, CompiledSVI, NaturalGradient, fit
from tests.robustness.cases import X, assert_finite, make_svi


def model():
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X.to(z))


def evidence():
    return float(dist.Normal(torch.zeros(()), 2**0.5).log_prob(X).sum())


def memory():
    """Peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.slow
@pytest.mark.convergence
def test_a_hundred_thousand_compiled_steps_in_flat_memory():
    """At the posterior every weight is the evidence, so the loss ends there, to rounding."""
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.9998}), IWAE_ELBO(4))
    first = svi.run(10_000)
    before = memory()
    losses = np.concatenate([svi.run(10_000) for _ in range(9)])
    assert svi.how == "loop"
    assert memory() - before < 20
    assert np.isfinite(first).all() and np.isfinite(losses).all()
    assert first[:10].mean() > -evidence() + 0.1
    assert np.abs(losses[-1000:] + evidence()).max() < 1e-3
    assert_finite(svi)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["svi", "fit", "natural"])
def test_thousands_of_eager_steps_leave_nothing_behind(engine):
    optim = NaturalGradient(lr=0.1) if engine == "natural" else pyro.optim.Adam({"lr": 0.01})
    svi = make_svi("svi", model, AutoNormal(model), optim, IWAE_ELBO(4))

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    def run(num):
        if engine == "fit":
            return fit(svi, num_steps=num, progress=False).history["loss"]
        return [svi.step() for _ in range(num)]

    run(50)
    before = tensors()
    assert all(math.isfinite(loss) for loss in run(2000))
    assert tensors() <= before + 5
    assert_finite(svi)


def test_a_run_without_a_good_step_ends():
    """After a hundred in a row, and says why."""

    def broken():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("bad", dist.Unit(z * math.nan, validate_args=False), obs=torch.zeros(0))

    svi = SVI(broken, AutoNormal(broken), pyro.optim.Adam({"lr": 0.01}), IWAE_ELBO(2))
    with pytest.raises(ValueError, match="100 steps in a row were not finite.*site 'bad'"):
        fit(svi, num_steps=10**9, progress=False, nonfinite="skip")
    assert_finite(svi)
