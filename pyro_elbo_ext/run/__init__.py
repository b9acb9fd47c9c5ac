"""What drives an SVI: the fit loop, its stopping rules, checkpoints, and data-parallel steps."""

from pyro_elbo_ext.run.checkpoint import load_checkpoint, save_checkpoint
from pyro_elbo_ext.run.compiled import CompiledSVI
from pyro_elbo_ext.run.distributed import DistributedSVI
from pyro_elbo_ext.run.fit import FitResult, fit
from pyro_elbo_ext.run.minibatches import Minibatches
from pyro_elbo_ext.run.state import FitState
from pyro_elbo_ext.run.stopping import StagedStop

__all__ = [
    "CompiledSVI",
    "DistributedSVI",
    "FitResult",
    "FitState",
    "Minibatches",
    "StagedStop",
    "fit",
    "load_checkpoint",
    "save_checkpoint",
]
