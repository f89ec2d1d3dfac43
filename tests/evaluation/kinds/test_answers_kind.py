"""evaluate=answers: what the model writes, beside baselines, and what it shares with training data."""

import json

import pytest
import torch
from conftest import adamw_config
from made_run import BYTES, MODEL, make, settings
from test_loss_kind import CPU, result

from gpt import optim
from gpt.errors import UserError
from gpt.evaluation import questions, subject
from gpt.evaluation.baselines import ANOTHER, FREQUENT, NEAREST
from gpt.evaluation.kinds.answers import BASE
from gpt.model import GPT
from gpt.runs import model_file
from gpt.runs.checkpoint import Identity, read_manifest


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make(tmp_path_factory.mktemp("answers"))


def test_every_system_has_an_answer_to_every_question_and_the_same_figures(run_dir):
    found = result(settings("answers", checkpoint=str(run_dir)), "answers")
    assert list(found.figures) == ["model", NEAREST, FREQUENT, ANOTHER]
    assert {"ROUGE-1", "ROUGE-2", "ROUGE-L", "F1", "chrF", "BLEU", "exact match", "length ratio", "distinct-1",
            "distinct-2", "repetition"} <= found.figures[NEAREST].keys()  # fmt: skip
    assert {"stopped", "loss of the reference", "copied span"} <= found.figures["model"].keys()
    assert all(own.low <= own.value <= own.high for own in found.figures[NEAREST].values())
    assert any(remark.startswith(f"below a baseline ({NEAREST}): ROUGE-1") for remark in found.remarks)


def test_the_loss_of_the_references_is_that_of_evaluate_loss(run_dir):
    answers = result(settings("answers", checkpoint=str(run_dir)), "answers")
    loss = result(settings("loss", checkpoint=str(run_dir)))
    both = answers.figures["model"]["loss of the reference"].value, loss.figures["model"]["loss"].value
    assert both[0] == pytest.approx(both[1], abs=1e-5)


def test_questions_that_training_has_are_said_and_a_copied_answer_is_told(run_dir, tmp_path):
    cfg = settings("answers", checkpoint=str(run_dir))
    training = questions.open_part(cfg, subject.load(str(run_dir), cfg, CPU)).training.questions
    rows = [{"question": q.instruction, "answer": q.reference} for q in training[:2]]
    rows.append({"question": "Something else ?", "answer": "Something quite different"})
    path = tmp_path / "known.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = result(settings("answers", checkpoint=str(run_dir), file=str(path)), "answers")
    assert [row["in training"] for row in found.rows] == [True, True, False]
    assert found.rows[0]["shared span"] >= 11 and found.rows[2]["shared span"] <= 1
    assert "questions that occur in it: 2" in found.remarks[-1]
    exact = found.figures[NEAREST]["exact match"].value
    assert exact == pytest.approx(2 / 3)


def test_a_question_longer_than_the_context_is_counted_and_never_cut(run_dir, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [{"question": "a ?", "answer": "b"}, {"question": "long " * 40, "answer": "c"},
            {"question": "x" * 90, "answer": "d"}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = result(settings("answers", checkpoint=str(run_dir), file=str(path)), "answers")
    assert [row["reference"] for row in found.rows] == ["b", "d"]
    assert "1 of 3 questions are left out: their prompts fill the context of 96 tokens" in found.remarks
    assert any("1 of 2 answers were ended by the context" in remark for remark in found.remarks)
    path.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(UserError, match="no question fits into the context of 96 tokens"):
        result(settings("answers", checkpoint=str(run_dir), file=str(path)), "answers")


def test_a_fine_tuned_model_is_set_beside_what_it_began_with(run_dir, tmp_path):
    first = tmp_path / "first.pt"
    model_file.save_model(first, GPT(MODEL, BYTES.n_vocab), Identity(MODEL, BYTES.n_vocab, "bytes", "plain"), 1)
    tuned = make(tmp_path, seed=5)
    path = tuned / "checkpoints" / "step_00000003"
    assert read_manifest(path).step == 3
    config = json.loads((path / "config.json").read_text()) | {"init": {"from": str(first), "revision": None}}
    from gpt.progress import Progress
    from gpt.runs import checkpoint

    torch.manual_seed(5)
    model, identity = GPT(MODEL, BYTES.n_vocab), read_manifest(path).identity
    checkpoint.publish(tuned, model, optim.build(model, adamw_config()), Progress(step=4, best=1.0, best_step=4),
                       identity, config)  # fmt: skip
    found = result(settings("answers", checkpoint=str(tuned)), "answers")
    assert found.figures[BASE]["loss of the reference"].value != found.figures["model"]["loss of the reference"].value
    assert "ROUGE-L" in found.figures[BASE]
    without = result(settings("answers", checkpoint=str(tuned), answers={"baselines": ["bm25"]}), "answers")
    assert list(without.figures) == ["model", NEAREST]


def test_drawn_answers_depend_on_the_seed_alone(run_dir):
    def answers(seed):
        cfg = settings("answers", checkpoint=str(run_dir), seed=seed, answers={"temperature": 1.0}, name=f"s{seed}")
        return [row["systems"]["model"]["answer"] for row in result(cfg, "answers").rows]

    assert answers(1) == answers(1) != answers(2)
