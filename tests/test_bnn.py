"""The regression network of models/ runs, learns by natural steps, and refuses data that it cannot use in one line."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from pyro_elbo_ext import MeanField_ELBO
from tests.model_files import MODELS, quick_run, refusal

bnn = MODELS["bnn"]


pytestmark = pytest.mark.usefixtures("on_cpu")


def write_folder(folder, rows=40):
    """A line with noise as a data folder with two splits."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 3))
    table = np.column_stack([x[:, 0], 100 + 10 * x[:, 0] + rng.normal(size=rows), x[:, 1:]])
    np.savetxt(folder / "data.txt", table)
    np.savetxt(folder / "index_features.txt", [0, 2, 3], fmt="%d")
    np.savetxt(folder / "index_target.txt", [1], fmt="%d")
    for split in range(2):
        order = rng.permutation(rows)
        np.savetxt(folder / f"index_train_{split}.txt", order[5:], fmt="%d")
        np.savetxt(folder / f"index_test_{split}.txt", order[:5], fmt="%d")
    return table


@pytest.mark.convergence
@pytest.mark.slow
def test_quick_run(tmp_path, capsys):
    result = quick_run("bnn", tmp_path)
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert [row["optimiser"] for row in result["table"]] == list(bnn.TITLES.values())
    for row, line in zip(result["table"], printed.splitlines()[1:], strict=True):
        assert line.startswith(row["optimiser"])
        assert f"{row['log_likelihood']:.3f} ± {row['log_likelihood_error']:.3f}" in line
        assert len(row["log_likelihood_splits"]) == 2
        assert row["steps"][-1] == 400
    untrained = quick_run("bnn", tmp_path / "untrained", "--steps", "1")["table"]
    values = [row["log_likelihood"] for row in (*untrained, *result["table"])]
    assert [value > -5.6 for value in values] == [False] * 2 + [True] * 2  # nats per row: below -6 before, -5.4 after


@pytest.mark.convergence
@pytest.mark.slow
def test_ivon_mode_learns_at_least_as_well_as_adam_in_few_steps(tmp_path):
    write_folder(tmp_path / "line")
    options = ("--data", str(tmp_path / "line"), "--batch-size", "10", "--ivon-lr", "0.1", "--adam-lr", "0.003,0.03")
    adam, ivon = quick_run("bnn", tmp_path / "out", *options)["table"]
    still = quick_run("bnn", tmp_path / "still", *options, "--steps", "1")["table"][1]
    assert ivon["rmse"] < 4 < still["rmse"]  # 1 is the noise, 10 the spread
    assert ivon["log_likelihood"] > adam["log_likelihood"] - 0.1


def test_same_seed_same_numbers(tmp_path):
    first, second = (quick_run("bnn", tmp_path, "--steps", "3", "--seed", "5")["runs"] for _ in range(2))
    assert [row["log_likelihood_splits"] for row in first] == [row["log_likelihood_splits"] for row in second]


def test_folder_is_read_as_it_says(tmp_path):
    table = write_folder(tmp_path / "line")
    splits = bnn.load_folder(tmp_path / "line", 2)
    for number, split in enumerate(splits):
        rows = np.loadtxt(tmp_path / "line" / f"index_test_{number}.txt").astype(int)
        torch.testing.assert_close(split.test_x, torch.as_tensor(table[rows][:, [0, 2, 3]]).to(split.x))
        torch.testing.assert_close(split.test_y, torch.as_tensor(table[rows, 1]).to(split.x))
        assert len(split.x) == 35


def test_diabetes_are_split_by_seed():
    first, again, other = (bnn.load_diabetes(seed, 2) for seed in (0, 0, 1))
    assert [len(split.x) for split in first] == [398, 398]
    assert torch.equal(first[0].test_y, again[0].test_y)
    assert not torch.equal(first[0].test_y, first[1].test_y)
    assert not torch.equal(first[0].test_y, other[0].test_y)


def small_regression():
    x, y = torch.randn(9, 2), torch.randn(9)
    return bnn.Regression(bnn.Split(x, y, x[:4], y[:4]), hidden=3, batch_size=4)


