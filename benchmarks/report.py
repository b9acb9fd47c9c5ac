"""Run every benchmark and write ``benchmarks/REPORT.md``: tables, pictures, and what wins, ties and loses.

Each script runs in a process of its own, one after the other, with a time limit, so that one that fails or hangs costs
its own section only. What it measured is kept as JSON, and the report is made from those files alone: after ``--only``
it has the new section beside the others' last results, and ``--from`` makes it again without a measurement. The
reduced sizes of ``--quick`` take under 20 minutes on two idle cores; ``--full`` is the source of the README's numbers.

    python benchmarks/report.py [--quick | --full] [--only KEY ...] [--output DIR] [--json DIR]
    python benchmarks/report.py --from build/bench
    python benchmarks/report.py --posteriors DIR --mnist DIR  # with the benchmarks that read files from elsewhere
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import report_accuracy as accuracy
import report_plots as plots
import report_tables as tables
from report_claims import claims_table
from report_run import installed, machine, processor_seconds, run_limited
from report_tables import Comparison, Found, markdown_table, show

HERE = Path(__file__).resolve().parent
FAST_FLOWS = ("--seeds", "1", "--steps", "1000", "--draws", "4000")


class Section(NamedTuple):
    """A benchmark, how it is run and how it is read.

    Attributes:
        key: names its files, and the section in the report's links.
        title: heading.
        script: file in this folder.
        quick: arguments at reduced size; None where only a full run has it.
        full: arguments at acceptance size.
        limit: seconds that a reduced and a full run may take.
        read: from its JSON to tables and comparisons.
        draw: from its JSON onto a figure.
        folder: option of the report that it needs, and its own name for it.
        flag: its option for the JSON file.
    """

    key: str
    title: str
    script: str
    quick: tuple[str, ...] | None
    full: tuple[str, ...]
    limit: tuple[int, int]
    read: Callable[[Any], Found]
    draw: Callable[..., None] | None = None
    folder: tuple[str, str] | None = None
    flag: str = "--output"


Q = ("--quick",)
SECTIONS = (
    Section("elbo-step", "Step cost and memory beside Pyro's classes", "elbo_step.py", Q, (), (420, 1800),
            tables.elbo_step),
    Section("score-function", "Discrete latents: step cost, and time to a bound", "score_function.py", Q, (),
            (300, 7200), tables.score_function, plots.score_function),
    Section("compiled-svi", "Compiled steps", "compiled_svi.py", Q, (), (420, 7200), tables.compiled_svi,
            plots.compiled_svi),
    Section("compiled-vae", "Compiled steps of a VAE", "compiled_vae.py", Q, (), (420, 3600), tables.compiled_vae),
    Section("natural-gradient", "Natural gradients: steps, scores and seconds to a bound", "natural_gradient.py",
            ("--dims", "20", "--seeds", "3", "--limit", "6"), (), (480, 14400), accuracy.natural_gradient,
            plots.natural_gradient),
    Section("staged-stop", "The stopping rule", "staged_stop.py", Q, (), (240, 3600), accuracy.staged_stop),
    Section("autofit", "Automatic fits of posteriors known exactly", "autofit.py", (), ("--seeds", "3"), (240, 1800),
            accuracy.autofit),
    Section("autofit-references", "Automatic fits beside reference draws", "autofit.py", (), ("--seeds", "3"),
            (900, 7200), accuracy.autofit, folder=("posteriors", "--accuracy")),
    Section("flow-guides", "Flow guides: KL to posteriors known exactly", "flow_guides.py",
            (*FAST_FLOWS, "--only", "eight-schools", "funnel"), (), (480, 14400), accuracy.flow_guides,
            plots.flow_guides),
    Section("flow-variants", "Flow guides: what AutoFlow might do otherwise", "flow_guides.py",
            None, ("--variants",), (0, 7200), accuracy.flow_guides),
    Section("flow-costs", "Flow guides: step cost", "flow_guides.py", ("--cost", "--turns", "5"), ("--cost",),
            (240, 1800),
            accuracy.flow_costs),
    Section("flow-robust", "Flow guides at other learning rates", "flow_guides.py", None, ("--robust",), (0, 14400),
            accuracy.flow_robust),
    Section("flow-scale", "Flow guides on many groups", "flow_guides.py", ("--scale",), ("--scale",), (120, 600),
            accuracy.flow_scale),
    Section("scaling", "Scaling with particles, rows, minibatches and coordinates", "scaling.py", Q, (), (480, 3600),
            tables.scaling, plots.scaling),
    Section("data-parallel", "Two processes", "data_parallel.py", Q, (), (120, 1800), tables.data_parallel),
    Section("conformance", "Which identities hold", "conformance.py", Q, (), (300, 7200), accuracy.conformance,
            flag="--json"),
    Section("readme", "The README's code", "readme.py", (), (), (300, 900), accuracy.readme),
    Section("gallery", "The models", "gallery.py", Q, (), (420, 7200), accuracy.gallery),
    Section("reproduce", "Published set-ups, trained briefly", "reproduce.py", ("--rows", "iwae-5", "--seconds", "10"),
            ("--seconds", "45", "--seeds", "2"), (300, 7200), accuracy.reproduce, folder=("mnist", "--data")),
)  # fmt: skip
TITLES = {section.key: section.title for section in SECTIONS}


def command_of(section: Section, options: argparse.Namespace) -> list[str] | None:
    """Return script and arguments, None where the section is left out."""
    arguments = section.full if options.full else section.quick
    if arguments is None:
        return None
    if section.folder is None:
        return [section.script, *arguments]
    folder = getattr(options, section.folder[0])
    return None if folder is None else [section.script, *arguments, section.folder[1], str(folder.resolve())]


def measure(section: Section, options: argparse.Namespace) -> dict[str, Any] | None:
    """Run a section's script and return the record of the run, which stands beside its JSON."""
    command = command_of(section, options)
    if command is None:
        return None
    output = options.json / f"{section.key}.json"
    output.unlink(missing_ok=True)
    limit, load = section.limit[options.full], os.getloadavg()[0]
    start, processor = time.perf_counter(), processor_seconds()
    print(f"{section.key} ...", end=" ", flush=True)
    status, error = run_limited([*command, section.flag, str(output.resolve())], limit, output.with_suffix(".log"))
    record = {
        "status": status,
        "error": error,
        "seconds": time.perf_counter() - start,
        "processor": processor_seconds() - processor,
        "command": " ".join(["python", f"benchmarks/{command[0]}", *command[1:]]),
        "size": "full" if options.full else "reduced",
        "load": load,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": installed(),
    }
    if section.folder:
        record["command"] = record["command"].replace(command[-1], "DIR")
    (options.json / f"{section.key}.run.json").write_text(json.dumps(record, indent=1))
    print(f"{status}, {record['seconds']:.0f} s", flush=True)
    return record


