"""The real GPT-2, which no test machine can download: GPT2_WEIGHTS_DIR names a folder with what there is of

    gpt2/ gpt2-medium/ gpt2-large/ gpt2-xl/    directories of the Hugging Face hub
    124M/ 355M/ 774M/ 1558M/                   OpenAI's TensorFlow files

Without it everything here is skipped, and so is whatever needs a directory that is not in it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, THE_VERDICT
from torch.utils.data import DataLoader

from gpt import loop, tokenizer
from gpt.machine.machine import Machine
from gpt.model import GPT
from gpt.notebook import GPTDatasetV1, as_batch
from gpt.objective import NEXT_TOKEN
from gpt.weights import loading, locate, weight_files

FOLDER = os.environ.get("GPT2_WEIGHTS_DIR")
SAME = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}
N_PARAMETERS = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
# Mean losses on the-verdict.txt, training and validation (90 % and 10 % of its characters), in windows of 256 tokens.
LOSSES = {"gpt2": (3.7547, 3.5596), "gpt2-xl": (3.3046, 3.1195)}
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not FOLDER, reason="set GPT2_WEIGHTS_DIR")


def folder(name: str) -> Path:
    """Of some weights; skips the test if they are not there."""
    path = Path(FOLDER) / name
    if not path.is_dir():
        pytest.skip(f"no {name} in GPT2_WEIGHTS_DIR")
    return path


def load(name: str) -> GPT:
    return loading.load(str(folder(name)), ROOT, CPU).model


def both(names: dict) -> list[str]:
    """Names on the hub, and OpenAI's for the same."""
    return [each for name in names for each in (name, SAME[name])]


def test_the_folder_has_some_gpt2_in_it():
    assert any((Path(FOLDER) / name).is_dir() for name in both(SAME)), f"none of {both(SAME)} in {FOLDER}"


@pytest.mark.skipif(not THE_VERDICT.exists(), reason=f"{THE_VERDICT.name} is not beside the repository")
@pytest.mark.parametrize("name", both(LOSSES))
def test_the_losses_on_the_verdict_are_those_that_the_book_prints(name):
    model, tokens = load(name), tokenizer.load("gpt2")
    text = THE_VERDICT.read_text(encoding="utf-8")
    end = int(0.9 * len(text))
    losses = []
    for part, is_train in ((text[:end], True), (text[end:], False)):
        windows = GPTDatasetV1(part, tokens, max_length=256, stride=256)
        batches = [as_batch(*pair) for pair in DataLoader(windows, batch_size=2, drop_last=is_train)]
        assert len(batches) == (9 if is_train else 1)  # of equal sizes: the mean of their means is that of all targets
        losses.append(loop.evaluate(model, NEXT_TOKEN, batches, Machine(CPU))["val/loss"])
    expected = LOSSES[name if name in LOSSES else next(hub for hub, openai in SAME.items() if openai == name)]
    assert losses == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", SAME)
def test_openais_files_and_those_of_the_hub_have_equal_weights(name):
    first, second = (weight_files.read(locate.find(str(folder(each)), None, ROOT)) for each in (name, SAME[name]))
    assert first.architecture.n_layer == second.architecture.n_layer
    names = first.tensors.keys() - {"lm_head.weight"}
    assert names == second.tensors.keys()
    for each in names:
        ([a], [b]) = first.tensors[each], second.tensors[each]
        assert torch.equal(a, b), each


@pytest.mark.parametrize("name", both(SAME))
def test_a_model_has_the_parameters_that_its_size_has(name):
    hub = name if name in SAME else next(hub for hub, openai in SAME.items() if openai == name)
    assert load(name).n_parameters() == N_PARAMETERS[hub]


PROGRAM = """
import sys, time
from pathlib import Path
import torch
from gpt import tokenizer
from gpt.machine import free_memory
from gpt.weights import loading
tokenizer.load("gpt2")
before, started = free_memory.peak(), time.perf_counter()
model = loading.load(sys.argv[1], Path("."), torch.device("cpu")).model
print(time.perf_counter() - started, (free_memory.peak() - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.parametrize(("name", "seconds"), [("gpt2", 2), ("124M", 4)])
def test_loading_the_smallest_takes_seconds_and_hardly_more_memory_than_its_weights(name, seconds, record_property):
    command = [sys.executable, "-c", PROGRAM, str(folder(name))]
    runs = [subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout for _ in range(3)]
    times, ratios = zip(*(map(float, run.split()) for run in runs), strict=True)
    record_property("count", f"{name}: loaded in {min(times):.2f} s with {max(ratios):.3f} x the memory of its weights")
    assert min(times) < seconds and max(ratios) < 1.2
