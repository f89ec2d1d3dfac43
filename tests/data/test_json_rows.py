"""JSON Lines and JSON arrays give their objects, or the line that is wrong."""

import json

import pytest
from test_rows import problem, read


@pytest.fixture
def jsonl(tmp_path):
    return tmp_path / "data.jsonl"


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


def test_the_encoding_to_set_is_named_for_json_lines_too(jsonl):
    assert "set data.encoding=windows-1252, or leave such" in problem(jsonl, b'{"a": "b"}\n{"a": "caf\xe9"}\n')


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
