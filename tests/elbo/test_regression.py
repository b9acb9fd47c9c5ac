"""The ELBOs whose gradients are regressed: consistent away from conjugacy, on minibatches, in mixed guides."""

import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_elbo_ext import Price_ELBO, Regression_ELBO, ScoreRegression_ELBO
from pyro_elbo_ext.testing import z_score

REPLICATES = 100
FAMILIES = {
    "Normal": (dist.Normal, {"loc": 0.4, "scale": 0.7}, (-8, 8)),
    "Gamma": (dist.Gamma, {"concentration": 2.5, "rate": 1.3}, (1e-4, 30)),
    "Exponential": (dist.Exponential, {"rate": 0.8}, (1e-6, 40)),
    "Beta": (dist.Beta, {"concentration1": 2.5, "concentration0": 3.0}, (1e-4, 1 - 1e-4)),
    "Bernoulli": (lambda logits: dist.Bernoulli(logits=logits), {"logits": 0.4}, (0, 1)),
}


def log_joint(x):
    """Far from linear in any family's statistics, and from a quadratic."""
    return -torch.nn.functional.softplus(3 * x - 1) - 0.3 * x.square() + x.sin()


def exact_gradient(family):
    """The gradient of the ELBO of one element, by a sum over a grid."""
    make, arguments, ends = FAMILIES[family]
    grid = torch.linspace(*ends, 2 if family == "Bernoulli" else 40_001)
    params = {name: torch.tensor(value).requires_grad_() for name, value in arguments.items()}
    log_q = make(**params).log_prob(grid)
    width = float(grid[1] - grid[0])
    elbo = (log_q.exp() * (log_joint(grid) - log_q)).sum() * width
    return dict(zip(params, torch.autograd.grad(elbo, list(params.values())), strict=True))


def replicated(family):
    """A pair with every replicate in an element of a plate, and a parameter for each."""
    make, arguments, _ = FAMILIES[family]

    def model():
        with pyro.plate("replicates", REPLICATES):
            fn = make(**{name: torch.tensor(value) for name, value in arguments.items()})
            x = pyro.sample("x", fn)
            pyro.factor("other", log_joint(x) - fn.log_prob(x))

    def guide():
        params = {n: pyro.param(n, lambda v=v: torch.full((REPLICATES,), v)) for n, v in arguments.items()}
        with pyro.plate("replicates", REPLICATES):
            pyro.sample("x", make(**params))

    return model, guide


def gradients(loss, model, guide, *args):
    loss.loss_and_grads(model, guide, *args)
    store = pyro.get_param_store()
    found = {}
    for name, p in store.named_parameters():
        found[name] = torch.zeros_like(p) if p.grad is None else -p.grad.clone()
        p.grad = None
    return found


UNBIASED = {
    **{f"values-{family}": (family, partial(Regression_ELBO, 8)) for family in FAMILIES},
    "scores": ("Normal", partial(ScoreRegression_ELBO, 4)),
    "scores-jointly": ("Normal", partial(ScoreRegression_ELBO, 4 * REPLICATES)),
    "scores-chunked": ("Normal", partial(ScoreRegression_ELBO, 8, chunk_size=2)),
    "second-derivatives": ("Normal", partial(Price_ELBO, 2)),
}


@pytest.mark.parametrize("case", UNBIASED)
def test_gradient_is_the_elbos(case):
    """At few particles, far from conjugacy: what the fit to a particle would know of that particle is left out."""
    family, make = UNBIASED[case]
    model, guide = replicated(family)
    loss = make(max_plate_nesting=2)
    calls = [gradients(loss, model, guide) for _ in range(40 if make.args[0] > REPLICATES else 400)]
    for name, exact in exact_gradient(family).items():
        sample = torch.cat([call[name] for call in calls])
        assert abs(sample.mean() - exact) < 4 * sample.std() / len(sample) ** 0.5 + 1e-8, (name, sample.mean(), exact)
        assert abs(sample.mean()) > 0.01


