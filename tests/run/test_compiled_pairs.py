"""Compiled and eager runs end at one bound, for every ELBO with every optimiser and pair that it goes with."""

import itertools

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_elbo_ext import (
    IWAE_ELBO,
    VRIWAE_ELBO,
    AutoFlow,
    AutoPlatedFlow,
    CompiledSVI,
    MeanField_ELBO,
    Minibatches,
    NaturalGradient,
    ScoreFunction_ELBO,
    ScoreRegression_ELBO,
)
from tests.run.cases import Coder, coins, coins_guide, params, regression

SEEDS, STEPS, TAIL = 10, 150, 50

ELBOS = {
    "pathwise": lambda: IWAE_ELBO(4, "pathwise"),
    "dreg": lambda: IWAE_ELBO(4, "dreg"),
    "stl": lambda: VRIWAE_ELBO(1.0, 4, gradient="stl"),
    "mean field": lambda: MeanField_ELBO(2),
    "score regression": lambda: ScoreRegression_ELBO(12),
    "running mean": lambda: ScoreFunction_ELBO(4, baseline="running-mean"),
    "vimco": lambda: IWAE_ELBO(4, "vimco"),
}
OPTIMISERS = {
    "sgd": lambda: pyro.optim.SGD({"lr": 2e-5, "momentum": 0.5}),
    "adam": lambda: pyro.optim.Adam(lambda name: {"lr": 0.01 if "scale" in name else 0.005}),
    "clipped": lambda: pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.995}),
    "scheduled": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.003}, "gamma": 0.9}
    ),
    "natural": lambda: NaturalGradient(lr=0.05, retreat=20),
}


def vae():
    coder = Coder()
    return coder.model, coder.guide, (Minibatches(torch.linspace(-2, 2, 96).view(24, 4), batch_size=8),)


PAIRS = {
    "normal, subsampled": lambda: (regression, AutoNormal(regression), (15,)),
    "full rank": lambda: (regression, AutoMultivariateNormal(regression), ()),
    "flow": lambda: (regression, AutoFlow(regression), ()),
    "plated flow": lambda: (regression, AutoPlatedFlow(regression), ()),
    "vae": vae,
    "coins": lambda: (coins, coins_guide, ()),
}


def goes(elbo, optim, pair):
    """Whether the three make sense together."""
    if (elbo in ("running mean", "vimco")) != (pair == "coins"):
        return False
    if elbo == "score regression" and pair not in ("normal, subsampled", "full rank"):
        return False
    if elbo == "dreg" and pair in ("normal, subsampled", "vae"):  # a global latent in a minibatch; batch norm
        return False
    if pair == "normal, subsampled" and elbo == "pathwise":
        return False
    return optim != "natural" or pair in ("normal, subsampled", "full rank", "coins")


def covering():
    """Few cases in which every two that go together meet."""
    cases = [case for case in itertools.product(ELBOS, OPTIMISERS, PAIRS) if goes(*case)]
    left = {pair for case in cases for pair in itertools.combinations(enumerate(case), 2)}
    chosen = []
    while left:
        best = max(cases, key=lambda case: len(left & set(itertools.combinations(enumerate(case), 2))))
        left -= set(itertools.combinations(enumerate(best), 2))
        chosen.append(best)
    return chosen


def final(kind, seed, elbo, optim, pair):
    """Mean of a run's first and of its last losses."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, guide, args = PAIRS[pair]()
    optim = OPTIMISERS[optim]()
    svi = kind(model, guide, optim, ELBOS[elbo]())
    losses, first = [], {}
    for _ in range(STEPS // 25):
        if kind is CompiledSVI:
            losses.extend(svi.run(25, *args))
            assert svi.how == "loop"
        elif pair == "vae":
            losses.extend(svi.step(*args[0].take(rows)) for rows in args[0].rows(25))
        else:
            losses.extend(svi.step(*args) for _ in range(25))
        if hasattr(optim, "step"):
            optim.step()
        first = first or params()
    assert any(not torch.equal(value, first[name]) for name, value in params().items())
    return np.mean(losses[:5]), np.mean(losses[-TAIL:])


def test_every_two_meet():
    chosen = covering()
    assert {e for e, _, _ in chosen} == set(ELBOS)
    assert {o for _, o, _ in chosen} == set(OPTIMISERS)
    assert {p for _, _, p in chosen} == set(PAIRS)
    assert len(chosen) < 40


@pytest.mark.slow
@pytest.mark.parametrize("case", covering(), ids=" / ".join)
def test_compiled_and_eager_runs_end_at_one_bound(case):
    eager, compiled = (np.array([final(kind, seed, *case) for seed in range(SEEDS)]) for kind in (SVI, CompiledSVI))
    error = np.sqrt((eager.var(0, ddof=1) + compiled.var(0, ddof=1)) / SEEDS)
    assert (np.abs(eager.mean(0) - compiled.mean(0)) < 4.5 * error + 1e-6).all()
