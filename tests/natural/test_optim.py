"""NaturalGradient under stock SVI: paths, safeguards, minibatches, state, averages, what it refuses."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam
from torch.distributions import transform_to
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_elbo_ext import NaturalGradient, Price_ELBO, Regression_ELBO, ScoreRegression_ELBO
from pyro_elbo_ext.families import MULTIVARIATE_NORMAL
from pyro_elbo_ext.natural import natural_step
from pyro_elbo_ext.run.checkpoint import get_rng_state, set_rng_state
from tests.families.test_families import ARGUMENTS, families

SPREAD = {
    "scale_tril": constraints.lower_cholesky,
    "logits": constraints.real,
    "loc": constraints.real,
    "df": constraints.greater_than(2.0),
}


def block_of(family, q, **named):
    """The block of a hand-written guide with one site, its parameters set to the given arguments."""
    for name, value in q.items():
        constraint = named.get(name) or SPREAD.get(name, constraints.positive)
        pyro.param(name, value, constraint=constraint)
    fn = {"Normal": dist.Normal, "Beta": dist.Beta, "Wishart": dist.Wishart}.get(family.name)
    fn = fn or getattr(dist, family.name)

    def guide():
        values = {name: pyro.param(name) for name in q}
        pyro.sample("z", fn(**values, validate_args=False))

    optim = NaturalGradient()
    optim.discover(guide)
    return optim.blocks["z"]


def leaves_of(block):
    store = pyro.get_param_store()
    return {argument: store._params[name].detach() for argument, name in block.names.items()}


@families
@pytest.mark.parametrize("max_kl", [None, 0.2, 5.0])
def test_noisy_steps_stay_inside(family, max_kl):
    """Random gradients of any size: never outside the domain, never past the radius by the exact KL."""
    home = ARGUMENTS[family.name](())
    block = block_of(family, home)
    leaves, trail = leaves_of(block), None
    q = block.read(leaves)
    for i in range(300):
        size = 10.0 ** (i % 9 - 4)
        grads = {name: size * torch.randn_like(value) for name, value in leaves.items()}
        leaves, move, trail = natural_step(block, leaves, grads, torch.ones_like, max_kl, trail, True, i % 2 == 0)
        new = block.read(leaves)
        assert all(torch.isfinite(value).all() for value in new.values())
        moved = family.kl(new, q)
        slack = 1e-8 + 1e-12 * max(float(value.abs().max()) for value in (*q.values(), *new.values()))  # of lgamma
        assert moved > -slack
        if max_kl is not None:
            assert moved <= max_kl + slack
        torch.testing.assert_close(move.kl, moved, rtol=1e-3, atol=slack)
        q = new
        if i % 30 == 29:  # where the noise has led is no place to learn more from
            leaves, trail = block.write(home), None
            q = block.read(leaves)


@pytest.mark.parametrize("max_kl", [0.2, pytest.param(3.0, marks=pytest.mark.slow)])
def test_ten_thousand_noisy_steps(max_kl):
    """A normal of three dimensions under random gradients never leaves the cone and never passes the radius."""
    home = {"loc": torch.zeros(3), "scale_tril": torch.eye(3)}
    block = block_of(MULTIVARIATE_NORMAL, home)
    worst, moves = 0.0, 0
    for i in range(10_000):
        if i % 100 == 0:
            leaves, trail = block.write(home), None
            q = block.read(leaves)
        size = 10.0 ** (i % 5 - 2)
        grads = {name: size * torch.randn_like(value) for name, value in leaves.items()}
        leaves, _, trail = natural_step(block, leaves, grads, torch.ones_like, max_kl, trail, i // 100 % 3 == 0, True)
        new = block.read(leaves)
        kl = float(MULTIVARIATE_NORMAL.kl(new, q))
        worst, moves, q = max(worst, kl), moves + (kl > 1e-6), new
    assert moves > 6_000
    assert max_kl / 2 < worst <= max_kl * (1 + 1e-9)


def test_not_finite_gradients_change_nothing_and_are_counted():
    scale = pyro.param("scale", torch.tensor([0.5, 0.7, 0.9]), constraint=constraints.positive)
    loc = pyro.param("loc", torch.zeros(3))

    def guide():
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Normal(pyro.param("loc"), pyro.param("scale")))

    optim = NaturalGradient()
    optim.discover(guide)
    before = [p.unconstrained().detach().clone() for p in (loc, scale)]
    for value, row in ((math.nan, 0), (math.inf, 2)):
        for p in (loc, scale):
            p.unconstrained().grad = torch.full((3,), 0.1)
            p.unconstrained().grad[row] = value
        optim([loc.unconstrained(), scale.unconstrained()])
    after = [p.unconstrained().detach() for p in (loc, scale)]
    for old, new in zip(before, after, strict=True):
        assert torch.isfinite(new).all()
        assert new[1] != old[1]
    report = optim.report().blocks["z"]
    assert report.rejected == 2
    assert report.num_steps == 2


def paths(constraint, steps=6, loss=Trace_ELBO):
    pyro.clear_param_store()
    pyro.set_rng_seed(3)

    def model():
        x = pyro.sample("x", dist.Gamma(torch.tensor(3.0), 2.0))
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("y", dist.StudentT(4.0, z, 0.5), obs=torch.tensor([0.1, 0.4, 2.0, -1.0]))

    def guide():
        a, b = pyro.param("a", torch.tensor(2.0), constraint), pyro.param("b", torch.tensor(1.5), constraint)
        pyro.sample("x", dist.Gamma(a, b))
        with pyro.plate("data", 4):
            loc = pyro.param("loc", torch.zeros(4))
            pyro.sample("z", dist.Normal(loc, pyro.param("scale", torch.full((4,), 0.8), constraint)))

    svi = SVI(model, guide, NaturalGradient(lr=0.3), loss())
    found = []
    for _ in range(steps):
        svi.step()
        found.append(torch.cat([pyro.param(n).detach().reshape(-1) for n in ("a", "b", "loc", "scale")]))
    return torch.stack(found)


def test_the_path_does_not_depend_on_the_constraint():
    """Fed by the plain gradient of Trace_ELBO, which differs by the constraint, q takes the same path."""
    first = paths(constraints.positive)
    assert (first[-1] - first[0]).abs().max() > 0.05
    for constraint in (constraints.softplus_positive, constraints.interval(0.0, 20.0), constraints.greater_than(0.0)):
        torch.testing.assert_close(paths(constraint), first)


NUM_ROWS = 12
EXACT = {
    "scores": partial(ScoreRegression_ELBO, 5),
    "values": partial(Regression_ELBO, 6),
    "second derivatives": partial(Price_ELBO, 1),
}


def local_model(rows=None):
    """z_i ~ N(0, 1), x_i ~ N(z_i, 1): posteriors N(x_i / 2, 1 / 2), row by row."""
    with pyro.plate("rows", NUM_ROWS, subsample=rows) as i:
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.linspace(-2.0, 3.0, NUM_ROWS)[i])


def indexed_guide(rows=None):
    with pyro.plate("rows", NUM_ROWS, subsample=rows) as i:
        loc = pyro.param("loc", torch.full((NUM_ROWS,), 0.3))
        scale = pyro.param("scale", torch.full((NUM_ROWS,), 0.4), constraint=constraints.positive)
        pyro.sample("z", dist.Normal(loc[i], scale[i]))


def sliced_guide(rows=None):
    with pyro.plate("rows", NUM_ROWS, subsample=rows):
        loc = pyro.param("loc", torch.full((NUM_ROWS,), 0.3), event_dim=0)
        scale = pyro.param("scale", torch.full((NUM_ROWS,), 0.4), constraint=constraints.positive, event_dim=0)
        pyro.sample("z", dist.Normal(loc, scale))


@pytest.mark.convergence
@pytest.mark.parametrize("guide", [indexed_guide, sliced_guide], ids=["by index", "by plate"])
@pytest.mark.parametrize("loss", EXACT)
def test_rows_of_a_minibatch_are_exact_when_they_are_met(guide, loss):
    """Each row takes its own full step, without the plate's N/B, whatever the batch's size; the others stay."""
    optim = NaturalGradient()
    svi = SVI(local_model, guide, optim, EXACT[loss]())
    truth = torch.linspace(-2.0, 3.0, NUM_ROWS) / 2
    met = torch.zeros(NUM_ROWS, dtype=torch.bool)
    for rows in ([0, 3, 7, 8, 11], [5, 1], *[[1]] * 12, [2]):  # the schedule counts a row's own steps
        svi.step(torch.tensor(rows))
        met[rows] = True
        loc, scale = pyro.param("loc").detach(), pyro.param("scale").detach()
        torch.testing.assert_close(loc[met], truth[met])
        torch.testing.assert_close(scale[met], torch.full_like(scale[met], 0.5**0.5))
        assert (loc[~met] == 0.3).all()
        assert (scale[~met] == torch.tensor(0.4).log().exp()).all()


@pytest.mark.convergence
def test_a_parameter_shared_by_a_subsampled_plate_takes_one_step():
    """One mean and scale for all rows: their Fisher information is that of all N rows, of which a batch stands for."""

    def guide(rows=None):
        with pyro.plate("rows", NUM_ROWS, subsample=rows):
            loc = pyro.param("loc", torch.tensor(0.3))
            pyro.sample("z", dist.Normal(loc, pyro.param("scale", torch.tensor(0.4), constraint=constraints.positive)))

    optim = NaturalGradient(schedule="constant")
    svi = SVI(local_model, guide, optim, Price_ELBO(1))
    rows = torch.tensor([0, 3, 7])
    svi.step(rows)
    torch.testing.assert_close(pyro.param("loc").detach(), torch.linspace(-2.0, 3.0, NUM_ROWS)[rows].mean() / 2)
    torch.testing.assert_close(pyro.param("scale").detach(), torch.tensor(0.5**0.5))


def masked(fn, keep):
    def run(rows=None):
        with pyro.poutine.mask(mask=keep if rows is None else keep[rows]):
            fn(rows)

    return run


@pytest.mark.convergence
def test_found_on_the_full_batch_then_given_minibatches():
    optim = NaturalGradient()
    svi = SVI(local_model, indexed_guide, optim, ScoreRegression_ELBO(5))
    optim.discover(indexed_guide, torch.arange(NUM_ROWS))
    for rows in (torch.arange(4), torch.arange(4, NUM_ROWS)):
        svi.step(rows)
    torch.testing.assert_close(pyro.param("loc").detach(), torch.linspace(-2.0, 3.0, NUM_ROWS) / 2)


@pytest.mark.convergence
def test_masked_rows():
    """Exact on the full batch; in minibatches nobody knows how many rows there were, so Adam has them."""
    keep = torch.arange(NUM_ROWS) % 3 > 0
    model, guide = masked(local_model, keep), masked(indexed_guide, keep)
    optim = NaturalGradient()
    SVI(model, guide, optim, ScoreRegression_ELBO(5)).step()
    torch.testing.assert_close(pyro.param("loc").detach()[keep], (torch.linspace(-2.0, 3.0, NUM_ROWS) / 2)[keep])
    with pytest.raises(ValueError, match="its mask hides how many rows a minibatch has"):
        NaturalGradient().discover(guide, torch.tensor([1, 2]))


@pytest.mark.convergence
def test_minibatches_of_a_global_site_settle_where_they_should():
    """Forty of two thousand are ones, one in fifty minibatches has any surprise: taking steps back must not bias it."""
    flips = (torch.arange(2000) % 50 == 0).to(torch.get_default_dtype())

    def model(rows):
        p = pyro.sample("p", dist.Beta(torch.tensor(1.0), 1.0))
        with pyro.plate("flips", 2000, subsample=rows):
            pyro.sample("x", dist.Bernoulli(p), obs=flips[rows])

    def guide(rows):
        a = pyro.param("a", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("p", dist.Beta(a, pyro.param("b", torch.tensor(1.0), constraint=constraints.positive)))

    optim = NaturalGradient()
    svi = SVI(model, guide, optim, Regression_ELBO(8))
    for _ in range(800):
        svi.step(torch.randperm(2000)[:20])
    assert optim.report().blocks["p"].retreats > 0
    assert abs(pyro.param("a").item() - 41) < 12
    assert abs(pyro.param("b").item() - 1961) < 12


@pytest.mark.convergence
def test_a_store_that_was_cleared_is_looked_at_again():
    """Parameters of the same names that form other sites are not stepped as if they were the old ones."""

    def normal():
        pyro.sample("a", dist.Normal(pyro.param("p", torch.tensor(1.0)), pyro.param("q", torch.tensor(2.0))))

    def gamma():
        positive = {"constraint": constraints.positive}
        pyro.sample("a", dist.Gamma(pyro.param("p", torch.tensor(1.0), **positive), pyro.param("q", torch.tensor(2.0))))

    def model():
        pyro.sample("a", dist.Gamma(torch.tensor(1.0), 1.0))

    optim = NaturalGradient()
    SVI(lambda: pyro.sample("a", dist.Normal(torch.tensor(0.0), 1.0)), normal, optim, ScoreRegression_ELBO(6)).step()
    pyro.clear_param_store()
    SVI(model, gamma, optim, Regression_ELBO(8)).step()
    assert optim.report().blocks["a"].family == "Gamma"
    torch.testing.assert_close(pyro.param("p").detach(), torch.tensor(1.0))
    torch.testing.assert_close(pyro.param("q").detach(), torch.tensor(1.0))


def test_a_parameter_whose_partner_is_hidden_goes_to_the_inner_optimizer():
    guide = AutoNormal(two_normals)
    guide()
    optim = NaturalGradient(guide)
    svi = SVI(two_normals, pyro.poutine.block(guide, hide=["AutoNormal.locs.a"]), optim, ScoreRegression_ELBO(6))
    before = guide.scales.a.detach().clone()
    svi.step()
    assert guide.scales.a != before
    assert optim.report().others["AutoNormal.scales.a"] == "'AutoNormal.locs.a' is not trained beside it"


@pytest.mark.convergence
def test_a_constraint_on_the_way_shortens_the_step():
    """The posterior's sd is below what the parameter may be: the mean must be found all the same."""
    data = torch.linspace(1.0, 3.0, 40)

    def model():
        m = pyro.sample("m", dist.Normal(torch.tensor(0.0), 2.0))
        with pyro.plate("data", 40):
            pyro.sample("x", dist.Normal(m, 1.0), obs=data)

    def guide():
        scale = pyro.param("scale", torch.tensor(0.9), constraint=constraints.greater_than(0.3))
        pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.0)), scale))

    svi = SVI(model, guide, NaturalGradient(), ScoreRegression_ELBO(6))
    for _ in range(40):
        svi.step()
    assert pyro.param("loc").item() == pytest.approx(80 / 40.25, abs=0.25)
    assert pyro.param("scale").item() == pytest.approx(0.3, abs=0.01)


