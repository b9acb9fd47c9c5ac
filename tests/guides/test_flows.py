"""Flows as distributions: densities that integrate to one, inverses, scores without inverses, guards."""

import math
import subprocess
import sys
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch.distributions import Distribution

from pyro_elbo_ext import IWAE_ELBO, VRIWAE_ELBO, FlowDistribution, make_flow
from pyro_elbo_ext.guides.bases import MixtureBase, NormalBase
from pyro_elbo_ext.guides.flows import Flow
from pyro_elbo_ext.guides.zuko import ClampedAffine, import_zuko, near_identity

KINDS = ("iaf", "coupling", "spline")
BASES = ("normal", "studentt", "mixture")


def bent(kind, features, context=0, amount=0.3, **kwargs):
    """A flow all of whose parameters are moved away from where they start."""
    flow = make_flow(kind, features, context, loc=0.3, scale=0.7, **kwargs).to(torch.get_default_dtype())
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            parameter.add_((0.05 if name.startswith("affine") else amount) * torch.randn_like(parameter))
    return flow


def given(context, *batch):
    return torch.randn(*batch, context) if context else None


def flows(min_features=1):
    return [
        pytest.param(kind, features, context, base, affine, id=f"{kind}-{features}-{context}-{base}-{affine}")
        for kind in KINDS
        for features, context in ((1, 0), (1, 2), (4, 0), (3, 2))
        for base, affine in (("normal", "diag"), ("studentt", "tril"), ("mixture", None))
        if features >= min_features and (base != "mixture" or features > 1)
    ]


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_density_on_the_line_integrates_to_one(kind, context):
    amount = 0.3 if kind == "coupling" else 0.1  # the grid resolves a spline's kinks, and holds all of an affine layer
    fn = FlowDistribution(bent(kind, 1, context, amount), given(context))
    grid = torch.linspace(-60, 60, 1_000_001)
    with torch.no_grad():
        total = torch.trapezoid(fn.log_prob(grid.unsqueeze(-1)).exp(), grid)
    assert abs(float(total) - 1) < 1e-6


OF_COUPLING = pytest.param("coupling", marks=pytest.mark.slow)  # where the like of it is tested with another flow


@pytest.mark.parametrize("base", ["normal", "mixture"])
@pytest.mark.parametrize("kind", ["iaf", OF_COUPLING])  # a spline's kinks would need a finer grid
def test_a_density_in_the_plane_integrates_to_one(kind, base):
    flow = bent(kind, 2, 1, amount=0.05, base=base)
    fn = FlowDistribution(flow, given(1))
    line = torch.linspace(-16, 16, 601)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        density = torch.cat([fn.log_prob(part).exp() for part in grid.split(100_000)]).reshape(601, 601)
    total = torch.trapezoid(torch.trapezoid(density, line), line)
    assert abs(float(total) - 1) < 1e-6


@pytest.mark.parametrize("kind, features, context, base, affine", flows())
def test_pull_undoes_push(kind, features, context, base, affine):
    flow = bent(kind, features, context, amount=0.1, base=base, affine=affine)
    c, noise = given(context, 5), torch.randn(7, 5, features)
    x, ladj = flow.push(noise, c)
    back, inverse_ladj = flow.pull(x, c)
    assert torch.allclose(back, noise, atol=1e-9)
    assert torch.allclose(ladj, -inverse_ladj, atol=1e-9)


@pytest.mark.parametrize("kind, features, context, base, affine", flows())
def test_the_log_determinant_is_the_jacobians(kind, features, context, base, affine):
    flow, c = bent(kind, features, context, base=base, affine=affine), given(context)
    noise = torch.randn(features)
    jacobian = torch.autograd.functional.jacobian(lambda e: flow.push(e, c)[0], noise)
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, flow.push(noise, c)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_coordinate_depends_on_all_noise(kind):
    flow = bent(kind, 6)
    jacobian = torch.autograd.functional.jacobian(lambda e: flow.push(e)[0], torch.randn(6))
    assert (jacobian != 0).all()


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("kind", ["iaf", "spline"])
def test_layers_do_what_zukos_own_composition_does(kind, context):
    flow = bent(kind, 4, context, affine=None)
    c, noise = given(context, 5), torch.randn(7, 5, 4)
    found = []
    for push in (flow.push, lambda noise, c: flow.transform(c).call_and_ladj(noise)):
        values = push(noise, c)
        slopes = torch.autograd.grad(sum(value.sin().sum() for value in values), list(flow.transform.parameters()))
        found.append([*values, *slopes])
    assert all(torch.allclose(one, other, rtol=1e-10, atol=1e-12) for one, other in zip(*found, strict=True))


