"""Random small programs for hypothesis to draw, as data that can be read and run by Pyro.

A :class:`Program` is a model and a guide: plates, latent and observed sites, who depends on whom, masks and scales. All
numbers follow from its seed. `tests/exact.py` computes everything about it without Pyro's machinery.
"""

import math
import random
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import pyro
import pyro.distributions as dist
import torch
from hypothesis import strategies as st
from pyro import poutine

REPLICATES = "replicates"
DISCRETE = {"bernoulli": 2, "categorical": 3}


class ScoredNormal(dist.Normal):
    """A normal that is not to be reparameterised, so that its gradient is a score function's."""

    has_rsample = False


@dataclass(frozen=True)
class Plate:
    name: str
    size: int
    batch: int
    dim: int


@dataclass(frozen=True)
class Latent:
    name: str
    plates: tuple  # of names
    kind: str  # "bernoulli", "categorical", "normal", or "scored": a normal whose guide is not reparameterised
    parents: tuple = ()
    guide_parents: tuple = ()
    observed = False


@dataclass(frozen=True)
class Observed:
    name: str
    plates: tuple
    kind: str  # "bernoulli" or "normal"
    parents: tuple = ()
    mask: str = ""  # "", "poutine" or "obs_mask"
    observed = True


@dataclass(frozen=True)
class Program:
    """A model/guide pair.

    ``scale`` is "", "all" (one factor around both), "kl" (a factor on latents) or "obs" (on observations); ``row_mask``
    names a plate some of whose rows are masked in model and guide.
    """

    plates: tuple
    latents: tuple
    observed: tuple
    guide_order: tuple
    scale: str = ""
    row_mask: str = ""
    seed: int = 0
    kept: dict = field(default_factory=dict, init=False, repr=False, compare=False)  # numbers and tables, once made

    @cached_property
    def frames(self):
        return {plate.name: plate for plate in self.plates}

    def __repr__(self):
        def arrow(site, parents):
            return f"{site.name}[{','.join(site.plates)}]: {site.kind}({', '.join(parents)})"

        plates = [f"{p.name}({p.batch}/{p.size}, dim={p.dim})" for p in self.plates]
        model = [arrow(site, site.parents) for site in self.latents]
        model += [
            f"{arrow(site, site.parents)}{' ' + site.mask if site.mask else ''} observed" for site in self.observed
        ]
        guide = [arrow(site, site.guide_parents) for site in self.guide_sites]
        lines = [
            f"Program(seed={self.seed}, scale={self.scale!r}, row_mask={self.row_mask!r})",
            f"  plates  {', '.join(plates) or 'none'}",
            *(f"  model   {line}" for line in model),
            *(f"  guide   {line}" for line in guide),
        ]
        return "\n".join(lines)

    @cached_property
    def nesting(self):
        """Dimensions of the program's own plates; the replicates lie left of them."""
        return max((-plate.dim for plate in self.plates), default=0)

    @cached_property
    def drawn(self):
        """All latent sites by name, those that a partly observed site brings among them."""
        hidden = [
            Latent(f"{o.name}_unobserved", o.plates, o.kind, o.parents) for o in self.observed if o.mask == "obs_mask"
        ]
        return {site.name: site for site in (*self.latents, *hidden)}

    @cached_property
    def guide_sites(self):
        """Latent sites in the guide's order."""
        return [self.drawn[name] for name in self.guide_order] + [
            site for name, site in self.drawn.items() if name not in self.guide_order
        ]

    @property
    def model_sites(self):
        return (*self.latents, *self.observed)

    @property
    def is_gaussian(self):
        return {site.kind for site in self.model_sites} <= {"normal", "scored"}

    @cached_property
    def common_plates(self):
        """Plates that hold every site whose density depends on something random: a bound factorises over them."""
        sites = [*self.drawn.values(), *(site for site in self.observed if site.parents)]
        return frozenset.intersection(*(frozenset(site.plates) for site in sites))

    @cached_property
    def summed(self):
        """Plates that a child sums over, by latent site."""
        found = {}
        for site in (*self.model_sites, *self.guide_sites):
            for name in (*site.parents, *getattr(site, "guide_parents", ())):
                across = set(self.drawn[name].plates) - set(site.plates)
                if across:
                    found.setdefault(name, set()).update(across)
        return found

    @property
    def mixes_in_guide(self):
        """A guide site sums over the elements of another."""
        return any(
            set(self.drawn[name].plates) - set(site.plates) for site in self.latents for name in site.guide_parents
        )

    @cached_property
    def states(self):
        """How many combinations one particle's draws have, two for a continuous site."""
        total = 1
        for site in self.drawn.values():
            in_step = site.kind not in DISCRETE and set(site.plates) <= self.common_plates  # one node for all elements
            names = () if in_step else site.plates
            total *= DISCRETE.get(site.kind, 2) ** math.prod(self.frames[name].size for name in names)
        return total

    # Numbers: all of them follow from the seed.

    def number(self, *key, low=-1.0, high=1.0):
        if key not in self.kept:
            self.kept[key] = random.Random(f"{self.seed}:{key}").random()
        return low + (high - low) * self.kept[key]

    def choose(self, key, items):
        return items[int(self.number("choose", key, low=0, high=len(items)))]

    def _once(self, key, make):
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def column(self, plate, values):
        """Return values along a plate's dimension."""
        shape = [1] * self.nesting
        shape[plate.dim] = -1
        return values.reshape(shape)

    def table(self, site, draw):
        """Return ``draw(i)`` for each element of a site over its whole plates, ``[*plates]``."""
        sizes = [1] * self.nesting
        for name in site.plates:
            sizes[self.frames[name].dim] = self.frames[name].size
        return torch.tensor([draw(i) for i in range(math.prod(sizes))]).reshape(sizes)

    def rows_of(self, table, site, rows):
        for name in site.plates:
            table = table.index_select(self.frames[name].dim, rows[name])
        return table

    def _features(self, plate):
        return torch.tensor([self.number("feature", plate, i) for i in range(self.frames[plate].size)])

    def feature(self, site, rows):
        total = torch.zeros((1,) * self.nesting)
        for name in site.plates:
            column = self._once(f"feature {name}", partial(self._features, name))
            total = total + self.column(self.frames[name], column[rows[name]])
        return total

    def data(self, site, rows):
        def draw(i):
            x = self.number("data", site.name, i)
            return float(x > 0) if site.kind == "bernoulli" else 1.5 * x

        return self.rows_of(self._once(f"data {site.name}", lambda: self.table(site, draw)), site, rows)

    def row_mask_of(self, site, rows):
        """Rows that count, broadcastable with the site; True where all do."""
        if self.row_mask not in site.plates:
            return torch.ones((), dtype=torch.bool)
        plate = self.frames[self.row_mask]
        left_out = self.choose("row", range(plate.size))
        return self.column(plate, rows[plate.name] != left_out)

    def observed_mask_of(self, site, rows):
        """Elements of an observed site that were seen; the latent site of those that were not has the same name."""
        name = site.name.removesuffix("_unobserved")

        def draw(i):
            return i > 0 and self.number("seen", name, i) > -0.4

        return self.rows_of(self._once(f"seen {name}", lambda: self.table(site, draw)), site, rows)

    def site_scale(self, observed):
        discrete = all(site.kind in DISCRETE for site in self.latents)
        on_data = 1.7 if discrete else 0.7  # sharper weights would ask for more nodes of the quadrature
        return {"kl": 1.0 if observed else 0.6, "obs": on_data if observed else 1.0}.get(self.scale, 1.0)

    @property
    def factor(self):
        """The user's scale that is one for all sites."""
        return 0.8 if self.scale == "all" else 1.0

    def start(self):
        """Values of the parameters, by name."""
        params = {"theta": self.number("theta")}
        for site in self.guide_sites:
            params[f"{site.name}.base"] = self.number("guide", site.name)
            params[f"{site.name}.slope"] = self.number("guide slope", site.name)
            for parent in site.guide_parents:
                params[f"{site.name}.{parent}"] = self.number("guide", site.name, parent)
            if site.kind not in DISCRETE:
                params[f"{site.name}.log_scale"] = self.number("guide scale", site.name, low=-0.4, high=0.0)
        return params

    # Meaning: one rule gives a site's distribution to Pyro and to the exact sums.

    def aggregate(self, value, parent, site):
        """Sum a parent's value over the plates that the child is not in."""
        dims = [self.frames[name].dim for name in self.drawn[parent].plates if name not in site.plates]
        return value.sum(dims, keepdim=True) if dims else value

    def distribution(self, origin, site, values, rows, params):
        if origin == "guide":
            kind, parents = site.kind, site.guide_parents
            mean = params[f"{site.name}.base"] + params[f"{site.name}.slope"] * self.feature(site, rows)
            weights = [params[f"{site.name}.{parent}"] for parent in parents]
            spread = params[f"{site.name}.log_scale"].exp() if kind not in DISCRETE else 1.0
        else:
            name = site.name.removesuffix("_unobserved")
            kind, parents = {"scored": "normal"}.get(site.kind, site.kind), site.parents
            mean = self.number("model", name) + self.number("model theta", name) * params["theta"]
            mean = mean + self.number("model slope", name) * self.feature(site, rows)
            weights = [self.number("model", name, parent) for parent in parents]
            spread = self.number("model scale", name, low=1.0, high=1.5)
        for parent, weight in zip(parents, weights, strict=True):
            mean = mean + weight * self.aggregate(values[parent].to(mean.dtype), parent, site)
        if kind == "bernoulli":
            return dist.Bernoulli(logits=mean)
        if kind == "categorical":
            return dist.Categorical(
                logits=mean.unsqueeze(-1) * torch.tensor([0.0, 1.0, -0.7]) + torch.tensor([0, 0.2, -0.1])
            )
        return (ScoredNormal if kind == "scored" else dist.Normal)(mean, spread)

    # Pyro: the pair, inside a plate of replicates that have parameters of their own.

    def _run(self, origin, sites, replicates, enumerated=()):
        params = {name: pyro.param(name) for name in self.start() if origin == "guide" or name == "theta"}
        used = {name for site in sites for name in site.plates}
        plates = {p.name: pyro.plate(p.name, p.size, p.batch, dim=p.dim) for p in self.plates if p.name in used}
        values = {}
        with ExitStack() as outer:
            if self.factor != 1:
                outer.enter_context(poutine.scale(scale=self.factor))
            outer.enter_context(pyro.plate(REPLICATES, replicates, dim=-self.nesting - 1))
            for site in sites:
                with ExitStack() as stack:
                    rows = {name: stack.enter_context(plates[name]) for name in site.plates}
                    fn = self.distribution(origin, site, values, rows, params)
                    values[site.name] = self._sample(origin, site, fn, rows, stack, site.name in enumerated)

    def _sample(self, origin, site, fn, rows, stack, enumerate_it):
        if self.row_mask in site.plates:
            stack.enter_context(poutine.mask(mask=self.row_mask_of(site, rows)))
        scale = self.site_scale(site.observed or site.name.endswith("_unobserved"))
        if scale != 1:
            stack.enter_context(poutine.scale(scale=scale))
        if site.observed:
            obs = self.data(site, rows)
            if not site.mask:
                return pyro.sample(site.name, fn, obs=obs)
            seen = self.observed_mask_of(site, rows)
            if site.mask == "obs_mask":
                return pyro.sample(site.name, fn, obs=obs, obs_mask=seen)
            with poutine.mask(mask=seen):
                return pyro.sample(site.name, fn, obs=obs)
        if site.name.endswith("_unobserved"):
            stack.enter_context(poutine.mask(mask=~self.observed_mask_of(site, rows)))
        return pyro.sample(site.name, fn, infer={"enumerate": "parallel"} if enumerate_it else {})

    def pair(self, replicates, enumerated=()):
        """Return model and guide as functions without arguments."""

        def model():
            self._run("model", self.model_sites, replicates)

        def guide():
            self._run("guide", self.guide_sites, replicates, enumerated)

        return model, guide


