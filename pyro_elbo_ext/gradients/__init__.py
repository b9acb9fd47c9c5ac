"""How the gradient of a bound is estimated."""

from pyro_elbo_ext.gradients.antithetic import DisARM
from pyro_elbo_ext.gradients.baselines import NVIL, Baseline, LeaveOneOut, Neural, RunningMean
from pyro_elbo_ext.gradients.control_variates import REBAR, RELAX, DoubleControlVariates
from pyro_elbo_ext.gradients.costs import SiteCost
from pyro_elbo_ext.gradients.pathwise import DoublyReparameterized, Estimator, Pathwise, StickingTheLanding
from pyro_elbo_ext.gradients.score import OVIS, VIMCO, Reinforce, Signal
from pyro_elbo_ext.gradients.sites import SiteGradient

__all__ = [
    "NVIL",
    "Baseline",
    "LeaveOneOut",
    "Neural",
    "RunningMean",
    "SiteCost",
    "SiteGradient",
    "OVIS",
    "REBAR",
    "RELAX",
    "VIMCO",
    "DisARM",
    "DoubleControlVariates",
    "DoublyReparameterized",
    "Estimator",
    "Pathwise",
    "Reinforce",
    "Signal",
    "StickingTheLanding",
]
