"""What every loss must do, whatever its bound: run under SVI and under torch, agree with itself, and train."""

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from tests.cases import AUTO_GUIDES, ELBOS, MODELS, local_guide, local_model, log_evidence


def make(name, num_particles=4, **kwargs):
    return ELBOS[name](num_particles=num_particles, **kwargs)


def gradients():
    store = pyro.get_param_store()
    found = {n: p.grad.clone() for n, p in store.named_parameters() if p.grad is not None}
    for _, p in store.named_parameters():
        p.grad = None
    return found


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ELBOS)
def test_runs_under_svi(name, model, vectorize):
    guide = AutoNormal(MODELS[model])
    svi = SVI(MODELS[model], guide, pyro.optim.Adam({"lr": 0.01}), loss=make(name, vectorize_particles=vectorize))
    first = svi.step()
    before = {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}
    assert isinstance(first, float) and isinstance(svi.step(), float) and isinstance(svi.evaluate_loss(), float)
    for n, p in pyro.get_param_store().named_parameters():
        assert not torch.equal(before[n], p), f"{n} did not move"


@pytest.mark.parametrize("local", [False, True], ids=["global-params", "module-local-params"])
@pytest.mark.parametrize("name", ELBOS)
def test_is_a_module_for_torch_optimisers(name, local):
    with pyro.settings.context(module_local_params=local):
        guide = AutoNormal(local_model)
        loss = make(name)(local_model, guide)
        loss()
        optimiser = torch.optim.Adam(guide.parameters(), lr=0.01)
        before = [p.detach().clone() for p in guide.parameters()]
        value = loss()
        value.backward()
        optimiser.step()
    assert value.shape == () and before
    assert all(not torch.equal(b, p) for b, p in zip(before, guide.parameters(), strict=True))


@pytest.mark.parametrize("name", ELBOS)
def test_runs_under_svi_with_module_local_params(name):
    with pyro.settings.context(module_local_params=True):
        guide = AutoNormal(local_model)
        svi = SVI(local_model, guide, pyro.optim.Adam({"lr": 0.01}), loss=make(name))
        assert isinstance(svi.step(), float) and isinstance(svi.step(), float)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ELBOS)
def test_keeps_the_dtype(name, dtype):
    torch.set_default_dtype(dtype)
    loss = make(name).differentiable_loss(local_model, local_guide)
    assert loss.dtype == dtype


@pytest.mark.parametrize("name", ELBOS)
def test_loss_is_one_number_whoever_asks(name):
    elbo = make(name)
    values = []
    for ask in (elbo.loss, elbo.loss_and_grads, elbo.differentiable_loss):
        pyro.set_rng_seed(3)
        values.append(float(torch.as_tensor(ask(local_model, local_guide, 4)).detach()))
    assert values[0] == pytest.approx(values[1]) == pytest.approx(values[2])


@pytest.mark.parametrize("name", ELBOS)
def test_differentiable_loss_has_the_gradient_of_loss_and_grads(name):
    elbo = make(name)
    pyro.set_rng_seed(4)
    elbo.loss_and_grads(local_model, local_guide, 4)
    one = gradients()
    pyro.set_rng_seed(4)
    elbo.differentiable_loss(local_model, local_guide, 4).backward()
    two = gradients()
    assert one and one.keys() == two.keys()
    for n in one:
        torch.testing.assert_close(one[n], two[n])


def test_the_first_call_draws_what_any_other_would():
    """Looking at a pair's structure must not use up random numbers."""
    values = []
    elbo = make("iwae")
    for _ in range(2):
        pyro.set_rng_seed(5)
        values.append(elbo.loss(local_model, local_guide))
    assert values[0] == values[1]


@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorized", "looped"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("guide", AUTO_GUIDES)
def test_one_particle_equals_trace_elbo(guide, model, vectorize):
    check_equal_to_trace_elbo("iwae", MODELS[model], AUTO_GUIDES[guide](MODELS[model]), vectorize_particles=vectorize)


@pytest.mark.parametrize("name", ["iwae", "iwae-pathwise", "vr-iwae", "ciwae"])
def test_one_particle_of_any_class_equals_trace_elbo(name):
    check_equal_to_trace_elbo(name, local_model, local_guide, 4)


@pytest.mark.parametrize("shape", ["float", "tensor"])
def test_annealing_equals_trace_elbo_at_one_particle(shape):
    factor = 0.3 if shape == "float" else torch.tensor(0.3)

    def annealed(fn):
        import pyro.distributions as dist

        def model(batch):
            with pyro.plate("data", 8, subsample_size=batch) as rows:
                with pyro.poutine.scale(scale=factor):
                    if fn == "model":
                        z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
                    else:
                        z = pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.2)), 0.7))
                if fn == "model":
                    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.linspace(-1, 1, 8)[rows])

        return model

    elbo = check_equal_to_trace_elbo("iwae", annealed("model"), annealed("guide"), 4)
    assert elbo.explain(annealed("model"), annealed("guide"), 4).annealed


def check_equal_to_trace_elbo(name, model, guide, *args, **kwargs):
    elbo, reference = make(name, 1, **kwargs), Trace_ELBO()
    elbo.loss(model, guide, *args)  # builds the guide
    pyro.set_rng_seed(7)
    value = elbo.loss_and_grads(model, guide, *args)
    mine = gradients()
    pyro.set_rng_seed(7)
    expected = reference.loss_and_grads(model, guide, *args)
    theirs = gradients()
    assert value == pytest.approx(expected)
    assert mine and mine.keys() == theirs.keys()
    for n in mine:
        torch.testing.assert_close(mine[n], theirs[n])
    return elbo


@pytest.mark.convergence
@pytest.mark.parametrize("name", [name for name in ELBOS if name != "iwae-stl"])
def test_training_reaches_the_evidence(name):
    """The guide can hold the posterior, where every bound is the evidence; a step that does nothing stays 1.7 below."""
    from pyro.infer.autoguide import init_to_value

    values = {"z": torch.full((8,), -1.0)}
    guide = AutoNormal(local_model, init_loc_fn=init_to_value(values=values), init_scale=0.3)
    elbo = make(name)
    svi = SVI(local_model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), loss=elbo)
    start = -sum(svi.evaluate_loss() for _ in range(50)) / 50
    for _ in range(400):
        svi.step()
    end = -sum(svi.evaluate_loss() for _ in range(50)) / 50
    assert start < log_evidence() - 1
    assert end == pytest.approx(log_evidence(), abs=0.1)
