"""Whether losses of several processes, each on rows of its own, average to the loss of all rows."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.infer import RenyiELBO, ReweightedWakeSleep
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_elbo_ext.elbo.base import NonFiniteError, ParticleELBO
from pyro_elbo_ext.run.distributed.processes import Slot
from pyro_elbo_ext.tracing import LOCAL_PLATE, PARTICLE_PLATE, forked_rng

__all__ = ["Report", "SeenSite", "Watch", "check_loss", "check_reports", "kept_plates"]

Plates = dict[str, tuple[int, int]]  # (size, full size) by name


class SeenSite(NamedTuple):
    """A site as it was in a step.

    Attributes:
        plates: around it.
        observed: it is data.
        unit_scale: no scale, of a plate or of the user's, is on it.
        digest: of the data, None where not taken.
    """

    plates: Plates
    observed: bool
    unit_scale: bool
    digest: str | None = None


class Report(NamedTuple):
    """What one process tells the others where not all goes as in the step before.

    Attributes:
        kind: what it is doing.
        problem: type and text of the error that it met, or None.
        losses: what it found.
        slots: what it wants to add up.
        fresh: names of parameters that it has not met before.
        buffers: of the modules, described.
        plates: all that it met.
        sites: all that it met, by name.
        rows: digests of the rows that its subsampled plates drew, for those with many to choose from.
        sources: digests of arguments as long as a subsampled plate, by plate.
        kept: the plates over which the bound factorises, None where it need not.
        averaging: a site whose baseline Pyro averages in the param store, or "".
    """

    kind: str
    problem: tuple[str, str] | None
    losses: tuple[float, ...] = ()
    slots: tuple[Slot, ...] = ()
    fresh: frozenset[str] = frozenset()
    buffers: Mapping[str, Any] = {}
    plates: tuple[tuple[str, tuple[int, int]], ...] = ()
    sites: Mapping[str, SeenSite] = {}
    rows: Mapping[str, str] = {}
    sources: Mapping[str, str] = {}
    kept: tuple[str, ...] | None = None
    averaging: str = ""


class Watch(Messenger):
    """Takes note of plates and data as a step meets them.

    Args:
        seed: from the name of a subsampled plate to the seed of its rows, so that all processes draw the same ones;
            None leaves them to the plates.
    """

    def __init__(self, seed: Callable[[str], int] | None = None) -> None:
        super().__init__()
        self.seed = seed
        self.sites: dict[str, SeenSite] = {}
        self.data: dict[str, Any] = {}
        self.rows: dict[str, Tensor] = {}
        self.averaging = ""

    @property
    def plates(self) -> tuple[tuple[str, tuple[int, int]], ...]:
        """Every plate, by name."""
        found = {name: sizes for site in self.sites.values() for name, sizes in site.plates.items()}
        return tuple(sorted(found.items()))

    def _pyro_sample(self, msg: Any) -> None:
        if self.seed is None or not site_is_subsample(msg) or msg["value"] is not None:
            return
        with forked_rng():
            torch.manual_seed(self.seed(msg["name"]))
            msg["value"] = msg["fn"]()
        msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            if isinstance(msg["value"], Tensor):
                self.rows[name] = msg["value"]
            return
        if msg["infer"].get("_deterministic"):
            return
        if (msg["infer"].get("baseline") or {}).get("use_decaying_avg_baseline"):
            self.averaging = name
        frames = {f.name: (f.size, f.full_size or f.size) for f in msg["cond_indep_stack"]}
        scale = msg["scale"]
        unit = not isinstance(scale, Tensor) and math.isclose(scale, 1.0)
        self.sites[name] = SeenSite(frames, msg["is_observed"], unit)
        if msg["is_observed"]:
            self.data[name] = msg["value"]

    def digested(self) -> dict[str, SeenSite]:
        """Return the sites with digests of their data."""
        found = {name: digest(value) for name, value in self.data.items() if value is not None}
        return {name: site._replace(digest=found.get(name)) for name, site in self.sites.items()}

    def drawn(self) -> dict[str, str]:
        """Return digests of rows that could hardly be drawn twice by chance, by plate."""
        sizes = dict(self.plates)
        return {name: digest(rows) for name, rows in self.rows.items() if name in sizes and _many(*sizes[name])}

    def sources(self, given: Sequence[Any]) -> dict[str, str]:
        """Return digests of the arguments that subsampled plates may take their rows from, by plate."""
        tensors = [value for value in given if isinstance(value, Tensor)]
        return {
            name: " ".join(digest(tensor) for tensor in tensors if full_size in tensor.shape)
            for name, (size, full_size) in self.plates
            if size < full_size
        }


def _many(size: int, full_size: int) -> bool:
    choices = math.lgamma(full_size + 1) - math.lgamma(size + 1) - math.lgamma(full_size - size + 1)
    return choices > math.log(1e9)


def digest(value: Any) -> str:
    """Return what tells data apart."""
    tensor = torch.as_tensor(value).detach().cpu().contiguous()
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(raw, digest_size=16).hexdigest() + str(tuple(tensor.shape))


def check_loss(loss: Any) -> None:
    """Refuse a loss whose mean over processes is another thing than the loss of all rows.

    Raises:
        ValueError: the loss is named, and what to use in its place.
    """
    if isinstance(loss, (RenyiELBO, ReweightedWakeSleep)):
        other = "IWAE_ELBO or VRIWAE_ELBO" if isinstance(loss, RenyiELBO) else "ReweightedWakeSleep_ELBO"
        raise ValueError(
            f"pyro.infer.{type(loss).__name__} weighs all rows jointly, so that its mean over processes is no bound of "
            f"theirs together. Use {other} of this package, whose weights are kept apart by plate."
        )
    if getattr(loss, "direction", "gradient") == "newton":
        raise ValueError(
            f"{type(loss).__name__}(direction='newton') puts a direction where the gradient stands, and a mean of "
            "the processes' directions is not that of all rows. Use direction='gradient'."
        )


def kept_plates(loss: Any) -> tuple[str, ...] | None:
    """Return the plates over which a loss is a sum, as last decided; None where it is an average over particles."""
    if not isinstance(loss, ParticleELBO) or loss._linear:
        return None
    if getattr(loss, "local_particles", 1) > 1 and not getattr(loss, "global_bound").linear:  # noqa: B009
        return ()
    layouts = list(loss._layouts.values())
    return layouts[-1].plates if layouts else ()


def check_reports(reports: Sequence[Report], shared: bool) -> None:
    """Refuse, on every process alike, what would make the average wrong.

    Args:
        reports: of all processes, by rank.
        shared: the processes share rows and split the particles; else they split the rows.

    Raises:
        ValueError: names, shapes, plates or data that do not fit together, or an error met by one process.
        RuntimeError: processes that do different things.
    """
    kinds = [report.kind for report in reports]
    if len(set(kinds)) > 1:
        doing = ", ".join(f"rank {rank}: {kind}" for rank, kind in enumerate(kinds))
        raise RuntimeError(
            f"the processes do different things ({doing}). step, evaluate_loss, barrier and gather are taken by all "
            "processes together and equally often; keep what only rank 0 does, as printing and saving, free of them."
        )
    _raise_problem(reports)
    _check_equal([{slot.name: slot[1:] for slot in report.slots} for report in reports], "parameter")
    _check_equal([report.buffers for report in reports], "buffer")
    _check_equal([dict(report.plates) for report in reports], "plate")
    averaging = next((report.averaging for report in reports if report.averaging), "")
    if averaging:
        raise ValueError(
            f"site '{averaging}' asks for use_decaying_avg_baseline, which Pyro keeps apart in every process. Use "
            'ScoreFunction_ELBO(baseline="running-mean"), whose averages are taken over all processes.'
        )
    if reports[0].kind == "step":
        (_check_shared if shared else _check_split)(reports)


def _raise_problem(reports: Sequence[Report]) -> None:
    for rank, report in enumerate(reports):
        if report.problem is not None:
            kind, text = report.problem
            known = {known.__name__: known for known in (NonFiniteError, ValueError, TypeError)}
            plain = "" if kind in known else f"{kind}: "
            raise known.get(kind, RuntimeError)(f"on rank {rank}: {plain}{text}")


HINTS = {
    "parameter": "Every process must train the same parameters in every step: let no branch depend on the rank, or on "
    "data or random values that differ between processes.",
    "buffer": "Build the same modules in every process, from one seed, and hand over data as arguments of step.",
    "plate": "Give every process as many rows: DataLoader(..., drop_last=True) and equal shards; and name the total "
    "number as the plate's full size.",
}


def _check_equal(found: Sequence[Mapping[str, Any]], what: str) -> None:
    for rank, other in enumerate(found):
        for name in sorted(set(found[0]) | set(other)):
            first, second = found[0].get(name), other.get(name)
            if first != second:
                one, two = (_describe(value, what) for value in (first, second))
                raise ValueError(f"{what} '{name}' is {one} on rank 0 but {two} on rank {rank}. {HINTS[what]}")


def _describe(value: Any, what: str) -> str:
    if value is None:
        return "missing"
    if what == "plate":
        return f"{value[0]} of {value[1]} rows"
    contents = f", contents {value[3][:8]}" if len(value) > 3 and value[3] else ""
    return f"of shape {value[0]}, {value[1]}, {value[2]}{contents}"


def _check_shared(reports: Sequence[Report]) -> None:
    """Refuse particles of different minibatches."""
    for rank, report in enumerate(reports):
        for name, site in report.sites.items():
            first = reports[0].sites.get(name)
            if site.observed and (first is None or first.digest != site.digest):
                raise ValueError(
                    f"with particles='shared' all processes weigh the same rows, but site '{name}' has other data on "
                    f"rank {rank} than on rank 0. Hand all of them the same minibatch (one loader, one seed, no "
                    "DistributedSampler), or use particles='own'."
                )


def _check_split(reports: Sequence[Report]) -> None:
    """Refuse rows that an average would count wrongly, and tell where all processes have the same rows."""
    for name in sorted(reports[0].sites):
        site = reports[0].sites[name]
        if not site.observed or any(size < full for size, full in site.plates.values()):
            continue
        if len({report.sites[name].digest for report in reports if name in report.sites}) == 1:
            continue  # all have the same data: each process is but another particle
        plates = [plate for plate in site.plates if plate not in (PARTICLE_PLATE, LOCAL_PLATE)]
        kept = reports[0].kept
        if kept is not None and not set(kept) & set(plates):
            raise ValueError(_joint(name, plates))
        if site.unit_scale:
            _check_counted(f"rows in {_where(name, plates)}, all of them counted once,", plates, reports[0].sites)
    for plate, source in reports[0].sources.items():
        if any(report.sources.get(plate) != source for report in reports):
            _check_counted(f"rows in plate '{plate}'", [plate], reports[0].sites)
    for plate, rows in reports[0].rows.items():
        if all(report.rows.get(plate) == rows for report in reports):
            warnings.warn(
                f"all processes have the same rows of plate '{plate}'. If it drew them, their random states are equal: "
                "seed before DistributedSVI is made, or by its seed=; or after it with seed + svi.rank.",
                stacklevel=2,
            )


def _where(name: str, plates: Sequence[str]) -> str:
    return f"plate '{plates[-1]}' (site '{name}')" if plates else f"site '{name}', which is in no plate,"


def _joint(name: str, plates: Sequence[str]) -> str:
    return (
        f"the processes have different rows in {_where(name, plates)}, but the bound takes one log over all of them, "
        "for a random value outside the plate is shared by its rows: a mean of the processes' bounds is not the bound "
        "of all rows. Give all processes the same rows and use DistributedSVI(..., particles='shared'), which splits "
        "the particles; or take an average (num_particles=1, or ScoreFunction_ELBO); or IWAE_ELBO with "
        "local_particles > 1."
    )


def _check_counted(what: str, plates: Sequence[str], sites: Mapping[str, SeenSite]) -> None:
    outside = {p: next((other for other, s in sites.items() if p not in s.plates), None) for p in plates}
    if plates and any(site is None for site in outside.values()):
        return  # everything is inside: the average is the loss of all rows over the number of processes
    other = next(iter(outside.values()), None) or "every other"
    raise ValueError(
        f"the processes have different {what} while site '{other}' is outside: the average over processes would count "
        "every row 1/world_size times beside it. Say how many rows there are in all, by pyro.plate(name, total, "
        "subsample_size=len(rows)) around this process's rows or by poutine.scale; or hand all rows to all processes."
    )