LAYER, COMPOSED = import_zuko().flows.MaskedAutoregressiveTransform, import_zuko().lazy.LazyComposedTransform


class Halved(LAYER):
    """A layer of one's own, which looks at half of its input."""

    def meta(self, c, x):
        return super().meta(c, 0.5 * x)


class Backwards(COMPOSED):
    """A composition of one's own, the last layer first."""

    def forward(self, c=None):
        return COMPOSED(*reversed(self.transforms))(c)


OWN = {
    "layers": lambda: COMPOSED(Halved(3), Halved(3, order=[2, 1, 0])),
    "composition": lambda: Backwards(LAYER(3), LAYER(3, order=[2, 1, 0])),
    "alone": lambda: LAYER(3),
}


@pytest.mark.parametrize("make", OWN.values(), ids=OWN)
def test_transforms_of_ones_own_are_drawn_through_as_they_are(make):
    fn = FlowDistribution(Flow(make().to(torch.get_default_dtype()), NormalBase(3), features=3))
    x = fn.sample((5,))
    assert torch.allclose(fn.log_prob(x), fn.log_prob(x.clone()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [0, 2])
def test_networks_have_two_hidden_layers_or_one_where_that_will_do(kind, context):
    found = {
        len(layer.hyper) // 2 for layer in make_flow(kind, 3, context).transform.transforms if hasattr(layer, "hyper")
    }
    assert found == ({1} if kind == "iaf" and not context else {2})


def test_a_batch_may_be_empty_and_a_context_of_no_width():
    flow = bent("iaf", 3)
    assert FlowDistribution(flow).rsample((0,)).shape == (0, 3)
    x = FlowDistribution(flow, torch.zeros(5, 0)).rsample()
    assert torch.allclose(FlowDistribution(flow).log_prob(x), FlowDistribution(flow, torch.zeros(5, 0)).log_prob(x))


def test_a_scale_is_held_within_its_bounds_and_is_linear_inside():
    scale = torch.tensor([-9.0, -1.5, 0.0, 1.5, 9.0], requires_grad=True)
    layer = ClampedAffine(torch.full((5,), 0.5), scale, bound=2.0)
    x = torch.randn(3, 5)
    y, ladj = layer.call_and_ladj(x)
    held = torch.tensor([-2.0, -1.5, 0.0, 1.5, 2.0])
    assert torch.allclose(y, 0.5 + held.exp() * x) and torch.allclose(ladj, held.expand(3, 5))
    assert torch.allclose(layer.inv(y), x)
    (slope,) = torch.autograd.grad(ladj.sum(), scale)
    assert torch.equal(slope, torch.tensor([0.0, 3.0, 3.0, 3.0, 0.0]))


@pytest.mark.parametrize("kind, features, bound", [("iaf", 3, 1.0), ("coupling", 3, None), ("coupling", 1, None)])
def test_a_scale_with_a_bound_bends_towards_it_and_can_come_back(kind, features, bound):
    flow = make_flow(kind, features, 1, scale_bound=bound, affine=None)
    scale = torch.tensor([0.0, 50.0], requires_grad=True)
    log_scale = flow.transform.transforms[0].univariate(torch.zeros(2), scale).log_scale
    none, most = log_scale.tolist()
    assert none == 0 and 0.9 < most / (bound or 2.0) < 1
    assert (torch.autograd.grad(log_scale.sum(), scale)[0] > 0).all()


@pytest.mark.parametrize("kind, features, context, base, affine", flows())
def test_the_log_density_without_an_inverse_has_all_first_derivatives(kind, features, context, base, affine):
    flow = bent(kind, features, context, amount=0.1, base=base, affine=affine)
    c = given(context, 5)
    c = c.requires_grad_() if context else None
    fn = FlowDistribution(flow, c, batch_shape=(5,))
    drawn = fn.rsample((3,))
    noise = fn.noise_of(drawn)
    found = []
    for log_prob in (fn.log_prob, lambda x: fn.log_prob_at(x, noise)):
        x = drawn.detach().requires_grad_()
        value = log_prob(x)
        wanted = [x, *flow.parameters()] + ([c] if context else [])
        found.append([value, *torch.autograd.grad(value.sum(), wanted, allow_unused=True)])
    for inverse, forward in zip(*found, strict=True):
        zero = torch.zeros(()) if inverse is None else inverse
        assert torch.allclose(zero if forward is None else forward, zero, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_stands_inverses_that_float32_does_not(kind):
    """Over seeds, medians are 2e-6 to 7e-6 for affine layers and 1e-4 to 9e-4 for splines, whose scores reach 1e38."""
    flow = bent(kind, 8, amount=0.5)
    noise = torch.randn(64, 8)
    exact = flow.score(noise)
    single = flow.float().score(noise.float())
    error = (single.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert float(error.nanmedian()) < (2e-3 if kind == "spline" else 3e-5)


def two_level_pair(kind):
    flows = torch.nn.ModuleDict({"a": bent(kind, 2), "b": bent(kind, 3, 2, base="studentt")})

    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", 4):
            b = pyro.sample("b", dist.Normal(a.repeat_interleave(torch.tensor([2, 1]), -1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(b.sum(-1), 1.0), obs=torch.arange(4.0))

    def guide():
        pyro.module("flows", flows)
        a = pyro.sample("a", FlowDistribution(flows["a"]))
        with pyro.plate("rows", 4):
            pyro.sample("b", FlowDistribution(flows["b"], a))

    return model, guide, flows


def gradients(loss, model, guide, parameters, calls):
    out = []
    for _ in range(calls):
        slopes = torch.autograd.grad(loss.differentiable_loss(model, guide), parameters, materialize_grads=True)
        out.append(torch.cat([slope.reshape(-1) for slope in slopes]))
    return torch.stack(out)


def worst_z(one, other):
    error = (one.var(0) / len(one) + other.var(0) / len(other)).sqrt()
    return float(((one.mean(0) - other.mean(0)).abs() / error.clamp_min(1e-12)).max().detach())


@pytest.mark.parametrize("kind", ["iaf", OF_COUPLING])
@pytest.mark.parametrize(
    "make",
    [lambda g: VRIWAE_ELBO(1.0, 64, gradient=g), lambda g: IWAE_ELBO(4, gradient=g)],
    ids=["elbo-stl", "iwae-dreg"],
)
def test_path_estimators_agree_with_the_total_derivative(kind, make):
    model, guide, flows = two_level_pair(kind)
    last = [layer.hyper[-1].bias for flow in flows.values() for layer in flow.transform.transforms]
    parameters = [p for name, p in flows.named_parameters() if "affine" in name] + last
    path = "stl" if make("stl").num_particles == 64 else "dreg"
    found = [gradients(make(gradient), model, guide, parameters, 300) for gradient in (path, "pathwise")]
    assert worst_z(*found) < 5


def test_sticking_the_landing_has_no_variance_at_the_posterior():
    flow = make_flow("iaf", 2, scale=0.5**0.5).to(torch.get_default_dtype())
    near_identity(flow.transform, 0.0)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(2))

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", FlowDistribution(flow))

    for gradient, exact in (("stl", True), ("pathwise", False)):
        slopes = gradients(VRIWAE_ELBO(1.0, 4, gradient=gradient), model, guide, list(flow.parameters()), 5)
        assert (float(slopes.abs().max()) < 1e-12) == exact


@pytest.mark.parametrize("gradient", ["pathwise", "stl", "dreg"])
def test_no_estimator_inverts_a_flow(gradient, monkeypatch):
    model, guide, flows = two_level_pair("iaf")
    loss = IWAE_ELBO(4, gradient=gradient, max_plate_nesting=1)
    loss.differentiable_loss(model, guide)  # dependencies are found once, by scoring anywhere

    def pull(*args, **kwargs):
        raise AssertionError("a flow was inverted")

    for flow in flows.values():
        monkeypatch.setattr(flow, "pull", pull)
    loss.loss_and_grads(model, guide)


def test_a_batch_is_drawn_and_scored_as_its_rows_one_by_one():
    flow, c = bent("iaf", 3, 2), torch.randn(4, 2)
    fn = FlowDistribution(flow, c)
    assert fn.batch_shape == (4,) and fn.event_shape == (3,)
    wide = fn.expand((6, 4))
    x = wide.rsample()
    assert x.shape == (6, 4, 3) and wide.log_prob(x).shape == (6, 4)
    rows = torch.stack([FlowDistribution(flow, row).log_prob(x[:, i]) for i, row in enumerate(c)], 1)
    assert torch.allclose(wide.log_prob(x.clone()), rows)
    assert torch.allclose(wide.log_prob(x), rows)


def test_only_the_last_draw_is_kept():
    flow = bent("iaf", 2)
    fn = FlowDistribution(flow)
    first, second = fn.rsample(), fn.rsample()
    assert fn.noise_of(first) is None and fn.noise_of(second) is not None
    for value in (first, second):
        assert torch.allclose(fn.log_prob(value), FlowDistribution(flow).log_prob(value))  # which has drawn nothing


def test_a_flow_is_a_prior_and_predicts():
    flow = bent("iaf", 2)

    def model(x=None):
        z = pyro.sample("z", FlowDistribution(flow))
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=x)

    drawn = Predictive(model, num_samples=5)()
    assert drawn["z"].reshape(5, 2).shape == (5, 2)
    mcmc_like = pyro.poutine.trace(pyro.poutine.condition(model, data={"z": torch.zeros(2)})).get_trace()
    mcmc_like.compute_log_prob()
    assert torch.allclose(mcmc_like.nodes["z"]["log_prob"], FlowDistribution(flow).log_prob(torch.zeros(2)))


@pytest.mark.parametrize("name", ["NSF", "MAF", "NICE"])
def test_zukos_own_flows_are_distributions(name):
    flow = getattr(import_zuko().flows, name)(2, 3).to(torch.get_default_dtype())
    c = torch.randn(5, 3)
    fn = FlowDistribution(flow, c)
    x = fn.sample((4,))
    assert x.shape == (4, 5, 2)
    with pyro.validation_enabled(False):  # zuko's distributions declare no constraints
        assert torch.allclose(fn.log_prob(x), flow(c).log_prob(x), atol=1e-5)


def mean_and_error(loss, model, guide, calls=40):
    values = torch.tensor([-loss.loss(model, guide, 0.0) for _ in range(calls)])
    return float(values.mean()), float(values.std()) / calls**0.5


@pytest.mark.convergence
@pytest.mark.parametrize(
    "loss, bound",
    [
        (Trace_ELBO(8, vectorize_particles=True, max_plate_nesting=0), VRIWAE_ELBO(1.0, 400)),
        pytest.param(IWAE_ELBO(8, gradient="dreg", nonfinite="drop"), IWAE_ELBO(8), marks=pytest.mark.slow),
    ],
    ids=["pyro", "iwae"],
)
def test_a_model_that_fails_at_some_draws_trains_to_the_same_bound(loss, bound):
    def model(bad):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        broken = (997 * z.detach().sum(-1)).remainder(1.0) < bad
        factor = dist.Normal(z, 0.5).log_prob(torch.tensor([1.0, -2.0])).sum(-1)
        pyro.factor("x", factor * torch.where(broken, math.nan, 1.0))

    evidence = float(dist.Normal(torch.zeros(2), 1.25**0.5).log_prob(torch.tensor([1.0, -2.0])).sum())
    for bad in (0.0, 0.01):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        flow = make_flow("iaf", 2).to(torch.get_default_dtype())

        def guide(bad, flow=flow):
            pyro.module("flow", flow)
            pyro.sample("z", FlowDistribution(flow))

        svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.01 ** (1 / 600)}), loss)
        start = mean_and_error(VRIWAE_ELBO(1.0, 400), model, guide)[0]
        with warnings.catch_warnings(), pyro.validation_enabled(False):
            warnings.simplefilter("ignore")  # Pyro's, that the loss of such a step is NaN
            for _ in range(600):
                svi.step(bad)
        assert (int(flow.dropped) + getattr(loss, "num_dropped", 0) > 20) == (bad > 0)
        assert mean_and_error(VRIWAE_ELBO(1.0, 400), model, guide)[0] > start + 1  # it trained at all
        mean, error = mean_and_error(bound, model, guide)
        assert evidence - 0.02 < mean < evidence + 4 * error


