"""Exact values and gradients of a random program, summed over everything that it can draw.

Every random number of a step is prescribed: a discrete site takes all its values, a normal one the nodes of a
Gauss-Hermite rule, at every element and for every particle. One combination is one replicate of the program, with
parameters of its own, so that one run of a loss gives the gradient at every combination, and its expectation is a
weighted sum. Nothing here uses the package, or runs Pyro but to prescribe what is drawn.
"""

import math
from functools import cached_property
from itertools import combinations, product

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

from tests.programs import DISCRETE

CAP = 6600  # combinations that one run of a loss takes at once

BOUNDS = {
    "elbo": lambda log_w: log_w.mean(0),
    "iwae": lambda log_w: log_w.logsumexp(0) - math.log(len(log_w)),
    "vr": lambda log_w: ((0.6 * log_w).logsumexp(0) - math.log(len(log_w))) / 0.6,  # alpha = 0.4
    "ciwae": lambda log_w: 0.3 * BOUNDS["elbo"](log_w) + 0.7 * BOUNDS["iwae"](log_w),
    "miwae": lambda log_w: sum(BOUNDS["iwae"](half) for half in log_w.chunk(2)) / 2,
}


def minibatches(program):
    """All minibatches of a program, each as rows by plate."""
    used = {name for site in program.model_sites for name in site.plates}
    choices = [
        [(plate.name, torch.tensor(rows)) for rows in combinations(range(plate.size), plate.batch)]
        for plate in program.plates
        if plate.name in used
    ]
    return [dict(rows) for rows in product(*choices)]


def all_rows(program):
    return {plate.name: torch.arange(plate.size) for plate in program.plates}


