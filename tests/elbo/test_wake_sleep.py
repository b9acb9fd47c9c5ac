"""Reweighted wake-sleep against quadrature and enumeration: its three gradients, plates, minibatches, dreams."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_elbo_ext import IWAE_ELBO, ReweightedWakeSleep_ELBO
from pyro_elbo_ext.bounds import IWAE
from pyro_elbo_ext.testing import (
    BELIEF_STATES,
    GOLDEN_GRADIENT,
    GOLDEN_IWAE,
    Problem,
    belief_network,
    conjugate_normal,
    enumerated_gradient,
    many_bits,
    sample_gradients,
    z_score,
)
from pyro_elbo_ext.tracing import run_pair

WAKE_PHI = {k: GOLDEN_GRADIENT["rws"][k] for k in (2, 3, 4)}


@pytest.mark.parametrize("k", WAKE_PHI)
@pytest.mark.parametrize("wake_phi", ["score", "dreg"])
def test_golden_wake_phi(wake_phi, k):
    elbo = ReweightedWakeSleep_ELBO(k, wake_phi=wake_phi)
    values, grads = sample_gradients(elbo, conjugate_normal(50_000), calls=20, seed=k)
    assert z_score(values, GOLDEN_IWAE[k], 1e-6) < 4
    assert z_score(grads["m"], WAKE_PHI[k], 1e-6) < 4
    assert float(grads["m"].std()) == pytest.approx(SPREAD[wake_phi][k], rel=0.02)


SPREAD = {"score": {2: 0.801, 3: 0.639, 4: 0.539}, "dreg": {2: 0.211, 3: 0.219, 4: 0.215}}


def test_no_variance_at_the_posterior():
    posterior = conjugate_normal(500, 0.75, math.sqrt(0.5))
    _, grads = sample_gradients(ReweightedWakeSleep_ELBO(4, wake_phi="dreg"), posterior)
    assert max(float(grad.abs().max()) for grad in grads.values()) < 1e-9


def wake_phi_exact(k):
    """E sum_k v_k grad log q over all states of the belief network, and wake-theta, which is IWAE's."""
    exact = {}

    def surrogate(log_w):
        return IWAE()(log_w)

    exact["theta"] = enumerated_gradient(belief_network, BELIEF_STATES, surrogate, k)[1]["theta"]
    problem = belief_network(8)
    states = {site: value.to(problem.params["theta"].device) for site, value in BELIEF_STATES.items()}
    with pyro.get_param_store().scope():
        for name, value in problem.params.items():
            pyro.param(name, value.clone())
        traces = run_pair(problem.model, problem.guide, (), {}, states)
        for trace in (traces.guide, traces.model):
            trace.compute_log_prob()
        log_q = sum(s["log_prob"] for s in traces.guide.nodes.values() if s["type"] == "sample")
        log_p = sum(s["log_prob"] for s in traces.model.nodes.values() if s["type"] == "sample")
        draws = torch.cartesian_prod(*[torch.arange(8)] * k).T
        mass, v = log_q[draws].sum(0).exp().detach(), torch.softmax((log_p - log_q)[draws], 0).detach()
        grads = torch.autograd.grad(
            (mass * v * log_q[draws]).sum(), [pyro.param(n) for n in ("first", "top", "weight")]
        )
    return exact | {n: float(g.sum()) for n, g in zip(("first", "top", "weight"), grads, strict=True)}


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
def test_belief_network(vectorize):
    exact = wake_phi_exact(3)
    elbo = ReweightedWakeSleep_ELBO(3, vectorize_particles=vectorize)
    _, grads = sample_gradients(elbo, belief_network(20_000), calls=8, seed=2)
    for name, expected in exact.items():
        assert abs(expected) > 1e-3
        assert z_score(grads[name], expected) < 4, name


