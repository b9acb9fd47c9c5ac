"""A posterior without a choice to make: fits of rising cost, and a verdict on the result."""

from pyro_elbo_ext.autofit.ladder import autofit
from pyro_elbo_ext.autofit.result import AutofitReport, AutofitResult, Rung

__all__ = ["AutofitReport", "AutofitResult", "Rung", "autofit"]
