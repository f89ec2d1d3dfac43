"""Executes gpt2.py, the source of the tutorial, and writes gpt2.ipynb with its outputs.

    python experiments/tutorial/make.py

It needs the packages of requirements-notebook.txt, no network, and about a minute.
"""

from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
SOURCE, NOTEBOOK = HERE / "gpt2.py", HERE / "gpt2.ipynb"
LONGEST_CELL = 300  # seconds


def executed() -> NotebookNode:
    """The notebook with the outputs of running it from top to bottom. Raises CellExecutionError where a cell fails."""
    notebook = jupytext.read(SOURCE)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # the default is random, and would differ each time
    place = {"metadata": {"path": str(HERE)}}
    return NotebookClient(notebook, timeout=LONGEST_CELL, record_timing=False, resources=place).execute()


if __name__ == "__main__":
    nbformat.write(executed(), NOTEBOOK)
