"""Rows come as they stand in the file, or the file and the line that is wrong are named."""

import gzip
import itertools
import json
import tracemalloc

import pytest

from gpt.data import json_rows, rows, text_files
from gpt.data.rows import BadRows
from gpt.errors import UserError


def read(path, content, policy="error"):
    """(rows, bad rows) of a file with this content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    bad = BadRows(policy)
    return list(rows.read(path, bad)), bad.left_out


def problem(path, content, policy="error"):
    with pytest.raises(UserError) as caught:
        read(path, content, policy)
    assert caught.value.code == 2
    return str(caught.value)


def test_gzipped_files_are_recognised_by_their_content(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    good, _ = read(path, gzip.compress(b'{"a": "b"}\n'))
    assert good[0].values == {"a": "b"}
    assert "damaged" in problem(path, gzip.compress(b'{"a": "b"}\n' * 1000)[:-20])


LARGE = 8_000_000
TEXT = 'Croup, the "cough" of childhood, a \u00e9tude. ' * 50


def pieces_of(kind):
    """The parts of a file of about LARGE bytes; each but the first and the last is a row."""
    row = {"question": "What is Croup ?", "answer": TEXT}
    cell = TEXT.replace('"', '""')
    first, one, last = {
        "csv": ("question,answer\r\n", f'What is Croup ?,"{cell}"\r\n', ""),
        "jsonl": ("", json.dumps(row) + "\n", ""),
        "json": ("[", json.dumps(row) + ", ", json.dumps(row) + "]"),
        "indented.json": ("[\n", json.dumps(row, indent=2) + ",\n", json.dumps(row) + "\n]\n"),
    }[kind.removesuffix(".gz")]
    n_rows = LARGE // len(one.encode())
    return n_rows + bool(last), itertools.chain([first], itertools.repeat(one, n_rows), [last])


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "indented.json", "csv.gz", "jsonl.gz", "json.gz"])
def test_memory_is_bounded_by_the_largest_row_or_is_that_of_the_text_of_an_array(tmp_path, kind, record_property):
    n_rows, pieces = pieces_of(kind)
    path = tmp_path / f"large.{kind}"
    with gzip.open(path, "wb", 1) if kind.endswith(".gz") else open(path, "wb") as file:
        for piece in pieces:
            file.write(piece.encode())
    tracemalloc.start()
    found = sum(row.values["answer"] == TEXT for row in rows.read(path, BadRows("error")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    record_property("count", f"memory to read {LARGE / 1e6:.0f} MB of {kind}: {peak / 1e6:.2f} MB")
    assert found == n_rows
    assert peak < (2.2 * LARGE if "json" in kind and "jsonl" not in kind else LARGE / 10)


@pytest.mark.parametrize(
    "name, start, end",
    [
        ("a.csv", 'q,a\nx,"', "one line that is never closed,\n"),
        ("a.jsonl", '{"q": "x"}\n{"a": "', "never closed, "),
    ],
)
def test_a_quote_that_is_never_closed_does_not_draw_a_large_file_into_memory(tmp_path, monkeypatch, name, start, end):
    monkeypatch.setattr(text_files, "ROW_LIMIT", 1_000_000)  # 64 MiB take a second
    (tmp_path / name).write_text(start + end * (LARGE // len(end)))
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"{name}:2: this row does not end within 1,000,000 bytes"):
        list(rows.read(tmp_path / name, BadRows("skip")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < LARGE / 2, f"{peak:,} bytes"


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_large_json_array_is_refused_before_it_is_in_memory(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(json_rows, "ARRAY_LIMIT", 1_000_000)
    path = tmp_path / "a.json"
    path.write_bytes(pack(b"[" + b'{"q": "x"},\n' * (LARGE // 12)))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a.json is not JSON Lines and has more than 1,000,000 bytes; convert it"):
        list(rows.read(path, BadRows("skip")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000, f"{peak:,} bytes"


@pytest.mark.parametrize("name", ["a.CSV", "a.csv.gz", "a.json", "a.JSONL", "a.v2.ndjson.GZ", "a.txt", "csv"])
def test_the_name_says_the_format_and_where_it_does_not_the_content_does(tmp_path, name):
    is_json = "json" in name.lower()
    content = b'{"q": "x"}\n' if is_json else b"q\nx\n"
    assert read(tmp_path / name, content)[0][0].values == {"q": "x"}
    assert (rows.format_of(tmp_path / name) is None) == (name in ("a.txt", "csv"))
    (tmp_path / "a.txt").write_text('{"q": "y"}')
    assert [row.values for row in rows.read(tmp_path / "a.txt", BadRows("error"))] == [{"q": "y"}]


def test_messages_stay_short_whatever_the_file_holds(tmp_path):
    csv, jsonl = tmp_path / "medquad.csv", tmp_path / "data.jsonl"
    long = "column " * 100_000
    for path, content in [
        (csv, long + "\n"), (csv, f"{long},{long}\n1,2\n"), (jsonl, f'{{"{long}": 1, "{long}": 2}}'),
        (jsonl, f'{{"{long}": "\\ud800"}}'), (jsonl, '{"a": 1' + "0" * 1000 + ".0}"),
    ]:  # fmt: skip
        assert len(problem(path, content)) < 700
