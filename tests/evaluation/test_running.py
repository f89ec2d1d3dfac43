"""Tables that fit the terminal; tests/test_evaluate.py runs whole evaluations."""

from gpt.evaluation.running import fitting
from gpt.evaluation.statistics import Figure
from gpt.terminal import console

FIGURES = {name: {"ROUGE-L": Figure(0.123456, 0.1, 0.2)} for name in ("model", "BM25 baseline", "most frequent answer")}
FIGURES["model"] |= {"stopped": Figure(1.0, 1.0, 1.0)}


def test_no_figure_is_cut_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    tables = [console.table(rows, columns) for columns, rows in fitting(FIGURES, 60)]
    assert len(tables) == 2 and all(len(line) <= 60 for table in tables for line in table.splitlines())
    assert "".join(tables).count("0.1235 [0.1, 0.2]") == 3
    assert "stopped" in tables[0] and "stopped" not in tables[1]


def test_a_wide_terminal_has_one_table():
    [(columns, rows)] = fitting(FIGURES, 160)
    assert columns == ["", *FIGURES] and [row[""] for row in rows] == ["ROUGE-L", "stopped"]
