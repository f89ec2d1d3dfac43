"""lm-evaluation-harness on our weights gives what its own transformers model gives on the same weights, exported."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import model_config
from made_run import settings
from test_loss_kind import CPU

from gpt import tokenizer
from gpt.errors import UserError
from gpt.evaluation import running, subject
from gpt.evaluation.task import Task
from gpt.model import GPT
from gpt.runs import model_file
from gpt.runs.checkpoint import Identity
from gpt.weights import export, loading

pytest.importorskip("lm_eval", reason="requirements-tasks.txt is not installed")
pytestmark = pytest.mark.exhaustive  # loading the harness takes long

GPT2 = tokenizer.load("gpt2")
TASKS = {
    "choose": "output_type: multiple_choice\ndoc_to_text: '{{q}} '\ndoc_to_target: a\ndoc_to_choice: c\nmetric_list:\n"
    "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n",
    "roll": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n"
    "  - {metric: word_perplexity}\n  - {metric: bits_per_byte}\n",
    "write": "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{g}}'\n"
    "generation_kwargs: {until: ['e'], max_gen_toks: 12, do_sample: false}\nmetric_list:\n"
    "  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n",
}
DOCUMENTS = [
    {"q": f"What is number {i} of all ?", "c": [f"It is {i}.", "Nothing at all", "x"], "a": i % 3, "g": "x",
     "text": f"A text of {i} words and more. " * (4 * i + 1)}
    for i in range(6)
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tasks, and two models, one of them exported as well."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "tasks").mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS))
    for name, text in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        (folder / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{data}test_split: test\n{text}")
    config = model_config(context_length=32)
    for name, seed in (("one", 0), ("two", 1)):
        torch.manual_seed(seed)
        model = GPT(config, GPT2.n_vocab)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(6)
        model_file.save_model(folder / f"{name}.pt", model, Identity(config, GPT2.n_vocab, "gpt2", None), 1)
    export.write(loading.load(str(folder / "one.pt"), folder, CPU), folder / "exported")
    return folder


def evaluated(place, name, monkeypatch, tmp_path, **changes):
    monkeypatch.setattr(subject, "ELSEWHERE", tmp_path / "evaluations")
    cfg = settings(
        "tasks", checkpoint=str(place / f"{name}.pt"),
        tasks={"names": list(TASKS), "folder": str(place / "tasks"), "num_fewshot": None} | changes,
    )  # fmt: skip
    model = subject.load(cfg.checkpoint, cfg, CPU)
    task = Task(model, lambda: pytest.fail("no data is needed"), cfg.batch_size, cfg.seed, CPU)
    model.folder.mkdir(parents=True, exist_ok=True)
    return running.evaluate("tasks", cfg.chosen["tasks"], task, cfg)


def test_three_tasks_have_the_figures_of_the_harness_own_model_and_another_model_has_others(
    folder, monkeypatch, tmp_path
):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    own = evaluated(folder, "one", monkeypatch, tmp_path)
    expected = simple_evaluate(
        model=HFLM(pretrained=str(folder / "exported"), device="cpu", batch_size=4), tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(folder / "tasks")), bootstrap_iters=0,
    )  # fmt: skip
    figures = own.figures["model"]
    assert len(figures) == 5
    for label, figure in figures.items():
        task, key = label.split(": ")
        assert figure.value == pytest.approx(expected["results"][task][f"{key},none"], rel=1e-5), label
    two = evaluated(folder, "two", monkeypatch, tmp_path)
    assert two.figures["model"]["roll: bits_per_byte"].value != figures["roll: bits_per_byte"].value
    assert two.identity["weights"] != own.identity["weights"]
    assert len(own.rows) == 18 and "choose: 6 documents" in own.remarks
    assert all(figure.low <= figure.value <= figure.high for figure in figures.values())


def test_requests_are_answered_alike(folder):
    from lm_eval.models.huggingface import HFLM

    from gpt.evaluation.harness import HarnessModel

    def request(*arguments):
        return SimpleNamespace(args=arguments)

    loaded = loading.load(str(folder / "one.pt"), folder, CPU)
    model = SimpleNamespace(model=loaded.model, tokens=GPT2, batch_size=3, device=CPU, seed=0)
    ours, theirs = HarnessModel(model), HFLM(pretrained=str(folder / "exported"), device="cpu", batch_size=3)
    pairs = [("", "a text"), ("What ", " is"), ("q  ", "two words"), ("long " * 40, "end"), ("x", "long " * 20)]
    with pytest.raises(UserError, match="a continuation of 41 tokens is longer than the context of 32"):
        ours.loglikelihood([request("x", "long " * 40)])
    for own, other in zip(*(m.loglikelihood([request(*p) for p in pairs]) for m in (ours, theirs)), strict=True):
        assert own[0] == pytest.approx(other[0], abs=1e-3) and own[1] == other[1]
    until = {"until": [" the", "\n"], "max_gen_toks": 8, "do_sample": False}
    asked = [("a question ?", until), ("long " * 40, until), ("b", until | {"max_gen_toks": 3})]
    assert ours.generate_until([request(*a) for a in asked]) == theirs.generate_until([request(*a) for a in asked])


def test_a_task_that_is_not_known_or_whose_data_cannot_be_had_is_an_error_in_one_line(folder, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="no task nonsense") as caught:
        evaluated(folder, "one", monkeypatch, tmp_path, names=["nonsense"])
    assert caught.value.code == 2
    away = folder / "away"
    away.mkdir()
    data = "dataset_path: json\ndataset_kwargs: {data_files: {test: /nowhere/rows.jsonl}}\n"
    (away / "away.yaml").write_text(f"task: away\n{data}test_split: test\n{TASKS['choose']}")
    with pytest.raises(UserError, match="task away cannot be run") as caught:
        evaluated(folder, "one", monkeypatch, tmp_path, names=["away"], folder=str(away))
    assert caught.value.code == 5
