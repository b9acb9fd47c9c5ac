"""AutoFlow and AutoPlatedFlow: exact densities, non-centring, exact posteriors, minibatches and particles."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch.distributions import biject_to, constraints

from pyro_elbo_ext import IWAE_ELBO, VRIWAE_ELBO, AutoFlow, AutoPlatedFlow
from pyro_elbo_ext.guides.noncentering import LocationScale, center, location_scale, whiten
from tests.cases import NUM_DATA, global_log_evidence, global_model, local_model, log_evidence, nested_model
from tests.guides.cases import GUIDES, Y, levels, log_weight, perturb, rows, schools


@pytest.mark.parametrize("model", [schools, levels, nested_model], ids=lambda model: model.__name__)
@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_the_density_is_that_of_the_whole_map_from_noise(make, model):
    """log q(z) by change of variables through the Jacobian of the guide as a function of its noise."""
    guide = make(model)
    guide.build()
    perturb(guide)
    blocks = [block.key for block in guide._blocks]
    trace = poutine.trace(guide).get_trace()
    noise = {key: trace.nodes[f"_{guide._pyro_name}_{key}"]["fn"]._drawn.noise for key in blocks}
    sites = [slot.latent for block in guide._blocks for slot in block.slots]

    def run(flat):
        parts = dict(zip(blocks, flat.split([value.numel() for value in noise.values()]), strict=True))

        def rsample(key):
            return lambda shape, context=None: parts[key].reshape(noise[key].shape)

        for key in blocks:
            guide.flows[f"block_{key}"].base.rsample = rsample(key)
        found = poutine.trace(guide).get_trace()
        values = [biject_to(_free(site)).inv(found.nodes[site.name]["value"]) for site in sites]
        return torch.cat([value.reshape(-1) for value in values]), found

    flat = torch.cat([value.reshape(-1) for value in noise.values()]).detach()
    jacobian = torch.autograd.functional.jacobian(lambda e: run(e)[0], flat)
    found = run(flat)[1]
    base = dist.Normal(torch.zeros_like(flat), 1.0).log_prob(flat).sum()
    to_constrained = 0.0
    for site in sites:
        z = found.nodes[site.name]["value"]
        bijection = biject_to(_free(site))
        to_constrained = to_constrained + bijection.inv.log_abs_det_jacobian(z, bijection.inv(z)).sum()
    expected = base - torch.linalg.slogdet(jacobian).logabsdet + to_constrained
    assert torch.allclose(found.log_prob_sum(), expected)


def _free(site):
    return constraints.positive if type(site.transform).__name__ == "ExpTransform" else constraints.real


SUPPORTS = {
    "positive": (dist.Gamma(2.0, 1.0), torch.linspace(1e-9, 60.0, 200_001)),
    "interval": (dist.Uniform(-1.0, 2.0), torch.linspace(-1 + 1e-7, 2 - 1e-7, 200_001)),
    "unit": (dist.Beta(2.0, 3.0), torch.linspace(1e-7, 1 - 1e-7, 200_001)),
    "real": (dist.Cauchy(0.0, 1.0), torch.linspace(-60.0, 60.0, 200_001)),
}


@pytest.mark.parametrize("support", SUPPORTS)
def test_a_constrained_density_integrates_to_one(support):
    fn, grid = SUPPORTS[support]
    guide = AutoFlow(lambda: pyro.sample("z", fn))
    guide.build()
    perturb(guide, 0.1)
    bijection = biject_to(fn.support)
    u = bijection.inv(grid)
    with torch.no_grad():
        log_q = guide.get_posterior().log_prob(u.unsqueeze(-1)) - bijection.log_abs_det_jacobian(u, grid)
    assert abs(float(torch.trapezoid(log_q.exp(), grid)) - 1) < 1e-5
    # and the guide's own trace says the same
    trace = poutine.trace(guide).get_trace()
    z = trace.nodes["z"]["value"]
    own = guide.get_posterior().log_prob(bijection.inv(z).reshape(1)) - bijection.log_abs_det_jacobian(
        bijection.inv(z), z
    )
    assert torch.allclose(trace.log_prob_sum(), own)


@pytest.mark.parametrize(
    "fn",
    [
        dist.Dirichlet(torch.ones(3)),
        dist.LKJCholesky(3, torch.tensor(1.0)),
        dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.transforms.OrderedTransform()),
        dist.Uniform(torch.zeros(2), 1.0).to_event(1),
        dist.Gamma(torch.ones(2), 1.0).to_event(1),
    ],
    ids=["simplex", "cholesky", "ordered", "vector", "positive"],
)
def test_draws_lie_in_the_support_and_weigh_their_jacobian(fn):
    guide = AutoFlow(lambda: pyro.sample("z", fn))
    guide.build()
    perturb(guide)
    for _ in range(20):
        weight, trace = log_weight(lambda: pyro.sample("z", fn), guide)
        z, u = trace.nodes["z"]["value"], trace.nodes[f"_{guide._pyro_name}_latent"]["value"]
        assert fn.support.check(z).all() and torch.isfinite(weight)
        found, expected = trace.nodes["z"]["fn"].log_prob(z), -biject_to(fn.support).log_abs_det_jacobian(u, z)
        assert found.shape == expected.shape and torch.allclose(found, expected)


# Non-centring


FAMILIES = {
    "normal": lambda a, b: dist.Normal(a, b),
    "student": lambda a, b: dist.StudentT(5.0, a, b),
    "laplace": lambda a, b: dist.Laplace(a, b),
    "cauchy": lambda a, b: dist.Cauchy(a, b),
    "logistic": lambda a, b: dist.Logistic(a, b),
    "gumbel": lambda a, b: dist.Gumbel(a, b),
    "log-normal": lambda a, b: dist.LogNormal(a, b),
    "half-normal": lambda a, b: dist.HalfNormal(b),
    "half-cauchy": lambda a, b: dist.HalfCauchy(b),
    "exponential": lambda a, b: dist.Exponential(1 / b),
    "gamma": lambda a, b: dist.Gamma(3.0, 1 / b),
    "inverse-gamma": lambda a, b: dist.InverseGamma(3.0, b),
    "weibull": lambda a, b: dist.Weibull(b, 1.5),
    "event": lambda a, b: dist.Normal(a, b).expand([2]).to_event(1).mask(True),
    "multivariate": lambda a, b: dist.MultivariateNormal(
        a.expand(2), scale_tril=b * torch.tensor([[1.0, 0.0], [0.7, 2.0]])
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_of_a_prior_depends_on_nothing(family):
    """The noise of a family, whitened by its location and scale, has one density whatever these are."""
    found = []
    for a, b in ((0.0, 1.0), (1.5, 0.2), (-2.0, 7.0)):
        fn = FAMILIES[family](torch.tensor(a), torch.tensor(b))
        w = torch.tensor([0.3, -0.8]) if fn.event_shape else torch.tensor(0.3)
        u, ladj = center(w, torch.tensor(0.0), location_scale(fn))
        bijection = biject_to(fn.support)
        z = bijection(u)
        jacobian = bijection.log_abs_det_jacobian(u, z)
        found.append(fn.log_prob(z) + jacobian.sum() + ladj.expand(u.shape).sum())
    assert torch.allclose(torch.stack(found), found[0])


@pytest.mark.parametrize("c", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("matrix", [False, True])
def test_center_and_whiten_are_inverse_and_know_their_jacobian(c, matrix):
    c, loc, w = torch.tensor(c), torch.randn(3), torch.randn(3)
    scale = torch.randn(3, 3).tril(-1) + torch.rand(3).diag() + torch.eye(3) if matrix else torch.rand(3) + 0.1
    prior = LocationScale(loc, scale, matrix)
    u, ladj = center(w, c, prior)
    assert torch.allclose(whiten(u, c, prior), w)
    jacobian = torch.autograd.functional.jacobian(lambda w: center(w, c, prior)[0], w)
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, ladj.sum())
    if float(c) == 1.0:
        assert torch.allclose(u, w)


def test_sites_are_non_centred_where_their_prior_depends_on_latent_sites():
    guide = AutoPlatedFlow(levels)
    guide.build()
    assert set(guide.centering_weights) == {"group", "member", "noise"}
    assert all(abs(weight - 0.018) < 1e-3 for weight in guide.centering_weights.values())
    guide = AutoPlatedFlow(levels, noncenter=False)
    guide.build()
    assert guide.centering_weights == {}


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_a_particle_that_fails_below_does_not_reach_the_centring_weights(make):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            return torch.where(ctx.saved_tensors[0] > 1.0, math.nan, slope)

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(mu, mu.exp()))
            pyro.sample("y", dist.Normal(Fails.apply(z), 1.0), obs=Y[:3].to(z))

    guide = make(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(8, vectorize_particles=True, max_plate_nesting=1))
    for _ in range(10):
        svi.step()
    assert guide.num_dropped > 0
    assert all(torch.isfinite(parameter).all() for parameter in guide.parameters())
    assert float(guide.centering.detach().abs()) > 0


@pytest.mark.convergence
@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_a_prior_is_fitted_exactly(make):
    """The funnel of a hierarchy without data: non-centred, a Gaussian is exact; centred it is 1 nat away.

    A network of one hidden layer, whose steps move it further, takes 1000 of them to settle where two took 500.
    """

    def model():
        v = pyro.sample("v", dist.Normal(torch.tensor(0.0), 1.5))
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

    pyro.set_rng_seed(1)
    guide = make(model, init_scale=0.2)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.01 ** (1 / 1000)}), VRIWAE_ELBO(1.0, 16))
    before = svi.evaluate_loss()
    for _ in range(1000):
        svi.step()
    losses = torch.tensor([VRIWAE_ELBO(1.0, 100).loss(model, guide) for _ in range(40)])
    assert float(losses.mean()) < 2e-3 + 3 * float(losses.std()) / 40**0.5 < 0.1 < before


# Exactness


@pytest.mark.convergence
def test_a_gaussian_posterior_is_found_exactly():
    pyro.set_rng_seed(0)
    guide = AutoFlow(global_model, affine="tril", noncenter=False)
    optim = pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.005 ** (1 / 600)})
    svi = SVI(global_model, guide, optim, VRIWAE_ELBO(1.0, 16, gradient="stl"))
    for _ in range(600):
        svi.step()
    losses = torch.tensor([VRIWAE_ELBO(1.0, 64).loss(global_model, guide) for _ in range(40)])
    gap = global_log_evidence() + losses.mean()
    assert -4 * float(losses.std()) / 40**0.5 < float(gap) < 1e-3 + 4 * float(losses.std()) / 40**0.5


@pytest.mark.parametrize(
    "make",
    [pytest.param(lambda: AutoPlatedFlow(global_model), marks=pytest.mark.slow), lambda: AutoFlow(global_model)],
    ids=["plated", "joint"],
)
def test_stl_and_dreg_agree_with_the_total_derivative(make):
    guide = make()
    guide.build()
    perturb(guide, 0.1)
    parameters = [p for name, p in guide.named_parameters() if name in ("weights", "centering")]

    def gradients(loss, calls=200):
        found = []
        for _ in range(calls):
            slopes = torch.autograd.grad(
                loss.differentiable_loss(global_model, guide), parameters, materialize_grads=True
            )
            flat = torch.cat([slope.reshape(-1) for slope in slopes])
            found.append(torch.cat([flat[:: max(len(flat) // 50, 1)], flat[-12:]]))  # the affine maps come last
        return torch.stack(found)

    for path, loss in (
        ("stl", lambda g: VRIWAE_ELBO(1.0, 32, gradient=g)),
        ("dreg", lambda g: IWAE_ELBO(4, gradient=g)),
    ):
        one, other = gradients(loss(path)), gradients(loss("pathwise"))
        error = (one.var(0) / len(one) + other.var(0) / len(other)).sqrt()
        z = ((one.mean(0) - other.mean(0)).abs() / error.clamp_min(1e-9)).max()
        assert float(z) < 5, path


# Minibatches and particles


def test_each_row_gets_its_own_whatever_the_minibatch():
    guide = AutoPlatedFlow(local_model, create_plates=rows)
    guide.build(NUM_DATA)
    perturb(guide)
    noise = torch.randn(NUM_DATA, 1)
    full = poutine.trace(_frozen(guide, noise)).get_trace(NUM_DATA)
    for _ in range(20):
        part = poutine.trace(_frozen(guide, noise)).get_trace(3)
        i = part.nodes["data"]["value"]
        for name in ("z", "_AutoPlatedFlow_data"):
            assert torch.allclose(part.nodes[name]["value"], full.nodes[name]["value"][i])
            fn = full.nodes[name]["fn"].log_prob(full.nodes[name]["value"])
            assert torch.allclose(part.nodes[name]["fn"].log_prob(part.nodes[name]["value"]), fn[i])
    assert full.nodes["z"]["value"].unique().numel() == NUM_DATA


def _frozen(guide, noise):
    """The guide with row i's noise given, whichever minibatch it comes in."""

    def run(batch):
        flow = guide.flows["block_data"]

        def rsample(shape, context=None):
            return noise[guide.plates["data"].indices]

        flow.base.rsample = rsample
        return guide(batch)

    return run


