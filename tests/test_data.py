"""Token files -> batches."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_config, made_split, model_config, train_section

from gpt import tokenfiles
from gpt.data import IGNORE, Split, TrainBatches, collate, cut, eval_batches, eval_segments, limit_slots, pack
from gpt.errors import UserError
from gpt.loop import batch_loss
from gpt.model import GPT

LENGTHS = [5, 9, 17, 4, 30, 12, 8, 8, 6, 21, 7, 11]  # some longer than a context of 16


def batches_of(split, batching, context_length=16, seed=0, train=None, **data):
    cfg = data_config(batching=batching, **data)
    return TrainBatches(split, cfg, context_length, train or train_section(), seed)


def pairs(batch):
    """All (input, target) pairs of a batch that are scored."""
    scored = batch.targets != IGNORE
    return sorted(zip(batch.inputs[scored].tolist(), batch.targets[scored].tolist(), strict=True))


def epoch_pairs(batches, epoch=0):
    first = epoch * batches.steps_per_epoch
    steps = range(first, first + batches.steps_per_epoch)
    return sorted(pair for step in steps for batch in batches.step(step) for pair in pairs(batch))


def test_targets_are_inputs_shifted_by_one_and_prompts_are_not_scored():
    split = made_split([6], prompt=3)
    batch = collate(split.ids, cut(split, 16, "response", "split")[0], [[0]])
    ids = split.ids.tolist()
    assert batch.inputs.tolist() == [ids[:5]]
    assert batch.targets.tolist() == [[IGNORE, IGNORE, *ids[3:]]]
    assert (batch.n_tokens, batch.n_targets) == (5, 3)


@pytest.mark.parametrize("batching", ["packed", "bucketed", "padded"])
@pytest.mark.parametrize("mask", ["response", "all"])
def test_every_target_of_an_epoch_comes_exactly_once(batching, mask):
    split = made_split(LENGTHS)
    expected = []
    for start, response, end in split.documents.tolist():
        first = response if mask == "response" else start + 1
        expected += [(int(split.ids[i - 1]), int(split.ids[i])) for i in range(first, end)]
    batches = batches_of(split, batching, mask=mask)
    assert epoch_pairs(batches) == sorted(expected)
    assert epoch_pairs(batches, epoch=3) == sorted(expected)


@pytest.mark.parametrize("batching", ["packed", "bucketed", "padded"])
def test_a_batch_depends_on_nothing_but_seed_epoch_and_step(batching):
    split = made_split(LENGTHS * 5)
    one, other, another_seed = (batches_of(split, batching, seed=seed) for seed in (1, 1, 2))
    steps = list(range(2 * one.steps_per_epoch))
    forward = {step: one.step(step) for step in steps}
    for step in reversed(steps):  # asked for in another order
        for a, b in zip(forward[step], other.step(step), strict=True):
            assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
    n = one.steps_per_epoch
    assert any(not torch.equal(forward[s][0].inputs, another_seed.step(s)[0].inputs) for s in range(n))
    assert any(not torch.equal(forward[s][0].inputs, forward[s + n][0].inputs) for s in range(n))


@pytest.mark.parametrize("batching", ["bucketed", "padded"])
def test_a_step_holds_tokens_per_step_give_or_take_a_segment(batching):
    split = made_split(np.random.default_rng(0).integers(4, 17, 400).tolist())
    batches = batches_of(split, batching, train=train_section(tokens_per_step=160))
    tokens = [sum(b.n_tokens for b in batches.step(s)) for s in range(batches.steps_per_epoch)]
    assert np.allclose(tokens, 160, atol=17)


def test_a_packed_step_is_tokens_per_step_divided_by_the_context_length_rows_in_micro_batches():
    split = made_split(np.random.default_rng(0).integers(4, 17, 400).tolist())
    batches = batches_of(split, "packed", train=train_section(tokens_per_step=160, micro_batch=4))
    assert [tuple(batch.inputs.shape) for batch in batches.step(0)] == [(4, 16), (4, 16), (2, 16)]


@pytest.mark.parametrize("batching", ["bucketed", "padded"])
def test_every_step_has_a_segment_even_when_one_document_fills_a_step(batching):
    batches = batches_of(made_split([17, 17, 5, 17, 17, 4, 17]), batching, train=train_section(tokens_per_step=16))
    assert all(batches.step(step) for step in range(batches.steps_per_epoch))


def test_packing_leaves_less_than_two_percent_of_padding_on_lengths_like_medquads():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.2, 0.9, 5000), 30, 1024).astype(int)  # median 181 tokens, as measured
    rows = pack(lengths, 1024, rng)
    assert sorted(s for row in rows for s in row) == list(range(5000))
    assert max(lengths[row].sum() for row in rows) <= 1024
    assert 1 - lengths.sum() / (len(rows) * 1024) < 0.02


def test_the_packed_loss_per_token_is_the_unpacked_one():
    """Documents of one row do not attend to each other and count their positions from 0."""
    split = made_split([5, 9, 4, 12, 8, 8, 6, 7, 11])
    model = GPT(model_config(context_length=32), 50).eval()
    segments, _ = cut(split, 32, "response", "split")
    n = len(segments.start)
    packed = collate(split.ids, segments, pack(segments.lengths, 32, np.random.default_rng(0)), 32)
    assert packed.inputs.shape[0] < n
    alone = [collate(split.ids, segments, [[i]]) for i in range(n)]
    with torch.no_grad():
        packed_loss = batch_loss(model, packed) / packed.n_targets
        unpacked_loss = sum(batch_loss(model, batch) for batch in alone) / sum(batch.n_targets for batch in alone)
    assert abs(packed_loss - unpacked_loss) < 1e-5


def test_padding_changes_no_loss():
    split = made_split([5, 9, 4, 12])
    model = GPT(model_config(), 50).eval()
    segments, _ = cut(split, 16, "all", "split")
    together = collate(split.ids, segments, [[0], [1], [2], [3]])
    with torch.no_grad():
        alone = sum(batch_loss(model, collate(split.ids, segments, [[i]])) for i in range(4))
        assert torch.allclose(batch_loss(model, together), alone, rtol=1e-6)


def test_rows_longer_than_the_context_are_split_truncated_or_dropped_and_always_counted():
    split = made_split([40, 10], prompt=3)
    for overflow, lengths in {"split": [16, 16, 7, 9], "truncate": [16, 9], "drop": [9]}.items():
        segments, counts = cut(split, 16, "all", overflow)
        assert segments.lengths.tolist() == lengths
        assert counts["longer"] == 1
    description = batches_of(split, "packed", overflow="drop").describe()
    assert "1 documents longer than the context: dropped" in description


def test_a_segment_that_holds_only_prompt_is_left_out_and_counted():
    split = made_split([40, 10], prompt=20)  # the first document's first 16 inputs predict nothing but prompt
    segments, counts = cut(split, 16, "response", "split")
    assert counts["unscored"] == 2  # that piece, and the second document, which is all prompt
    assert (segments.scored_from < segments.end).all()


def test_no_segment_left_is_an_error_that_names_both_numbers():
    with pytest.raises(UserError, match=r"longest of 40 tokens.*context_length 16") as caught:
        cut(made_split([40, 30]), 16, "all", "drop")
    assert caught.value.code == 2
    with pytest.raises(UserError, match="no segment"):
        cut(made_split([10, 9], prompt=10), 16, "response", "split")


def test_a_text_shorter_than_one_window_is_an_error_that_names_both_numbers():
    assert batches_of(made_split([17], prompt=0), "packed", kind="text", mask="all")
    with pytest.raises(UserError, match=r"the text has 16 tokens .* model.context_length 16"):
        batches_of(made_split([16], prompt=0), "packed", kind="text", mask="all")


def test_rows_times_the_longest_row_stay_within_the_slots():
    lengths = [3, 3, 9, 2, 2, 2, 2, 16, 16, 1]
    groups = limit_slots(lengths, 18)
    assert [i for group in groups for i in group] == list(range(len(lengths)))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 18 for g in groups)


@pytest.mark.parametrize("mask", ["response", "all"])
def test_validation_scores_the_same_tokens_once_whatever_the_context_length(mask):
    split = made_split([5, 9, 70, 4, 30, 12], prompt=4)
    scored = {}
    for context_length in (1, 2, 7, 16, 100):
        segments = eval_segments(split, context_length, mask, max_targets=90)
        assert (segments.lengths <= context_length).all()
        targets = np.concatenate([np.arange(a, b) for a, b in zip(segments.scored_from, segments.end, strict=True)])
        assert len(targets) == len(set(targets.tolist())) == 90
        scored[context_length] = sorted(targets.tolist())
    assert len({tuple(targets) for targets in scored.values()}) == 1


def test_a_scored_token_of_a_long_document_has_at_least_half_a_context_before_it():
    segments = eval_segments(made_split([100], prompt=0), 16, "all", max_targets=10**6)
    before = segments.scored_from - segments.start  # inputs that the first scored token of each window sees
    assert before.min() == 1 and (before[1:] >= 8).all()


def test_eval_batches_hold_all_scored_tokens():
    split = made_split([5, 9, 70, 4], prompt=4)
    batches = eval_batches(split, data_config(), 16, train_section(eval_tokens=60))
    assert sum(batch.n_targets for batch in batches) == 60


def test_a_token_id_outside_the_vocabulary_is_an_error():
    with pytest.raises(UserError, match=r"token id 4. .*vocabulary of 30"):
        made_split(LENGTHS, vocab_size=50).check_vocabulary(30)


def npy(array, version=(1, 0)):
    """An .npy file as bytes."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), version)
    return file.getvalue()


