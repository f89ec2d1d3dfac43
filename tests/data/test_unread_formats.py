"""A file of a format that is not read is named, with what to do."""

import bz2
import gzip
import io
import lzma
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest

from gpt.data import rows, text_files, unread_formats
from gpt.errors import UserError


def archive(name: str = "data.csv") -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr(name, "<a/>")
    return content.getvalue()


def tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as file:
        file.addfile(tarfile.TarInfo("data.csv"))
    return content.getvalue()


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.xlsx", archive("xl/workbook.xml"), "a.xlsx is a spreadsheet; save it as CSV"),
        ("a.csv", archive(), "a.csv is a zip archive; unpack it"),
        ("a.csv.zip", archive(), "a.csv.zip is a zip archive; unpack it"),
        ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(100), "a.xls is a spreadsheet; save it as CSV"),
        ("a.csv", archive("[Content_Types].xml"), "a.csv is a file of Microsoft Office; save it as CSV"),
        ("a.csv", archive("docProps/app.xml"), "a.csv is a file of Microsoft Office; save it as CSV"),
        ("a.tar", tar(), "a.tar is a tar archive; unpack it"),
        ("a.tgz", gzip.compress(tar()), "a.tgz is a tar archive; unpack it"),
        ("data.arrow", b"\xff\xff\xff\xff\x10\1\0\0", "data.arrow is an Arrow stream, as datasets saves; convert it"),
        ("a.docx", archive(), "a.docx is a document, not plain text; save it as plain text"),
        ("a.csv.bz2", bz2.compress(b"q\nx\n"), "compressed with bzip2; decompress it with bunzip2"),
        ("a.json.xz", lzma.compress(b"[{}]"), "compressed with xz; decompress it with unxz"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(9), "compressed with zstd; decompress it with unzstd"),
        ("a.pkl", pickle.dumps([1]), "is a pickle, which is never opened; convert it"),
        ("a.db", b"SQLite format 3\0" + bytes(90), "is an SQLite database; convert it"),
        ("a.pdf", b"%PDF-1.7\n", "is a PDF document; save it as plain text"),
        ("a.csv", b"<!DOCTYPE html>\n<html>", "is a web page; download the file itself"),
        ("a.csv", b"\r\n\r\n  <!DOCTYPE html>\n<html>", "is a web page; download the file itself"),
        ("a.csv", b'\n<HTML lang="en">', "is a web page; download the file itself"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid ", "is a pointer of Git LFS"),
        ("a.csv", b"PAR1" + bytes(90), "is a Parquet file; give it a name that ends in .parquet"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # archives have the time in them
)
def test_what_is_no_text_is_named_by_its_content_wherever_text_is_read(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        list(rows.read(tmp_path / name, rows.BadRows("skip")))
    assert caught.value.code == 2
    with pytest.raises(UserError, match=expected):
        text_files.read_text(tmp_path / name)


@pytest.mark.parametrize("name", ["a.xml", "a.YAML", "a.html"])
def test_text_without_rows_is_named_by_its_name(tmp_path, name):
    (tmp_path / name).write_text("question: q\n")
    with pytest.raises(UserError, match="which is not read; convert it to Parquet, JSON Lines or CSV"):
        list(rows.read(tmp_path / name, rows.BadRows("skip")))


@pytest.mark.parametrize("start", [b"question,answer\n", b'{"a": 1}', b"[{}]", b"<a>", "\u00e9t\u00e9".encode(), b""])
def test_the_beginning_of_a_text_is_no_signature(start):
    unread_formats.refuse(Path("a.xlsx"), start)
