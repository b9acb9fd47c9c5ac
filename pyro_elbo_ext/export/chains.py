"""What a fitted guide has to tell, as named NumPy arrays: draws, weights, predictions, data and history.

Knows no file format: each group maps a variable's name to its dimensions and values.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pyro_elbo_ext.diagnostics.resampling import check_scales, resample
from pyro_elbo_ext.diagnostics.sampling import PosteriorDraws, posterior_draws
from pyro_elbo_ext.diagnostics.weights import MIN_SAMPLES, effective_sample_size, pareto_k, psis
from pyro_elbo_ext.export.replay import Replayer, Survey, survey

__all__ = ["SAMPLED", "Chain", "Job", "Table", "histories", "run_chain", "stack_chains"]

Table = dict[str, dict[str, tuple[tuple[str, ...], np.ndarray]]]  # group -> variable -> (dimensions, values)
SAMPLED = (
    "posterior",
    "posterior_predictive",
    "log_likelihood",
    "sample_stats",
    "prior",
    "prior_predictive",
)  # the groups with dimensions of draws


@dataclass(frozen=True)
class Job:
    """What is to be exported of every restart.

    Attributes:
        model: a Pyro model.
        args: positional arguments of model and guide.
        kwargs: their keyword arguments.
        num_samples: draws of each restart.
        correct: None, ``"psis"`` or ``"resample"``.
        groups: names of the groups wanted.
        chunk_size: draws of one run.
        vectorize: run a chunk at once.
    """

    model: Callable
    args: tuple
    kwargs: dict
    num_samples: int
    correct: str | None
    groups: Sequence[str]
    chunk_size: int = 100
    vectorize: bool = True


class Chain(NamedTuple):
    """What one restart gave.

    Attributes:
        table: its groups; those of draws have the draws first, not yet among the dimensions.
        plates: size of each plate.
        attrs: numbers that describe all draws.
    """

    table: Table
    plates: dict[str, int]
    attrs: dict[str, float]


def run_chain(job: Job, guide: Callable, first: bool = True) -> Chain:
    """Export one restart.

    Args:
        job: what is wanted.
        guide: fitted, its parameters in place.
        first: export what all restarts share as well: prior, data.
    """
    pair = survey(job.model, guide, job.args, job.kwargs)
    drawn = _point(job, pair) if pair.is_point else _weighted(job, guide, pair)
    values = {name: _at_home(pair, name, drawn.values[name]) for name in pair.latents}
    replayer = Replayer(job.model, job.args, job.kwargs, pair, job.chunk_size, job.vectorize)
    table: Table = {"sample_stats": _arrays(drawn.stats), "svi": _arrays(drawn.by_plate)}
    if {"posterior", "log_likelihood"} & set(job.groups):
        deterministic, log_likelihood = replayer.conditioned(values, job.num_samples)
        table["posterior"] = _sites(pair, values | deterministic)
        table["log_likelihood"] = _sites(pair, log_likelihood, density=True)
    if "posterior_predictive" in job.groups:
        table["posterior_predictive"] = _sites(pair, replayer.predicted(values, job.num_samples))
    if first and {"prior", "prior_predictive"} & set(job.groups):
        prior, predictive = replayer.prior(job.num_samples)
        table |= {"prior": _sites(pair, prior), "prior_predictive": _sites(pair, predictive)}
    if first:
        observed = {name: pair.traces.model.nodes[name]["value"].detach() for name in pair.observed}
        alone = {name: pair.places[name].spread(value, 1)[0] for name, value in observed.items()}
        table["observed_data"] = _sites(pair, alone, lead=0)
        table["constant_data"] = _constants(job, list(observed.values()))
    return Chain(table, pair.plates, drawn.attrs)


def stack_chains(chains: Sequence[Chain]) -> Table:
    """Return one table, its draws ``[chain, draw, ...]``.

    Raises:
        ValueError: restarts differ in their variables or shapes; the variable is named.
    """
    table: Table = {}
    for group, variables in chains[0].table.items():
        lead = ("chain", "draw") if group in SAMPLED else ("chain",)
        if group in ("observed_data", "constant_data"):
            table[group] = variables
            continue
        parts = [chain.table[group] for chain in chains if group in chain.table]
        for i, part in enumerate(parts[1:], 1):
            if {k: v.shape for k, (_, v) in part.items()} != {k: v.shape for k, (_, v) in variables.items()}:
                raise ValueError(
                    f"guides 0 and {i} differ in the variables of group '{group}' or their shapes: {list(variables)} "
                    f"and {list(part)}. Restarts must be of one model and one kind of guide."
                )
        table[group] = {
            name: ((*lead, *dims), np.stack([part[name][1] for part in parts])) for name, (dims, _) in variables.items()
        }
    return table


class _Drawn(NamedTuple):
    values: dict[str, Tensor]
    stats: dict[str, tuple[tuple[str, ...], Tensor]]
    by_plate: dict[str, tuple[tuple[str, ...], Tensor]]
    attrs: dict[str, float]


def _point(job: Job, pair: Survey) -> _Drawn:
    """Repeat a guide without random sites for every draw."""
    if job.correct is not None:
        raise ValueError(
            f"correct={job.correct!r} needs weights, but no guide site is random: a point estimate, as of AutoDelta, "
            "has none. Use correct=None."
        )
    nodes = pair.traces.guide.nodes
    return _Drawn(
        {k: pair.places[k].spread(nodes[k]["value"].detach(), job.num_samples) for k in pair.latents}, {}, {}, {}
    )


def _weighted(job: Job, guide: Callable, pair: Survey) -> _Drawn:
    draws = posterior_draws(
        job.model,
        guide,
        job.args,
        job.kwargs,
        job.num_samples,
        chunk_size=job.chunk_size,
        vectorize=job.vectorize,
        max_plate_nesting=pair.nesting,
    )
    if job.correct is not None:
        check_scales(draws)
    bounds, joint = draws.bound(draws.log_weight), draws.joint_log_weight
    attrs = {"elbo": float(bounds.mean()), "ess": float(effective_sample_size(joint))}
    attrs |= {"annealed": 1} if draws.annealed else {}
    by_plate = {"ess": (draws.plates, effective_sample_size(draws.log_weight))} if draws.plates else {}
    if job.num_samples > 1:
        attrs["elbo_se"] = float(bounds.std()) / math.sqrt(job.num_samples)
    if job.num_samples >= MIN_SAMPLES:
        attrs["pareto_k"] = float(pareto_k(joint))
        if draws.plates and "svi" in job.groups:
            by_plate["pareto_k"] = (draws.plates, pareto_k(draws.log_weight))
    if job.correct == "resample":  # equal weights, which are not worth a column
        values, log_joint = resample(draws)
        return _Drawn(values, {"lp": ((), _whole(log_joint) + draws.constant)}, by_plate, attrs)
    return _Drawn(draws.values, _stats(draws, job.correct == "psis"), by_plate, attrs)


def _stats(draws: PosteriorDraws, smoothed: bool) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """Densities and weights of the draws."""
    stats: dict[str, tuple[tuple[str, ...], Tensor]] = {
        "lp": ((), _whole(draws.log_joint) + draws.constant),
        "log_q": ((), _whole(draws.log_guide)),
        "log_weight": ((), draws.joint_log_weight),
    }
    if draws.plates:
        stats["log_weight_local"] = (draws.plates, draws.log_weight)
    if smoothed:
        name = "psis_weight_local" if draws.plates else "psis_weight"
        stats[name] = (draws.plates, psis(draws.log_weight)[0].exp())
    return stats


def _whole(log_density: Tensor) -> Tensor:
    """Add up the plates, ``[num_samples, *plates] -> [num_samples]``."""
    return log_density.flatten(1).sum(1) if log_density.dim() > 1 else log_density


def _at_home(pair: Survey, name: str, value: Tensor) -> Tensor:
    """Bring a guide's values to the dimensions that the model has at the site."""
    place = pair.places[name]
    shape = [place.shape[axis] for axis in place.kept]
    if value.numel() != len(value) * math.prod(shape):
        raise ValueError(
            f"site '{name}' has shape {tuple(value.shape[1:])} in the guide, but {tuple(shape)} in the model. Sample "
            "it there in the same plates and with the same event shape."
        )
    return value.reshape(len(value), *shape)


