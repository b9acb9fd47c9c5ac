"""Losses for ``pyro.infer.SVI``."""

from pyro_elbo_ext.elbo.importance import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    VRIWAE_ELBO,
    ImportanceWeighted_ELBO,
)
from pyro_elbo_ext.elbo.mean_field import MeanField_ELBO
from pyro_elbo_ext.elbo.price import Price_ELBO
from pyro_elbo_ext.elbo.regression import Regression_ELBO
from pyro_elbo_ext.elbo.score_function import ScoreFunction_ELBO
from pyro_elbo_ext.elbo.score_regression import ScoreRegression_ELBO
from pyro_elbo_ext.elbo.wake_sleep import ReweightedWakeSleep_ELBO

__all__ = [
    "CIWAE_ELBO",
    "IWAE_ELBO",
    "MIWAE_ELBO",
    "MeanField_ELBO",
    "PIWAE_ELBO",
    "Price_ELBO",
    "Regression_ELBO",
    "ReweightedWakeSleep_ELBO",
    "ScoreFunction_ELBO",
    "ScoreRegression_ELBO",
    "VRIWAE_ELBO",
    "ImportanceWeighted_ELBO",
]