@pytest.mark.parametrize("kind", KINDS)
def test_draws_of_a_stretched_flow_are_finite_or_of_no_weight(kind):
    flow = bent(kind, 8).float()
    with torch.no_grad():
        for parameter in flow.transform.parameters():
            parameter.mul_(30)
    fn = FlowDistribution(flow)
    x = fn.sample((1000,))
    lost = ~torch.isfinite(fn.log_prob(x))
    assert torch.isfinite(x).all() and (fn.log_prob(x)[lost] == math.inf).all()
    assert (int(lost.sum()) > 0) == (kind == "coupling")  # the deepest overflows


def test_a_draw_that_overflows_is_of_no_weight():
    fn = FlowDistribution(make_flow("iaf", 2, scale=2e38, affine_rate=1.0).float())  # the limit is 3.4e38
    x = fn.sample((1000,))
    lost = fn.log_prob(x) == math.inf
    assert 200 < int(lost.sum()) < 400 and (x[lost] == 0).all() and torch.isfinite(x).all()
    assert torch.isfinite(fn.log_prob(x)[~lost]).all()


def test_mixture_draws_follow_their_density():
    base = MixtureBase(2, components=3).to(torch.get_default_dtype())
    with torch.no_grad():
        base.logits.copy_(torch.tensor([0.0, 1.0, -1.0]))
    draws = base.rsample(torch.Size([20, 5000])).reshape(-1, 2)
    share = torch.softmax(base.logits, 0)
    for moment in (lambda z: z, lambda z: z**2):
        exact = share @ (base.loc if moment(3.0) == 3.0 else base.loc**2 + 1)
        error = moment(draws).std(0) / len(draws) ** 0.5
        assert ((moment(draws).mean(0) - exact).abs() < 4 * error).all()


