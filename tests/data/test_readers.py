"""Rows come as they stand in the file, or the file and the line that is wrong are named."""

import gzip
import itertools
import json
import tracemalloc
from pathlib import Path

import pytest

from gpt.data import readers, text_files
from gpt.data.readers import BadRows
from gpt.errors import UserError


def read(path, content, policy="error"):
    """(rows, bad rows) of a file with this content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    bad = BadRows(policy)
    return list(readers.rows(path, bad)), bad.found


def problem(path, content, policy="error"):
    with pytest.raises(UserError) as caught:
        read(path, content, policy)
    assert caught.value.code == 2
    return str(caught.value)


@pytest.fixture
def csv(tmp_path):
    return tmp_path / "medquad.csv"


@pytest.fixture
def jsonl(tmp_path):
    return tmp_path / "data.jsonl"


def test_a_row_is_a_dictionary_with_the_line_where_it_starts(csv):
    rows, _ = read(csv, 'question,answer\nq1,"two\nlines"\n\nq2,"a ""quoted"" word, and a comma"\n')
    assert [(row.line, row.values) for row in rows] == [
        (2, {"question": "q1", "answer": "two\nlines"}),
        (5, {"question": "q2", "answer": 'a "quoted" word, and a comma'}),
    ]


def test_words_that_mean_nothing_to_pandas_are_text(csv):
    rows, _ = read(csv, "question,answer\nq1,NA\nq2,None\nq3,n/a\nq4,nan\nq5,\nq6,-1\n")
    assert [row.values["answer"] for row in rows] == ["NA", "None", "n/a", "nan", "", "-1"]


def test_a_byte_order_mark_and_windows_line_ends_simply_work(csv):
    rows, _ = read(csv, b"\xef\xbb\xbf" + b'"question",answer\r\nq,"a\r\nb"\r\n')
    assert rows[0].values == {"question": "q", "answer": "a\r\nb"}


def test_a_cell_of_ten_megabytes_works(csv):
    rows, _ = read(csv, "question,answer\nq," + "word " * 2_000_000 + "\n")
    assert len(rows[0].values["answer"]) == 10_000_000


def test_gzipped_files_are_recognised_by_their_content(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    rows, _ = read(path, gzip.compress(b'{"a": "b"}\n'))
    assert rows[0].values == {"a": "b"}
    assert "damaged" in problem(path, gzip.compress(b'{"a": "b"}\n' * 1000)[:-20])


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"question,answer\n", "has a header line and no rows"),
        (b"question,answer,Question\nq,a,b\n", "csv:1: column 'Question' occurs twice"),
        (b"question,answer\nq,a\nq,a,b\n", "csv:3: 3 fields, the header has 2"),
        (b"question,answer\nq\n", "csv:2: 1 field, the header has 2"),
        (b'question,answer\nq,a\n"q"x,a\n', "csv:3: text after the closing quote of a field"),
        (b'question,answer\nq,"a\nb\nc\n', "csv:2: a quoted field is never closed"),
        (b'question,answer\nq,5" x 7"\n', "csv:2: a quote inside a field without quotes"),
        (b'question,answer\nq, "a"\n', "csv:2: a quote inside a field without quotes"),
        (b"question,answer\nq,a\rb,c\n", "csv:2: a carriage return inside a field without quotes"),
        (b"question,answer\nq,a\r\r\n", "csv:2: a carriage return inside a field without quotes"),
        (b"question,answer\nq,a\nq,\xe9t\xe9\n", "csv:3: not UTF-8 at byte 22 of the file: 0xe9"),
        (b"\xef\xbb\xbfquestion,answer\nq,\xe9\n", "csv:2: not UTF-8 at byte 21 of the file: 0xe9"),
        (b'question,answer\nq,"a\n\0b"\n', "csv:3: NUL character at byte 21 of the file"),
        ("question,answer\nq,a\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("question,answer\nq,a\n".encode("utf-16-le"), "is UTF-16; save it as UTF-8"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_csv_file_is_named_with_its_line(csv, content, expected):
    assert expected in problem(csv, content)


def test_bad_rows_can_be_left_out_and_are_listed(csv):
    content = b'question,answer\nq1,a1\nq2,a2,x\n"q3"x,a3\nq4,\xff\nq5,\0\nq6,a6\n'
    rows, found = read(csv, content, "skip")
    assert [row.values["question"] for row in rows] == ["q1", "q6"]
    assert [line.split(" ")[0] for line in found] == [f"medquad.csv:{line}:" for line in (3, 4, 5, 6)]


@pytest.mark.parametrize(
    "content", [b'q,a\nx,"never closed\ny,z\n', b'q,a\nx,"two\nlines"y\nz,z\n', b'q,a\nx,"\xff\n"\n']
)
def test_a_bad_row_whose_end_cannot_be_known_is_never_skipped(csv, content):
    """The rows after it might be read shifted, and nobody would notice."""
    assert "csv:2:" in problem(csv, content, "skip")


def test_json_lines_and_a_json_array_give_the_same_rows(jsonl, tmp_path):
    objects = [{"instruction": "ä", "output": "NA"}, {"instruction": "b", "output": None, "n": [1, {"x": 2}]}]
    lines, _ = read(jsonl, "\n".join(map(json.dumps, objects)))
    array, _ = read(tmp_path / "data.json", "\n" + json.dumps(objects, indent=1))
    assert [row.values for row in lines] == [row.values for row in array] == objects
    assert [row.line for row in lines] == [1, 2]
    assert [row.line for row in array] == [3, 7]


@pytest.mark.parametrize(
    "line, expected",
    [
        (b'{"a": "b"', "data.jsonl:2: invalid JSON (Expecting ',' delimiter at column 10)"),
        (b"[" * 100_000, "data.jsonl:2: invalid JSON (nested too deeply)"),
        (b'{"a":' * 100_000, "data.jsonl:2: invalid JSON (nested too deeply)"),
        (b'{"a": ' + b"1" * 5000 + b"}", "data.jsonl:2: invalid JSON (Exceeds the limit"),
        (b'{"a": 1, "b": 2, "a": 1}', "data.jsonl:2: key 'a' occurs twice"),
        (b'{"a": [{"\xc3\xa4": 1, "\\u00e4": 2}]}', "data.jsonl:2: key '\\xe4' occurs twice"),
        (b'{"a": NaN}', "data.jsonl:2: invalid JSON (NaN is not a number that it can hold)"),
        (b'{"a": -Infinity}', "data.jsonl:2: invalid JSON (-Infinity is not a number that it can hold)"),
        (b'{"a": 1e999}', "data.jsonl:2: invalid JSON (1e999 is not a number that it can hold)"),
        (b'{"a": 1}\x0c', "data.jsonl:2: invalid JSON (Extra data at column 9)"),
        (b'  {"a": 01}', "data.jsonl:2: invalid JSON (Expecting ',' delimiter at column 10)"),
        (b'"text"', "data.jsonl:2: a string where an object {...} is needed"),
        (b"[1, 2]", "data.jsonl:2: a list where an object {...} is needed"),
        (b"null", "data.jsonl:2: null where an object {...} is needed"),
        (b'{"a": "x\\ud800y"}', "data.jsonl:2: 'a': lone surrogate \\ud800"),
        (b'{"a": "x\\u0000y"}', "data.jsonl:2: 'a': NUL character"),
        (b'{"a": "\xe9"}', "data.jsonl:2: not UTF-8 at byte 18 of the file: 0xe9"),
        (b'{"a": "\0"}', "data.jsonl:2: NUL character at byte 18 of the file"),
        (b'{"a\x1b[31m": 1', "data.jsonl:2: invalid JSON"),
    ],
)
def test_what_is_wrong_with_json_lines_is_named_with_its_line(jsonl, line, expected):
    content = b'{"a": "b"}\n' + line + b'\n{"a": "c"}\n'
    assert expected in problem(jsonl, content)
    assert "\x1b" not in problem(jsonl, content)


@pytest.mark.parametrize("line", [b'{"a": ', b"17", b'{"a": "\\udfff"}', b'{"a": "\xff"}', b'{"a":' * 100_000])
def test_bad_json_lines_can_be_left_out_and_are_listed(jsonl, line):
    rows, found = read(jsonl, b'{"a": "b"}\n' + line + b'\n{"a": "c"}\n', "skip")
    assert [row.values["a"] for row in rows] == ["b", "c"]
    assert len(found) == 1 and found[0].startswith("data.jsonl:2: ")


@pytest.mark.parametrize(
    "content, expected",
    [
        ("[]", "is empty"),
        ("[{},\n{},\n]", "data.json:3: invalid JSON (Expecting value at column 1)"),
        ("[{}\n{}]", "data.json:2: invalid JSON (',' or ']' expected)"),
        ("[{}\n", "data.json:2: invalid JSON (',' or ']' expected)"),
        ("[{}]\n{}", "data.json:2: invalid JSON (text after the end of the array)"),
        ("[{},\n 5]", "data.json:2: a number where an object {...} is needed"),
        ("[" * 100_000, "data.json:1: invalid JSON (nested too deeply)"),
        ('[{"a": 1,\n "a": 2}]', "data.json:1: key 'a' occurs twice"),
        ("[{},\n" + "  " * 50_000 + "x]", "data.json:2: invalid JSON (Expecting value at column 100001)"),
        ('[{"a": "' + "x" * 100_000 + "}]", "data.json:1: invalid JSON (Unterminated string starting at at column 8)"),
        (
            '[{},\n{"a": "' + "x" * 100_000 + '\n"}]',
            "data.json:2: invalid JSON (Invalid control character at at column",
        ),
        (b'[{},\n"' + b"x" * 100_000 + b'\n\xff"]', "data.json:3: not UTF-8 at byte 100007 of the file: 0xff"),
        (b"[{},\n\n" + b" " * 100_000 + b"\0]", "data.json:3: NUL character at byte 100006 of the file"),
    ],
    ids=range(13),
)
def test_what_is_wrong_with_a_json_array_is_named_with_its_line(tmp_path, content, expected):
    assert expected in problem(tmp_path / "data.json", content)


def test_text_comes_with_unix_line_ends_and_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert readers.text(path) == "one\ntwo\n"


@pytest.mark.parametrize("content", [b"one\ntwo \xff", b"one\ntwo \0"])
def test_a_byte_that_is_not_text_is_named_by_line_and_offset(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a.txt:2: .* at byte 8 of the file"):
        readers.text(path)


def test_a_file_that_cannot_be_read_is_an_error_of_the_environment():
    """Reading a process's own memory from its start fails for everyone, the superuser included."""
    with pytest.raises(UserError, match="cannot read /proc/self/mem") as caught:
        readers.text(Path("/proc/self/mem"))
    assert caught.value.code == 5


