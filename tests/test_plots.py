"""Each plot draws what it was given, into axes of its own or given ones, and leaves no global state behind."""

import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pyro_elbo_ext import plots

K = (1, 2, 10, 100)
LOSS = np.r_[np.linspace(40.0, 20.0, 60), np.full(60, 20.0)]
DRAWS = {"mu": torch.arange(50.0), "theta": torch.stack([torch.arange(50.0) ** 2, -torch.arange(50.0)], -1)}
DIGITS = torch.linspace(0, 1, 3 * 64).reshape(3, 64)

PLOTS = {
    "trace": lambda ax: plots.plot_trace({"loss": LOSS, "stage": np.arange(120) // 60}, ax=ax),
    "bounds": lambda ax: plots.plot_bounds(K, [-4.0, -3.0, -2.5, -2.0], [0.1] * 4, evidence=-1.9, ax=ax),
    "bounds-bracket": lambda ax: plots.plot_bounds(K, {"a": [-4.0] * 4, "b": [-3.0] * 4}, evidence=(-2, -1), ax=ax),
    "snr": lambda ax: plots.plot_snr(torch.tensor(K), {"dreg": torch.tensor(K).sqrt()}, ax=ax),
    "khat": lambda ax: plots.plot_khat(torch.tensor([[0.1, 0.9], [torch.inf, -torch.inf]]), 400, ax=ax),
    "reconstructions": lambda ax: plots.plot_reconstructions(DIGITS, 1 - DIGITS, columns=2, ax=ax),
    "traversals": lambda ax: plots.plot_traversals(lambda z: z.repeat(1, 2) / 9, torch.zeros(2), shape=(2, 2), ax=ax),
}


@pytest.mark.parametrize("name", PLOTS)
def test_draws_into_its_own_or_given_axes(name, tmp_path):
    settings = dict(matplotlib.rcParams)
    own = PLOTS[name](None)
    own.figure.savefig(tmp_path / "plot.png")
    given = Figure().subplots()
    assert PLOTS[name](given) is given
    assert given.get_title() == own.get_title() != ""
    assert len(given.get_children()) == len(own.get_children())
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize("name", ["trace", "bounds"])
def test_units_are_nats(name):
    assert "nats" in PLOTS[name](None).get_ylabel()


def line(ax, label):
    return next(line for line in ax.lines if line.get_label().startswith(label))


def test_trace_shows_the_bound_its_running_mean_and_the_stages():
    class Result:
        history = {"loss": LOSS, "stage": np.arange(120) // 60}

    ax = plots.plot_trace(Result(), window=5)
    assert np.array_equal(line(ax, "each step").get_ydata(), -LOSS)
    steps, mean = line(ax, "mean of 5").get_data()
    assert steps[0] == 5 and np.allclose(mean, np.convolve(-LOSS, np.full(5, 0.2), "valid"))
    assert line(ax, "new stage").get_xdata()[0] == 60.5  # between the last step of one stage and the first of the next
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(
        np.ptp(band[np.isclose(ax.collections[0].get_paths()[0].vertices[:, 0], 5)]), 2 * LOSS[:5].std(ddof=1) / 5**0.5
    )


def test_khat_counts_what_is_above_the_limit():
    labels = PLOTS["khat"](None).get_legend_handles_labels()[1]
    assert labels[:4] == [
        "1 trusted",
        "1 not trusted",
        "1 no tail (all weights equal)",
        "1 no estimate (a few draws carry all)",
    ]
    assert plots.plot_khat([0.65], 10_000).get_legend_handles_labels()[1][0] == "1 trusted"
    assert plots.plot_khat([0.65], 400).get_legend_handles_labels()[1][0] == "1 not trusted"


def test_pairs():
    other = {name: -values for name, values in DRAWS.items()}
    grid = plots.plot_pairs(DRAWS, other)
    assert grid.shape == (3, 3)
    assert [ax.get_xlabel() for ax in grid[2]] == ["mu", "theta[0]", "theta[1]"]
    points = grid[2, 0].collections[0].get_offsets()
    expected = np.concatenate([np.stack([d["mu"], d["theta"][:, 1]], 1) for d in (DRAWS, other)])
    assert np.array_equal(np.sort(points, 0), np.sort(expected, 0))
    axes = Figure().subplots(2, 2)
    assert (plots.plot_pairs(DRAWS, var_names=["theta"], axes=axes) == axes).all()
    assert plots.plot_pairs({"x": DRAWS["mu"]}).shape == (1, 1)


def test_pictures():
    image = PLOTS["reconstructions"](None).images[0].get_array()
    assert np.array_equal(image[1:9, 1:9], DIGITS[0].reshape(8, 8))
    assert np.array_equal(image[10:18, 1:9], 1 - DIGITS[0].reshape(8, 8))
    assert np.array_equal(image[19:27, 1:9], DIGITS[2].reshape(8, 8))
    assert np.ptp(image[19:, 10:]) == 0  # three images in rows of two leave a gap
    ax = PLOTS["traversals"](None)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["$z_{0}$", "$z_{1}$"]
    assert np.allclose(ax.images[0].get_array()[1:3, 1::3][0], np.linspace(-3, 3, 9) / 9)


BAD = {
    "history-of-nothing": (lambda: plots.plot_trace({"stage": [1]}), r"under 'loss'; it has \['stage'\]"),
    "history-lengths": (lambda: plots.plot_trace({"loss": LOSS, "stage": [0, 1]}), "for 'stage', but.*for 'loss'"),
    "no-history": (lambda: plots.plot_trace(3), "history must be a mapping.*got int"),
    "bounds-lengths": (lambda: plots.plot_bounds(K, {"iwae": [1.0, 2.0]}), r"bounds\['iwae'\] has shape.*4 numbers"),
    "se-lengths": (lambda: plots.plot_bounds(K, [1.0] * 4, [0.1]), r"se has shape \(1,\), but there are 4"),
    "snr-lengths": (lambda: plots.plot_snr(K, [1.0]), r"snr has shape \(1,\), but there are 4"),
    "unknown-site": (lambda: plots.plot_pairs(DRAWS, var_names=["nu"]), "guide has no site 'nu'; it has 'mu', 'theta'"),
    "reference-site": (lambda: plots.plot_pairs(DRAWS, {"mu": DRAWS["mu"]}), "reference has no site 'theta'"),
    "reference-shape": (lambda: plots.plot_pairs(DRAWS, {**DRAWS, "mu": DRAWS["theta"]}), "differ in their coord"),
    "too-many": (lambda: plots.plot_pairs({"x": torch.zeros(9, 13)}), "13 coordinates.*choose by var_names"),
    "axes": (lambda: plots.plot_pairs(DRAWS, axes=Figure().subplots(2, 2)), r"3 x 3 for 3.*got shape \(2, 2\)"),
    "images": (lambda: plots.plot_reconstructions(DIGITS, DIGITS[:2]), r"shape \(3, 64\), their.*\(2, 64\)"),
    "not-square": (lambda: plots.plot_reconstructions(DIGITS[:, :60], DIGITS[:, :60]), "not 7 x 7.*give shape="),
    "latents": (lambda: plots.plot_traversals(torch.sigmoid, torch.zeros(2, 2)), r"one vector, got shape \(2, 2\)"),
    "coordinate": (lambda: plots.plot_traversals(torch.sigmoid, torch.zeros(2), dims=[4]), "coordinate 4, but.* has 2"),
}  # fmt: skip


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_missing_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plots need matplotlib: pip install pyro-elbo-ext\[viz\]"):
        plots.plot_khat([0.1])


@pytest.mark.parametrize("name", PLOTS)
def test_no_pyplot(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    PLOTS[name](None)
