"""Score-function signals of any bound: exact gradients by enumeration and quadrature, identities, zero weights."""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO

from pyro_elbo_ext import IWAE_ELBO, PIWAE_ELBO, VRIWAE_ELBO
from pyro_elbo_ext.bounds import CIWAE, ELBO, IWAE, MIWAE, VRIWAE, FunctionBound
from pyro_elbo_ext.gradients import OVIS, VIMCO, DoublyReparameterized, Reinforce
from pyro_elbo_ext.testing import (
    BELIEF_STATES,
    TOY_STATES,
    Problem,
    belief_network,
    bernoulli_toy,
    conjugate_normal,
    enumerated_gradient,
    equal_rows,
    many_bits,
    sample_gradients,
    spread_slope,
    z_score,
)
from tests.cases import ELBOS

SIGNALS = {
    "score": Reinforce(),
    "vimco": VIMCO(),
    "vimco-arithmetic": VIMCO("arithmetic"),
    "ovis": OVIS(),
}


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("signal", SIGNALS)
def test_bernoulli_toy(signal, k):
    """C10: Pyro's RenyiELBO returns zero here, NumPyro's the wrong sign."""
    exact = enumerated_gradient(partial(bernoulli_toy, logit=0.3), TOY_STATES, IWAE(), k)[1]["logit"]
    assert -exact == pytest.approx({2: -0.2230, 5: -0.0710}[k], abs=5e-5)
    _, grads = sample_gradients(IWAE_ELBO(k, SIGNALS[signal]), bernoulli_toy(100_000, 0.3), calls=4, seed=k)
    assert z_score(grads["logit"], exact) < 4


def test_pyro_gives_the_toy_nothing():
    _, grads = sample_gradients(RenyiELBO(0, 5, vectorize_particles=True), bernoulli_toy(100))
    assert (grads["logit"] == 0).all()


@pytest.mark.parametrize("gradient", ["score", "vimco", "ovis", "auto"])
def test_belief_network(gradient):
    """Three bits in two layers of the guide, and a parameter of the model, by summing over all states."""
    value, exact = enumerated_gradient(belief_network, BELIEF_STATES, IWAE(), 3)
    values, grads = sample_gradients(IWAE_ELBO(3, gradient), belief_network(8_000), calls=25, seed=1)
    assert z_score(values, value) < 4
    for name, expected in exact.items():
        assert abs(expected) > 1e-3
        assert z_score(grads[name], expected) < 4, name


@pytest.mark.parametrize("name", ["vr-iwae", "miwae", "ciwae", "own-bound"])
def test_every_bound_has_a_score_gradient(name):
    """A bound of one's own as well, by derived weights."""
    bound = {"vr-iwae": VRIWAE(0.5), "miwae": MIWAE(2), "ciwae": CIWAE(0.3)}.get(name)
    elbo = ELBOS[name](num_particles=4, gradient="vimco")
    _, exact = enumerated_gradient(bernoulli_toy, TOY_STATES, bound or FunctionBound(elbo.bound), 4)
    _, grads = sample_gradients(elbo, bernoulli_toy(100_000), calls=2)
    assert z_score(grads["logit"], exact["logit"]) < 4


def test_piwae_scores_by_the_guides_bound():
    exact = {bound: enumerated_gradient(belief_network, BELIEF_STATES, b, 4)[1] for bound, b in BOUNDS.items()}
    _, grads = sample_gradients(PIWAE_ELBO(4, num_groups=2), belief_network(40_000), calls=4)
    for name in exact["iwae"]:
        assert z_score(grads[name], exact["iwae" if name == "theta" else "miwae"][name]) < 4, name


BOUNDS = {"iwae": IWAE(), "miwae": MIWAE(2)}


