"""How the gradient of a bound is estimated."""

from pyro_elbo_ext.gradients.baselines import NVIL, Baseline, LeaveOneOut, Neural, RunningMean
from pyro_elbo_ext.gradients.costs import SiteCost
from pyro_elbo_ext.gradients.pathwise import DoublyReparameterized, Estimator, Pathwise, StickingTheLanding
from pyro_elbo_ext.gradients.score import OVIS, VIMCO, Reinforce, Signal

__all__ = [
    "NVIL",
    "Baseline",
    "LeaveOneOut",
    "Neural",
    "RunningMean",
    "SiteCost",
    "OVIS",
    "VIMCO",
    "DoublyReparameterized",
    "Estimator",
    "Pathwise",
    "Reinforce",
    "Signal",
    "StickingTheLanding",
]