class Exact:
    """A program with ``num_particles`` on one minibatch; the particles have one draw of ``shared`` sites in common."""

    def __init__(self, program, num_particles, rows=None, kept=None, nodes=None, detached=False, shared=()):
        self.program, self.num_particles, self.shared = program, num_particles, frozenset(shared)
        self.rows = rows or all_rows(program)
        self.kept = program.common_plates if kept is None else kept
        self.params = {name: torch.tensor(value, requires_grad=True) for name, value in program.start().items()}
        self.detached = detached
        self._digits = self._count_digits()
        counts = [(1 if name in self.shared else num_particles, base) for name, _, base in self._digits]
        discrete = math.prod(base**count for count, base in counts if base)
        continuous = sum(count for count, base in counts if not base)
        self.nodes = nodes or max(2, min(20, int((CAP / discrete) ** (1 / continuous) + 1e-9) if continuous else 1))
        self.size = discrete * self.nodes**continuous
        self.continuous = continuous > 0

    def __repr__(self):
        rows = {name: indices.tolist() for name, indices in self.rows.items()}
        return f"{self.num_particles} particles, rows {rows}, {self.nodes} nodes"

    def _shape(self, site):
        shape = [1] * self.program.nesting
        for name in site.plates:
            shape[self.program.frames[name].dim] = len(self.rows[name])
        return torch.Size(shape)

    def _count_digits(self):
        """What is summed over: site, element (None: all elements in step, for they stand in separate terms), values."""
        digits = []
        for name, site in self.program.drawn.items():
            if site.kind not in DISCRETE and set(site.plates) <= self.kept:
                digits.append((name, None, 0))
            else:
                digits += [(name, i, DISCRETE.get(site.kind, 0)) for i in range(self._shape(site).numel())]
        return digits

    @cached_property
    def drawn(self):
        """What each site draws, ``[particles, combinations, *plates]``: a value, or a node of the quadrature."""
        nodes, weights = (torch.from_numpy(t) for t in np.polynomial.hermite_e.hermegauss(self.nodes))
        index, stride = torch.arange(self.size), 1
        columns = {name: [] for name in self.program.drawn}
        self._log_nodes = torch.zeros(self.size)
        for name, _, base in self._digits:
            picked = []
            for _ in range(1 if name in self.shared else self.num_particles):
                digit = index // stride % (base or self.nodes)
                stride *= base or self.nodes
                if not base:
                    self._log_nodes += (weights / weights.sum()).log()[digit]
                    digit = nodes[digit]
                picked.append(digit.to(torch.get_default_dtype()))
            columns[name].append(torch.stack(picked).expand(self.num_particles, -1))
        found = {}
        for name, parts in columns.items():
            site = self.program.drawn[name]
            shape = (self.num_particles, self.size, *self._shape(site))
            value = torch.stack(parts, -1)
            value = value.reshape(shape) if len(parts) == self._shape(site).numel() else self._spread(value, shape)
            found[name] = value.long() if site.kind == "categorical" else value
        return found

    @staticmethod
    def _spread(value, shape):
        return value.reshape(shape[:2] + (1,) * (len(shape) - 2)).expand(shape)

    @property
    def tolerance(self):
        """How far an integral over normal sites may be off; None where the nodes are too few to stand for one."""
        if not self.continuous:
            return 1e-8
        return 1e-2 if self.nodes >= 16 else 6e-2 if self.nodes >= 9 else None

    @cached_property
    def terms(self):
        """Log-densities ``(origin, site, unmasked, masked)`` of all sites at all combinations."""
        program, found, values = self.program, [], {}
        for site in program.guide_sites:
            fn = program.distribution("guide", site, values, self.rows, self.params)
            value = self.drawn[site.name]
            if site.kind not in DISCRETE:
                value = fn.loc + fn.scale * value
            values[site.name] = value.detach() if self.detached else value
            found.append(self._term("guide", site, fn, values[site.name]))
        for site in program.drawn.values():
            fn = program.distribution("model", site, values, self.rows, self.params)
            found.append(self._term("model", site, fn, values[site.name]))
        for site in program.observed:
            fn = program.distribution("model", site, values, self.rows, self.params)
            found.append(self._term("model", site, fn, program.data(site, self.rows)))
        return found

    def _term(self, origin, site, fn, value):
        plain = fn.log_prob(value).expand(self.num_particles, self.size, *self._shape(site))
        counts = self._counts(site)
        return origin, site, plain, plain * counts

    def _counts(self, site):
        """Elements that the user's masks leave."""
        program, counts = self.program, self.program.row_mask_of(site, self.rows)
        if site.observed and site.mask:
            counts = counts & program.observed_mask_of(site, self.rows)
        if site.name.endswith("_unobserved"):
            counts = counts & ~program.observed_mask_of(site, self.rows)
        return counts

    @cached_property
    def log_probability(self):
        """Log-probability of each combination, ``[combinations]``."""
        discrete = [t[2] for t in self.terms if t[0] == "guide" and t[1].kind in DISCRETE]
        return self._log_nodes + sum(t.reshape(*t.shape[:2], -1).sum((0, 2)) for t in discrete)

    @cached_property
    def probability(self):
        return self.log_probability.detach().exp()

    def _scale(self, site):
        """The user's own scale of a site, where it differs by site."""
        return self.program.site_scale(site.observed or site.name.endswith("_unobserved"))

    def _factor(self, names):
        frames = self.program.frames
        return math.prod(frames[name].size / len(self.rows[name]) for name in names)

    def leaf_scale(self, site):
        """What a site's density is multiplied by inside the weights."""
        return self._scale(site) * self._factor(set(site.plates) - self.kept)

    def _is_constant(self, site):
        return site.observed and not site.parents

    @cached_property
    def log_weights(self):
        """Log-weights ``[particles, combinations, *plates]``, plates that are not common summed out."""
        return self._weigh(lambda t: 1 if t[0] == "model" else -1, self.terms)

    @cached_property
    def log_guide(self):
        return self._weigh(lambda t: 1, [t for t in self.terms if t[0] == "guide"])

    def _weigh(self, sign, terms):
        total = 0.0
        dims = [plate.dim for plate in self.program.plates if plate.name not in self.kept]
        for term in terms:
            if not self._is_constant(term[1]) or self.shared:
                value = sign(term) * self._scale(term[1]) * term[3]
                total = total + (value.sum(dims, keepdim=True) if dims else value)
        return total

    @property
    def outside(self):
        return self.program.factor * self._factor(self.kept)

    def value(self, bound):
        """The bound at every combination, ``[combinations]``, scaled as the loss is."""
        if bound == "elbo":  # linear: every site has its own scale
            total = 0.0
            for origin, site, _, masked in self.terms:
                scale = self.program.factor * self._scale(site) * self._factor(site.plates)
                total = total + (1 if origin == "model" else -1) * scale * masked.mean(0).reshape(self.size, -1).sum(-1)
            return total
        value = BOUNDS[bound](self.log_weights) * self.outside
        return value.reshape(self.size, -1).sum(-1) + self.constant

    def local_value(self):
        """The log-mean-exp inside the kept plates, all else averaged, at every combination."""
        inside = [term for term in self.terms if self.kept <= set(term[1].plates)]
        log_w = self._weigh(lambda t: 1 if t[0] == "model" else -1, inside)
        total = (BOUNDS["iwae"](log_w) * self.outside).reshape(self.size, -1).sum(-1)
        for term in self.terms:
            if not any(term is one for one in inside):
                scale = self.program.factor * self._factor(term[1].plates) * (1 if term[0] == "model" else -1)
                total = total + scale * term[3][0].reshape(self.size, -1).sum(-1)
        return total

    @cached_property
    def constant(self):
        total = 0.0
        for _, site, _, masked in self.terms:
            if self._is_constant(site):
                scale = self.program.factor * self._scale(site) * self._factor(site.plates)
                total = total + scale * masked[0].reshape(self.size, -1).sum(-1)
        return total

    def expected(self, bound):
        """Exact value of a bound and its exact gradient by parameter."""
        value = (self.log_probability.exp() * self.value(bound)).sum()
        return value.item(), self.gradient(value)

    def gradient(self, value):
        grads = torch.autograd.grad(value, list(self.params.values()), retain_graph=True, allow_unused=True)
        return {name: 0.0 if g is None else g.item() for name, g in zip(self.params, grads, strict=True)}

    def evidence(self):
        """Log of the expected weight, summed over plates: no bound may lie above it."""
        log_w = self.log_weights.detach()[0]
        log_p = self.log_probability.detach().reshape(-1, *[1] * (log_w.dim() - 1))
        constant = torch.as_tensor(self.constant).detach().mean()
        return (((log_w + log_p).logsumexp(0) * self.outside).sum() + constant).item()