def npy_of_header(header):
    """An .npy file of version 1.0 without any content."""
    header = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def save(path, content):
    """Puts bytes, a larger empty file (a size in bytes) or a pipe (None) in place of a file."""
    path.unlink()
    if content is None:
        os.mkfifo(path)
    elif isinstance(content, int):
        path.touch()
        os.truncate(path, content)
    else:
        path.write_bytes(content)


HUGE = "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000, 3)}"
INDEX = np.array([[0, 1, 3], [3, 4, 7]])
NOT_AN_INDEX = {
    "empty": (b"", "not an .npy file"),
    "text": (b"0,1,3\n", "not an .npy file"),
    "a pipe": (None, "not an ordinary file"),
    "a header of 4 GiB": (b"\x93NUMPY\x03\x00\xff\xff\xff\xff", "not an .npy file of version 1.0"),
    "version 2": (npy(INDEX, version=(2, 0)), "not an .npy file of version 1.0"),
    "cut short": (npy(INDEX)[:-1], "mmap length is greater"),
    "longer than it says": (npy(INDEX) + b"more", "4 bytes too long"),
    "24 TB, it says": (npy_of_header(HUGE), "mmap length is greater"),
    "more than memory has addresses": (npy_of_header(HUGE.replace("1000000000000", "9" * 40)), ""),
    "a negative size": (npy_of_header(HUGE.replace("1000000000000", "-1")), ""),
    "a header that is no dict": (npy_of_header("__import__('os').abort()"), "malformed node"),
    "a header nested deeply": (npy_of_header("(" * 5000), ""),
    "a header of Python 2": (npy_of_header(HUGE.replace("000,", "000L,")), ""),
    "an object array of size 0": (npy_of_header(HUGE.replace("<i8", "|O").replace("1000000000000", "0")), "objects"),
    "another byte order": (npy(INDEX.astype(">i8")), ">i8 of shape (2, 3), rows of three <i8 are needed"),
    "floats": (npy(INDEX.astype("f8")), "<f8 of shape (2, 3)"),
    "a structure": (npy(np.zeros(2, "i8,i8,i8")), "rows of three"),
    "two columns": (npy(INDEX[:, :2]), "<i8 of shape (2, 2)"),
    "one dimension": (npy(INDEX[0]), "<i8 of shape (3,)"),
    "columns first": (npy(np.asfortranarray(INDEX)), "<i8 of shape (2, 3)"),
    "an end beyond the file": (npy([[0, 1, 3], [3, 4, 8]]), "do not make up the 7 tokens"),
    "the largest number": (npy([[0, 1, 3], [3, 4, 2**63 - 1]]), "do not make up the 7 tokens"),
    "a negative start": (npy([[-1, 1, 3], [3, 4, 7]]), "do not make up the 7 tokens"),
    "overlapping": (npy([[0, 1, 3], [2, 4, 7]]), "do not make up the 7 tokens"),
    "a gap": (npy([[0, 1, 3], [4, 5, 7]]), "do not make up the 7 tokens"),
    "a response before its document": (npy([[0, 1, 3], [3, 2, 7]]), "a response outside its document"),
    "a response after its document": (npy([[0, 4, 3], [3, 4, 7]]), "a response outside its document"),
    "going back": (npy([[0, 0, 9], [9, 7, 7]]), "a response outside its document"),
    "an empty document": (npy([[0, 1, 7], [7, 7, 7]]), "a response outside its document"),
    "no document": (npy(INDEX[:0]), "do not make up the 7 tokens"),
}
NOT_IDS = {
    "odd": (b"\0" * 13, "13 bytes are no whole number of ids"),
    "empty": (b"", "do not make up the 0 tokens"),
    "too long": (b"\0" * 16, "do not make up the 8 tokens"),
    "2 TB of nothing": (2**41, "do not make up the 1099511627776 tokens"),
    "a pipe": (None, "not an ordinary file"),
}


