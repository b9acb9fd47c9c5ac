"""The export holds what the pair says, under either major of ArviZ, and each opens the other's files.

The files in tests/data were written by this module's command line, once under ArviZ 0.23.4 and once under 1.3.0, and
are compressed, for HDF5 leaves room between so many small variables:

    python -m tests.test_arviz tests/data/eight_schools_arviz0.nc && gzip -9n tests/data/eight_schools_arviz0.nc
    python -m tests.test_arviz tests/data/eight_schools_arviz1.nc && gzip -9n tests/data/eight_schools_arviz1.nc
"""

import gzip
import importlib
import inspect
import math
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal

from pyro_elbo_ext import AutoFlow
from pyro_elbo_ext.arviz import GROUPS, _import_arviz, loo, to_arviz
from tests import cases

az = _import_arviz()
MODERN = "data" in inspect.signature(az.from_dict).parameters  # ArviZ 1.x
DATA = Path(__file__).parent / "data"
FILES = ("eight_schools_arviz0", "eight_schools_arviz1")
SCHOOLS = list(range(1, 9))


def effects(**like):
    return torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], **like), torch.tensor(
        [15.0, 10, 16, 11, 9, 11, 10, 18], **like
    )


def schools(sigma, y):
    """The eight schools of Rubin (1981), non-centred."""
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(y.new_full((), 5.0)))
    with pyro.plate("school", len(y)):
        z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def fitted(seed, sigma, y, steps=50, lr=0.1):
    """A restart in a param store of its own: guide, state, losses."""
    pyro.set_rng_seed(seed)
    with pyro.get_param_store().scope() as state:
        guide = AutoNormal(schools)
        elbo = Trace_ELBO(10, vectorize_particles=True, max_plate_nesting=1)
        svi = SVI(schools, guide, pyro.optim.Adam({"lr": lr}), elbo)
        losses = [svi.step(sigma, y) for _ in range(steps)]
    return guide, state, losses


def eight_schools(num_samples=60, **like):
    y, sigma = effects(**like)
    runs = [fitted(seed, sigma, y) for seed in (0, 1)]
    return to_arviz(
        schools,
        [(guide, state) for guide, state, _ in runs],
        sigma,
        y,
        num_samples=num_samples,
        history=[{"loss": losses} for *_, losses in runs],
        coords={"school": SCHOOLS},
        dims={"sigma": ["school"]},
        seed=0,
    )


def group_names(data):
    names = data.groups() if callable(data.groups) else data.groups
    return {name.strip("/") for name in names} - {""}


@pytest.fixture(scope="module")
def exported():
    pyro.clear_param_store()
    return eight_schools(400, dtype=torch.float64)


def array(data, group, name):
    return torch.as_tensor(np.array(data[group][name].values))


# ---- what is exported


def test_groups_and_dims(exported):
    chain = ("chain", "draw")
    local = (*chain, "school")
    latents = {"mu": chain, "tau": chain, "z": local, "theta": local}
    expected = {
        "posterior": latents,
        "prior": latents,
        "posterior_predictive": {"y": local},
        "prior_predictive": {"y": local},
        "log_likelihood": {"y": local},
        "sample_stats": {"lp": chain, "log_q": chain, "log_weight": chain},
        "observed_data": {"y": ("school",)},
        "constant_data": {"sigma": ("school",)},
        "svi": {"loss": ("chain", "step")},
    }
    assert group_names(exported) == set(GROUPS) == set(expected)
    for group, variables in expected.items():
        assert {name: value.dims for name, value in exported[group].data_vars.items()} == variables, group
    assert exported["posterior"].sizes == {"chain": 2, "draw": 400, "school": 8}
    assert exported["prior"].sizes["chain"] == 1
    assert list(exported["posterior"]["school"].values) == SCHOOLS


