"""Flow guides: posteriors that no Gaussian holds, with local latents and minibatches."""

from pyro_elbo_ext.guides.distribution import FlowDistribution
from pyro_elbo_ext.guides.flow import AutoFlow
from pyro_elbo_ext.guides.flows import Flow, make_flow
from pyro_elbo_ext.guides.plated import AutoPlatedFlow

__all__ = ["AutoFlow", "AutoPlatedFlow", "Flow", "FlowDistribution", "make_flow"]
