"""What a flow guide must know of a model: its latent sites, their plates, and which priors can be non-centred."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, get_provenance
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import ExpTransform, Transform, biject_to, constraints

from pyro_elbo_ext.guides.noncentering import LocationScale, location_scale
from pyro_elbo_ext.sites import base_name, plate_factor

__all__ = [
    "Latent",
    "Structure",
    "check_rows",
    "constrain",
    "finite",
    "inspect_model",
    "inverse_log_det",
    "is_identity",
]


_POSITIVE = biject_to(constraints.positive)
RUNS = 5  # at the same values; a hidden coin comes up the same in all of them once in sixteen


class Latent(NamedTuple):
    """A latent site.

    Attributes:
        name: of the site.
        transform: from unconstrained values.
        event_dim: of constrained values.
        start: first unconstrained value, ``[*plates, *event]``.
        frames: its plates.
        parents: latent sites that its prior's location and scale depend on, none where it is no such family.
        prior: the first location and scale.
    """

    name: str
    transform: Transform
    event_dim: int
    start: Tensor
    frames: tuple[Any, ...]
    parents: frozenset[str]
    prior: LocationScale | None

    @property
    def unconstrained_event_dim(self) -> int:
        """Event dimensions of unconstrained values."""
        codomain, domain = self.transform.codomain, self.transform.domain
        return self.event_dim + domain.event_dim - codomain.event_dim

    @property
    def batch_dim(self) -> int:
        """Dimensions left of the event, those that plates take among them."""
        return self.start.dim() - self.unconstrained_event_dim

    @property
    def plates(self) -> tuple[str, ...]:
        """Names of its plates, that of dimension -1 first."""
        return tuple(f.name for f in self.frames)


class Structure(NamedTuple):
    """What :func:`inspect_model` finds.

    Attributes:
        latents: the latent sites by name, in the model's order.
        trace: that they were read from.
        given: plates with latent sites whose rows the model is given.
        hidden: subsampled plates with latent sites whose rows cannot be seen.
    """

    latents: dict[str, Latent]
    trace: Any
    given: frozenset[str]
    hidden: frozenset[str]


class _Tag(Messenger):
    """Gives latent sites some values that know the site's name, and notes what priors and supports depend on."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.parents: dict[str, frozenset[str]] = {}
        self.support: dict[str, frozenset[str]] = {}
        self.given: set[str] = set()  # plates whose rows the model is given
        self.priors: dict[str, list[Tensor]] = {}
        self.indices: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            if msg["value"] is not None:
                self.given.add(msg["name"])
                self.indices[msg["name"]] = msg["value"]
            elif msg["name"] in self.indices:
                msg["value"], msg["done"] = self.indices[msg["name"]], True
            return
        value = self.values.get(msg["name"])
        if value is None or msg["is_observed"]:
            return
        prior = location_scale(msg["fn"])
        self._note(msg["name"], prior)
        self.support[msg["name"]] = get_provenance(_constants(msg["fn"].support))
        msg["value"] = ProvenanceTensor(value, frozenset({msg["name"]}))
        msg["done"] = True

    def _note(self, name: str, prior: LocationScale | None) -> None:
        """Note what a prior depends on: nothing that can be used if it differs between runs at the same values."""
        found = get_provenance(list(prior[:2])) if prior else frozenset()
        moments = [detach_provenance(part) for part in prior[:2]] if prior else []
        before = self.priors.setdefault(name, moments)
        changed = len(before) != len(moments) or not all(map(torch.equal, before, moments))
        self.parents[name] = frozenset() if changed else self.parents.get(name, found) & found

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.indices[msg["name"]] = msg["value"]


def _constants(constraint: Any) -> list[Tensor]:
    """Return the tensors that a constraint is made with, those of constraints inside it included."""
    if not hasattr(constraint, "__dict__"):
        return []
    found: list[Tensor] = []
    for value in vars(constraint).values():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(part for item in value for part in _constants(item))
        else:
            found.extend(_constants(value))
    return found


def inspect_model(model: Callable, init_loc_fn: Callable, args: tuple, kwargs: dict) -> Structure:
    """Run a model a few times, hidden from all handlers outside, and return its latent sites.

    A prior that differs between runs at the same values depends on something that the guide does not hold, such as a
    site left to another guide or to enumeration.

    Args:
        model: a Pyro model.
        init_loc_fn: returns a site's first value, as in Pyro's AutoGuides.
        args: the model's positional arguments.
        kwargs: its keyword arguments.

    Raises:
        ValueError: no latent site, one that is discrete or whose support is not fixed; the site is named.
        NotImplementedError: a latent site in a sequential plate.
    """
    with poutine.block(), torch.no_grad(), InitMessenger(init_loc_fn):
        trace = poutine.trace(poutine.block(model, hide_fn=_is_no_latent)).get_trace(*args, **kwargs)
    sites: dict[str, Any] = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
    if not sites:
        raise ValueError("the model has no latent sites: there is nothing to guide")
    for name, site in sites.items():
        _check_continuous(name, site)
    values = {name: detach_provenance(site["value"]) for name, site in sites.items()}
    with poutine.block(), torch.no_grad(), pyro.validation_enabled(False), _Tag(values) as tags:
        for _ in range(RUNS):
            model(*args, **kwargs)
    latents = {name: _latent(site, tags) for name, site in sites.items()}
    frames = {frame.name: frame for latent in latents.values() for frame in latent.frames}
    hidden = {name for name, frame in frames.items() if plate_factor(frame) != 1 and name not in tags.indices}
    return Structure(latents, trace, frozenset(tags.given & set(frames)), frozenset(hidden))