def test_priors_are_those_of_the_rows_in_the_minibatch():
    x = torch.arange(1.0, NUM_DATA + 1)

    def model(batch):
        tau = pyro.sample("tau", dist.LogNormal(torch.tensor(0.0), 0.1))
        with rows(batch) as i:
            pyro.sample("z", dist.Normal(100 * x[i], tau))

    guide = AutoPlatedFlow(model, create_plates=rows)
    for _ in range(10):
        trace = poutine.trace(guide).get_trace(3)
        i = trace.nodes["data"]["value"]
        assert (trace.nodes["z"]["value"] - 100 * x[i]).abs().max() < 20  # a fiftieth of what the rows differ by
        assert torch.equal(trace.nodes["z"]["value"].argsort(), i.argsort())


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_gradients_are_finite_differences(make):
    guide = make(schools)
    guide.build()
    perturb(guide, 0.1)
    loss = VRIWAE_ELBO(1.0, 4, gradient="pathwise")

    def value():
        pyro.set_rng_seed(0)
        return loss.differentiable_loss(schools, guide)

    value().backward()
    for name, parameter in guide.named_parameters():
        flat, slopes = parameter.data.view(-1), parameter.grad.view(-1)
        picked = [int(slopes.abs().argmax()), len(flat) // 2, len(flat) - 1]
        assert float(slopes.abs().max()) > 1e-6, name
        for i in picked:
            ends = []
            for step in (1e-6, -2e-6):
                flat[i] += step
                ends.append(float(value().detach()))
            flat[i] += 1e-6
            assert abs((ends[0] - ends[1]) / 2e-6 - float(slopes[i])) < 1e-5 * (1 + abs(float(slopes[i]))), name


@pytest.mark.parametrize("source", ["tensor", "function", "module", "batch"])
def test_features_go_to_their_rows(source):
    table = torch.randn(NUM_DATA, 2)
    encoder = torch.nn.Linear(2, 3)

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, batch):
            return self.encoder(table)

    sources = {
        "tensor": table,
        "function": lambda batch: table,
        "module": Encoder(),
        "batch": lambda batch: table[guide.plates["data"].indices],
    }
    guide = AutoPlatedFlow(local_model, {"data": sources[source]}, create_plates=rows)
    guide.build(NUM_DATA)
    perturb(guide)
    noise = torch.randn(NUM_DATA, 1)
    full = poutine.trace(_frozen(guide, noise)).get_trace(NUM_DATA).nodes["z"]["value"]
    part = poutine.trace(_frozen(guide, noise)).get_trace(3)
    assert torch.allclose(part.nodes["z"]["value"], full[part.nodes["data"]["value"]])
    guide(NUM_DATA)
    assert any("encoder" in name for name in pyro.get_param_store()) == (source == "module")