def test_values_are_the_pairs(exported):
    y, sigma = effects()
    mu, tau, z, theta = (array(exported, "posterior", name) for name in ("mu", "tau", "z", "theta"))
    assert torch.allclose(theta, mu[..., None] + tau[..., None] * z)
    log_likelihood = dist.Normal(theta, sigma).log_prob(y)
    assert torch.allclose(array(exported, "log_likelihood", "y"), log_likelihood)
    prior = (
        dist.Normal(0.0, 5.0).log_prob(mu)
        + dist.HalfNormal(5.0).log_prob(tau)
        + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    )
    # AutoNormal's Jacobian of tau = exp(u) stands on the model's side.
    assert torch.allclose(array(exported, "sample_stats", "lp"), prior + log_likelihood.sum(-1) + tau.log())
    stats = exported["sample_stats"]
    assert np.allclose(stats["lp"] - stats["log_q"], stats["log_weight"])
    assert np.allclose(exported.attrs["elbo"], stats["log_weight"].mean("draw"))
    assert np.allclose(exported.attrs["elbo_se"], stats["log_weight"].std("draw", ddof=1) / 20)
    assert torch.allclose(array(exported, "observed_data", "y"), y)
    assert torch.allclose(array(exported, "constant_data", "sigma"), sigma)


def assert_normal(values, loc, scale, limit=4.0):
    """Mean and variance of independent draws, by z-tests."""
    values = values if isinstance(values, torch.Tensor) else torch.as_tensor(values.values)
    z = ((values - loc) / scale).flatten()
    assert abs(z.mean()) * len(z) ** 0.5 < limit
    assert abs((z**2).mean() - 1) * (len(z) / 2) ** 0.5 < limit


def test_predictions(exported):
    _, sigma = effects()
    predicted = exported["posterior_predictive"]["y"] - exported["posterior"]["theta"]
    assert_normal(predicted, 0.0, sigma)
    assert_normal(exported["prior_predictive"]["y"] - exported["prior"]["theta"], 0.0, sigma)
    assert_normal(exported["prior"]["z"], 0.0, 1.0)
    assert_normal(exported["prior"]["mu"], 0.0, 5.0)


def test_attributes(exported):
    attrs = exported.attrs
    assert (attrs["inference_library"], attrs["guide"], attrs["model"]) == ("pyro_elbo_ext", "AutoNormal", "schools")
    assert (attrs["num_samples"], attrs["correct"], attrs["seed"]) == (400, "none", 0)
    weights = array(exported, "sample_stats", "log_weight")
    assert np.allclose(attrs["pareto_k"], [float(pyro_khat(w)) for w in weights], atol=2e-3)
    assert np.allclose(attrs["ess"], [float(w.softmax(0).pow(2).sum().reciprocal()) for w in weights])


def pyro_khat(log_weights):
    from pyro.ops.stats import fit_generalized_pareto

    num = len(log_weights)
    ordered = (log_weights - log_weights.max()).sort().values
    tail = math.ceil(min(0.2 * num, 3 * num**0.5))
    return fit_generalized_pareto(ordered[-tail:].exp() - ordered[-tail - 1].exp())[0]


def nested(x, scale=1.0):
    """Two nested plates, events, a mask and a scale, names of every kind."""
    mask = torch.tensor([[True, False, True], [True, True, True]])
    w = pyro.sample("net/w", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("outer", 2, dim=-2), poutine.scale(scale=scale):
        a = pyro.sample("a", dist.Normal(torch.zeros(2, 1, 4), 1.0).to_event(1))
        with pyro.plate("inner", 3, dim=-1):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            total = pyro.deterministic("total", a.sum(-1) + k)
            pyro.deterministic("half", a / 2, event_dim=1)
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(total, 1.0), obs=x)
    pyro.deterministic("v", 2 * w)


def nested_guide(x, scale=1.0):
    pyro.sample("net/w", dist.Dirichlet(torch.full((3,), 2.0)))
    with pyro.plate("outer", 2, dim=-2), poutine.scale(scale=scale):
        pyro.sample("a", dist.Normal(torch.ones(2, 1, 4), 0.5).to_event(1))
        with pyro.plate("inner", 3, dim=-1):
            pyro.sample("k", dist.Bernoulli(0.3))