def repeated_normal(size, replicates=2000):
    """The conjugate normal in a plate of equal rows; model and guide take the minibatch."""

    def model(batch=size):
        with pyro.plate("replicates", replicates, dim=-2), pyro.plate("data", size, batch, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.full((replicates, batch), 1.5))

    def guide(batch=size):
        with pyro.plate("replicates", replicates, dim=-2), pyro.plate("data", size, batch, dim=-1):
            pyro.sample("z", dist.Normal(pyro.param("m"), pyro.param("s")))

    params = {"m": torch.full((replicates, 1), 0.2), "s": torch.full((replicates, 1), 0.9)}
    return Problem(model, guide, {n: p.to(torch.float64) for n, p in params.items()})


@pytest.mark.parametrize("wake_phi", ["score", "dreg"])
def test_one_weight_per_datum(wake_phi):
    """C9: the gradient of a row is that of a plate of one, in a plate of a hundred and on minibatches of ten."""
    for size, batch in ((1, 1), (100, 100), (100, 10)):
        _, grads = sample_gradients(
            ReweightedWakeSleep_ELBO(3, wake_phi=wake_phi), repeated_normal(size), batch, calls=10
        )
        assert z_score(grads["m"].flatten() / size, WAKE_PHI[3], 1e-6) < 4, (size, batch)


def test_minibatches():
    problem, evidence = many_bits(300)
    found = {}
    for batch in (12, 3):
        elbo = ReweightedWakeSleep_ELBO(4)
        values, grads = sample_gradients(elbo, problem, batch, calls=100, seed=batch)
        found[batch] = {"value": values, **{n: g.reshape(100, -1).mean(1) for n, g in grads.items()}}
        assert float(values.mean()) < evidence
    for name in found[12]:
        one, two = found[12][name], found[3][name]
        assert abs(float(one.mean() - two.mean())) < 4 * math.sqrt(float(one.var() + two.var()) / 100), name


def dreaming(replicates):
    """x ~ N(z, 1), z ~ N(theta, 1), q(z | x) = N(a x + b, 0.8^2): sleep-phi in closed form."""
    start = {"a": 0.3, "b": 0.2, "theta": 0.5}

    def model():
        with pyro.plate("replicates", replicates, dim=-1):
            z = pyro.sample("z", dist.Normal(pyro.param("theta"), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.full((replicates,), 1.5, dtype=torch.float64))

    def guide(observations=None):
        x = torch.tensor(1.5, dtype=torch.float64) if observations is None else observations["x"]
        with pyro.plate("replicates", replicates, dim=-1):
            pyro.sample("z", dist.Normal(pyro.param("a") * x + pyro.param("b"), 0.8))

    return Problem(model, guide, {n: torch.full((replicates,), v, dtype=torch.float64) for n, v in start.items()})


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
def test_sleep_phi(vectorize):
    """E (z - a x - b) x / 0.64 and E (z - a x - b) / 0.64 with x, z dreamt: variances 1 and 2, covariance 1."""
    residual = 0.5 - 0.3 * 0.5 - 0.2
    exact = {"b": residual / 0.64, "a": ((1 + 0.25) - 0.3 * (2 + 0.25) - 0.2 * 0.5) / 0.64}
    elbo = ReweightedWakeSleep_ELBO(2, insomnia=0.0, num_sleep_particles=3, vectorize_particles=vectorize)
    _, grads = sample_gradients(elbo, dreaming(20_000), calls=4)
    for name, expected in exact.items():
        assert z_score(grads[name], expected) < 4, name
    theta = sample_gradients(IWAE_ELBO(2, "pathwise"), dreaming(20_000), calls=4)[1]["theta"]
    assert abs(float(grads["theta"].mean() - theta.mean())) < 4 * math.sqrt(float(theta.var()) * 2 / theta.numel())


def test_insomnia_mixes_the_two():
    found = {}
    for insomnia in (0.0, 0.3, 1.0):
        _, grads = sample_gradients(ReweightedWakeSleep_ELBO(3, insomnia), dreaming(40_000), calls=4)
        found[insomnia] = grads["a"]
    mean = {insomnia: float(grad.mean()) for insomnia, grad in found.items()}
    error = math.sqrt(sum(float(grad.var()) / grad.numel() for grad in found.values()))
    assert abs(mean[0.0] - mean[1.0]) > 20 * error
    assert abs(mean[0.3] - 0.3 * mean[1.0] - 0.7 * mean[0.0]) < 4 * error


def test_dreams_on_minibatches():
    """The scale N/B stands on dreams as it does on data."""
    means = {}
    for batch in (10, 2):

        def model(batch=batch):
            with pyro.plate("data", 10, batch) as rows:
                z = pyro.sample("z", dist.Normal(torch.tensor(0.5), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(10)[rows])

        def guide(observations=None, batch=batch):
            with pyro.plate("data", 10, batch) as rows:
                x = torch.ones(10)[rows] if observations is None else observations["x"]
                pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.3)) * x, 0.8))

        elbo, grads = ReweightedWakeSleep_ELBO(2, 0.0, num_sleep_particles=200), []
        for _ in range(100):
            elbo.loss_and_grads(model, guide)
            grads.append(-float(pyro.param("a").grad))
            pyro.param("a").grad = None
        means[batch] = torch.tensor(grads)
    exact = 10 * ((1 + 0.25) - 0.3 * (2 + 0.25)) / 0.64
    for batch, grads in means.items():
        assert z_score(grads, exact) < 4, batch


