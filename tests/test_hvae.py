"""The hierarchical VAE of models/ weighs, merges and anneals as its equations say, and learns in all layers."""

import itertools
import math
from argparse import Namespace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_elbo_ext import MeanField_ELBO
from tests.model_files import HELPERS, MODELS, quick_run, refusal

hvae, bound = MODELS["hvae"], HELPERS["report"].bound

pytestmark = pytest.mark.usefixtures("on_cpu")

KINDS = ("plain", "ladder")


def tiny(kind, sizes=(2, 2), batch_size=7):
    """A pair for images of six pixels, far from its start, and twenty images."""
    pair = hvae.HVAE(6, sizes, 4, kind, batch_size)
    for parameter in pair.parameters():
        torch.nn.init.normal_(parameter, 0, 0.4)
    for head, size in zip(pair.heads, sizes, strict=True):
        torch.nn.init.constant_(head.bias[size:], 0.7)  # a wide guide, whose weights have no heavy tails
    return pair, torch.rand(20, 6).round()


def settings(**changed):
    """What ``train`` and ``make_pair`` read."""
    small = {"num_particles": 2, "batch_size": 100, "latent": 4, "hidden": 32, "layers": 2, "warm_up": 100, "lr": 1e-2}
    return Namespace(**({"seed": 0, "steps": 300, "device": "cpu", "free_bits": 0.0} | small | changed))


def digits(num_test):
    """The bundled digits, of which a few are scored."""
    data = HELPERS["datasets"].load_data(None, 0)
    return data._replace(test=data.test[:num_test])


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_average_to_the_evidence(kind, layers):
    pair, x = tiny(kind, (1,) * layers)
    grid = torch.linspace(-30, 30, 1001)[:, None]  # scales of the layers are between 0.1 and 4
    log_p = dist.Normal(0.0, 1.0).log_prob(grid).sum(-1)
    for layer in range(layers - 1, 0, -1):  # p(z_l) on the grid, from p(z_{l+1})
        above = pair.prior(layer, grid[:, None], x).log_prob(grid) + log_p[:, None]
        log_p = above.logsumexp(0) + math.log(0.06)
    evidence = (pair.likelihood(grid[:, None]).log_prob(x) + log_p[:, None]).logsumexp(0).exp() * 0.06
    weights = hvae.examine(pair, x, 20000).log_w.exp()
    assert ((weights.mean(0) - evidence).abs() < 4 * weights.std(0) / math.sqrt(len(weights))).all()


def test_a_merge_is_the_normalised_product():
    first, second = (dist.Normal(torch.randn(5, 3), torch.rand(5, 3) + 0.2).to_event(1) for _ in range(2))
    z = torch.randn(100, 5, 3)
    ratio = hvae.merge(first, second).log_prob(z) - first.log_prob(z) - second.log_prob(z)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_a_ladder_of_no_evidence_is_the_prior_below_the_top():
    pair, x = tiny("ladder")
    with torch.no_grad():
        pair.heads[0].bias[2:] = 20.0  # log scales
        pair.heads[0].weight[2:] = 0.0
    kl = hvae.examine(pair, x, 50).kl
    torch.testing.assert_close(kl[0], torch.zeros(20), rtol=0, atol=1e-6)
    assert (kl[1] > 0.01).all()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_have_the_kl_of_the_bounds_terms(kind):
    pair, x = tiny(kind, (2, 3, 2), batch_size=20)
    terms = [MeanField_ELBO(50).terms(pair.model, pair.guide, x) for _ in range(20)]
    assert terms[0].closed_form == (("z3",) if kind == "plain" else ("z1", "z2", "z3"))
    examined = hvae.examine(pair, x, 1000)
    torch.testing.assert_close(examined.kl.shape, torch.Size([3, 20]))
    for layer, kl in enumerate(examined.kl.sum(1), 1):
        values = torch.tensor([term.kl[f"z{layer}"] for term in terms])  # 1000 draws in all
        noise = torch.stack([hvae.examine(pair, x, 50).kl[layer - 1].sum() for _ in range(20)]).std()
        assert abs(values.mean() - kl) < 4 * (values.std() + noise) / math.sqrt(20)


