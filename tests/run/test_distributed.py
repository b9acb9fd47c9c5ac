"""Two processes, started once for all tests, against one; what they do is in distributed_worker.py."""

import json
import os
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_elbo_ext import IWAE_ELBO, DistributedSVI, fit
from tests.cases import global_guide, global_model, local_guide, local_model
from tests.run.distributed_worker import CHECKS, refusals, regression, regression_guide

WORKER = Path(__file__).with_name("distributed_worker.py")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The folder in which two processes left their results, and their exit codes."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, str(WORKER), "RANK", "2", str(folder)]
    with ExitStack() as stack:
        started = []
        for rank in range(2):
            command[2] = str(rank)
            errors = stack.enter_context((folder / f"errors{rank}.txt").open("w"))
            started.append(subprocess.Popen(command, env=environment, stdout=errors, stderr=errors))
            stack.callback(started[-1].kill)
        codes = [process.wait(timeout=120) for process in started]
    return folder, codes


def results(folder, rank):
    path = folder / f"{rank}.json"
    assert path.exists(), (folder / f"errors{rank}.txt").read_text()
    return json.loads(path.read_text())


def passed(processes, name):
    for rank in range(2):
        found = results(processes[0], rank)[name]
        assert found["ok"], f"rank {rank}: {found['text']}"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.convergence if "_lands_on_" in name else ()) for name in CHECKS]
)
def test_two_processes(processes, name):
    passed(processes, name)


@pytest.mark.parametrize("name", refusals())
def test_refused_on_all_processes(processes, name):
    passed(processes, f"refusal: {name}")


def test_a_killed_process_ends_the_other_with_an_error_and_an_intact_checkpoint(processes):
    folder, codes = processes
    assert codes == [0, -9]
    found = json.loads((folder / "lost0.json").read_text())
    assert len(found["texts"]) == 2 and found["seconds"] < 10 and found["unchanged"]
    for text in found["texts"]:
        assert text.startswith("rank 0 of 2 lost the others: ") and "from the last checkpoint" in text
    file = folder / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    assert state["extra"]["step"] == 4 and len(state["rng"]) == 2
    svi = DistributedSVI(regression, regression_guide, Adam({"lr": 0.05}), Trace_ELBO())
    result = fit(svi, torch.arange(24), num_steps=4, checkpoint=file, seed=5, progress=False)  # on one process
    assert result.num_steps == 4
    for name, value in pyro.get_param_store()._params.items():
        assert torch.equal(value.detach(), state["params"][name].to(value.device))
    assert fit(svi, torch.arange(24), num_steps=6, checkpoint=file, seed=5, progress=False).num_steps == 6


@pytest.mark.parametrize("particles", ["own", "shared"])
@pytest.mark.parametrize("pair", [(local_model, local_guide), (global_model, global_guide)], ids=["local", "global"])
def test_one_process_is_plain_svi(pair, particles):
    losses = {}
    for name, make in {
        "svi": SVI,
        "distributed": lambda *args: DistributedSVI(*args, particles=particles),
    }.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = make(*pair, Adam({"lr": 0.1}), IWAE_ELBO(4))
        losses[name] = [svi.step() for _ in range(3)] + [svi.evaluate_loss()]
    assert losses["svi"] == losses["distributed"]
    assert (svi.rank, svi.world_size, svi.seed, svi.barrier(), svi.gather(3)) == (0, 1, None, None, [3])


def test_one_process_takes_a_seed():
    svi = DistributedSVI(local_model, local_guide, Adam({"lr": 0.1}), Trace_ELBO(), seed=11)
    assert svi.seed == torch.initial_seed() == 11


def test_unknown_particles():
    with pytest.raises(ValueError, match='particles must be "own" or "shared", got \'both\''):
        DistributedSVI(local_model, local_guide, Adam({"lr": 0.1}), Trace_ELBO(), particles="both")


@pytest.mark.slow
def test_the_example_under_torchrun(tmp_path):
    """The docstring's script, with the VAE of models/ as it is."""
    script = textwrap.dedent(DistributedSVI.__doc__.partition("train.py\n")[2].partition("\n\n    What all share")[0])
    torch.save((torch.rand(60, 16) > 0.5).float(), tmp_path / "images.pt")
    script = script.replace("range(1500)", "range(4)") + "\nprint(svi.rank, svi.world_size, loss)\n"
    (tmp_path / "train.py").write_text(script)
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"PYTHONPATH": f"{root}{os.pathsep}{root / 'models'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    (first, second) = sorted(line.split() for line in found.splitlines())
    assert first[:2] == ["0", "2"] and second[:2] == ["1", "2"] and first[2] == second[2]
    assert "decoder.0.weight" in torch.load(tmp_path / "vae.pt", weights_only=True)