def _sites(pair: Survey, values: Mapping[str, Tensor], lead: int = 1, density: bool = False) -> dict:
    """Name the dimensions of sites' values, of which the first ``lead`` are draws."""
    named = {}
    for name, value in values.items():
        place = pair.places[name].of_log_prob() if density else pair.places[name]
        plain = name.replace("/", ".")  # netCDF takes a slash for a group
        count = iter(range(value.dim()))
        dims = tuple(f"{plain}_dim_{next(count)}" if label is None else label for label in place.labels)
        if plain in named:
            raise ValueError(f"sites '{plain}' and '{name}' have the same name with '.' for '/'; rename one.")
        named[plain] = (dims, _numpy(value))
    return named


def _arrays(values: Mapping[str, tuple[tuple[str, ...], Tensor]]) -> dict:
    return {name: (dims, _numpy(value)) for name, (dims, value) in values.items()}


def _numpy(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()


def _constants(job: Job, observed: Sequence[Tensor]) -> dict:
    """Name the tensors among the model's arguments that are no observed values."""
    constants = {}
    for name, value in _arguments(job).items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            value = torch.from_numpy(value)
        if not isinstance(value, Tensor) or any(value is o or _equal(value, o) for o in observed):
            continue
        constants[name] = (tuple(f"{name}_dim_{i}" for i in range(value.dim())), _numpy(value))
    return constants


def _equal(value: Tensor, other: Tensor) -> bool:
    return value.shape == other.shape and value.dtype == other.dtype and torch.equal(value, other.to(value.device))


def _arguments(job: Job) -> dict[str, Any]:
    """Arguments of the model by parameter; those of a star by position."""
    try:
        program = job.model.forward if isinstance(job.model, nn.Module) else job.model
        signature = inspect.signature(program)
        bound = signature.bind(*job.args, **job.kwargs).arguments
    except (TypeError, ValueError):  # no signature, as of some wrapped callables
        return {f"arg_{i}": value for i, value in enumerate(job.args)} | job.kwargs
    named: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{i}": item for i, item in enumerate(value)}
        else:
            named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return named


def histories(history: Any, num_chains: int) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Return what was recorded by step, ``[step]``, or ``[chain, step]`` of several, the shorter filled with NaN.

    Raises:
        ValueError: no mapping of columns, columns of other lengths than their first, or not one history per guide.
    """
    if history is None:
        return {}
    if not isinstance(history, (list, tuple)):
        if num_chains > 1:
            raise ValueError(f"{num_chains} guides need {num_chains} histories, got one {type(history).__name__}.")
        return {name: (("step",), values) for name, values in _columns(history).items()}
    if len(history) != num_chains:
        raise ValueError(f"{num_chains} guides need {num_chains} histories, got {len(history)}.")
    runs = [_columns(run) for run in history]
    names = [name for name in runs[0] if all(name in run for run in runs)]
    length = max(len(values) for run in runs for values in run.values())
    filled = {name: np.full((num_chains, length), np.nan) for name in names}
    for name, values in filled.items():
        for row, run in zip(values, runs, strict=True):
            row[: len(run[name])] = run[name]
    return {name: (("chain", "step"), values) for name, values in filled.items()}


def _columns(history: Any) -> dict[str, np.ndarray]:
    columns = getattr(history, "history", history)
    if not isinstance(columns, Mapping) or not columns:
        raise ValueError(
            "history must be a mapping of arrays by step, such as 'loss', or an object whose attribute history is one, "
            f"as a result of fit; got {type(history).__name__}."
        )
    arrays = {name: v.detach().cpu().numpy() if isinstance(v, Tensor) else np.asarray(v) for name, v in columns.items()}
    first = next(iter(arrays))
    for name, values in arrays.items():
        if values.ndim != 1 or len(values) != len(arrays[first]):
            raise ValueError(
                f"history has shape {values.shape} for '{name}', but {arrays[first].shape} for '{first}': every column "
                "holds one number per step."
            )
        if values.dtype.kind not in "biuf":
            raise ValueError(f"history holds values of type {values.dtype} for '{name}', no numbers.")
    return arrays
