"""models/air.py: what it makes, its weights against exact ones, its gradient against enumeration, that it learns."""

import math
from argparse import Namespace

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.nn.functional import affine_grid, grid_sample

from pyro_elbo_ext import IWAE_ELBO
from tests.model_files import HELPERS, MODELS, quick_run

air, bound = MODELS["air"], HELPERS["report"].bound

pytestmark = pytest.mark.usefixtures("on_cpu")


def make_pair(objects=2, sd=0.3, blank=False):
    """An untrained pair, whose decoder paints nothing if ``blank``, and two canvases.

    Its guide is a little wider than the prior, so that weights have a variance.
    """
    pair = air.AIR(objects, 3, 8, 20, sd)
    with torch.no_grad():
        pair.decoder[-1].bias.fill_(-1e3 if blank else 0.5)
        pair.look[-1][-1].bias[4:] = 0.2
        pair.encoder[-1].weight.mul_(0.1)
        pair.encoder[-1].bias[3:] = 0.2
    return pair, air.make_canvases(np.random.default_rng(0).random((5, 8, 8)), 2, np.random.default_rng(1)).images


def frames(num_frames):
    """Scales, which keep to one side of 0, and centres."""
    return torch.cat([0.3 + 0.3 * torch.rand(num_frames, 1), torch.rand(num_frames, 2) - 0.5], -1)


def theta(scale, x, y):
    """Affine maps, as torch takes them."""
    zero = torch.zeros_like(scale)
    return torch.stack([scale, zero, x, zero, scale, y], -1).reshape(-1, 2, 3)


def test_paste_and_cut_are_the_spatial_transformer():
    frame, patches, canvases = frames(6), torch.rand(6, 8, 8), torch.rand(6, air.CANVAS, air.CANVAS)
    scale, x, y = frame.unbind(-1)
    inverse, forward = theta(1 / scale, -x / scale, -y / scale), theta(scale, x, y)
    grid = affine_grid(inverse, [6, 1, air.CANVAS, air.CANVAS], align_corners=False)
    pasted = grid_sample(patches[:, None], grid, align_corners=False)[:, 0]
    torch.testing.assert_close(air.paste(patches, frame), pasted)
    grid = affine_grid(forward, [6, 1, air.PATCH, air.PATCH], align_corners=False)
    seen = grid_sample(canvases[:, None], grid, align_corners=False)[:, 0]
    torch.testing.assert_close(air.cut(canvases, frame), seen)


def test_canvases_hold_as_many_digits_as_they_say():
    rng = np.random.default_rng(0)
    images, counts = air.make_canvases(np.ones((3, 8, 8)), 300, rng)
    assert counts.unique().tolist() == [0, 1, 2]
    width = air.SCALE * air.CANVAS  # of a digit that is all ink
    ink = images.sum((1, 2)) / width**2
    assert (images[counts == 0] == 0).all()
    assert (ink[counts == 1] - 1).abs().max() < 0.25  # sizes differ by a tenth
    assert (ink[counts == 2] > 1.3).all()  # little of it lies on each other
    assert images.max() <= 1


def test_digits_to_test_on_are_others():
    args = Namespace(seed=3, canvases=20, test_canvases=20, device="cpu")
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(air, "make_canvases", lambda digits, *rest: drawn.append(digits) or (torch.zeros(1),) * 2)
        air.load_canvases(args)
    train, test = ({digit.tobytes() for digit in digits} for digits in drawn)
    assert len(drawn[0]) + len(drawn[1]) == 1797
    assert not train & test


def test_absent_objects_cancel_in_the_weight():
    pair, x = make_pair(objects=3)
    with torch.no_grad(), pyro.plate("draws", 50, dim=-2):
        guide = poutine.trace(pair.guide).get_trace(x)
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(x)
    air.log_weights(guide, model)
    for t in range(3):
        pres = guide.nodes[f"pres{t}"]["value"].bool()
        for name in (f"where{t}", f"what{t}"):
            difference = model.nodes[name]["log_prob"] - guide.nodes[name]["log_prob"]
            assert (difference[~pres] == 0).all()
            assert (difference[pres] != 0).all()
        if t > 0:
            assert not (pres & ~guide.nodes[f"pres{t - 1}"]["value"].bool()).any()
            assert (~pres).any()
    nobody = guide.nodes["pres0"]["value"] == 0
    logit = pair.look(x.flatten(1))[:, 0]
    exact = torch.distributions.Normal(0.0, 0.3).log_prob(x).sum((1, 2)) - math.log(2) + nn.functional.softplus(logit)
    torch.testing.assert_close(air.log_weights(guide, model)[nobody], exact.detach().expand(50, 2)[nobody])


