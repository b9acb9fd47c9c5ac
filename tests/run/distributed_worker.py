"""One of the processes of test_distributed.py: runs every check, and writes what it found as JSON.

    python distributed_worker.py RANK WORLD_SIZE FOLDER [DEVICE]

Random numbers are looked up by row and particle, so that a process draws for its rows what one process would draw for
them, and averages can be held against one process's gradients digit by digit.
"""

import json
import os
import signal
import sys
import time
import traceback
import warnings
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.util import zero_grads
from pyro.optim import SGD, Adam
from torch import nn
from torch.distributions import constraints

from pyro_elbo_ext import (
    IWAE_ELBO,
    PIWAE_ELBO,
    VRIWAE_ELBO,
    AutoFlow,
    NaturalGradient,
    ScoreFunction_ELBO,
    ScoreRegression_ELBO,
    fit,
)
from pyro_elbo_ext.elbo.base import NonFiniteError
from pyro_elbo_ext.run.distributed import DistributedSVI
from pyro_elbo_ext.run.distributed.averaging import Averager, Work
from pyro_elbo_ext.run.distributed.processes import Processes
from pyro_elbo_ext.run.distributed.sharding import Watch

N, BATCH, FEATURES, LATENT, PARTICLES = 24, 4, 3, 2, 8
TOLERANCE = 1e-12
CHECKS, RANK, FOLDER = {}, 0, None


def check(function):
    CHECKS[function.__name__] = function
    return function


class Noise:
    """What ``randn`` and ``bernoulli`` return: the same for a row and a particle wherever they are drawn."""

    def __init__(self):
        made = torch.Generator("cpu").manual_seed(0)
        self.local = torch.randn(PARTICLES, N, LATENT, generator=made, device="cpu").to(X.device)
        self.uniform = torch.rand(PARTICLES, N, generator=made, device="cpu").to(X.device)
        self.world = torch.randn(PARTICLES, 64, generator=made, device="cpu").to(X.device)
        self.rows, self.particles = torch.arange(N), slice(0, PARTICLES)

    def normal(self, *shape, **kwargs):
        shape = torch.Size(shape[0] if isinstance(shape[0], (tuple, list)) else shape)
        if shape[-2:] == (len(self.rows), LATENT):
            return self.local[self.particles][: shape[:-2].numel(), self.rows].reshape(shape)
        vectorized = len(shape) > 1
        rows = self.world[self.particles][: shape[0] if vectorized else 1]
        return rows[:, : (shape[1:] if vectorized else shape).numel()].reshape(shape).clone()

    def bernoulli(self, probs, *args, **kwargs):
        table = self.uniform[self.particles][:, self.rows]
        return ((table[: len(probs)] if probs.dim() > 1 else table[0]) < probs).to(probs)

    def __enter__(self):
        self.kept = torch.randn, torch.bernoulli, torch.distributions.normal._standard_normal
        torch.randn, torch.bernoulli = self.normal, self.bernoulli
        torch.distributions.normal._standard_normal = lambda shape, dtype, device: self.normal(shape)
        return self

    def __exit__(self, *error):
        torch.randn, torch.bernoulli, torch.distributions.normal._standard_normal = self.kept


def shards(step):
    """The rows of one step: of both processes, and of this one."""
    order = torch.randperm(N, generator=torch.Generator("cpu").manual_seed(step), device="cpu")
    order = order[: 2 * BATCH].to(X.device)
    return order, order[RANK * BATCH : (RANK + 1) * BATCH]


X = torch.linspace(-1, 1, N * FEATURES, dtype=torch.float64).reshape(N, FEATURES).sin()
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.3 * torch.linspace(-3, 3, N, dtype=torch.float64).cos()


def regression(rows):
    w = pyro.sample("w", dist.Normal(torch.zeros(FEATURES), 1.0).to_event(1))
    with pyro.plate("data", N, subsample=rows):
        x, y = (t[rows.to(t.device)].to(w) for t in (X, Y))  # the test itself runs it, too, on any device
        pyro.sample("y", dist.Normal((w * x).sum(-1), 0.5), obs=y)