@st.composite
def programs(draw, kinds=("bernoulli", "categorical"), room=4200):
    """Draw a program whose latent sites are of some kinds, small enough to sum over two particles' draws."""
    count = draw(st.sampled_from([1, 2, 1, 2, 0]))
    sizes = [draw(st.sampled_from([2, 3, 1])), draw(st.sampled_from([2, 1]))][:count]
    names = ["a", "b"][:count]
    homes = [(), ("a",), ("a", "b")][: count + 1]
    if count == 2 and draw(st.booleans()):  # crossed rather than nested
        homes.append(("b",))
    inner = [home for home in homes if "a" in home] or homes
    shape = draw(st.sampled_from(["common plate", "global and local", "free"]))
    home = st.sampled_from(homes[::-1] if shape == "free" else inner)
    first = st.just(()) if shape == "global and local" else home

    def some_of(earlier):
        return tuple(name for name in earlier if draw(st.booleans()))

    latents = [
        Latent(f"z{i}", draw(home if i else first), draw(st.sampled_from(kinds)), some_of([f"z{j}" for j in range(i)]))
        for i in range(draw(st.sampled_from([2, 1, 3])))
    ]
    order = [site.name for site in latents]
    if shape != "global and local" and draw(st.booleans()):
        order.reverse()
    above = {name: some_of(order[:i]) for i, name in enumerate(order)}
    latents = [replace(site, guide_parents=above[site.name]) for site in latents]
    scale = draw(st.sampled_from(["", "", "all", "kl", "obs"]))
    discrete = all(kind in DISCRETE for kind in kinds)
    observed = []
    for i in range(draw(st.integers(1, 2))):
        kind = draw(st.sampled_from(["normal", "bernoulli"]))
        masks = ["", "", "poutine"] + ["obs_mask"] * (discrete and kind == "bernoulli")
        parents = some_of(order) or (order[-1],) * (scale in ("kl", "obs") or i == 0)
        observed.append(Observed(f"x{i}", draw(home), kind, parents, draw(st.sampled_from(masks))))
    whole = Program(tuple(Plate(n, 1, 1, -1 - i) for i, n in enumerate(names)), tuple(latents), tuple(observed), ())
    summed = set().union(*whole.summed.values())
    plates = []
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        batch = size if name in summed else draw(st.sampled_from(range(1, size + 1)))
        plates.append(Plate(name, size, batch, -1 - i))
    rows = [plate.name for plate in plates if plate.size > 1 and plate.name not in summed]
    row_mask = draw(st.sampled_from(["", *rows]))
    if row_mask and not discrete:  # two masks that differ are refused by "dreg", even one inside the other
        observed = [replace(site, mask="") for site in observed]
    program = Program(tuple(plates), tuple(latents), tuple(observed), tuple(order), scale, row_mask)
    return _fitted(replace(program, seed=draw(st.integers(0, 2**16))), room)


