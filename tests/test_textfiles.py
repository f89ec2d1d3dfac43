"""Bytes become text by rows or by pieces, and what is no text is named by its line and byte."""

import gzip

import pytest

from gpt.errors import UserError
from gpt.textfiles import BadLine, open_text, shorten


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
        "a\n", (2, "not UTF-8 at byte 2 of the file: 0xff"), (3, "NUL character at byte 5 of the file"), "c\n"
    ]  # fmt: skip


@pytest.mark.parametrize("where", [10, 12, 30, 60])
def test_a_damaged_gzip_file_says_so(path, where):
    packed = bytearray(gzip.compress(bytes(range(1, 120)) * 3))
    packed[where] ^= 8
    path.write_bytes(packed)
    with pytest.raises(UserError, match=r"a.txt is damaged: .*; get the file again"), open_text(path) as file:
        file.file.read()


def test_a_name_cannot_reach_the_terminal_unescaped(tmp_path):
    with pytest.raises(UserError) as caught, open_text(tmp_path / "\x1b[31m\n\u202e"):
        pass
    assert str(caught.value).startswith("cannot read /") and r"/\x1b[31m\n\u202e (No such file" in str(caught.value)


def test_long_texts_are_shortened_for_messages():
    assert (shorten("a" * 40), shorten("a" * 41), shorten("abc", 2)) == ("a" * 40, "a" * 40 + "...", "ab...")