def regression_guide(rows):
    loc = pyro.param("loc", lambda: torch.randn(FEATURES))  # other values in every process
    scale = pyro.param("scale", lambda: torch.ones(FEATURES), constraint=constraints.positive)
    pyro.param("unused", lambda: torch.zeros(2))
    pyro.sample("w", dist.Normal(loc, scale).to_event(1))


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(FEATURES, 2 * LATENT), nn.Linear(LATENT, FEATURES)

    def model(self, rows):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", N, subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=X[rows])

    def guide(self, rows):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", N, subsample=rows):
            loc, log_scale = self.encoder(X[rows]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def bits_model(rows):
    with pyro.plate("data", N, subsample=rows):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("y", dist.Normal(2 * z, 1.0), obs=Y[rows])


def bits_guide(rows):
    logits = pyro.param("logits", lambda: torch.tensor(0.2))
    with pyro.plate("data", N, subsample=rows):
        pyro.sample("z", dist.Bernoulli(logits=logits + Y[rows].detach()))


def grads():
    store = pyro.get_param_store()
    return {name: None if p.grad is None else p.grad.clone() for name, p in store._params.items()}


def clear():
    zero_grads(pyro.get_param_store()._params.values())


def close(found, expected):
    """The largest difference of two sets of gradients, relative to the largest entry."""
    assert set(found) == set(expected) and found
    for name, grad in found.items():
        assert (grad is None) == (expected[name] is None), name
    pairs = [(grad, expected[name]) for name, grad in found.items() if grad is not None]
    size = max(float(theirs.abs().max()) for _, theirs in pairs)
    error = max(float((ours - theirs).abs().max()) for ours, theirs in pairs) / size
    assert size > 1e-3 and error < TOLERANCE, error
    return error


def same_gradients(model, guide, loss, reference=None, steps=3, **kwargs):
    """Hold the averaged gradients of some steps against one process's on all rows."""
    svi, errors = DistributedSVI(model, guide, Adam({"lr": 0.05}), loss, **kwargs), []
    for step in range(steps):
        both, own = shards(step)
        with Noise() as noise:
            noise.rows = own
            value = svi.loss_and_grads(model, guide, own)
            found = grads()
            clear()
            noise.rows = both
            expected_value = (reference or loss).loss_and_grads(model, guide, both)
            errors.append(close(found, grads()))
            assert abs(value - expected_value) < TOLERANCE * abs(expected_value)
            clear()
            noise.rows = own
            svi.step(own)
    return max(errors)


def same_everywhere(svi):
    values = {name: p.detach() for name, p in pyro.get_param_store()._params.items()}
    others = svi._processes.gather(values)
    assert all(torch.equal(values[name], other[name]) for other in others for name in values)


@check
def gradients_of_a_regression():
    return same_gradients(regression, regression_guide, Trace_ELBO(2, vectorize_particles=True, max_plate_nesting=1))


@check
def gradients_of_a_vae():
    vae = VAE()
    errors = same_gradients(vae.model, vae.guide, Trace_ELBO(2, vectorize_particles=True, max_plate_nesting=1))
    others = [same_gradients(vae.model, vae.guide, IWAE_ELBO(PARTICLES, g)) for g in ("pathwise", "stl", "dreg")]
    return max(errors, *others)


@check
def gradients_of_a_lazily_built_auto_guide():
    return same_gradients(regression, AutoNormal(regression), IWAE_ELBO(1))


@check
def gradients_of_a_lazily_built_flow():
    return same_gradients(regression, AutoFlow(regression), IWAE_ELBO(1))


@check
def gradients_under_a_running_mean():
    loss = ScoreFunction_ELBO(4, "running-mean")
    svi = DistributedSVI(bits_model, bits_guide, SGD({"lr": 0.01}), loss)
    assert svi.loss.__self__ is svi.loss_and_grads.__self__ is loss  # as in SVI: checkpoints look there
    with Noise() as noise:
        for step in range(4):
            both, own = shards(step)
            reference = ScoreFunction_ELBO(4, "running-mean")
            reference.load_state_dict(loss.state_dict())
            noise.rows = own
            svi.loss_and_grads(bits_model, bits_guide, own)
            found = grads()
            clear()
            noise.rows = both
            reference.loss_and_grads(bits_model, bits_guide, both)
            if step:  # in the first the loss is run twice
                close(found, grads())
                for ours, theirs in zip(
                    loss.baseline._memory.values(), reference.baseline._memory.values(), strict=True
                ):
                    assert abs(float(ours - theirs)) < TOLERANCE * abs(float(theirs)) and float(theirs)
            clear()


@check
def natural_gradient_lands_on_the_posterior_of_all_rows():
    guide = AutoMultivariateNormal(regression)
    svi = DistributedSVI(regression, guide, NaturalGradient(lr=1.0), ScoreRegression_ELBO(16))
    both, own = shards(0)
    for _ in range(2):
        svi.step(own)
    scale = N / len(both)
    precision = torch.eye(FEATURES) + scale * X[both].T @ X[both] / 0.25
    mean = torch.linalg.solve(precision, scale * X[both].T @ Y[both] / 0.25)
    found = guide.get_posterior()
    assert (found.mean - mean).abs().max() < 1e-9
    assert (found.covariance_matrix - precision.inverse()).abs().max() < 1e-9
    same_everywhere(svi)


@check
def shared_particles():
    """Joint weights over a full plate: all K in one log, split over processes."""
    rows, errors = torch.arange(N), []
    own = slice(RANK * PARTICLES // 2, (RANK + 1) * PARTICLES // 2)
    for make in (IWAE_ELBO, lambda k, g: VRIWAE_ELBO(0.4, k, gradient=g)):
        for gradient in ("pathwise", "stl", "dreg"):
            loss = make(PARTICLES, gradient)
            svi = DistributedSVI(regression, regression_guide, Adam({"lr": 0.05}), loss, particles="shared")
            for _ in range(2):
                with Noise() as noise:
                    noise.particles = own
                    value = svi.loss_and_grads(regression, regression_guide, rows)
                    found = grads()
                    clear()
                    noise.particles = slice(0, PARTICLES)
                    expected = loss.loss_and_grads(regression, regression_guide, rows)
                    errors.append(close(found, grads()))
                    clear()
                    assert abs(value - expected) < TOLERANCE * abs(expected)
                    noise.particles = own
                    assert abs(svi.evaluate_loss(rows) - expected) < TOLERANCE * abs(expected)
                    svi.step(rows)
            svi.barrier()
    same_everywhere(svi)
    return max(errors)


@check
def shared_particles_share_the_rows_a_plate_draws():
    drawn, noise = [], []

    def model(take):
        with pyro.plate("data", N, subsample_size=BATCH) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y[rows])
        drawn.append(rows)

    def guide(take):
        loc = pyro.param("loc", lambda: torch.tensor(0.1))
        with pyro.plate("data", N, subsample_size=BATCH):
            noise.append(float(pyro.sample("z", dist.Normal(loc, 1.0)).detach().sum()))

    svi = DistributedSVI(model, guide, Adam({"lr": 0.05}), IWAE_ELBO(4), particles="shared", seed=5)
    for _ in range(3):
        svi.step(None)
    drawn, noise = drawn[-3:], noise[-3:]  # those before belong to a look at the plates
    rows, values = zip(*svi._processes.gather((drawn, noise)), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True)) and values[0] != values[1]
    assert len({tuple(r.tolist()) for r in drawn}) == 3


