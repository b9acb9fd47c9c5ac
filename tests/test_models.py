"""Every file in models/ runs, learns, reads what it says it reads, and refuses the rest in one line."""

import gzip
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_elbo_ext import IWAE_ELBO

FOLDER = Path(__file__).parents[1] / "models"
MODELS = {"vae.py": ["vae.json", "vae.png"]}  # file -> what it writes


def load(name):
    spec = importlib.util.spec_from_file_location(f"models_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


vae = load("vae")


@pytest.fixture(autouse=True)
def on_cpu():
    """The scripts pick their own device; tiny tensors want one thread."""
    torch.set_default_device(None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_table_lists_every_model():
    assert {path.name for path in FOLDER.glob("*.py")} == set(MODELS)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (30, 4, 4), dtype=np.uint8)


def binary(images):
    return torch.as_tensor(images.reshape(len(images), -1) / images.max() >= 0.5).to(torch.get_default_dtype())


def report(folder, *options):
    assert vae.main(["--quick", "--output", str(folder), *options]) == 0
    return json.loads((folder / "vae.json").read_text())


@pytest.mark.parametrize("batching", ["plate", "loader"])
def test_quick_run(batching, tmp_path, capsys):
    torch.set_num_threads(2)
    result = report(tmp_path, "--batching", batching)
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == MODELS["vae.py"]
    assert (tmp_path / "vae.png").read_bytes().startswith(b"\x89PNG")
    assert [row["objective"] for row in result["table"]] == list(vae.TITLES.values())
    for row in result["table"]:
        assert row["objective"] in printed
        assert f"{row['bound']:.2f} ± {row['bound_error']:.2f}" in printed
        assert math.isfinite(row["bound"])
        assert row["seconds"] > 0
    assert set(result["curves"]) == {"K", *vae.TITLES}
    assert result["settings"]["batching"] == batching
    assert torch.get_num_threads() == 2
    untrained = report(tmp_path / "untrained", "--batching", batching, "--steps", "1", "--elbo", "elbo")
    for after in result["table"]:
        assert after["bound"] > untrained["table"][0]["bound"] + 15  # nats: 64 pixels at log 2 before, about -20 after


def test_same_seed_same_numbers(tmp_path):
    options = ("--steps", "3", "--elbo", "dreg", "--seed", "5")
    first, second = (report(tmp_path, *options)["curves"] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize("name", vae.TITLES)
def test_loss_estimates_the_bound_on_all_images(name, batch_size):
    x = torch.rand(20, 9).round()
    pair = vae.VAE(9, 2, 8, len(x), batch_size)
    log_w = vae.log_weights(pair, x, 4000)
    expected = vae.bound(log_w, 1 if name == "elbo" else 8).sum().item()
    objective = vae.make_objective(name, 8)
    # minibatches of 7, 7 and a ragged 6 have the full bound as their weighted mean
    parts = [(x, 1.0)] * 3 if batch_size else [(part, len(part) / len(x)) for part in x.split(7)]
    runs = [[share * -objective.loss(pair.model, pair.guide, part) for part, share in parts] for _ in range(50)]
    values = np.mean(runs, 1) if batch_size else np.sum(runs, 1)
    assert abs(values.mean() - expected) < 5 * values.std() / math.sqrt(len(values)) + 0.05


def test_image_bounds_sum_to_iwae_elbo():
    x = torch.rand(25, 9).round()
    pair = vae.VAE(9, 2, 8, len(x), None)
    per_image = vae.bound(vae.log_weights(pair, x, 5 * 2000), 5)
    values = torch.tensor([-IWAE_ELBO(5).loss(pair.model, pair.guide, x) for _ in range(100)])
    assert per_image.shape == (25,)
    assert abs(values.mean() - per_image.sum()) < 5 * values.std() / math.sqrt(len(values)) + 0.05


def test_bound_is_log_mean_exp_over_groups():
    log_w = torch.randn(7, 3)
    groups = [log_w[:3], log_w[3:6]]
    expected = sum(group.exp().mean(0).log() for group in groups) / 2
    torch.testing.assert_close(vae.bound(log_w, 3), expected)


def test_digits_are_bundled_and_split_by_seed():
    data, again, other = (vae.load_data(None, seed) for seed in (0, 0, 1))
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
    data = vae.load_data(tmp_path / "d.npz", 0)
    assert data.shape == (4, 4)
    assert torch.equal(data.train, binary(images)[:20])
    assert torch.equal(data.test, binary(images)[20:])


def test_npz_single_array_is_split(images, tmp_path):
    np.savez(tmp_path / "d.npz", anything=images.astype(float), labels=np.arange(30))
    data = vae.load_data(tmp_path / "d.npz", 0)
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
    data = vae.load_data(tmp_path, 0)
    assert data.shape == (4, 4)
    assert torch.equal(data.train, binary(images)[:20])
    assert torch.equal(data.test, binary(images)[20:])


@pytest.mark.parametrize("shape", [(30, 4, 6), (30, 7)])
def test_images_that_are_not_square_run(shape, tmp_path):
    np.savez(tmp_path / "d.npz", images=np.random.default_rng(0).random(shape))
    assert report(tmp_path, "--data", str(tmp_path / "d.npz"), "--steps", "2")["table"]


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


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_refused_in_one_line(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bad_files(tmp_path)
    arguments, message = BAD[case]
    with pytest.raises(SystemExit) as exit:
        vae.main(["--quick", "--output", str(tmp_path / "out"), *(a.format(tmp_path) for a in arguments)])
    printed, errors = capsys.readouterr()
    assert exit.value.code == 2
    assert printed == ""
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()
