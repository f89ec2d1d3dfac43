"""The tutorial: its notebook has the source of its text, and running it gives the numbers that are stored in it."""

import json
import re
import runpy

import jupytext
import nbformat
import pytest
from conftest import ROOT

TUTORIAL = ROOT / "experiments" / "tutorial"
STORED = nbformat.read(TUTORIAL / "gpt2.ipynb", as_version=4)
LOSS = 0.02  # nats: processors and numbers of threads add in another order, and training amplifies that


def key_numbers(notebook):
    """What the cell that is tagged so has printed."""
    [cell] = [cell for cell in notebook.cells if "key-numbers" in cell.metadata.get("tags", [])]
    return json.loads("".join(output.text for output in cell.outputs))


def test_the_notebook_has_the_source_of_its_text():
    text = jupytext.read(TUTORIAL / "gpt2.py")
    differing = [
        number
        for number, (stored, cell) in enumerate(zip(STORED.cells, text.cells, strict=False))
        if (stored.cell_type, stored.source) != (cell.cell_type, cell.source)
    ]
    remedy = "python experiments/tutorial/make.py makes the notebook again"
    assert len(STORED.cells) == len(text.cells) and not differing, f"cells {differing} differ: {remedy}"


def test_what_is_stored_is_small_and_of_no_machine():
    assert (TUTORIAL / "gpt2.ipynb").stat().st_size < 1_000_000
    code = [cell for cell in STORED.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    shown = "\n".join(output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in outputs)
    assert not re.search(r"\x1b|\r|/tmp/|/home/|/root/|/Users/|[Ww]arning", shown)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8


@pytest.mark.exhaustive  # a minute of training; .ci/run runs it by its name
def test_running_the_notebook_gives_the_numbers_that_are_stored(monkeypatch):
    monkeypatch.delenv("WANDB_MODE")  # which conftest.py sets; the notebook sees to it itself
    stored, now = key_numbers(STORED), key_numbers(runpy.run_path(str(TUTORIAL / "make.py"))["executed"]())
    if now["instructions from"] != stored["instructions from"]:  # medquad.csv is in this project's folder
        now, stored = ({k: v for k, v in of.items() if not k.startswith("instructions")} for of in (now, stored))
    assert now == pytest.approx(stored, abs=LOSS)
