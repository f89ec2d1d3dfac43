"""evaluate=tasks: figures over the documents of each task. test_harness.py has the harness itself."""

import importlib.metadata
import math

import pytest

from gpt.errors import UserError
from gpt.evaluation.kinds.tasks import Evaluation


def row(task, document, **figures):
    return {"id": f"{task}/none/{document}", "task": task, "document": document, "filter": "none", "figures": figures}


def test_means_and_perplexities_are_over_the_documents_of_their_own_task():
    rows = [row("a", 0, acc=1.0), row("a", 1, acc=0.0), row("b", 0, word_perplexity=[-10.0, 4.0], label="text"),
            row("b", 1, word_perplexity=[-2.0, 2.0], label="text"), row("c", 0, perplexity=-3.0)]  # fmt: skip
    measures = Evaluation(["a", "b", "c"], None, None, None).measures(rows)["model"]
    assert measures.keys() == {"a: acc", "b: word_perplexity", "c: perplexity"}
    assert measures["a: acc"].total() == 0.5
    assert measures["b: word_perplexity"].total() == pytest.approx(math.exp(12 / 6))
    assert measures["c: perplexity"].total() == pytest.approx(math.exp(3))


def test_without_the_harness_it_is_said_what_to_install(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("gpt.evaluation.kinds.tasks.version", missing)
    with pytest.raises(UserError, match=r"not installed.*requirements-tasks.txt") as caught:
        Evaluation(["a"], None, None, None).asked(None)
    assert caught.value.code == 5


def test_the_files_of_local_tasks_are_in_the_hash(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt.evaluation.kinds.tasks.version", lambda name: "1.0")
    kind = Evaluation(["a"], str(tmp_path), None, None)
    before = kind.asked(None)["questions"]
    (tmp_path / "a.yaml").write_text("task: a")
    after = kind.asked(None)["questions"]
    assert before["sha256"] != after["sha256"] and after["source"] == "lm-evaluation-harness 1.0: a"
    with pytest.raises(UserError, match="no such folder"):
        Evaluation(["a"], str(tmp_path / "x"), None, None).asked(None)
