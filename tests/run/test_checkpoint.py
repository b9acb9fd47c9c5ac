import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_elbo_ext import IWAE_ELBO, StagedStop, fit, load_checkpoint, save_checkpoint
from pyro_elbo_ext.run.random_state import get_rng_state, set_rng_state
from tests.run.cases import CASES, regression

STEPS = 24


class Interrupted(Exception):
    pass


def scramble():
    """What a fresh process has: no parameters, another random state."""
    pyro.clear_param_store()
    pyro.set_rng_seed(987654)


def final_state(svi):
    params = {name: leaf.detach().clone() for name, leaf in pyro.get_param_store()._params.items()}
    module = getattr(svi.model, "__self__", None)
    return params | ({} if module is None else {f"buffer {name}": b.clone() for name, b in module.named_buffers()})


def run(case, path=None, interrupt_at=None, **settings):
    svi, args, batches = CASES[case]()

    def interrupt(state):
        if case == "scheduled":
            svi.optim.step()
        if state.step == interrupt_at:
            raise Interrupted

    result = fit(
        svi,
        *args,
        num_steps=STEPS,
        batches=batches,
        checkpoint=path,
        checkpoint_every=4,
        seed=7,
        progress=False,
        callbacks=[interrupt],
        **settings,
    )
    return final_state(svi), result


SETTINGS = {
    "budget": {},
    "staged": {"stop": lambda: StagedStop(block=10, num_evaluations=10, patience=1, tol=1e-9)},
    "best": {"restore_best": True},
}


@pytest.mark.parametrize(
    ("case", "settings"),
    [(case, "budget") for case in CASES]
    + [(case, rule) for case in ("lazily_built", "shuffled_minibatches", "natural") for rule in ("staged", "best")],
)
def test_an_interrupted_run_ends_as_the_uninterrupted(case, settings, tmp_path):
    def chosen():
        return {name: value() if callable(value) else value for name, value in SETTINGS[settings].items()}

    scramble()
    expected, whole = run(case, **chosen())
    path = tmp_path / "run.pt"
    for moment in (6, 13, 23):  # a checkpoint is at every fourth step: what came after it is done again
        scramble()
        with pytest.raises(Interrupted):
            run(case, path, moment, **chosen())
    scramble()
    found, result = run(case, path, **chosen())
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert result.num_steps == whole.num_steps
    for name, values in whole.history.items():
        assert np.array_equal(values, result.history[name]), name
    assert result.stages == whole.stages


def test_a_run_that_ended_is_not_taken_up_and_a_longer_one_is(tmp_path):
    path = tmp_path / "run.pt"
    expected, _ = run("lazily_built", path)
    written = path.read_bytes()
    scramble()
    found, result = run("lazily_built", path)
    assert result.num_steps == STEPS
    assert path.read_bytes() == written
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    scramble()
    svi, args, _ = CASES["lazily_built"]()
    assert fit(svi, *args, num_steps=STEPS + 5, checkpoint=path, seed=7, progress=False).num_steps == STEPS + 5


def test_own_loop(tmp_path):
    svi, args, _ = CASES["natural"]()
    for _ in range(5):
        svi.step(*args)
    save_checkpoint(tmp_path / "own.pt", svi, step=5, note="five")
    losses = [svi.step(*args) for _ in range(5)]
    scramble()
    svi, args, _ = CASES["natural"]()
    assert load_checkpoint(tmp_path / "own.pt", svi, *args) == {"step": 5, "note": "five"}
    assert [svi.step(*args) for _ in range(5)] == losses
    assert load_checkpoint(tmp_path / "own.pt", svi, *args)["step"] == 5  # and in one that has run
    assert [svi.step(*args) for _ in range(5)] == losses


def test_the_file_is_read_without_running_code(tmp_path):
    for case in CASES:
        scramble()
        run(case, tmp_path / case)
        content = torch.load(tmp_path / case, weights_only=True)
        assert content["extra"]["step"] == STEPS
    assert not list(tmp_path.glob("*.partial"))


def other(what):
    """An SVI that differs in one thing from ``lazily_built``."""
    parts = {"guide": AutoNormal(regression), "optim": pyro.optim.Adam({"lr": 0.02}), "loss": Trace_ELBO()}
    parts |= {
        "guide": {"guide": AutoMultivariateNormal(regression)},
        "optimiser": {"optim": pyro.optim.SGD({"lr": 0.02})},
        "elbo": {"loss": IWAE_ELBO(2)},
    }.get(what, {})
    return SVI(regression, **parts)


