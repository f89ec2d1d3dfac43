"""Token files -> batches."""

import io
import json
import os
import re
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REAL_MEDQUAD, ROOT, data_config, made_split, model_config, run_config, train_section
from test_token_files import write
from torch.nn import functional as F

from gpt.data import preparation, token_files
from gpt.data.batching import (
    IGNORE,
    Cut,
    Split,
    TrainBatches,
    collate,
    count_steps,
    eval_batches,
    eval_segments,
    open_batches,
)
from gpt.data.prepared import Prepared
from gpt.errors import UserError
from gpt.model import GPT
from gpt.objective import NEXT_TOKEN

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


@pytest.mark.parametrize("batching", ["packed", "bucketed", "padded"])
def test_the_rows_that_processes_share_are_together_those_of_one_and_some_may_have_none(batching):
    split, train = made_split(LENGTHS), train_section(tokens_per_step=32, micro_batch=1)
    whole = batches_of(split, batching, train=train, mask="all")
    n = 4
    shares = [lambda rows, r=r: rows[r * len(rows) // n : (r + 1) * len(rows) // n] for r in range(n)]
    parts = [TrainBatches(split, data_config(batching=batching, mask="all"), 16, train, 0, share) for share in shares]
    for step in range(2 * whole.steps_per_epoch):
        computed = [part.step(step) for part in parts]
        expected = sorted(pair for batch in whole.step(step) for pair in pairs(batch))
        assert sorted(pair for batches in computed for batch in batches for pair in pairs(batch)) == expected
        assert {part.documents(step) == whole.documents(step) for part in parts} == {True}
    assert [] in computed


@pytest.mark.parametrize(("batching", "changes"), [("packed", {}), ("bucketed", {}), ("packed", {"kind": "text"})])
def test_half_of_the_steps_have_no_more_rows_than_rows_in_step(batching, changes):
    batches = batches_of(made_split(LENGTHS * 3), batching, train=train_section(tokens_per_step=32), **changes)
    rows = [sum(len(batch.inputs) for batch in batches.step(n)) for n in range(batches.steps_per_epoch)]
    assert batches.rows_in_step == int(np.median(rows))


def test_targets_are_inputs_shifted_by_one_and_prompts_are_not_scored():
    split = made_split([6], prompt=3)
    batch = collate(split.ids, Cut(split, 16, "response", "split"), [[0]])
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


def losses_of_tokens(model, batch):
    """{id of a target: its loss}, for documents in which no id comes twice."""
    with torch.no_grad():
        logits = model(batch.inputs, batch.positions, batch.documents)
    losses = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="none")
    scored = batch.targets.flatten() != IGNORE
    return dict(zip(batch.targets.flatten()[scored].tolist(), losses[scored].tolist(), strict=True))


@pytest.mark.parametrize("batching", ["packed", "bucketed", "padded"])
@pytest.mark.parametrize("mask", ["response", "all"])
def test_each_token_has_the_loss_that_it_has_in_a_row_of_its_own(batching, mask):
    """Documents of one row do not attend to each other and count their positions from 0; padding is not seen."""
    lengths = np.random.default_rng(0).integers(4, 64, 60)
    split = made_split(lengths.tolist())
    split.ids[:] = np.arange(len(split.ids))
    model = GPT(model_config(context_length=64, n_embd=32), len(split.ids))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that a look at the wrong token would show
    model.eval()
    batches = batches_of(split, batching, context_length=64, mask=mask, train=train_section(tokens_per_step=256))
    together = {}
    for step in range(batches.steps_per_epoch):
        for batch in batches.step(step):
            together |= losses_of_tokens(model, batch)
    alone = {}
    for i in range(len(batches.segments)):
        alone |= losses_of_tokens(model, collate(split.ids, batches.segments, [[i]]))
    assert together.keys() == alone.keys() and np.std(list(alone.values())) > 0.5
    assert max(abs(together[token] - alone[token]) for token in alone) < 1e-5


def test_padding_changes_no_loss():
    split = made_split([5, 9, 4, 12])
    model = GPT(model_config(), 50).eval()
    segments = Cut(split, 16, "all", "split")
    together = collate(split.ids, segments, [[0], [1], [2], [3]])
    with torch.no_grad():
        alone = sum(NEXT_TOKEN.loss(model, collate(split.ids, segments, [[i]]))[0] for i in range(4))
        assert torch.allclose(NEXT_TOKEN.loss(model, together)[0], alone, rtol=1e-6)


def text_of(n_tokens):
    """Running text in which the n-th token is n."""
    ids = np.arange(n_tokens, dtype=np.uint16)
    return Split(ids, np.array([[0, 0, n_tokens]]), "train")


@pytest.mark.parametrize("n_tokens", [17, 18, 160, 161, 1000])
def test_every_window_of_a_text_comes_once_in_an_epoch_and_in_another_order_in_the_next(n_tokens):
    batches = batches_of(text_of(n_tokens), "packed", kind="text", mask="all")
    epochs = []
    for epoch in range(2):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        rows = [row for step in steps for batch in batches.step(step) for row in batch.targets]
        targets = torch.cat([row[row != IGNORE] for row in rows]).tolist()
        assert sorted(targets) == list(range(1, n_tokens))
        epochs.append([int(row[0]) for row in rows])
    assert epochs[0] != epochs[1] or n_tokens < 100


def shapes_of_an_epoch(batches):
    """The distinct shapes of an epoch's batches, with and without a mask of documents; the share of padding."""
    shapes, tokens, slots = set(), 0, 0
    for step in range(batches.steps_per_epoch):
        for batch in batches.step(step):
            shapes.add((tuple(batch.inputs.shape), batch.documents is None))
            tokens += batch.n_tokens
            slots += batch.inputs.numel()
    return shapes, 1 - tokens / slots


def check_the_default_batching(directory, context_length, most_padding):
    """Packed batches have one shape but for the last micro-batch of a step and the last step of an epoch. Each of these
    three may be without several documents in a row, and so without a mask."""
    split = Split.open(directory, "train")
    for tokens_per_step, micro_batch in ((8 * context_length, 8), (16 * context_length, 8), (11 * context_length, 4)):
        train = train_section(tokens_per_step=tokens_per_step, micro_batch=micro_batch)
        shapes, padding = shapes_of_an_epoch(batches_of(split, "packed", context_length, train=train))
        assert {width for (_, width), _ in shapes} == {context_length}
        assert len({shape for shape, _ in shapes}) <= 3 and len(shapes) <= 6
        assert padding < most_padding


def test_packed_batches_of_the_sample_have_three_shapes_at_most_and_hardly_any_padding(tmp_path):
    """What torch.compile sees. An epoch of the sample has few rows, the last of which is not full."""
    cfg = data_config(name="sample", path=str(ROOT / "gpt" / "sample.csv"), tokenizer="gpt2")
    check_the_default_batching(preparation.prepare(cfg, tmp_path).folder, 128, most_padding=0.02)


@pytest.mark.exhaustive
def test_packed_batches_of_the_real_medquad_have_three_shapes_at_most_and_under_two_percent_of_padding(tmp_path):
    cfg = data_config(name="medquad", path=str(REAL_MEDQUAD), tokenizer="gpt2", max_tokens=1024)
    directory = preparation.prepare(cfg, tmp_path).folder
    for context_length in (256, 512, 1024):
        check_the_default_batching(directory, context_length, most_padding=0.01)


@pytest.mark.exhaustive
def test_an_epoch_of_packed_batches_and_an_evaluation_compile_six_graphs_at_most(tmp_path, record_property):
    """torch.compile makes one for the first shape and one for all others: in training with and without a mask of
    documents, and in evaluation."""
    from torch._dynamo.utils import counters

    cfg = data_config(name="sample", path=str(ROOT / "gpt" / "sample.csv"), tokenizer="gpt2")
    train_split, val_split = (Split.open(preparation.prepare(cfg, tmp_path).folder, name) for name in ("train", "val"))
    train = train_section(tokens_per_step=11 * 128, micro_batch=4, eval_tokens=4096)
    batches = batches_of(train_split, "packed", 128, train=train)
    model = GPT(model_config(context_length=128), 50257)
    torch.compiler.reset()
    counters.clear()
    for block in model.h:
        block.compile(backend="eager")  # only counts: nothing is generated
    for step in range(batches.steps_per_epoch):
        for batch in batches.step(step):
            model.hidden(batch.inputs, batch.positions, batch.documents)
    model.eval()
    with torch.no_grad():
        for batch in eval_batches(val_split, cfg, 128, train):
            model.hidden(batch.inputs, batch.positions, batch.documents)
    graphs = counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 6
    record_property("count", f"an epoch of packed batches of the sample and an evaluation: {graphs} graphs compiled")


def test_rows_longer_than_the_context_are_split_truncated_or_dropped_and_always_counted():
    split = made_split([40, 10], prompt=3)
    for overflow, lengths in {"split": [16, 16, 7, 9], "truncate": [16, 9], "drop": [9]}.items():
        segments = Cut(split, 16, "all", overflow)
        assert segments.lengths.tolist() == lengths
        assert segments.counts["longer"] == 1
    description = batches_of(split, "packed", overflow="drop").describe()
    assert "1 document longer than the context: dropped" in description


def test_a_segment_that_holds_only_prompt_is_left_out_and_counted():
    split = made_split([40, 10], prompt=20)  # the first document's first 16 inputs predict nothing but prompt
    segments = Cut(split, 16, "response", "split")
    assert segments.counts["unscored"] == 2  # that piece, and the second document, which is all prompt
    every = segments.take(np.arange(len(segments)))
    assert (every.scored_from < every.end).all()


def pieces_of(documents, context_length, mask, overflow):
    """The definition of cutting, a piece at a time: (start, scored_from, end) of each."""
    for start, response, end in documents.tolist():
        firsts = range(start, end - 1, context_length)
        firsts = firsts[: {"split": None, "truncate": 1, "drop": 0 if len(firsts) > 1 else None}[overflow]]
        for first in firsts:
            last = min(end, first + context_length + 1)
            scored_from = max(first + 1, response) if mask == "response" else first + 1
            if scored_from < last:
                yield first, scored_from, last


@pytest.mark.parametrize("mask", ["response", "all"])
@pytest.mark.parametrize("overflow", ["split", "truncate", "drop"])
def test_computed_segments_are_those_that_cutting_one_by_one_gives(mask, overflow):
    rng = np.random.default_rng(0)
    for context_length in (1, 2, 7, 16, 200):
        lengths = rng.integers(1, 80, 300)
        split = made_split(lengths.tolist())
        split.documents[:, 1] = split.documents[:, 0] + rng.integers(0, lengths + 1)  # prompts of any length
        expected = np.array(list(pieces_of(split.documents, context_length, mask, overflow)))
        segments = Cut(split, context_length, mask, overflow)
        assert len(segments) == len(expected)
        some = rng.permutation(len(expected))[:50]
        assert np.array_equal(np.stack(segments.take(some), axis=1), expected[some])
        document = np.searchsorted(split.documents[:, 2], expected[some, 0], side="right")
        assert np.array_equal(segments.document(some), document)


def test_a_batch_is_what_copying_segment_by_segment_into_its_rows_gives():
    rng = np.random.default_rng(0)
    split = made_split(rng.integers(2, 30, 40).tolist())
    segments = Cut(split, 16, "response", "split")
    rows = np.split(rng.permutation(len(segments))[:24], [1, 5, 6, 14])
    batch = collate(split.ids, segments, rows, 256)
    expected = {name: torch.full((5, 256), padding) for name, padding in
                {"inputs": 0, "targets": IGNORE, "positions": 0, "documents": -1}.items()}  # fmt: skip
    for b, row in enumerate(rows):
        at = 0
        for number, (start, scored_from, end) in enumerate(zip(*segments.take(row), strict=True)):
            for i in range(start, end - 1):
                expected["inputs"][b, at] = int(split.ids[i])
                expected["targets"][b, at] = int(split.ids[i + 1]) if i + 1 >= scored_from else IGNORE
                expected["positions"][b, at], expected["documents"][b, at] = i - start, number
                at += 1
    for name, tensor in expected.items():
        assert torch.equal(getattr(batch, name), tensor), name
    assert batch.n_tokens == (expected["documents"] >= 0).sum()
    assert batch.n_targets == (expected["targets"] != IGNORE).sum()


def test_no_segment_left_is_an_error_that_names_both_numbers():
    with pytest.raises(UserError, match=r"longest of 40 tokens.*context_length 16") as caught:
        Cut(made_split([40, 30]), 16, "all", "drop")
    assert caught.value.code == 2
    with pytest.raises(UserError, match="no segment"):
        Cut(made_split([10, 9], prompt=10), 16, "response", "split")


def test_a_text_shorter_than_one_window_is_an_error_that_names_both_numbers():
    assert batches_of(made_split([17], prompt=0), "packed", kind="text", mask="all")
    with pytest.raises(UserError, match=r"the text has 16 tokens .* model.context_length 16"):
        batches_of(made_split([16], prompt=0), "packed", kind="text", mask="all")


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


def test_a_token_id_outside_the_vocabulary_is_an_error(tmp_path):
    for name, largest in (("train", 29), ("val", 30)):
        write(tmp_path, name, ([], [1, largest, 2]))
    with pytest.raises(UserError, match=r"token id 30 in split val .*vocabulary of 30"):
        open_batches(Prepared(tmp_path, {}), run_config({}, 1), 30)


def sparse_text(directory, n_tokens):
    """Prepared running text of any length that takes no space: one document of zeros."""
    directory.mkdir()
    for name in ("train", "val"):
        (directory / f"{name}.bin").touch()
        os.truncate(directory / f"{name}.bin", 2 * n_tokens)
        np.save(directory / f"{name}.index.npy", np.array([[0, 0, n_tokens]]))
    return directory


def use(directory):
    """Opens prepared text, reads some steps of two epochs and what is evaluated: everything but the vocabulary."""
    train, val = (Split.open(directory, name) for name in ("train", "val"))
    cfg = data_config(kind="text", mask="all")
    batches = TrainBatches(train, cfg, 256, train_section(tokens_per_step=1024), 0)
    last = batches.steps_per_epoch - 1
    read = [batches.step(step) for step in (0, 1, last // 2, last, last + 1)]
    assert sum(len(batch.inputs) for step in read for batch in step) > 16
    return batches.steps_per_epoch, eval_batches(val, cfg, 256, train_section(eval_tokens=4096))


def test_a_text_of_four_billion_tokens_takes_no_more_memory_than_one_of_a_hundred_thousand(tmp_path, record_property):
    peaks, steps = [], []
    for name, n_tokens in (("small", 100_000), ("small again", 100_000), ("huge", 4_000_000_000)):
        tracemalloc.start()
        try:
            n_steps, _ = use(sparse_text(tmp_path / name, n_tokens))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        steps.append(n_steps)
    assert steps[2] > 30_000 * steps[1]
    assert peaks[2] < peaks[1] + 20_000
    record_property("count", f"4e9 tokens of text: {peaks[2]:,} bytes allocated at most, for 1e5 tokens {peaks[1]:,}")


def resident_kb(path):
    """KiB of a file that are mapped into memory and count as this process's."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(f" {path}")
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what is resident")
def test_tokens_that_were_read_do_not_stay_in_the_memory_of_the_process(tmp_path):
    path = sparse_text(tmp_path / "text", 10_000_000) / "train.bin"
    split = Split.open(path.parent, "train")
    assert int(split.ids[::64].sum()) == 0 and resident_kb(path) > 15_000  # without anybody letting go: 20 MB
    assert token_files.largest_id(path.parent, "train") == 0
    split.release()
    assert resident_kb(path) == 0
    batches = batches_of(split, "packed", 256, kind="text", mask="all", train=train_section(tokens_per_step=2**20))
    batches.step(0)
    assert resident_kb(path) == 0


MEASURE = """
import json, sys, time
started = time.perf_counter()
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from conftest import adamw_config, data_config, model_config, schedule_config, train_section
from gpt import loop, optim
from gpt.data import batching, token_files
from gpt.machine import free_memory
from gpt.machine.machine import Machine
from gpt.model import GPT
from gpt.objective import NEXT_TOKEN
from gpt.progress import Progress
from types import SimpleNamespace
torch.set_num_threads(1)

train = train_section(tokens_per_step=512, micro_batch=4, max_steps=20, eval_every=10, eval_tokens=1024)
cfg = data_config(kind="text", mask="all")
imported = time.perf_counter()
splits = [batching.Split.open(Path(sys.argv[1]), name) for name in ("train", "val")]
for split in splits:
    token_files.largest_id(Path(sys.argv[1]), split.name)
validation = batching.eval_batches(splits[1], cfg, 128, train)
batches = batching.Batches(batching.TrainBatches(splits[0], cfg, 128, train, 0), validation, None, 20, "")
model = GPT(model_config(context_length=128, n_embd=64), 257)
optimizer = optim.build(model, adamw_config())
opened = time.perf_counter()
run, cpu = SimpleNamespace(train=train, schedule=schedule_config(), seed=0), Machine(torch.device("cpu"))
for event in loop.fit(model, optimizer, NEXT_TOKEN, batches, run, cpu, Progress()):
    pass
assert event.progress.step == 20
anonymous = [int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous:")][0]
peak = free_memory.peak() // 1024
print(json.dumps({"peak": peak, "anonymous": anonymous, "open_seconds": opened - imported}))
"""


@pytest.mark.exhaustive
def test_a_run_on_two_gigabytes_of_tokens_needs_the_memory_of_one_on_twenty_megabytes(tmp_path, record_property):
    used = {}
    for name, n_tokens in (("20 MB", 10**7), ("2 GB", 10**9)):
        directory = sparse_text(tmp_path / name, n_tokens)
        command = [sys.executable, "-c", MEASURE, str(directory), str(ROOT / "tests")]
        runs = [subprocess.run(command, capture_output=True, text=True, cwd=ROOT) for _ in range(3)]
        assert all(run.returncode == 0 for run in runs), runs[0].stderr
        measured = [json.loads(run.stdout) for run in runs]
        used[name] = {key: sorted(m[key] for m in measured)[1] for key in measured[0]}
    for key in ("peak", "anonymous"):
        assert abs(used["2 GB"][key] - used["20 MB"][key]) < 16_000, used  # KiB, of about 400,000
    record_property("count", f"20 steps on token files of 20 MB and 2 GB, in KiB: {used}")


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
    write(tmp_path, "val", ([5, 6], [7]), ([8, 9], []))
    write(tmp_path, "test")
    split = Split.open(tmp_path, "val")
    assert split.ids.tolist() == [5, 6, 7, 8, 9] and split.documents.tolist() == [[0, 2, 3], [3, 5, 5]]
    assert Split.open(tmp_path, "test").documents.shape == (0, 3)


def test_a_missing_token_file_is_an_error_with_its_name(tmp_path):
    with pytest.raises(UserError, match=r"cannot read val\.bin \(.*No such file") as caught:
        Split.open(tmp_path, "val")
    assert caught.value.code == 2


BUDGET_LENGTHS = [5, 9, 17, 4, 30, 12, 8, 8, 6, 21, 7, 11] * 3


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"max_steps": 7}, (7, "train.max_steps")),
        ({"max_steps": None, "max_epochs": 2}, (2, "train.max_epochs")),  # in epochs of this split, see below
        ({"max_steps": None, "max_tokens": 640}, (10, "train.max_tokens")),
        ({"max_steps": 7, "max_tokens": 64}, (7, "train.max_steps")),
    ],
)
def test_the_budget_is_steps_or_epochs_or_else_tokens(budget, steps):
    train = train_section(**budget)
    batches = TrainBatches(made_split(BUDGET_LENGTHS), data_config(), 16, train, 0)
    factor = batches.steps_per_epoch if "epochs" in steps[1] else 1
    assert count_steps(train, batches) == (steps[0] * factor, steps[1])


@pytest.mark.parametrize(
    ("batching", "mask"),
    [(b, m) for b in ("packed", "bucketed", "padded") for m in ("response", "all")] + [("text", "all")],
)
def test_a_budget_in_tokens_is_the_same_for_every_context_length_whatever_padding_that_leaves(batching, mask):
    """Counted in the batches themselves, over parts of an epoch and over several."""
    lengths = np.random.default_rng(7).integers(4, 150, 200).tolist()
    if batching == "text":
        split, changes = made_split([sum(lengths)], prompt=0), {"kind": "text"}
    else:
        split, changes = made_split(lengths), {"batching": batching}
    found = {}
    for context_length in (16, 32, 64):
        train = train_section(max_steps=None, tokens_per_step=256, micro_batch=100)
        batches = TrainBatches(split, data_config(mask=mask, **changes), context_length, train, 0)
        tokens: list[int] = []  # of each step
        for max_tokens in (1000, 5000, 12_345, 30_000):
            steps, key = count_steps(replace(train, max_tokens=max_tokens), batches)
            tokens += [sum(batch.n_tokens for batch in batches.step(step)) for step in range(len(tokens), steps)]
            found[context_length, max_tokens] = read = sum(tokens)
            assert key == "train.max_tokens" and abs(read - max_tokens) <= 256, f"{read} of {max_tokens}: {found}"
    assert len(found) == 12


def test_a_run_without_a_budget_is_an_error():
    train = train_section(max_steps=None)
    with pytest.raises(UserError, match="needs a budget"):
        count_steps(train, TrainBatches(made_split(BUDGET_LENGTHS), data_config(), 16, train, 0))
