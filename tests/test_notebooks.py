"""The notebooks were run as they stand, start with a question, and run again: at a small size, in `make test-slow`."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
PATHS = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
LARGEST = 400_000  # bytes
PUBLIC = ("pyro_elbo_ext", "pyro_elbo_ext.diagnostics", "pyro_elbo_ext.plots")  # modules that users import from
MACHINE = re.compile(r"/(?:home|root|tmp|usr|Users|work|opt)/|[A-Z]:\\\\|site-packages|ipykernel_\d")

# What the first code cell says, by notebook, and what a test says instead.
SMALL = {
    "01_what_the_elbo_is": {"STEPS = 1000": "STEPS = 10", "REPLICATES = 500": "REPLICATES = 5"},
    "02_tighter_bounds": {
        "STEPS = 1500": "STEPS = 10",
        "REPLICATES = 150": "REPLICATES = 3",
        "ROUNDS = 100": "ROUNDS = 3",
    },
    "03_discrete_latents": {"STEPS = 600": "STEPS = 5", "REPLICATES = 500": "REPLICATES = 5"},
    "04_natural_gradients": {"STEPS = 1000": "STEPS = 30", "NEWTON = 200": "NEWTON = 30"},
    "05_flow_guides": {"STEPS = 1000": "STEPS = 5", "DRAWS = 10000": "DRAWS = 100"},
    "06_trusting_a_posterior": {
        "STEPS = 4000": "STEPS = 1500",
        "BLOCK = 300": "BLOCK = 100",
        "DRAWS = 4000": "DRAWS = 1000",
        "FLOW = 1000": "FLOW = 10",
    },
    "07_fast_and_large": {
        "EAGER = 200": "EAGER = 10",
        "COMPILED = 20000": "COMPILED = 20",
        "STEPS = 400": "STEPS = 16",
    },
}


def load_execute():
    spec = importlib.util.spec_from_file_location("notebooks_execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


execute = load_execute()


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def make_small(notebook, replacements):
    """Put small sizes into the first code cell; each must be there, once, and no size may be left as it was."""
    cell = code_cells(notebook)[0]
    sizes = {ast.get_source_segment(cell.source, node) for node in ast.parse(cell.source).body}
    assert sizes == set(replacements), "the sizes of the first code cell are not those that the test replaces"
    for full, small in replacements.items():
        assert cell.source.count(full) == 1, f"{full!r} is not what the first code cell says"
        cell.source = cell.source.replace(full, small)


def texts(notebook):
    """Everything that a reader sees of the outputs, pictures apart."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            data = output.get("data", {})
            yield from (data[kind] for kind in data if kind.startswith("text/"))
            yield output.get("text", "")


@pytest.fixture(params=PATHS)
def notebook(request):
    return execute.read(PATHS[request.param])


def test_every_notebook_has_a_small_size():
    assert list(PATHS) == list(SMALL)


def test_the_first_cell_asks_a_question(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    title = first.source.splitlines()[0]
    assert title.startswith("# ") and title.endswith("?")


def test_the_last_cell_says_what_to_remember(notebook):
    last = notebook.cells[-1]
    assert last.cell_type == "markdown"
    assert last.source.startswith("## What to remember")
    assert "**What goes wrong:**" in " ".join(last.source.split())


def test_it_was_run_from_top_to_bottom_without_an_error(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output.get("name") != "stderr" for output in outputs), "a warning or a progress bar was kept"
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_it_is_small_and_tells_no_machine_from_another(notebook):
    assert notebook.metadata == execute.METADATA
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert not [text for text in texts(notebook) if MACHINE.search(text)]


@pytest.mark.parametrize("name", PATHS)
def test_its_file_is_small(name):
    assert PATHS[name].stat().st_size < LARGEST


def test_it_imports_public_names_only(notebook):
    for cell in code_cells(notebook):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "pyro_elbo_ext":
                assert node.module in PUBLIC
                assert {alias.name for alias in node.names} <= set(importlib.import_module(node.module).__all__)
            if isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.startswith("pyro_elbo_ext")]


def test_the_small_sizes_replace_what_is_there(notebook, request):
    make_small(notebook, SMALL[request.node.callspec.params["notebook"]])


def test_a_size_that_is_not_there_is_noticed():
    notebook = execute.read(PATHS["01_what_the_elbo_is"])
    for wrong in ({"STEPS = 1": "STEPS = 2"}, {"STEPS = 1000": "STEPS = 2"}):
        with pytest.raises(AssertionError, match="the sizes of the first code cell"):
            make_small(notebook, wrong)


def test_links_of_the_readme_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    for link in re.findall(r"notebooks/[\w./-]+", readme):
        assert (ROOT / link.rstrip(".")).exists(), link


def test_pieces_of_one_stream_are_joined():
    pieces = [("stdout", "a"), ("stdout", "b"), ("stderr", "c"), ("stdout", "d")]
    outputs = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in pieces]
    assert [output.text for output in execute.joined(outputs)] == ["ab", "c", "d"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the kernel's client, which is not ours
@pytest.mark.parametrize("name", PATHS)
def test_it_runs_at_a_small_size(name, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    notebook = execute.read(PATHS[name])
    make_small(notebook, SMALL[name])
    folder = tmp_path / "empty"
    folder.mkdir()
    execute.execute(notebook, folder)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_the_script_for_several_processes_runs(tmp_path):
    """The listing of the last notebook, as a reader would save it, with fewer steps."""
    cells = execute.read(PATHS["07_fast_and_large"]).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    (script,) = re.findall(r"```python\n(.*?)```", prose, flags=re.S)
    assert script.count("num_steps=500") == 1
    (tmp_path / "train.py").write_text(script.replace("num_steps=500", "num_steps=10"), encoding="utf8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert re.fullmatch(r"loss [\d.]+ ± [\d.]+ nats after 10 steps in [\d.]+ s \(stopped by budget\)\n", found)
    assert (tmp_path / "run.pt").exists()