def test_weights_of_a_blank_decoder_average_to_the_density_of_noise():
    pair, x = make_pair(blank=True)
    log_w = air.sample(pair, x, 5000).log_w
    w = (log_w - torch.distributions.Normal(0.0, 0.3).log_prob(x).sum((1, 2))).exp()
    assert ((w.mean(0) - 1).abs() < 4 * w.std(0) / math.sqrt(len(w))).all()


def test_weights_average_to_the_evidence_that_prior_draws_find():
    pair, x = make_pair(objects=1, sd=2.0)
    with torch.no_grad():
        log_w, pres = air.sample(pair, x, 5000).log_w, (torch.rand(5000) < 0.5).to(x)
        canvas = pair.draw(pres, torch.randn(5000, 3), torch.randn(5000, 3))[:, None]
    found, expected = (
        (
            values - torch.distributions.Normal(0.0, 2.0).log_prob(x).sum((1, 2))
        ).exp()  # of numbers that are not too small
        for values in (log_w, torch.distributions.Normal(canvas, 2.0).log_prob(x).sum((-1, -2)))
    )
    error = ((found.var(0) + expected.var(0)) / 5000).sqrt()
    assert ((found.mean(0) - expected.mean(0)).abs() < 4 * error).all()
    assert ((expected.mean(0) - 1).abs() > 10 * error).any()  # and is not that of empty canvases


def test_loss_is_the_bound_on_all_canvases():
    pair, x = make_pair()
    expected = bound(air.sample(pair, x, 5000).log_w, 4).sum().item()
    values = torch.tensor([-IWAE_ELBO(4).loss(pair.model, pair.guide, x) for _ in range(100)])
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(len(values)) + 0.1


def exact_gradient(pair, name):
    """Of the bound on one canvas in the logit of presence, when only counts matter: a sum over pairs of counts."""
    logit = pair.look[-1][-1].bias[0].detach().requires_grad_()
    p = logit.sigmoid()
    q = torch.stack([1 - p, p * (1 - p), p**2])
    log_w = torch.tensor([0.5, 0.25, 0.25]).log() - q.log()
    pairs = log_w if name == "elbo" else torch.logaddexp(log_w[:, None], log_w) - math.log(2)
    value = (q * pairs).sum() if name == "elbo" else (q[:, None] * q * pairs).sum()
    return torch.autograd.grad(value, logit)[0]


@pytest.mark.parametrize("name", air.TITLES)
def test_gradient_of_presence_is_that_of_enumerated_counts(name):
    pair, x = make_pair(blank=True)
    with torch.no_grad():  # places and looks as in the prior, so that a weight is a function of the count
        for layer in (pair.look[-1][-1], pair.encoder[-1]):
            layer.weight.zero_()
            layer.bias.zero_()
        pair.look[-1][-1].bias[0] = 1.0
    logits, objective = pair.look[-1][-1].bias, air.make_objective(name, 2)
    losses = (objective.differentiable_loss(pair.model, pair.guide, x[:1].expand(20, -1, -1)) for _ in range(30))
    found = torch.stack([torch.autograd.grad(loss, logits)[0][0] / 20 for loss in losses])
    exact = exact_gradient(pair, name)
    assert abs(found.mean() + exact) < 4 * found.std() / math.sqrt(len(found))
    assert exact.abs() > 8 * found.std() / math.sqrt(len(found))  # and is told from 0


def test_counts_are_the_most_probable_ones():
    pres = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[1.0, 1.0]]])
    log_w = torch.tensor([[0.0], [0.0], [2.0]])
    draws = air.Draws(log_w, pres, pres, pres)
    assert draws.counts(torch.ones_like(log_w)).tolist() == [1]
    assert draws.counts(log_w.softmax(0)).tolist() == [2]


def test_quick_run_reports_what_it_prints(tmp_path, capsys):
    result = quick_run("air", tmp_path, "--steps", "2", "--test-canvases", "4")
    printed, errors = capsys.readouterr()
    assert errors == ""
    for row in result["table"]:
        assert f"{row['objective']:<20} {row['plain']:.1%}, weighted {row['weighted']:.1%}" in printed
        assert [step for step, _ in row["curve"]] == [0, 1, 2]
        found = row["found_by_truth"]
        assert sum(map(sum, found)) == 4
        assert sum(found[count][count] for count in range(3)) == 4 * row["plain"]


@pytest.mark.convergence
def test_learns_to_paint_digits():
    settings = {"seed": 0, "canvases": 400, "test_canvases": 20, "device": "cpu", "objects": 2, "latent": 4}
    settings |= {"hidden": 32, "batch_size": 32, "num_particles": 2, "lr": 4e-3}
    data = air.load_canvases(Namespace(**settings))
    runs = [air.train("iwae", data, Namespace(steps=steps, **settings)).result for steps in (1, 80)]
    before, after = (run.bounds[0].mean() for run in runs)
    assert after > before + 5  # nats: about 10