@pytest.mark.parametrize("vectorize", [True, False])
def test_nested_plates_events_masks_and_scales(vectorize):
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    data = to_arviz(nested, nested_guide, x, 0.5, num_samples=30, chunk_size=20, vectorize=vectorize, seed=1)
    dims = {name: value.dims[2:] for name, value in data["posterior"].data_vars.items()}
    assert dims == {
        "net.w": ("net.w_dim_0",),
        "a": ("outer", "a_dim_0"),
        "k": ("outer", "inner"),
        "total": ("outer", "inner"),
        "half": ("outer", "half_dim_0"),
        "v": ("v_dim_0",),
    }
    total = array(data, "posterior", "a").sum(-1)[..., None] + array(data, "posterior", "k")
    assert torch.allclose(array(data, "posterior", "total"), total)
    expected = dist.Normal(total, 1.0).log_prob(x)
    expected[..., 0, 1] = 0.0  # masked
    assert torch.allclose(array(data, "log_likelihood", "x"), expected)  # and not scaled
    assert "constant_data" not in group_names(data)
    assert_normal(array(data, "posterior_predictive", "x") - total, 0.0, 1.0)


def test_weights_by_plate():
    data = to_arviz(cases.local_model, cases.local_guide, num_samples=50, seed=0)
    stats = data["sample_stats"]
    assert stats["log_weight_local"].dims == ("chain", "draw", "data")
    assert np.allclose(stats["log_weight_local"].sum("data"), stats["log_weight"])
    assert {name: v.dims for name, v in data["svi"].data_vars.items()} == dict.fromkeys(
        ("pareto_k", "ess"), ("chain", "data")
    )


def point_export(guide, **options):
    return to_arviz(schools, guide, *reversed(effects()), num_samples=5, **options)


def test_point_estimates():
    data = point_export(AutoDelta(schools))
    assert group_names(data) == set(GROUPS) - {"sample_stats", "svi"}
    assert float(data["posterior"]["mu"].std()) == 0 and float(data["posterior_predictive"]["y"].std()) > 0
    with pytest.raises(ValueError, match="sample_stats with log_weight: it holds a point estimate"):
        loo(data)


@pytest.mark.parametrize("guide", [AutoDiagonalNormal, AutoFlow], ids=lambda guide: guide.__name__)
def test_guides_with_one_joint_draw(guide):
    y, sigma = effects()
    data = to_arviz(schools, guide(schools), sigma, y, num_samples=10, groups=("posterior", "log_likelihood"))
    assert set(data["posterior"].data_vars) == {"mu", "tau", "z", "theta"}  # no auxiliary sites
    expected = dist.Normal(array(data, "posterior", "theta"), sigma).log_prob(y)
    assert torch.allclose(array(data, "log_likelihood", "y"), expected)


def test_vae():
    from tests.model_files import MODELS

    vae = MODELS["vae"].VAE(9, latent=2, hidden=4, num_images=100, batch_size=None)
    x = torch.rand(5, 9).round()
    data = to_arviz(vae.model, vae.guide, x, num_samples=30, correct="psis", dims={"x": ["pixel"]})
    assert data["posterior"]["z"].dims == ("chain", "draw", "data", "z_dim_0")
    assert data["posterior_predictive"]["x"].dims == ("chain", "draw", "data", "pixel")
    with torch.no_grad():
        expected = vae.likelihood(array(data, "posterior", "z")).log_prob(x)
    assert torch.allclose(array(data, "log_likelihood", "x"), expected)  # of one image, though the plate is scaled
    assert np.allclose(data["sample_stats"]["psis_weight_local"].sum("draw"), 1)


def test_obs_none_convention_and_names_of_plates():
    def model(data, y=None):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("y", 4):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(b * data, 1.0), obs=y)

    given = {"data": torch.linspace(-1, 1, 4), "y": torch.zeros(4)}
    guide = AutoNormal(model)
    data = to_arviz(model, guide, **given, num_samples=5, dims={"data": ["y"]})
    assert set(data["constant_data"].data_vars) == {"data"}  # y was observed
    assert data["posterior_predictive"]["obs"].dims == ("chain", "draw", "y")
    clash = to_arviz(poutine.condition(model, {"obs": given["y"]}), guide, given["data"], given["y"] + 1, num_samples=5)
    assert clash["posterior"]["z"].dims == ("chain", "draw", "y_dim")  # an argument is called y as well


def test_groups_and_seed():
    draw = partial(to_arviz, cases.local_model, cases.local_guide, num_samples=3, groups=("posterior",))
    state = torch.get_rng_state()
    first = draw(seed=3)
    assert group_names(first) == {"posterior"}
    assert np.array_equal(first["posterior"]["z"], draw(seed=3)["posterior"]["z"])
    assert torch.equal(state, torch.get_rng_state())
    assert not np.array_equal(draw()["posterior"]["z"], draw()["posterior"]["z"])


