"""One JSON object that holds all rows gives them, in each form that pandas writes; an unclear one is named."""

import json

import pytest

from gpt.data import rows
from gpt.data.columns import Wanted
from gpt.errors import UserError

QA = [{"question": "q1", "answer": "a1"}, {"question": "q2", "answer": "NA"}, {"question": "q3", "answer": None}]


def read(path, content, kind="qa"):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return [row.values for row in rows.read(path, rows.BadRows("error"), Wanted(kind))]


@pytest.mark.parametrize("orient", ["records", "columns", "index", "split", "table", "lines"])
@pytest.mark.parametrize("indent", [0, 2])
def test_each_form_of_pandas_gives_the_same_rows(tmp_path, orient, indent):
    pandas = pytest.importorskip("pandas")
    how = {"orient": "records", "lines": True} if orient == "lines" else {"orient": orient, "indent": indent}
    pandas.DataFrame(QA).to_json(tmp_path / "a.json", **how)
    found = read(tmp_path / "a.json", (tmp_path / "a.json").read_text())
    assert [{key: row[key] for key in ("question", "answer")} for row in found] == QA


@pytest.mark.parametrize("key", ["data", "rows", "examples"])
def test_rows_under_a_key_are_read_and_that_is_said(tmp_path, key, lines):
    assert read(tmp_path / "a.json", {"version": 1, key: QA}) == QA
    assert lines() == [f"a.json is one JSON object with 3 rows under the key {key}"]


def test_lists_as_columns_are_read(tmp_path):
    assert read(tmp_path / "a.json", {name: [row[name] for row in QA] for name in QA[0]}) == QA


@pytest.mark.parametrize("content", [QA[0], {"messages": [{"role": "user", "content": "a"}]}, {"m": 2}])
def test_an_object_that_is_a_row_stays_one(tmp_path, content):
    assert read(tmp_path / "a.json", content, "alpaca" if "messages" in content else "qa") == [content]


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"train": QA, "test": QA}, "a.json is one JSON object with rows under train, test; write one array"),
        ({"question": ["a", "b"], "answer": ["c"]}, "a.json is one JSON object with columns of different lengths"),
        ({"question": {"0": "a"}, "answer": {"1": "c"}}, "a.json is one JSON object with columns with different rows"),
        ({"columns": ["question", "answer"], "data": [["a"]]}, "rows under data that are longer or shorter"),
        ({"result": {"rows": QA}}, "a.json is one JSON object with the keys result, none of which has rows with the"),
        ({"features": [{"name": "question"}], "rows": [{"row": QA[0]}]}, "with the keys features, rows, none of which"),
    ],
)
def test_an_unclear_form_is_named(tmp_path, content, expected):
    with pytest.raises(UserError, match=expected):
        read(tmp_path / "a.json", content)
