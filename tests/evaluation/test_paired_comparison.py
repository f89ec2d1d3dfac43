"""Several models on the same questions."""

import json

import made_run
import pytest
import torch
from conftest import model_config, sweep_job
from made_run import make, settings

import evaluate
from gpt.errors import UserError
from gpt.evaluation import subject
from gpt.runs import checkpoint, model_file


@pytest.fixture(autouse=True)
def results_of_comparisons(tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "ELSEWHERE", tmp_path / "evaluations")


def test_two_runs_are_compared_in_pairs_on_all_figures_and_a_run_with_itself_is_not_distinguishable(tmp_path, capsys):
    runs = [str(make(tmp_path, name, seed)) for name, seed in (("a", 1), ("b", 2), ("c", 1))]
    evaluate.evaluate(settings("loss", "choice", compare=runs))
    printed = capsys.readouterr().out
    content = json.loads((subject.ELSEWHERE / "comparison" / "loss.json").read_text())
    assert content["questions"] == 9 and len(content["figures"]) == 3
    of_loss = {(d["first"], d["second"]): d for d in content["differences"] if d["figure"] == "loss"}
    same = of_loss[(runs[0], runs[2])]
    assert (same["value"], same["distinguishable"], same["p"]) == (0.0, False, 1.0)
    values = [content["figures"][run]["loss"]["value"] for run in runs]
    assert of_loss[(runs[0], runs[1])]["value"] == pytest.approx(values[0] - values[1])
    assert "choice: 9 questions that all have answered" in printed
    assert "not distinguishable with 9 questions" in printed


def test_two_files_of_one_name_are_compared_each_by_its_own_results(tmp_path):
    places = []
    for seed in (1, 2):
        run = make(tmp_path, f"run{seed}", seed)
        loaded = subject.load(str(run), settings("loss"), torch.device("cpu"))
        identity = checkpoint.read_manifest(loaded.path).identity
        places.append(tmp_path / str(seed) / "ckpt.pt")
        places[-1].parent.mkdir()
        model_file.save_model(places[-1], loaded.model, identity, 3)
    (tmp_path / "asked.jsonl").write_text('{"question": "a", "answer": "b c"}\n{"question": "d", "answer": "e f"}\n')
    evaluate.evaluate(settings("loss", compare=list(map(str, places)), file=str(tmp_path / "asked.jsonl")))
    content = json.loads((subject.ELSEWHERE / "comparison" / "loss.json").read_text())
    values = [figures["loss"]["value"] for figures in content["figures"].values()]
    assert len(values) == 2 and values[0] != values[1]


def test_a_text_is_not_compared_by_windows_that_differ(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("It rains every day here. " * 20)
    runs = [str(make(tmp_path, "a")), str(make(tmp_path, "b", 1))]
    cfg = settings("loss", compare=runs, file=str(tmp_path / "text.txt"))
    evaluate.evaluate(cfg)
    monkeypatch.setattr(made_run, "MODEL", model_config(context_length=48, n_embd=32))
    cfg.compare.append(str(make(tmp_path, "c")))
    with pytest.raises(UserError, match=r"not the same windows of one document \(text.txt\); give"):
        evaluate.evaluate(cfg)


def test_other_questions_are_refused(tmp_path):
    (tmp_path / "x").mkdir()
    runs = [str(make(tmp_path, "a")), str(make(tmp_path / "x", "b", test_fraction=0.1))]
    with pytest.raises(UserError, match=r"not the same questions.*give all of them the same"):
        evaluate.evaluate(settings("loss", compare=runs))


def test_a_sweep_is_compared_by_its_settings_with_seeds_as_a_second_level(tmp_path, capsys):
    sweep = tmp_path / "first"
    for i, (lr, seed) in enumerate([(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)]):
        job = sweep_job(sweep, i, {"optimizer.lr": lr, "seed": seed}, [3.0])
        make(sweep, job.folder.name, seed=i)
    evaluate.evaluate(settings("loss", compare=[str(sweep)]))
    content = json.loads((subject.ELSEWHERE / "comparison" / "loss.json").read_text())
    assert content["figures"].keys() == {"optimizer.lr=0.1", "optimizer.lr=0.2"}
    [difference] = [d for d in content["differences"] if d["figure"] == "loss"]
    assert (difference["first"], difference["second"]) == ("optimizer.lr=0.1", "optimizer.lr=0.2")
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert "loss: optimizer.lr=0.1 minus optimizer.lr=0.2: " in capsys.readouterr().out