def test_importing_zuko_leaves_validation_on():
    code = """
import torch, pyro.distributions as dist
from torch.distributions import Distribution
before = (Distribution._validate_args, Distribution.__dict__["arg_constraints"])
from pyro_elbo_ext import make_flow
make_flow("iaf", 2)
assert (Distribution._validate_args, Distribution.__dict__["arg_constraints"]) == before
try:
    dist.Normal(0.0, -1.0)
except ValueError:
    pass
else:
    raise SystemExit("validation is off")
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    assert Distribution._validate_args


def without_zuko(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    make_flow("iaf", 2)


ERRORS = {
    "no-zuko": (without_zuko, ImportError, r"pyro-elbo-ext\[flows\]"),
    "kind": (lambda _: make_flow("realnvp", 2), ValueError, 'one of "iaf", "coupling", "spline"'),
    "base": (lambda _: make_flow("iaf", 2, base="cauchy"), ValueError, 'one of "normal", "studentt", "mixture"'),
    "affine": (lambda _: make_flow("iaf", 2, affine="full"), ValueError, '"diag", "tril" or None'),
    "features": (lambda _: make_flow("iaf", 0), ValueError, "features must be positive"),
    "scale": (lambda _: make_flow("iaf", 2, scale=-1.0), ValueError, "scales positive"),
    "mixture-1d": (lambda _: make_flow("iaf", 1, base="mixture"), ValueError, "two coordinates"),
    "context": (
        lambda _: FlowDistribution(make_flow("iaf", 2, 3), torch.ones(2)),
        ValueError,
        "a context of 3 features, but was given 2",
    ),
    "no-context": (lambda _: FlowDistribution(make_flow("iaf", 2, 3)), ValueError, "was given 0"),
    "unasked": (lambda _: FlowDistribution(make_flow("iaf", 2), torch.ones(2)), ValueError, "takes no context"),
    "no-flow": (
        lambda _: FlowDistribution(torch.nn.Linear(2, 2)),
        TypeError,
        "make_flow or a zuko.flows flow, got Linear",
    ),
    "zuko-context": (
        lambda _: FlowDistribution(import_zuko().flows.MAF(2, 3), torch.ones(5)).sample(),
        ValueError,
        "context of 5 features",
    ),
    "support": (lambda _: FlowDistribution(make_flow("iaf", 2)).log_prob(torch.ones(3)), ValueError, None),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_is_refused(case, monkeypatch):
    make, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        make(monkeypatch)