@pytest.fixture
def split_files(tmp_path) -> Path:
    np.save(tmp_path / "val.index.npy", INDEX)
    np.arange(7, dtype="<u2").tofile(tmp_path / "val.bin")
    return tmp_path


@pytest.mark.parametrize(
    "name, content, reason",
    [("val.index.npy", *case) for case in NOT_AN_INDEX.values()] + [("val.bin", *case) for case in NOT_IDS.values()],
    ids=[f"index-{case}" for case in NOT_AN_INDEX] + [f"ids-{case}" for case in NOT_IDS],
)
def test_a_token_file_that_is_damaged_or_hostile_is_an_error_with_its_name(split_files, name, content, reason):
    save(split_files / name, content)
    with pytest.raises(UserError) as caught:
        Split.open(split_files, "val")
    assert caught.value.code == 2 and " damaged (" in caught.value.what and reason in caught.value.what
    assert caught.value.where == str(split_files) and "prepare_data.py" in caught.value.remedy


def test_token_files_are_read_as_they_were_written_also_when_they_are_empty(tmp_path):
    documents = [[np.array([5, 6], np.uint16), np.array([7], np.uint16)], [np.array([8, 9], np.uint16)]]
    tokenfiles.write(tmp_path, "val", documents, response=1)
    tokenfiles.write(tmp_path, "test", [], response=1)
    split = Split.open(tmp_path, "val")
    assert split.ids.tolist() == [5, 6, 7, 8, 9] and split.documents.tolist() == [[0, 2, 3], [3, 5, 5]]
    assert Split.open(tmp_path, "test").documents.shape == (0, 3)


def test_a_missing_token_file_is_an_error_with_its_name(tmp_path):
    with pytest.raises(UserError, match=r"cannot read val\.bin \(.*No such file") as caught:
        Split.open(tmp_path, "val")
    assert caught.value.code == 2