@pytest.mark.parametrize("num_particles", [5, 8, 16], ids=["coordinates", "sites", "jointly"])
def test_values_regressed_by_coordinates_sites_or_jointly(num_particles):
    """Two sites of two coordinates that meet in the model: four statistics each, eight in all."""
    target = torch.tensor([0.5, -1.0])

    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("other", -((a * b - target).square() + a**4).sum(-1))  # no function of a and its square

    def guide():
        for name in "ab":
            loc = pyro.param(f"m{name}", torch.tensor([0.3, 0.8]))
            pyro.sample(name, dist.Normal(loc, pyro.param(f"s{name}", torch.tensor([0.6, 0.9]))).to_event(1))

    m, s = torch.tensor([0.3, 0.8]).requires_grad_(), torch.tensor([0.6, 0.9]).requires_grad_()
    n, t = torch.tensor([0.3, 0.8]), torch.tensor([0.6, 0.9])
    square = (m**2 + s**2) * (n**2 + t**2) - 2 * target * m * n + target**2
    fourth = m**4 + 6 * m**2 * s**2 + 3 * s**4
    elbo = (-(m**2 + s**2) / 2 + s.log() - square - fourth).sum()
    exact = dict(zip(("ma", "sa"), torch.autograd.grad(elbo, [m, s]), strict=True))
    loss = Regression_ELBO(num_particles)
    calls = [gradients(loss, model, guide) for _ in range(1500)]
    for name, value in exact.items():
        for element, wanted in zip(torch.stack([call[name] for call in calls]).unbind(-1), value, strict=True):
            assert abs(z_score(element, float(wanted))) < 4, (name, element.mean(), wanted)


def test_one_particle_of_second_derivatives_is_biased():
    """With no other particle to take slopes from, the correction costs more than it is worth but on quadratics."""
    model, guide = replicated("Normal")
    loss = Price_ELBO(1)
    sample = torch.cat([gradients(loss, model, guide)["loc"] for _ in range(200)])
    assert abs(z_score(sample, float(exact_gradient("Normal")["loc"]))) > 6


def test_dirichlet_and_categorical_by_values():
    """Against the sum over states, and against a path gradient of many particles."""
    target = torch.tensor([0.3, -0.5, 0.8])

    def model():
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        pyro.factor("other", (p * target).sum(-1).mul(4).sin())
        z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
        pyro.factor("last", target[z] ** 2)

    def guide():
        pyro.sample("p", dist.Dirichlet(pyro.param("a", torch.tensor([1.5, 2.0, 0.9]))))
        pyro.sample("z", dist.Categorical(logits=pyro.param("logits", torch.tensor([0.2, 0.1, -0.4]))))

    loss = Regression_ELBO(2000)
    sample = [gradients(loss, model, guide) for _ in range(60)]
    logits = pyro.param("logits").detach().requires_grad_()
    q = logits.softmax(-1)
    exact = torch.autograd.grad((q * (target**2 - math.log(3) - q.log())).sum(), logits)[0]
    path = Trace_ELBO(2000, vectorize_particles=True, max_plate_nesting=0)
    paths = torch.stack([gradients(path, model, guide)["a"] for _ in range(60)])
    values = torch.stack([found["a"] for found in sample])
    spread = ((paths.var(0) + values.var(0)) / 60).sqrt()
    assert ((paths.mean(0) - values.mean(0)).abs() < 4 * spread).all()
    assert (values.mean(0).abs() > 4 * spread).any()
    torch.testing.assert_close(torch.stack([found["logits"] for found in sample]).mean(0), exact, atol=2e-3, rtol=0)


LINEAR = {
    "scores": partial(ScoreRegression_ELBO, num_particles=8),
    "values": partial(Regression_ELBO, num_particles=16),
    "second derivatives": partial(Price_ELBO, num_particles=4),
}


def chain_model():
    first = pyro.sample("first", dist.Normal(torch.tensor(0.0), 1.0))
    second = pyro.sample("second", dist.Normal(first, 1.0))
    pyro.sample("x", dist.Normal(second, 1.0), obs=torch.tensor(1.5))


CHAIN = {"m": 0.2, "s": 0.6, "a": 0.7, "b": -0.3, "t": 0.8}


def chain_guide():
    m, s, a, b, t = (pyro.param(n, lambda v=v: torch.tensor(v)) for n, v in CHAIN.items())
    first = pyro.sample("first", dist.Normal(m, s))
    pyro.sample("second", dist.Normal(a * first + b, t))


