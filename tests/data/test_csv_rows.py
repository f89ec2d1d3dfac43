"""A CSV file gives its cells as they stand, or its line that is wrong."""

import csv as csv_module
import io

import pytest
from test_rows import problem, read

from gpt.data.columns import Wanted
from gpt.data.rows import BadRows
from gpt.data.rows import read as read_rows
from gpt.errors import UserError


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


QA = [("What is Croup ?", "A cough; it barks, often."), ("Why ?", "one\ttwo|three")]


def written(delimiter, *names, rows=QA, quoting=0):
    out = io.StringIO()
    csv_module.writer(out, delimiter=delimiter, quoting=quoting).writerows([names or ("question", "answer"), *rows])
    return out.getvalue()


def qa(path, content, policy="error", **how):
    """The (question, answer) of each row, and what was left out."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    bad = BadRows(policy)
    rows = list(read_rows(path, bad, Wanted("qa", **how)))
    return [(row.values["question"], row.values["answer"]) for row in rows], bad.left_out


@pytest.mark.parametrize("delimiter, word", [(";", "semicolon"), ("\t", "tab"), ("|", "pipe")])
@pytest.mark.parametrize("quoting", [0, 1])
def test_another_delimiter_is_taken_where_the_header_and_every_row_have_it_and_that_is_said(
    csv, lines, delimiter, word, quoting
):
    assert qa(csv, written(delimiter, quoting=quoting))[0] == QA
    assert lines() == [f"medquad.csv is read with the delimiter {word}, which its header and all its rows have"]


def test_a_first_line_and_a_name_can_say_the_delimiter(csv, lines):
    assert qa(csv, "sep=;\r\n" + written(";"))[0] == QA
    assert qa(csv.with_suffix(".TSV"), written("\t"))[0] == QA
    assert lines() == []


def test_where_a_row_has_another_number_of_fields_the_delimiter_must_be_set(csv):
    content = written(";") + "one;two;three\n"
    with pytest.raises(UserError, match=r"csv:4: 3 fields, the header has 2, with the delimiter semicolon") as caught:
        qa(csv, content, "skip")
    assert "set data.delimiter=semicolon" in str(caught.value)
    for typed in ("semicolon", ";"):
        assert qa(csv, content, "skip", delimiter=typed) == (QA, ["medquad.csv:4: 3 fields, the header has 2"])


def test_a_table_of_markdown_is_not_taken_for_fields_between_pipes(csv):
    with pytest.raises(UserError, match=r"csv:2: a table of Markdown; save it as CSV"):
        qa(csv, "| question | answer |\n|:---|---:|\n| q | a |\n")


def test_a_header_of_unknown_names_is_named_with_the_keys_for_names_and_delimiter(csv):
    content = written(";", "Frage", "Antwort")
    with pytest.raises(
        UserError,
        match=r"no column question, no column answer among Frage;Antwort; .*n=.* data.columns.answer=.*semicolon",
    ):
        qa(csv, content)
    chosen = {"question": "Frage", "answer": "Antwort"}
    rows = list(read_rows(csv, BadRows("error"), Wanted("qa", chosen)))
    assert [tuple(row.values.values()) for row in rows] == QA


def test_lines_that_end_in_carriage_returns_are_named_as_such(csv):
    with pytest.raises(UserError, match=r"csv:1: its lines end in carriage returns; save it as CSV"):
        qa(csv, "question,answer\rq,a\r")


def test_columns_without_a_name_or_doubled_ones_are_kept_apart_unless_they_are_needed(csv):
    rows = [("1", *row, "n", "m", "") for row in QA]
    content = written(",", "", "question", "answer", "notes", "notes", "", rows=rows) + "2,q,a,n,m\n"
    assert qa(csv, content)[0] == [*QA, ("q", "a")]
    names = list(read(csv, content.replace("notes,notes", "notes,more"))[0][0].values)
    assert names == ["column 1 without a name", "question", "answer", "notes", "more", "column 6 without a name"]
    with pytest.raises(UserError, match="csv:1: column 'Answer' occurs twice in the header"):
        qa(csv, "question,answer,Answer\nq,a,b\n")


def test_windows_1252_is_named_with_the_key_that_reads_it_and_skip_counts_each_row(csv):
    content = 'question,answer\nété,"a\nb"\nq,"ö\nü"\nx,y\n'.encode("windows-1252")
    with pytest.raises(
        UserError, match=r"csv:2: not UTF-8 at byte 16 .*: 0xe9, in Windows-1252 é; .*windows-1252"
    ) as caught:
        qa(csv, content)
    assert "data.on_bad_row=skip" in str(caught.value)
    good, left_out = qa(csv, content, "skip")
    assert good == [("x", "y")] and [line.split(" ")[0] for line in left_out] == ["medquad.csv:2:", "medquad.csv:4:"]
    assert qa(csv, content, encoding="cp1252")[0] == [("été", "a\nb"), ("q", "ö\nü"), ("x", "y")]


def test_a_file_that_is_utf8_but_for_one_byte_is_not_called_windows_1252(csv):
    """With that encoding all of its other letters would be read wrongly, and nobody would notice."""
    for content in (b"question,answer\nq,\xc3\xa9\nx,\xe9\n", b"question,answer\nq,a\nx,\xc3\xa9\xe9\n"):
        with pytest.raises(UserError, match="csv:3: not UTF-8 at byte ") as caught:
            qa(csv, content)
        assert "1252" not in str(caught.value)


def test_a_byte_that_an_encoding_does_not_have_is_a_bad_row(csv):
    content = b"question,answer\nq,\x81\nx,\xe9\n"
    assert qa(csv, content, "skip", encoding="cp1252") == (
        [("x", "é")], ["medquad.csv:2: a byte that is not in cp1252"]
    )  # fmt: skip


def test_what_excel_calls_unicode_text_is_read_with_its_encoding(csv):
    assert qa(csv, written("\t").encode("utf-16"), encoding="utf-16")[0] == QA


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
    "content", [b'q,a\nx,"never closed\ny,z\n', b'q,a\nx,"two\nlines"y\nz,z\n', b'q,a\nx,"\xff\n"y\n']
)
def test_a_bad_row_whose_end_cannot_be_known_is_never_skipped(csv, content):
    """The rows after it might be read shifted, and nobody would notice."""
    assert "csv:2:" in problem(csv, content, "skip")
