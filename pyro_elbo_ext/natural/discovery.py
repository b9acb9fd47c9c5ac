"""Which parameters of a guide form which variational site.

The guide is run once as it is, and once with its parameters set to numbers that are all different, so that each number
in a site's distribution tells which element of which parameter it is: a parameter itself, expanded over plates, taken
by index in a minibatch, or stacked. What is computed from a parameter in any other way is not recognised and left to
another optimiser. Random state and parameters are left as they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_elbo_ext.families import Parametrization, Recognized, recognize
from pyro_elbo_ext.handlers import DetachLeaves
from pyro_elbo_ext.natural.blocks import Block
from pyro_elbo_ext.sites import base_name, is_leaf, own_scale
from pyro_elbo_ext.tracing import forked_rng, run_guide

__all__ = ["Discovery", "discover"]


class Discovery(NamedTuple):
    """What was found in a guide.

    Attributes:
        blocks: by site.
        others: why each other parameter of the guide is in no block.
    """

    blocks: dict[str, Block]
    others: dict[str, str]


class _Match(NamedTuple):
    parametrization: Parametrization
    names: dict[str, str]  # parameters, by argument
    shared: float  # values of the site that one unit stands for
    share: float  # of the units, what part the minibatch has
    dim: int  # dimensions of the units


def discover(guide: Callable, args: tuple, kwargs: dict) -> Discovery:
    """Find the blocks of a guide.

    Args:
        guide: a Pyro guide.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        ValueError: a parameter that two sites share.
    """
    trace, met = _run(guide, args, kwargs)
    store = pyro.get_param_store()
    params = {name: store._params[name] for name in met if name in store}
    usage = _usage(trace, params)
    sites = {name: node for name, node in trace.nodes.items() if is_leaf(node)}
    why = {name: _unknown(node) for name, node in sites.items()}
    known = {name: node for name, node in sites.items() if why[name] is None}
    likely = {name: _candidates(recognize(node["fn"]), params) for name, node in known.items()}
    with _all_different([params[name] for name in sorted(set().union(*likely.values()))]):
        coded = _run(guide, args, kwargs)[0].nodes
        matches = {site: _match(recognize(coded[site]["fn"]) if site in coded else None, params) for site in known}
    blocks = {}
    for site, match in matches.items():
        if isinstance(match, str):
            why[site] = match
        elif match.share < 1 and _is_masked(sites[site]):
            why[site] = "its mask hides how many rows a minibatch has"
        else:
            blocks[site] = _block(site, sites[site], match)
    _check_shared(blocks, usage)
    return Discovery(blocks, _others(params, blocks, usage, why))


def _run(guide: Callable, args: tuple, kwargs: dict) -> tuple[Any, list[str]]:
    """Run a guide, random values held, and return its trace and the names of the parameters that it met."""
    with ExitStack() as stack:
        for context in (forked_rng(), pyro.validation_enabled(False), pyro.poutine.block(), torch.enable_grad()):
            stack.enter_context(context)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # the numbers are made up, or have been warned of before
        met = stack.enter_context(pyro.poutine.trace(param_only=True)).trace.nodes  # a handler's own trace has none
        stack.enter_context(DetachLeaves())
        trace = run_guide(guide, args, kwargs, {}).guide
    return trace, list(met)


@contextmanager
def _all_different(leaves: list[Tensor]) -> Iterator[None]:
    """Set parameters to distinct numbers around zero, and back."""
    saved = [leaf.detach().clone() for leaf in leaves]
    generator = torch.Generator("cpu").manual_seed(0)  # whatever the default device, which factories would follow
    try:
        with torch.no_grad():
            for leaf in leaves:
                order = torch.randperm(leaf.numel(), generator=generator, device="cpu")
                offset = torch.rand(1, generator=generator, dtype=torch.float64, device="cpu")
                grid = torch.linspace(-1, 1, leaf.numel(), dtype=torch.float64, device="cpu")
                codes = (grid[order] + offset) / 2
                leaf.copy_(codes.reshape(leaf.shape))
        yield
    finally:
        with torch.no_grad():
            for leaf, value in zip(leaves, saved, strict=True):
                leaf.copy_(value)


def _usage(trace: Any, params: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """Return, by site, the parameters that its distribution is computed from, random values being held."""
    used: dict[str, set[str]] = {}
    leaves = {name: leaf for name, leaf in params.items() if leaf.requires_grad}
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or not leaves or node["infer"].get("_deterministic"):
            continue
        outputs = [node["value"]] if not is_leaf(node) else []
        try:
            outputs.append(node["fn"].log_prob(node["value"].detach()))
        except (NotImplementedError, KeyError, ValueError):  # a flow without an inverse
            outputs += [v for v in vars(node["fn"]).values() if isinstance(v, Tensor)]
        total: Any = sum(t.sum() for t in outputs if isinstance(t, Tensor) and t.requires_grad)
        if isinstance(total, Tensor):
            slopes = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
            used[name] = {leaf for leaf, slope in zip(leaves, slopes, strict=True) if slope is not None}
    return used


def _is_masked(node: Any) -> bool:
    return node["mask"] is not None or recognize(node["fn"]).masked  # type: ignore[union-attr]


def _unknown(node: Any) -> str | None:
    found = recognize(node["fn"])
    return None if found else f"a {base_name(node['fn'])} has no natural coordinates here"


def _candidates(found: Recognized | None, params: Mapping[str, Tensor]) -> set[str]:
    """Return the parameters that a distribution's arguments could be, to judge by their present values."""
    names = set()
    values = _values(params)
    for parametrization in found.family.parametrizations:  # type: ignore[union-attr]
        for argument, value in (_given(found, parametrization, values) or {}).items():  # type: ignore[arg-type]
            own = parametrization.event_dims[argument]
            names |= {
                name
                for name, full in values.items()
                if _locate(value.detach(), parametrization.normalize(full), own, exact=False) is not None
            }
    return names


