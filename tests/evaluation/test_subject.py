"""What is evaluated: its weights, its run, and the place of its results."""

import json
from types import SimpleNamespace

import pytest
import torch
from made_run import make, settings

from gpt.errors import UserError
from gpt.evaluation import subject
from gpt.files.atomic import sha256
from gpt.runs import model_file

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make(tmp_path_factory.mktemp("subject"), steps=(3, 6))


def load(path):
    return subject.load(str(path), settings("loss"), CPU)


def test_a_run_its_checkpoint_and_its_last_model_lead_to_the_run_and_its_data(run_dir):
    best = load(run_dir)
    assert (best.step, best.run, best.folder) == (6, run_dir, run_dir / "evaluations")
    weights = run_dir / "checkpoints" / "step_00000006" / "model.safetensors"
    assert best.sha256 == {"model.safetensors": sha256(weights)}
    first = load(run_dir / "checkpoints" / "step_00000003")
    assert (first.step, first.run) == (3, run_dir) and first.sha256 != best.sha256
    assert first.settings["data"]["fingerprint"] == best.settings["data"]["fingerprint"]
    from gpt.runs.checkpoint import read_manifest

    identity = read_manifest(run_dir / "checkpoints" / "step_00000006").identity
    model_file.save_model(run_dir / "last_model.pt", best.model, identity, 6)
    last = load(run_dir / "last_model.pt")
    assert (last.run, last.template) == (run_dir, "plain")
    assert last.sha256 == {"last_model.pt": sha256(run_dir / "last_model.pt")}


def test_weights_from_elsewhere_have_no_run_and_no_data(run_dir, tmp_path):
    (tmp_path / "mine.pt").write_bytes((run_dir / "last_model.pt").read_bytes())
    other = load(tmp_path / "mine.pt")
    assert (other.run, other.settings, other.origin) == (None, {}, None)
    assert other.folder == subject.ELSEWHERE / "mine.pt"


def test_one_of_checkpoint_and_compare_is_needed_and_a_sweep_stands_for_its_jobs(run_dir, tmp_path):
    for change in ({}, {"checkpoint": "a", "compare": ["b"]}):
        with pytest.raises(UserError, match="exactly one of checkpoint and compare"):
            subject.names(settings("loss", **change))
    for name in ("b", "a", "unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.json").write_text(json.dumps({}))
        if name != "unfinished":
            (tmp_path / name / "checkpoints" / "step_00000001").mkdir(parents=True)
    found = subject.names(settings("loss", compare=[str(tmp_path), "gpt2"]))
    assert found == [str(tmp_path / "a"), str(tmp_path / "b"), "gpt2"]


def test_the_same_model_is_compared_once_however_it_is_written_and_not_by_all_checkpoints(run_dir, tmp_path):
    (tmp_path / "link").symlink_to(run_dir)
    same = [str(run_dir), "gpt2", f"{run_dir}/", str(tmp_path / "link"), "gpt2"]
    assert subject.names(settings("loss", compare=same)) == [str(run_dir), "gpt2"]
    with pytest.raises(UserError, match="checkpoints=all is of one run"):
        subject.names(settings("loss", compare=same, checkpoints="all"))


def test_all_checkpoints_of_a_run_are_named_in_order_and_of_anything_else_there_are_none(run_dir):
    every = subject.names(settings("loss", checkpoint=str(run_dir), checkpoints="all"))
    assert [name[-1] for name in every] == ["3", "6"]
    with pytest.raises(UserError, match="no checkpoints of a run"):
        subject.names(settings("loss", checkpoint="gpt2", checkpoints="all"))


def test_the_weights_that_a_run_began_with_are_known():
    of = subject.Subject.origin.fget
    assert of(SimpleNamespace(settings={"init": {"from": "gpt2"}})) == "gpt2"
    assert of(SimpleNamespace(settings={"init": {"from": None}})) is None
    assert of(SimpleNamespace(settings={})) is None
