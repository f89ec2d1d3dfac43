"""What the questions of prepared data are about is recorded beside their tokens."""

import pytest

from gpt.data import topics
from gpt.errors import UserError

TOPICS = {"train": [("Croup", "NIH"), ("", "")], "test": [("Gout", "")]}
META = {"files": {topics.FILE: {}}, "splits": {"train": {"documents": 2}, "test": {"documents": 1}}}


def test_they_are_read_as_they_were_written(tmp_path):
    topics.write(tmp_path, TOPICS)
    assert topics.read(tmp_path, META, "train") == TOPICS["train"] and topics.read(tmp_path, META, "test") == [
        ("Gout", "")
    ]


def test_where_none_is_known_there_is_no_file_and_of_older_data_nothing_is_known(tmp_path):
    topics.write(tmp_path, {"train": [("", "")], "test": []})
    assert list(tmp_path.iterdir()) == []
    assert topics.read(tmp_path, META | {"files": {}}, "train") == []


@pytest.mark.parametrize("content", ["[]", "{", '{"train": [["a", "b"]]}', '{"train": [["a"], ["b"]]}', '{"train": 7}'])
def test_a_damaged_file_is_an_error_in_one_line(tmp_path, content):
    (tmp_path / topics.FILE).write_text(content)
    with pytest.raises(UserError, match=r"topics\.json damaged"):
        topics.read(tmp_path, META, "train")
