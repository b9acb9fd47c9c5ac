"""The topic model of models/ runs, learns by natural steps, and refuses a corpus that it cannot use in one line."""

import argparse
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from tests.model_files import MODELS, quick_run, refusal

lda = MODELS["lda"]


pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.mark.convergence
def test_quick_run_and_natural_steps_learn_in_a_fifth_of_the_passes(tmp_path, capsys):
    result = quick_run("lda", tmp_path)
    printed, errors = capsys.readouterr()
    assert errors == ""
    adam, natural = result["table"]
    assert [row["optimiser"] for row in (adam, natural)] == list(lda.TITLES.values())
    assert f"{natural['bound'][10]:.4f}" in printed
    assert len(natural["bound"]) == 11
    assert natural["bound"][0] == adam["bound"][0] < natural["bound"][2] - 0.3  # nats per word
    assert natural["bound"][2] > adam["bound"][5]
    assert natural["bound"][-1] < result["truth"] + 0.05


def test_same_seed_same_numbers(tmp_path):
    first, second = (quick_run("lda", tmp_path, "--passes", "1", "--seed", "5")["table"] for _ in range(2))
    assert [row["bound"] for row in first] == [row["bound"] for row in second]


def test_held_out_bound_is_the_best_elbo_of_one_topic():
    counts = torch.tensor([[3.0, 0.0, 1.0], [0.0, 2.0, 2.0]])
    beta_q = torch.tensor([[4.0, 2.0, 3.0]])  # with a single topic theta is 1 and the bound is E log p(words)
    expected = (counts * lda.mean_log(beta_q)).sum() / counts.sum()
    assert lda.held_out_bound(beta_q, counts) == pytest.approx(expected.item(), rel=1e-5)


def test_held_out_bound_is_below_the_evidence_and_near_it_for_sure_topics():
    counts = torch.tensor([[2.0, 0.0, 1.0]])
    beta = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    theta = dist.Dirichlet(torch.full((2,), lda.THETA)).sample([200_000])
    evidence = torch.xlogy(counts, theta @ beta).sum(-1).exp().mean().log().item() / 3
    bound = lda.held_out_bound(1e6 * beta, counts)
    assert evidence - 0.3 < bound < evidence + 0.003


def test_a_step_of_the_proportions_leaves_the_topics_and_other_documents_alone():
    counts = torch.poisson(torch.full((6, 5), 3.0))
    args = argparse.Namespace(num_particles=2, tau=1.0, kappa=0.7, passes=3)
    step, _ = lda.make_step("natural", 1.0, lda.LDA(counts, 2), args)
    rows = torch.tensor([1, 4])
    step(rows)
    theta = pyro.param("theta_q").detach()
    moved = (theta != 1).any(-1)
    assert moved.tolist() == [False, True, False, False, True, False]
    assert (pyro.param("beta_q") > lda.BETA / 2).all()


@pytest.mark.parametrize("steps", ["theta", "beta"])
def test_parts_of_the_guide_are_held(steps):
    model = lda.LDA(torch.poisson(torch.full((6, 5), 3.0)), 2)
    loss = lda.MeanField_ELBO(2)
    loss.loss_and_grads(model.model, model.guide, torch.tensor([0, 3]), steps)
    grads = {name: pyro.get_param_store()._params[f"{name}_q"].grad for name in ("theta", "beta")}
    assert {name for name, grad in grads.items() if grad is not None and (grad != 0).any()} == {steps}


def test_minibatches_have_the_bound_of_all_documents():
    model, loss = lda.LDA(torch.poisson(torch.full((8, 5), 3.0)), 2), lda.MeanField_ELBO(200)
    rows = torch.arange(8)
    whole = loss.loss(model.model, model.guide, rows)
    parts = [loss.loss(model.model, model.guide, part) for part in rows.split(2)]
    assert np.mean(parts) == pytest.approx(whole, rel=0.02)


@pytest.mark.convergence
def test_diverged_runs_are_shown_as_such(tmp_path, capsys):
    adam, natural = quick_run("lda", tmp_path, "--adam-lr", "1e30", "--passes", "2")["table"]
    assert math.isnan(adam["bound"][-1])
    assert natural["bound"][-1] > natural["bound"][0]
    assert "nan" in capsys.readouterr().out


def test_corpus_of_a_file(tmp_path):
    counts = np.random.default_rng(0).poisson(2.0, (13, 7))
    counts[4] = 0
    np.savez(tmp_path / "c.npz", counts=counts)
    corpus = lda.load_corpus(argparse.Namespace(data=tmp_path / "c.npz", seed=0, device="cpu"))
    assert [len(part) for part in corpus[:2]] == [10, 2]
    both = torch.cat(corpus[:2])
    assert sorted(both.tolist()) == sorted(np.delete(counts, 4, 0).tolist())
    options = ("--data", str(tmp_path / "c.npz"), "--passes", "1")
    assert quick_run("lda", tmp_path / "out", *options)["truth"] is None


def bad_files(folder):
    """Files that are no corpus, by name."""
    good = np.ones((5, 4), int)
    (folder / "text.npz").write_text("no archive")
    (folder / "cut.npz").write_bytes(b"PK\x03\x04 cut short")
    np.save(folder / "array.npy", good)
    np.savez(folder / "other.npz", x=good)
    np.savez(folder / "strings.npz", counts=np.full((5, 4), "a"))
    np.savez(folder / "objects.npz", counts=np.full((5, 4), None))
    np.savez(folder / "flat.npz", counts=good[0])
    np.savez(folder / "negative.npz", counts=-good)
    np.savez(folder / "halves.npz", counts=good / 2)
    np.savez(folder / "nan.npz", counts=good * math.nan)
    np.savez(folder / "empty.npz", counts=0 * good)
    np.savez(folder / "one.npz", counts=good[:1])


BAD = {
    "missing": (["--data", "{}/absent.npz"], "does not exist"),
    "text": (["--data", "{}/text.npz"], "not an .npz file"),
    "cut archive": (["--data", "{}/cut.npz"], "not an .npz file"),
    "npy": (["--data", "{}/array.npy"], "not an .npz file"),
    "another array": (["--data", "{}/other.npz"], "has no array 'counts'"),
    "strings": (["--data", "{}/strings.npz"], "give numbers in two dimensions"),
    "objects": (["--data", "{}/objects.npz"], "not an .npz file of numbers"),
    "flat": (["--data", "{}/flat.npz"], "counts have shape (4,)"),
    "negative": (["--data", "{}/negative.npz"], "whole numbers of 0 or more"),
    "halves": (["--data", "{}/halves.npz"], "whole numbers of 0 or more"),
    "nan": (["--data", "{}/nan.npz"], "whole numbers of 0 or more"),
    "empty": (["--data", "{}/empty.npz"], "0 documents"),
    "one": (["--data", "{}/one.npz"], "1 documents"),
    "topics": (["--topics", "1"], "--topics 1: give a whole number of 2 or more"),
    "kappa": (["--kappa", "0"], "0: give a number above 0"),
    "rates": (["--adam-lr", "0.1,x"], "x: give a number above 0"),
    "output": (["--output", "{}/text.npz"], "choose another path"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_refused_in_one_line(case, tmp_path, capsys):
    bad_files(tmp_path)
    arguments, message = BAD[case]
    assert message in refusal("lda", tmp_path, capsys, *(a.format(tmp_path) for a in arguments))