def _fitted(program, room):
    """Make a program smaller until two particles' draws are few enough to be summed over."""
    while program.states**2 > room:
        kinds = [site.kind for site in program.latents]
        if "categorical" in kinds:
            last = len(kinds) - 1 - kinds[::-1].index("categorical")
            latents = [replace(s, kind="bernoulli") if i == last else s for i, s in enumerate(program.latents)]
            program = replace(program, latents=tuple(latents))
        elif any(plate.size > 1 for plate in program.plates):
            largest = max(program.plates, key=lambda plate: (plate.size, plate.name))
            plates = [
                replace(p, size=p.size - 1, batch=min(p.batch, p.size - 1)) if p is largest else p
                for p in program.plates
            ]
            rows = {plate.name for plate in plates if plate.size > 1}
            program = replace(
                program, plates=tuple(plates), row_mask=program.row_mask if program.row_mask in rows else ""
            )
        else:
            break
    return program


_A, _A3, _B = Plate("a", 2, 2, -1), Plate("a", 3, 2, -1), Plate("b", 2, 1, -2)

# One for each trap, met whatever hypothesis draws.
KNOWN = {
    "two layers": Program(
        (_A,),
        (Latent("z0", ("a",), "normal"), Latent("z1", ("a",), "normal", ("z0",), ("z0",))),
        (Observed("x0", ("a",), "normal", ("z1",)),),
        ("z0", "z1"),
        seed=26,
    ),
    "nested plates, minibatches": Program(
        (_A3, _B),
        (Latent("z0", ("a", "b"), "bernoulli"),),
        (Observed("x0", ("a", "b"), "normal", ("z0",), "poutine"),),
        ("z0",),
        "all",
        seed=1,
    ),
    "an observation outside": Program(
        (_A,),
        (Latent("z0", ("a",), "categorical"), Latent("z1", ("a",), "bernoulli", ("z0",), ("z0",))),
        (Observed("x0", (), "normal", ("z0",)), Observed("x1", ("a",), "bernoulli", ("z1",))),
        ("z0", "z1"),
        seed=2,
    ),
    "rows joined by a latent outside": Program(
        (_A,),
        (Latent("z0", (), "bernoulli", (), ("z1",)), Latent("z1", ("a",), "bernoulli", ("z0",))),
        (Observed("x0", ("a",), "normal", ("z0",)),),
        ("z1", "z0"),
        seed=8,
    ),
    "rows masked, annealed": Program(
        (Plate("a", 3, 3, -1),),
        (Latent("z0", ("a",), "bernoulli"), Latent("z1", ("a",), "bernoulli", ("z0",), ("z0",))),
        (Observed("x0", ("a",), "normal", ("z1",)),),
        ("z0", "z1"),
        "kl",
        "a",
        seed=3,
    ),
    "partly observed": Program(
        (_A3,),
        (Latent("z0", ("a",), "bernoulli"),),
        (Observed("x0", ("a",), "bernoulli", ("z0",), "obs_mask"), Observed("x1", ("a",), "normal", ("z0",))),
        ("z0",),
        seed=4,
    ),
    "global and local": Program(
        (Plate("a", 3, 1, -1),),
        (Latent("z0", (), "normal"), Latent("z1", ("a",), "normal", ("z0",), ("z0",))),
        (Observed("x0", ("a",), "normal", ("z1", "z0")),),
        ("z0", "z1"),
        seed=6,
    ),
    "bits below a normal": Program(
        (_A,),
        (Latent("z0", ("a",), "normal"), Latent("z1", ("a",), "bernoulli", ("z0",), ("z0",))),
        (Observed("x0", ("a",), "normal", ("z1", "z0")),),
        ("z0", "z1"),
        seed=7,
    ),
}