@pytest.mark.parametrize("shift", range(24))
def test_an_array_gives_the_same_rows_wherever_its_pieces_end(tmp_path, shift):
    """Each kind of value and each escape is cut at each of its characters by the end of the first piece."""
    tokens = ["1.5e+3", "-1E-2", "123456", "true", "null", r'"\ud83d\ude00"', r'"\\\""', '"\U0001f600ä"', '{"b":[]}']
    row = ",".join(f'"{i}":{token}' for i, token in enumerate(tokens))
    expected = {str(i): json.loads(token) for i, token in enumerate(tokens)}
    for pad in range(shift, 24 * 6, 24):
        start = "[" + " " * (readers.PIECE - pad - 1)
        rows, _ = read(tmp_path / "data.json", f"{start}{{{row}}},\n{{{row}}}]")
        assert [(r.line, r.values) for r in rows] == [(1, expected), (2, expected)], pad
        _, found = read(tmp_path / "data.json", f"{start}{tokens[shift % 6]}, 12345]", "skip")
        assert len(found) == 2 and "{...} is needed" in found[1], pad


def test_an_error_at_the_start_of_an_array_is_found_without_reading_the_rest(tmp_path):
    """The NUL at the end of the file would be reported if it had been read."""
    rest = b',\n{"a": "b"}' * 20_000 + b"\0]"
    assert "NUL character" in problem(tmp_path / "data.json", b'[{"a": "b"}' + rest)
    assert "json:1: invalid JSON (Expecting ':'" in problem(tmp_path / "data.json", b'[{"a" "b"}' + rest)
    assert "json:1: invalid JSON (Invalid control" in problem(tmp_path / "data.json", b'[{"a": "b}' + rest)


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
def test_memory_is_bounded_by_the_largest_row_not_by_the_file(tmp_path, kind, record_property):
    n_rows, pieces = pieces_of(kind)
    path = tmp_path / f"large.{kind}"
    with gzip.open(path, "wb", 1) if kind.endswith(".gz") else open(path, "wb") as file:
        for piece in pieces:
            file.write(piece.encode())
    tracemalloc.start()
    found = sum(row.values["answer"] == TEXT for row in readers.rows(path, BadRows("error")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    record_property("count", f"memory to read {LARGE / 1e6:.0f} MB of {kind}: {peak / 1e6:.2f} MB")
    assert found == n_rows
    assert peak < LARGE / 10


@pytest.mark.parametrize(
    "name, start, end",
    [
        ("a.csv", 'q,a\nx,"', "one line that is never closed,\n"),
        ("a.jsonl", '{"q": "x"}\n{"a": "', "never closed, "),
        ("a.json", '[{"q": "x"},\n{"a": "', "never closed, "),
    ],
)
def test_a_quote_that_is_never_closed_does_not_draw_a_large_file_into_memory(tmp_path, monkeypatch, name, start, end):
    for module in (readers, text_files):  # 64 MiB take a second
        monkeypatch.setattr(module, "ROW_LIMIT", 1_000_000)
    (tmp_path / name).write_text(start + end * (LARGE // len(end)))
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"{name}:2: this row does not end within 1,000,000 bytes"):
        list(readers.rows(tmp_path / name, BadRows("skip")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < LARGE / 2, f"{peak:,} bytes"


def test_messages_stay_short_whatever_the_file_holds(csv, jsonl):
    long = "column " * 100_000
    for path, content in [
        (csv, long + "\n"), (csv, f"{long},{long}\n1,2\n"), (jsonl, f'{{"{long}": 1, "{long}": 2}}'),
        (jsonl, f'{{"{long}": "\\ud800"}}'), (jsonl, '{"a": 1' + "0" * 1000 + ".0}"),
    ]:  # fmt: skip
        assert len(problem(path, content)) < 700
