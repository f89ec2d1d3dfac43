"""Damaged checkpoints in all shapes: never loaded wrongly, no traceback, no silent start from the beginning."""

import functools
import hashlib
import json
import os
import random
import shutil
from collections import Counter

import group
import pytest
import torch
from conftest import ROOT
from test_checkpoint import IDENTITY, damage, made
from test_kill import Sharded

from gpt.errors import UserError
from gpt.progress import Progress
from gpt.runs import checkpoint, resume
from gpt.runs.manifest import read_manifest
from gpt.weights import loading

STEPS = (2, 4, 6)
SETTINGS = {"seed": 1, "optimizer": {"lr": 0.1}, "environment": {"threads": 1}, "data": {"fingerprint": "f"}}
# Each rank reads its own rows of the checkpoints of one process, and publishes them in their place.
RESHARDED = """
from pathlib import Path
from conftest import adamw_config
from gpt import optim
from gpt.model import GPT
from gpt.runs import checkpoint
folder = Path({folder!r})
for path in checkpoint.listed(folder / "checkpoints"):
    manifest, config = checkpoint.verify(path), checkpoint.read_config(path)
    model = ranks.place(GPT(manifest.model, manifest.vocab_size), torch.device("cpu"), torch.float32)
    optimizer = optim.build(model, adamw_config())
    progress = checkpoint.restore(path, model, optimizer)
    checkpoint.publish(folder, model, optimizer, progress, manifest.identity, config, ranks=ranks)
"""


def fingerprint(model, optimizer, progress):
    digest = hashlib.sha256(repr(progress).encode())
    for tensors in (dict(model.named_parameters()), checkpoint.optim.state_tensors(optimizer)):
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].detach().numpy().tobytes())
    return digest.hexdigest()


