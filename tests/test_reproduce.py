"""The reproductions of benchmarks/ train under the bounds they name, on the schedules they name."""

import json
import math
import re
import sys
from argparse import Namespace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from pyro.infer import RenyiELBO
from torch.distributions import Bernoulli, Normal

from pyro_elbo_ext import IWAE_ELBO, PIWAE_ELBO, FlowDistribution

pytestmark = pytest.mark.usefixtures("on_cpu")

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(name, **imported):
    """A script of the folder as a module."""
    spec = spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {spec.name: module, **imported}.items():
            patch.setitem(sys.modules, key, value)
        spec.loader.exec_module(module)
    return module


reproduce = load("reproduce", timing=load("timing"))
PAIRS = ("vae", "iwae-50", "two-layers", "flow", "bits", "belief")  # the other rows' are among them
ENTRIES = [(name, i) for name in PAIRS for i in range(len(reproduce.ROWS[name].entries))]


@pytest.fixture
def folder(tmp_path):
    """Both files, of thirty made-up images."""
    rng = np.random.default_rng(0)
    shapes = rng.random((2, 784)) < 0.3
    grey = np.where(shapes[rng.integers(2, size=30)], 230, 10).astype(np.uint8)
    np.savez(tmp_path / "mnist_u8.npz", x_train=grey, x_test=grey[:10])
    np.savez(tmp_path / "static_binarized_mnist_u8.npz", train=grey // 200, test=grey[:10] // 200)
    return tmp_path


def options(folder, *more):
    """Two rows, and as good as nothing to train and to score."""
    return ["--data", str(folder), "--rows", "vae", "bits", "--steps", "2", "--particles", "3", *more]


def settings(**changed):
    """What training and scoring read."""
    small = {"seconds": None, "budget": None, "steps": 2, "batch_size": 0, "particles": 20, "compile": False}
    return Namespace(**(small | {"device": "cpu"} | changed))


def make_pair(name, i, mean):
    """An untrained pair of an entry, a tenth as wide."""
    setup = reproduce.ROWS[name].setup
    hidden = [width and width // 10 for width in setup.hidden]
    small = setup._replace(latent=[units // 10 for units in setup.latent], hidden=hidden)
    pair = reproduce.Pair(small, mean, reproduce.ROWS[name].entries[i].flow)
    if setup.learn_prior:
        torch.nn.init.constant_(pair.top, 0.3)
    return pair


def normal(outputs):
    loc, log_scale = outputs.chunk(2, -1)
    return Normal(loc, log_scale.exp())


def by_hand(pair, x, num):
    """Log-weights of draws from the guide, in torch alone."""
    units = (lambda outputs: Bernoulli(logits=outputs)) if pair.bits else normal
    z, log_w = [(x - pair.centre).expand(num, *x.shape)], 0.0
    for up in pair.up:
        outputs = up(z[-1])
        if pair.flow is None:
            q = units(outputs)
            z.append(q.sample())
            log_w = log_w - q.log_prob(z[-1]).sum(-1)
        else:  # an affine map of the flow's draw
            affine = normal(outputs[..., : -reproduce.CONTEXT])
            q = FlowDistribution(pair.flow, outputs[..., -reproduce.CONTEXT :])
            noise = q.sample()
            z.append(affine.mean + affine.stddev * noise)
            log_w = log_w - q.log_prob(noise) + affine.stddev.log().sum(-1)
    top = Bernoulli(logits=pair.top) if pair.bits else Normal(0.0, 1.0)
    priors = [units(down(above)) for down, above in zip(pair.down[1:], z[2:], strict=True)] + [top]
    log_p = sum(p.log_prob(value).sum(-1) for p, value in zip(priors, z[1:], strict=True))
    return log_w + log_p + Bernoulli(logits=pair.down[0](z[1])).log_prob(x).sum(-1)


def bound(log_w, num_particles):
    """L_K summed over images, one for each group of K particles."""
    groups = log_w.reshape(-1, num_particles, log_w.shape[-1])
    return (groups.logsumexp(1) - math.log(num_particles)).sum(-1)


@pytest.mark.parametrize(("name", "i"), ENTRIES, ids=[f"{name}-{i}" for name, i in ENTRIES])
@torch.no_grad()
def test_an_untrained_loss_is_the_bound(name, i):
    x = torch.bernoulli(torch.full((3, 40), 0.3))
    pair, loss = make_pair(name, i, torch.full((40,), 0.2)), reproduce.ROWS[name].entries[i].objective()
    tight = loss.num_particles if isinstance(loss, (RenyiELBO, IWAE_ELBO, PIWAE_ELBO)) else 1
    losses = torch.tensor([-loss.loss(pair.model, pair.guide, x) for _ in range(50)])
    expected = bound(by_hand(pair, x, 3200), tight)
    for found in (losses, bound(reproduce.log_weights(pair, x, 3200), tight)):
        error = math.hypot(*(values.std() / math.sqrt(len(values)) for values in (found, expected)))
        assert abs(found.mean() - expected.mean()) < 4 * error


def test_titles_say_how_many_particles():
    for row in reproduce.ROWS.values():
        for entry in row.entries:
            assert str(entry.objective().num_particles) in re.findall(r"\d+", entry.title)


def test_a_run_prints_and_writes_every_entry(folder, capsys):
    output = folder / "out.json"
    assert reproduce.main(options(folder, "--seeds", "2", "--output", str(output))) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    records = json.loads(output.read_text())["records"]
    entries = [entry.title for name in ("vae", "bits") for entry in reproduce.ROWS[name].entries]
    assert [record["entry"] for record in records] == 2 * entries
    lines = printed.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert [entry in line for entry, line in zip(2 * entries, lines, strict=False)] == [True] * len(records)
    for entry, line in zip(entries, table[2:], strict=True):
        mine = [record["score"] for record in records if record["entry"] == entry]
        assert entry in line
        assert f"{-sum(mine) / 2:.2f} ± {abs(mine[0] - mine[1]) / 2:.2f}" in line
    assert {record["steps"] for record in records} == {2}
    assert all(record["gain"] == 0 for record in records if record["entry"].startswith("Pyro"))


@pytest.mark.convergence
def test_training_learns(folder):
    row = reproduce.ROWS["vae"]
    images = reproduce.load(folder, row.setup, 10, "cpu")
    for entry in row.entries:
        short, long = (reproduce.fit(row, entry, images, 0, settings(steps=steps))[1] for steps in (1, 40))
        assert (long - short).mean() > 20  # nats: about 100


def test_equal_bounds_take_equal_steps(folder):
    row = reproduce.ROWS["iwae-5"]
    images = reproduce.load(folder, row.setup, 10, "cpu")
    first, second = (reproduce.fit(row, entry, images, 0, settings(steps=3))[1] for entry in row.entries)
    torch.testing.assert_close(first, second)


def test_epochs_are_binarised_anew(folder, monkeypatch):
    seen = []

    class Recorder:
        def __init__(self, *args):
            pass

        def step(self, x):
            seen.append(x.clone())

    monkeypatch.setattr(reproduce, "SVI", Recorder)
    setup = reproduce.BURDA._replace(batch_size=30)
    images = reproduce.Images(torch.full((30, 784), 0.25), torch.zeros(2, 784), True)
    reproduce.train(make_pair("vae", 0, torch.full((784,), 0.25)), reproduce.TRACE, setup, images, settings(steps=3))
    assert len(seen) == 3
    for x in seen:
        assert set(x.unique().tolist()) == {0.0, 1.0}
        assert abs(x.mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / x.numel())
    assert len({x.sum().item() for x in seen}) == 3  # other bits, not only another order


def test_schedules_are_the_published_ones():
    found = list(reproduce.stints(reproduce.BURDA, 3000, 3000, settings(steps=None)))
    assert sum(number for number, _, _ in found) == 3280 * 3000
    assert sum(epoch for _, _, epoch in found) == 3280
    assert found[0][1] == 1e-3
    assert found[-1][1] == pytest.approx(1e-4)
    tenth = list(reproduce.stints(reproduce.BURDA, 3000, 256, settings(steps=None, budget=0.1)))
    assert {rate: sum(n for n, r, _ in tenth if r == rate) for _, rate, _ in tenth} == {
        rate: 300 * epochs for epochs, rate in reproduce.BURDA.stages
    }
    assert tenth[0][0] == 1  # the first step compiles
    assert [number for number, _, _ in reproduce.stints(reproduce.BURDA, 3, 4, settings(steps=6))] == [1, 2, 3]
    for setup, steps, size in ((reproduce.BITS, 1_000_000, 50000), (reproduce.BELIEF, 4_000_000, 50000)):
        assert sum(e for e, _ in setup.stages) * (size // setup.batch_size) == pytest.approx(steps, rel=1e-3)


def test_epsilon_is_that_of_the_mean():
    assert reproduce.optimizer(reproduce.BURDA, 20).pt_optim_args["eps"] == pytest.approx(2e-3)


def damaged(folder):
    (folder / "mnist_u8.npz").write_bytes(b"PK no archive")


def without_test(folder):
    np.savez(folder / "mnist_u8.npz", x_train=np.zeros((3, 784)))


def negative(folder):
    np.savez(folder / "mnist_u8.npz", x_train=np.full((3, 784), -1.0), x_test=np.zeros((3, 784)))


def of_two_sizes(folder):
    np.savez(folder / "mnist_u8.npz", x_train=np.zeros((3, 784)), x_test=np.zeros((3, 64)))


@pytest.mark.parametrize("spoil", [damaged, without_test, negative, of_two_sizes])
def test_bad_files_are_one_line(spoil, folder, capsys):
    spoil(folder)
    with pytest.raises(SystemExit) as stop:
        reproduce.main(options(folder))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "mnist_u8.npz" in line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--data"),
        (["--data", "nowhere"], "nowhere/mnist_u8.npz"),
        (["--data", ".", "--seconds", "nan"], "--seconds nan"),
        (["--data", ".", "--steps", "0"], "--steps 0"),
        (["--data", ".", "--steps", "1", "--budget", "1"], "--budget"),
        (["--data", ".", "--rows", "none"], "none"),
        (["--data", ".", "--output", "nowhere/out.json"], "nowhere"),
    ],
)
def test_bad_options_are_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(argv)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