@check
def a_parameter_without_a_gradient_here_counts_as_zero():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        shift = pyro.param("shift", lambda: torch.tensor(0.5))
        with pyro.plate("data", N, subsample_size=1):
            pyro.sample("x", dist.Normal(z + (shift if RANK == 0 else 0.5), 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Delta(pyro.param("at", lambda: torch.tensor(0.0))))
        pyro.param("unused", lambda: torch.tensor(0.0))

    svi = DistributedSVI(model, guide, SGD({"lr": 0.1}), Trace_ELBO())
    svi.loss_and_grads(model, guide, torch.tensor([2.0 + RANK]))
    found = grads()
    expected = -N * (2.0 - 0.5) / 2
    assert abs(float(found["shift"]) - expected) < 1e-12, found
    assert found["unused"] is None
    clear()


@check
def dtypes_travel_in_buffers_of_their_own():
    kinds = {"a": torch.float32, "b": torch.float64, "c": torch.bfloat16}
    params = {name: torch.zeros(2, dtype=dtype, requires_grad=True) for name, dtype in kinds.items()}
    for param in params.values():
        param.grad = torch.full_like(param, 1 + 2 * RANK)
    averager = Averager(Processes())
    work = Work("step", None, (1.0 + RANK, 5.0), params, {}, Watch())
    averager.agree(work)
    assert averager.add(work if RANK else None) is None  # one has something to say: nothing is taken
    assert all((param.grad == 1 + 2 * RANK).all() for param in params.values())
    assert averager.add(work) == (1.5, 5.0)
    assert all((param.grad == 2).all() and param.grad.dtype is kinds[name] for name, param in params.items())


@check
def draws_differ_between_processes():
    drawn = []

    def model():
        with pyro.plate("data", 1000, subsample_size=5) as rows:
            pyro.sample("y", dist.Normal(pyro.param("m", lambda: torch.tensor(0.0)), 1.0), obs=rows * 1.0)
        drawn.append(rows)

    pyro.set_rng_seed(0)
    svi = DistributedSVI(model, lambda: None, Adam({"lr": 0.05}), Trace_ELBO())
    svi.step()
    rows = svi._processes.gather(drawn[-1])
    assert not torch.equal(*rows)
    assert svi._processes.gather(svi.seed) == [svi.seed] * 2
    again = DistributedSVI(model, lambda: None, Adam({"lr": 0.05}), Trace_ELBO(), seed=7)
    assert again.seed == 7 and torch.initial_seed() == 7 + RANK
    pyro.set_rng_seed(0)  # a mistake
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        again.step()
    assert any("all processes have the same rows of plate 'data'" in str(w.message) for w in found)


@check
def losses_are_averages_and_the_same_everywhere():
    svi = DistributedSVI(regression, regression_guide, Adam({"lr": 0.05}), Trace_ELBO())
    own = shards(0)[1]
    before = svi.evaluate_loss(own)
    values = [before, svi.step(own), svi.evaluate_loss(own)]
    svi.barrier()
    assert svi.gather(values) == [values] * 2
    assert svi.gather({"rank": RANK}) == [{"rank": 0}, {"rank": 1}]
    with Noise() as noise:
        noise.rows = own
        value = svi.evaluate_loss(own)
        mine = Trace_ELBO().loss(regression, regression_guide, own)
    assert abs(value - sum(svi._processes.gather(mine)) / 2) < 1e-12 * abs(value)
    same_everywhere(svi)


@check
def minibatches_may_change_size_together():
    svi = DistributedSVI(regression, regression_guide, Adam({"lr": 0.05}), Trace_ELBO())
    for size in (4, 4, 3, 4):
        svi.step(torch.arange(size) + RANK * size)
    same_everywhere(svi)


@check
def a_nan_on_one_process_is_one_on_all():
    svi = DistributedSVI(regression, regression_guide, Adam({"lr": 0.05}), Trace_ELBO())
    svi.step(shards(0)[1])
    kept = Y.clone()
    Y[:] = torch.where(torch.tensor(RANK == 1), torch.nan, Y)
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = svi.loss_and_grads(regression, regression_guide, shards(1)[1])
    Y[:] = kept
    assert value != value
    found = grads()
    assert found["loc"].isnan().any() and found["scale"].isnan().any()
    clear()
    svi.step(shards(2)[1])
    same_everywhere(svi)


def refused(kind, text, call):
    """Every process must raise, and the same."""
    try:
        call()
    except Exception as error:
        assert type(error) is kind and text in str(error), f"{type(error).__name__}: {error}"
    else:
        raise AssertionError("nothing was raised")


def step(model, guide, loss, *args, **kwargs):
    return lambda: DistributedSVI(model, guide, Adam({"lr": 0.05}), loss, **kwargs).step(*args)


def delta(x):
    pyro.sample("w", dist.Delta(pyro.param("w_loc", lambda: torch.tensor(0.1))))


def full_plate(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def drawn_rows(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=2) as rows:
        pyro.sample("x", dist.Normal(w, 1.0), obs=x[rows])


def scaled(x):
    with pyro.poutine.scale(scale=4.0):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def normal_guide(x):
    pyro.sample("w", dist.Normal(pyro.param("w_loc", lambda: torch.tensor(0.1)), 1.0))


def no_plate(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(w * torch.ones(len(x)), 1.0).to_event(1), obs=x)


def odd_names(x):
    pyro.sample("w", dist.Delta(pyro.param("w_loc" if RANK == 0 else "v_loc", lambda: torch.tensor(0.1))))


def odd_shapes(x):
    pyro.param("more", lambda: torch.zeros(2 + RANK))
    delta(x)


def odd_error(rows):
    if RANK == 1:
        raise KeyError("a mistake of the user's")
    regression(rows)


def local_rows(rows):
    with pyro.plate("data", N, subsample=rows):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=Y[rows])


def local_rows_guide(rows):
    loc, scale = pyro.param("loc", lambda: torch.zeros(N)), pyro.param("s", lambda: torch.ones(N), constraints.positive)
    with pyro.plate("data", N, subsample=rows):
        pyro.sample("z", dist.Normal(loc[rows], scale[rows]))


def averaging_guide(rows):
    logits = pyro.param("logits", lambda: torch.tensor(0.2))
    with pyro.plate("data", N, subsample=rows):
        infer = {"baseline": {"use_decaying_avg_baseline": True}}
        pyro.sample("z", dist.Bernoulli(logits=logits + 0 * Y[rows]), infer=infer)


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("own", torch.tensor(1.0 * RANK))

    def forward(self, x):
        full_plate(x)


def refusals():
    """Cases by name: type, text, and what is refused."""
    mine, same = torch.arange(3.0) + RANK, torch.arange(3.0)
    own, trace = shards(0)[1], Trace_ELBO()
    pair, shared = (regression, regression_guide), {"particles": "shared"}
    return {
        "names": (ValueError, "parameter 'v_loc' is missing on rank 0 but", step(full_plate, odd_names, trace, same)),
        "shapes": (ValueError, "'more' is of shape (2,), torch.float64",
                   step(full_plate, odd_shapes, trace, same)),
        "batch": (ValueError, "plate 'data' is 3 of 24 rows on rank 0 but 4 of 24 rows on rank 1",
                  step(*pair, trace, torch.arange(3 + RANK))),
        "buffers": (ValueError, "buffer 'model.own' is of shape", step(Buffered(), delta, trace, same)),
        "counted": (ValueError, "would count every row 1/world_size times", step(full_plate, delta, trace, mine)),
        "counted, drawn": (ValueError, "have different rows in plate 'data' while site 'w' is outside",
                           step(drawn_rows, delta, trace, mine)),
        "no plate": (ValueError, "site 'x', which is in no plate", step(no_plate, delta, trace, mine)),
        "joint": (ValueError, "takes one log over all of them", step(scaled, normal_guide, IWAE_ELBO(4), mine)),
        "renyi": (ValueError, "pyro.infer.RenyiELBO weighs all rows jointly",
                  step(*pair, RenyiELBO(num_particles=2), own)),
        "newton": (ValueError, "direction='newton'", step(*pair, ScoreRegression_ELBO(16, "newton"), own)),
        "natural rows": (ValueError, "guide site 'z' is inside a subsampled plate",
                         lambda: DistributedSVI(local_rows, local_rows_guide, NaturalGradient(), trace).step(own)),
        "pyro's average": (ValueError, "site 'z' asks for use_decaying_avg_baseline",
                           step(bits_model, averaging_guide, TraceGraph_ELBO(), own)),
        "error": (RuntimeError if RANK == 0 else KeyError, "a mistake of the user's",
                  step(odd_error, regression_guide, trace, own)),
        "error of ours": (NonFiniteError, "is nan", lambda: nan_on_one(IWAE_ELBO(4))),
        "error of ours, shared": (NonFiniteError, "is nan", lambda: nan_on_one(IWAE_ELBO(4), **shared)),
        "kinds": (RuntimeError, "rank 0: evaluate_loss, rank 1: step", lambda: different_things()),
        "kinds, shared": (RuntimeError, "rank 0: evaluate_loss, rank 1: step",
                          lambda: different_things(IWAE_ELBO(4), **shared)),
        "barrier": (RuntimeError, "rank 0: barrier, rank 1: step", lambda: different_things(first="barrier")),
        "barrier, shared": (RuntimeError, "rank 0: barrier, rank 1: step",
                            lambda: different_things(IWAE_ELBO(4), "barrier", **shared)),
        "shared error": (RuntimeError if RANK == 0 else KeyError, "a mistake of the user's",
                         step(odd_error, regression_guide, IWAE_ELBO(4), torch.arange(N), **shared)),
        "shared vimco": (ValueError, "compares each particle with all others",
                         step(bits_model, bits_guide, IWAE_ELBO(4), torch.arange(4), **shared)),
        "shared signal": (ValueError, "gradient='vimco' needs all particles on one process",
                          step(bits_model, bits_guide, IWAE_ELBO(4, "vimco"), torch.arange(4), **shared)),
        "shared number": (ValueError, "must be a multiple of 2 and at least 4, got 3",
                          step(*pair, IWAE_ELBO(3), **shared)),
        "shared bound": (ValueError, "got PIWAE_ELBO", step(*pair, PIWAE_ELBO(4), **shared)),
        "shared rows": (ValueError, "site 'x' has other data on rank 1",
                        step(full_plate, normal_guide, IWAE_ELBO(4), mine, **shared)),
        "shared shapes": (ValueError, "must be handed the same rows",
                          step(local_rows, bits_like, IWAE_ELBO(4), torch.arange(3 + RANK), **shared)),
    }  # fmt: skip


def bits_like(rows):
    with pyro.plate("data", N, subsample=rows):
        pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.tensor(0.1)), 1.0))


