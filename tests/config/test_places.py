"""Paths that are typed begin where the user is, those in YAML at the project; one place has one name."""

import copy

import pytest
from conftest import ROOT

from gpt.config import places


@pytest.mark.parametrize(
    "typed", ["gpt/sample.csv", "./gpt/sample.csv", "gpt/../gpt/sample.csv", f"{ROOT}/gpt/sample.csv"]
)
def test_a_place_inside_the_project_has_one_name_whatever_way_it_is_written(typed):
    assert places.stored("data.path", typed) == "gpt/sample.csv"
    assert places.absolute("data.path", typed) == f"{ROOT}/gpt/sample.csv"


def test_a_typed_path_begins_where_the_user_is(tmp_path):
    assert places.absolute("out_dir", "runs/a", tmp_path) == f"{tmp_path}/runs/a"
    assert places.stored("out_dir", f"{tmp_path}/runs/a") == f"{tmp_path}/runs/a"


def test_dots_after_a_link_lead_where_the_file_system_says(tmp_path):
    (tmp_path / "far" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "below")
    assert places.absolute("data.path", "link/../x.csv", tmp_path) == f"{tmp_path}/far/x.csv"


def test_names_of_the_hub_stay_and_paths_of_weights_do_not(tmp_path):
    (tmp_path / "runs").mkdir()
    for name in ("gpt2", "gpt2-xl", "openai/model"):
        assert places.absolute("init.from", name, tmp_path) == places.stored("init.from", name) == name
    for name in ("runs/mine", "models/x.pth", "gpt3", "a/b/c", "owner/name/"):
        assert places.absolute("init.from", name, tmp_path) == f"{tmp_path}/{name}".rstrip("/")
    assert places.stored("init.from", f"{ROOT}/gpt2") == "./gpt2" == places.stored("init.from", "./gpt2")


def test_values_under_the_keys_of_paths_are_replaced_and_interpolations_and_what_names_no_file_are_not():
    values = {"data": {"path": "a", "hub": "a"}, "out_dir": "${oc.env:X}/a", "init": {"from": None}, "prompts": "\0"}
    changed = places.with_paths(copy.deepcopy(values), lambda key, value: f"{key}:{value}")
    assert changed == values | {"data": {"path": "data.path:a", "hub": "a"}}
    assert places.with_paths({"init": {"from": "\ud800"}}, places.stored) == {"init": {"from": "\ud800"}}
    assert places.with_paths({"init": None, "data": 3}, places.stored) == {"init": None, "data": 3}