def test_history():
    class Result:
        history = {"loss": [3.0, 2.0], "stage": np.array([0, 1])}

    draw = partial(to_arviz, cases.local_model, num_samples=3, groups=("svi",))
    several = draw([cases.local_guide, wide_guide], history=[{"loss": [3.0, 2.0]}, {"loss": [4.0]}])["svi"]["loss"]
    assert several.dims == ("chain", "step") and np.array_equal(several, [[3, 2], [4, np.nan]], equal_nan=True)
    draw = partial(to_arviz, cases.global_model, cases.global_guide, num_samples=3, groups=("svi",))
    svi = draw(history=Result())["svi"]
    assert svi["loss"].dims == svi["stage"].dims == ("step",) and list(svi["stage"].values) == [0, 1]


# ---- corrections


def wide_guide(loc=0.4, scale=1.1):
    with pyro.plate("data", cases.NUM_DATA):
        pyro.sample("z", dist.Normal(loc, scale))


def test_resampling_by_plate_draws_the_posterior():
    """Posterior N(x / 2, 1 / 2) of each datum; the error of resampling is that of its effective sample size."""
    draw = partial(to_arviz, cases.local_model, wide_guide, num_samples=4000, chunk_size=4000, seed=2)
    data, raw = (draw(correct=c, groups=("posterior", "sample_stats", "svi")) for c in ("resample", None))
    ess, x = array(data, "svi", "ess")[0], cases.data()
    z, unweighted = array(data, "posterior", "z")[0], array(raw, "posterior", "z")[0]
    assert (ess > 400).all()
    for draws, close in ((z, True), (unweighted, False)):
        mean = (draws.mean(0) - x / 2) * (2 * ess).sqrt()
        spread = (draws.var(0) * 2 - 1) * (ess / 2).sqrt()
        assert bool((mean.abs() < 4).all() and (spread.abs() < 4).all()) == close
    assert torch.corrcoef(z.T).triu(1).abs().max() < 5 * 4000**-0.5  # elements stay independent
    assert list(data["sample_stats"].data_vars) == ["lp"]
    expected = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
    assert torch.allclose(array(data, "sample_stats", "lp")[0], expected.sum(-1))


def mean_model(y):
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def mean_guide(y):
    pyro.sample("mu", dist.Normal(y.sum() / (len(y) + 1) + 0.1, 0.5))


@pytest.mark.parametrize("correct", ["resample", "psis"])
def test_joint_weights_draw_the_posterior(correct):
    y = torch.linspace(-1.0, 2.0, 7)
    data = to_arviz(mean_model, mean_guide, y, num_samples=4000, chunk_size=4000, correct=correct, seed=0)
    mu = array(data, "posterior", "mu")[0]
    weight = array(data, "sample_stats", "psis_weight")[0] if correct == "psis" else torch.full_like(mu, 1 / 4000)
    assert torch.isclose(weight.sum(), torch.tensor(1.0))
    mean = (weight * mu).sum()
    variance = (weight * (mu - mean) ** 2).sum()
    ess = data.attrs["ess"]
    assert abs(mean - y.sum() / 8) * (8 * ess) ** 0.5 < 4
    assert abs(variance * 8 - 1) * (ess / 2) ** 0.5 < 4


def test_systematic_resampling_counts():
    from pyro_elbo_ext.diagnostics.resampling import systematic

    weights = torch.tensor([[0.5, 0.1], [0.25, 0.1], [0.25, 0.2], [0.0, 0.6]])
    chosen = systematic(weights.log())
    assert torch.bincount(chosen[:, 0], minlength=4).tolist() == [2, 1, 1, 0]
    many = torch.stack([systematic(weights.log())[:, 1] for _ in range(500)])
    first = torch.bincount(many[:, 0], minlength=4) / 500  # in random order: every place has every draw
    assert ((first - weights[:, 1]).abs() < 4 * 0.5 / 500**0.5).all()
    counts = torch.stack([torch.bincount(chosen, minlength=4) for chosen in many])
    assert ((counts >= (4 * weights[:, 1]).floor()) & (counts <= (4 * weights[:, 1]).ceil())).all()
    assert ((counts.double().mean(0) - 4 * weights[:, 1]).abs() < 4 * 0.5 / 500**0.5).all()


