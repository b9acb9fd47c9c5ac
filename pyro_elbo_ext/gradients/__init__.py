"""How the gradient of a bound is estimated."""

from pyro_elbo_ext.gradients.pathwise import DoublyReparameterized, Estimator, Pathwise, StickingTheLanding

__all__ = ["DoublyReparameterized", "Estimator", "Pathwise", "StickingTheLanding"]
