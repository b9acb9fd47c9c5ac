"""SVI's steps as one compiled graph."""

from pyro_elbo_ext.run.compiled.mutation import CompileError
from pyro_elbo_ext.run.compiled.svi import CompiledSVI

__all__ = ["CompileError", "CompiledSVI"]