def mixed_problem(order, replicates):
    """Continuous c and bit d, each the other's parent in the guide in turn."""
    start = {"m": 0.2, "log_s": -0.3, "a": 0.7, "b": -0.4}
    observed = torch.full((replicates,), 0.9, dtype=torch.float64)

    def model():
        with pyro.plate("replicates", replicates, dim=-1):
            c = pyro.sample("c", dist.Normal(torch.zeros_like(observed), 1.0))
            d = pyro.sample("d", dist.Bernoulli(logits=0.8 * c))
            pyro.sample("x", dist.Normal(c + 1.5 * d, 0.8), obs=observed)

    def guide():
        p = {name: pyro.param(name) for name in start}
        with pyro.plate("replicates", replicates, dim=-1):
            if order == "c first":
                c = pyro.sample("c", dist.Normal(p["m"], p["log_s"].exp()))
                pyro.sample("d", dist.Bernoulli(logits=p["a"] * c + p["b"]))
            else:
                d = pyro.sample("d", dist.Bernoulli(logits=p["b"]))
                pyro.sample("c", dist.Normal(p["m"] + p["a"] * d, p["log_s"].exp()))

    return Problem(model, guide, {n: torch.full((replicates,), v, dtype=torch.float64) for n, v in start.items()})


def mixed_exact(order, bound, k):
    """Gauss-Hermite in c, enumeration in d, product over particles."""
    x, w = (torch.tensor(t, dtype=torch.float64) for t in np.polynomial.hermite_e.hermegauss(24))
    p = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in {"m": 0.2, "log_s": -0.3, "a": 0.7, "b": -0.4}.items()
    }
    node, d = (t.flatten() for t in torch.meshgrid(x, torch.tensor([0.0, 1.0], dtype=torch.float64), indexing="ij"))
    weight = (w / w.sum()).repeat_interleave(2)
    if order == "c first":
        c = p["m"] + p["log_s"].exp() * node
        q_c, q_d = dist.Normal(p["m"], p["log_s"].exp()), dist.Bernoulli(logits=p["a"] * c + p["b"])
    else:
        q_d = dist.Bernoulli(logits=p["b"])
        c = p["m"] + p["a"] * d + p["log_s"].exp() * node
        q_c = dist.Normal(p["m"] + p["a"] * d, p["log_s"].exp())
    log_p = dist.Normal(0.0, 1.0).log_prob(c) + dist.Bernoulli(logits=0.8 * c).log_prob(d)
    log_w = log_p + dist.Normal(c + 1.5 * d, 0.8).log_prob(torch.tensor(0.9)) - q_c.log_prob(c) - q_d.log_prob(d)
    mass = weight * q_d.log_prob(d).exp()
    states = torch.cartesian_prod(*[torch.arange(len(d))] * k).T
    value = (mass[states].prod(0) * bound(log_w[states])).sum()
    grads = torch.autograd.grad(value, list(p.values()))
    return value.item(), {name: grad.item() for name, grad in zip(p, grads, strict=True)}


@pytest.mark.parametrize("signal", ["vimco", "ovis"])
@pytest.mark.parametrize("path", ["pathwise", "dreg"])
@pytest.mark.parametrize("order", ["c first", "d first"])
def test_mixed_guide(order, path, signal):
    value, exact = mixed_exact(order, IWAE(), 2)
    values, grads = sample_gradients(IWAE_ELBO(2, f"{path}+{signal}"), mixed_problem(order, 16_000), calls=25, seed=3)
    assert z_score(values, value) < 4
    for name, expected in exact.items():
        assert z_score(grads[name], expected) < 4, name


@pytest.mark.parametrize("path", ["pathwise", "dreg"])
def test_the_mixed_test_fails_for_detached_parents(path):
    exact = mixed_exact("c first", IWAE(), 2)[1]["m"]
    found = []
    for attach in (True, False):
        torch.manual_seed(0)
        m, log_s, a, b = (
            torch.full((400_000,), v, dtype=torch.float64, requires_grad=True) for v in (0.2, -0.3, 0.7, -0.4)
        )
        c = m + log_s.exp() * torch.randn(2, len(m), dtype=torch.float64)
        d = dist.Bernoulli(logits=a * c + b).sample()
        copy = c.detach().requires_grad_()

        def log_weight(c, m, d=d, log_s=log_s, a=a, b=b):
            log_p = dist.Normal(0.0, 1.0).log_prob(c) + dist.Bernoulli(logits=0.8 * c).log_prob(d)
            log_p = log_p + dist.Normal(c + 1.5 * d, 0.8).log_prob(torch.tensor(0.9))
            return log_p - dist.Normal(m, log_s.exp()).log_prob(c) - dist.Bernoulli(logits=a * c + b).log_prob(d)

        log_w = log_weight(copy, m.detach())
        v, s = torch.softmax(log_w.detach(), 0), VIMCO()(IWAE(), log_w.detach())
        (slope,) = torch.autograd.grad((v.square() * log_w).sum(), copy)
        score = dist.Bernoulli(logits=a * (c if attach else c.detach()) + b).log_prob(d)
        if path == "dreg":
            surrogate = (slope * c).sum() + ((s - v) * score).sum()
        else:
            surrogate = (v * log_weight(c, m)).sum() + (s * score).sum()
        found.append(torch.autograd.grad(surrogate, m)[0])
    assert z_score(found[0], exact) < 4
    assert z_score(found[1], exact) > 10


