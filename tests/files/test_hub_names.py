"""A name of weights is one of the hub only where it cannot be a path."""

import pytest

from gpt.files.hub_names import is_repository


@pytest.mark.parametrize("name", ["gpt2", "gpt2-large", "openai-community/gpt2", "o/n.m"])
def test_names_of_the_hub(name, tmp_path):
    assert is_repository(name, tmp_path)


@pytest.mark.parametrize("name", ["./gpt2", "/a/b", "~/x", "a/b.pth", "a/b/c", "gpt3", "there/model", "a/", "x.pt"])
def test_paths(name, tmp_path):
    (tmp_path / "there").mkdir()
    assert not is_repository(name, tmp_path)
