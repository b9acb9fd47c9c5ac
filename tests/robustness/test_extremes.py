"""Extreme scales, sizes and batches: the exact value, or an error that says where it was lost."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch.utils.data import DataLoader, TensorDataset

from pyro_elbo_ext import IWAE_ELBO, AutoFlow, AutoPlatedFlow, CompiledSVI, Minibatches, fit
from tests.robustness.cases import LOSSES, NEVER, OPTIMS, Breaks, X, assert_finite

VALUED = {**LOSSES, "local particles": LOSSES["auto"]._replace(make=lambda num_particles, **kw: IWAE_ELBO(
    2, plates=("data",), local_particles=num_particles, **kw
))}  # fmt: skip


def make(name, **kwargs):
    loss = VALUED[name]
    return loss.make(num_particles=loss.particles, **kwargs)


class Conjugate:
    """z_i ~ N(0, size), x_i ~ N(z_i, size), and its posterior as guide, where every weight is the evidence.

    Args:
        size: the unit of latents and data.
        weight: a scale of the user's around both.
        rows: indices of a minibatch, None for all; ``total`` is the plate's size then.
    """

    def __init__(self, size=1.0, weight=1.0, x=X, total=None):
        self.x, self.size, self.weight, self.total = x, size, weight, total

    def plate(self, rows):
        if rows is None and self.total is not None:
            rows = torch.arange(len(self.x))
        return pyro.plate("data", self.total or len(self.x), subsample=rows)

    def model(self, rows=None):
        one = torch.ones(())
        with pyro.poutine.scale(scale=self.weight), self.plate(rows) as rows:
            z = pyro.sample("z", dist.Normal(0 * one, self.size * one))
            pyro.sample("x", dist.Normal(z, self.size * one), obs=self.size * self.x.to(z)[rows])

    def guide(self, rows=None):
        shift = pyro.param("shift", lambda: torch.zeros(()))
        with pyro.poutine.scale(scale=self.weight), self.plate(rows) as rows:
            loc = self.size * (self.x.to(shift)[rows] / 2 + shift)
            pyro.sample("z", dist.Normal(loc, self.size * torch.full_like(shift, 0.5**0.5)))

    def loss(self, rows=None):
        """By hand, in float64."""
        x = self.x if rows is None else self.x[rows.to(self.x.device)]
        log_p = -0.5 * x.square() / 2 - 0.5 * math.log(2 * math.pi * 2) - math.log(self.size)
        return -self.weight * float(log_p.sum()) * (self.total or len(self.x)) / len(x)


SIZES = [10.0**e for e in (-30, -15, -5, 0, 5, 15, 30)]
# Closed forms of a whole step average over draws instead of weighing them, so draws matter to the value.
EXACT_AT_POSTERIOR = [name for name in VALUED if name not in ("mean-field", "price", "score regression")]


@pytest.fixture
def single():
    torch.set_default_dtype(torch.float32)


def exact_or_refused(name, pair, rel):
    """Take a step: the loss is the exact one, or the step is refused and nothing is moved."""
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), make(name))
    try:
        found = svi.step()
    except ValueError as error:
        assert any(part in str(error) for part in ("site 'z'", "site 'x'", "parameter 'shift'", "parameter scale")), (
            error
        )
        assert not pyro.param("shift").any()
        return None
    assert_finite(svi)
    if name in EXACT_AT_POSTERIOR:
        assert found == pytest.approx(pair.loss(), rel=rel)
    assert math.isfinite(found)
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", VALUED)
def test_sizes_of_data_and_latents(name, size):
    assert exact_or_refused(name, Conjugate(size), 1e-9) is not None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", VALUED)
def test_sizes_in_single_precision(name, size, single):
    """Squares overflow beyond 1e19 and vanish below 1e-23: refused. Where they do not, the value is exact."""
    found = exact_or_refused(name, Conjugate(size), 2e-5)
    assert found is not None or not 1e-16 < size < 1e16


@pytest.mark.parametrize("weight", SIZES)
@pytest.mark.parametrize("name", VALUED)
def test_scales_around_the_pair(name, weight):
    assert exact_or_refused(name, Conjugate(weight=weight), 1e-9) is not None


@pytest.mark.parametrize("weight", SIZES)
@pytest.mark.parametrize("name", VALUED)
def test_scales_in_single_precision(name, weight, single):
    assert exact_or_refused(name, Conjugate(weight=weight), 2e-5) is not None


@pytest.mark.parametrize("name", VALUED)
def test_a_minibatch_of_a_vast_plate(name):
    assert exact_or_refused(name, Conjugate(total=10**15), 1e-9) is not None


@pytest.mark.parametrize("name", VALUED)
def test_a_plate_of_one_element(name):
    assert exact_or_refused(name, Conjugate(x=X[:1]), 1e-9) is not None


EMPTY = {
    "a plate of none": (Conjugate(x=X[:0]), None, "size cannot be zero"),
    "no rows of a plate": (Conjugate(total=3), torch.arange(0), "division by zero"),
}


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("name", VALUED)
def test_plates_of_no_element_are_refused_by_pyro(name, case):
    """At once by the plate itself, so that nothing is divided by none."""
    pair, rows, message = EMPTY[case]
    svi, good = (SVI(p.model, p.guide, OPTIMS["adam"](), make(name)) for p in (pair, Conjugate()))
    with pytest.raises(ZeroDivisionError, match=message):
        svi.step(rows)
    assert not pyro.param("shift", torch.zeros(())).any()
    assert math.isfinite(good.step())


def globals_model(x):
    g = pyro.sample("g", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(g, 1.0), obs=x)


def globals_guide(x):
    """The posterior, for any number of rows."""
    shift = pyro.param("shift", lambda: torch.zeros(()))
    var = torch.ones(()) / (1 + len(x))
    pyro.sample("g", dist.Normal(var * x.sum() + shift, var.sqrt()))


def globals_loss(x):
    cov = torch.eye(len(x)) + torch.ones(len(x), len(x))
    return -float(dist.MultivariateNormal(torch.zeros(len(x)), cov).log_prob(x))


@pytest.mark.parametrize("name", [name for name in EXACT_AT_POSTERIOR if name != "local particles"])
def test_batches_of_any_size_in_turn(name):
    """One row and more, to one loss: nothing of an earlier shape is kept."""
    svi = SVI(globals_model, globals_guide, pyro.optim.SGD({"lr": 0.0}), make(name))
    for num in (3, 1, 3, 2):
        x = X[:num].to(torch.zeros(()))
        assert svi.step(x) == pytest.approx(globals_loss(x), abs=1e-9)


@pytest.mark.parametrize("make_guide", [AutoNormal, AutoFlow, AutoPlatedFlow])
def test_guides_of_a_plate_of_one_element(make_guide):
    pair = Conjugate(x=X[:1])
    svi = SVI(pair.model, make_guide(pair.model), pyro.optim.Adam({"lr": 0.01}), IWAE_ELBO(4))
    assert all(math.isfinite(svi.step()) for _ in range(3))
    assert_finite(svi)


class Rows:
    """A pair whose minibatch is given as data, of a plate of ten."""

    def __init__(self):
        self.x = torch.linspace(-1.0, 2.0, 10)

    def model(self, batch):
        with pyro.plate("data", 10, subsample=batch):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=self.x[batch])

    def guide(self, batch):
        shift = pyro.param("shift", lambda: torch.zeros(()))
        with pyro.plate("data", 10, subsample=batch):
            pyro.sample("z", dist.Normal(self.x[batch] / 2 + shift, torch.full_like(shift, 0.5**0.5)))


@pytest.mark.parametrize("kind", [SVI, CompiledSVI])
def test_the_last_batch_of_an_epoch_is_smaller(kind, uncompiled):
    pair = Rows()
    svi = kind(pair.model, pair.guide, pyro.optim.SGD({"lr": 0.0}), IWAE_ELBO(4))
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_size=4)
    found = fit(svi, batches=loader, num_steps=6, progress=False).history["loss"]
    exact = Conjugate(x=pair.x, total=10)
    hand = [exact.loss(rows) for rows in torch.arange(10).split(4)]
    torch.testing.assert_close(torch.as_tensor(found), torch.tensor(2 * hand, dtype=torch.float64))


@pytest.mark.parametrize("name", VALUED)
def test_more_rows_than_the_plate_has(name):
    """N/B would be less than 1, as it is only for rows that were named, some of them twice."""

    def model():
        with pyro.plate("data", 3, subsample_size=5):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    with pytest.raises(ValueError, match="subsample_size does not match len.subsample., 5 vs 3"):
        SVI(model, AutoNormal(model), OPTIMS["adam"](), make(name)).step()
    pair, rows = Conjugate(total=3), torch.tensor([0, 1, 2, 2])
    svi = SVI(pair.model, pair.guide, OPTIMS["adam"](), make(name))
    found = svi.step(rows)
    if name in EXACT_AT_POSTERIOR:
        assert found == pytest.approx(pair.loss(rows), rel=1e-9)


def test_minibatches_larger_than_the_data():
    with pytest.raises(ValueError, match="batch_size"):
        Minibatches(torch.zeros(3), batch_size=5)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.value is not None])
def test_single_precision_is_double_within_rounding(name, single):
    """Away from the posterior: the same draws weighed by hand in float64."""
    loss = LOSSES[name]
    pair = Breaks()
    elbo = make(name)
    elbo.loss_and_grads(pair.model, pair.guide, NEVER)
    pair.seen.clear()
    found = elbo.loss_and_grads(pair.model, pair.guide, torch.tensor(3e38))
    pair.seen = pair.seen[: loss.particles if name == "looped" else 1]
    assert pair.seen[0].dtype == torch.float32
    loc, scale = (pyro.param(n).detach().double() for n in ("m", "s"))
    hand = -float(loss.value(pair.log_weight(NEVER, loc, scale)).sum())
    assert found == pytest.approx(hand, rel=1e-5)


def test_auto_guides_at_the_posterior_in_both_precisions():
    found = {}
    for dtype in (torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        pyro.clear_param_store()
        pair = Conjugate()
        loc = init_to_value(values={"z": X.to(dtype) / 2})
        guide = AutoNormal(pair.model, init_loc_fn=loc, init_scale=0.5**0.5)
        found[dtype] = IWAE_ELBO(4).loss(pair.model, guide)
        assert pyro.get_param_store()._params["AutoNormal.locs.z"].dtype == dtype
    assert found[torch.float64] == pytest.approx(Conjugate().loss(), rel=1e-9)
    assert found[torch.float32] == pytest.approx(Conjugate().loss(), rel=1e-5)
