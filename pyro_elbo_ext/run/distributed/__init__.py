"""One SVI on several processes."""

from pyro_elbo_ext.run.distributed.svi import DistributedSVI

__all__ = ["DistributedSVI"]