@dataclass(frozen=True)
class Conjugate:
    """Rows that each have a latent of a conjugate family, and its posterior, with all concentrations times a factor."""

    family: str  # "gamma", "beta" or "dirichlet"
    size: int
    rows: tuple
    seed: int

    def prior(self):
        at = [random.Random(f"{self.seed} {i}").uniform(0.7, 3.0) for i in range(3)]
        if self.family == "dirichlet":
            return dist.Dirichlet(torch.tensor(at))
        return (dist.Gamma if self.family == "gamma" else dist.Beta)(torch.tensor(at[0]), torch.tensor(at[1]))

    def data(self):
        most = {"gamma": 6, "beta": 1, "dirichlet": 2}[self.family]
        return torch.tensor([random.Random(f"{self.seed} data {i}").randint(0, most) for i in range(self.size)])

    def evidence(self):
        """Log-probability of each row."""
        prior, x = self.prior(), self.data()
        if self.family == "dirichlet":
            return (prior.concentration / prior.concentration.sum())[x].log()
        if self.family == "beta":
            return dist.Bernoulli(prior.concentration1 / (prior.concentration1 + prior.concentration0)).log_prob(
                1.0 * x
            )
        a, b = prior.concentration, prior.rate
        return torch.lgamma(a + x) - torch.lgamma(a) - torch.lgamma(x + 1) + a * (b / (b + 1)).log() - x * (b + 1).log()

    def posterior(self, factor):
        """Distribution of the rows of the minibatch; ``factor`` broadcasts with them."""
        prior, x = self.prior(), self.data()[list(self.rows)]
        if self.family == "dirichlet":
            return dist.Dirichlet((prior.concentration + torch.eye(3)[x]) * factor.unsqueeze(-1))
        if self.family == "beta":
            return dist.Beta((prior.concentration1 + x) * factor, (prior.concentration0 + 1 - x) * factor)
        return dist.Gamma((prior.concentration + x) * factor, (prior.rate + 1) * factor)

    def pair(self, replicates):
        """Return model and guide, inside a plate of replicates that have a factor of their own."""
        rows, outer = torch.tensor(self.rows), pyro.plate(REPLICATES, replicates, dim=-2)
        likelihood = {"gamma": dist.Poisson, "beta": dist.Bernoulli, "dirichlet": dist.Categorical}[self.family]

        def model():
            with outer, pyro.plate("rows", self.size, subsample=rows):
                z = pyro.sample("z", self.prior())
                pyro.sample("x", likelihood(z), obs=self.data()[rows].to(torch.get_default_dtype()))

        def guide():
            factor = pyro.param("factor")
            with outer, pyro.plate("rows", self.size, subsample=rows):
                pyro.sample("z", self.posterior(factor))

        return model, guide


@st.composite
def conjugates(draw):
    size = draw(st.integers(1, 4))
    rows = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
    family = draw(st.sampled_from(["gamma", "beta", "dirichlet"]))
    return Conjugate(family, size, tuple(rows), draw(st.integers(0, 2**16)))
