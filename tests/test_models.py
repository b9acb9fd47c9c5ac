"""Every file in models/ runs, learns, reads what it says it reads, and refuses the rest in one line."""

import gzip
import itertools
import math
import subprocess
import sys

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_elbo_ext import IWAE_ELBO
from tests.model_files import FOLDER, HELPERS, MODELS, NAMES, quick_run, refusal

datasets, bound = HELPERS["datasets"], HELPERS["report"].bound
vae, sigmoid_belief_network, gaussian_mixture = (
    MODELS[name] for name in ("vae", "sigmoid_belief_network", "gaussian_mixture")
)

pytestmark = pytest.mark.usefixtures("on_cpu")


TOLD = {"vae", "sigmoid_belief_network", "gaussian_mixture", "bayesian_regression", "lda"}  # their tests run them, too


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TOLD])
def test_every_model_runs_and_says_nothing_but_its_result(name, tmp_path, capsys):
    result = quick_run(name, tmp_path, "--steps", "2")
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert len(printed.splitlines()) > 1
    assert result["table"]
    assert result["settings"]["quick"]
    assert set(result["versions"]) == {"python", "torch", "pyro", "pyro_elbo_ext"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_quick_run_ends_without_a_word_on_stderr(name, tmp_path):
    script = [sys.executable, "-W", "error", FOLDER / f"{name}.py", "--quick", "--output", tmp_path]
    done = subprocess.run(script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / f"{name}.png").exists()


@pytest.mark.parametrize("name", NAMES)
def test_every_model_refuses_what_is_not_there(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    objective = refusal(name, tmp_path, capsys, "--elbo", "nonsense")
    assert any(line in objective for line in ("invalid choice: 'nonsense'", "unrecognized arguments: --elbo"))
    assert "use --device cpu" in refusal(name, tmp_path, capsys, "--device", "cuda")
    absent = refusal(name, tmp_path, capsys, "--data", str(tmp_path / "absent.npz"))
    assert any(line in absent for line in ("does not exist", "unrecognized arguments: --data", "choose another path"))


def test_a_script_finds_its_neighbours():
    script = [sys.executable, FOLDER / "sigmoid_belief_network.py", "--layers", "0"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("sigmoid_belief_network.py: error: argument --layers")


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (30, 4, 4), dtype=np.uint8)


def binary(images):
    return torch.as_tensor(images.reshape(len(images), -1) / images.max() >= 0.5).to(torch.get_default_dtype())


@pytest.mark.convergence
@pytest.mark.parametrize("batching", ["plate", pytest.param("loader", marks=pytest.mark.slow)])
def test_vae_quick_run(batching, tmp_path, capsys):
    torch.set_num_threads(2)
    result = quick_run("vae", tmp_path, "--batching", batching)
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert [row["objective"] for row in result["table"]] == list(vae.TITLES.values())
    for row in result["table"]:
        assert row["objective"] in printed
        assert f"{row['bound']:.2f} ± {row['bound_error']:.2f}" in printed
        assert math.isfinite(row["bound"])
        assert row["seconds"] > 0
    assert set(result["curves"]) == {"K", *vae.TITLES}
    assert result["settings"]["batching"] == batching
    assert torch.get_num_threads() == 2
    untrained = quick_run("vae", tmp_path / "untrained", "--batching", batching, "--steps", "1", "--elbo", "elbo")
    for after in result["table"]:
        assert after["bound"] > untrained["table"][0]["bound"] + 15  # nats: 64 pixels at log 2 before, about -20 after


def test_same_seed_same_numbers(tmp_path):
    options = ("--steps", "3", "--elbo", "dreg", "--seed", "5")
    first, second = (quick_run("vae", tmp_path, *options)["curves"] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize("name", vae.TITLES)
def test_loss_estimates_the_bound_on_all_images(name, batch_size):
    x = torch.rand(20, 9).round()
    pair = vae.VAE(9, 2, 8, len(x), batch_size)
    log_w = vae.log_weights(pair, x, 4000)
    expected = bound(log_w, 1 if name == "elbo" else 8).sum().item()
    objective = vae.make_objective(name, 8)
    # minibatches of 7, 7 and a ragged 6 have the full bound as their weighted mean
    parts = [(x, 1.0)] * 3 if batch_size else [(part, len(part) / len(x)) for part in x.split(7)]
    runs = [[share * -objective.loss(pair.model, pair.guide, part) for part, share in parts] for _ in range(50)]
    values = np.mean(runs, 1) if batch_size else np.sum(runs, 1)
    assert abs(values.mean() - expected) < 5 * values.std() / math.sqrt(len(values)) + 0.05


def test_image_bounds_sum_to_iwae_elbo():
    x = torch.rand(25, 9).round()
    pair = vae.VAE(9, 2, 8, len(x), None)
    per_image = bound(vae.log_weights(pair, x, 5 * 2000), 5)
    values = torch.tensor([-IWAE_ELBO(5).loss(pair.model, pair.guide, x) for _ in range(100)])
    assert per_image.shape == (25,)
    assert abs(values.mean() - per_image.sum()) < 5 * values.std() / math.sqrt(len(values)) + 0.05


def test_gains_are_paired(capsys):
    first, second = torch.randn(2, 10, 50)
    results = {"a": HELPERS["report"].Result(None, first, 1.0), "b": HELPERS["report"].Result(None, second, 2.0)}
    row = HELPERS["report"].tabulate(results, {"a": "A", "b": "B"})[1]
    gains = (second - first)[-1]
    assert row["gain"] == pytest.approx(gains.mean().item())
    assert row["gain_error"] == pytest.approx(gains.std().item() / math.sqrt(50))
    assert f"{row['gain']:+.2f} ± {row['gain_error']:.2f}" in capsys.readouterr().out


def pixel_frequencies_bound():
    """Nats per test image of the digits when every pixel is independent: what a network that learns nothing gets."""
    data = datasets.load_data(None, 0)
    return dist.Bernoulli(data.train.mean(0).clamp(0.01, 0.99)).log_prob(data.test).sum(-1).mean().item()


@pytest.mark.convergence
def test_belief_network_quick_run(tmp_path, capsys):
    result = quick_run("sigmoid_belief_network", tmp_path)
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert [row["objective"] for row in result["table"]] == list(sigmoid_belief_network.TITLES.values())
    assert set(result["curves"]) == {"K", *sigmoid_belief_network.TITLES}
    for row in result["table"]:
        assert row["objective"] in printed
        assert f"{row['bound']:.2f} ± {row['bound_error']:.2f}" in printed
    options = ("--steps", "1", "--elbo", "rws")
    untrained = quick_run("sigmoid_belief_network", tmp_path / "untrained", *options)["table"]
    gains = [row["bound"] - pixel_frequencies_bound() for row in (*untrained, *result["table"])]
    assert [gain > 3 for gain in gains] == [False, True, True, True, True]  # nats: 0 before, over 5 after


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", sigmoid_belief_network.TITLES)
def test_belief_network_loss_estimates_the_bound(name, layers):
    x = torch.rand(20, 9).round()
    pair = sigmoid_belief_network.SigmoidBeliefNetwork(x.mean(0), 5, layers, len(x), 7)
    log_w = sigmoid_belief_network.log_weights(pair, x, 4000)
    expected = bound(log_w, 1 if name == "elbo" else 8).sum().item()
    objective = sigmoid_belief_network.make_objective(name, 8)
    values = torch.tensor([-objective.loss(pair.model, pair.guide, x) for _ in range(100)])
    assert abs(values.mean() - expected) < 5 * values.std() / math.sqrt(len(values)) + 0.05


def log_bernoulli(value, logits):
    return (value * logits - nn.functional.softplus(logits)).sum(-1)


def test_belief_network_weights_average_to_the_evidence():
    x = torch.rand(4, 6).round()
    pair = sigmoid_belief_network.SigmoidBeliefNetwork(x.mean(0), 3, 2, len(x), 4)
    nn.init.normal_(pair.top)
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
    above, below = states[:, None], states[None]  # all 64 pairs of states
    log_joint = log_bernoulli(above, pair.top) + log_bernoulli(below, pair.down[1](above))
    evidence = (log_joint[..., None] + log_bernoulli(x, pair.down[0](below)[..., None, :])).exp().sum((0, 1))
    weights = sigmoid_belief_network.log_weights(pair, x, 20000).exp()
    assert ((weights.mean(0) - evidence).abs() < 4 * weights.std(0) / math.sqrt(len(weights))).all()


@pytest.mark.convergence
def test_mixture_quick_run(tmp_path, capsys):
    result = quick_run("gaussian_mixture", tmp_path)
    printed, errors = capsys.readouterr()
    assert errors == ""
    runs = [(title, k) for title in gaussian_mixture.TITLES.values() for k in (2, 10)]
    assert [(row["objective"], row["K"]) for row in result["table"]] == runs
    for row, line in zip(result["table"], printed.splitlines()[1:], strict=True):
        assert line.startswith(row["objective"])
        assert f"{row['prior_error']:.4f}" in line
        assert f"{row['bound']:.2f} ± {row['bound_error']:.2f}" in line
    untrained = quick_run("gaussian_mixture", tmp_path / "untrained", "--steps", "1", "--elbo", "rws")["table"]
    bounds = [row["bound"] for row in (*untrained, *result["table"])]
    assert [value > -80 for value in bounds] == [False] * 2 + [True] * 8  # nats: about -130 before, -10 to -50 after


@pytest.mark.convergence
def test_wake_sleep_learns_the_prior_of_the_mixture(tmp_path):
    options = ("--elbo", "rws", "--particles", "20", "--steps")
    rows = [quick_run("gaussian_mixture", tmp_path / n, *options, n)["table"][0] for n in ("1", "800")]
    assert [row["prior_error"] < 0.04 for row in rows] == [False, True]  # 0.09 before, 0.01 to 0.02 after
    assert [row["guide_error"] < 0.6 for row in rows] == [False, True]  # 0.75 before, 0.4 after


@pytest.mark.parametrize("name", gaussian_mixture.TITLES)
def test_mixture_loss_estimates_the_exact_bound(name):
    pair = gaussian_mixture.GaussianMixture(num_components=4, hidden=3)
    x = 30 * torch.rand(20)
    exact = gaussian_mixture.evaluate(pair, x, 0.0)
    q = pair.posterior(x).probs
    log_w = pair.prior().logits + dist.Normal(pair.loc, 5.0).log_prob(x[:, None]) - q.log()
    pairs = torch.logaddexp(log_w[:, :, None], log_w[:, None]) - math.log(2)
    expected = exact.bound if name == "elbo" else (q[:, :, None] * q[:, None] * pairs).sum((1, 2))
    torch.testing.assert_close(exact.bound, (q * log_w).sum(-1))
    objective = gaussian_mixture.make_objective(name, 2)
    values = torch.tensor([-objective.loss(pair.model, pair.guide, x) for _ in range(300)])
    assert abs(values.mean() - expected.sum()) < 4 * values.std() / math.sqrt(len(values))
    assert expected.mean() < exact.evidence


@pytest.mark.parametrize(("component", "distance"), [(3, 0.0), (2, math.sqrt(2))])
def test_mixture_errors_are_distances(component, distance):
    pair = gaussian_mixture.GaussianMixture(num_components=5)
    with torch.no_grad():
        pair.logits.copy_(torch.tensor([-1e4, -1e4, -1e4, 0.0, -1e4]))  # the posterior is component 3 for any x
        pair.encoder[-1].weight.zero_()
        pair.encoder[-1].bias.copy_(1e4 * torch.eye(5)[component])
    result = gaussian_mixture.evaluate(pair, torch.linspace(0, 40, 10), 0.0)
    assert result.error == pytest.approx((torch.eye(5)[3] - torch.arange(5, 10) / 35).norm().item())
    torch.testing.assert_close(result.guide, torch.full((10,), distance))


def test_mixture_data_come_from_the_truth_and_are_the_same_for_every_objective():
    pair = gaussian_mixture.GaussianMixture()
    x, again, other = (next(gaussian_mixture.batches(pair, 20000, seed)) for seed in (0, 0, 1))
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    c = torch.arange(20.0)
    truth = (c + 5) / (c + 5).sum()
    mean, square = (truth * 10 * c).sum(), (truth * (100 * c**2 + 25)).sum()
    assert abs(x.mean() - mean) < 4 * (square - mean**2).sqrt() / math.sqrt(len(x))
    assert abs(x.square().mean() - square) < 4 * x.square().std() / math.sqrt(len(x))
    wave = (2 * math.pi * x / 10).cos()  # of the noise alone: means are multiples of 10
    assert abs(wave.mean() - math.exp(-2 * (math.pi * 5 / 10) ** 2)) < 4 * wave.std() / math.sqrt(len(x))


def test_bound_is_log_mean_exp_over_groups():
    log_w = torch.randn(7, 3)
    groups = [log_w[:3], log_w[3:6]]
    expected = sum(group.exp().mean(0).log() for group in groups) / 2
    torch.testing.assert_close(bound(log_w, 3), expected)


def test_digits_are_bundled_and_split_by_seed():
    data, again, other = (datasets.load_data(None, seed) for seed in (0, 0, 1))
    assert data.shape == (8, 8)
    assert (len(data.train), len(data.test)) == (1438, 359)
    assert set(data.train.unique().tolist()) == {0.0, 1.0}
    assert data.train.dtype == torch.get_default_dtype()
    assert torch.equal(data.test, again.test)
    assert not torch.equal(data.test, other.test)


@pytest.mark.parametrize("names", [("x_train", "x_test"), ("train", "test")])
@pytest.mark.parametrize("flat", [False, True])
def test_npz_pair(names, flat, images, tmp_path):
    stored = images.reshape(len(images), -1) if flat else images
    np.savez(tmp_path / "d.npz", **{names[0]: stored[:20], names[1]: stored[20:], "y_train": np.arange(20)})
    data = datasets.load_data(tmp_path / "d.npz", 0)
    assert data.shape == (4, 4)
    assert torch.equal(data.train, binary(images)[:20])
    assert torch.equal(data.test, binary(images)[20:])


def test_npz_single_array_is_split(images, tmp_path):
    np.savez(tmp_path / "d.npz", anything=images.astype(float), labels=np.arange(30))
    data = datasets.load_data(tmp_path / "d.npz", 0)
    assert (len(data.train), len(data.test)) == (24, 6)
    both = torch.cat([data.train, data.test])
    assert sorted(both.tolist()) == sorted(binary(images).tolist())


def write_idx(path, images):
    raw = b"\0\0\x08\x03" + np.array(images.shape, ">i4").tobytes() + images.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder(suffix, images, tmp_path):
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", images[:20])
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", images[20:])
    data = datasets.load_data(tmp_path, 0)
    assert data.shape == (4, 4)
    assert torch.equal(data.train, binary(images)[:20])
    assert torch.equal(data.test, binary(images)[20:])


@pytest.mark.parametrize("shape", [(30, 4, 6), (30, 7)])
def test_images_that_are_not_square_run(shape, tmp_path):
    np.savez(tmp_path / "d.npz", images=np.random.default_rng(0).random(shape))
    assert quick_run("vae", tmp_path / "out", "--data", str(tmp_path / "d.npz"), "--steps", "2")["table"]


def bad_files(folder):
    """Files that are no data, by name."""
    grey = np.ones((5, 4))
    (folder / "empty.npz").touch()
    (folder / "text.npz").write_text("no archive")
    (folder / "cut.npz").write_bytes(b"PK\x03\x04 cut short")
    np.savez(folder / "strings.npz", x=np.full((5, 4), "a"))
    np.savez(folder / "objects.npz", x=np.full((5, 4), None))
    np.savez(folder / "nan.npz", x=grey * np.nan)
    np.savez(folder / "no_rows.npz", x=grey[:0])
    np.savez(folder / "one_row.npz", x=grey[:1])
    np.savez(folder / "labels.npz", y=grey[:, 0])
    np.savez(folder / "nothing.npz")
    np.savez(folder / "two.npz", a=grey, b=grey)
    np.savez(folder / "widths.npz", train=grey, test=grey[:, :2])
    np.savez(folder / "few.npz", x=grey[:3])
    np.savez(folder / "negative.npz", x=-grey)
    np.savez(folder / "black.npz", x=0 * grey)
    np.save(folder / "array.npy", grey)
    (folder / "folder").mkdir()
    for name, raw in (("cut_idx", b"\0\0\x08\x03\0\0\0\x09"), ("cut_gz", b"\x1f\x8b cut")):
        (folder / name).mkdir()
        suffix = ".gz" if name == "cut_gz" else ""
        (folder / name / f"train-images-idx3-ubyte{suffix}").write_bytes(raw)
        (folder / name / f"t10k-images-idx3-ubyte{suffix}").write_bytes(raw)


BAD = {
    "missing": (["--data", "{}/absent.npz"], "does not exist"),
    "empty file": (["--data", "{}/empty.npz"], "not an .npz file"),
    "text": (["--data", "{}/text.npz"], "not an .npz file"),
    "cut archive": (["--data", "{}/cut.npz"], "not an .npz file"),
    "npy": (["--data", "{}/array.npy"], "not an .npz file"),
    "strings": (["--data", "{}/strings.npz"], "not numbers"),
    "objects": (["--data", "{}/objects.npz"], "not an .npz file of numbers"),
    "nan": (["--data", "{}/nan.npz"], "NaN"),
    "no rows": (["--data", "{}/no_rows.npz"], "shape (0, 4)"),
    "one row": (["--data", "{}/one_row.npz"], "shape (1, 4)"),
    "few rows": (["--data", "{}/few.npz"], "2 rows or more"),
    "labels only": (["--data", "{}/labels.npz"], "0 arrays of images"),
    "no arrays": (["--data", "{}/nothing.npz"], "0 arrays of images"),
    "two arrays": (["--data", "{}/two.npz"], "2 arrays of images"),
    "widths": (["--data", "{}/widths.npz"], "make them equal"),
    "negative": (["--data", "{}/negative.npz"], "only zero grey levels"),
    "black": (["--data", "{}/black.npz"], "only zero grey levels"),
    "empty folder": (["--data", "{}/folder"], "neither train-images-idx3-ubyte"),
    "cut IDX": (["--data", "{}/cut_idx"], "not a whole IDX file"),
    "cut gzip": (["--data", "{}/cut_gz"], "cannot be read"),
    "objective": (["--elbo", "vimco"], "invalid choice: 'vimco'"),
    "device": (["--device", "tpu"], "invalid choice: 'tpu'"),
    "no GPU": (["--device", "cuda"], "use --device cpu"),
    "steps 0": (["--steps", "0"], "--steps 0: give a whole number of 1 or more"),
    "steps -3": (["--steps", "-3"], "--steps -3"),
    "steps x": (["--steps", "x"], "invalid int value"),
    "seed": (["--seed", "-1"], "--seed -1: give a whole number of 0 or more"),
    "particles": (["--num-particles", "0"], "--num-particles 0"),
    "output": (["--output", "{}/text.npz"], "choose another path"),
}


BAD_OPTIONS = {
    "layers": ("sigmoid_belief_network", ["--layers", "4"], "invalid choice: 4"),
    "one particle": ("sigmoid_belief_network", ["--num-particles", "1"], "--num-particles 1: give a whole number of 2"),
    "network objective": ("sigmoid_belief_network", ["--elbo", "dreg"], "invalid choice: 'dreg'"),
    "network data": ("sigmoid_belief_network", ["--data", "{}/nan.npz"], "NaN"),
    "network output": ("sigmoid_belief_network", ["--output", "{}/text.npz"], "choose another path"),
    "lr 0": ("sigmoid_belief_network", ["--lr", "0"], "--lr: 0: give a number above 0"),
    "lr nan": ("gaussian_mixture", ["--lr", "nan"], "--lr: nan: give a number above 0"),
    "lr x": ("gaussian_mixture", ["--lr", "x"], "--lr: x: give a number above 0"),
    "one of several": ("gaussian_mixture", ["--num-particles", "5,1"], "5,1: give whole numbers of 2 or more"),
    "no list": ("gaussian_mixture", ["--num-particles", "2;5"], "2;5: give whole numbers of 2 or more"),
    "empty list": ("gaussian_mixture", ["--num-particles", ""], "give whole numbers of 2 or more"),
    "mixture steps": ("gaussian_mixture", ["--steps", "0"], "--steps 0: give a whole number of 1 or more"),
    "mixture data": ("gaussian_mixture", ["--data", "d.npz"], "unrecognized arguments: --data"),
    "mixture output": ("gaussian_mixture", ["--output", "{}/text.npz"], "choose another path"),
} | {case: ("vae", *rest) for case, rest in BAD.items()}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_wrong_input_is_refused_in_one_line(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bad_files(tmp_path)
    name, arguments, message = BAD_OPTIONS[case]
    line = refusal(name, tmp_path, capsys, *(a.format(tmp_path) for a in arguments))
    assert message in line
