"""Checkpoints that several ranks write together, each its own rows. Real groups, with gloo."""

import json
import shutil

import pytest
import torch
from conftest import ROOT
from group import lines
from sharded_model import IDENTITY, Trained
from test_checkpoint import damage

from gpt.errors import UserError
from gpt.progress import Progress
from gpt.runs import checkpoint, model_file, peft_adapter
from gpt.runs.manifest import read_manifest
from gpt.weights import loading

CPU = torch.device("cpu")
PUBLISHED = """
import json
from pathlib import Path
from gpt.progress import Progress
from gpt.runs import checkpoint
from sharded_model import IDENTITY, Trained
folder = Path({folder!r})
def publish(trained, step):
    progress = Progress(step=step, tokens=10 * step, best=9.0 - step, best_step=step)
    return checkpoint.publish(folder, trained.model, trained.optimizer, progress, IDENTITY, {{"seed": 1}}, ranks=ranks)
def restored(*owners):
    trained = Trained(*owners, optimizer={optimizer!r}, seed=99)
    checkpoint.restore(checkpoint.listed(folder / "checkpoints")[-1], trained.model, trained.optimizer)
    return trained
def answer(value):
    if ranks.is_first:
        print("answer " + json.dumps(value), flush=True)
"""
TRAIN = """
trained = Trained(ranks, optimizer={optimizer!r})
before = trained.steps(0, 5)
publish(trained, 5)
after = trained.steps(5, 10)
again = restored(ranks).steps(5, 10)
answer([before, after, again])
"""
GO_ON = """
trained = restored(ranks)
answer([trained.steps(5, 10)])
"""