class Part(NamedTuple):
    """A section of the report."""

    section: Section
    record: dict[str, Any] | None
    data: Any
    found: Found


def load(section: Section, folder: Path) -> Part:
    """Read a section's files; what is missing or cannot be read is said in its place."""
    record, data, found = None, None, Found("", [])
    try:
        record = json.loads((folder / f"{section.key}.run.json").read_text())
    except (OSError, ValueError):
        return Part(section, None, None, found)
    try:
        data = json.loads((folder / f"{section.key}.json").read_text())
        found = section.read(data)
    except OSError:
        found = Found("It left no results.", [])
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        data, found = None, Found(f"Its results cannot be read: {type(error).__name__}: {error}", [])
    return Part(section, record, data, found)


def picture(part: Part, folder: Path) -> str:
    """Draw what there is to draw and return the link."""
    path = folder / f"{part.section.key}.png"
    path.unlink(missing_ok=True)
    if part.data is None or part.section.draw is None:
        return ""
    plots.save(path, part.section.draw, part.data)
    return f"![{part.section.title}]({folder.name}/{path.name})\n\n"


def took(record: dict[str, Any]) -> str:
    """Format what a section took."""
    processor = f" ({record['processor']:.0f} of the processor's)" if "processor" in record else ""
    return f"{record['seconds']:.0f} s{processor}"


def section_text(part: Part, folder: Path) -> str:
    """Write a section."""
    head = f'<a id="{part.section.key}"></a>\n\n## {part.section.title}\n\n'
    if part.record is None:
        why = f"needs `--{part.section.folder[0]} DIR`" if part.section.folder else "only `make bench-full` has it"
        why = "not run" if part.section.folder is None and part.section.quick is not None else why
        return f"{head}`benchmarks/{part.section.script}`: **left out**, {why}."
    record = part.record
    status = "" if record["status"] == "ok" else f" **{record['status']}.** {record['error']}"
    line = f"`{record['command']}`, {took(record)}, {record['date']}, load before {record['load']:.1f}.{status}"
    return f"{head}{line}\n\n{picture(part, folder)}{part.found.text}"


def summary(parts: Sequence[Part]) -> str:
    """Write what wins, ties and loses, computed from the sections' comparisons."""
    text = (
        "Computed from the tables below. *times*: the other's cost over this package's, above 1 this package is "
        "better; *nats*: gain over the other. The range is of quartiles over turns or of seeds; where there is none, "
        "one number was measured. A win or a loss has the whole range more than 0.05 beyond a tie, one number 0.1.\n"
    )
    found = [(part.section, c) for part in parts for c in part.found.comparisons]
    counts = {verdict: sum(c.verdict == verdict for _, c in found) for verdict in ("wins", "ties", "loses")}
    text += f"\nOf {len(found)} comparisons this package "
    text += ", ".join(f"{verdict} {number}" for verdict, number in counts.items()) + ".\n"
    for verdict, title in (
        ("wins", "Where this package wins"),
        ("ties", "Where it ties, or the range is too wide to tell"),
        ("loses", "Where it loses"),
    ):
        rows = [row(section, c) for section, c in found if c.verdict == verdict]
        head = ("what", "beside", "factor or gain", "range", "section")
        text += f"\n### {title}\n\n{markdown_table(head, rows) if rows else 'Nowhere in these tables.'}\n"
    if data := next((part.data for part in parts if part.section.key == "conformance"), None):
        fails = (f"{whose} {bad} of {all_}" for whose, (bad, all_) in accuracy.failing_rows(data).items())
        text += f"\nRows of the conformance suite that fail: {', '.join(fails)} ([table](#conformance)).\n"
    return text


