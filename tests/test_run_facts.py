"""The id of a run, its name, and its samples as a page: what W&B is told; test_track.py reads it back from W&B."""

import json

import pytest
from test_track import config

from gpt import run_facts

IDS = ["../../x", "a/b", "a b", "a\n", "\x1b[31m", "", "x" * 65, "\u202e", 5, None, True, ["a"], {"a": 1}]


@pytest.mark.parametrize("text", [json.dumps({"id": bad}) for bad in IDS] + ["", "{", "[]", '"id"', '{"id": "a'])
def test_a_run_directory_of_somebody_else_cannot_choose_a_wandb_id_that_is_none(tmp_path, text):
    (tmp_path / "wandb.json").write_text(text)
    ids = {run_facts.of(config(), tmp_path, resumed=True)["id"] for _ in range(2)}
    assert len(ids) == 2 and all(len(new) == 8 and int(new, 16) >= 0 for new in ids)
    (tmp_path / "wandb.json").write_text('{"id": "good1234"}')
    assert run_facts.of(config(), tmp_path, resumed=True)["id"] == "good1234"