def mixed_model():
    """A regression whose slopes are parameters, its intercept and its noise random."""
    x = torch.linspace(-1.0, 1.0, 20)[:, None] ** torch.arange(1, 4)
    slopes = pyro.param("slopes", torch.zeros(3))
    shift = pyro.sample("shift", dist.Normal(torch.tensor(0.0), 3.0))
    noise = pyro.sample("noise", dist.Gamma(torch.tensor(2.0), 2.0))
    with pyro.plate("data", 20):
        pyro.sample("y", dist.Normal(x @ slopes + shift, noise), obs=(3 * x[:, 0]).sin() + 0.5)


LOSSES = {
    "scores": partial(ScoreRegression_ELBO, 6),
    "values": partial(Regression_ELBO, 12),
    "path": partial(Trace_ELBO, 4, vectorize_particles=True, max_plate_nesting=1),
}


MODES = {"natural": {}, "ivon": {"mode": "ivon", "lr": 0.1}, "radius": {"max_kl": 0.1}}


def train(steps, folder=None, loss=LOSSES["scores"], auto=AutoNormal, **settings):
    """Train, through files, a new guide and a new optimiser half way if a folder is given."""
    pyro.clear_param_store()
    pyro.set_rng_seed(11)

    def make():
        return NaturalGradient(average_after=2, optim=Adam({"lr": 0.02}), **{"lr": 0.5, **settings})

    svi = SVI(mixed_model, auto(mixed_model), make(), loss())
    losses = [svi.step() for _ in range(steps // 2)]
    if folder is not None:
        svi.optim.save(folder / "optim")
        pyro.get_param_store().save(folder / "params")
        random = get_rng_state()
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        pyro.get_param_store().load(folder / "params")
        optim = make()
        optim.load(folder / "optim")
        svi = SVI(mixed_model, auto(mixed_model), optim, loss())
        svi.guide(), svi.evaluate_loss()
        set_rng_state(random)
    losses += [svi.step() for _ in range(steps - steps // 2)]
    params = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    with svi.optim.averaged():
        params |= {f"average of {name}": value.detach().clone() for name, value in pyro.get_param_store().items()}
    return losses, params, svi.optim


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "settings", [{}, {"mode": "ivon", "lr": 0.1}, {"max_kl": 0.1}], ids=["natural", "ivon", "radius"]
)
def test_saved_and_loaded_half_way_equals_uninterrupted(tmp_path, loss, settings):
    losses, params, optim = train(12, loss=LOSSES[loss], **settings)
    again, found, other = train(12, tmp_path, loss=LOSSES[loss], **settings)
    assert losses == again
    assert losses[0] != losses[-1]
    assert params.keys() == found.keys()
    assert all(torch.equal(params[name], found[name]) for name in params)
    assert str(optim.report()) == str(other.report())
    torch.load(tmp_path / "optim", weights_only=True)


@pytest.mark.convergence
def test_parameters_of_the_model_go_to_the_inner_optimizer():
    _, params, optim = train(40)
    report = optim.report()
    assert set(report.blocks) == {"shift_unconstrained", "noise_unconstrained"}
    assert report.others == {"slopes": "no parameter of the guide"}
    assert params["slopes"].abs().max() > 0.3
    assert "inner optimiser: slopes" in str(report)
    assert all(block.num_steps == 40 and block.family == "Normal" for block in report.blocks.values())


@pytest.mark.convergence
def test_same_optimum_as_adam():
    """Model parameters and guide together end where Adam alone ends, in a fifth of its steps."""
    _, natural, optim = train(300)
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    svi = SVI(mixed_model, AutoNormal(mixed_model), Adam({"lr": 0.02}), LOSSES["path"]())
    for _ in range(1500):
        svi.step()
    for name, value in pyro.get_param_store().items():
        torch.testing.assert_close(natural[name], value.detach(), atol=0.08, rtol=0.15)
    assert natural["slopes"].abs().max() > 1


def test_averaging_in_natural_coordinates():
    """The average of normals is that of their precisions, and of their precisions times their means."""
    loc = pyro.param("loc", torch.zeros(()))
    pyro.param("scale", torch.ones(()), constraint=constraints.positive)

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc"), pyro.param("scale")))

    optim = NaturalGradient(schedule="constant", lr=0.4, average_after=1)
    optim.discover(guide)
    with pytest.raises(ValueError, match="no iterate has been averaged after 0 steps with average_after=1"):
        optim.use_average()
    leaves, iterates = list(pyro.get_param_store()._params.values()), []
    for _ in range(4):
        for leaf in leaves:
            leaf.grad = torch.randn(())
        optim(leaves)
        iterates.append((pyro.param("loc").item(), pyro.param("scale").item() ** -2))
    last = loc.item()
    precision = sum(p for _, p in iterates[1:]) / 3
    mean = sum(m * p for m, p in iterates[1:]) / 3 / precision
    with optim.averaged():
        assert pyro.param("loc").item() == pytest.approx(mean)
        assert pyro.param("scale").item() == pytest.approx(precision**-0.5)
        with pytest.raises(ValueError, match="a step inside averaged"):
            optim(leaves)
    assert pyro.param("loc").item() == last
    optim.use_average()
    assert pyro.param("loc").item() == pytest.approx(mean)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5] * 9),
        ("inverse", [0.5] * 7 + [0.5 / 1.25, 0.5 / 1.5]),
        (lambda step: (step + 1) ** -0.7, [0.5 * (step + 1) ** -0.7 for step in range(9)]),
    ],
    ids=["constant", "inverse", "own"],
)
def test_schedules(schedule, rates):
    def model():
        pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))

    svi = SVI(model, AutoNormal(model), NaturalGradient(lr=0.5, schedule=schedule), ScoreRegression_ELBO(4))
    for rate in rates:
        svi.step()
        assert svi.optim.report().blocks["z_unconstrained"].step == pytest.approx(rate)