def nan_on_one(loss, **kwargs):
    def model(rows):
        w = pyro.sample("w", dist.Normal(torch.zeros(FEATURES), 1.0).to_event(1))
        pyro.factor("nan", 0 * w.sum(-1) + (torch.nan if RANK == 1 else 0.0))

    svi = DistributedSVI(model, regression_guide, Adam({"lr": 0.05}), loss, **kwargs)
    try:
        with pyro.validation_enabled(False):
            svi.step(None)
    finally:
        assert all(grad is None or not grad.any() for grad in grads().values())


def different_things(loss=None, first="evaluate_loss", **kwargs):
    rows = torch.arange(N)
    svi = DistributedSVI(regression, regression_guide, Adam({"lr": 0.05}), loss or Trace_ELBO(), **kwargs)
    svi.step(rows)
    if RANK == 1:
        svi.step(rows)
    elif first == "barrier":
        svi.barrier()
    else:
        svi.evaluate_loss(rows)


def run_checks():
    found = {name: (lambda function=function: function()) for name, function in CHECKS.items()}
    for name, case in refusals().items():
        found[f"refusal: {name}"] = lambda case=case: refused(*case)
    results = {}
    for name, function in found.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(RANK)  # other initial values in every process
        start = time.perf_counter()
        try:
            results[name] = {"ok": True, "error": function()}
        except Exception:
            results[name] = {"ok": False, "text": traceback.format_exc()}
        results[name]["seconds"] = time.perf_counter() - start
    return results