def gaussian_evidence(program):
    """Log-density of a linear-Gaussian program's data, from their joint covariance."""
    rows = all_rows(program)
    shapes = [(site, Exact(program, 1, rows, nodes=2)._shape(site)) for site in program.latents]
    parts = {}

    def means(noise):
        noise, values = list(noise.split([shape.numel() for _, shape in shapes])), {}
        for (site, shape), e in zip(shapes, noise, strict=True):
            fn = program.distribution("model", site, values, rows, program.start())
            values[site.name] = fn.loc + fn.scale * e.reshape(shape)
        found = []
        for site in program.observed:
            fn, data = program.distribution("model", site, values, rows, program.start()), program.data(site, rows)
            counts = program.row_mask_of(site, rows)
            counts = (counts & program.observed_mask_of(site, rows) if site.mask else counts).expand(data.shape)
            parts[site.name] = data[counts], fn.scale.expand(data.shape)[counts]
            found.append(fn.loc.expand(data.shape)[counts])
        return torch.cat(found)

    start = torch.zeros(sum(shape.numel() for _, shape in shapes))
    if not len(means(start)):
        return 0.0
    slopes = torch.autograd.functional.jacobian(means, start)
    data, spread = (torch.cat(part) for part in zip(*parts.values(), strict=True))
    covariance = slopes @ slopes.T + spread.square().diag()
    normal = torch.distributions.MultivariateNormal(means(start), covariance)
    return program.factor * normal.log_prob(data).item()