def hash_tree(folder):
    """Every name and every byte below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path.relative_to(folder)).encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.exhaustive)], ids="ranks={}".format)
def sound(tmp_path_factory, request):
    """A run with checkpoints of steps 2, 4 and 6, written by one process or by two ranks that share the rows:
    (directory, {step: fingerprint of all that it restores})."""
    run_dir = tmp_path_factory.mktemp("sound")
    known = {}
    for step in STEPS:
        model, optimizer = made(steps=step)
        progress = Progress(step=step, reported=step, tokens=10 * step, best=9.0 - step, best_step=step)
        path = checkpoint.publish(run_dir, model, optimizer, progress, IDENTITY, SETTINGS, keep=3)
        known[step] = fingerprint(model, optimizer, progress)
    if request.param > 1:
        code, output = group.lines(run_dir, request.param, RESHARDED.format(folder=str(run_dir)), sharded=True)
        assert code == 0 and read_manifest(path).format == 6, output
        (run_dir / "lines.py").unlink()
    return run_dir, known


def files_of(folder):
    return sorted(folder.iterdir())


def flip_bits(file, draw, _):
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice([1, 1, 1, 8])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def truncate(file, draw, _):
    os.truncate(file, draw.randrange(file.stat().st_size))


def fill(file, draw, _):
    content = bytearray(file.read_bytes())
    start = draw.randrange(len(content))
    end = draw.randrange(start, len(content)) + 1
    content[start:end] = bytes(end - start) if draw.random() < 0.5 else draw.randbytes(end - start)
    file.write_bytes(content)


def append(file, draw, _):
    with open(file, "ab") as end:
        end.write(draw.randbytes(draw.randrange(1, 100)))


def delete(file, draw, _):
    file.unlink()


def make_directory(file, draw, _):
    file.unlink()
    file.mkdir()


def take_from_another(file, draw, folders):
    other = draw.choice([folder for folder in folders if folder.name != file.parent.name])
    shutil.copyfile(other / file.name, file)


def link_to_another(file, draw, folders):
    other = draw.choice([folder for folder in folders if folder.name != file.parent.name])
    file.unlink()
    file.symlink_to(other / file.name)


def swap_two(file, draw, _):
    other = draw.choice([path for path in files_of(file.parent) if path != file])
    content = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(content)


def spoil_manifest(file, draw, _):
    """Manifests that hash to what they say, and are nonsense all the same."""
    file = file.with_name(checkpoint.MANIFEST)
    content = json.loads(file.read_text())["content"]
    place = draw.choice([content, content["progress"], content["model"], content["files"]])
    key = draw.choice(sorted(place))
    nonsense = ["x", [], {}, True, "../../x", [[[]]], {"a": 1}]
    if draw.random() < 0.3:
        del place[key]
    else:
        place[key] = draw.choice(nonsense)
    file.write_text(json.dumps({"content": content, "sha256": checkpoint.hash_json(content)}))


def rename_folder(file, draw, _):
    names = [file.parent.with_name(name) for name in ("step_00000009", "step_x", "step_6", "step_00000006.bak")]
    file.parent.rename(draw.choice([name for name in names if not name.exists()]))


KINDS = [flip_bits, truncate, fill, append, delete, make_directory, take_from_another, link_to_another, swap_two,
         spoil_manifest, rename_folder]  # fmt: skip


def damage_and_resume(sound, run_dir, seed):
    """One to three acts of damage, mostly to the newest checkpoint, then a start: what became of it."""
    source, known = sound
    draw = random.Random(seed)
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(source, run_dir)
    folders = checkpoint.listed(run_dir / "checkpoints")
    spared, kinds = 0, []
    for folder in reversed(folders):  # the newest always, the others sometimes
        kinds.append(draw.choice(KINDS))
        before = hash_tree(folder)
        kinds[-1](draw.choice(files_of(folder)), draw, checkpoint.listed(source / "checkpoints"))
        spared += folder.exists() and hash_tree(folder) == before  # zeros over zeros
        if draw.random() < 0.7:
            break
    on_disk = hash_tree(run_dir)
    model, optimizer = made(steps=0, seed=99)
    fresh = fingerprint(model, optimizer, Progress())
    try:
        found = resume.find(run_dir, "auto")
        progress = resume.restore(found, model, optimizer, IDENTITY, SETTINGS, [])
    except UserError as error:
        assert error.code in (2, 3) and "\n" not in str(error), error
        outcome = "refused"
    else:
        got = fingerprint(model, optimizer, progress)
        assert got != fresh and progress.step in known, "a silent start from the beginning"
        assert got == known[progress.step], f"step {progress.step} was not restored as it was saved"
        outcome = "the newest was not hurt" if progress.step == STEPS[-1] else "fell back to an older one"
        assert outcome != "the newest was not hurt" or spared or kinds[0] in (rename_folder, spoil_manifest)
    try:
        weights = dict(loading.load(str(run_dir), ROOT, torch.device("cpu")).model.named_parameters())
    except UserError as error:
        assert error.code == 3 and "\n" not in str(error), error
    else:
        assert any(same(weights, step) for step in STEPS), "generate.py would use weights that nobody saved"
    assert hash_tree(run_dir) == on_disk, "looking for a checkpoint changed files"
    return outcome


@functools.cache
def saved_at(step):
    return made(steps=step)[0]


def same(weights, step):
    model = saved_at(step)
    return all(torch.equal(weights[name], tensor) for name, tensor in model.named_parameters())


def damage_many(sound, run_dir, seeds, record_property):
    outcomes = Counter()
    for seed in seeds:
        try:
            outcomes[damage_and_resume(sound, run_dir, seed)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    n = len(seeds)
    assert outcomes["fell back to an older one"] > 0.6 * n and outcomes["refused"] > 0.01 * n, outcomes
    told = ", ".join(f"{number} {what}" for what, number in outcomes.most_common())
    record_property("count", f"{n} damaged checkpoints: {told}; 0 loaded wrongly, 0 tracebacks, 0 silent restarts")


def test_100_damaged_checkpoints_are_refused_or_passed_over(sound, tmp_path, record_property):
    damage_many(sound, tmp_path / "run", range(100), record_property)


@pytest.mark.exhaustive
@pytest.mark.parametrize("start", range(1000, 3000, 500))
def test_2000_damaged_checkpoints_are_refused_or_passed_over(sound, tmp_path, start, record_property):
    damage_many(sound, tmp_path / "run", range(start, start + 500), record_property)


@pytest.mark.exhaustive
@pytest.mark.parametrize("file", ["model.2-of-2.safetensors", "state.1-of-2.safetensors"])
def test_a_damaged_file_of_any_rank_is_one_line_and_all_go_on_from_the_checkpoint_before(tmp_path, file):
    run, expected = Sharded(tmp_path, "train.keep_checkpoints=2").undisturbed()
    damage(run.directory / "checkpoints" / "step_00000006" / file, "bit-flipped")
    outcome, code, _ = run()
    assert outcome.code == code == 0 and run.result() == expected, outcome.output
    assert [line for line in outcome.output.splitlines() if line.startswith("warning: step")] == [
        f"warning: step_00000006 damaged ({file}: sha256 differs); using step_00000004"
    ]
