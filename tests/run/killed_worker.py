"""Runs one fit to its end, and another that is killed again and again: ``folder steps moment...``.

Lives are forked from this process, which has imported everything and run nothing, so that each costs no start; the
last is a process of its own. Prints how each life ended.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script

from pyro_elbo_ext import StagedStop, fit  # noqa: E402
from tests.run.cases import CASES  # noqa: E402


def live(path, steps):
    """Train from a checkpoint, if there is one, to the end."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    svi, args, batches = CASES["shuffled_minibatches"]()
    stop = StagedStop(block=20, num_evaluations=10, tol=1e-9)
    fit(svi, *args, num_steps=steps, batches=batches, checkpoint=path, checkpoint_every=2, seed=3, stop=stop)


def fork(path, steps, moment=None):
    """Return how a life ended: its exit code, or minus the signal that killed it, so long after its first write."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    child = os.fork()
    if not child:
        live(path, steps)
        os._exit(0)
    while moment is not None and (path.stat().st_mtime_ns if path.exists() else 0) == before:
        if os.waitpid(child, os.WNOHANG)[0]:
            return 0
        time.sleep(0.002)
    if moment is not None:
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder, steps, *moments):
    folder, steps = Path(folder), int(steps)
    if not moments:
        live(folder / "killed.pt", steps)
        return
    found = [fork(folder / "whole.pt", steps)]
    found += [fork(folder / "killed.pt", steps, float(moment)) for moment in moments]
    subprocess.run([sys.executable, __file__, str(folder), str(steps)], check=True)
    sys.stdout.write(" ".join(map(str, found)))


if __name__ == "__main__":
    main(*sys.argv[1:])