def row(section: Section, c: Comparison) -> tuple[Any, ...]:
    """Return a line of the summary."""
    value = f"{show(c.value)} times" if c.unit == "times" else f"{c.value:+.3g} nats"
    return c.what, c.other, value, tables.within(c.low, c.high), f"[{section.key}](#{section.key})"


def header(parts: Sequence[Part]) -> str:
    """Say what was run, where and when."""
    records = [part.record for part in parts if part.record]
    if not records:
        return "Nothing was measured."
    sizes = sorted({record["size"] for record in records})
    lines = [f"- Size: {' and '.join(sizes)}. " + (
        "Reduced sizes show that the scripts run and where things stand; the README's numbers are those of a full run."
        if "reduced" in sizes else "The README's numbers are of this size.")]  # fmt: skip
    for key, title in (("date", "Date"), ("machine", "Machine")):
        lines.append(f"- {title}: {'; '.join(dict.fromkeys(record[key] for record in records))}.")
    versions: dict[str, str] = {}
    for record in records:
        versions |= record["versions"]
    lines.append("- Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".")
    if "numpyro" not in versions:
        lines.append("- NumPyro was not importable, and its columns are missing. It is no dependency: to have them, "
                     "`pip install --target DIR numpyro` and `PYTHONPATH=DIR`.")  # fmt: skip
    busiest = max(record["load"] for record in records)
    if busiest > 1.5:
        lines.append(f"- **Other work ran beside this**: the load before a section was up to {busiest:.1f}. Wall-clock "
                     "seconds are a busy machine's; ratios are of turns within one run.")  # fmt: skip
    lines.append(f"- All sections took {sum(record['seconds'] for record in records) / 60:.0f} minutes.")
    bad = [part.section.key for part in parts if part.record and part.record["status"] != "ok"]
    lines.append(f"- Sections that did not end well: {', '.join(f'[{key}](#{key})' for key in bad) or 'none'}.")
    return "\n".join(lines)


def write(options: argparse.Namespace) -> list[Part]:
    """Write the report and its pictures."""
    folder = options.output / "report"
    folder.mkdir(parents=True, exist_ok=True)
    parts = [load(section, options.json) for section in SECTIONS]
    runs = {part.section.key: part.data for part in parts if part.data is not None}
    claims = claims_table(runs, (HERE.parent / "README.md").read_text(encoding="utf8"), TITLES)
    commands = "Written by `make bench` (`make bench-full` at full size), which is `python benchmarks/report.py`."
    text = [f"# Benchmarks\n\n{commands}", header(parts), f"## Summary\n\n{summary(parts)}"]
    text += [section_text(part, folder) for part in parts]
    text.append(f"## What the README says\n\nA dash: not measured, or not by a section of this run.\n\n{claims}")
    (options.output / "REPORT.md").write_text("\n\n".join(text) + "\n", encoding="utf8")
    return parts


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; errors are one line."""
    parser = argparse.ArgumentParser("report.py", argparse.SUPPRESS, __doc__.partition("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="reduced sizes, the default")
    size.add_argument("--full", action="store_true", help="acceptance sizes")
    parser.add_argument("--only", nargs="+", choices=TITLES, default=None, metavar="KEY", help=", ".join(TITLES))
    parser.add_argument("--from", dest="source", type=Path, metavar="DIR", help="measure nothing, read results there")
    parser.add_argument("--output", type=Path, default=HERE, metavar="DIR", help="folder of REPORT.md")
    parser.add_argument("--json", type=Path, default=HERE.parent / "build" / "bench", metavar="DIR", help="of results")
    parser.add_argument(
        "--posteriors", type=Path, metavar="DIR", help="posteriors with reference draws, for autofit.py"
    )
    parser.add_argument("--mnist", type=Path, metavar="DIR", help="images, for reproduce.py")
    options = parser.parse_args(argv)
    if options.source and (options.only or options.full):
        parser.error("--from measures nothing: it takes neither --only nor --full")
    for name in ("source", "posteriors", "mnist"):
        folder = getattr(options, name)
        if folder is not None and not folder.is_dir():
            parser.error(f"--{'from' if name == 'source' else name} {folder}: there is no such folder")
    options.json = options.source or options.json
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for and write the report; return 1 if a section failed."""
    options = parse(argv)
    try:
        for section in () if options.source else SECTIONS:
            if options.only is None or section.key in options.only:
                options.json.mkdir(parents=True, exist_ok=True)
                measure(section, options)
    finally:  # so that a run cut short has what it measured
        parts = write(options)
    return int(any(part.record and part.record["status"] != "ok" for part in parts))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the script at work is ended as well
    raise SystemExit(main())