@families
def test_traceable_into_one_graph_without_a_host_sync(family):
    block = block_of(family, ARGUMENTS[family.name](()))
    leaves = leaves_of(block)
    grads = {name: torch.randn_like(value) for name, value in leaves.items()}
    _, _, trail = natural_step(block, leaves, grads, torch.ones_like, 0.5)

    def step(leaves, grads, lr, trail):
        with torch.no_grad():
            return natural_step(block, leaves, grads, lambda clock: lr / (1 + clock), 0.5, trail, True, True)

    graph = make_fx(step)(leaves, grads, torch.tensor(0.1), trail)
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert not [call for call in calls if "local_scalar" in call or "nonzero" in call or "is_same_size" in call]
    leaves = {name: value + 0.05 for name, value in leaves.items()}
    grads = {name: 3 * torch.randn_like(value) for name, value in leaves.items()}
    ours, theirs = (run(leaves, grads, torch.tensor(0.3), trail) for run in (graph, step))
    for name, value in theirs[0].items():
        assert torch.equal(ours[0][name], value)
        assert not torch.equal(value, leaves[name])


def ivon_reference(gradients, loc, scale, lr, rho, beta):
    """The published update written down for scalars: h = 1 / (N sigma^2), with the prior inside the loss."""
    momentum, path = 0.0, []
    for t, (g, gs) in enumerate(gradients, 1):
        precision = scale**-2
        hessian = precision * (scale * gs + 1)  # Price: the curvature that a pathwise scale gradient stands for
        new = (1 - rho) * precision + rho * hessian + rho**2 / 2 * (precision - hessian) ** 2 / precision
        momentum = beta * momentum + (1 - beta) * g
        loc -= lr * momentum / (1 - beta**t) / new
        scale = new**-0.5
        path.append((loc, scale))
    return path


