import io
import math
import warnings
from contextlib import contextmanager

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, ReweightedWakeSleep, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_elbo_ext import IWAE_ELBO, NaturalGradient, StagedStop, fit
from pyro_elbo_ext.elbo.base import NonFiniteError
from pyro_elbo_ext.run.batches import Batches
from pyro_elbo_ext.run.fit import _Best
from pyro_elbo_ext.run.progress import Progress
from pyro_elbo_ext.run.stopping import Budget
from tests.run.cases import CASES, regression


def make(loss=None, optim=None, model=regression):
    return SVI(model, AutoNormal(model), optim or pyro.optim.Adam({"lr": 0.02}), loss or Trace_ELBO())


def params():
    return {name: leaf.detach().clone() for name, leaf in pyro.get_param_store()._params.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_steps_are_those_of_svi(case):
    pyro.set_rng_seed(3)
    svi, args, batches = CASES[case]()
    pyro.set_rng_seed(3)
    losses, iterator = [], None
    while len(losses) < 11:
        iterator = iterator or iter(batches or [args] * 100)
        batch = next(iterator, None)
        if batch is None:
            iterator = None
            continue
        losses.append(svi.step(*batch))
    expected = params()
    pyro.clear_param_store()
    svi, args, batches = CASES[case]()
    before = dict(vars(svi))
    result = fit(svi, *args, num_steps=11, batches=batches, seed=3, progress=False)
    assert result.history["loss"].tolist() == losses
    assert all(torch.equal(expected[name], value) for name, value in params().items())
    assert vars(svi) == before
    assert (result.num_steps, result.stopped, result.num_skipped) == (11, "budget", 0)
    assert set(result.history) == {"loss", "grad_norm", "learning_rate", "stage"}
    assert all(len(values) == 11 and np.isfinite(values).all() for values in result.history.values())


@pytest.mark.convergence
def test_it_fits_and_says_so():
    svi = make(IWAE_ELBO(4))
    result = fit(svi, num_steps=400, seed=0, progress=False)
    first = result.history["loss"][:20].mean()
    assert result.loss < first - 5
    assert result.loss == pytest.approx(result.history["loss"][-100:].mean())
    assert result.loss_error == pytest.approx(result.history["loss"][-100:].std(ddof=1) / 10)
    assert str(result).startswith(f"loss {result.loss:.2f} ± ")
    assert "400 steps" in str(result)


def test_the_gradient_norm_is_that_of_all_parameters():
    svi = make()
    pyro.set_rng_seed(1)
    svi.loss_and_grads(svi.model, svi.guide)
    grads = [leaf.grad for leaf in pyro.get_param_store()._params.values()]
    expected = float(torch.cat([grad.reshape(-1) for grad in grads]).norm())
    pyro.clear_param_store()
    assert fit(make(), num_steps=1, seed=1, progress=False).history["grad_norm"][0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("batches", "args", "seen"),
    [
        ([3, 5], (), [3, 5, 3, 5, 3]),
        ([(3,), [5]], (), [3, 5, 3, 5, 3]),
        (lambda step: step + 1, (), [1, 2, 3, 4, 5]),
        (lambda step: (), (4,), [4, 4, 4, 4, 4]),
        (None, (6,), [6, 6, 6, 6, 6]),
        (iter([2, 2, 2, 4, 4, 4]), (), [2, 2, 2, 4, 4]),
    ],
    ids=["list", "tuples", "function", "args after the batch", "args", "iterator"],
)
def test_batches(batches, args, seen):
    met = []

    def model(batch):
        met.append(batch)
        regression(batch)

    svi = SVI(model, AutoNormal(regression), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    fit(svi, *args, num_steps=5, batches=batches, progress=False)
    assert met == seen


def test_keyword_arguments_and_a_tuple_of_losses():
    svi = make(ReweightedWakeSleep(num_particles=2, insomnia=1.0, vectorize_particles=False))
    result = fit(svi, num_steps=3, batch=None, progress=False)
    assert np.isfinite(result.history["loss"]).all()


def test_callbacks_see_each_step_and_end_the_run():
    seen = []
    result = fit(
        make(), num_steps=50, progress=False, callbacks=[lambda s: seen.append((s.step, s.loss)), lambda s: s.step == 7]
    )
    assert [step for step, _ in seen] == list(range(1, 8))
    assert [loss for _, loss in seen] == result.history["loss"].tolist()
    assert (result.stopped, result.num_steps) == ("callback", 7)


def broken(at):
    """A regression whose noise is NaN in some calls."""
    calls = []

    def model():
        calls.append(0)
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        scale = math.nan if len(calls) in at else 1.0
        pyro.sample("y", dist.Normal(w, torch.tensor(scale), validate_args=False), obs=torch.tensor(0.3))

    return model, calls


@contextmanager
def unguarded():
    """Pyro's validation and warnings come before ours."""
    with pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def count_from_here(model, calls, loss):
    svi = make(loss, model=model)
    svi.guide()
    calls.clear()
    return svi


LOSSES = {"Pyro's": Trace_ELBO(), "ours": IWAE_ELBO(2, max_plate_nesting=0)}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("optim", [pyro.optim.Adam({"lr": 0.02}), NaturalGradient(lr=0.1)], ids=["adam", "natural"])
def test_steps_that_are_not_finite_are_skipped_and_counted(loss, optim):
    svi = count_from_here(*broken({3, 4}), loss)
    svi.optim = optim
    states = []
    with unguarded():
        result = fit(
            svi, num_steps=6, nonfinite="skip", progress=False, callbacks=[lambda state: states.append(params())]
        )
    skipped = ~np.isfinite(result.history["loss"])
    assert result.num_skipped == skipped.sum() >= 1
    for step in range(1, 6):
        moved = any(not torch.equal(states[step][name], states[step - 1][name]) for name in states[step])
        assert moved == (not skipped[step])
    assert all(torch.isfinite(value).all() for value in states[-1].values())


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_that_is_not_finite_raises_and_names_the_site(loss):
    svi = count_from_here(*broken(set(range(1, 1000))), loss)
    before = params()
    with unguarded(), pytest.raises(NonFiniteError, match="model site 'y'.*nonfinite=\"skip\""):
        fit(svi, num_steps=6, progress=False)
    assert all(torch.equal(before[name], value) for name, value in params().items())
    svi = count_from_here(*broken(set(range(1, 10000))), loss)
    with unguarded(), pytest.raises(NonFiniteError, match="100 steps in a row were not finite"):
        fit(svi, num_steps=600, progress=False, nonfinite="skip")


def test_a_gradient_that_is_not_finite_names_its_parameters():
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(w > 1e9, (w - 1e9).sqrt(), 0.0))  # a value of 0, a slope of 0 * NaN

    svi = make(model=model)
    with pytest.raises(NonFiniteError, match="Gradients of 'AutoNormal.locs.w', 'AutoNormal.scales.w' are not finite"):
        fit(svi, num_steps=3, progress=False)


def test_the_best_state_comes_back():
    svi = make(optim=pyro.optim.Adam({"lr": 0.05}))
    kept = {}

    def spoil(state):
        if state.step == 300:
            kept.update(params())
        if state.step > 300:
            with torch.no_grad():
                pyro.get_param_store()._params["AutoNormal.locs.w"].add_(1.0)

    fit(svi, num_steps=500, seed=0, progress=False, restore_best=True, callbacks=[spoil])
    assert all(torch.equal(kept[name], value) for name, value in params().items())


def test_the_best_state_is_also_looked_for_after_the_last_hundred():
    def end(num_steps, restore_best):
        pyro.clear_param_store()
        svi = make(optim=pyro.optim.Adam({"lr": 0.01}))
        fit(svi, num_steps=num_steps, seed=0, progress=False, restore_best=restore_best)
        return params()

    for num_steps in (30, 130):  # it gets better all the time
        last, best = end(num_steps, False), end(num_steps, True)
        assert all(torch.equal(last[name], best[name]) for name in last)


def test_a_stretch_that_is_mostly_not_finite_is_not_the_best():
    best = _Best()
    assert best._judged([1.0] * 100) == 1.0
    assert best._judged([math.nan] * 49 + [1.0] * 51) == 1.0
    assert best._judged([math.nan] * 99 + [-9.0]) == math.inf


NAN = torch.tensor(math.nan)


def observed(y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(w, 1.0), obs=torch.as_tensor(y))


def matrix(y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    torch.linalg.cholesky(torch.eye(2) * torch.as_tensor(y))
    pyro.sample("y", dist.Normal(w, 1.0), obs=torch.tensor(1.0))


@pytest.mark.parametrize("optim", ["adam", "natural"])
@pytest.mark.parametrize(("model", "bad"), [(observed, NAN), (matrix, -1.0)], ids=["validation", "cholesky"])
def test_errors_of_validation_and_of_matrices_are_skipped_too(model, bad, optim):
    optim = {"adam": pyro.optim.Adam({"lr": 0.02}), "natural": NaturalGradient(lr=0.1)}[optim]
    svi, states = SVI(model, AutoNormal(model), optim, Trace_ELBO()), []
    batches = [torch.tensor(1.0), torch.as_tensor(bad), torch.tensor(2.0)]
    result = fit(
        svi,
        num_steps=7,
        batches=batches,
        nonfinite="skip",
        progress=False,
        callbacks=[lambda state: states.append(params()) or state.evaluate(3, 0)],
    )
    assert result.num_skipped == 2
    assert np.isfinite(result.history["loss"]).tolist() == [True, False, True, True, False, True, True]
    for step in range(1, 7):
        moved = any(not torch.equal(states[step][name], states[step - 1][name]) for name in states[step])
        assert moved == (step not in (1, 4))


def test_a_misuse_is_no_step_to_skip():
    with pytest.raises(ValueError, match="the support"):
        fit(make(model=observed), NAN, num_steps=5, nonfinite="skip", progress=False)
    with pytest.raises(NonFiniteError, match="(?s)100 steps in a row were not finite.*support"):
        fit(
            make(model=observed),
            num_steps=500,
            batches=lambda step: NAN if step else 1.0,
            nonfinite="skip",
            progress=False,
        )


def test_the_search_for_the_site_hides_no_error():
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        calls.append(0)
        if len(calls) > 1:
            raise KeyError("elsewhere")
        pyro.factor("f", w * math.nan)

    calls: list[int] = []
    svi = SVI(
        model,
        lambda: pyro.sample("w", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0)),
        make().optim,
        Trace_ELBO(),
    )
    with unguarded(), pytest.raises(NonFiniteError, match="The loss is nan"):
        fit(svi, num_steps=1, progress=False)


def test_evaluations_leave_buffers_alone():
    svi, _, _ = CASES["shuffled_minibatches"]()
    coder, seen = svi.model.__self__, []

    def look(state):
        before = {name: buffer.clone() for name, buffer in coder.named_buffers()}
        seen.append(state.evaluate(5, 0))
        assert all(torch.equal(before[name], buffer) for name, buffer in coder.named_buffers())

    fit(svi, num_steps=3, batches=[torch.ones(4, 4), torch.zeros(3, 4)], progress=False, callbacks=[look])
    assert np.isfinite(seen).all()


def test_an_svi_that_cannot_be_watched_is_refused():
    class Own(SVI):
        def step(self, *args, **kwargs):
            return 0.0

    with pytest.raises(TypeError, match="Own.step does not call loss_and_grads"):
        fit(Own(regression, AutoNormal(regression), pyro.optim.Adam({}), Trace_ELBO()), num_steps=2, progress=False)


def test_a_rule_of_ones_own_stops_under_its_name():
    class Stop(Budget):
        def after_step(self, run):
            return len(run.losses) >= 3

    class EarlyStop(Stop):
        pass

    for rule, name in ((Stop(), "stop"), (EarlyStop(), "early")):
        result = fit(make(), num_steps=9, stop=rule, progress=False)
        assert (result.num_steps, result.stopped) == (3, name)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_for_terminals():
    for file, shown in ((io.StringIO(), False), (Terminal(), True)):
        bar = Progress(30, file=file)
        bar._bar.mininterval = 0
        losses = []
        for step in range(30):
            losses.append(100.0 - step)
            bar.after_steps(1, losses, 1, 2)
        bar.close()
        text = file.getvalue()
        assert ("loss 85.50 ± 1.61, stage 2, 2 skipped" in text) == shown
        assert bool(text) == shown


def persistent():
    return torch.utils.data.DataLoader(torch.zeros(8), 4, num_workers=1, persistent_workers=True)


REFUSED = {
    "steps without end": ({"num_steps": math.inf}, "num_steps must be a whole number of at least 1, got inf"),
    "steps in words": ({"num_steps": "abc"}, "num_steps must be a whole number of at least 1, got 'abc'"),
    "None steps": ({"num_steps": None}, "num_steps must be a whole number of at least 1, got None"),
    "the best of a staged stop": ({"restore_best": True, "stop": "staged"}, "leave out restore_best"),
    "a staged stop beside persistent workers": (
        {"batches": persistent(), "stop": "staged"}, "persistent workers would lose",
    ),
    "no steps": ({"num_steps": 0}, "num_steps must be a whole number of at least 1, got 0"),
    "half a step": ({"num_steps": 1.5}, "num_steps must be a whole number"),
    "an unknown rule": ({"stop": "soon"}, "stop must be one of 'budget', 'staged' or a rule.*got 'soon'"),
    "an unknown policy": ({"nonfinite": "drop"}, 'nonfinite must be "raise" or "skip", got \'drop\''),
    "batches of nothing": ({"batches": []}, "batches is empty at step 0"),
    "batches that end": ({"batches": iter([3, 3]), "num_steps": 3}, "batches came to its end at step 2"),
    "a staged stop on batches that end": (
        {"batches": iter([3] * 400), "stop": "staged", "num_steps": 4}, "gone through once only",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        fit(make(), **{"num_steps": 2, "progress": False, **settings})


@pytest.mark.parametrize(
    ("stop", "what"),
    [(StagedStop, "the class StagedStop itself"), (lambda run: True, "function"), (None, "NoneType")],
    ids=["class", "function", "None"],
)
def test_what_is_no_rule_is_refused(stop, what):
    with pytest.raises(TypeError, match=f"stop must be one of .* or a rule such as .*, got {what}: a rule has"):
        fit(make(), num_steps=2, stop=stop)


def test_an_evaluation_that_would_end_the_workers_epoch_is_refused():
    batches = Batches(persistent(), ())
    batches._iterator = iter(())
    with pytest.raises(ValueError, match="persistent_workers=False"):
        batches.samples(1)


def test_batches_of_another_type_are_refused():
    with pytest.raises(TypeError, match="function of the step or minibatches to iterate over, got int"):
        fit(make(), num_steps=2, batches=3)