def _values(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the constrained values of the parameters whose constraint keeps their shape."""
    constraints = pyro.get_param_store()._constraints
    values = {name: transform_to(constraints[name])(leaf.detach()) for name, leaf in params.items()}
    kept = {name: value for name, value in values.items() if value.shape == params[name].shape}
    return dict(sorted(kept.items(), key=lambda item: item[1].numel()))  # a small one is not found in a large by chance


def _given(
    found: Recognized, parametrization: Parametrization, values: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    if "unit_tril" in parametrization.event_dims:
        return _factors(found, values)
    return found.family.given(found.fn, parametrization.event_dims)


def _match(found: Recognized | None, params: Mapping[str, Tensor]) -> _Match | str:
    """Find the parameters that a distribution was made of; a string says why there are none."""
    if found is None:
        return "its distribution changes with the parameters"
    values, missing = _values(params), ""
    for parametrization in found.family.parametrizations:
        given = _given(found, parametrization, values)
        if given is None:
            continue
        located = {
            argument: _find(value.detach(), parametrization, argument, values) for argument, value in given.items()
        }
        if all(where is not None for where in located.values()):
            return _pair(parametrization, located, values, found.event_dim)  # type: ignore[arg-type]
        missing = missing or next(argument for argument, where in located.items() if where is None)
    return f"its {missing or 'arguments'} is no parameter, nor part of one"


def _find(
    value: Tensor, parametrization: Parametrization, argument: str, values: Mapping[str, Tensor]
) -> tuple[str, Tensor] | None:
    """Return the parameter whose elements an argument's are, and which of them."""
    for name, full in values.items():
        rows = _locate(value, parametrization.normalize(full), parametrization.event_dims[argument], exact=True)
        if rows is not None:
            return name, rows
    return None


def _locate(value: Tensor, full: Tensor, own: int, exact: bool) -> Tensor | None:
    """Return the row of ``full`` that each unit of ``value`` is; not ``exact`` asks for first numbers only."""
    if full.dim() < own or value.dim() < own or value.shape[value.dim() - own :] != full.shape[full.dim() - own :]:
        return None
    if not full.numel() or not value.numel() or value.dtype != full.dtype:
        return None
    units = value.shape[: value.dim() - own]
    theirs, ours = full.reshape(full.shape[: full.dim() - own].numel(), -1), value.reshape(units.numel(), -1)
    keys, order = theirs[:, 0].sort()
    rows = order[torch.searchsorted(keys, ours[:, 0].contiguous()).clamp(max=len(keys) - 1)]
    same = torch.equal(theirs[rows], ours) if exact else torch.equal(theirs[rows, 0], ours[:, 0])
    return rows.reshape(units) if same else None


def _factors(found: Recognized, values: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return a scale and a unit triangular parameter whose product a Cholesky factor is."""
    fn = found.fn
    loc, scale_tril = vars(fn).get("loc"), vars(fn).get("scale_tril")
    if loc is None or scale_tril is None:
        return None
    size = scale_tril.shape[-1]
    for unit in (v for v in values.values() if v.shape[-2:] == (size, size) and v.dim() > 1):
        for scale in (v for v in values.values() if v.shape == unit.shape[:-1]):
            product = scale[..., None] * unit
            if product.numel() <= scale_tril.numel() and torch.equal(product.expand_as(scale_tril), scale_tril):
                return {"loc": loc, "scale": scale, "unit_tril": unit}
    return None


def _pair(
    parametrization: Parametrization,
    located: Mapping[str, tuple[str, Tensor]],
    values: Mapping[str, Tensor],
    event_dim: int,
) -> _Match | str:
    """Check that the elements of the arguments' parameters belong together one by one."""
    names = {argument: name for argument, (name, _) in located.items()}
    shapes = {
        values[name].shape[: values[name].dim() - parametrization.event_dims[argument]]
        for argument, name in names.items()
    }
    first = next(iter(located.values()))[1]
    same = all(rows.shape != first.shape or torch.equal(rows, first) for _, rows in located.values())
    if len(shapes) > 1 or not same or len(set(names.values())) < len(names):
        return f"its {' and '.join(names)} are not of one shape, or not taken in one order"
    units = next(iter(shapes)).numel()
    counts = torch.bincount(first.flatten(), minlength=units)
    counts = counts[counts > 0]
    if not torch.equal(counts.min(), counts.max()):
        return "its values share their parameters unevenly"
    if not _in_order(first, next(iter(shapes)), event_dim):
        return "the parameters' dimensions are not in the order of its own"
    return _Match(parametrization, names, float(counts[0]), len(counts) / units, len(next(iter(shapes))))


def _in_order(rows: Tensor, units: torch.Size, event_dim: int) -> bool:
    """Tell whether the last dimensions of the units are those of the event, as all of an element move together."""
    size = units[len(units) - min(event_dim, len(units)) :].numel()
    if size == 1:
        return True
    own = rows.reshape(-1, size) if rows.numel() % size == 0 else rows[None]
    return torch.equal(own - own[:, :1], torch.arange(size, device=rows.device).expand_as(own))


def _block(site: str, node: Any, match: _Match) -> Block:
    found = recognize(node["fn"])
    constraints = pyro.get_param_store()._constraints
    return Block(
        site,
        found.family,  # type: ignore[union-attr]
        match.parametrization,
        match.names,
        {argument: constraints[name] for argument, name in match.names.items()},
        min(found.event_dim, match.dim),  # type: ignore[union-attr]
        own_scale(node) * match.shared,
        match.share,
        any(frame.vectorized for frame in node["cond_indep_stack"]) and not _is_masked(node),
    )


def _check_shared(blocks: Mapping[str, Block], usage: Mapping[str, set[str]]) -> None:
    for site, block in blocks.items():
        for name in block.names.values():
            other = next((s for s, used in usage.items() if s != site and name in used), None)
            if other is not None:
                raise ValueError(
                    f"parameter '{name}' is used by guide sites '{site}' and '{other}': a natural-gradient step of one "
                    "would move the other unseen. Give each site its own parameter, or train this guide with "
                    "pyro.optim.Adam."
                )


def _others(
    params: Mapping[str, Tensor],
    blocks: Mapping[str, Block],
    usage: Mapping[str, set[str]],
    why: Mapping[str, str | None],
) -> dict[str, str]:
    """Say why each parameter that is in no block is in none."""
    taken = {name for block in blocks.values() for name in block.names.values()}
    others = {}
    for name in params:
        if name not in taken:
            site = next((s for s, used in usage.items() if name in used and why.get(s)), None)
            others[name] = f"guide site '{site}': {why[site]}" if site else "no argument of a random guide site"
    return others
