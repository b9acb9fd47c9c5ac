import copy
import hashlib
import random
import signal
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, WeightedRandomSampler

from pyro_elbo_ext import IWAE_ELBO, NaturalGradient, StagedStop, fit, load_checkpoint, save_checkpoint
from pyro_elbo_ext.gradients.memory import Memory
from pyro_elbo_ext.natural.memory import SiteMemory
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


def interrupted_and_whole(make, tmp_path, num_steps=24, at=13, **settings):
    """Parameters and history of a run that was interrupted, and of one that was not."""
    found = {}
    settings = {"num_steps": num_steps, "checkpoint_every": 4, "seed": 7, "progress": False, **settings}
    for name in ("whole", "interrupted"):
        path = None if name == "whole" else tmp_path / "run.pt"
        for stop_at in (None,) if path is None else (at, None):
            scramble()
            svi, args, batches = make()

            def interrupt(state, stop_at=stop_at):
                if state.step == stop_at:
                    raise Interrupted

            given = {name: value() if name == "stop" else value for name, value in settings.items()}
            given["callbacks"] = [*given.pop("callbacks", []), interrupt]
            with suppress(Interrupted):
                result = fit(svi, *args, batches=batches, checkpoint=path, **given)
        found[name] = final_state(svi), result.history
    return found["interrupted"], found["whole"]


def assert_same(one, other):
    assert one[0].keys() == other[0].keys()
    assert [name for name, value in one[0].items() if not torch.equal(value, other[0][name])] == []
    assert [name for name, values in one[1].items() if not np.array_equal(values, other[1][name])] == []


