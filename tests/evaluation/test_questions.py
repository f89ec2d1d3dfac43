"""What a model is asked: the split of its run's data, other data, a file of rows, or a text."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import data_config
from made_run import BYTES, data, make, settings

from gpt.config.schema import as_dict
from gpt.data import preparation
from gpt.errors import UserError
from gpt.evaluation import questions, subject
from gpt.prompts import Question, format_prompt, read_prompt

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    run = make(tmp_path_factory.mktemp("questions"))
    return subject.load(str(run), settings("loss"), CPU)


def part_of(model, **changes):
    return questions.open_part(settings("loss", **changes), model)


def test_the_questions_of_a_run_are_those_of_its_own_data_by_its_fingerprint(model):
    part, folder = part_of(model), questions.of_run(model).folder
    lines = [json.loads(line) for line in (folder.parent / "test.jsonl").read_text().splitlines()]
    assert [(q.instruction, q.input, q.reference) for q in part.questions] == [
        (line["instruction"], line["input"], line["output"]) for line in lines
    ]
    assert [focus in q.instruction for q, (focus, _) in zip(part.questions, part.topics, strict=True)] == [True] * 9
    stored = np.fromfile(folder / "test.bin", "<u2")
    assert np.array_equal(part.split.ids, stored)  # encoded anew, and the same tokens
    assert part.source == "topics, test split" and len(part.training.questions) == 15


def test_newer_data_in_the_same_folder_is_not_mistaken_for_it(model, tmp_path):
    folder = questions.of_run(model).folder
    cfg = data(folder.parent.parent, test_fraction=0.1)
    preparation.ensure(cfg, folder.parent.parent)
    assert len(part_of(model).questions) == 9


def test_data_that_has_gone_is_named_with_what_to_do(tmp_path):
    run = make(tmp_path)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError, match=r"the data that the run was trained on is not there.*data=\.\.\. or file"):
        part_of(subject.load(str(run), settings("loss"), CPU))


@pytest.mark.parametrize("given", ["file", "data"])
def test_where_the_runs_data_has_gone_other_questions_are_asked_as_the_error_says(tmp_path, given, caplog):
    run = make(tmp_path)
    shutil.rmtree(tmp_path / "data")
    other = tmp_path / "q.jsonl"
    other.write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    changes = {"file": {"file": str(other)}, "data": {"data": data(tmp_path, test_fraction=0.1)}}[given]
    part = part_of(subject.load(str(run), settings("loss"), CPU), **changes)
    assert len(part.questions) == {"file": 1, "data": 3}[given]
    assert "the data that the run was trained on is not there" in caplog.text
    assert (part.training is None) == (given == "file")


def test_no_test_split_says_which_there_are(tmp_path):
    run = make(tmp_path, test_fraction=0.0)
    with pytest.raises(UserError, match=r"the data has no test split.*it has train, val: set part="):
        part_of(subject.load(str(run), settings("loss"), CPU))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "a"}, "no column output or response or answer or reference"),
        ({"question": "a", "answer": " "}, "the reference is empty"),
        ({"question": "", "answer": "b"}, "the question is empty"),
        ({"question": "a", "answer": None}, "the reference is empty"),
        ({"question": "a", "answer": 7}, "questions and references must be texts"),
    ],
)
def test_a_row_without_a_question_or_a_reference_is_named(model, tmp_path, row, problem):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "a", "answer": "b"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"q.jsonl:2: {problem}"):
        part_of(model, file=str(path))


def test_a_file_of_rows_may_have_topics_and_is_compared_with_the_runs_training_data(model, tmp_path):
    path = tmp_path / "q.csv"
    path.write_text("question,answer,focus_area,source\nWhat is x ?,An x.,x,s\n")
    part = part_of(model, file=str(path))
    assert part.questions == [Question("What is x ?", "", "An x.")] and part.topics == [("x", "s")]
    assert part.mask == "response" and len(part.training.questions) == 15
    assert BYTES.decode(part.prompt(0)) == format_prompt("plain", "What is x ?")


def test_what_is_no_file_and_what_is_empty_is_refused(model, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text("")
    for name, problem in (("nothing", "no such file"), ("empty.txt", "the text is empty"), ("empty.jsonl", "empty")):
        with pytest.raises(UserError, match=problem):
            part_of(model, file=str(tmp_path / name))


def test_a_text_has_no_questions_to_answer(model, tmp_path):
    (tmp_path / "a.txt").write_text("It rains every day.")
    part = part_of(model, file=str(tmp_path / "a.txt"))
    assert part.questions == [] and part.split.documents.tolist() == [[0, 0, 19]]
    with pytest.raises(UserError, match="evaluate=answers needs questions"):
        part.need_questions("answers")


def test_other_prepared_data_is_scored_and_the_runs_own_training_data_is_what_it_is_compared_with(model, tmp_path):
    from gpt.config.data import InstructionDataConfig

    other = data(tmp_path, test_fraction=0.1)
    assert isinstance(other, InstructionDataConfig)
    part = part_of(model, data=other)
    assert len(part.questions) == 3
    assert part.training.data.meta["fingerprint"] == model.settings["data"]["fingerprint"]


def test_a_model_of_running_text_has_the_baselines_of_the_data_that_it_is_asked_about(model, tmp_path):
    (tmp_path / "a.txt").write_text("It rains every day, and no day is dry. " * 9)
    text = data_config(kind="text", path=str(tmp_path / "a.txt"), prepared_dir=str(tmp_path / "text"), val_fraction=0.2,
                       test_fraction=0.0)  # fmt: skip
    fingerprint = preparation.ensure(text, tmp_path).meta["fingerprint"]
    of_text = replace(model, settings={"data": as_dict(text) | {"fingerprint": fingerprint}})
    part = part_of(of_text, data=data(tmp_path))
    assert part.training.questions == [] and part.training.texts[0].startswith("It rains every day")
    assert part.retrieved == part_of(model).training.questions


def test_the_first_questions_only_and_their_hash_is_another(model):
    whole, some = part_of(model), part_of(model, n_questions=4)
    assert len(some.questions) == 4 and some.ids == whole.ids[:4] and some.sha256 != whole.sha256
    assert some.split.documents[-1, 2] == len(some.split.ids)


def test_equal_questions_have_names_of_their_own(model, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text((json.dumps({"question": "a", "answer": "b"}) + "\n") * 2)
    ids = part_of(model, file=str(path)).ids
    assert len(set(ids)) == 2


def test_weights_without_data_say_what_to_give(model):
    with pytest.raises(UserError, match=r"no data is known.*give data=medquad, or file=questions.jsonl"):
        part_of(replace(model, run=None, settings={}))


@pytest.mark.parametrize("template", ["alpaca", "alpaca_stanford", "plain"])
@pytest.mark.parametrize("given", ["", "pear, fig"])
def test_a_prompt_is_read_back(template, given):
    assert read_prompt(template, format_prompt(template, "Sort these.", given)) == ("Sort these.", given)