def test_a_minibatch_has_the_full_batches_expectation():
    guide = AutoPlatedFlow(global_model, create_plates=rows)
    guide.build(NUM_DATA)
    perturb(guide, 0.1)
    found = {}
    for batch in (NUM_DATA, 3):
        values = torch.tensor([-VRIWAE_ELBO(1.0, 64).loss(global_model, guide, batch) for _ in range(400)])
        found[batch] = (values.mean(), values.var() / len(values))
    (full, error), (part, other) = found.values()
    assert abs(full - part) < 4 * (error + other) ** 0.5


@pytest.mark.convergence
def test_local_latents_have_a_weight_for_each_row():
    guide = AutoPlatedFlow(local_model, create_plates=rows)
    loss = IWAE_ELBO(8)
    assert loss.explain(local_model, guide, NUM_DATA).plates == ("data",)
    svi = SVI(local_model, guide, pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.01 ** (1 / 500)}), loss)
    for _ in range(500):
        svi.step(3)
    values = torch.tensor([-loss.loss(local_model, guide, NUM_DATA) for _ in range(100)])
    assert log_evidence() - 0.1 < values.mean() < log_evidence() + 4 * values.std() / 10


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
@pytest.mark.parametrize("vectorize", [True, False])
def test_parameters_do_not_know_the_particles_they_first_ran_in(make, vectorize):
    shapes = []
    for first in (True, False):
        pyro.clear_param_store()
        guide = make(schools)
        if not first:
            guide.build()
        with pyro.plate("particles", 7, dim=-2):
            guide()
        shapes.append({name: parameter.shape for name, parameter in guide.named_parameters()})
        loss = Trace_ELBO(4, vectorize_particles=vectorize, max_plate_nesting=1)
        loss.loss_and_grads(schools, guide)
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("model", [schools, levels, nested_model], ids=lambda model: model.__name__)
@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_vectorised_particles_weigh_what_single_ones_do(make, model):
    guide = make(model)
    guide.build()
    perturb(guide)
    nesting = 3
    with pyro.plate("particles", 5, dim=-nesting - 1):
        trace = poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    names = [block.key for block in guide._blocks]
    for k in range(5):
        values = {f"_{guide._pyro_name}_{key}": trace.nodes[f"_{guide._pyro_name}_{key}"]["value"] for key in names}
        single = {name: _one(value, k, nesting, 1) for name, value in values.items()}
        alone = poutine.trace(poutine.condition(guide, data=single)).get_trace()
        alone.compute_log_prob()
        for name, node in alone.nodes.items():
            if node["type"] == "sample" and name in trace.nodes and "fn" in node and hasattr(node["fn"], "event_dim"):
                if not isinstance(node["value"], torch.Tensor) or not node["value"].is_floating_point():
                    continue
                wide = trace.nodes[name]
                assert torch.allclose(_one(wide["value"], k, nesting, node["fn"].event_dim), node["value"])
                assert torch.allclose(_one(wide["log_prob"], k, nesting, 0), node["log_prob"])


def _one(value, k, nesting, event_dim):
    """Particle k of what has particles in front, with the plate dimensions it does not have taken out."""
    value = value[k]
    while value.dim() > event_dim and value.shape[0] == 1:
        value = value[0]
    return value