def chain_gradient():
    params = {n: torch.tensor(v).requires_grad_() for n, v in CHAIN.items()}
    m, s, a, b, t = params.values()
    mean, spread = a * m + b, a**2 * s**2 + t**2
    gap = spread + s**2 - 2 * a * s**2 + (mean - m) ** 2
    elbo = -(m**2 + s**2 + gap + spread + (1.5 - mean) ** 2) / 2 + s.log() + t.log()
    return dict(zip(params, torch.autograd.grad(elbo, list(params.values())), strict=True))


@pytest.mark.parametrize("name", LINEAR)
def test_a_gaussian_site_above_another_site(name):
    """The site below takes its path, and its part reaches the site above through its value."""
    loss = LINEAR[name]()
    calls = [gradients(loss, chain_model, chain_guide) for _ in range(1500)]
    for param, exact in chain_gradient().items():
        sample = torch.stack([call[param] for call in calls])
        assert abs(z_score(sample, float(exact))) < 4, (param, sample.mean(), exact)
        assert abs(z_score(sample, 0.0)) > 6


def test_a_discrete_site_beside_a_normal_one():
    """Coupled in the model, each regressed on both: exact gradient by a sum over the discrete one."""
    params = {"m": 0.3, "s": 0.8, "logit": -0.4}

    def model():
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.4)))
        pyro.sample("x", dist.Normal(z + 2 * c, 1.0), obs=torch.tensor(1.7))

    def guide():
        m, s, logit = (pyro.param(n, lambda v=v: torch.tensor(v)) for n, v in params.items())
        pyro.sample("z", dist.Normal(m, s))
        pyro.sample("c", dist.Bernoulli(logits=logit))

    m, s, logit = (torch.tensor(v).requires_grad_() for v in params.values())
    p = logit.sigmoid()
    elbo = -(m**2 + s**2) / 2 + s.log()
    for q, prior, c in ((p, 0.4, 1.0), (1 - p, 0.6, 0.0)):
        elbo = elbo + q * (math.log(prior) - q.log() - ((1.7 - m - 2 * c) ** 2 + s**2) / 2)
    exact = torch.autograd.grad(elbo, [m, s, logit])
    loss = Regression_ELBO(8)
    calls = [gradients(loss, model, guide) for _ in range(1000)]
    for name, value in zip(params, exact, strict=True):
        sample = torch.stack([call[name] for call in calls])
        assert abs(z_score(sample, float(value))) < 4, (name, sample.mean(), value)


NUM_ROWS = 5


def rows_model(rows=None):
    """A global mean and row effects; every site Gaussian."""
    g = pyro.sample("g", dist.Normal(torch.tensor(0.0), 2.0))
    with pyro.plate("rows", NUM_ROWS, subsample=rows) as i:
        z = pyro.sample("z", dist.Normal(g, 1.0))
        x = torch.linspace(-1.0, 3.0, NUM_ROWS)[i]
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def rows_guide(rows=None):
    pyro.sample("g", dist.Normal(pyro.param("gm", torch.tensor(0.1)), pyro.param("gs", torch.tensor(0.6))))
    with pyro.plate("rows", NUM_ROWS, subsample=rows) as i:
        loc, scale = pyro.param("zm", torch.zeros(NUM_ROWS)), pyro.param("zs", torch.full((NUM_ROWS,), 0.7))
        pyro.sample("z", dist.Normal(loc[i], scale[i]))


def rows_gradient():
    m, s = torch.tensor(0.1).requires_grad_(), torch.tensor(0.6).requires_grad_()
    loc, scale = torch.zeros(NUM_ROWS).requires_grad_(), torch.full((NUM_ROWS,), 0.7).requires_grad_()
    x = torch.linspace(-1.0, 3.0, NUM_ROWS)
    elbo = -(m**2 + s**2) / 8 + s.log()
    elbo = elbo + (-((loc - m) ** 2 + scale**2 + s**2) / 2 - ((x - loc) ** 2 + scale**2) / 0.5 + scale.log()).sum()
    return dict(zip(("gm", "gs", "zm", "zs"), torch.autograd.grad(elbo, [m, s, loc, scale]), strict=True))


