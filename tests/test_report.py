"""The report says what the benchmarks measured: losses as plainly as wins, and failures in their place."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
FEW = 60_000  # bytes of a picture


def load():
    """The report's modules, whose names are also those of others."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split("_")[0] == "report"}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        found = importlib.import_module("report")
    for name in [name for name in sys.modules if name.split("_")[0] == "report"]:
        del sys.modules[name]
    sys.modules.update(before)
    return found


report = load()
tables, accuracy, plots = report.tables, report.accuracy, report.plots


def costs(ratio, low, high):
    """A row of step costs."""
    return {"ms": 3.0, "ratio": ratio, "ratio_low": low, "ratio_high": high}


STEPS = {
    "rows": {
        "toy": {
            "pyro Trace_ELBO": costs(1, 1, 1) | {"mib": 10.0, "mib_ratio": 1.0},
            "cheap": costs(0.5, 0.4, 0.8) | {"mib": 20.0, "mib_ratio": 2.0},
            "dear": costs(2.0, 1.25, 4.0),
            "noisy": costs(0.9, 0.5, 1.5),
        }
    }
}
SCALING = {
    "reference": "pyro Trace_ELBO",
    "rows": [
        {"axis": "particles", "size": k, "particles": k, "rows": 9, "dim": 2,
         "losses": {name: {"microseconds": 100.0 * k, "mib": 8.0 * k, "ratio": 1.0, "ratio_low": 0.9, "ratio_high": 1.2}
                    for name in ("pyro Trace_ELBO", "IWAE pathwise")}}
        for k in (1, 4)
    ],
}  # fmt: skip


def run(settings, reached):
    """A run of natural_gradient.py, with its points."""
    points = [[10, 100, 1.0, 5.0], [20, 200, 2.0, 0.5]]
    return {"kind": settings, "setting": "s", "reached": reached, "points": points}


GOT_THERE = {"1.0": [2, 20, 0.2, 0.5], "0.1": [4, 40, 0.5, 0.05]}
NATURAL = {
    "full_rank": [{"dim": 3, "races": {"ours": [run("NaturalGradient", GOT_THERE)], "Adam": [run("Adam", {})]}}],
    "parity": {
        "dim": 3,
        "mean_field": [run("NaturalGradient", {}), run("Adam", {}) | {"points": [[9, 90, 1.0, 0.1]]}],
        "low_rank": [],
    },
}


def flow(guide, *kls):
    """Runs of flow_guides.py."""
    numbers = {"k_hat": 0.5, "ess": 0.9, "ms": 2.0, "parameters": 20}
    return [{"target": "funnel", "guide": guide, "seed": i, "kl": kl, **numbers} for i, kl in enumerate(kls)]


