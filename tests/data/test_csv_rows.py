"""A CSV file gives its cells as they stand, or its line that is wrong."""

import pytest
from test_rows import problem, read


@pytest.fixture
def csv(tmp_path):
    return tmp_path / "medquad.csv"


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
