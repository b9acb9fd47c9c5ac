"""What is easily got wrong with score functions, each found once: program structure, masks, state, digits."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal, AutoStructured
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_elbo_ext import IWAE_ELBO, ReweightedWakeSleep_ELBO, ScoreFunction_ELBO
from pyro_elbo_ext.bounds import IWAE
from pyro_elbo_ext.gradients import NVIL, OVIS, REBAR, RELAX, VIMCO, RunningMean
from pyro_elbo_ext.testing import (
    Problem,
    conjugate_normal,
    many_bits,
    sample_gradients,
    z_score,
)


def full(size, value):
    return torch.full((size,), value, dtype=torch.float64)


# --- structure -------------------------------------------------------------------------------------------------------


def sequential(batch):
    """A plate run row by row: its sites are named by the rows that the minibatch drew."""
    x = torch.linspace(0.0, 2.0, 6)

    def model():
        for i in pyro.plate("data", 6, subsample_size=batch):
            d = pyro.sample(f"d{i}", dist.Bernoulli(torch.tensor(0.4)))
            pyro.sample(f"x{i}", dist.Normal(d, 1.0), obs=x[i])

    def guide():
        for i in pyro.plate("data", 6, subsample_size=batch):
            pyro.sample(f"d{i}", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.3))))

    return model, guide


def gradients_of(elbo, model, guide, name, calls):
    found = []
    for _ in range(calls):
        elbo.loss_and_grads(model, guide)
        found.append(-float(pyro.param(name).grad))
        pyro.param(name).grad = None
    return torch.tensor(found)


@pytest.mark.parametrize("batch", [6, 2])
def test_sites_named_by_the_minibatch(batch):
    x, q = torch.linspace(0.0, 2.0, 6), torch.sigmoid(torch.tensor(0.3))
    kl = 0.3 - math.log(0.4 / 0.6)
    exact = float((q * (1 - q) * ((x**2 - (x - 1) ** 2) / 2 - kl)).sum())
    elbo = ScoreFunction_ELBO(2, max_plate_nesting=0)
    assert z_score(gradients_of(elbo, *sequential(batch), "l", 500), exact) < 4


def test_a_log_around_rows_run_one_by_one_is_always_refused():
    elbo = IWAE_ELBO(2, max_plate_nesting=0)
    for seed in range(30):
        pyro.set_rng_seed(seed)
        with pytest.raises(ValueError, match="'data' is subsampled"):
            elbo.loss_and_grads(*sequential(2))


def test_a_branch_on_a_value():
    """What comes after a look at a bit depends on it; TraceGraph_ELBO does not see that."""

    def model():
        a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.4)))
        mean = 2.0 if a.item() == 1 else -1.0
        pyro.sample("x", dist.Normal(torch.tensor(mean), 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("a", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.3))))

    q = torch.sigmoid(torch.tensor(0.3))
    exact = float(q * (1 - q) * (1.5 - (0.3 - math.log(0.4 / 0.6))))
    assert z_score(gradients_of(ScoreFunction_ELBO(1, "none"), model, guide, "l", 1500), exact) < 4
    assert z_score(gradients_of(TraceGraph_ELBO(), model, guide, "l", 500), exact) > 20


def test_a_program_whose_sites_change_with_its_values():
    """A geometric number of coins: K = 1, the whole cost at every coin."""

    def model(i=0):
        if pyro.sample(f"c{i}", dist.Bernoulli(torch.tensor(0.4))) == 1 and i < 2:
            model(i + 1)

    def guide(i=0):
        if pyro.sample(f"c{i}", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.3)))) == 1 and i < 2:
            guide(i + 1)

    l = torch.tensor(0.3, requires_grad=True)  # noqa: E741
    q = torch.sigmoid(l)
    kl = q * (q / 0.4).log() + (1 - q) * ((1 - q) / 0.6).log()
    (exact,) = torch.autograd.grad(-(kl * (1 + q + q**2)), l)
    assert z_score(gradients_of(ScoreFunction_ELBO(1, "none"), model, guide, "l", 1500), float(exact)) < 4
    assert z_score(gradients_of(ScoreFunction_ELBO(1, "running-mean"), model, guide, "l", 1500), float(exact)) < 4
    elbo = ScoreFunction_ELBO(6, vectorize_particles=False)
    with pytest.raises(ValueError, match="num_particles=1"):
        for _ in range(20):
            elbo.loss_and_grads(model, guide)


@pytest.mark.parametrize("how", ["argument", "mode"])
def test_a_flag_changes_what_depends_on_what(how):
    class Model(torch.nn.Module):
        def forward(self, use=True):
            used = use if how == "argument" else self.training
            with pyro.plate("replicates", 20_000):
                z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)))
                pyro.sample("x", dist.Normal(2 * z if used else torch.tensor(0.0), 1.0), obs=torch.ones(20_000))

    def guide(use=True):
        with pyro.plate("replicates", 20_000):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("l")))

    model, elbo = Model(), ScoreFunction_ELBO(2)
    problem = Problem(model, guide, {"l": full(20_000, 0.3)})
    model.eval()
    sample_gradients(elbo, problem, False)
    model.train()
    _, grads = sample_gradients(elbo, problem, True)
    q = torch.sigmoid(torch.tensor(0.3))
    exact = float(q * (1 - q) * (0.0 - (0.3 - math.log(0.4 / 0.6))))  # both means are one away from x
    assert z_score(grads["l"], exact) < 4


def test_a_delta_outside_the_plate_carries_the_action():
    """z in a plate acts on a Delta outside it, and that on all of the plate; Pyro keeps to the elements."""
    x = torch.tensor([0.5, 1.5])

    def model():
        with pyro.plate("replicates", 50_000, dim=-2):
            g = pyro.sample("g", dist.Normal(torch.tensor(0.0), 2.0))
            with pyro.plate("data", 2, dim=-1):
                z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)))
                pyro.sample("x", dist.Normal(g - z, 1.0), obs=x.expand(50_000, 2))

    def guide():
        with pyro.plate("replicates", 50_000, dim=-2):
            with pyro.plate("data", 2, dim=-1):
                z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("w").unsqueeze(-1) * torch.tensor([1.0, -0.5])))
            pyro.sample("g", dist.Delta(z.sum(-1, keepdim=True)))

    w = torch.tensor(0.4, requires_grad=True)
    value = 0.0
    for bits in itertools.product((0.0, 1.0), repeat=2):
        z = torch.tensor(bits)
        log_q = dist.Bernoulli(logits=w * torch.tensor([1.0, -0.5])).log_prob(z).sum()
        log_p = dist.Bernoulli(0.4).log_prob(z).sum() + dist.Normal(0.0, 2.0).log_prob(z.sum())
        value = value + log_q.exp() * (log_p + dist.Normal(z.sum() - z, 1.0).log_prob(x).sum() - log_q)
    (exact,) = torch.autograd.grad(value, w)
    problem = Problem(model, guide, {"w": full(50_000, 0.4)})
    for k, baseline in ((1, "none"), (2, "leave-one-out")):
        _, grads = sample_gradients(ScoreFunction_ELBO(k, baseline), problem, calls=2)
        assert z_score(grads["w"], float(exact)) < 4
    _, grads = sample_gradients(TraceGraph_ELBO(), problem, calls=2)
    assert z_score(grads["w"], float(exact)) > 20


# --- masks and scales ------------------------------------------------------------------------------------------------


def masked(unmasked_use):
    mask = torch.tensor([True, False, True])

    def model():
        with pyro.plate("data", 3):
            with poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            with poutine.mask(mask=True if unmasked_use else mask.clone()):
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(3))

    def guide():
        with pyro.plate("data", 3), poutine.mask(mask=mask.clone()):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.3)), 0.8))

    return model, guide


@pytest.mark.parametrize("make", [lambda: IWAE_ELBO(3, "dreg"), lambda: ReweightedWakeSleep_ELBO(3, wake_phi="dreg")])
def test_a_masked_guide_site_used_outside_the_mask(make):
    """Its score is masked and its effect is not, so its path weight would not be the doubly reparameterised one."""
    elbo, pair = make(), masked(True)
    elbo.loss(*pair)  # a value is right, and looking at it first must not let the gradient pass
    for _ in range(2):
        with pytest.raises(ValueError, match="guide site 'z' is masked, but model site 'x'"):
            elbo.loss_and_grads(*pair)
    assert math.isfinite(make().loss_and_grads(*masked(False)))
    assert math.isfinite(IWAE_ELBO(3, "pathwise").loss_and_grads(*masked(True)))


def test_doubly_reparameterised_wake_phi_under_a_scale():
    found = {}
    for wake_phi in ("score", "dreg"):
        problem = conjugate_normal(50_000)
        guide = poutine.scale(problem.guide, scale=0.5)

        def model():
            with pyro.plate("replicates", 50_000, dim=-1):
                with poutine.scale(scale=0.5):
                    z = pyro.sample("z", dist.Normal(full(50_000, 0.0), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=full(50_000, 1.5))

        elbo = ReweightedWakeSleep_ELBO(3, wake_phi=wake_phi)
        _, grads = sample_gradients(elbo, problem._replace(model=model, guide=guide), calls=6)
        found[wake_phi] = grads["m"]
    one, two = found.values()
    assert abs(float(one.mean() - two.mean())) < 4 * math.sqrt(float(one.var() + two.var()) / one.numel())
    assert float(two.std()) < float(one.std())


# --- wake-sleep ------------------------------------------------------------------------------------------------------


def test_wake_sleep_refuses_a_non_centred_guide():
    problem = conjugate_normal(100)

    def guide():
        with pyro.plate("replicates", 100, dim=-1):
            u = pyro.sample("u", dist.Normal(full(100, 0.0), 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(pyro.param("m") + pyro.param("s") * u))

    for wake_phi in ("score", "dreg"):
        elbo = ReweightedWakeSleep_ELBO(3, wake_phi=wake_phi)
        with pyro.get_param_store().scope():
            for name, value in problem.params.items():
                pyro.param(name, value.clone())
            elbo.loss(problem.model, guide)
        for _ in range(2):
            with pytest.raises(ValueError, match="guide site 'z' is computed from a random value by parameters"):
                sample_gradients(elbo, problem._replace(guide=guide))
    with pytest.raises(ValueError, match="is computed from a random value"):
        ReweightedWakeSleep_ELBO(3).loss_and_grads(problem.model, AutoStructured(problem.model))
    assert math.isfinite(ReweightedWakeSleep_ELBO(3).loss_and_grads(problem.model, AutoNormal(problem.model)))


def test_wake_sleep_refuses_to_dream_a_factor():
    def model():
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.factor("f", -(z**2))

    def guide(observations=None):
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))

    with pytest.raises(ValueError, match="model site 'f' is a pyro.factor"):
        ReweightedWakeSleep_ELBO(2, 0.5).loss_and_grads(model, guide)


# --- state -----------------------------------------------------------------------------------------------------------

STATEFUL = {
    "running-mean": lambda: ScoreFunction_ELBO(2, RunningMean()),
    "by element": lambda: ScoreFunction_ELBO(2, RunningMean(plates=("data",))),
    "nvil": lambda: ScoreFunction_ELBO(2, NVIL()),
    "pyro": lambda: ScoreFunction_ELBO(2, "none"),
    "double-cv": lambda: ScoreFunction_ELBO(2, gradient="double-cv"),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_refused_step_leaves_no_poison(name):
    infer = {"baseline": {"use_decaying_avg_baseline": True}} if name == "pyro" else {}

    def model(bad=False):
        with pyro.plate("data", 3):
            d = pyro.sample("d", dist.Bernoulli(torch.tensor(0.5)))
            pyro.factor("f", d + torch.where((d == 1) & bad, math.inf, 0.0))

    def guide(bad=False):
        with pyro.plate("data", 3):
            pyro.sample("d", dist.Bernoulli(logits=pyro.param("l", torch.tensor(3.0)).expand(3)), infer=infer)

    elbo = STATEFUL[name]()
    elbo.loss_and_grads(model, guide)
    with pytest.raises(ValueError, match="Nothing was updated"):
        elbo.loss_and_grads(model, guide, True)
    for _ in range(3):
        elbo.loss_and_grads(model, guide)
    assert math.isfinite(pyro.param("l").grad)


def test_a_table_of_another_model_is_refused():
    elbo = ScoreFunction_ELBO(2, RunningMean(plates=("data",)))
    sample_gradients(elbo, many_bits(2, 12)[0], 4)
    with pytest.raises(ValueError, match="remembers 'd.sum' with shape .12,., but it now has .6,."):
        sample_gradients(elbo, many_bits(2, 6)[0], 4)


def test_two_control_variates_of_one_name_are_one():
    """Both move: they share the parameters that the param store holds."""

    def model():
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)))
        pyro.sample("x", dist.Normal(3 * z, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.1))))

    gradients = [REBAR(), REBAR()]
    for gradient in gradients:
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), ScoreFunction_ELBO(1, gradient=gradient))
        for _ in range(5):
            svi.step()
        assert float(gradient.log_temperature["z"].detach()) != pytest.approx(math.log(0.5))
    assert gradients[0].log_temperature["z"] is not None
    with pytest.raises(ValueError, match="surrogate must be a function"):
        RELAX(0.6)


@pytest.mark.parametrize("batch", [6, 2])
def test_pyros_network_is_trained_as_in_pyro(batch):
    net = torch.nn.Linear(1, 1)
    inputs = torch.ones(batch, 1)

    def model(batch):
        with pyro.plate("data", 6, batch):
            d = pyro.sample("d", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(2 * d, 1.0), obs=torch.ones(batch))

    def guide(batch):
        pyro.module("net", net)
        infer = {"baseline": {"nn_baseline": lambda v: net(v).squeeze(-1), "nn_baseline_input": inputs}}
        with pyro.plate("data", 6, batch):
            pyro.sample("d", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2)).expand(batch)), infer=infer)

    found = []
    for elbo in (ScoreFunction_ELBO(1, "none", max_plate_nesting=1), TraceGraph_ELBO(max_plate_nesting=1)):
        guide(batch)
        pyro.set_rng_seed(2)
        elbo.loss_and_grads(model, guide, batch)
        found.append([p.grad.clone() for _, p in sorted(pyro.get_param_store().named_parameters())])
        for _, p in pyro.get_param_store().named_parameters():
            p.grad = None
    assert len(found[0]) == 3
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


# --- digits and graphs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", [VIMCO(), VIMCO("arithmetic"), OVIS()], ids=repr)
def test_signals_keep_their_digits_in_float32(signal):
    """Far below zero, as log-densities of images are: what is left of S - v is of the order 1e-4."""
    log_w = 0.1 * torch.randn(64, 5, dtype=torch.float64) - 1e4
    narrow = log_w.to(torch.float32)
    exact = signal(IWAE(), narrow.to(torch.float64)) - IWAE().path_weights(narrow.to(torch.float64))
    found = signal(IWAE(), narrow) - IWAE().path_weights(narrow)
    assert float((found - exact).square().mean().sqrt()) < 0.02 * float(exact.square().mean().sqrt())


@pytest.mark.parametrize("gradient", ["vimco", "ovis", "score"])
def test_a_step_is_one_graph(gradient):
    problem, _ = many_bits(1)
    elbo = IWAE_ELBO(3, gradient)
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        for name, value in problem.params.items():
            pyro.param(name, value.clone())
        pyro.set_rng_seed(1)
        expected = elbo.loss(problem.model, problem.guide, 4)
        graph = make_fx(lambda _: elbo.differentiable_loss(problem.model, problem.guide, 4))(torch.zeros(()))
        pyro.set_rng_seed(1)
        assert graph(torch.zeros(())).item() == pytest.approx(expected)


def test_one_particle_equals_trace_elbo_whatever_the_program():
    """The value too, and draw by draw, for a program that branches."""

    def model():
        a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.4)))
        if a == 1:
            pyro.sample("b", dist.Normal(torch.tensor(0.0), 1.0))

    def guide():
        a = pyro.sample("a", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.3))))
        if a == 1:
            pyro.sample("b", dist.Normal(pyro.param("m", torch.tensor(0.2)), 1.0))

    for seed in range(8):
        values = []
        for elbo in (ScoreFunction_ELBO(1, "none"), Trace_ELBO()):
            pyro.set_rng_seed(seed)
            values.append(elbo.loss(model, guide))
        assert values[0] == pytest.approx(values[1])