def test_mixed_guide_under_the_elbo():
    """A linear bound: sticking-the-landing is allowed, and the score's own share is left out."""
    _, exact = mixed_exact("c first", ELBO(), 2)
    for path in ("pathwise", "dreg", "stl"):
        elbo = VRIWAE_ELBO(1.0, 2, gradient=f"{path}+vimco")
        _, grads = sample_gradients(elbo, mixed_problem("c first", 50_000), calls=4, seed=3)
        for name, expected in exact.items():
            assert z_score(grads[name], expected) < 4, (path, name)


def test_sticking_the_landing_has_no_rule_for_mixed_guides():
    elbo, problem = IWAE_ELBO(3, "stl+vimco"), mixed_problem("c first", 4)
    with pytest.raises(ValueError, match='no proven rule.*"dreg\\+vimco"'):
        sample_gradients(elbo, problem)


@pytest.mark.parametrize("gradient", ["vimco", "ovis", "score"])
def test_minibatches(gradient):
    """C8: value and gradient of the full batch in the mean, whatever the minibatch."""
    problem, evidence = many_bits(400)
    found = {}
    for batch in (12, 3, 1):
        values, grads = sample_gradients(IWAE_ELBO(3, gradient), problem, batch, calls=100, seed=batch)
        found[batch] = values, {name: grad.reshape(100, -1).mean(1) for name, grad in grads.items()}
    assert float(found[12][0].mean()) < evidence  # a minibatch's value scatters by nats: held below, by its error
    for batch in (3, 1):
        assert two_sample_z(found[batch][0], found[12][0]) < 4
        for name in problem.params:
            assert two_sample_z(found[batch][1][name], found[12][1][name]) < 4, (batch, name)


def two_sample_z(one, two):
    return abs(float(one.mean() - two.mean())) / math.sqrt(float(one.var() / len(one) + two.var() / len(two)))


@pytest.mark.parametrize("gradient", ["vimco", "ovis"])
def test_one_weight_per_datum(gradient):
    """C9: a plate of 100 equal rows has 100 times the gradient of one row, and 10 times its spread."""
    spread = []
    for size in (1, 100):
        _, grads = sample_gradients(IWAE_ELBO(4, gradient), equal_rows(4000, size), calls=4)
        per_datum = grads["logit"].flatten() / size
        assert z_score(per_datum, enumerated_gradient(bernoulli_toy, TOY_STATES, IWAE(), 4)[1]["logit"]) < 4
        spread.append(float(per_datum.std()))
    assert spread[0] / spread[1] == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("signal, mean", [("vimco", "iwae"), ("ovis", "iwae"), ("score", "iwae"), ("ovis-1", "both")])
def test_golden_gradients_without_a_path(signal, mean):
    """C2: E[VIMCO] = E[OVIS, gamma = 0] = E[REINFORCE] = E[IWAE], and E[OVIS, gamma = 1] = E[IWAE] + E[wake-sleep]."""
    gradient = OVIS(1.0) if signal == "ovis-1" else signal
    expected = {"iwae": 0.299964, "both": 0.793814}[mean]
    _, grads = sample_gradients(IWAE_ELBO(3, gradient), conjugate_normal(50_000, scored=True), calls=20, seed=2)
    assert z_score(grads["m"], expected, 1e-6) < 4