def _is_no_latent(msg: Any) -> bool:
    return msg["type"] != "sample" or msg["is_observed"] or site_is_subsample(msg)


def _check_continuous(name: str, site: Any) -> None:
    if site["fn"].support.is_discrete:
        raise ValueError(
            f"latent site '{name}' is a {base_name(site['fn'])}, which is discrete, and a flow is continuous. Hide it "
            f"from the guide, as in AutoFlow(poutine.block(model, hide=['{name}'])), and sum it out in the model by "
            "infer={'enumerate': 'parallel'} with pyro.infer.TraceEnum_ELBO."
        )
    for frame in site["cond_indep_stack"]:
        if not frame.vectorized:
            raise NotImplementedError(
                f"latent site '{name}' is in plate '{frame.name}', which is sequential: its sites have no common "
                "shape for a flow. Use the plate as a context manager, with pyro.plate(...):"
            )


def _latent(site: Any, tags: _Tag) -> Latent:
    name, fn = site["name"], site["fn"]
    frames = tuple(sorted(site["cond_indep_stack"], key=lambda frame: -frame.dim))  # the order that gives plates dims
    if tags.support.get(name):
        raise ValueError(
            f"the support of latent site '{name}' depends on {sorted(tags.support[name])}: a flow's unconstrained "
            "values would mean another thing at every draw. Sample from a fixed support and transform the value."
        )
    row_dims = [frame.dim - fn.event_dim for frame in frames if plate_factor(frame) != 1]
    if any(c.dim() >= -dim and c.shape[dim] > 1 for c in _constants(fn.support) for dim in row_dims):
        raise ValueError(
            f"the support of latent site '{name}' differs between the rows of a subsampled plate, so that the first "
            "minibatch's would be used for every other. Sample from a fixed support and transform the value."
        )
    with helpful_support_errors(site):
        transform = biject_to(fn.support)
    start = transform.inv(site["value"])
    start = finite(start)
    parents = tags.parents.get(name, frozenset())
    return Latent(name, transform, fn.event_dim, start, frames, parents, location_scale(fn) if parents else None)


def check_rows(structure: Structure, create_plates: Callable | None, args: tuple, kwargs: dict) -> None:
    """Refuse plates whose rows a guide would draw for itself, though the model has others.

    Args:
        structure: of the model.
        create_plates: the guide's.
        args: the model's positional arguments.
        kwargs: its keyword arguments.

    Raises:
        ValueError: the guide is given no such plate; it is named.
    """
    made: Any = ()
    given, hidden = structure.given, structure.hidden
    if (given or hidden) and create_plates is not None:
        with poutine.block():
            made = create_plates(*args, **kwargs)
    names = {plate.name for plate in ([made] if isinstance(made, pyro.plate) else made)}
    if given - names:
        plate = min(given - names)
        raise ValueError(
            f"plate '{plate}' is given its rows in the model (subsample=...), but the guide would draw its own, "
            "and train each row on the data of another. Use AutoPlatedFlow with create_plates=lambda *args: "
            f"pyro.plate('{plate}', size, subsample=...)."
        )
    if hidden - names:
        plate = min(hidden - names)
        raise ValueError(
            f"plate '{plate}' is subsampled and hidden from the guide, which cannot know its rows. Add '{plate}' to "
            "poutine.block's expose=, use hide= instead, or return the plate by create_plates."
        )


def _base(transform: Transform) -> Transform:
    """Return what a transform does to each value of an event."""
    return getattr(transform, "base_transform", transform)


def is_identity(transform: Transform) -> bool:
    """Tell whether a transform is that of an unbounded support."""
    base = _base(transform)
    return isinstance(base, torch.distributions.ComposeTransform) and not base.parts


def _is_exponential(transform: Transform) -> bool:
    """Tell whether a transform is that onto the positive line, of one value or of each in an event."""
    base = _base(transform)
    return base == _POSITIVE or isinstance(base, ExpTransform)


def constrain(transform: Transform, u: Tensor) -> Tensor:
    """Return the constrained value, inside the support where rounding would put a positive one at 0 or infinity."""
    if is_identity(transform):
        return u
    if _is_exponential(transform):
        limits = torch.finfo(u.dtype)
        return u.exp().clamp(limits.tiny, limits.max)
    return transform(u)


def inverse_log_det(latent: Latent, value: Tensor, u: Tensor) -> Tensor:
    """Return the log-determinant of the way from a site's value to its unconstrained one, its event summed over."""
    if _is_exponential(latent.transform):
        return sum_rightmost(-u, latent.event_dim)
    jacobian = latent.transform.inv.log_abs_det_jacobian(value, u)
    return sum_rightmost(jacobian, jacobian.dim() - value.dim() + latent.event_dim)


def finite(value: Tensor, instead: float = 0.0) -> Tensor:
    """Replace what is not finite, as the median of a Cauchy's few draws may be, or what follows from it."""
    return torch.where(torch.isfinite(value), value, instead)