def answers(folder, n, body, optimizer="adamw"):
    """What the first of `n` ranks answers, in whose lines `folder` is that of a run."""
    start = PUBLISHED.format(folder=str(folder), optimizer=optimizer)
    code, output = lines(folder, n, start + body.format(optimizer=optimizer), sharded=True)
    assert code == 0, output
    (answer,) = [json.loads(line.removeprefix("answer ")) for line in output.splitlines() if line.startswith("answer ")]
    return answer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two ranks with a checkpoint of step 5, and its losses: before that, after it, and restored from it."""
    folder = tmp_path_factory.mktemp("run")
    return folder, answers(folder, 2, TRAIN, "muon")


@pytest.fixture
def copy(run, tmp_path):
    """The checkpoint, in a run of its own."""
    path = shutil.copytree(run[0] / "checkpoints" / "step_00000005", tmp_path / "checkpoints" / "step_00000005")
    return path


def restored(path, optimizer="muon"):
    trained = Trained(optimizer=optimizer, seed=99)
    assert checkpoint.restore(path, trained.model, trained.optimizer).step == 5
    return trained


def test_each_rank_writes_its_own_rows_and_goes_on_from_them_bit_for_bit(run):
    folder, (_, after, again) = run
    assert after == again
    (path,) = checkpoint.listed(folder / "checkpoints")
    assert {file.name for file in path.iterdir()} == {
        "manifest.json", "config.json", "model.1-of-2.safetensors", "model.2-of-2.safetensors",
        "state.1-of-2.safetensors", "state.2-of-2.safetensors",
    }  # fmt: skip
    assert read_manifest(path).format == 6 and checkpoint.verify(path).progress.tokens == 50
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1
    sizes = [(path / f"model.{n}-of-2.safetensors").stat().st_size for n in (1, 2)]
    assert abs(sizes[0] - sizes[1]) < 0.05 * sizes[0]


def test_one_process_goes_on_from_them(run, copy):
    _, (_, after, _) = run
    trained = restored(copy)
    assert trained.steps(5, 10) == pytest.approx(after, abs=2e-3)  # Muon: see test_sharding.py
    whole = checkpoint.publish(copy.parents[1], trained.model, trained.optimizer, Progress(10), IDENTITY, {})
    assert read_manifest(whole).format == 5


def test_they_are_loaded_as_any_other_whole_or_with_a_shorter_context(copy):
    """As generate.py, evaluate.py and init.from do."""
    expected = restored(copy).model.state_dict()
    loaded = loading.load(str(copy), ROOT, CPU)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())
    assert {path.name for path in loaded.files} == {"model.1-of-2.safetensors", "model.2-of-2.safetensors"}
    assert loading.load(str(copy.parents[1]), ROOT, CPU).path == copy
    shorter = loading.load(str(copy), ROOT, CPU, {"context_length": 9}).model.state_dict()
    assert torch.equal(shorter["wpe.weight"], expected["wpe.weight"][:9])


@pytest.mark.parametrize("how", ["missing", "truncated", "zero-filled", "bit-flipped"])
@pytest.mark.parametrize("name", ["model.2-of-2", "state.1-of-2"])
def test_damage_to_the_file_of_any_rank_is_found(copy, name, how):
    checkpoint.verify(copy)
    damage(copy / f"{name}.safetensors", how)
    with pytest.raises(UserError, match=f"{name}.safetensors: ") as caught:
        checkpoint.verify(copy)
    assert caught.value.code == 3


def test_a_checkpoint_without_the_files_of_a_rank_is_none(copy):
    manifest = json.loads((copy / "manifest.json").read_text())["content"]
    del manifest["files"]["model.2-of-2.safetensors"]
    content = checkpoint.in_json({"content": manifest, "sha256": checkpoint.hash_json(manifest)})
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"model.2-of-2.safetensors: missing"):
        checkpoint.verify(copy)


LIMITS = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
trained = Trained(ranks)
publish(trained, 1)
if ranks.rank == {rank}:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    publish(trained, 2)
    failed = ""
except Exception as error:
    failed = str(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1)) if ranks.rank != {rank} else None
failures = ranks.gather(failed)
answer([failures, sorted(path.name for path in (folder / "checkpoints").iterdir())])
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_refuses_one_rank_refuses_all_and_leaves_nothing_behind(tmp_path, rank):
    failures, names = answers(tmp_path, 2, LIMITS.replace("{rank}", str(rank)))
    assert len(failures) == 2 and all("checkpoint 2 not written" in failure for failure in failures), failures
    assert names == ["step_00000001"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, optimizer):
    tolerance = 2e-3 if optimizer == "muon" else 1e-4
    _, after, again = answers(tmp_path, 2, TRAIN, optimizer)
    assert after == again
    (four,) = answers(tmp_path, 4, GO_ON, optimizer)
    (path,) = checkpoint.listed(tmp_path / "checkpoints")
    one = restored(path, optimizer)
    assert four == pytest.approx(after, abs=tolerance) and one.steps(5, 10) == pytest.approx(after, abs=tolerance)
    shutil.rmtree(path)
    fresh = Trained(optimizer=optimizer)
    fresh.steps(0, 5)
    checkpoint.publish(tmp_path, fresh.model, fresh.optimizer, Progress(5), IDENTITY, {})  # by one process
    (two,) = answers(tmp_path, 2, GO_ON, optimizer)
    assert two == pytest.approx(after, abs=tolerance)


SHARED = """
from dataclasses import replace
from gpt.runs import checkpoint, model_file, peft_adapter
from sharded_model import ADAPTERS
identity = replace(IDENTITY, lora=ADAPTERS)
trained = Trained(ranks, adapters=True)
trained.steps(0, 3)
progress = Progress(step=3, tokens=30, best=1.0, best_step=3)
path = checkpoint.publish(folder, trained.model, trained.optimizer, progress, identity, {{}}, ranks=ranks)
if ranks.is_first:
    model_file.save_model(folder / "last_model.pt", trained.model, identity, 3, path)
    peft_adapter.save(folder / "adapter", trained.model, ADAPTERS, "gpt2", None, path)
answer(sorted(file.name for file in folder.iterdir() if file.name.startswith(".")))
"""


@pytest.mark.exhaustive
def test_the_model_to_share_and_the_adapters_are_put_together_from_the_checkpoint(tmp_path):
    assert answers(tmp_path, 2, SHARED) == []
    (path,) = checkpoint.listed(tmp_path / "checkpoints")
    expected = loading.load(str(path), ROOT, CPU).model  # adapters folded into it
    shared = loading.load(str(tmp_path / model_file.LAST_MODEL), ROOT, CPU).model
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in shared.state_dict().items())
    parts = checkpoint.read_parts(path, read_manifest(path).weights)
    adapters = peft_adapter.read(tmp_path / "adapter").tensors
    assert adapters.keys() == {name for name in parts if ".lora_" in name}
    assert all(torch.equal(torch.cat(parts[name]), tensor) for name, tensor in adapters.items())