def test_minibatches_average_to_the_full_gradient():
    """Exactly, for second derivatives leave no noise here; over all minibatches of two rows."""
    loss, full = Price_ELBO(2), rows_gradient()
    batches = [torch.tensor(rows) for rows in itertools.combinations(range(NUM_ROWS), 2)]
    calls = [gradients(loss, rows_model, rows_guide, rows) for rows in batches]
    for name, exact in full.items():
        torch.testing.assert_close(torch.stack([call[name] for call in calls]).mean(0), exact)
    for name, found in gradients(loss, rows_model, rows_guide).items():
        torch.testing.assert_close(found, full[name])


@pytest.mark.parametrize("name", ["scores", "values"])
def test_minibatches_are_unbiased(name):
    loss, full = LINEAR[name](), rows_gradient()
    calls = [gradients(loss, rows_model, rows_guide, torch.randperm(NUM_ROWS)[:2]) for _ in range(1500)]
    for param, exact in full.items():
        sample = torch.stack([call[param] for call in calls]).reshape(len(calls), -1)
        for element, value in zip(sample.unbind(-1), exact.reshape(-1), strict=True):
            assert abs(z_score(element, float(value))) < 4.5, (param, element.mean(), value)


def test_scores_of_the_full_batch_leave_no_noise():
    """Six coordinates, sixteen particles: one joint regression, plates included."""
    full = rows_gradient()
    for _ in range(2):
        for name, found in gradients(ScoreRegression_ELBO(16), rows_model, rows_guide).items():
            torch.testing.assert_close(found, full[name])


def masked_model():
    with (
        pyro.plate("rows", 3),
        pyro.poutine.mask(mask=torch.tensor([True, False, True])),
        pyro.poutine.scale(scale=0.3),
    ):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([1.0, 2.0, -1.0]))


def masked_guide():
    with (
        pyro.plate("rows", 3),
        pyro.poutine.mask(mask=torch.tensor([True, False, True])),
        pyro.poutine.scale(scale=0.3),
    ):
        pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(3)), pyro.param("s", torch.ones(3))))


@pytest.mark.parametrize("name", LINEAR)
def test_masks_and_scales(name):
    found = gradients(LINEAR[name](), masked_model, masked_guide)
    torch.testing.assert_close(found["m"], 0.3 * torch.tensor([1.0, 0.0, -1.0]))
    torch.testing.assert_close(found["s"], 0.3 * torch.tensor([-1.0, 0.0, -1.0]))


@pytest.mark.parametrize("make", [partial(ScoreRegression_ELBO, 8), partial(Price_ELBO, 8)], ids=["scores", "second"])
@pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal])
def test_parameters_of_the_model_have_the_plain_gradient(make, auto):
    """Equal to that of Trace_ELBO from the same draws, for parameters in the store, in modules and in neither."""
    linear, hidden = torch.nn.Linear(2, 1), torch.randn(2, requires_grad=True)

    def model():
        pyro.module("linear", linear)
        z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        mean = linear(z).squeeze(-1) + (z * hidden).sum(-1) + pyro.param("shift", torch.tensor(0.3))
        pyro.sample("x", dist.StudentT(3.0, mean, 1.0), obs=torch.tensor(2.0))

    guide = auto(model)
    guide()
    found = []
    for loss in (make(), Trace_ELBO(8, vectorize_particles=True, max_plate_nesting=0)):
        pyro.set_rng_seed(5)
        value = loss.loss_and_grads(model, guide)
        leaves = [linear.weight, linear.bias, hidden, pyro.param("shift")]
        found.append([torch.tensor(value), *(leaf.grad.clone() for leaf in leaves)])
        for leaf in (*leaves, *guide.parameters()):
            leaf.grad = None
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_price_sums_over_elements_only_where_they_have_nothing_in_common():
    """Rows that meet in one likelihood have second derivatives with each other; rows that do not are summed at once."""

    def meeting():
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(2.0))

    def guide():
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(3)), pyro.param("s", torch.ones(3))))

    found = gradients(Price_ELBO(1), meeting, guide)
    torch.testing.assert_close(found["m"], torch.full((3,), 2.0))
    torch.testing.assert_close(found["s"], torch.full((3,), -1.0))