LOADERS = {
    "sampler": lambda rows, g: DataLoader(rows, 5, sampler=RandomSampler(rows, generator=g)),
    "batch sampler": lambda rows, g: DataLoader(
        rows, batch_sampler=BatchSampler(WeightedRandomSampler(torch.ones(22), 22, generator=g), 5, False)
    ),
    "loader": lambda rows, g: DataLoader(rows, 5, shuffle=True, generator=g),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("rule", ["budget", "staged"])
def test_random_numbers_of_a_loader_and_its_samplers_are_taken_up(name, rule, tmp_path):
    def make():
        svi, args, loader = CASES["shuffled_minibatches"]()
        return svi, args, LOADERS[name](loader.dataset, torch.Generator("cpu").manual_seed(1))

    stop = SETTINGS["staged"]["stop"] if rule == "staged" else lambda: "budget"
    assert_same(*interrupted_and_whole(make, tmp_path, stop=stop))


def test_step_sizes_of_a_callback_are_taken_up(tmp_path):
    def slower(state):
        if state.step in (5, 9, 18):
            state.scale_learning_rate(0.7)

    for case in ("natural", "lazily_built"):
        (tmp_path / case).mkdir()
        assert_same(*interrupted_and_whole(CASES[case], tmp_path / case, callbacks=[slower]))


@pytest.mark.parametrize("case", ["natural", "lazily_built"])
def test_the_same_svi_goes_on_as_a_fresh_one_does(case, tmp_path):
    """Its step sizes are not halved twice."""
    found = []
    for same in (True, False):
        scramble()
        svi, args, _ = CASES[case]()
        settings = {"num_steps": 20, "checkpoint": tmp_path / f"{same}.pt", "checkpoint_every": 5, "seed": 7}

        def interrupt(state):
            if state.step in (3, 12):
                state.scale_learning_rate(0.5)
            if state.step == 13:
                raise Interrupted

        with pytest.raises(Interrupted):
            fit(svi, *args, progress=False, callbacks=[interrupt], **settings)
        if not same:
            scramble()
            svi, args, _ = CASES[case]()
        result = fit(svi, *args, progress=False, **settings)
        found.append((final_state(svi), result.history))
        assert result.history["learning_rate"][-1] == result.history["learning_rate"][0] / 2
    assert_same(*found)


def test_a_run_that_a_callback_ended_goes_on(tmp_path):
    def make():
        return CASES["lazily_built"]()

    path = tmp_path / "run.pt"
    svi, args, _ = make()
    fit(svi, *args, num_steps=20, checkpoint=path, seed=7, progress=False, callbacks=[lambda state: state.step == 9])
    found = fit(svi, *args, num_steps=20, checkpoint=path, seed=7, progress=False)
    scramble()
    svi, args, _ = make()
    expected = fit(svi, *args, num_steps=20, seed=7, progress=False)
    assert (found.num_steps, found.stopped) == (20, "budget")
    assert np.array_equal(found.history["loss"], expected.history["loss"])


def sometimes(step):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    b = pyro.param("b", torch.tensor(0.0)) if step % 10 == 0 else 0.0
    pyro.sample("y", dist.Normal(w + b, 1.0), obs=torch.tensor(1.0))


def test_what_the_optimiser_knows_of_a_parameter_met_now_and_then_survives_two_interruptions(tmp_path):
    for optim in (
        lambda: pyro.optim.Adam({"lr": 0.02}),
        lambda: NaturalGradient(lr=0.1, optim=pyro.optim.Adam({"lr": 0.02})),
    ):
        states = []
        for path, moments in ((None, ()), (tmp_path / f"{optim().__class__.__name__}.pt", (13, 17))):
            for moment in (*moments, None):
                scramble()
                svi = SVI(sometimes, AutoNormal(poutine.block(sometimes, expose=["w"])), optim(), Trace_ELBO())

                def interrupt(state, moment=moment):
                    if state.step == moment:
                        raise Interrupted

                with suppress(Interrupted):
                    fit(
                        svi,
                        num_steps=25,
                        batches=lambda step: step,
                        checkpoint=path,
                        checkpoint_every=2,
                        seed=1,
                        progress=False,
                        callbacks=[interrupt],
                    )
            states.append(final_state(svi))
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_parameter_that_the_first_step_does_not_meet_is_refused_with_the_reason(tmp_path):
    def late(step):
        sometimes(step - 5)

    def make():
        guide = AutoNormal(poutine.block(late, expose=["w"]))
        return SVI(late, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())

    settings = {"batches": lambda step: step, "checkpoint": tmp_path / "run.pt", "progress": False}
    fit(make(), num_steps=7, **settings)
    scramble()
    with pytest.raises(ValueError, match="'b' is .* there and missing here.*If a later step meets it first"):
        fit(make(), num_steps=9, **settings)
    pyro.param("b", torch.tensor(0.0))
    assert fit(make(), num_steps=9, **settings).num_steps == 9


def test_parameters_of_others_are_not_saved_and_left_alone(tmp_path):
    path = tmp_path / "run.pt"
    pyro.param("other", torch.tensor(1.0))
    run("lazily_built", path)
    assert "other" not in torch.load(path, weights_only=True)["params"]
    scramble()
    expected, _ = run("lazily_built", path)
    scramble()
    pyro.param("another", torch.tensor(2.0))
    found, _ = run("lazily_built", path)
    assert float(found.pop("another")) == 2.0
    assert all(torch.equal(expected[name], value) for name, value in found.items())


def values(svi):
    """All that a refused checkpoint must leave."""
    buffers = dict(svi.model.__self__.named_buffers()) if hasattr(svi.model, "__self__") else {}
    elbo = svi.loss.__self__
    memory = elbo.state_dict() if hasattr(elbo, "state_dict") else {}
    return copy.deepcopy([dict(pyro.get_param_store()._params), buffers, dict(memory)])


def same(one, other):
    return all(
        same(value, other[key]) if isinstance(value, (dict, list)) else torch.equal(value, other[key])
        for key, value in (one.items() if isinstance(one, dict) else enumerate(one))
    )


class Refused:
    """What makes a run differ from that of a checkpoint, by case: the first run, and the second."""

    rule = ("lazily_built", {"stop": StagedStop(block=10)}, {"stop": StagedStop(block=11)}, "stopped by other rules")
    short = (
        "shuffled_minibatches",
        {},
        {"batches": [torch.ones(2, 4, dtype=torch.float64)]},
        "batches end after 1 minibatches, .* taken 3",
    )
    generator = (
        "shuffled_minibatches",
        {},
        {
            "batches": DataLoader(
                torch.ones(22, 4, dtype=torch.float64), 5, shuffle=True, generator=torch.Generator("cpu")
            )
        },
        "drew from 0 generators .* now have 1",
    )
    seed = ("score_function", {}, {"seed": 8}, "'seed': 7.*'seed': 8")


@pytest.mark.parametrize("case", [name for name in vars(Refused) if not name.startswith("_")])
def test_what_is_refused_changes_nothing(case, tmp_path):
    name, first, second, message = getattr(Refused, case)
    svi, args, batches = CASES[name]()
    settings = {"batches": batches, "checkpoint": tmp_path / "run.pt", "seed": 7, "progress": False}
    fit(svi, *args, num_steps=3, **{**settings, **first})
    scramble()
    svi, args, _ = CASES[name]()
    fit(svi, *args, num_steps=1, batches=settings["batches"], progress=False)
    before = values(svi)
    with pytest.raises(ValueError, match=message):
        fit(svi, *args, num_steps=9, **{**settings, **second})
    assert same(before, values(svi))


def test_a_natural_gradient_of_another_guide_is_refused_before_anything_is_copied(tmp_path):
    svi, args, _ = CASES["natural"]()
    svi.step()
    path = tmp_path / "run.pt"
    save_checkpoint(path, svi)
    content = torch.load(path, weights_only=True)
    content["optimizer"]["sites"]["elsewhere"] = content["optimizer"]["sites"].pop("w_unconstrained")
    torch.save(content, path)
    scramble()
    svi, args, _ = CASES["natural"]()
    svi.evaluate_loss()
    before = values(svi)
    with pytest.raises(ValueError, match="state is of another guide: site 'elsewhere'"):
        load_checkpoint(path, svi)
    assert same(before, values(svi))


def test_what_is_loaded_goes_to_the_device_of_what_it_meets():
    memory = Memory()
    memory.set_extra_state({"key": torch.ones(2, device="cpu")})
    assert memory.recall("key", torch.ones(2, device="meta"), (2,)).device.type == "meta"
    svi, _, _ = CASES["natural"]()
    svi.step()
    for state in svi.optim.get_state()["memory"].values():
        loaded = SiteMemory.from_state(state, torch.device("meta"))
        parts = [loaded.statistics, *loaded.trail.natural.values(), *loaded.trail[1:]]
        assert {part.device.type for part in parts} == {"meta"}
        assert loaded.num_steps == 1


class Process(SVI):
    """One of two processes, as a checkpoint sees it, which knows what the other would say."""

    world_size, rank, other = 2, 0, None

    def gather(self, value):
        return [value, self.other] if self.rank == 0 else [self.other, value]

    def barrier(self):
        pass


def test_every_process_has_its_own_random_state_back(tmp_path):
    def process(rank):
        svi = Process(regression, AutoNormal(regression), pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
        svi.rank = rank
        return svi

    pyro.set_rng_seed(2)
    theirs = get_rng_state()
    drawn = {1: float(torch.rand(()))}
    pyro.set_rng_seed(1)
    path, svi = tmp_path / "run.pt", process(0)
    svi.step()
    svi.other = theirs
    save_checkpoint(path, svi)
    drawn[0] = float(torch.rand(()))
    assert drawn[0] != drawn[1]
    digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    for rank in range(2):
        svi = process(rank)
        svi.other = digest
        load_checkpoint(path, svi)
        assert float(torch.rand(())) == drawn[rank]
    alone, _, _ = CASES["lazily_built"]()  # on another number of processes: new numbers, the same every time
    found = []
    for _ in range(2):
        load_checkpoint(path, alone)
        found.append(float(torch.rand(())))
    assert found[0] == found[1] not in drawn.values()
    for other, what in ((None, "there on rank 0 and missing on rank 1"), ("x", "rank 0 and another file on rank 1")):
        svi = process(0)
        svi.other = other
        with pytest.raises(ValueError, match=what):
            fit(svi, num_steps=9, checkpoint=path, progress=False)


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
    "another guide": (
        lambda: other("guide"),
        {},
        "another model or guide: parameter 'AutoNormal.locs.sigma' is .* missing here",
    ),
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


class Named(NamedTuple):
    value: int


class Derived(dict):
    pass


def test_what_is_not_plain_is_refused_and_nothing_is_written(tmp_path):
    svi, args, _ = CASES["lazily_built"]()
    svi.step(*args)
    path = tmp_path / "run.pt"
    save_checkpoint(path, svi, mine=[OrderedDict(a=1), Counter("aa"), torch.Size([2]), (True, None, b"x"), {3: 1.0}])
    written = path.read_bytes()
    load_checkpoint(path, svi, *args)
    for value in (
        np.float64(1.0),
        {"a": [object()]},
        torch.distributions.Normal(0.0, 1.0),
        Named(1),
        defaultdict(list),
        Derived(a=1),
        {np.str_("a"): 1},
        {np.int64(3): 1},
        MappingProxyType({}),
    ):
        with pytest.raises(TypeError, match=r"checkpoint\['extra'\]\['mine'\].*tensors, numbers"):
            save_checkpoint(path, svi, mine=value)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == written


def test_no_folder_and_batches_that_end(tmp_path):
    svi, args, _ = CASES["lazily_built"]()
    with pytest.raises(ValueError, match="no folder '.*missing'"):
        fit(svi, *args, num_steps=2, checkpoint=tmp_path / "missing" / "run.pt")
    for call in (
        lambda: fit(svi, *args, num_steps=2, checkpoint=tmp_path),
        lambda: save_checkpoint(tmp_path, svi),
        lambda: load_checkpoint(tmp_path, svi),
    ):
        with pytest.raises(ValueError, match="is a folder, and a checkpoint is a file"):
            call()
    with pytest.raises(FileNotFoundError, match="no checkpoint '.*run.pt'"):
        load_checkpoint(tmp_path / "run.pt", svi, *args)
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
