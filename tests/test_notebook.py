"""The notebook's loaders and loop, against the reference values of the book's own text."""

import inspect
import json
import logging
from pathlib import Path

import pytest
import tiktoken
import torch
import yaml
from conftest import ROOT, THE_VERDICT, model_config
from torch import nn
from torch.utils.data import DataLoader

from gpt import tokenizer
from gpt.errors import UserError
from gpt.model import GPT
from gpt.notebook import (
    GPTDatasetExamples,
    GPTDatasetV1,
    build_model,
    collate_examples,
    create_dataloader_from_examples,
    generate_text,
    generate_text_simple,
    load_model,
    settings,
    text_to_token_ids,
    token_ids_to_text,
    train_model_simple,
)
from gpt.runs import model_file
from gpt.runs.checkpoint import Identity
from gpt.terminal.console import escape

RECORDS = [{"instruction": f"Say {word}.", "input": "", "output": word * n} for n, word in enumerate("abcdefghij", 1)]


def test_settings_are_those_of_train_py_with_the_same_arguments(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = settings("model=mini", "model.context_length=64", "optimizer.lr=3e-4", "data=text", "data.path=a, b.txt")
    assert (cfg.model.name, cfg.model.context_length, cfg.optimizer.lr) == ("mini", 64, 3e-4)
    assert cfg.data.path == str(tmp_path / "a, b.txt")  # typed paths begin where one is, and are taken as typed
    assert settings().model.name == "tiny" and not list(tmp_path.iterdir())


def test_all_faults_of_settings_are_one_error():
    with pytest.raises(UserError, match=r"unknown key optimzer.lr, did you mean optimizer.lr\?; .* not divisible"):
        settings("optimzer.lr=1", "model.n_head=5")
    with pytest.raises(UserError, match="Could not find 'model/giant'"):
        settings("model=giant")


SMALL = ("model.n_layer=1", "model.n_embd=16", "model.context_length=16", "data.tokenizer=bytes")


def test_a_model_in_one_call_has_the_weights_that_its_seed_or_its_file_gives(tmp_path):
    first, again, other = (build_model(*SMALL, f"seed={seed}").wte.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(1)
    model = GPT(settings(*SMALL).model, 257)
    assert torch.equal(first, model.wte.weight)  # as train.py draws them
    file = tmp_path / "other.pt"
    model_file.save_model(file, model, Identity(model.config, 257, "bytes", None), step=3)
    loaded = build_model(f"init.from={file}", "data.tokenizer=bytes", "model.context_length=8")
    assert torch.equal(loaded.wte.weight, first) and loaded.config.context_length == 8


def test_a_model_is_loaded_by_a_path_from_where_one_is_and_generates_what_generate_py_prints(
    tmp_path, monkeypatch, capsys
):
    from test_generate import settings as generate_settings

    import generate

    monkeypatch.chdir(tmp_path)
    model = build_model(*SMALL, "seed=4")
    file = Path("runs", "mine", "last_model.pt")
    file.parent.mkdir(parents=True)
    model_file.save_model(file, model, Identity(model.config, 257, "bytes", "plain"), step=7)
    loaded = load_model(file)
    assert (loaded.step, loaded.template, loaded.model.training) == (7, "plain", False)
    tokens = tokenizer.load(loaded.tokenizer_name)
    text = generate_text(loaded.model, tokens, "Hi", template=loaded.template, max_new_tokens=9, top_k=None, seed=5)
    generate.generate(
        generate_settings(file.absolute(), prompt="Hi", max_new_tokens=9, temperature=0.8, top_k=None, seed=5)
    )
    assert escape(text, keep_newlines=True) in capsys.readouterr().out and text
    with pytest.raises(UserError, match="no such file"):
        load_model("runs/other")


def test_a_file_of_bare_weights_takes_its_heads_and_gelu_from_the_call(tmp_path):
    model = build_model(*SMALL, "model.n_head=4", "model.gelu=exact")
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    loaded = load_model(tmp_path / "bare.pth", n_head=4, gelu="exact").model
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(ids), model(ids))
    assert not torch.equal(load_model(tmp_path / "bare.pth").model(ids), model(ids))  # it would have one head


def test_generate_text_has_the_defaults_of_generate_py():
    stated = yaml.safe_load((ROOT / "conf" / "generate.yaml").read_text())
    defaults = {
        k: p.default for k, p in inspect.signature(generate_text).parameters.items() if p.kind == p.KEYWORD_ONLY
    }
    assert defaults == {key: stated[key] for key in defaults}


def test_windows_are_stride_apart_and_targets_one_token_later():
    tokens = tokenizer.load("bytes")
    dataset = GPTDatasetV1("abcdefghij", tokens, max_length=4, stride=3)
    assert [tokens.decode(inputs.tolist()) for inputs, _ in dataset] == ["abcd", "defg"]
    assert [tokens.decode(targets.tolist()) for _, targets in dataset] == ["bcde", "efgh"]


@pytest.mark.skipif(not THE_VERDICT.exists(), reason=f"{THE_VERDICT.name} is not beside the repository")
def test_the_verdict_gives_nine_training_batches():
    tokens = tokenizer.load("gpt2")
    text = THE_VERDICT.read_text(encoding="utf-8")
    assert (len(text), len(tokens.encode(text))) == (20_479, 5_145)
    border = int(0.9 * len(text))
    assert [len(tokens.encode(part)) for part in (text[:border], text[border:])] == [4_612, 534]
    dataset = GPTDatasetV1(text[:border], tokens, max_length=256, stride=256)
    assert len(DataLoader(dataset, batch_size=2, drop_last=True)) == 9


def test_a_text_no_longer_than_a_window_is_an_error_that_names_both_numbers():
    with pytest.raises(UserError, match=r"text of 4 tokens .* windows of 4"):
        GPTDatasetV1("abcd", tokenizer.load("bytes"), max_length=4, stride=4)


def test_padding_is_the_books_reference_vector():
    inputs, targets = collate_examples([([0, 1, 2, 3, 4], 0), ([5, 6], 0), ([7, 8, 9], 0)])
    assert inputs.tolist() == [[0, 1, 2, 3, 4], [5, 6, 50256, 50256, 50256], [7, 8, 9, 50256, 50256]]
    assert targets.tolist() == [[1, 2, 3, 4, 50256], [6, 50256, -100, -100, -100], [8, 9, 50256, -100, -100]]


def test_an_end_of_text_inside_a_row_stays_a_target():
    _, targets = collate_examples([([1, 50256, 2], 0), ([3], 0)])
    assert targets.tolist() == [[50256, 2, 50256], [50256, -100, -100]]


def test_a_masked_prompt_predicts_nothing_and_the_response_everything():
    _, targets = collate_examples([([1, 2, 3, 4, 5], 3)], mask_prompt=True)
    assert targets.tolist() == [[-100, -100, 4, 5, 50256]]


def test_a_batch_without_a_supervised_token_is_an_error():
    with pytest.raises(UserError, match="no supervised token within 2 tokens"):
        collate_examples([([1, 2, 3, 4, 5], 4)], max_length=2, mask_prompt=True)


def test_an_example_is_prompt_then_response_with_the_border_known():
    tokens = tokenizer.load("gpt2")
    ids, response_start = GPTDatasetExamples([{"instruction": "Hi", "input": "", "output": "Hello"}], tokens)[0]
    assert tokens.decode(ids[:response_start]).endswith("### Instruction:\nHi\n\n### Response:\n")
    assert tokens.decode(ids[response_start:]) == "Hello"


def test_the_order_comes_from_the_loaders_own_seed(tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    tokens = tokenizer.load("bytes")

    def first_epoch(source, seed):
        loader = create_dataloader_from_examples(source, tokens, batch_size=3, seed=seed)
        torch.rand(1)  # what others draw has no influence ...
        before = torch.get_rng_state()
        batches = [inputs.tolist() for inputs, _ in loader]
        assert torch.equal(before, torch.get_rng_state())  # ... and the loader has none on others
        return batches

    assert first_epoch(file, seed=1) == first_epoch(RECORDS, seed=1) != first_epoch(RECORDS, seed=2)


@pytest.mark.parametrize(
    "line, expected",
    [
        ('{"instruction": "a", "outp', ":2: invalid JSON (Unterminated string"),
        ('{"instruction": "a"}', ":2: no key output"),
        ('{"output": "a"}', ":2: no key instruction"),
        ('{"instruction": "a", "output": null}', ":2: output is NoneType, text is needed"),
        ('{"instruction": "a", "output": "b", "input": 3}', ":2: input is int, text is needed"),
        ('{"instruction": "a", "output": "b", "output": "c"}', ":2: key 'output' occurs twice"),
        ('{"instruction": "a", "output": "\\ud800"}', ":2: 'output': lone surrogate"),
        ('["a"]', ":2: a list where an object"),
    ],
)
def test_a_file_with_a_record_that_cannot_be_used_is_an_error_with_its_line(tmp_path, line, expected):
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps(RECORDS[0]) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        create_dataloader_from_examples(file, tokenizer.load("bytes"))
    assert str(caught.value).startswith(f"{file}{expected}")
    assert "on_bad_row" not in str(caught.value)  # no setting of these loaders


def test_a_record_in_memory_that_cannot_be_used_is_named_by_its_number():
    with pytest.raises(UserError, match="record 1: no key output"):
        GPTDatasetExamples([RECORDS[0], {"instruction": "a"}], tokenizer.load("bytes"))


def test_no_input_is_an_empty_input(tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text('{"instruction": "a", "input": null, "output": "b"}\n{"instruction": "a", "output": "b"}\n')
    items = create_dataloader_from_examples(file, tokenizer.load("bytes")).dataset
    assert items[0] == items[1] == GPTDatasetExamples([RECORDS[0] | {"instruction": "a", "output": "b"}],
                                                      tokenizer.load("bytes"))[0]  # fmt: skip


def test_rows_that_max_length_cuts_are_counted_in_one_line(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("gpt"), "propagate", True)  # console.setup() turns it off
    lengths = [len(ids) for ids, _ in GPTDatasetExamples(RECORDS, tokenizer.load("bytes"))]
    limit = sorted(lengths)[6]
    create_dataloader_from_examples(RECORDS, tokenizer.load("bytes"), max_length=limit)
    assert caplog.messages == [f"3 of 10 examples are longer than {limit} tokens and are cut there"]
    caplog.clear()
    create_dataloader_from_examples(RECORDS, tokenizer.load("bytes"), max_length=max(lengths))
    assert caplog.messages == []


def simple_loaders(n_train=96, shuffle=True):
    tokens = tokenizer.load("bytes")
    text = "the quick brown fox jumps over the lazy dog. " * 100
    train = GPTDatasetV1(text[: 8 * n_train * 2 + 1], tokens, 8, 8)
    assert len(train) == 2 * n_train
    generator = torch.Generator().manual_seed(5)
    return (
        DataLoader(train, batch_size=2, shuffle=shuffle, generator=generator),
        DataLoader(GPTDatasetV1(text[-200:], tokens, 8, 8), batch_size=2, generator=torch.Generator()),
    )


def simple_run(eval_freq, eval_iter, num_epochs=2):
    torch.manual_seed(1)
    model = GPT(model_config(), 257)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train, val = simple_loaders()
    start = "the quick"
    results = train_model_simple(
        model, train, val, optimizer, "cpu", num_epochs, eval_freq, eval_iter, start, tokenizer.load("bytes")
    )
    return results, torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_notebooks_loop_evaluates_at_steps_0_5_10_and_so_on(capsys):
    (train_losses, val_losses, tokens_seen), _ = simple_run(eval_freq=5, eval_iter=1)
    assert len(train_losses) == len(val_losses) == len(tokens_seen) == 39  # of 192 batches
    assert tokens_seen[:2] == [16, 96]
    assert train_losses[-1] < train_losses[0] - 1
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("the quick")]) == 2


def test_how_often_the_notebooks_loop_evaluates_changes_no_weight(capsys):
    assert torch.equal(simple_run(eval_freq=5, eval_iter=3)[1], simple_run(eval_freq=50, eval_iter=1)[1])


@pytest.mark.parametrize(
    "encoder", [tokenizer.load("gpt2"), tokenizer.load("gpt2").encoding], ids=["gpt.tokenizer", "tiktoken"]
)
def test_text_becomes_a_row_of_ids_and_back(encoder):
    ids = text_to_token_ids("Every effort moves you", encoder)
    assert ids.tolist() == [[6109, 3626, 6100, 345]]
    assert token_ids_to_text(ids, encoder) == token_ids_to_text(ids[0], encoder) == "Every effort moves you"


def test_text_that_looks_like_a_control_token_is_text_with_tiktoken_too():
    encoding: tiktoken.Encoding = tokenizer.load("gpt2").encoding
    with pytest.raises(ValueError, match="disallowed special token"):
        encoding.encode("<|endoftext|>")
    assert 50256 not in text_to_token_ids("<|endoftext|>", encoding)


def test_generate_text_simple_takes_any_module_and_any_batch_and_crops_to_the_context():
    class AddOne(nn.Module):
        """The likeliest next token is the last one plus one; refuses more tokens than its context."""

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            assert ids.shape[1] <= 4
            return nn.functional.one_hot((ids + 1) % 10, 10).float()

    rows = generate_text_simple(AddOne(), torch.tensor([[1, 2, 3], [7, 8, 9]]), max_new_tokens=4, context_size=4)
    assert rows.tolist() == [[1, 2, 3, 4, 5, 6, 7], [7, 8, 9, 0, 1, 2, 3]]
