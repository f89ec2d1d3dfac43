"""A name that is not there is answered with the other place where it is."""

from conftest import ROOT

from gpt.files import paths


def test_a_name_that_exists_at_the_project_is_named_for_who_is_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert paths.elsewhere(tmp_path / "gpt" / "sample.csv") == f"did you mean {ROOT}/gpt/sample.csv?"
    assert paths.elsewhere(tmp_path / "gpt" / "*.csv") == f"did you mean {ROOT}/gpt/*.csv?"
    assert paths.elsewhere(tmp_path / "nowhere.csv") == ""


def test_a_name_that_exists_where_the_user_is_is_named_for_a_path_of_the_project(tmp_path, monkeypatch):
    (tmp_path / "a (1).csv").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert paths.elsewhere(ROOT / "a (1).csv") == f"did you mean {tmp_path}/a (1).csv?"


def test_brackets_in_the_name_of_a_folder_are_no_pattern(tmp_path):
    (tmp_path / "[old]").mkdir()
    (tmp_path / "[old]" / "a.txt").write_text("x")
    assert paths.exists(tmp_path / "[old]" / "*.txt") and not paths.exists(tmp_path / "[old]" / "*.csv")
