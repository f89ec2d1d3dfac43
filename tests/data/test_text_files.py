"""Bytes become text by rows or by pieces, and what is no text is named by its line and byte."""

import gzip
import hashlib
from pathlib import Path

import pytest

from gpt.data import text_files
from gpt.data.text_files import BadLine, measure, open_text, portions, read_text, shorten
from gpt.errors import UserError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.txt"


def test_rows_keep_their_line_ends_and_count_their_quotes(path):
    path.write_bytes(b'\xef\xbb\xbfa "b\r\n c"\n"\n\nd')
    with open_text(path) as file:
        rows = [(file.row(), file.first, file.quotes) for _ in range(6)]
    assert rows == [('a "b\r\n', 1, 1), (' c"\n', 2, 1), ('"\n', 3, 1), ("\n", 4, 0), ("d", 5, 0), ("", 5, 0)]


def test_with_multiline_a_row_ends_where_all_quotes_are_closed(path):
    path.write_bytes(b'a "b\n\nc"\nd\n"e\n')
    with open_text(path) as file:
        assert [(file.row(multiline=True), file.first) for _ in range(4)] == [
            ('a "b\n\nc"\n', 1), ("d\n", 4), ('"e\n', 5), ("", 6)
        ]  # fmt: skip


@pytest.mark.parametrize("size", [4, 5, 6, 7, 100])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_pieces_may_end_inside_a_character(path, size, mark):
    text = "aé漢\U0001f600\n" * 50
    path.write_bytes(gzip.compress(mark + text.encode()))
    with open_text(path) as file:
        pieces = list(iter(lambda: file.read(size), ""))
    assert "".join(pieces) == text and len(pieces) >= len(text.encode()) // size


@pytest.mark.parametrize("size", [4, 5, 6, 7, 100, -1])
@pytest.mark.parametrize("end", [b"\xff tail", b"\0 tail", b"\xe6\xbc", b"\xed\xa0\x80"])
def test_the_line_and_the_byte_of_what_is_no_text_do_not_depend_on_the_pieces(path, size, end):
    start = "aé漢\n".encode() * 3
    path.write_bytes(start + b"b" + end)
    with pytest.raises(UserError, match=f"a.txt:4: .* at byte {len(start) + 1} of the file"), open_text(path) as file:
        while file.read(size):
            pass


def test_rows_go_on_after_a_line_that_is_no_text(path):
    path.write_bytes(b"a\n\xff\nb\0\nc\n")
    found = []
    with open_text(path) as file:
        for _ in range(4):
            try:
                found.append(file.row())
            except BadLine as error:
                found.append((error.line, str(error)))
    assert found == [
        "a\n", (2, "not UTF-8 at byte 2 of the file: 0xff, in Windows-1252 ÿ"),
        (3, "NUL character at byte 5 of the file"), "c\n",
    ]  # fmt: skip


@pytest.mark.parametrize("where", [10, 12, 30, 60])
def test_a_damaged_gzip_file_says_so(path, where):
    packed = bytearray(gzip.compress(bytes(range(1, 120)) * 3))
    packed[where] ^= 8
    path.write_bytes(packed)
    with pytest.raises(UserError, match=r"a.txt is damaged: .*; get the file again"), open_text(path) as file:
        file.file.read()


@pytest.mark.parametrize("size", [4, 5, 6, 7, 100])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_characters_have_unix_line_ends_wherever_pieces_end(path, monkeypatch, size, pack):
    monkeypatch.setattr(text_files, "PIECE", size)
    content = "\ufeffa\r\né\r\r\n漢\r\n\r\n\U0001f600\rb\n\r".encode() * 9
    path.write_bytes(pack(content))
    expected = content[3:].decode().replace("\r\n", "\n")
    with open_text(path) as file:
        assert "".join(file.characters()) == expected
    assert measure(path) == (len(expected), 0, 0, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", gzip.compress(b"") * 2], ids=["empty", "mark", "gzip"])
def test_a_file_without_characters_has_none(path, content):
    path.write_bytes(content)
    assert measure(path) == (0, 0, 0, hashlib.sha256(content).hexdigest())
    assert list(portions(path, [], measure(path).sha256)) == []


@pytest.mark.parametrize("size", [4, 10, 1000])
@pytest.mark.parametrize("pack", [bytes, lambda content: gzip.compress(content) + b"\0" * 1000])
def test_portions_are_all_of_a_file(path, monkeypatch, size, pack):
    monkeypatch.setattr(text_files, "PIECE", size)
    path.write_bytes(pack("aé漢\r\n".encode() * 50))
    n_chars, _, _, sha256 = measure(path)
    for sizes in ([n_chars], [1, n_chars - 1], [70, 60, 70], [4] * 50):
        assert ["".join(p) for p in portions(path, sizes, sha256)] == [
            ("aé漢\n" * 50)[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))
        ]