FLOWS = {
    "quality": [
        *flow("AutoNormal", 1.0),
        *flow("AutoFlow", 0.1, 0.2),
        *flow("AutoPlatedFlow", 1.5),
        *[run | {"ms": 0.1} for run in flow("numpyro-AutoBNAFNormal", 0.15)],
        {"target": "funnel", "guide": "AutoIAFNormal", "seed": 0, "error": "ValueError: nan"},
    ]
}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Runs three made-up benchmarks, of which one fails and one hangs, and returns status and report."""

    def run(*arguments):
        words = f"import sys, json; open(sys.argv[-1], 'w').write(json.dumps({STEPS!r}))"
        scripts = {
            "good": words,
            "bad": f"{words}; raise SystemExit('no luck in /some/where/secret/model.py')",
            "hanging": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
        }
        sections = []
        for key, code in scripts.items():
            (tmp_path / f"{key}.py").write_text(code)
            limit = (1, 1) if key == "hanging" else (20, 20)
            script = str(tmp_path / f"{key}.py")
            sections.append(report.Section(key, f"The {key} one", script, (), (), limit, tables.elbo_step))
        monkeypatch.setattr(report, "SECTIONS", tuple(sections))
        monkeypatch.setattr(report, "TITLES", {section.key: section.title for section in sections})
        status = report.main(["--output", str(tmp_path), *arguments])
        return status, (tmp_path / "REPORT.md").read_text()

    return run


def section(text, title):
    """The part of a report below a heading."""
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_a_failure_or_a_hang_costs_its_own_section_only(measured, tmp_path):
    status, text = measured("--json", str(tmp_path / "json"))
    assert status == 1
    assert "| cheap | 3 | 0.5 | 0.4 to 0.8 | 20 | 2 |" in section(text, "The good one")
    assert "**" not in section(text, "The good one").partition("\n\n")[0].replace("**toy**", "")
    assert "**failed with status 1.** no luck in model.py" in section(text, "The bad one")
    assert "| cheap |" in section(text, "The bad one")  # what it wrote before
    assert "**stopped at the limit of 1 s.**" in section(text, "The hanging one")
    assert "[bad](#bad), [hanging](#hanging)" in text
    assert "secret" not in text and "Size: reduced" in text

    status, again = measured("--from", str(tmp_path / "json"))
    assert (status, again) == (1, text)


def test_what_is_unreadable_or_missing_is_said(measured, tmp_path):
    measured("--json", str(tmp_path / "json"), "--only", "good")
    (tmp_path / "json" / "good.json").write_text('{"rows": {"toy": {"a": {}}}}')
    status, text = measured("--from", str(tmp_path / "json"))
    assert status == 0
    assert "cannot be read: KeyError" in section(text, "The good one")
    assert "**left out**, not run" in section(text, "The bad one")


def test_wins_ties_and_losses_are_those_of_the_numbers():
    found = {c.what: c for c in tables.elbo_step(STEPS).comparisons}
    assert {what: c.verdict for what, c in found.items()} == {
        "cheap: toy": "wins", "dear: toy": "loses", "noisy: toy": "ties", "cheap: toy, memory": "loses",
    }  # fmt: skip
    assert found["cheap: toy"][2:5] == (2.0, 1.25, 2.5) and found["dear: toy"][2:5] == (0.5, 0.25, 0.8)
    text = report.summary([report.Part(report.SECTIONS[0], {}, STEPS, tables.elbo_step(STEPS))])
    assert "wins 1, ties 1, loses 2" in text
    assert "| dear: toy | pyro Trace_ELBO | 0.5 times | 0.25 to 0.8 |" in text.partition("Where it loses")[2]


def test_what_was_not_reached_is_a_lower_bound():
    found = accuracy.natural_gradient(NATURAL)
    assert "| 3 | 0.1 | Adam | not reached | not reached | not reached |" in found.text
    steps, seconds, gap = found.comparisons
    assert steps[2:5] == (5.0,) * 3 and seconds[2:5] == (4.0,) * 3  # Adam was stopped after 20 steps and 2 seconds
    assert gap.value == pytest.approx(-0.4) and gap.verdict == "loses"


def test_flows_are_held_against_the_best_of_each_library():
    found = {(c.what, c.other): c for c in accuracy.flow_guides(FLOWS).comparisons}
    ours = found["AutoFlow: KL, funnel", "best of pyro: AutoNormal"]
    assert ours[2:5] == pytest.approx((0.85, 0.8, 0.9)) and ours.verdict == "wins"
    assert found["AutoFlow: KL, funnel", "best of numpyro: AutoBNAFNormal"].verdict == "ties"
    assert found["AutoPlatedFlow: KL, funnel", "best of pyro: AutoNormal"].verdict == "loses"
    assert found["AutoFlow, eager step: funnel", "numpyro AutoBNAFNormal, compiled"].verdict == "loses"
    assert "crashed" in accuracy.flow_guides(FLOWS).text


@pytest.mark.parametrize("draw, data", [("scaling", SCALING), ("natural_gradient", NATURAL), ("flow_guides", FLOWS)])
def test_pictures_are_small(draw, data, tmp_path):
    plots.save(tmp_path / "a.png", getattr(plots, draw), data)
    assert 1000 < (tmp_path / "a.png").stat().st_size < FEW


def test_scaling_holds_the_ends_against_pyro():
    found = [c.what for c in tables.scaling(SCALING).comparisons]
    name = "IWAE pathwise, eager step"
    assert found == [f"{name}: {k} particles{what}" for k in (1, 4) for what in ("", ", memory")]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--only", "nothing"], "invalid choice: 'nothing'"),
        (["--quick", "--full"], "not allowed with argument"),
        (["--from", "no/such"], "--from no/such: there is no such folder"),
        (["--posteriors", "no/such"], "--posteriors no/such: there is no such folder"),
        (["--from", ".", "--full"], "--from measures nothing"),
    ],
)
def test_bad_arguments_are_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1


def test_every_benchmark_has_a_section():
    runs = {path.name for path in FOLDER.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    assert {s.script for s in report.SECTIONS} == runs - {"report.py"}
    assert len(report.TITLES) == len(report.SECTIONS)


def test_every_claim_stands_in_the_readme_and_names_its_source():
    claims = report.claims_table.__globals__
    text = claims["plain_text"]((ROOT / "README.md").read_text(encoding="utf8"))
    for claim in claims["CLAIMS"]:
        assert claim.words in text, claim.words
        assert claim.source in report.TITLES or re.fullmatch(r"`python .*`", claim.source), claim
    table = report.claims_table({"elbo-step": STEPS}, "", report.TITLES)
    assert "not among this run's rows" in table and "no longer in the README" in table


def test_what_is_claimed_of_the_models_is_run():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        gallery = importlib.import_module("gallery")
    claims = [claim for claim in report.claims_table.__globals__["CLAIMS"] if claim.source == "gallery"]
    runs = [" ".join((name, *arguments)) for name, arguments in gallery.choose(gallery.NAMES, quick=False)]
    rows = [{"run": title, "table": [{"objective": "first"}, {"objective": "last"}]} for title in runs]
    assert len(claims) > 10 and len(set(runs)) == len(runs)
    for claim in claims:
        assert "last" in claim.here({"gallery": {"rows": rows}}), claim
    reduced = [" ".join((name, *arguments)) for name, arguments in gallery.choose(gallery.NAMES, quick=True)]
    assert reduced == [f"{name} --quick" for name in gallery.NAMES]


def test_the_committed_report_has_neither_host_nor_paths():
    text = (FOLDER / "REPORT.md").read_text(encoding="utf8")
    assert not re.search(r"(?<![\w.)\]])/(home|tmp|work|root|usr)\b", text)
    for link in re.findall(r"\]\((report/[^)]*)\)", text):
        assert (FOLDER / link).stat().st_size < FEW