@pytest.mark.parametrize(("name", "kind"), list(itertools.product(hvae.TITLES, KINDS)))
def test_minibatch_loss_estimates_the_bound_on_all_images(name, kind):
    pair, x = tiny(kind)
    expected = bound(hvae.examine(pair, x, 8000).log_w, 1 if name == "elbo" else 4)
    objective = hvae.make_objective(name, 4)
    values = torch.tensor([-objective.loss(pair.model, pair.guide, x) for _ in range(80)])
    assert abs(values.mean() - expected.sum()) < 4 * values.std() / math.sqrt(len(values)) + 0.05


def gradients(name, pair, x, count):
    """Gradients of an objective, one a row."""
    parameters, objective, rows = list(pair.parameters()), hvae.make_objective(name, 3), []
    for _ in range(count):
        loss = objective.differentiable_loss(pair.model, pair.guide, x)
        parts = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_dreg_has_the_gradient_of_iwae_where_model_and_guide_share_a_pass(beta):
    pair, x = tiny("ladder", batch_size=20)
    pair.beta = beta
    first, second = (gradients(name, pair, x, 100) for name in ("iwae", "dreg"))
    error = ((first.var(0) + second.var(0)) / 100).sqrt()
    z = (first.mean(0) - second.mean(0)) / error.clamp(min=1e-9)
    assert z.abs().max() < 4.5  # of about 150 parameters
    shared = len(torch.cat([part.flatten() for part in pair.down.parameters()]))
    assert (error[:shared] > 0).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("free", [False, True])
def test_warm_up_and_free_bits_change_the_kl_alone(kind, free):
    pair, x = tiny(kind, batch_size=20)
    pyro.set_rng_seed(1)
    terms = MeanField_ELBO(3).terms(pair.model, pair.guide, x)
    floor = free * sum(terms.kl.values()) / 2  # between the layers' own
    pair.beta = 0.3
    pyro.set_rng_seed(1)
    loss = hvae.make_objective("elbo", 3, floor / len(x)).loss(pair.model, pair.guide, x)
    kl = sum(max(value, floor) if free else value for value in terms.kl.values())
    assert loss == pytest.approx(0.3 * kl - terms.reconstruction)


@pytest.mark.parametrize(("warm_up", "beta"), [(0, 1.0), (2, 1.0), (8, 0.5)])
def test_warm_up_ends(warm_up, beta):
    data = digits(20)
    result = hvae.train(hvae.Run(1, "plain", "elbo"), data, settings(steps=4, warm_up=warm_up, hidden=4))
    assert result.pair.beta == beta


@pytest.mark.parametrize(("layers", "kind"), list(itertools.product(range(1, 6), KINDS)))
def test_all_models_are_of_one_size(layers, kind):
    args = settings(layers=layers, latent=16, hidden=128)
    wanted = hvae.size(hvae.HVAE(64, [16 >> i for i in range(layers)], 128, "ladder", 100))
    for depth in (1, layers):
        pair = hvae.make_pair(hvae.Run(depth, kind, "elbo"), 64, args)
        assert hvae.size(pair) == pytest.approx(wanted, rel=0.02)
        assert len(pair.sizes) == depth


