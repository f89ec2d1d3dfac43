"""The notebook's loaders, against the reference values of the book's own text."""

import json

import pytest
import torch
from conftest import THE_VERDICT
from torch.utils.data import DataLoader

from gpt import tokenizer
from gpt.errors import UserError
from gpt.examples import GPTDatasetExamples, GPTDatasetV1, collate_examples, create_dataloader_from_examples

RECORDS = [{"instruction": f"Say {word}.", "input": "", "output": word * n} for n, word in enumerate("abcdefghij", 1)]


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