@pytest.mark.parametrize("event", [False, True], ids=["full rank", "event"])
def test_price_in_plates(event):
    """Two plates, values of two coordinates: every block of second derivatives in its place."""
    factor = torch.tensor([[1.0, 0.0], [-0.7, 1.2]])
    precision = factor @ factor.T + torch.eye(2)

    def plates():
        return pyro.plate("columns", 3, dim=-1), pyro.plate("rows", 2, dim=-2)

    def model():
        columns, rows = plates()
        with columns, rows:
            pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), precision_matrix=precision))

    def guide():
        columns, rows = plates()
        loc = pyro.param("m", torch.arange(12.0).reshape(2, 3, 2) / 5)
        with columns, rows:
            if event:
                pyro.sample("z", dist.Normal(loc, pyro.param("s", torch.full((2, 3, 2), 0.6))).to_event(1))
            else:
                tril = pyro.param("t", torch.tensor([[0.6, 0.0], [0.2, 0.5]]).expand(2, 3, 2, 2).contiguous())
                pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))

    found = gradients(Price_ELBO(2), model, guide)
    torch.testing.assert_close(found["m"], -pyro.param("m").detach() @ precision)
    if event:
        scale = pyro.param("s").detach()
        torch.testing.assert_close(found["s"], 1 / scale - scale * precision.diagonal())
    else:
        tril = pyro.param("t").detach()
        torch.testing.assert_close(found["t"], (torch.linalg.inv(tril).mT - precision @ tril).tril())


@pytest.mark.parametrize("name", LINEAR)
def test_masks_of_distributions(name):
    """A mask on the distribution itself, in model and guide, hides its terms like any other."""
    mask = torch.tensor([True, False, True])

    def model():
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0).mask(mask))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor([1.0, 2.0, -1.0]))

    def guide():
        with pyro.plate("rows", 3):
            fn = dist.Normal(pyro.param("m", torch.zeros(3)), pyro.param("s", torch.full((3,), 0.5)))
            pyro.sample("z", fn.mask(mask))

    loss = LINEAR[name]()
    calls = [gradients(loss, model, guide) for _ in range(400)]
    scale = torch.full((3,), 0.5)
    exact = {"m": torch.tensor([1.0, 2.0, -1.0]), "s": mask * (1 / scale - scale) - scale}
    for param, value in exact.items():
        sample = torch.stack([call[param] for call in calls])
        spread = sample.std(0) / len(sample) ** 0.5
        assert ((sample.mean(0) - value).abs() < 4 * spread + 1e-9).all(), (param, sample.mean(0), value)
    pyro.set_rng_seed(2)
    value = loss.loss_and_grads(model, guide)
    pyro.set_rng_seed(2)
    assert loss.loss(model, guide) == pytest.approx(value)


def test_a_graph_that_others_use_stays():
    """Twice through one network outside, then one backward."""
    hidden = torch.tensor(0.3, requires_grad=True)
    shared = hidden.exp()

    def model():
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z * shared, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.1)), pyro.param("s", torch.tensor(0.9))))

    loss = ScoreRegression_ELBO(8)
    (loss.differentiable_loss(model, guide) + loss.differentiable_loss(model, guide)).backward()
    assert hidden.grad.abs() > 0.01


def test_newton_direction_is_newtons():
    """In the mean stands what moves it to the optimum in one natural-gradient step, not the gradient."""
    design = torch.tensor([[1.0, 0.9], [0.9, 1.0], [0.3, -0.2]])

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 3):
            mean = (w @ design.T).squeeze(-2) if w.dim() > 1 else w @ design.T
            pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.tensor([1.0, -1.0, 2.0]))

    def guide():
        pyro.sample("w", dist.Normal(pyro.param("m", torch.zeros(2)), pyro.param("s", torch.ones(2))).to_event(1))

    hessian = torch.eye(2) + design.T @ design
    slope = design.T @ torch.tensor([1.0, -1.0, 2.0])
    plain = gradients(ScoreRegression_ELBO(6), model, guide)
    found = gradients(ScoreRegression_ELBO(6, direction="newton"), model, guide)
    torch.testing.assert_close(plain["m"], slope)
    torch.testing.assert_close(found["m"], hessian.diagonal() * torch.linalg.solve(hessian, slope))
    torch.testing.assert_close(found["s"], plain["s"])