def test_units_are_active_above_a_hundredth():
    swing = torch.tensor([-1.0, 1.0]).repeat(50)[:, None] * torch.tensor([0.09, 0.11, 0.0])
    assert hvae.Examination(None, None, [swing, swing[:, :1], 10 + swing[:, 1:]]).active == [1, 0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_means_are_those_of_the_guide(kind):
    pair, x = tiny(kind)
    examined, draws = hvae.examine(pair, x, 4000), {}
    pair.infer(x.expand(4000, 20, 6), lambda name, q: draws.setdefault(name, q.sample()))
    for layer, means in enumerate(examined.means, 1):
        z = draws[f"z{layer}"]
        assert ((z.mean(0) - means).abs() < 4.5 * 2**0.5 * z.std(0) / math.sqrt(4000)).all()


def test_samples_of_a_row_share_their_top_layer():
    pair, x = tiny("plain")
    with torch.no_grad():
        pair.down[1][1].weight[2:] = 0.0
        pair.down[1][1].bias[2:] = -30.0  # z1 is its mean given z2
    images = hvae.fantasies(pair, x).reshape(8, 8, 6)
    torch.testing.assert_close(images, images[:, :1].expand_as(images))
    assert images[:, 0].std(0).max() > 1e-4


@pytest.mark.convergence
def test_it_learns_in_both_layers():
    data = digits(150)
    pixels = dist.Bernoulli(data.train.mean(0).clamp(0.01, 0.99)).log_prob(data.test).sum(-1).mean()
    run = hvae.Run(2, "ladder", "elbo")
    before, after = (hvae.train(run, data, settings(steps=steps)) for steps in (1, 250))
    assert [(result.bounds[-1].mean() > pixels + 2).item() for result in (before, after)] == [False, True]
    assert min(after.row["kl"]) > 0.3


def test_quick_table(tmp_path, capsys):
    result = quick_run("hvae", tmp_path, "--steps", "2", "--elbo", "dreg", "--kind", "ladder", "--layers", "3")
    runs = ["1 layer, IWAE + DReG", "3 layers, ladder, IWAE + DReG"]
    assert [row["run"] for row in result["table"]] == runs
    assert set(result["curves"]) == {"K", *runs}
    for row, line in zip(result["table"], capsys.readouterr().out.splitlines()[1:], strict=True):
        assert line.startswith(row["run"])
        assert f"{row['bound']:.2f} ± {row['bound_error']:.2f}" in line
        assert row["parameters"] == pytest.approx(result["table"][0]["parameters"], rel=0.02)


@pytest.mark.parametrize(
    ("options", "runs"),
    {
        ("all", "both", 2): ["1 layer, ELBO", "2 layers, plain, ELBO", "2 layers, ladder, ELBO"]
        + ["2 layers, ladder, IWAE", "2 layers, ladder, IWAE + DReG"],
        ("dreg", "plain", 3): ["1 layer, IWAE + DReG", "3 layers, plain, IWAE + DReG"],
        ("all", "both", 1): ["1 layer, ELBO", "1 layer, IWAE", "1 layer, IWAE + DReG"],
    }.items(),
)
def test_what_is_trained(options, runs):
    args = Namespace(**dict(zip(("elbo", "kind", "layers"), options, strict=True)))
    assert [run.title for run in hvae.plan(args)] == runs


def test_gains_are_paired(capsys):
    bounds = torch.randn(2, 10, 50)
    row = {"run": "a", "parameters": 1, "kl": [1.0, 2.0], "active": [1, 2], "k_hat": 0.1, "seconds": 1.0}
    last = hvae.tabulate([hvae.Result(None, bounds[i], row) for i in range(2)])[1]
    gains = (bounds[1] - bounds[0])[-1]
    assert last["gain"] == pytest.approx(gains.mean().item())
    assert last["gain_error"] == pytest.approx(gains.std().item() / math.sqrt(50))
    assert f"{last['gain']:+.2f} ± {last['gain_error']:.2f}" in capsys.readouterr().out


BAD = {
    "no layer": (["--layers", "0"], "invalid choice: 0"),
    "six layers": (["--layers", "6"], "invalid choice: 6"),
    "kind": (["--kind", "rope"], "invalid choice: 'rope'"),
    "free bits": (["--free-bits", "-1"], "--free-bits -1.0: give a number of 0 or more"),
    "free nan": (["--free-bits", "nan"], "--free-bits nan: give a number of 0 or more"),
    "free particles": (["--free-bits", "1", "--elbo", "dreg"], "has no KL"),
    "warm-up": (["--warm-up", "-1"], "--warm-up -1: give a whole number of 0 or more"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_refused_in_one_line(case, tmp_path, capsys):
    arguments, message = BAD[case]
    assert message in refusal("hvae", tmp_path, capsys, *arguments)
