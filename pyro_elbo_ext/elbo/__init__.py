"""Losses for ``pyro.infer.SVI``."""

from pyro_elbo_ext.elbo.importance import (
    CIWAE_ELBO,
    IWAE_ELBO,
    MIWAE_ELBO,
    PIWAE_ELBO,
    VRIWAE_ELBO,
    ImportanceWeighted_ELBO,
)

__all__ = ["CIWAE_ELBO", "IWAE_ELBO", "MIWAE_ELBO", "PIWAE_ELBO", "VRIWAE_ELBO", "ImportanceWeighted_ELBO"]
