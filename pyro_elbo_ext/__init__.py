"""Tighter bounds, better gradients, natural-gradient steps and flow guides for Pyro's own SVI, fitted and judged."""

from pyro_elbo_ext.arviz import loo, to_arviz
from pyro_elbo_ext.autofit import AutofitResult, autofit
from pyro_elbo_ext.diagnostics import diagnose
from pyro_elbo_ext.elbo import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    VRIWAE_ELBO,
    ImportanceWeighted_ELBO,
    MeanField_ELBO,
    Price_ELBO,
    Regression_ELBO,
    ReweightedWakeSleep_ELBO,
    ScoreFunction_ELBO,
    ScoreRegression_ELBO,
)
from pyro_elbo_ext.guides import AutoFlow, AutoPlatedFlow, FlowDistribution, make_flow
from pyro_elbo_ext.natural import NaturalGradient
from pyro_elbo_ext.run import (
    CompiledSVI,
    DistributedSVI,
    FitResult,
    Minibatches,
    StagedStop,
    fit,
    load_checkpoint,
    save_checkpoint,
)

__version__ = "0.1.0"

__all__ = [
    "AutoFlow",
    "AutoPlatedFlow",
    "AutofitResult",
    "CIWAE_ELBO",
    "CompiledSVI",
    "DistributedSVI",
    "FitResult",
    "FlowDistribution",
    "IWAE_ELBO",
    "MIWAE_ELBO",
    "MeanField_ELBO",
    "Minibatches",
    "NaturalGradient",
    "PIWAE_ELBO",
    "Price_ELBO",
    "Regression_ELBO",
    "ReweightedWakeSleep_ELBO",
    "ScoreFunction_ELBO",
    "ScoreRegression_ELBO",
    "StagedStop",
    "VRIWAE_ELBO",
    "ImportanceWeighted_ELBO",
    "autofit",
    "diagnose",
    "fit",
    "load_checkpoint",
    "loo",
    "make_flow",
    "save_checkpoint",
    "to_arviz",
]