def wake_phi(program, num_particles, rows, kept, nodes):
    """Expected gradient of reweighted wake-sleep's guide: that of log q at fixed draws, weighted by their weights."""
    exact = Exact(program, num_particles, rows, kept, nodes, detached=True)
    weights = torch.softmax(exact.log_weights.detach(), 0)
    value = (weights * exact.log_guide * exact.outside).reshape(num_particles, exact.size, -1).sum((0, 2))
    return exact.gradient((exact.probability * value).sum())


class Prescribed(Messenger):
    """Makes sites and subsampled plates draw what an :class:`Exact` sums over, by particle if they are run in turn."""

    def __init__(self, exact, vectorized=True, only_rows=False):
        super().__init__()
        self.exact = exact
        self.in_turn = not exact.shared and (not vectorized or exact.num_particles == 1)  # local ones never are
        self.runs = {}
        self.drawn = {} if only_rows else exact.drawn

    def _pyro_sample(self, msg):
        name = msg["name"]
        if msg["value"] is not None or msg["done"] or msg["is_observed"]:
            return
        if name in self.exact.rows:
            msg["value"] = self.exact.rows[name]
        elif name in self.drawn:
            value = self.drawn[name]
            if self.in_turn:
                run = self.runs[name] = self.runs.get(name, -1) + 1
                value = value[run % self.exact.num_particles]
            elif self.exact.shared:  # local particles lie left of the one global particle
                value = value[0] if name in self.exact.shared else value.unsqueeze(1)
            if self.exact.program.drawn[name].kind not in DISCRETE:
                value = msg["fn"].loc + msg["fn"].scale * value
                value = value if msg["fn"].has_rsample else value.detach()
            msg["value"] = value


class Found:
    """What a loss gives when it draws everything there is: values as an objective to be maximised.

    Attributes:
        total: sum of the value over all combinations.
        gradient: expected gradient by parameter.
    """

    def __init__(self, elbo, exact, calls=1, enumerated=()):
        program = exact.program
        model, guide = program.pair(exact.size, enumerated)
        with pyro.get_param_store().scope(), Prescribed(exact, elbo.vectorize_particles):
            _set_params(exact, exact.size)
            for _ in range(calls):
                params = {name: pyro.param(name) for name in exact.params}
                for param in params.values():
                    param.grad = None
                self.total = -elbo.loss_and_grads(model, guide)
            column = exact.probability.reshape(-1, *[1] * program.nesting)
            self.gradient = {
                name: 0.0 if param.grad is None else -(column * param.grad).sum().item()
                for name, param in params.items()
            }


def expected_value(elbo, exact):
    """What a loss's value is in expectation, as an objective: combinations scaled by their probability."""
    model, guide = exact.program.pair(exact.size)
    scale = exact.probability.reshape(-1, *[1] * exact.program.nesting)
    with pyro.get_param_store().scope(), Prescribed(exact, getattr(elbo, "vectorize_particles", True)):
        _set_params(exact, exact.size)
        return -elbo.loss(poutine.scale(model, scale=scale), poutine.scale(guide, scale=scale))


def sampled_gradient(elbo, exact, replicates):
    """Gradients that a loss with random numbers of its own gives on a minibatch, ``[replicates]`` by parameter."""
    model, guide = exact.program.pair(replicates)
    with pyro.get_param_store().scope(), Prescribed(exact, only_rows=True), torch.random.fork_rng():
        torch.manual_seed(exact.program.seed)
        _set_params(exact, replicates)
        elbo.loss_and_grads(model, guide)
        params = {name: pyro.param(name) for name in exact.params}
        return {name: torch.zeros(1) if p.grad is None else -p.grad.flatten() for name, p in params.items()}


def _set_params(exact, replicates):
    shape = (replicates, *[1] * exact.program.nesting)
    for name, value in exact.params.items():
        pyro.param(name, value.detach().expand(shape).clone())
