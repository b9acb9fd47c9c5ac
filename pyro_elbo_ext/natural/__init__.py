"""Natural-gradient geometry: which parameters form which site, and the steps they take."""

from pyro_elbo_ext.natural.blocks import Block, Move, natural_step
from pyro_elbo_ext.natural.discovery import Discovery, discover
from pyro_elbo_ext.natural.ivon import IVON, ivon_step
from pyro_elbo_ext.natural.optim import NaturalGradient
from pyro_elbo_ext.natural.report import BlockReport, Report

__all__ = [
    "IVON",
    "Block",
    "BlockReport",
    "Discovery",
    "Move",
    "NaturalGradient",
    "Report",
    "discover",
    "ivon_step",
    "natural_step",
]
