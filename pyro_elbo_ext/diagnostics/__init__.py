"""Can a guide be trusted? Weights, evidence, gradients, calibration, and one report of them all."""

from pyro_elbo_ext.diagnostics.bracket import Bracket, annealed_bracket, simulated_bracket
from pyro_elbo_ext.diagnostics.calibration import Calibration, calibrate
from pyro_elbo_ext.diagnostics.evidence import BoundPoint, cubo, importance_bounds
from pyro_elbo_ext.diagnostics.gradients import GradientSummary, gradient_summaries
from pyro_elbo_ext.diagnostics.nested import LocalTails, local_k
from pyro_elbo_ext.diagnostics.report import Report, diagnose
from pyro_elbo_ext.diagnostics.sampling import PosteriorDraws, posterior_draws
from pyro_elbo_ext.diagnostics.simulate import Simulation, condition_on, simulate
from pyro_elbo_ext.diagnostics.terms import BoundTerm, ELBOTerms, elbo_terms
from pyro_elbo_ext.diagnostics.verdict import Finding, Verdict
from pyro_elbo_ext.diagnostics.weights import effective_sample_size, good_k, pareto_k, psis
from pyro_elbo_ext.diagnostics.witnesses import Effects, against, corrected, drift, score_balance

__all__ = [
    "BoundPoint",
    "BoundTerm",
    "Bracket",
    "Calibration",
    "ELBOTerms",
    "Effects",
    "Finding",
    "GradientSummary",
    "LocalTails",
    "PosteriorDraws",
    "Report",
    "Simulation",
    "Verdict",
    "against",
    "annealed_bracket",
    "calibrate",
    "condition_on",
    "corrected",
    "cubo",
    "diagnose",
    "drift",
    "effective_sample_size",
    "elbo_terms",
    "good_k",
    "gradient_summaries",
    "importance_bounds",
    "local_k",
    "pareto_k",
    "posterior_draws",
    "psis",
    "score_balance",
    "simulate",
    "simulated_bracket",
]