def test_ivon_is_the_published_update():
    pyro.param("loc", torch.tensor(0.4))
    pyro.param("scale", torch.tensor(0.5), constraint=constraints.softplus_positive)

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc"), pyro.param("scale")))

    optim = NaturalGradient(lr=0.3, schedule="constant", mode="ivon", precision_lr=0.2, momentum=0.8)
    optim.discover(guide)
    store = pyro.get_param_store()
    gradients = [(0.7, -1.0), (-0.2, 4.0), (1.1, -30.0), (0.5, 2.0)]
    for (g, gs), (loc, scale) in zip(gradients, ivon_reference(gradients, 0.4, 0.5, 0.3, 0.2, 0.8), strict=True):
        leaf = store._params["scale"]
        slope = torch.func.grad(transform_to(constraints.softplus_positive))(leaf.detach())
        store._params["loc"].grad, leaf.grad = torch.tensor(g), gs * slope
        optim(list(store._params.values()))
        assert pyro.param("loc").item() == pytest.approx(loc)
        assert pyro.param("scale").item() == pytest.approx(scale)


def test_ivon_clips_and_keeps_the_rows_it_does_not_meet():
    optim = NaturalGradient(lr=50.0, schedule="constant", mode="ivon", clip_radius=0.5)
    svi = SVI(local_model, indexed_guide, optim, Trace_ELBO())
    svi.step(torch.tensor([0, 3]))
    moved = (pyro.param("loc").detach() - 0.3).abs()
    assert ((moved[[0, 3]] > 0) & (moved[[0, 3]] <= 0.5 * 0.4 * 1.01)).all()
    assert (moved.nonzero()[:, 0] == torch.tensor([0, 3])).all()


