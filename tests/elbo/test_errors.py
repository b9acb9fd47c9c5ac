"""Bad input gets an error that names the site or plate, and changes nothing."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_elbo_ext import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    VRIWAE_ELBO,
    ImportanceWeighted_ELBO,
    MeanField_ELBO,
)
from pyro_elbo_ext.gradients import OVIS, VIMCO, Estimator
from tests.cases import global_guide, global_model, local_guide, local_model


def normal_model():
    z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


def normal_guide():
    pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))


def bernoulli_model():
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


def bernoulli_guide():
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.1))))


def extra_latent_model():
    normal_model()
    pyro.sample("w", dist.Normal(torch.tensor(0.0), 1.0))


def extra_latent_guide():
    normal_guide()
    pyro.sample("w", dist.Normal(torch.tensor(0.0), 1.0))


def observed_guide():
    normal_guide()
    pyro.sample("y", dist.Normal(torch.tensor(0.0), 1.0), obs=torch.tensor(0.0), infer={"is_auxiliary": True})


def enumerated_guide():
    pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)), infer={"enumerate": "parallel"})


def full_plate_guide(batch):
    with pyro.plate("data", batch):
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))


def downstream_model():
    with pyro.plate("data", 8):
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))


def given_indices_model():
    with pyro.plate("data", 8, subsample=torch.tensor([0, 1])):
        pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))


def dropout_guide():
    m = torch.nn.functional.dropout(pyro.param("ms", torch.rand(50)), 0.5).sum()  # no two sums the same
    pyro.sample("z", dist.Normal(m, 1.0))


def drawn_indices_guide():
    with pyro.plate("data", 8, subsample_size=2):
        pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))


DISCRETE = "'z' is a Bernoulli, which is not reparameterised.*"
BAD_PAIRS = {
    "discrete site, pathwise": (
        IWAE_ELBO(2, "pathwise"), bernoulli_model, bernoulli_guide, DISCRETE + 'gradient="pathwise.vimco"',
    ),
    "discrete site, dreg": (IWAE_ELBO(2, "dreg"), bernoulli_model, bernoulli_guide, DISCRETE + 'gradient="dreg.vimco"'),
    "discrete site, one particle": (
        IWAE_ELBO(1, "pathwise"), bernoulli_model, bernoulli_guide, DISCRETE + "ScoreFunction_ELBO",
    ),
    "discrete site, local particles": (
        IWAE_ELBO(1, plates=("data",), local_particles=2), bernoulli_model, bernoulli_guide,
        DISCRETE + "ScoreFunction_ELBO",
    ),
    "vimco with one particle": (
        IWAE_ELBO(1, "vimco"), bernoulli_model, bernoulli_guide, "'z' is not repar.*num_particles >= 2, got 1",
    ),
    "ovis with one particle": (
        IWAE_ELBO(1, "dreg+ovis"), bernoulli_model, bernoulli_guide, "'z' is not repar.*num_particles >= 2, got 1",
    ),
    "ovis of an ELBO": (
        CIWAE_ELBO(0.3, 4, gradient="ovis"), bernoulli_model, bernoulli_guide, "site 'z'.*makes this bound -inf",
    ),
    "discrete site, mean field": (
        MeanField_ELBO(), bernoulli_model, bernoulli_guide, DISCRETE + "ScoreFunction_ELBO",
    ),
    "model site not in guide": (IWAE_ELBO(2), extra_latent_model, normal_guide, "model site 'w' is not in the guide"),
    "guide site not in model": (IWAE_ELBO(2), normal_model, extra_latent_guide, "guide site 'w' is not a latent"),
    "observed guide site": (IWAE_ELBO(2), normal_model, observed_guide, "guide site 'y' is observed"),
    "enumerated guide site": (IWAE_ELBO(2), bernoulli_model, enumerated_guide, "'z' asks for enumeration"),
    "unknown plate": (IWAE_ELBO(2, plates=("rows",)), local_model, local_guide, "plates names 'rows'.*'data'"),
    "plate not common": (IWAE_ELBO(2, plates=("data",)), global_model, global_guide, "over plate 'data': site 'g'"),
    "local plate unknown": (
        IWAE_ELBO(2, plates=("rows",), local_particles=2), global_model, global_guide, "plates names 'rows'",
    ),
    "local plate upstream": (
        IWAE_ELBO(2, plates=("data",), local_particles=2), downstream_model,
        lambda: full_plate_guide(8), "'x' is outside.*depends on 'z'",
    ),
    "free bits of no site": (
        MeanField_ELBO(free_bits={"w": 1.0}), normal_model, normal_guide, "free_bits names site 'w'",
    ),
    "dropout in the guide": (IWAE_ELBO(2, "dreg"), normal_model, dropout_guide, "'z' has another log-density.*dropout"),
    "other indices in the guide": (
        IWAE_ELBO(2), given_indices_model, drawn_indices_guide, "plate 'data' was given its subsample indices",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_a_pair_is_refused(case):
    elbo, model, guide, message = BAD_PAIRS[case]
    with pytest.raises(ValueError, match=message):
        elbo.loss_and_grads(model, guide)
    assert all(p.grad is None for _, p in pyro.get_param_store().named_parameters())


BAD_PLATES = {
    "subsampled and not common": (IWAE_ELBO(2), global_model, global_guide, "'data' is subsampled.*'g' is outside"),
    "a log around a subsampled plate": (
        IWAE_ELBO(2, plates=("data",), local_particles=2, global_bound="iwae"), global_model, global_guide,
        "'data' is subsampled",
    ),
    "another size in the guide": (IWAE_ELBO(2), local_model, full_plate_guide, "plate 'data' has .dim, size"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PLATES)
def test_a_subsampled_plate_is_refused(case):
    elbo, model, guide, message = BAD_PLATES[case]
    with pytest.raises(ValueError, match=message):
        elbo.loss(model, guide, 4)


BAD_ARGUMENTS = {
    "no particles": (lambda: IWAE_ELBO(0), "num_particles must be a positive integer"),
    "half a particle": (lambda: IWAE_ELBO(1.5), "num_particles must be a positive integer"),
    "unknown gradient": (lambda: IWAE_ELBO(2, "vimcoo"), "gradient must be one of"),
    "unknown policy": (lambda: IWAE_ELBO(2, nonfinite="ignore"), "nonfinite must be"),
    "plates as a string": (lambda: IWAE_ELBO(2, plates="data"), "write plates="),
    "local particles without plates": (lambda: IWAE_ELBO(2, local_particles=2), "needs plates"),
    "no local particles": (lambda: IWAE_ELBO(2, local_particles=0), "local_particles must be"),
    "unknown global bound": (lambda: IWAE_ELBO(2, global_bound="renyi"), "global_bound must be"),
    "global bound without local particles": (lambda: IWAE_ELBO(2, global_bound="iwae"), "needs local_particles"),
    "dreg with a log outside": (
        lambda: IWAE_ELBO(2, "dreg", plates=("d",), local_particles=2, global_bound="iwae"),
        "no proven weights",
    ),
    "an estimator of the ELBO's gradient": (lambda: IWAE_ELBO(2, "disarm"), "ScoreFunction_ELBO.gradient='disarm'"),
    "two signals": (lambda: IWAE_ELBO(2, "vimco+ovis"), "gradient must be one of"),
    "no estimator": (lambda: IWAE_ELBO(2, 3.0), "gradient must be one of"),
    "a signal with local particles": (
        lambda: IWAE_ELBO(2, "vimco", plates=("d",), local_particles=2),
        "no proven rule for local_particles",
    ),
    "gamma": (lambda: OVIS(1.5), "gamma must lie in"),
    "fill": (lambda: VIMCO("harmonic"), "fill must be"),
    "alpha": (lambda: VRIWAE_ELBO(2.0), "alpha must lie in"),
    "beta": (lambda: CIWAE_ELBO(-1.0), "beta must lie in"),
    "groups": (lambda: MIWAE_ELBO(8, num_groups=3), "multiple of num_groups"),
    "groups of the guide": (lambda: PIWAE_ELBO(8, num_groups=3), "multiple of num_groups"),
    "negative beta": (lambda: MeanField_ELBO(beta=-1.0), "beta must be finite"),
    "free bits": (lambda: MeanField_ELBO(free_bits=math.nan), "free_bits must be finite"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_an_argument_is_refused(case):
    call, message = BAD_ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_bound_must_be_defined():
    class Nothing_ELBO(ImportanceWeighted_ELBO):
        pass

    with pytest.raises(TypeError, match="must define bound"):
        Nothing_ELBO()
    with pytest.raises(NotImplementedError):
        Estimator().weights(None, None)


def test_more_plates_than_before_are_refused():
    elbo = IWAE_ELBO(3)

    def model(nested):
        with pyro.plate("b", 2):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            if nested:
                with pyro.plate("c", 2):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(2, 2))

    def guide(nested):
        with pyro.plate("b", 2):
            pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))

    elbo.loss(model, guide, False)
    with pytest.raises(ValueError, match="now have 2 nested plates.*first used with 1.*max_plate_nesting=2"):
        elbo.loss(model, guide, True)
    assert math.isfinite(elbo.loss(model, guide, False))


def breaking_model(value, where):
    """The log-density is ``value``, with a gradient that is not finite, where z exceeds a threshold."""
    # A factor that Pyro does not validate, as the log-density of a distribution is not.

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            inside = where - z
            factor = inside.sqrt() if math.isnan(value) else (inside.clamp(min=0) * 1.0).log()
            pyro.sample("broken", dist.Unit(factor, validate_args=False), obs=torch.zeros(0))

    return model


def wide_guide():
    m = pyro.param("m", torch.zeros(3))
    with pyro.plate("data", 3):
        pyro.sample("z", dist.Normal(m, 1.0))


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
def test_nan_names_site_and_particle_and_changes_nothing(vectorize):
    elbo = IWAE_ELBO(6, vectorize_particles=vectorize)
    svi = SVI(breaking_model(math.nan, 0.5), wide_guide, pyro.optim.Adam({"lr": 0.1}), loss=elbo)
    with pytest.raises(ValueError, match=r"log-weight is nan \(particle \d, data=\d\).*model site 'broken'"):
        for _ in range(20):
            before = pyro.param("m", torch.zeros(3)).detach().clone()
            svi.step()
    assert torch.equal(before, pyro.param("m")) and pyro.param("m").grad is None or not pyro.param("m").grad.any()


@pytest.mark.parametrize("gradient", ["pathwise", "stl", "dreg"])
@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
@pytest.mark.parametrize("value", [math.nan, -math.inf], ids=["nan", "zero-weight"])
def test_single_bad_particles_are_left_out(value, vectorize, gradient):
    """Dropped, they count as weight zero: finite gradients, and the bound of the density that is zero there."""
    elbo = IWAE_ELBO(12, gradient, vectorize_particles=vectorize, nonfinite="drop" if math.isnan(value) else "raise")
    losses = []
    for _ in range(40):
        losses.append(elbo.loss_and_grads(breaking_model(value, 2.0), wide_guide))
        grad = pyro.param("m").grad
        assert grad.isfinite().all() and grad.any()
    grid = torch.linspace(-9, 2, 200_001)
    inside = 2.0 - grid
    density = inside.sqrt().exp() if math.isnan(value) else inside
    exact = 3 * float(torch.trapezoid(density * dist.Normal(0.0, 1.0).log_prob(grid).exp(), grid).log())
    found = -torch.tensor(losses)
    assert float(found.mean()) < exact + 4 * float(found.std()) / 40**0.5
    assert float(found.mean()) > exact - 0.5
    assert (elbo.num_dropped > 0) == math.isnan(value)


@pytest.mark.parametrize("policy", ["raise", "drop"])
@pytest.mark.parametrize("value", [math.nan, -math.inf], ids=["nan", "zero-weight"])
def test_no_good_particle_left_is_an_error(value, policy):
    elbo = IWAE_ELBO(4, nonfinite=policy)
    with pytest.raises(ValueError, match="site 'broken'"):
        elbo.loss_and_grads(breaking_model(value, -20.0), wide_guide)
    assert pyro.param("m").grad is None


def test_a_constant_site_that_is_not_finite_is_named():
    def model():
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
        pyro.sample("constant", dist.Unit(torch.tensor(math.nan), validate_args=False), obs=torch.zeros(0))

    with pytest.raises(ValueError, match="model site 'constant'"):
        IWAE_ELBO(4).loss_and_grads(model, wide_guide)


def test_an_average_of_logs_has_no_zero_weights():
    with pytest.raises(ValueError, match="log-weight is -inf"):
        for _ in range(20):
            VRIWAE_ELBO(1.0, 12).loss_and_grads(breaking_model(-math.inf, 0.5), wide_guide)
