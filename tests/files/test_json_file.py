"""A JSON object is read from a file of limited size, and nothing else."""

import os

import pytest

from gpt.files.json_file import read_object


def test_an_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, null]}')
    assert read_object(tmp_path / "a.json", 16) == {"a": [1, None]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[1]", "no object"),
        (b"[" * 10**5, "nested too deeply"),
        (b"{" + b" " * 10**6, "more than 1000"),
        (b"\xff", "utf"),
    ],
)
def test_anything_else_is_refused_with_the_reason(content, reason, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_object(tmp_path / "a.json", 1000 if reason.startswith("more") else 10**6)


def test_a_missing_file_is_an_oserror_and_a_pipe_is_not_waited_for(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "a.json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a file"):
        read_object(tmp_path / "pipe")