def training():
    return DistributedSVI(regression, regression_guide, Adam({"lr": 0.05}), Trace_ELBO())


def taken(step):
    return (shards(step)[1],)


def params():
    return {name: leaf.detach().clone() for name, leaf in pyro.get_param_store()._params.items()}


class Interrupted(Exception):
    pass


def interrupt(state):
    if state.step == 7:
        raise Interrupted


@check
def a_fit_goes_on_as_if_it_had_not_been_interrupted():
    """Each process with random numbers of its own, all kept by rank 0."""
    settings = {"num_steps": 10, "batches": taken, "seed": 5, "progress": False}
    whole = fit(training(), **settings)
    expected, drawn = params(), torch.randn(())
    pyro.clear_param_store()
    file = FOLDER / "fit.pt"
    with suppress(Interrupted):
        fit(training(), **settings, checkpoint=file, checkpoint_every=3, callbacks=[interrupt])
    pyro.clear_param_store()
    pyro.set_rng_seed(77)
    again = fit(training(), **settings, checkpoint=file)
    found = params()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(drawn, torch.randn(()))
    assert again.history["loss"].tolist() == whole.history["loss"].tolist()
    assert not file.with_name("fit.pt.partial").exists()


def survive(folder):
    """Train, save, and lose the other process in the middle of it."""
    pyro.clear_param_store()
    svi, before = training(), {}

    def kill(state):
        before.update(params())
        if state.step == 5 and RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    texts, start = [], time.perf_counter()
    settings = {"num_steps": 100, "batches": taken, "seed": 5, "progress": False}
    try:
        fit(svi, **settings, checkpoint=folder / "checkpoint.pt", checkpoint_every=2, callbacks=[kill])
    except RuntimeError as error:
        texts.append(str(error))
    try:
        svi.step(*taken(0))  # and it stays so
    except RuntimeError as error:
        texts.append(str(error))
    unchanged = all(torch.equal(before[name], value) for name, value in params().items())
    return {"texts": texts, "seconds": time.perf_counter() - start, "unchanged": unchanged}


def main(rank, world_size, folder, device="cpu"):
    global RANK, FOLDER, X, Y
    RANK, FOLDER, X, Y = rank, folder, X.to(device), Y.to(device)
    torch.set_default_device(device)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("error")
    pyro.enable_validation(True)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(seconds=20), rank=rank, world_size=world_size
    )
    results = run_checks()
    (folder / f"{rank}.json").write_text(json.dumps(results))
    lost = survive(folder)
    (folder / f"lost{rank}.json").write_text(json.dumps(lost))
    os._exit(0)  # the group cannot be shut down without the others


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