def test_spread_of_each_signal():
    """Per-draw standard deviations at K = 3, published with the golden values."""
    for gradient, expected in {VIMCO("arithmetic"): 0.81, VIMCO(): 0.71, OVIS(): 0.41, Reinforce(): 4.71}.items():
        _, grads = sample_gradients(IWAE_ELBO(3, gradient), conjugate_normal(50_000, scored=True), calls=4, seed=2)
        assert float(grads["m"].std()) == pytest.approx(expected, rel=0.03), gradient


def test_at_the_posterior_only_the_known_remainder_is_left():
    """C4: all weights are equal, so a gradient is a known multiple of the sum of scores, draw by draw."""
    k, posterior = 4, conjugate_normal(1000, 0.75, math.sqrt(0.5), scored=True)
    found = {}
    for name, gradient in {"vimco": VIMCO(), "arith": VIMCO("arithmetic"), "ovis": OVIS(), "ovis1": OVIS(1)}.items():
        found[name] = sample_gradients(IWAE_ELBO(k, gradient), posterior, seed=6)[1]["m"]
    torch.testing.assert_close(found["vimco"], found["arith"])
    share = (-1 / k - math.log(1 - 1 / k)) / (-1 / k)
    torch.testing.assert_close(found["ovis"], share * found["vimco"])
    assert float(found["ovis1"].abs().max()) < 1e-9
    rloo = sample_gradients(VRIWAE_ELBO(1.0, k, gradient="vimco"), posterior, seed=6)[1]["m"]
    assert float(rloo.abs().max()) < 1e-9
    assert float(found["vimco"].std()) > 0.1


def test_slope_of_the_spread():
    """C3: the spread falls as K^-1/2 under VIMCO, as K^-3/2 under OVIS near the posterior."""
    assert -1.8 < spread_slope(partial(IWAE_ELBO, gradient="ovis"), scored=True) < -1.3
    assert -0.65 < spread_slope(partial(IWAE_ELBO, gradient="vimco"), scored=True) < -0.4


def impossible_problem(replicates):
    """The model gives one state no mass at all, so that some particles have weight zero."""
    start = {"logit": 0.4}

    def model():
        with pyro.plate("replicates", replicates, dim=-1):
            d = pyro.sample("d", dist.Bernoulli(torch.full((replicates,), 0.5)))
            pyro.factor("f", torch.where(d == 1, -math.inf, 0.3))

    def guide():
        with pyro.plate("replicates", replicates, dim=-1):
            pyro.sample("d", dist.Bernoulli(logits=pyro.param("logit")))

    return Problem(model, guide, {n: torch.full((replicates,), v, dtype=torch.float64) for n, v in start.items()})


def test_a_weight_of_zero_still_moves_the_guide():
    """A particle in an impossible state counts; only where all are is there no bound: such replicates are left out."""
    p = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    q = torch.sigmoid(p)
    w0 = 0.5 * math.exp(0.3) / (1 - q)
    value = sum(
        math.comb(3, n) * q**n * (1 - q) ** (3 - n) * torch.log((3 - n) * w0 / 3) for n in range(3)
    )  # n particles in the impossible state; with all three the summand is left out
    (exact,) = torch.autograd.grad(value, p)
    torch.manual_seed(1)
    logit = torch.full((400_000,), 0.4, dtype=torch.float64, requires_grad=True)
    d = dist.Bernoulli(logits=logit).sample((3,))
    keep = d.sum(0) < 3
    log_q = dist.Bernoulli(logits=logit).log_prob(d)
    log_w = torch.where(d == 1, -math.inf, math.log(0.5) + 0.3 - log_q.detach())
    v = IWAE().path_weights(log_w)
    for signal in SIGNALS.values():
        assert signal(IWAE(), log_w)[:, keep].isfinite().all()
    coefficient = torch.where(keep, Reinforce()(IWAE(), log_w) - v, 0.0)
    (grad,) = torch.autograd.grad((coefficient * log_q).sum(), logit, retain_graph=True)
    assert z_score(grad, exact.item()) < 4
    (grad,) = torch.autograd.grad(
        (torch.where(d == 1, 0.0, coefficient) * torch.where(d == 1, 0.0, log_q)).sum(), logit
    )
    assert z_score(grad, exact.item()) > 10  # what leaving them out would give


