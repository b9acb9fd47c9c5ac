"""Tighter bounds and better gradients for Pyro's own SVI."""

from pyro_elbo_ext.elbo import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    VRIWAE_ELBO,
    ImportanceWeighted_ELBO,
    MeanField_ELBO,
    ReweightedWakeSleep_ELBO,
    ScoreFunction_ELBO,
)

__version__ = "0.1.0"

__all__ = [
    "CIWAE_ELBO",
    "IWAE_ELBO",
    "MIWAE_ELBO",
    "MeanField_ELBO",
    "PIWAE_ELBO",
    "ReweightedWakeSleep_ELBO",
    "ScoreFunction_ELBO",
    "VRIWAE_ELBO",
    "ImportanceWeighted_ELBO",
]