@pytest.mark.parametrize("change", [lambda c: c + b"x", lambda c: c[:-1], lambda c: b"b" + c[1:], lambda c: b""])
def test_a_file_that_changes_between_two_readings_is_refused(path, change):
    path.write_bytes(b"a" * 200_000)
    n_chars, _, _, sha256 = measure(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=r"a.txt was changed while it was read; start again"):
        for portion in portions(path, [n_chars], sha256):
            list(portion)


def test_a_name_cannot_reach_the_terminal_unescaped(tmp_path):
    with pytest.raises(UserError) as caught, open_text(tmp_path / "\x1b[31m\n\u202e"):
        pass
    assert str(caught.value).startswith("cannot read /") and r"/\x1b[31m\n\u202e (No such file" in str(caught.value)


def test_long_texts_are_shortened_for_messages():
    assert (shorten("a" * 40), shorten("a" * 41), shorten("abc", 2)) == ("a" * 40, "a" * 40 + "...", "ab...")


def test_text_comes_with_unix_line_ends_and_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert read_text(path) == "one\ntwo\n"


@pytest.mark.parametrize("content", [b"one\ntwo \xff", b"one\ntwo \0"])
def test_a_byte_that_is_not_text_is_named_by_line_and_offset(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a.txt:2: .* at byte 8 of the file"):
        read_text(path)


def test_a_file_that_cannot_be_read_is_an_error_of_the_environment():
    """Reading a process's own memory from its start fails for everyone, the superuser included."""
    with pytest.raises(UserError, match="cannot read /proc/self/mem") as caught:
        read_text(Path("/proc/self/mem"))
    assert caught.value.code == 5


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 100])
def test_separators_are_found_wherever_pieces_end_and_lose_the_line_ends_around_them(path, monkeypatch, size):
    monkeypatch.setattr(text_files, "PIECE", size)
    path.write_bytes(b"<|e|>one\r\ntwo\n\n<|e|>\r\n\nthree<|e|><|e|>\n\n<|e|>f<|e\n")
    with open_text(path) as file:
        documents = ["".join(document) for document in text_files.documents(file.characters("<|e|>"))]
    assert [document for document in documents if document] == ["one\ntwo", "three", "f<|e\n"]
    with open_text(path) as file:
        assert "".join(file.characters()).count("<|e|>") == 5


@pytest.mark.parametrize("size", [1, 5, 13, 100])
def test_marks_of_the_end_of_text_are_counted_wherever_pieces_end(path, monkeypatch, size):
    monkeypatch.setattr(text_files, "PIECE", size)
    path.write_text("a<|endoftext|>\n<|endoftext|><|endoftext|>b<|endoftext")
    assert measure(path).n_marks == 3
    assert measure(path, separator="<|endoftext|>")[1:3] == (0, 3)


@pytest.mark.parametrize("size", [4, 5, 100])
def test_a_text_in_another_encoding_is_read_as_what_it_says(path, monkeypatch, size):
    monkeypatch.setattr(text_files, "PIECE", size)
    for encoding in ("latin-1", "cp1252", "utf-16", "utf-16-le", "utf-8", "shift_jis"):
        text = "1 2\n\u5b57\u6f22\n" if encoding == "shift_jis" else "\u00e9t\u00e9\n1"
        path.write_bytes(text.encode(encoding))
        with open_text(path, encoding=encoding) as file:
            assert "".join(file.characters()) == text
    path.write_bytes("\u00e9t\u00e9".encode("utf-8-sig"))
    with (
        pytest.raises(UserError, match=r"a.txt begins with the mark of UTF-8; leave out data.encoding"),
        open_text(path, encoding="cp1252"),
    ):
        raise AssertionError("it has been opened")
    path.write_bytes(b"a\nb\x81")
    with (
        pytest.raises(UserError, match=r"a.txt:2: a byte that is not in cp1252"),
        open_text(path, None, "cp1252") as file,
    ):
        list(file.characters())