# ---- leave-one-out


def exact_loo(y):
    rest = (y.sum() - y) / len(y)  # prior precision 1 and n - 1 others
    return dist.Normal(rest, (1 + 1 / len(y)) ** 0.5).log_prob(y).cpu()


def pointwise(result):
    return np.array(result["loo_i"] if "loo_i" in getattr(result, "index", ()) else result.elpd_i)


@pytest.mark.parametrize("correct", [None, "resample"])
def test_loo_of_a_global_latent(correct):
    y = torch.linspace(-1.0, 2.0, 7)
    draw = partial(
        to_arviz, mean_model, num_samples=4000, chunk_size=4000, groups=("log_likelihood", "posterior", "sample_stats")
    )
    result = loo(draw(mean_guide, y, correct=correct, seed=0))
    assert np.allclose(pointwise(result), exact_loo(y), atol=0.02)
    if correct is None:
        naive = az.loo(draw(mean_guide, y, seed=0), pointwise=True)
        assert not np.allclose(pointwise(naive), exact_loo(y), atol=0.05)  # q is not the posterior


def test_loo_of_local_latents():
    """Leaving out its only datum, a local latent predicts it from the prior."""
    data = to_arviz(cases.local_model, wide_guide, num_samples=4000, chunk_size=4000, seed=0)
    expected = dist.Normal(0.0, 2**0.5).log_prob(cases.data()).cpu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # weights p(z) / q(z) of q wider than p have no heavy tail at all
        assert np.allclose(pointwise(loo(data)), expected, atol=0.06)


# ---- restarts


def test_restarts_keep_their_own_parameters():
    y, sigma = effects()
    guides = [fitted(0, sigma, y, steps=3, lr=lr)[0] for lr in (0.01, 0.2)]
    AutoNormal(schools)(sigma, y)  # the user's store has parameters of the same names
    store = pyro.get_param_store()
    state = {name: value.clone() for name, value in store.items()}
    assert "AutoNormal.locs.mu" in state
    fitted_locs = [guide.locs.mu.item() for guide in guides]
    parameters = [dict(guide.named_parameters()) for guide in guides]
    data = to_arviz(schools, guides, sigma, y, num_samples=2000, chunk_size=2000, groups=("posterior",), seed=0)
    means = data["posterior"]["mu"].mean("draw").values
    scales = [guide.scales.mu.item() for guide in guides]
    assert abs(fitted_locs[0] - fitted_locs[1]) > 0.05
    assert np.allclose(means, fitted_locs, atol=max(scales) * 4 / 2000**0.5)
    assert list(store) == list(state) and all(torch.equal(value, state[name]) for name, value in store.items())
    for guide, before in zip(guides, parameters, strict=True):
        assert all(after is before[name] for name, after in guide.named_parameters())


def test_restarts_by_state_and_by_function():
    def guide():
        pyro.sample("g", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1e-4))

    def model():
        pyro.sample("g", dist.Normal(0.0, 1.0))

    other, other_state, _ = fitted(0, *reversed(effects()), steps=1)
    before = dict(other.named_parameters())
    shifted = {
        "params": {k: v + 1.0 for k, v in other_state["params"].items()},
        "constraints": other_state["constraints"],
    }
    pairs = [(other, shifted), (other, other_state)]
    draw = partial(to_arviz, schools, num_samples=3, groups=("posterior",))
    draw(pairs[::-1], *reversed(effects()))
    assert all(
        after is before[name] for name, after in other.named_parameters()
    )  # though Pyro loads them from the store
    states = [{"params": {"loc": torch.tensor(v)}, "constraints": {"loc": dist.constraints.real}} for v in (1.0, 2.0)]
    data = to_arviz(model, [(guide, state) for state in states], num_samples=3, groups=("posterior",))
    assert np.allclose(data["posterior"]["g"], [[1.0], [2.0]], atol=1e-2)
    assert not list(pyro.get_param_store())


# ---- files


