r"""Exports a fitted guide to ArviZ, of either major version: 0.2x gets an ``InferenceData``, 1.x a ``DataTree``.

Groups are made of plain arrays first; one function makes the ArviZ object. A file written under one major opens under
the other with all its groups. Needs ArviZ and h5netcdf: ``pip install pyro-elbo-ext[arviz]``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from types import ModuleType
from typing import Any

import numpy as np
import pyro
import torch

from pyro_elbo_ext.diagnostics.sampling import seeded
from pyro_elbo_ext.diagnostics.weights import good_k
from pyro_elbo_ext.export.chains import SAMPLED, Chain, Job, Table, histories, run_chain, stack_chains
from pyro_elbo_ext.export.restarts import Restart, own_parameters, restarts

__all__ = ["GROUPS", "loo", "to_arviz"]

GROUPS = (*SAMPLED, "observed_data", "constant_data", "svi")


def to_arviz(
    model: Callable,
    guide: Callable | Sequence[Any],
    *args: Any,
    num_samples: int = 1000,
    correct: str | None = None,
    history: Any = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    groups: Sequence[str] | None = None,
    seed: int | None = None,
    chunk_size: int = 100,
    vectorize: bool = True,
    **kwargs: Any,
) -> Any:
    r"""Return draws of a fitted guide, what they weigh and what they predict, as an ArviZ object.

    | group | contents |
    |---|---|
    | ``posterior`` | latent sites, constrained; ``Delta`` and ``pyro.deterministic`` sites too |
    | ``posterior_predictive``, ``prior_predictive`` | observed sites, drawn anew |
    | ``log_likelihood`` | of single observations in nats: unscaled; zero where a mask leaves one out |
    | ``sample_stats`` | ``lp``, ``log_q``, ``log_weight`` of whole draws; ``log_weight_local`` by plate, see below |
    | ``prior`` | latent and deterministic sites |
    | ``observed_data``, ``constant_data`` | observed values; tensors among the arguments that are none, by parameter |
    | ``svi`` | ``history``, by ``step``; ``pareto_k`` and ``ess`` by plate where weights factorise |

    Dimensions are named as the plates, those of events ``<site>_dim_i``; a plate called as a site becomes
    ``<plate>_dim``, and ``/`` in a name ``.``. The object's attributes hold versions, ``guide``, ``num_samples``,
    ``correct``, ``elbo`` and its standard error ``elbo_se`` in nats, ``pareto_k`` and ``ess`` of whole draws.

    A guide that was trained by an importance-weighted bound is not the posterior; its weighted draws are. Where all
    latents are inside common plates, each plate element has weights of its own, and ``correct="resample"`` draws each
    element's latents anew by its own smoothed weights. Elsewhere whole draws are drawn by their joint weight, refused
    where a few draws carry it, as they soon do with many local latents. Draws repeat then; ``ess`` says how many are
    worth how many. ``correct="psis"`` leaves the draws alone and adds ``psis_weight``, or ``psis_weight_local``, to
    ``sample_stats``: normalised smoothed weights, for averages that you take yourself.

    Modules run in the mode that they are in: call ``.eval()`` first if dropout or batch normalisation is to be off.

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2015, arXiv:1509.00519); Reinterpreting
        Importance-Weighted Autoencoders (Cremer, Morris, Duvenaud, 2017, arXiv:1704.02916); Pareto Smoothed Importance
        Sampling (Vehtari et al., 2015, arXiv:1507.02646).

    Args:
        model: a Pyro model.
        guide: its guide. Several, from independent restarts, become chains, so that R-hat compares them: a sequence of
            guides, or of pairs ``(guide, state)`` with what ``pyro.get_param_store().get_state()`` gave after each
            fit. Without a state, a module among several uses the parameters that it holds itself, not those of the
            same name in the param store; anything else uses the store.
        *args: arguments of model and guide, with the full data.
        num_samples: draws of each chain.
        correct: ``None``, ``"psis"`` or ``"resample"``.
        history: mapping of arrays by step, such as ``loss``, or an object whose attribute ``history`` is one; for
            several guides a sequence of them.
        coords: labels of a dimension's elements.
        dims: by variable, names in place of ``<site>_dim_i``; plates keep theirs, and may stand in front.
        groups: groups to export, by default all that there are. Predictive ones can be large; ``svi`` takes about 1 ms
            for each element of a plate over which weights factorise.
        seed: of all that is drawn here, the global random state being left alone; by default that state is used.
        chunk_size: draws made in one run.
        vectorize: run a chunk at once, or its draws one by one.
        **kwargs: keyword arguments of model and guide. The names above take precedence: bind a model's argument of
            such a name by ``functools.partial``.

    Returns:
        ``InferenceData`` under ArviZ 0.2x, ``DataTree`` under 1.x; ``.to_netcdf(path)`` writes either.

    Raises:
        ImportError: ArviZ is missing.
        ValueError: a plate that was not seen in full, an unknown name, weights that cannot be resampled, a history
            whose columns differ in length; what is wrong is named.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)
        >>> data = to_arviz(model, AutoNormal(model), torch.zeros(3), num_samples=50, seed=0)
        >>> data["posterior_predictive"]["obs"].dims
        ('chain', 'draw', 'data')
    """
    az = _import_arviz()
    if correct not in (None, "psis", "resample"):
        raise ValueError(f'correct must be None, "psis" or "resample", got {correct!r}')
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples must be a positive integer, got {num_samples!r}")
    job = Job(model, args, kwargs, num_samples, correct, _chosen(groups), chunk_size, vectorize)
    found = restarts(guide)
    svi = histories(history, len(found))
    chains = []
    with seeded(seed):
        for i, restart in enumerate(found):
            with own_parameters(restart, len(found) == 1, model):
                chains.append(run_chain(job, restart.guide, first=i == 0))
    table = stack_chains(chains)
    table["svi"] = svi | table["svi"]
    table = {group: table[group] for group in job.groups if table.get(group)}
    table = _named(table, chains[0].plates, dims or {}, coords or {})
    return _assemble(az, table, coords or {}, _attributes(found, job, chains, seed))


def loo(data: Any, var_name: str | None = None) -> Any:
    r"""Return the leave-one-out predictive density of an approximate posterior, by Pareto smoothed weights.

    For observation i the draws are weighted by :math:`p(z | x) / q(z) / p(x_i | z)`, so that they need not come from
    the posterior. Where weights factorise over plates, those of the observation's own plate element are taken. Draws
    of ``correct="resample"`` have no weight left. ``p_loo`` compares with the plain mean over the draws, as ArviZ does.

    Where every latent belongs to one observation, as in a VAE, leaving it out leaves the prior: the value is the
    observation's log-evidence, its k-hat is high for good guides too, and an importance-weighted bound is the better
    estimate of the same number.

    References:
        Bayesian leave-one-out cross-validation for large data (Magnusson, Andersen, Jonasson, Vehtari, 2019,
        arXiv:1904.10679).

    Args:
        data: what :func:`to_arviz` returned, or the same read from a file.
        var_name: the observed site; needed where there are several.

    Returns:
        ArviZ's ``ELPDData`` with pointwise values, in nats, for ``az.compare`` and ``az.plot_khat`` as well.

    Raises:
        ValueError: no log-likelihood, or no such site in it.
    """
    az = _import_arviz()
    log_likelihood = _chosen_likelihood(data, var_name)
    log_weight = _weights_for(data, log_likelihood)
    if hasattr(az, "loo_approximate_posterior"):
        both = {"log_p": log_weight, "log_q": log_weight * 0}
        return az.loo_approximate_posterior(data, **both, pointwise=True, var_name=log_likelihood.name)
    return _loo_by_hand(az, log_likelihood, log_weight)


# ---- ArviZ itself


def _import_arviz() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "\nArviZ is undergoing a major refactor", FutureWarning)
            import arviz
    except ImportError as error:
        raise ImportError("export needs ArviZ: pip install pyro-elbo-ext[arviz]") from error
    return arviz


def _assemble(az: ModuleType, table: Table, coords: Mapping[str, Sequence[Any]], attrs: dict[str, Any]) -> Any:
    """Make the installed major's object of plain arrays."""
    import xarray  # what both majors are made of

    datasets = {}
    for group, variables in table.items():
        labels = {name: coords.get(name, range(size)) for name, size in _sizes({group: variables}).items()}
        described = attrs if group == "posterior" else {}
        datasets[group] = xarray.Dataset(variables, {k: list(v) for k, v in labels.items()}, described)
    if "data" in inspect.signature(az.from_dict).parameters:
        tree = {f"/{group}": dataset for group, dataset in datasets.items()}
        return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=attrs), **tree})
    return az.InferenceData(attrs=attrs, **datasets)