def test_loss_is_a_float_and_a_module():
    problem = conjugate_normal(3)
    with pyro.get_param_store().scope():
        for name, value in problem.params.items():
            pyro.param(name, value.clone())
        elbo = ReweightedWakeSleep_ELBO(3)
        assert isinstance(elbo.loss(*problem[:2]), float) and isinstance(elbo.loss_and_grads(*problem[:2]), float)
        assert elbo(*problem[:2])().requires_grad


def test_bad_particles_are_left_out():
    def model():
        with pyro.plate("replicates", 200):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.factor("f", torch.where(z > 1.5, math.inf, 0.0))

    def guide():
        with pyro.plate("replicates", 200):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))

    with pytest.raises(ValueError, match="model site 'f'"):
        ReweightedWakeSleep_ELBO(6, max_plate_nesting=1).loss_and_grads(model, guide)
    assert pyro.param("m").grad is None
    elbo = ReweightedWakeSleep_ELBO(6, nonfinite="drop", max_plate_nesting=1)
    assert math.isfinite(elbo.loss_and_grads(model, guide)) and elbo.num_dropped > 0
    assert math.isfinite(pyro.param("m").grad)


def auxiliary_guide(observations=None):
    z = pyro.sample("u", dist.Normal(torch.tensor(0.0), 1.0), infer={"is_auxiliary": True})
    pyro.sample("z", dist.Delta(z))


def z_model():
    z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


def bit_model():
    d = pyro.sample("d", dist.Bernoulli(torch.tensor(0.5)))
    pyro.sample("x", dist.Normal(d, 1.0), obs=torch.tensor(1.0))


def bit_guide():
    pyro.sample("d", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.1))))


BAD = {
    "one particle": (lambda: ReweightedWakeSleep_ELBO(1), "num_particles >= 2, got 1"),
    "insomnia": (lambda: ReweightedWakeSleep_ELBO(2, 1.5), "insomnia must lie in"),
    "wake_phi": (lambda: ReweightedWakeSleep_ELBO(2, wake_phi="stl"), "wake_phi must be"),
    "no dreams": (lambda: ReweightedWakeSleep_ELBO(2, num_sleep_particles=0), "num_sleep_particles must be"),
    "a guide that cannot dream": (
        lambda: ReweightedWakeSleep_ELBO(2, 0.5).loss_and_grads(bit_model, bit_guide), "observations=None",
    ),
    "an auxiliary site": (
        lambda: ReweightedWakeSleep_ELBO(2, 0.5).loss_and_grads(z_model, auxiliary_guide), "site 'u'.*insomnia=1",
    ),
    "a discrete site under dreg": (
        lambda: ReweightedWakeSleep_ELBO(2, wake_phi="dreg").loss_and_grads(bit_model, bit_guide),
        "'d' is a Bernoulli.*wake_phi=\"score\"",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
