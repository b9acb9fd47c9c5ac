"""Executes notebooks in place, as `make notebooks` does, and keeps nothing that tells one machine or hour from another.

`python notebooks/execute.py` runs all of this folder at full size, one after the other, in about five minutes on one
core; with names of files it runs those.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
TIMEOUT = 600  # seconds, of one cell
# What tqdm says where there are no widgets for its bars, and ArviZ 0.23 once a day, would stand in some runs only.
ENVIRONMENT = {"PYTHONWARNINGS": "ignore:IProgress not found,ignore::FutureWarning:arviz"}
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}


def read(path: Path) -> NotebookNode:
    """Return the notebook in a file, whose format is checked."""
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    return notebook


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Run all cells in a new kernel that works in a folder; the outputs are the notebook's.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    client.execute(env=os.environ | ENVIRONMENT)
    clean(notebook)


def clean(notebook: NotebookNode) -> None:
    """Number the cells, join what was printed in pieces, and drop metadata of the run."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)


def joined(outputs: Sequence[NotebookNode]) -> list[NotebookNode]:
    """Return the outputs with neighbouring pieces of one stream as one: where a kernel cuts them is chance."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if kept and output.output_type == "stream" == kept[-1].output_type and output.name == kept[-1].name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    """Execute the files that are named, or all."""
    names = sys.argv[1:] if argv is None else argv
    for path in [Path(name) for name in names] or sorted(FOLDER.glob("*.ipynb")):
        print(path.name)
        notebook = read(path)
        execute(notebook, path.parent)
        nbformat.write(notebook, path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