REFUSED = {
    "another guide": (lambda: other("guide"), {}, "another model or guide: parameter 'AutoNormal.locs.sigma' is .* missing here"),
    "another optimiser": (lambda: other("optimiser"), {}, "optimiser .*Adam.*, and this SVI has optimiser .*SGD"),
    "another ELBO": (lambda: other("elbo"), {}, "ELBO Trace_ELBO, and this SVI has .*IWAE_ELBO"),
    "another seed": (lambda: other(""), {"seed": 8}, "'seed': 7.*'seed': 8"),
    "another stop": (lambda: other(""), {"stop": "staged"}, "'stop': 'Budget'.*'stop': 'StagedStop'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_of_another_run_is_refused_and_left_as_it_is(case, tmp_path):
    make, settings, message = REFUSED[case]
    path = tmp_path / "run.pt"
    run("lazily_built", path)
    written = path.read_bytes()
    scramble()
    svi = make()
    with pytest.raises(ValueError, match=message):
        fit(svi, 7, num_steps=30, checkpoint=path, progress=False, **{"seed": 7, **settings})
    assert path.read_bytes() == written


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "another torch file", "later"])
def test_a_file_that_is_no_checkpoint_is_refused_and_left_as_it_is(damage, tmp_path):
    path = tmp_path / "run.pt"
    run("lazily_built", path)
    whole = path.read_bytes()
    content = torch.load(path, weights_only=True)
    if damage == "another torch file":
        torch.save({"weights": torch.zeros(3)}, path)
    elif damage == "later":
        torch.save({**content, "format": 99}, path)
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"lr = 0.1\n"}[damage])
    damaged = path.read_bytes()
    svi, args, _ = CASES["lazily_built"]()
    before = {name: leaf.detach().clone() for name, leaf in pyro.get_param_store()._params.items()}
    with pytest.raises(ValueError, match="run.pt' (cannot be read|is no checkpoint|has format 99)"):
        fit(svi, *args, num_steps=30, checkpoint=path, seed=7, progress=False)
    assert path.read_bytes() == damaged
    assert all(torch.equal(before[name], leaf) for name, leaf in pyro.get_param_store()._params.items())


def test_what_is_not_plain_is_refused_and_nothing_is_written(tmp_path):
    svi, args, _ = CASES["lazily_built"]()
    svi.step(*args)
    path = tmp_path / "run.pt"
    for value in (np.float64(1.0), {"a": [object()]}, torch.distributions.Normal(0.0, 1.0)):
        with pytest.raises(TypeError, match=r"checkpoint\['extra'\]\['mine'\].*tensors, numbers"):
            save_checkpoint(path, svi, mine=value)
    assert list(tmp_path.iterdir()) == []


def test_no_folder_and_batches_that_end(tmp_path):
    svi, args, _ = CASES["lazily_built"]()
    with pytest.raises(ValueError, match="no folder '.*missing'"):
        fit(svi, *args, num_steps=2, checkpoint=tmp_path / "missing" / "run.pt")
    with pytest.raises(ValueError, match="gone through once only"):
        fit(svi, num_steps=2, batches=iter([5, 5]), checkpoint=tmp_path / "run.pt")


def test_local_parameters_are_refused(tmp_path):
    svi, args, _ = CASES["lazily_built"]()
    pyro.settings.set(module_local_params=True)
    try:
        with pytest.raises(ValueError, match="module_local_params"):
            save_checkpoint(tmp_path / "run.pt", svi)
    finally:
        pyro.settings.set(module_local_params=False)


def kill_and_restart(tmp_path, kills, steps):
    """Kill -9 a run at random moments, and return its final parameters and those of one that was let alone."""
    worker = Path(__file__).with_name("killed_worker.py")
    moments = [str(random.Random(n).uniform(0.0, 0.3)) for n in range(kills)]
    command = [sys.executable, str(worker), str(tmp_path), str(steps), *moments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 10 * kills)
    assert done.returncode == 0, done.stderr
    lives = done.stdout.split()
    assert lives.count(str(-signal.SIGKILL)) >= kills - 1, lives  # the last may come too late
    whole, killed = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "killed.pt"))
    return whole["params"], killed["params"]


def test_killed_at_three_moments_it_ends_as_if_it_had_not_been(tmp_path):
    whole, killed = kill_and_restart(tmp_path, 3, 80)
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.slow
def test_killed_at_fifty_moments_it_ends_as_if_it_had_not_been(tmp_path):
    whole, killed = kill_and_restart(tmp_path, 50, 3000)
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_random_states_come_back():
    def draw():
        return random.random(), np.random.uniform(), float(dist.Normal(0.0, 1.0).sample())  # noqa: NPY002

    state = get_rng_state()
    drawn = draw()
    set_rng_state(state)
    assert drawn == draw()
    assert drawn != draw()
