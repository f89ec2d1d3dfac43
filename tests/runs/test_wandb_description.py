"""The id of a run, its name, and its samples as a page: what W&B is told; test_run_log.py reads it back from W&B."""

import json
from pathlib import Path

import pytest
from test_run_log import config

from gpt.runs import wandb_description
from gpt.runs.wandb_description import describe_run

IDS = ["../../x", "a/b", "a b", "a\n", "\x1b[31m", "", "x" * 65, "\u202e", 5, None, True, ["a"], {"a": 1}]


@pytest.mark.parametrize("text", [json.dumps({"id": bad}) for bad in IDS] + ["", "{", "[]", '"id"', '{"id": "a'])
def test_a_run_directory_of_somebody_else_cannot_choose_a_wandb_id_that_is_none(tmp_path, text):
    (tmp_path / "wandb.json").write_text(text)
    ids = {describe_run(config(), tmp_path, resumed=True)["id"] for _ in range(2)}
    assert len(ids) == 2 and all(len(new) == 8 and int(new, 16) >= 0 for new in ids)
    (tmp_path / "wandb.json").write_text('{"id": "good1234"}')
    assert describe_run(config(), tmp_path, resumed=True)["id"] == "good1234"


@pytest.mark.parametrize(
    ("job", "name", "group"),
    [
        ('{"name": "optimizer.lr=0.1 seed=2"}', "optimizer.lr=0.1 seed=2", "lr_sweep"),
        ('{"name": "a\\u001b[31m"}', "a\\x1b[31m", "lr_sweep"),
        ('{"name": ""}', "model=mini optimizer.lr=0.1", "lr_sweep"),  # a sweep of one job
        ('{"name": 5}', "model=mini optimizer.lr=0.1", "lr_sweep"),
        ('{"name": "opt', "3f2a", None),  # damaged: as a run of its own
        (None, "3f2a", None),
    ],
)
def test_a_job_of_a_sweep_is_named_after_what_is_its_own(tmp_path, job, name, group):
    folder = tmp_path / "lr_sweep" / "3f2a"
    folder.mkdir(parents=True)
    if job is not None:
        (folder / "job.json").write_text(job)
    typed = ("model=mini", "optimizer.lr=0.1", "sweep.name=lr_sweep", "wandb.mode=offline", f"out_dir={folder}")
    alone = describe_run(config(overrides=typed), folder, resumed=True)  # hydra.mode=RUN: to go on with one job
    assert (alone["name"], alone["group"]) == (name, group)
    in_sweep = describe_run(config(sweep="lr_sweep", overrides=typed), folder, resumed=False)
    assert in_sweep["group"] == "lr_sweep"
    assert in_sweep["name"] == (name if group else "model=mini optimizer.lr=0.1")
    assert describe_run(config(sweep="x", overrides=typed, group="mine"), folder, resumed=False)["group"] == "mine"


def test_a_sweep_is_described_by_what_its_jobs_share_and_by_what_differs():
    configs = [{"model.n_layer": 2, "data.prompts": ["a"], "seed": seed, "model": "a"} for seed in (1, 2, 1)]
    about = wandb_description.describe_sweep(config().wandb, Path("sweep"), "name" * 50, configs)["config"]
    assert about["varied"] == {"seed": [1, 2]} and about["seed"] is None and about["data"] == {"prompts": ["a"]}
    assert wandb_description.describe_sweep(config().wandb, Path("sweep"), "empty", [])["config"]["varied"] == {}


def test_cells_are_what_json_has():
    rows = [[1, 2.5, None, True, "a\x1b"], [float("nan"), float("inf"), ["x"], {"a": 1}, Path("p")]]
    assert wandb_description.cells(rows) == [[1, 2.5, None, True, "a\\x1b"], [None, None, "['x']", "{'a': 1}", "p"]]