def test_outside_of_svi():
    """A plain loop over differentiable_loss needs the guide told."""
    guide, optim = AutoMultivariateNormal(mixed_model), NaturalGradient()
    loss = ScoreRegression_ELBO(6)(mixed_model, guide)
    loss().backward()
    params = list(pyro.get_param_store()._params.values())
    with pytest.raises(ValueError, match="does not know the guide outside of SVI.step"):
        optim(params)
    optim.discover(guide)
    before = guide.loc.detach().clone()
    optim(params)
    assert not torch.equal(guide.loc, before)


def bad_optim(match, **settings):
    return match, lambda: NaturalGradient(**settings)


REFUSED = {
    "Adam's arguments": bad_optim("betas and the like would rescale", lr={"lr": 1.0, "betas": (0.9, 0.99)}),
    "clip_args": bad_optim("would cut natural gradients coordinate by coordinate", clip_args={"clip_norm": 1.0}),
    "an optimiser as guide": bad_optim("The optimiser of other parameters is optim=", guide=Adam({"lr": 0.1})),
    "a step of zero": bad_optim("lr must be a positive number", lr=0.0),
    "a schedule": bad_optim('schedule must be one of "inverse", "constant"', schedule="cosine"),
    "a radius": bad_optim("max_kl must be a positive number of nats", max_kl=-1.0),
    "an inner optimiser": bad_optim("optim must be a pyro.optim.PyroOptim", optim=torch.optim.Adam),
    "a number of opening steps": bad_optim("retreat must be a number of opening steps", retreat=True),
    "an average": bad_optim("average_after must be a number of steps", average_after=-1),
    "a mode": bad_optim('mode must be "natural" or "ivon"', mode="vogn"),
    "a radius of ivon": bad_optim("max_kl does nothing under mode='ivon'", mode="ivon", max_kl=1.0),
    "momentum without ivon": bad_optim("momentum does nothing under mode='natural'", momentum=0.9),
    "a precision step": bad_optim("0 < precision_lr <= 1", mode="ivon", precision_lr=2.0),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_once(case):
    match, make = REFUSED[case]
    with pytest.raises(ValueError, match=match):
        make()


def shared_guide():
    loc = pyro.param("loc", torch.tensor(0.3))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    pyro.sample("a", dist.Normal(loc, scale))
    pyro.sample("b", dist.Normal(pyro.param("other", torch.tensor(0.1)), scale))


def two_normals():
    a = pyro.sample("a", dist.Normal(torch.tensor(0.0), 1.0))
    b = pyro.sample("b", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.sample("x", dist.Normal(a + b, 1.0), obs=torch.tensor(0.4))


def wrong_state():
    optim = NaturalGradient()
    svi = SVI(mixed_model, AutoNormal(mixed_model), optim, ScoreRegression_ELBO(6))
    svi.step()
    state = optim.get_state()
    pyro.clear_param_store()
    other = NaturalGradient()
    other.set_state(state)
    return SVI(two_normals, AutoNormal(two_normals), other, ScoreRegression_ELBO(6))


def svi(model, guide, loss, **settings):
    return lambda: SVI(model, guide(model) if isinstance(guide, type) else guide, NaturalGradient(**settings), loss)


REFUSED_WHEN_RUN = {
    "a shared parameter": (
        "parameter 'scale' is used by guide sites 'a' and 'b'",
        svi(two_normals, shared_guide, ScoreRegression_ELBO(6)),
    ),
    "no site": ("the guide has no site that NaturalGradient can step", svi(two_normals, AutoDelta, Trace_ELBO())),
    "low rank": (
        "a LowRankMultivariateNormal has no natural coordinates",
        svi(two_normals, AutoLowRankMultivariateNormal, Trace_ELBO()),
    ),
    "ivon on full rank": (
        "is a MultivariateNormal, and mode='ivon' is for normal sites",
        svi(two_normals, AutoMultivariateNormal, Trace_ELBO(), mode="ivon"),
    ),
    "few particles at scores": (
        "has 2 coordinates, and the regression of their scores needs num_particles >= 3",
        svi(two_normals, AutoMultivariateNormal, ScoreRegression_ELBO(2)),
    ),
    "few particles at values": (
        "with 5 statistics, whose regression needs num_particles >= 6",
        svi(two_normals, AutoMultivariateNormal, Regression_ELBO(5)),
    ),
    "few particles at newton": (
        "direction='newton' needs num_particles >= 3",
        svi(two_normals, AutoNormal, ScoreRegression_ELBO(2, direction="newton")),
    ),
    "newton at full rank": (
        "whose natural gradient is Newton's step",
        svi(two_normals, AutoMultivariateNormal, ScoreRegression_ELBO(8, direction="newton")),
    ),
    "the state of another guide": ("the state is of another guide: site 'a_unconstrained' is missing", wrong_state),
}


@pytest.mark.parametrize("case", REFUSED_WHEN_RUN)
def test_refused_when_run(case):
    match, make = REFUSED_WHEN_RUN[case]
    run = make()
    with pytest.raises(ValueError, match=match):
        run.step()


def test_state_of_another_optimizer_is_refused():
    with pytest.raises(ValueError, match="this is no state of a NaturalGradient"):
        NaturalGradient().set_state(Adam({"lr": 0.1}).get_state())


def test_a_state_that_does_not_fit_is_refused_at_once_after_discovery():
    _, _, optim = train(4)
    state = optim.get_state()
    pyro.clear_param_store()
    run = SVI(two_normals, AutoNormal(two_normals), NaturalGradient(), ScoreRegression_ELBO(6))
    run.step()
    with pytest.raises(ValueError, match="of another guide"):
        run.optim.set_state(state)
