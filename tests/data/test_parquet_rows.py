"""A Parquet file gives its rows; what is none, or damaged, is one line."""

import pyarrow as pa
import pytest
from pyarrow import parquet

from gpt.data import rows
from gpt.errors import UserError

QA = [{"question": f"q{i}", "answer": None if i == 7 else f"a\n{i}"} for i in range(2_500)]


def read(path, policy="error"):
    bad = rows.BadRows(policy)
    return [(row.line, row.values) for row in rows.read(path, bad)], bad.left_out


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_rows_come_with_their_numbers(tmp_path, compression):
    parquet.write_table(pa.Table.from_pylist(QA), tmp_path / "a.parquet", compression=compression)
    assert read(tmp_path / "a.parquet")[0] == list(enumerate(QA, start=1))


def test_what_no_text_can_hold_is_a_bad_row(tmp_path):
    parquet.write_table(pa.table({"question": ["a", "b\0", "c"]}), tmp_path / "a.parquet")
    good, left_out = read(tmp_path / "a.parquet", "skip")
    assert [line for line, _ in good] == [1, 3] and left_out == ["a.parquet:2: 'question': NUL character"]


def test_what_is_no_parquet_file_is_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(QA), path)
    whole = path.read_bytes()
    for content in [b"", b"question,answer\nq,a\n", whole[:-100], whole[:2000] + b"x" * 4000 + whole[6000:]]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"damaged: .*; get the file again") as caught:
            read(path)
        assert caught.value.code == 2 and "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_file_without_rows_and_a_doubled_column_are_errors(tmp_path):
    parquet.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet has no rows"):
        read(tmp_path / "a.parquet")
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["q", "q"]), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="column q occurs twice"):
        read(tmp_path / "b.parquet")
