"""Exponential families: natural and expectation coordinates, Fisher information, exact Kullback-Leibler divergence."""

from pyro_elbo_ext.families.base import Family, Parametrization, Params, every, lift, precise
from pyro_elbo_ext.families.gaussian import MULTIVARIATE_NORMAL, NORMAL, symmetric
from pyro_elbo_ext.families.recognition import Recognized, recognize

__all__ = [
    "MULTIVARIATE_NORMAL",
    "NORMAL",
    "Family",
    "Params",
    "Parametrization",
    "Recognized",
    "every",
    "lift",
    "precise",
    "recognize",
    "symmetric",
]