def test_minibatches_have_the_bound_of_all_rows():
    regression = small_regression()
    loss = MeanField_ELBO(vectorize_particles=False)

    def values(size):
        regression.batch_size = size
        return torch.tensor([loss.loss(regression.model, regression.guide) for _ in range(800)])

    part, whole = values(4), values(9)
    error = ((part.var() + whole.var()) / 800).sqrt()
    assert abs(part.mean() - whole.mean()) < 4 * error


def test_network_and_test_scores_are_those_of_a_known_function():
    regression = small_regression()
    pyro.param("w_loc", torch.zeros(3, 3))
    pyro.param("v_loc", torch.tensor([0.0, 0.0, 0.0, 1.0]))
    pyro.param("log_s_loc", torch.tensor(0.5))
    for name, shape in regression.shapes.items():
        pyro.param(f"{name}_scale", torch.full(shape, 1e-6), dist.constraints.softplus_positive)
    mean = regression.y_loc + regression.y_scale / 2  # v's bias / sqrt(H + 1)
    expected = dist.Normal(mean, regression.y_scale * math.exp(0.5)).log_prob(regression.test_y).mean()
    log_likelihood, rmse = regression.test()
    assert log_likelihood == pytest.approx(expected.item(), rel=1e-4)
    assert rmse == pytest.approx((regression.test_y - mean).square().mean().sqrt().item(), rel=1e-4)


@pytest.mark.parametrize("name", bnn.TITLES)
def test_schedule_falls_from_one_to_nothing(name):
    regression = small_regression()
    optimiser, after = bnn.make_optimiser(name, 0.05, 4)
    svi = SVI(regression.model, regression.guide, optimiser, MeanField_ELBO(vectorize_particles=False))
    moved = []
    for _ in range(6):
        before = pyro.param("w_loc").detach().clone() if moved else None
        svi.step()
        after()
        moved.append(0.0 if before is None else (pyro.param("w_loc").detach() - before).abs().max().item())
    assert moved[1] > moved[3] > moved[4]
    assert moved[4] == 0


def bad_folders(folder):
    """Folders that are no data, by name."""
    broken = {
        "words": ("data.txt", "a b c d\n"),
        "ragged": ("data.txt", "1 2 3 4\n1 2\n"),
        "nan": ("data.txt", "1 2 3 4\n1 nan 3 4\n"),
        "columns": ("index_features.txt", "0\n9\n"),
        "targets": ("index_target.txt", "0\n1\n"),
        "rows": ("index_test_1.txt", "0\n-1\n"),
        "halves": ("index_train_0.txt", "0.5\n"),
        "twice": ("index_train_0.txt", "3\n3\n"),
        "constant": ("index_train_0.txt", "0\n1\n"),
    }
    for name, (file, text) in broken.items():
        write_folder(folder / name)
        (folder / name / file).write_text(text)
    np.savetxt(folder / "constant" / "data.txt", np.ones((40, 4)))
    write_folder(folder / "missing")
    (folder / "missing" / "index_test_1.txt").unlink()
    (folder / "file").write_text("1 2\n")


BAD = {
    "absent": (["--data", "{}/absent"], "data.txt does not exist"),
    "file": (["--data", "{}/file"], "does not exist"),
    "words": (["--data", "{}/words"], "is no table of numbers"),
    "ragged": (["--data", "{}/ragged"], "is no table of numbers"),
    "nan": (["--data", "{}/nan"], "finite numbers"),
    "columns": (["--data", "{}/columns"], "index_features.txt: give whole numbers from 0 to 3"),
    "targets": (["--data", "{}/targets"], "index_target.txt: 2 columns"),
    "rows": (["--data", "{}/rows"], "index_test_1.txt: give whole numbers from 0 to 39"),
    "halves": (["--data", "{}/halves"], "index_train_0.txt: give whole numbers"),
    "twice": (["--data", "{}/twice"], "all different"),
    "constant": (["--data", "{}/constant"], "the output is the same in every row"),
    "missing": (["--data", "{}/missing"], "index_test_1.txt does not exist"),
    "steps": (["--steps", "0"], "--steps 0: give a whole number of 1 or more"),
    "rates": (["--ivon-lr", "0.1,0"], "0: give a number above 0"),
    "output": (["--output", "{}/file"], "choose another path"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_refused_in_one_line(case, tmp_path, capsys):
    bad_folders(tmp_path)
    arguments, message = BAD[case]
    assert message in refusal("bnn", tmp_path, capsys, *(a.format(tmp_path) for a in arguments))
