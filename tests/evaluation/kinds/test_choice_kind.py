"""evaluate=choice: the right answer among wrong ones, by likelihood."""

import json
import math

import numpy as np
import pytest
import torch
from made_run import make, settings
from test_loss_kind import CPU, result

from gpt.errors import UserError
from gpt.evaluation import questions, subject
from gpt.evaluation.kinds.choice import PER_BYTE, SUM, Evaluation, _share
from gpt.evaluation.task import Task


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make(tmp_path_factory.mktemp("choice"))


def test_log_likelihoods_are_those_of_the_model_and_the_first_option_is_the_right_one(run_dir):
    cfg = settings("choice", checkpoint=str(run_dir))
    found = result(cfg, "choice")
    model = subject.load(str(run_dir), cfg, CPU)
    part = questions.open_part(cfg, model)
    row = found.rows[0]
    for option, expected in zip(row["options"], row["log likelihood"], strict=True):
        prompt = part.prompt(0)
        text = model.tokens.encode(part.questions[part.ids.index(option)].reference)
        logs = model.model(torch.tensor([prompt + text]))[0].log_softmax(-1)
        by_hand = sum(logs[len(prompt) + i - 1, token].item() for i, token in enumerate(text))
        assert expected == pytest.approx(by_hand, abs=1e-3)
    assert row["options"][0] == row["id"] == part.ids[0] and len(set(row["options"])) == 3


def test_wrong_answers_are_of_the_same_focus_first_and_do_not_depend_on_the_model(run_dir, tmp_path):
    def options(run):
        cfg = settings("choice", checkpoint=str(run))
        model = subject.load(str(run), cfg, CPU)
        task = Task(model, lambda: questions.open_part(cfg, model), 4, 1, CPU)
        return [[task.part.topics[i][0] for i in own] for own in Evaluation(2)._options(task)]

    found = options(run_dir)
    assert all(len(set(topics)) == 1 for topics in found)
    assert found == options(make(tmp_path, seed=4))


def test_the_first_questions_have_the_same_wrong_answers_as_all(run_dir):
    every = result(settings("choice", checkpoint=str(run_dir)), "choice").rows
    some = result(settings("choice", checkpoint=str(run_dir), n_questions=2, name="some"), "choice").rows
    assert [row["options"] for row in some] == [row["options"] for row in every[:2]]


def test_accuracy_of_a_model_that_knows_and_of_chance():
    rows = [{"options": ["r", "a", "b", "c"], "log likelihood": [-5.0, -9.0, -8.0, -7.0], "bytes": [10, 9, 8, 7]}] * 3
    rows.append({"options": ["r", "a", "b", "c"], "log likelihood": [-9.0, -5.0, -9.0, -9.0], "bytes": [20, 5, 9, 9]})
    measures = Evaluation(3).measures(rows)
    assert measures["model"][SUM].total() == 0.75 and measures["chance"][SUM].total() == 0.25
    assert measures["model"][PER_BYTE].total() == 1.0  # per byte, the long right answer is the likeliest
    assert measures["shortest answer"][SUM].total() == 0.0
    bits = (3 * 0.5 + 0.45) / math.log(2) / 4
    assert measures["model"]["bits per byte of the right one"].total() == pytest.approx(bits)


def test_equally_likely_options_share_what_is_right():
    assert [_share(np.array(v)) for v in ([1.0, 1.0, 0.0], [2.0, 1.0], [0.0, 1.0])] == [0.5, 1.0, 0.0]


def test_a_random_model_cannot_be_told_from_chance_which_is_said(run_dir):
    found = result(settings("choice", checkpoint=str(run_dir)), "choice")
    assert "chance is 0.3333: one right answer among 3" in found.remarks
    assert any("cannot be told from chance with 9 questions" in remark for remark in found.remarks)
    assert "wrong answers: 18 of the same focus" in found.remarks


def test_too_few_different_answers_are_refused_with_how_many_there_can_be(run_dir, tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in ("ax", "bx", "cy")))
    with pytest.raises(UserError, match=r"2 different answers are too few for 2 wrong ones.*distractors=1"):
        result(settings("choice", checkpoint=str(run_dir), file=str(path)), "choice")
    found = result(settings("choice", checkpoint=str(run_dir), file=str(path), choice={"distractors": 1}), "choice")
    assert "wrong answers: 3 of any question" in found.remarks
    path.write_text('{"question": "a", "answer": "x"}\n')
    with pytest.raises(UserError, match=r"1 different answers are too few.*give questions with different answers"):
        result(settings("choice", checkpoint=str(run_dir), file=str(path)), "choice")
