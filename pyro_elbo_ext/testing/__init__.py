r"""A conformance suite for losses of ``pyro.infer.SVI``: exact answers any ELBO class can be held to.

:func:`conformance` runs a loss through problems whose evidence, bounds and gradients are known to many digits, and
returns a list of :class:`Check`. Every statement is a z-test at a fixed seed over many replicates, which one vectorised
run holds in a plate of their own.

>>> from pyro_elbo_ext import IWAE_ELBO
>>> all(check.passed for check in conformance(IWAE_ELBO, bound="iwae", size=0.05))
True

Each check belongs to one of thirteen :data:`IDENTITIES`, C1 to C13, and carries its numbers. From a shell,

    python -m pyro_elbo_ext.testing module:ClassName [--arg NAME=VALUE] [--bound iwae|elbo] [--json FILE] ...

prints the table of a class that takes ``num_particles``. Which bound it is, and what its gradient estimates, is found
out from values unless said. It exits with 0 only if value against evidence, gradient against enumeration and
minibatches ran and held, and nothing else failed; with 1 if not; with 2 on bad input.

The golden values are those of z ~ N(0, 1), x ~ N(z, 1), x = 1.5 and q = N(0.2, 0.9^2), by 80-node Gauss-Hermite
quadrature. The slopes are those of Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018,
arXiv:1802.04537) and Doubly Reparameterized Gradient Estimators (Tucker et al., 2018, arXiv:1810.04152); the gap
constant is Theorem 3 of Importance Weighting and Variational Inference (Domke, Sheldon, 2018, arXiv:1808.09034); the
linear VAE's optimum is that of Don't Blame the ELBO! (Lucas et al., 2019, arXiv:1911.02469).
"""

from pyro_elbo_ext.testing.checks import IDENTITIES, Check, conformance
from pyro_elbo_ext.testing.measure import enumerated_gradient, sample_gradients, spread_slope, z_score
from pyro_elbo_ext.testing.plated import (
    equal_normals,
    equal_rows,
    grouped_normals,
    joint_guide,
    many_bits,
    many_normals,
    masked_normals,
    nested_normals,
)  # fmt: skip
from pyro_elbo_ext.testing.problems import (
    BELIEF_STATES,
    GAP_CONSTANT,
    GOLDEN_GRADIENT,
    GOLDEN_HIERARCHY,
    GOLDEN_HIERARCHY_RWS,
    GOLDEN_IWAE,
    GOLDEN_SCALE_GRADIENT,
    LOG_EVIDENCE,
    TOY_STATES,
    Problem,
    ScoredNormal,
    auxiliary_bit,
    auxiliary_states,
    belief_network,
    bernoulli_toy,
    conjugate_normal,
    hierarchical_guide,
    linear_gaussian,
    rebar_toy,
)
from pyro_elbo_ext.testing.recognition import Recognised, recognise
from pyro_elbo_ext.testing.trained import LinearVAE, Mixture, amortised_mixture, linear_vae, linear_vae_optimum

__all__ = [
    "BELIEF_STATES",
    "Check",
    "GAP_CONSTANT",
    "GOLDEN_GRADIENT",
    "GOLDEN_HIERARCHY",
    "GOLDEN_HIERARCHY_RWS",
    "GOLDEN_IWAE",
    "GOLDEN_SCALE_GRADIENT",
    "IDENTITIES",
    "LOG_EVIDENCE",
    "LinearVAE",
    "Mixture",
    "Problem",
    "Recognised",
    "ScoredNormal",
    "TOY_STATES",
    "amortised_mixture",
    "auxiliary_bit",
    "auxiliary_states",
    "belief_network",
    "bernoulli_toy",
    "conformance",
    "conjugate_normal",
    "enumerated_gradient",
    "equal_normals",
    "equal_rows",
    "grouped_normals",
    "hierarchical_guide",
    "joint_guide",
    "linear_gaussian",
    "linear_vae",
    "linear_vae_optimum",
    "many_bits",
    "many_normals",
    "masked_normals",
    "nested_normals",
    "rebar_toy",
    "recognise",
    "sample_gradients",
    "spread_slope",
    "z_score",
]