def read(name, folder):
    packed = DATA / f"{name}.nc.gz"
    assert packed.stat().st_size < 100_000
    (folder / "data.nc").write_bytes(gzip.decompress(packed.read_bytes()))
    return az.from_netcdf(folder / "data.nc")


@pytest.mark.parametrize("name", FILES)
def test_files_of_either_major(name, tmp_path):
    data = read(name, tmp_path)
    assert group_names(data) == set(GROUPS)
    assert data.attrs["inference_library"] == "pyro_elbo_ext"
    assert np.allclose(data.attrs["elbo"], data["sample_stats"]["log_weight"].mean("draw"), rtol=1e-5)
    assert list(data["posterior"]["school"].values) == SCHOOLS
    assert data["svi"]["loss"].dims == ("chain", "step")
    summary = az.summary(data)
    assert list(summary.index[:3]) == ["mu", "tau", "z[1]"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # so few draws
        assert np.isfinite(pointwise(loo(data))).all()
        assert np.isfinite(pointwise(az.loo(data, pointwise=True))).all()
    data.to_netcdf(tmp_path / "again.nc")
    again = az.from_netcdf(tmp_path / "again.nc")
    assert group_names(again) == set(GROUPS)
    assert np.array_equal(again["posterior"]["theta"], data["posterior"]["theta"])


@pytest.mark.parametrize("name", FILES)
def test_arviz_plots(name, tmp_path):
    from matplotlib import pyplot

    data = read(name, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ's own
        az.plot_pair(data, var_names=["mu", "tau"])
        az.plot_khat(az.loo(data, pointwise=True))
        if MODERN:
            az.plot_ppc_dist(data, num_samples=5)
        else:
            az.plot_ppc(data, num_pp_samples=5)
    pyplot.close("all")


# ---- refusals


def subsampled():
    return to_arviz(cases.local_model, cases.local_guide, 3)


def local_globals():
    """Locals of a poor guide share one weight with a global."""

    def guide():
        pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", cases.NUM_DATA):
            pyro.sample("z", dist.Normal(1.0, 0.4))

    return to_arviz(cases.global_model, guide, correct="resample", num_samples=200)


def annealed_model():
    with poutine.scale(scale=0.5):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.0))


def annealed_guide():
    with poutine.scale(scale=0.5):
        pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))


def mixing_model():
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.sample("x", dist.Normal(z.sum(), 1.0), obs=torch.tensor(0.0))


def mixing_guide():
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))


def improper():
    pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))


def clashing():
    pyro.sample("draw", dist.Normal(torch.tensor(0.0), 1.0))


def stale_module():
    layer = torch.nn.Linear(1, 1)

    def guide():
        pyro.module("layer", layer)
        pyro.sample("g", dist.Normal(layer.bias[0], 1.0))

    state = {"params": {"layer$$$bias": layer.bias + 1.0}, "constraints": {"layer$$$bias": dist.constraints.real}}
    return to_arviz(lambda: pyro.sample("g", dist.Normal(0.0, 1.0)), [(guide, state)])


def same_store():
    guides = [AutoNormal(schools) for _ in range(2)]
    for guide in guides:
        guide(*reversed(effects()))
    return to_arviz(schools, guides, *reversed(effects()))


def nested_export(guide=nested_guide, **options):
    return to_arviz(nested, guide, torch.zeros(2, 3), num_samples=3, **options)