def _attributes(found: Sequence[Restart], job: Job, chains: Sequence[Chain], seed: int | None) -> dict[str, Any]:
    """What a file can hold: numbers, strings, and lists of numbers, one for each of several chains."""
    from pyro_elbo_ext import __version__

    attrs: dict[str, Any] = {
        "created_at": datetime.now(timezone.utc).isoformat(),
        "inference_library": "pyro_elbo_ext",
        "inference_library_version": __version__,
        "pyro_version": pyro.__version__,
        "torch_version": str(torch.__version__),
        "guide": _name(found[0].guide),
        "model": _name(job.model),
        "num_samples": job.num_samples,
        "correct": job.correct or "none",
    }
    if seed is not None:
        attrs["seed"] = seed
    for name in chains[0].attrs:
        values = [chain.attrs[name] for chain in chains]
        attrs[name] = values[0] if len(values) == 1 else values
    return attrs


def _name(program: Any) -> str:
    return getattr(program, "__qualname__", type(program).__qualname__)


# ---- names


def _chosen(groups: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(groups, str):
        raise ValueError(f"groups must be a sequence of names, got the string {groups!r}; write groups=({groups!r},)")
    for group in groups or ():
        if group not in GROUPS:
            raise ValueError(f"groups names '{group}'; there are {', '.join(GROUPS)}.")
    return GROUPS if groups is None else tuple(group for group in GROUPS if group in groups)


def _named(
    table: Table, plates: Mapping[str, int], dims: Mapping[str, Sequence[str]], coords: Mapping[str, Sequence[Any]]
) -> Table:
    """Give dimensions the user's names, and check all names."""
    table = _with_user_dims(table, dims)
    variables = {name for group in table.values() for name in group}
    clash = variables & {"chain", "draw", "step"}
    if clash:
        raise ValueError(f"a variable is called '{min(clash)}', as ArviZ calls a dimension; rename the site.")
    taken = {plate: f"{plate}_dim" for plate in plates if plate in variables}
    table = {
        group: {k: (tuple(taken.get(dim, dim) for dim in own), v) for k, (own, v) in members.items()}
        for group, members in table.items()
    }
    sizes = _sizes({group: v for group, v in table.items() if not group.startswith("prior")})
    for name, labels in coords.items():
        if name not in sizes:
            raise ValueError(f"coords names '{name}', but the dimensions are {', '.join(map(repr, sizes))}.")
        if len(labels) != sizes[name]:
            raise ValueError(f"coords has {len(labels)} labels for dimension '{name}', which has size {sizes[name]}.")
    return table


def _with_user_dims(table: Table, dims: Mapping[str, Sequence[str]]) -> Table:
    variables = {name for group in table.values() for name in group}
    for name in dims:
        if name not in variables:
            raise ValueError(f"dims names '{name}', but the variables are {', '.join(map(repr, sorted(variables)))}.")
    renamed = {name: _renamed(name, table, given) for name, given in dims.items()}
    return {
        group: {
            name: (tuple(renamed.get(name, {}).get(dim, dim) for dim in own), values)
            for name, (own, values) in members.items()
        }
        for group, members in table.items()
    }


def _renamed(name: str, table: Table, given: Sequence[str]) -> dict[str, str]:
    """Return new names for the dimensions of a variable's event."""
    own = max((members[name][0] for members in table.values() if name in members), key=len)
    events = [dim for dim in own if dim.startswith(f"{name}_dim_")]
    plates = [dim for dim in own if dim not in ("chain", "draw", *events)]
    names = given if isinstance(given, str) or len(given) == len(events) else given[len(plates) :]
    if isinstance(names, str) or len(names) != len(events) or list(given) not in (list(names), plates + list(names)):
        raise ValueError(
            f"dims has {given!r} for '{name}', whose dimensions are {plates + events}: give a list with a name for "
            f"each of {events}; plates keep theirs."
        )
    return dict(zip(events, names, strict=True))


def _sizes(table: Table) -> dict[str, int]:
    """Size of every dimension."""
    sizes: dict[str, int] = {}
    for group, members in table.items():
        for name, (own, values) in members.items():
            for dim, size in zip(own, values.shape, strict=True):
                if sizes.setdefault(dim, size) != size:
                    raise ValueError(
                        f"dimension '{dim}' of '{name}' in '{group}' has size {size}, elsewhere {sizes[dim]}: dims "
                        "gave one name to two things."
                    )
    return sizes


# ---- leave-one-out


def _chosen_likelihood(data: Any, var_name: str | None) -> Any:
    try:
        group = data["log_likelihood"]
    except KeyError:
        raise ValueError("data has no group log_likelihood; export it with to_arviz.") from None
    names = list(group.data_vars)
    if var_name is None and len(names) == 1:
        var_name = names[0]
    if var_name not in names:
        raise ValueError(f"var_name must be one of the observed sites {', '.join(map(repr, names))}; got {var_name!r}.")
    return group[var_name]


def _weights_for(data: Any, log_likelihood: Any) -> Any:
    """Log-weights of the draws of each observation."""
    zero = log_likelihood.isel({dim: 0 for dim in log_likelihood.dims if dim not in ("chain", "draw")}, drop=True) * 0
    if data.attrs.get("annealed"):
        raise ValueError(
            "the scales of the model's sites differed, as in KL annealing, so the weights are those of another "
            "posterior than the likelihood's. Export the model with all scales equal."
        )
    if data.attrs.get("correct") == "resample":
        return zero
    stats = data["sample_stats"] if "sample_stats" in _group_names(data) else {}
    if "log_weight" not in stats:
        raise ValueError(
            "data has no sample_stats with log_weight: it holds a point estimate, was not made by to_arviz, or "
            "without that group. For draws of the posterior itself use az.loo."
        )
    if "log_weight_local" in stats and set(stats["log_weight_local"].dims) <= set(log_likelihood.dims):
        return stats["log_weight_local"]
    return stats["log_weight"]


def _group_names(data: Any) -> list[str]:
    names = data.groups() if callable(data.groups) else data.groups
    return [name.strip("/") for name in names]


def _loo_by_hand(az: ModuleType, log_likelihood: Any, log_weight: Any) -> Any:
    """What ArviZ 1.x calls ``loo_approximate_posterior``, for 0.2x, whose ``psislw`` takes log-ratios as they are."""
    from arviz.stats.stats_utils import ELPDData

    log_likelihood, log_weight = (v.stack(__sample__=("chain", "draw")) for v in (log_likelihood, log_weight))
    num = log_likelihood.sizes["__sample__"]
    ratios = (log_weight - log_likelihood).transpose(..., "__sample__")
    smoothed, khat = az.psislw(ratios)
    log_likelihood = log_likelihood.transpose(*ratios.dims)
    pointwise = _log_sum_exp(smoothed + log_likelihood)
    plain = _log_sum_exp(log_likelihood) - np.log(num)
    bad = bool((khat > good_k(num)).any())
    if bad:
        warnings.warn(
            f"leave-one-out weights of some observations have k-hat > {good_k(num):.2f}: their values are not to be "
            "trusted. The guide is far from the posterior, or the posterior hangs on these observations.",
            stacklevel=3,
        )
    elpd, count = float(pointwise.sum()), pointwise.size
    values = {
        "elpd_loo": elpd,
        "se": float(np.sqrt(count * pointwise.var())),
        "p_loo": float(plain.sum()) - elpd,
        "n_samples": num,
        "n_data_points": count,
        "warning": bad,
        "loo_i": pointwise.rename("loo_i"),
        "pareto_k": khat,
        "scale": "log",
        "good_k": good_k(num),
    }
    return ELPDData(data=list(values.values()), index=list(values))


def _log_sum_exp(values: Any) -> Any:
    highest = values.max("__sample__")
    return highest + np.log(np.exp(values - highest).sum("__sample__"))
