"""evaluate.py from its settings to its files, and as a command where the command line matters."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from hydra.core.hydra_config import HydraConfig
from made_run import make, settings
from omegaconf import OmegaConf
from test_launch import composed

import evaluate
from gpt.config import launch, value_errors
from gpt.config.schema import TrainConfig
from gpt.errors import Interrupted, UserError
from gpt.evaluation.kinds.answers import Evaluation
from gpt.files import directory


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make(tmp_path_factory.mktemp("evaluated"), steps=(3, 6))


@pytest.fixture
def copy(run_dir, tmp_path):
    """The run without results of other tests. Its data stays where it was prepared."""
    shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    return tmp_path / "run"


def files(run):
    return {path.name: path.read_bytes() for path in (run / "evaluations").iterdir() if path.name != ".lock"}


ALL = ("answers", "choice", "loss")


@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4"])
def test_results_of_fewer_bits_stand_beside_those_of_float32_and_are_near(name, copy):
    for precision in ("float32", name):
        evaluate.evaluate(settings("loss", checkpoint=str(copy), precision=precision))
    plain, own = (
        json.loads((copy / "evaluations" / f"loss_test_{part}step_00000006.json").read_text())
        for part in ("", f"{name}_")
    )
    assert "precision" not in plain["identity"] and own["identity"]["precision"] == name
    losses = [content["figures"]["model"]["bits per byte"]["value"] for content in (plain, own)]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.001 if name != "int4" else 0.05)


def test_results_of_each_question_are_on_disk_with_what_was_scored_and_are_the_same_bytes_each_time(copy, capsys):
    cfg = settings(*ALL, checkpoint=str(copy))
    evaluate.evaluate(cfg)
    printed = capsys.readouterr().out
    first = files(copy)
    assert first.keys() == {"README.md"} | {f"{k}_test_step_00000006.{end}" for k in ALL for end in ("json", "jsonl")}
    weights = copy / "checkpoints" / "step_00000006" / "model.safetensors"
    digest = json.loads(first["answers_test_step_00000006.json"])["identity"]["weights"]["model.safetensors"]
    assert digest == subprocess.run(["sha256sum", weights], capture_output=True, text=True).stdout.split()[0]
    assert printed.count(digest) == 3 and "ROUGE-L" in printed and "BM25 baseline" in printed
    rows = [json.loads(line) for line in first["answers_test_step_00000006.jsonl"].decode().splitlines()]
    assert len(rows) == 9 and all(row["reference"] and "answer" in row["systems"]["model"] for row in rows)
    assert b"BM25 baseline" in first["README.md"] and digest.encode() in first["README.md"]
    shutil.rmtree(copy / "evaluations")
    evaluate.evaluate(cfg)
    assert files(copy) == first


def test_each_kind_has_a_file_of_its_own_under_a_name_that_is_typed(copy):
    evaluate.evaluate(settings("choice", "loss", checkpoint=str(copy), name="mine"))
    assert files(copy).keys() == {"README.md"} | {
        f"{kind}_mine_step_00000006.{end}" for kind in ("choice", "loss") for end in ("json", "jsonl")
    }


def test_a_finished_evaluation_is_not_done_again_and_what_has_changed_since_is_named(copy, lines, logger):
    logger.propagate = True
    cfg = settings("loss", checkpoint=str(copy))
    evaluate.evaluate(cfg)
    evaluate.evaluate(cfg)
    assert any("is there already, for the same weights, questions and settings" in line for line in lines())
    evaluate.evaluate(settings("loss", checkpoint=str(copy), loss={"stride": 7}))
    assert any("is replaced: settings.stride was None, now 7" in line for line in lines())


def test_an_interrupted_evaluation_goes_on_where_it_was_and_ends_with_the_same_bytes(copy, monkeypatch):
    cfg = settings("answers", checkpoint=str(copy))
    evaluate.evaluate(cfg)
    expected = files(copy)
    shutil.rmtree(copy / "evaluations")
    compute, computed = Evaluation.compute, []

    def interrupted(self, task, units):
        if len(computed) == 2:
            raise Interrupted(signal.SIGINT)
        computed.append(units)
        return compute(self, task, units)

    monkeypatch.setattr(Evaluation, "compute", interrupted)
    with pytest.raises(Interrupted, match="2 of 3 batches of answers are kept; the same command goes on"):
        evaluate.evaluate(cfg)
    partial = copy / "evaluations" / "answers_test_step_00000006.partial.jsonl"
    partial.write_bytes(partial.read_bytes()[:-20])  # as a kill in the middle of a line leaves it
    computed.clear()
    evaluate.evaluate(cfg)  # of 3 batches the first is kept
    assert len(computed) == 2 and files(copy) == expected


def test_a_questions_file_that_has_changed_is_named_and_scored_anew(copy, tmp_path, lines, logger):
    logger.propagate = True
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"What is {i} ?", "answer": f"Number {i}"} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = settings("answers", checkpoint=str(copy), file=str(path), n_questions=5)
    evaluate.evaluate(cfg)
    assert any("n_questions=5: questions.jsonl has 3, and all of them are scored" in line for line in lines())
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    evaluate.evaluate(cfg)
    assert any("answers_step_00000006.json is replaced: questions.documents was 3, now 2" in line for line in lines())
    assert len(files(copy)["answers_step_00000006.jsonl"].splitlines()) == 2


def test_all_checkpoints_of_a_run_are_scored_each_by_its_own_weights(copy):
    evaluate.evaluate(settings("loss", checkpoint=str(copy), checkpoints="all"))
    found = [json.loads(files(copy)[f"loss_test_step_0000000{n}.json"]) for n in (3, 6)]
    assert found[0]["identity"]["weights"] != found[1]["identity"]["weights"]
    assert found[0]["figures"]["model"]["loss"] != found[1]["figures"]["model"]["loss"]
    assert files(copy)["loss_over_training.png"].startswith(b"\x89PNG")


def test_two_evaluations_of_one_run_at_once_are_refused(copy):
    with directory.owned(copy / "evaluations"), pytest.raises(UserError, match="in use by pid") as caught:
        evaluate.evaluate(settings("loss", checkpoint=str(copy)))
    assert caught.value.code == 6


def test_a_run_that_has_come_to_its_end_is_evaluated_as_it_says_and_what_goes_wrong_is_a_warning(copy, lines, logger):
    logger.propagate = True

    def trained(*overrides):
        cfg = launch.to_dataclass(composed(f"out_dir={copy}", "wandb.mode=disabled", *overrides), TrainConfig)
        OmegaConf.set_readonly(HydraConfig.get(), False)
        HydraConfig.get().runtime.choices = {}  # as where a run goes on by its folder
        return launch.evaluated(lambda cfg: 1.5, cfg)

    assert trained("evaluate_at_end=[loss]") == 1.5 and not (copy / "evaluations").exists()  # it is not finished
    (copy / "last_model.pt").touch()
    assert trained("evaluate_at_end=[]") == 1.5 and not (copy / "evaluations").exists()
    assert trained("evaluate_at_end=[loss,choice]") == 1.5
    assert {f"{kind}_test_step_00000006.json" for kind in ("loss", "choice")} <= files(copy).keys()
    shutil.rmtree(copy / "checkpoints")
    assert trained("evaluate_at_end=[loss]") == 1.5
    assert any(line.startswith("evaluate_at_end: loss: ") for line in lines())


def test_kinds_that_are_evaluated_at_the_end_are_checked_before_training():
    errors = value_errors.find_errors(composed("evaluate_at_end=[answer]"), TrainConfig)
    assert errors == ["evaluate_at_end=['answer']: answer is not one of answers, choice, loss, tasks"]


def test_the_command_takes_typed_paths_and_reports_wrong_values_in_one_line(copy):
    command = [sys.executable, str(ROOT / "evaluate.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "evaluate=[loss,choice]", "checkpoint=run", "evaluate.choice.distractors=1", "resamples=100"],
        cwd=copy.parent, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(copy / "evaluations" / "loss_test_step_00000006.json") in done.stdout.splitlines()
    assert "unigram baseline" in done.stdout and "chance is 0.5" in done.stdout
    wrong = subprocess.run(
        [*command, "checkpoint=run", "evaluate=loss", "evaluate.loss.strid=3", "batch_size=0"],
        cwd=copy.parent, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert "unknown key evaluate.loss.strid, did you mean evaluate.loss.stride?; batch_size=0" in wrong.stderr