export = partial(to_arviz, cases.local_model, cases.local_guide, num_samples=30)
BAD = {
    "subsampled": (subsampled, "plate 'data' has size 8 and 3 were seen: pass the full data.*subsample_size=8"),
    "correct": (lambda: export(correct="sir"), """correct must be None, "psis" or "resample", got 'sir'"""),
    "num_samples": (lambda: export(num_samples=0), "num_samples must be a positive integer, got 0"),
    "too-few-to-smooth": (lambda: export(num_samples=9, correct="psis"), "at least 25 draws.*Raise num_samples"),
    "group": (lambda: export(groups=("posteriors",)), "groups names 'posteriors'; there are posterior, "),
    "group-string": (lambda: export(groups="prior"), r"got the string 'prior'; write groups=\('prior',\)"),
    "dims-site": (lambda: export(dims={"w": ["a"]}), "dims names 'w', but the variables are .*'x', 'z'"),
    "dims-number": (lambda: export(dims={"z": ["a", "b"]}), r"dims has \['a', 'b'\] for 'z'.*\['data'\].*plates keep"),
    "dims-shared": (lambda: nested_export(dims={"a": ["inner"]}), "dimension 'inner' of"),
    "coords-name": (lambda: export(coords={"rows": [1]}), "coords names 'rows', but the dimensions are .*'data'"),
    "coords-size": (lambda: export(coords={"data": [1]}), "coords has 1 labels for dimension 'data'.* size 8"),
    "history-length": (lambda: export(history={"loss": [1.0], "stage": [1, 2]}), r"\(2,\) for 'stage', but \(1,\)"),
    "history-type": (lambda: export(history=3), "history must be a mapping.*got int"),
    "history-text": (lambda: export(history={"loss": ["a"]}), "for 'loss', no numbers"),
    "history-number": (
        lambda: nested_export([nested_guide, z_guide], history=[{"loss": [1]}]), "2 guides need 2 histories, got 1",
    ),
    "no-guide": (lambda: to_arviz(schools, []), "guide is an empty sequence"),
    "not-a-guide": (lambda: to_arviz(schools, [3]), "guide 0 is a int, not a callable"),
    "state": (lambda: to_arviz(schools, [(schools, {"a": 1})]), "state of guide 0 must be what .*get_state"),
    "same-guide": (lambda: to_arviz(schools, [schools, schools]), "guides 0 and 1 have the same parameters"),
    "same-store": (same_store, "guides 0 and 1 have the same parameters"),
    "stale-module": (stale_module, "module 'layer' holds other weights than the param store"),
    "many-locals": (local_globals, "joint weights of 200 draws.*g, z.*Use correct=None"),
    "annealed": (lambda: to_arviz(annealed_model, annealed_guide, correct="resample"), "scales differ between sites"),
    "point": (lambda: point_export(AutoDelta(schools), correct="psis"), "no guide site is random"),
    "mixing": (lambda: to_arviz(mixing_model, mixing_guide, num_samples=30), "the model combines draws, as z.sum"),
    "improper-prior": (lambda: to_arviz(improper, z_guide), "leave 'prior' and 'prior_predictive' out"),
    "draw": (lambda: to_arviz(clashing, clashing, num_samples=30), "a variable is called 'draw'"),
    "missing-latent": (lambda: point_export(z_guide), "model site 'mu' is not in the guide"),
}  # fmt: skip


def z_guide(*args):
    pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_loo_refusals(exported):
    with pytest.raises(ValueError, match="one of the observed sites 'y'; got 'x'"):
        loo(exported, var_name="x")
    with pytest.raises(ValueError, match="no group log_likelihood"):
        loo(export(groups=("posterior",)))


def test_poor_elements_are_named():
    with pytest.warns(UserWarning, match="of 8 elements of plate 'data' have weights of k-hat > 0.7"):
        to_arviz(cases.local_model, partial(wide_guide, 2.0, 0.2), num_samples=200, correct="resample", seed=0)


def test_missing_arviz(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    for call in (export, lambda: loo(None)):
        with pytest.raises(ImportError, match=r"export needs ArviZ: pip install pyro-elbo-ext\[arviz\]"):
            call()


def test_the_first_import_of_a_day_is_quiet(monkeypatch, tmp_path):
    """ArviZ 0.23 announces its next major once a day; any other warning passes."""
    announcement = "ArviZ is undergoing a major refactor"
    if not MODERN:
        assert announcement in Path(az.__file__).read_text(encoding="utf8")
    monkeypatch.syspath_prepend(tmp_path)
    for text, quiet in ((f"\\n{announcement} to", True), ("something else", False)):
        monkeypatch.delitem(sys.modules, "arviz", raising=False)
        (tmp_path / "arviz.py").write_text(f"import warnings\nwarnings.warn('{text}', FutureWarning)\n# {text}")
        importlib.invalidate_caches()
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        try:
            if quiet:
                assert _import_arviz().__file__ == str(tmp_path / "arviz.py")
            else:
                with pytest.raises(FutureWarning, match="something else"):
                    _import_arviz()
        finally:
            sys.dont_write_bytecode = before


if __name__ == "__main__":
    eight_schools(dtype=torch.float32).to_netcdf(sys.argv[1])
