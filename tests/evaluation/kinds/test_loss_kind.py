"""evaluate=loss: the figures of training's own evaluations, and those of transformers and lm-evaluation-harness."""

import math
import re

import pytest
import torch
from conftest import data_config, train_section
from made_run import BYTES, make, settings

import evaluate
from gpt.data.batching import Split, eval_batches
from gpt.evaluation import questions, running, subject
from gpt.evaluation.task import Task
from gpt.objective import NEXT_TOKEN

TEXT = "It rains.\n\nNobody  minds, as it rains every day here; umbrellas are cheap. \n" * 12
CPU = torch.device("cpu")


def result(cfg, kind="loss"):
    """The Result of an evaluation."""
    model = subject.load(cfg.checkpoint, cfg, CPU)
    task = Task(model, lambda: questions.open_part(cfg, model), cfg.batch_size, cfg.seed, CPU)
    model.folder.mkdir(exist_ok=True, parents=True)
    return running.evaluate(kind, cfg.chosen[kind], task, cfg)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make(tmp_path_factory.mktemp("loss"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A model that transformers has saved, and the model itself."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=BYTES.n_vocab, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    path = tmp_path_factory.mktemp("transformers") / "model"
    model.save_pretrained(path)
    return path, model


@pytest.fixture(autouse=True)
def results_of_weights_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "ELSEWHERE", tmp_path / "evaluations")


def figures(found, *names):
    return [found.figures["model"][name].value for name in names]


def text_file(folder, text):
    path = folder / "text.txt"
    path.write_text(text)
    return str(path)


def test_a_model_of_transformers_has_its_own_loss_to_1e_5(foreign, tmp_path):
    path, model = foreign
    text = TEXT[:60]
    ids = torch.tensor([BYTES.encode(text)])
    expected = model(ids, labels=ids).loss.item()
    loss, perplexity, bpb = figures(
        result(settings("loss", checkpoint=str(path), file=text_file(tmp_path, text))),
        "loss", "perplexity", "bits per byte",
    )  # fmt: skip
    assert loss == pytest.approx(expected, abs=1e-5)
    assert perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert bpb == pytest.approx(expected / math.log(2), abs=1e-5)  # a token is a byte


def test_long_texts_are_read_in_windows_as_lm_evaluation_harness_does(foreign, tmp_path):
    """The end of a text first, then windows of a whole context without overlap; words are those of the original."""
    path, model = foreign
    ids, nats = [BYTES.eos, *BYTES.encode(TEXT)], 0.0
    for start in range(0, len(ids) - 1, 64):
        window = torch.tensor([ids[max(0, min(start, len(ids) - 65)) : start + 64][:64]])
        end = min(start + 64, len(ids) - 1)
        logs = model(window).logits.log_softmax(-1)[0]
        first = max(0, min(start, len(ids) - 65))
        nats -= sum(logs[t - 1 - first, ids[t]].item() for t in range(start + 1, end + 1))
    cfg = settings(
        "loss", checkpoint=str(path), file=text_file(tmp_path, TEXT),
        loss={"stride": 64, "end_of_text_first": True},
    )  # fmt: skip
    found = result(cfg)
    loss, bpb, of_words = figures(found, "loss", "bits per byte", "perplexity of words")
    assert loss == pytest.approx(nats / len(TEXT), abs=1e-5)
    assert bpb == pytest.approx(nats / len(TEXT) / math.log(2), abs=1e-5)
    assert math.log(of_words) == pytest.approx(nats / len(re.split(r"\s+", TEXT)), abs=1e-4)
    assert sum(row["tokens"] for row in found.rows) == len(TEXT)


def test_the_validation_loss_is_that_of_training(run_dir):
    cfg = settings("loss", checkpoint=str(run_dir), part="val")
    model = subject.load(str(run_dir), cfg, CPU)
    data = questions.of_run(model)
    split = Split.open(data.folder, "val")
    batches = eval_batches(
        split, data_config(), model.model.config.context_length, train_section(eval_tokens=10**6),
        BYTES.bytes_per_token(),
    )  # fmt: skip
    with torch.no_grad():
        expected = NEXT_TOKEN.evaluate(model.model, batches)
    loss, bpb = figures(result(cfg), "loss", "bits per byte")
    assert (loss, bpb) == pytest.approx((expected["val/loss"], expected["val/bpb"]), abs=1e-6)


def test_a_row_for_each_document_and_the_frequencies_of_training_tokens_as_a_baseline(run_dir):
    found = result(settings("loss", checkpoint=str(run_dir)))
    assert len(found.rows) == 9
    assert found.figures["unigram baseline"]["loss"].value < math.log(BYTES.n_vocab)
    assert "the model is no better than the frequencies of training tokens alone" in found.remarks  # it is random


def test_one_question_whose_answer_takes_several_windows_is_one_row(run_dir, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(f'{{"question": "{q}", "answer": "{"rest and water " * 20}"}}\n' for q in "ab"))
    both = result(settings("loss", checkpoint=str(run_dir), file=str(path)))
    one = result(settings("loss", checkpoint=str(run_dir), file=str(path), n_questions=1))
    assert one.rows[0]["nats"] == pytest.approx(both.rows[0]["nats"], rel=1e-5)
    assert one.rows[0]["tokens"] == 301 and len(one.rows) == 1 and one.figures["model"]["loss"].low is None


def test_weights_from_elsewhere_leave_their_results_in_outputs(foreign, tmp_path, capsys):
    path, _ = foreign
    evaluate.evaluate(settings("loss", checkpoint=str(path), file=text_file(tmp_path, TEXT), resamples=100))
    [folder] = subject.ELSEWHERE.iterdir()
    assert folder.name.endswith("model") and (folder / "loss_step_00000000.json").is_file()
    assert "intervals: over " in capsys.readouterr().out
