import warnings

import pyro
import pytest
import torch
from torch.distributions import Distribution


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of models and data")
    parser.addoption("--dtype", default="float64", help="default dtype")


def pytest_configure():
    torch.set_num_threads(1)  # small tensors: more threads only fight each other


@pytest.fixture(autouse=True)
def isolated(request):
    """Own parameters, seed, dtype and device; settings are given back, and a test that changed one fails."""
    dtype, device = torch.get_default_dtype(), request.config.getoption("--device")
    torch.set_default_dtype(getattr(torch, request.config.getoption("--dtype")))
    if device != "cpu":
        torch.set_default_device(device)
    pyro.clear_param_store()
    pyro.set_rng_seed(sum(request.node.name.encode()))
    pyro.enable_validation(True)
    settings, validation = pyro.settings.get(), Distribution._validate_args
    yield
    changed = pyro.settings.get() != settings or Distribution._validate_args != validation
    pyro.settings.set(**settings)
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)
    pyro.clear_param_store()
    assert not changed, "a setting was left changed"


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """What is compiled is kept for this run of the tests only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_hidden_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def on_cpu():
    """The scripts of models/ pick their own device; tiny tensors want one thread."""
    torch.set_default_device(None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
