"""Files that are there whole or not at all."""

import pytest

from gpt.files import atomic


def test_a_file_is_replaced_whole(tmp_path):
    atomic.write(tmp_path / "x", "a")
    atomic.write(tmp_path / "x", "b\ud800")
    assert (tmp_path / "x").read_text() == "b\\ud800"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_failure_leaves_the_old_file_and_no_temporary_one(tmp_path):
    atomic.write(tmp_path / "x", "a")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "full").touch()
    with pytest.raises(OSError):
        atomic.write(tmp_path / "folder", "a file cannot replace a folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x"]
