"""Raw data comes from the file that was named, else from the hub, else from nowhere: nothing takes its place."""

import json
import logging

import pytest
from conftest import data_config

from gpt.data import sources
from gpt.data.sources import Source
from gpt.errors import UserError


def find(root, **config):
    return sources.find(data_config(**config), root)


def problem(root, **config):
    with pytest.raises(UserError) as caught:
        find(root, **config)
    return str(caught.value), caught.value.code


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """A hub that nobody answers for, and an empty cache."""
    import datasets

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_typed_path_is_binding_unless_the_run_has_a_checkpoint_to_go_on_from(tmp_path):
    typed, run = ["data.path=x.csv"], tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    assert not sources.path_is_typed(["data=medquad"], run_dir=None)
    assert sources.path_is_typed(typed, run_dir=None) and sources.path_is_typed(typed, str(run))
    (run / "checkpoints" / "step_00000010").mkdir()
    assert not sources.path_is_typed(typed, str(run))


def test_paths_begin_at_the_root_and_a_home_is_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.csv").write_text("x")
    for path in ("a.csv", "~/a.csv", str(tmp_path / "a.csv")):
        assert find(tmp_path, path=path).files == [tmp_path / "a.csv"]


def test_the_identity_of_a_source_has_no_absolute_path(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    (file,) = find(tmp_path, path="a.csv").identity()
    assert file["file"] == "a.csv" and file["bytes"] == 1
    assert file["sha256"] == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"


def test_texts_are_a_file_a_folder_or_a_pattern_in_sorted_order(tmp_path):
    for name in ("b.txt", "a.txt", "more/c.txt", "notes.md"):
        (tmp_path / "books" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / name).write_text(name)

    def names(path):
        return [file["file"] for file in find(tmp_path, kind="text", path=path).identity()]

    assert names("books/a.txt") == ["a.txt"]
    assert names("books") == ["a.txt", "b.txt", "more/c.txt"]
    assert names("books/*.txt") == ["a.txt", "b.txt"]
    assert names("books/*.md") == ["notes.md"]


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"path": None}, "data=test needs a file; data.path=<file> says which one"),
        ({"path": None, "kind": "text"}, "data.path=<file> says which one"),
        ({"path": "gone.csv"}, "/gone.csv does not exist (data.path)"),
        ({"path": "gone.txt", "kind": "text"}, "no text file at "),
        ({"path": "*.txt", "kind": "text"}, "no text file at "),
        ({"path": "folder", "kind": "text"}, "no text file at "),
        ({"path": "folder"}, "/folder is a folder (data.path); a file is needed"),
        ({"path": "folder", "hub": "lavita/MedQuAD"}, "/folder is a folder"),
        ({"path": "/dev/null"}, "/dev/null is not an ordinary file"),
    ],
)
def test_a_path_that_leads_nowhere_is_an_error_that_names_it(tmp_path, config, expected):
    (tmp_path / "folder").mkdir()
    text, code = problem(tmp_path, **config)
    assert expected in text and code == 2


def test_an_impossible_name_is_one_line_too(tmp_path):
    assert problem(tmp_path, path="x" * 5000)[1] in (2, 5)


def test_a_missing_file_leads_to_the_hub_with_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert find(tmp_path, path="medquad.csv", hub="lavita/MedQuAD").hub == "lavita/MedQuAD"
    assert f"{tmp_path}/medquad.csv does not exist; trying the hub: lavita/MedQuAD" in caplog.text


def test_without_a_network_the_error_says_where_to_put_the_file(tmp_path, no_network):
    with pytest.raises(UserError) as caught:
        sources.hub_rows(Source(hub="lavita/MedQuAD", wanted=tmp_path / "medquad.csv"))
    assert caught.value.code == 5
    text = str(caught.value)
    assert "lavita/MedQuAD cannot be had: http://127.0.0.1:9: [Errno 111] Connection refused" in text
    assert f"put the file at {tmp_path}/medquad.csv (data.path), and data=sample needs nothing" in text


def test_what_could_not_be_had_once_is_asked_for_again(tmp_path, no_network):
    import huggingface_hub

    with pytest.raises(UserError):
        sources.hub_rows(Source(hub="lavita/MedQuAD"))
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("credentials", ["user:s3cret", "s3cret", "user:s3cret@t"])
def test_a_password_in_the_hubs_address_is_not_shown(tmp_path, no_network, monkeypatch, credentials):
    monkeypatch.setenv("HF_ENDPOINT", f"http://{credentials}@127.0.0.1:9/hub")
    with pytest.raises(UserError) as caught:
        sources.hub_rows(Source(hub="lavita/MedQuAD", wanted=tmp_path / "medquad.csv"))
    assert "http://127.0.0.1:9/hub: [Errno 111] Connection refused" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_rows_of_the_hub_keep_the_publishers_validation_split(tmp_path, no_network):
    """A folder in the hub's layout is read by the same library in the same way."""
    folder = tmp_path / "HelpSteer"
    folder.mkdir()
    for split, n in (("train", 3), ("validation", 2)):
        lines = [json.dumps({"prompt": f"{split} {i}", "response": "r", "helpfulness": i}) + "\n" for i in range(n)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    revision, rows = sources.hub_rows(Source(hub=str(folder)))
    found = [(row.line, row.split, row.values) for row in rows]
    assert revision is None
    assert found[0] == (1, None, {"prompt": "train 0", "response": "r", "helpfulness": 0})
    assert [(line, split) for line, split, _ in found] == [(1, None), (2, None), (3, None), (1, "val"), (2, "val")]