def test_zero_weights_through_the_loss():
    """The mean over draws with a possible particle is that of (S - v) h over those states, the impossible ones too."""
    signal = VIMCO("arithmetic")
    problem, elbo = impossible_problem(1), IWAE_ELBO(3, signal, max_plate_nesting=1)
    logit = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    d = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)[:-1].T  # all but (1, 1, 1)
    log_q = dist.Bernoulli(logits=logit).log_prob(d)
    log_w = torch.where(d == 1, -math.inf, math.log(0.5) + 0.3 - log_q.detach())
    coefficient = signal(IWAE(), log_w) - IWAE().path_weights(log_w)
    mass = log_q.sum(0).exp().detach()
    (exact,) = torch.autograd.grad((mass / mass.sum() * coefficient * log_q).sum(), logit)
    found = []
    with pyro.get_param_store().scope():
        pyro.param("logit", problem.params["logit"].clone())
        for seed in range(1500):
            torch.manual_seed(seed)
            try:
                elbo.loss_and_grads(problem.model, problem.guide)
            except ValueError as error:
                assert "of every particle" in str(error)
                continue
            found.append(-float(pyro.param("logit").grad))
            pyro.param("logit").grad = None
    assert len(found) > 1000
    assert z_score(torch.tensor(found), float(exact)) < 4


def test_looped_particles_have_the_same_gradient():
    for gradient in ("vimco", "dreg+ovis"):
        found = []
        for vectorize in (True, False):
            elbo = IWAE_ELBO(3, gradient, vectorize_particles=vectorize)
            _, grads = sample_gradients(elbo, mixed_problem("c first", 20_000), calls=3)
            found.append(grads)
        for name in found[0]:
            assert two_sample_z(found[0][name], found[1][name]) < 4


def test_masked_and_annealed_sites():
    """Under a scale on prior and guide the coefficient is S - b v; a masked element keeps its score."""

    def problem(replicates):
        mask = torch.tensor([True, False])

        def model():
            with pyro.plate("replicates", replicates, dim=-2), pyro.plate("pair", 2, dim=-1):
                with pyro.poutine.scale(scale=0.6), pyro.poutine.mask(mask=mask):
                    d = pyro.sample("d", dist.Bernoulli(torch.tensor(0.3)))
                pyro.sample("x", dist.Normal(d, 1.0), obs=torch.ones(replicates, 2))

        def guide():
            with pyro.plate("replicates", replicates, dim=-2), pyro.plate("pair", 2, dim=-1):
                logits = pyro.param("logit").unsqueeze(-1)
                with pyro.poutine.scale(scale=0.6), pyro.poutine.mask(mask=mask):
                    pyro.sample("d", dist.Bernoulli(logits=logits))

        return Problem(model, guide, {"logit": torch.full((replicates,), 0.3, dtype=torch.float64)})

    logit = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    q, log_q = torch.sigmoid(logit), torch.stack([torch.sigmoid(-logit), torch.sigmoid(logit)]).log()
    log_p = torch.stack([torch.tensor(0.7), torch.tensor(0.3)]).log()
    log_x = dist.Normal(torch.tensor([0.0, 1.0]), 1.0).log_prob(torch.tensor(1.0))
    exact = 0
    for log_w in (0.6 * (log_p - log_q) + log_x, log_x):
        for i in (0, 1):
            for j in (0, 1):
                mass = (q if i else 1 - q) * (q if j else 1 - q)
                exact = exact + mass * (torch.logaddexp(log_w[i], log_w[j]) - math.log(2))
    (exact,) = torch.autograd.grad(exact, logit)
    for gradient in ("vimco", (DoublyReparameterized(), VIMCO())):
        _, grads = sample_gradients(IWAE_ELBO(2, gradient), problem(50_000), calls=4)
        assert z_score(grads["logit"], exact.item()) < 4, gradient


def test_the_choice_is_named_by_what_is_used():
    for problem, expected in ((bernoulli_toy(2), "vimco"), (mixed_problem("c first", 2), "dreg+vimco")):
        with pyro.get_param_store().scope():
            for name, value in problem.params.items():
                pyro.param(name, value.clone())
            assert IWAE_ELBO(4).explain(problem.model, problem.guide).gradient == expected