def test_newton_falls_back_where_there_is_no_maximum():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("valley", z.square().sum(-1))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("m", torch.ones(2)), pyro.param("s", torch.ones(2))).to_event(1))

    plain, found = (gradients(ScoreRegression_ELBO(6, direction=d), model, guide) for d in ("gradient", "newton"))
    torch.testing.assert_close(found["m"], plain["m"])
    torch.testing.assert_close(found["m"], torch.ones(2))


def bernoulli_guide():
    pyro.sample("g", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.sample("c", dist.Bernoulli(torch.tensor(0.5)))


REFUSED = {
    "a discrete site": (
        "guide site 'c' is a Bernoulli, which is not reparameterised: ScoreRegression_ELBO needs",
        lambda: ScoreRegression_ELBO(8).loss_and_grads(bernoulli_guide, bernoulli_guide),
    ),
    "newton in a minibatch": (
        "guide site 'z' stands in a subsampled plate, and the newton direction needs all coordinates at once",
        lambda: ScoreRegression_ELBO(16, direction="newton").loss_and_grads(
            rows_model, rows_guide, torch.tensor([0, 1])
        ),
    ),
    "a direction": ('direction must be "gradient" or "newton"', lambda: ScoreRegression_ELBO(direction="bfgs")),
    "a chunk": (
        "chunk_size must be a whole number that divides num_particles=10",
        lambda: Price_ELBO(10, chunk_size=4),
    ),
    "a chunk of a loop": (
        "chunk_size is for vectorised particles",
        lambda: Regression_ELBO(10, chunk_size=5, vectorize_particles=False),
    ),
    "particles in a wrong dimension": (
        "combined in the wrong dimensions",
        lambda: ScoreRegression_ELBO(8).loss(wrong_model, AutoNormal(wrong_model)),
    ),
}


def wrong_model():
    """Right for one particle; with several in front the design's rows meet the particles of the weights."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", 4):
        pyro.sample("x", dist.Normal((w[..., None, :] * torch.ones(4, 3)).sum(-1), 1.0), obs=torch.zeros(4))


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    match, run = REFUSED[case]
    with pytest.raises(ValueError, match=match):
        run()


def test_nothing_is_updated_when_a_particle_is_not_finite():
    def model():
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.factor("bad", torch.where(z > 0, math.nan, 0.0))

    def guide():
        scale = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), scale))

    for loss in (ScoreRegression_ELBO(8), Regression_ELBO(8), Price_ELBO(8)):
        with pyro.validation_enabled(False), pytest.raises(ValueError, match="first seen at model site 'bad'"):
            loss.loss_and_grads(model, guide)
        assert all(p.grad is None for _, p in pyro.get_param_store().named_parameters())


@pytest.mark.parametrize("name", LINEAR)
def test_rows_of_a_loop_are_met_one_by_one(name):
    """A plate gone through in a loop has other sites in every minibatch; each is regressed when it is met."""
    x = torch.linspace(-1.0, 2.0, 6)

    def rows(batch, fn):
        for i in pyro.plate("rows", 6, subsample=batch):
            fn(int(i))

    def model(batch):
        def row(i):
            z = pyro.sample(f"z{i}", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

        rows(batch, row)

    def guide(batch):
        def row(i):
            loc, scale = pyro.param(f"m{i}", torch.tensor(0.3)), pyro.param(f"s{i}", torch.tensor(0.5))
            pyro.sample(f"z{i}", dist.Normal(loc, scale))

        rows(batch, row)

    loss = LINEAR[name](num_particles=16)
    for batch in ([0, 1], [2, 4], [5, 3]):
        found = gradients(loss, model, guide, torch.tensor(batch))
        for i in batch:
            torch.testing.assert_close(found[f"m{i}"], 3 * (x[i] - 0.6))
            torch.testing.assert_close(found[f"s{i}"], torch.tensor(3 * (2 - 1.0)))
