"""pyro_elbo_ext."""

__version__ = "0.1.0"
