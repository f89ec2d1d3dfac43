"""Files made by somebody who means harm: nothing in them is executed, and each ends in one line with its exit code.

Most of them hold a payload that makes a directory, the marker, when it is executed. Each such file is also loaded the
unsafe way, which proves that its payload works. Every attempt runs in a forked child with limits of memory and time.
"""

import functools
import gzip
import io
import json
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import sys
import tarfile
import traceback
import unicodedata
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, data_config
from test_conf import loaded
from torch import nn

from generate import generate
from gpt.config import launch
from gpt.config.schema import GenerateConfig, TrainConfig
from gpt.data import preparation, prepared, sources
from gpt.runs import checkpoint, wandb_description
from train import train

FORCED = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # makes torch.load execute pickles wherever its caller does not forbid it
SECONDS = 10  # after which an attempt is killed
MEMORY = 64 * 2**20  # bytes that an attempt may need beyond what this process has; it cannot get more than 1 GiB
STEP = "step_00000002"


class Payload:
    """Unpickling it makes a directory."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (self.marker,)


class Call:
    """Unpickling it calls `function`, which a loader that allows only some functions may allow."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.call


class Script(nn.Module):
    """Its TorchScript archive writes a file when it is loaded."""

    def __init__(self, marker: str) -> None:
        super().__init__()
        self.marker = marker

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.marker, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.marker, self.training = state[0], state[1]
        torch.save(torch.zeros(1), self.marker)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@dataclass(frozen=True)
class Place:
    """A directory with a text, the data prepared from it, and a finished run on it: one of them becomes hostile."""

    root: Path

    @property
    def marker(self) -> Path:
        return self.root / "marker"

    @property
    def payload(self) -> Payload:
        return Payload(self.marker)

    @property
    def text(self) -> Path:
        return self.root / "text.txt"

    @property
    def prepared_dir(self) -> Path:
        return self.root / "prepared"

    @property
    def prepared(self) -> Path:
        """The folder that a run opens."""
        return prepared.versions(self.prepared_dir)[0]

    @property
    def run_dir(self) -> Path:
        return self.root / "run"

    @property
    def step(self) -> Path:
        return self.run_dir / "checkpoints" / STEP

    @property
    def model(self) -> Path:
        return self.run_dir / "last_model.pt"


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended; `code` is -signal for a child that was killed."""

    code: int
    stdout: str
    stderr: str
    memory: int  # bytes beyond what its parent has
    executed: bool  # there is a marker


@dataclass(frozen=True)
class Kind:
    """A kind of hostile file: how it is made, what a person does with it, and the exit code that this must have."""

    make: Callable[[Place], None]
    action: Callable[[Place], Any]
    code: int
    unsafe: Callable[[Place], Any] | None = None  # executes the payload; None: there is none, the harm is another one


# What a person does


def train_again(place: Place) -> None:
    train(settings(place))


def generate_from(name: str) -> Callable[[Place], None]:
    return lambda place: generate(generation(place.root / name))


def prepare(name: str, kind: str) -> Callable[[Place], None]:
    cfg = data_config(kind=kind, path=name, prepared_dir="new")
    return lambda place: preparation.prepare(cfg, place.root)


def command(script: str, *arguments: str) -> Callable[[Place], None]:
    """The script itself, with {} for the place in its arguments."""

    def run(place: Place) -> None:
        sys.argv[:] = [script] + [argument.replace("{}", str(place.root)) for argument in arguments]
        runpy.run_path(str(ROOT / script), run_name="__main__")

    return run


@functools.cache
def tiny() -> TrainConfig:
    return loaded(
        "data=text", "data.tokenizer=bytes", "data.path=x", "model.n_layer=1", "model.n_head=2", "model.n_embd=16",
        "model.context_length=16", "train.tokens_per_step=32", "train.max_steps=2", "train.eval_every=2",
        "train.eval_tokens=32", "train.save_every=2", "train.sample_every=null", "device=cpu", "wandb.mode=disabled",
    )  # fmt: skip


def settings(place: Place) -> TrainConfig:
    """A tiny run in the place."""
    data = replace(tiny().data, path=str(place.text), prepared_dir=str(place.prepared_dir))
    return replace(tiny(), out_dir=str(place.run_dir), data=data)


def generation(path: Path, **changes: Any) -> GenerateConfig:
    return GenerateConfig(**{
        "checkpoint": str(path), "export": None, "prompt": "Hello", "input": "", "prompts": None, "template": None,
        "max_new_tokens": 2, "temperature": 0.0, "top_k": None, "top_p": None, "num_samples": 1, "seed": 0,
        "stop": [], "stats": False, "device": "cpu", "threads": None, "model": {"n_head": None, "gelu": None},
        "batch_size": 1, "output": None, "lookup": None, "precision": "float32",
        **changes,
    })  # fmt: skip


# Files with a payload: writers, and what executes it


def write_torch(path: Path, value: Any) -> None:
    torch.save({"format": 2, "model": {}, "weights": {"wte.weight": torch.ones(2), "wpe.weight": value}}, path)


def write_pickle(path: Path, value: Any, protocol: int = 5) -> None:
    path.write_bytes(pickle.dumps(value, protocol))


def write_text(path: Path, value: Any) -> None:
    """The oldest pickles are ASCII."""
    write_pickle(path, value, protocol=0)


def write_gzip(path: Path, value: Any) -> None:
    path.write_bytes(gzip.compress(pickle.dumps(value)))


def write_legacy(path: Path, value: Any) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def write_tar(path: Path, value: Any) -> None:
    """The format of PyTorch before 0.1.10."""
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(value, 2)
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))


def write_module(path: Path, payload: Any) -> None:
    module = nn.Linear(2, 2)
    module.payload = payload
    torch.save(module, path)


def write_script(path: Path, payload: Payload) -> None:
    torch.jit.script(Script(payload.marker)).save(str(path))


def write_npy(path: Path, value: Any) -> None:
    with open(path, "wb") as file:
        np.save(file, np.array([value], dtype=object), allow_pickle=True)


def write_npz(path: Path, value: Any) -> None:
    with open(path, "wb") as file:
        np.savez(file, documents=np.array([value], dtype=object))


def torch_load(name: str) -> Callable[[Place], Any]:
    return lambda place: torch.load(place.root / name, weights_only=False)


def pickle_load(name: str) -> Callable[[Place], Any]:
    return lambda place: pickle.loads(next(place.root.glob(name)).read_bytes())


def jit_load(name: str) -> Callable[[Place], Any]:
    return lambda place: torch.jit.load(place.root / name)


def gzip_load(name: str) -> Callable[[Place], Any]:
    return lambda place: pickle.loads(gzip.decompress((place.root / name).read_bytes()))


def numpy_load(name: str) -> Callable[[Place], Any]:
    def load(place: Place) -> None:
        array = np.load(next(place.root.glob(name)), allow_pickle=True)
        if isinstance(array, np.lib.npyio.NpzFile):
            array["documents"]

    return load


# Checkpoints and prepared data whose manifest agrees with what has been done to them


def sign(step: Path, **changes: Any) -> None:
    """Writes the manifest of a checkpoint anew."""
    content = json.loads((step / "manifest.json").read_text())["content"] | changes
    if "files" not in changes:
        files = sorted(path for path in step.iterdir() if path.name != "manifest.json")
        content["files"] = {path.name: asdict(checkpoint.facts_of(path)) for path in files}
    manifest = {"content": content, "sha256": checkpoint.hash_json(content)}
    (step / "manifest.json").write_text(json.dumps(manifest))


def sign_data(folder: Path, **more: Any) -> None:
    """Writes the meta.json of prepared data anew."""
    meta = json.loads((folder / "meta.json").read_text())
    for name, file in meta["files"].items():
        if (folder / name).is_file():
            file |= {"bytes": (folder / name).stat().st_size, "sha256": sources.sha256(folder / name)}
    meta["files"] |= more
    (folder / "meta.json").write_text(json.dumps(meta | {"fingerprint": prepared.fingerprint_of(meta)}))


def in_checkpoint(name: str, write: Callable[[Path, Any], None]) -> Callable[[Place], None]:
    """One file of the checkpoint is replaced, and the manifest says that this is right."""

    def make(place: Place) -> None:
        if name == "state.pt":  # as in format 1
            (place.step / "state.safetensors").unlink()
        write(place.step / name, place.payload)
        if name == "state.pt":
            sign(place.step, format=1)
        elif name != "manifest.json":
            sign(place.step)

    return make


def in_data(name: str, write: Callable[[Path, Any], None], source: bool = False) -> Callable[[Place], None]:
    """One file of the prepared data is replaced, and meta.json says that this is right."""

    def make(place: Place) -> None:
        write(place.prepared / name, place.payload)
        if name != "meta.json":
            sign_data(place.prepared)
        if not source:
            place.text.unlink()

    return make


def write_even_pickle(path: Path, value: Any) -> None:
    content = pickle.dumps(value)
    path.write_bytes(content + b"." * (len(content) % 2))


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def sparse(path: Path, n_bytes: int = 2**40) -> None:
    path.touch()
    os.truncate(path, n_bytes)


def model_file(**changes: Any) -> Callable[[Place], None]:
    """A last_model.pt that is right but for some values; a dict changes values within."""

    def make(place: Place) -> None:
        content = torch.load(place.model, weights_only=True)
        for name, value in changes.items():
            content[name] = content[name] | value if isinstance(value, dict) else value
        torch.save(content, place.model)

    return make


def manifest_lists(name: str) -> Callable[[Place], None]:
    """A manifest that has the weights elsewhere: where it would wait for ever, if it were looked at."""

    def make(place: Place) -> None:
        pipe(place.root / "outside")
        facts = json.loads((place.step / "manifest.json").read_text())["content"]["files"]
        facts[name.replace("{}", str(place.root))] = facts.pop("model.safetensors")
        (place.step / "model.safetensors").unlink()
        sign(place.step, files=facts)

    return make


def linked_elsewhere(place: Place) -> None:
    """The checkpoint is a link to a directory outside the run, whose state is a pickle."""
    elsewhere = place.root / "elsewhere" / STEP
    elsewhere.parent.mkdir()
    place.step.rename(elsewhere)
    place.step.symlink_to(elsewhere)
    in_checkpoint("state.safetensors", write_pickle)(place)


def compressed(place: Place) -> None:
    """A torch file of 500 kB whose pickle has 100 MB after its end; no writer of such files compresses."""
    with zipfile.ZipFile(place.model) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(place.model, "w") as file:
        for name, part in parts.items():
            if name.endswith("data.pkl"):
                file.writestr(name, part + bytes(10**8), zipfile.ZIP_DEFLATED, compresslevel=1)
            else:
                file.writestr(name, part)


HUGE = torch.zeros(1).expand(10**12)  # four bytes
MODEL, IDS = "run/last_model.pt", "prepared/*/train.bin"
INDEX, VAL_INDEX = "prepared/*/train.index.npy", "prepared/*/val.index.npy"
FROM_MODEL, FROM_RUN, FROM_STEP = generate_from(MODEL), generate_from("run"), generate_from(f"run/checkpoints/{STEP}")


def a_model(write: Callable[[Path, Any], None], unsafe: Callable[[str], Any], name: str = MODEL) -> Kind:
    return Kind(lambda place: write(place.root / name, place.payload), generate_from(name), 3, unsafe(name))


def a_part(name: str, write: Callable[[Path, Any], None], action: Callable[[Place], None]) -> Kind:
    return Kind(in_checkpoint(name, write), action, 3, pickle_load(f"run/checkpoints/{STEP}/{name}"))


def raw_data(name: str, kind: str, write: Callable[[Path, Any], None] = write_pickle, unsafe=pickle_load) -> Kind:
    return Kind(lambda place: write(place.root / name, place.payload), prepare(name, kind), 2, unsafe(name))


def prompts(name: str) -> Kind:
    def action(place: Place) -> None:
        generate(generation(place.model, prompt=None, prompts=str(place.root / name)))

    return Kind(lambda place: write_pickle(place.root / name, place.payload), action, 2, pickle_load(name))


KINDS = {
    "model: torch": a_model(write_torch, torch_load),
    "model: torch before 1.6": a_model(write_legacy, torch_load),
    "model: torch before 0.1.10": a_model(write_tar, torch_load),
    "model: a whole module": a_model(write_module, torch_load),
    "model: TorchScript": a_model(write_script, jit_load),
    **{
        f"model: pickle protocol {n}": a_model(lambda path, value, n=n: write_pickle(path, value, n), pickle_load)
        for n in range(6)
    },
    "model: a pickle called .safetensors": a_model(write_pickle, pickle_load, "run/model.safetensors"),
    "model: an .npy of objects": a_model(write_npy, numpy_load),
    "model: an escape sequence as name": a_model(write_pickle, pickle_load, "run/\x1b[2J\u202e\n.pt"),
    "model: memory from allowed functions": Kind(
        model_file(weights={"wte.weight": Call(torch.Tensor, 10**13)}), FROM_MODEL, 3
    ),
    "model: memory from bytearray": Kind(model_file(step=Call(bytearray, 10**13)), FROM_MODEL, 3),
    "model: four bytes as 4 TB": Kind(model_file(weights={"wte.weight": HUGE}), FROM_MODEL, 3),
    "model: 500 kB as 100 MB": Kind(compressed, FROM_MODEL, 3),
    "model: a terabyte of nothing": Kind(lambda place: sparse(place.model), FROM_MODEL, 3),
    "model: a pipe": Kind(lambda place: pipe(place.model), FROM_MODEL, 3),
    "model: a billion layers": Kind(model_file(model={"n_layer": 10**9}), FROM_MODEL, 3),
    "model: width 10^12": Kind(model_file(model={"n_embd": 10**12}), FROM_MODEL, 3),
    "model: context 10^15": Kind(model_file(model={"context_length": 10**15}), FROM_MODEL, 3),
    "model: 10^18 heads": Kind(model_file(model={"n_head": 10**18}), FROM_MODEL, 3),
    "model: vocabulary 10^30": Kind(model_file(vocab_size=10**30), FROM_MODEL, 3),
    "model: layers in words": Kind(model_file(model={"n_layer": "\x1b]0;six\x07"}), FROM_MODEL, 3),
    "model: a tokenizer that is a path": Kind(model_file(tokenizer="../../\x1b[2J"), FROM_MODEL, 3),
    "model: another tokenizer": Kind(model_file(tokenizer="gpt2"), FROM_MODEL, 3),
    "model: a tensor called ESC": Kind(model_file(weights={"\x1b[2J": torch.ones(1)}), FROM_MODEL, 3),
    "checkpoint: weights, read for text": a_part("model.safetensors", write_pickle, FROM_RUN),
    "checkpoint: weights, read to go on": a_part("model.safetensors", write_pickle, train_again),
    "checkpoint: state": a_part("state.safetensors", write_pickle, train_again),
    "checkpoint: state of format 1": a_part("state.pt", write_pickle, train_again),
    "checkpoint: state of format 1, torch": replace(
        a_part("state.pt", write_torch, train_again),
        unsafe=torch_load(f"run/checkpoints/{STEP}/state.pt"),
    ),
    "checkpoint: settings": a_part("config.json", write_pickle, train_again),
    "checkpoint: manifest, read for text": a_part("manifest.json", write_pickle, FROM_STEP),
    "checkpoint: manifest, read to go on": a_part("manifest.json", write_pickle, train_again),
    "checkpoint: a link": Kind(
        linked_elsewhere, train_again, 3, pickle_load(f"elsewhere/{STEP}/state.safetensors")
    ),
    **{
        f"checkpoint: lists {title}": Kind(manifest_lists(name), action, 3)
        for title, name, action in [
            ("../", "../../../outside", FROM_RUN), ("../, to go on", "../../../outside", train_again),
            ("an absolute path", "{}/outside", FROM_RUN), ("NUL", "model.safetensors\0", FROM_RUN),
            ("ESC", "\x1b[2J\x07", FROM_RUN),
        ]
    },
    **{
        f"checkpoint: {name} is a pipe": Kind(lambda place, name=name: pipe(place.step / name), action, 3)
        for name, action in [
            ("manifest.json", FROM_RUN), ("manifest.json", train_again), ("model.safetensors", train_again),
            ("config.json", train_again),
        ]
    },
    "checkpoint: manifest of 1 TB": Kind(lambda place: sparse(place.step / "manifest.json"), train_again, 3),
    "checkpoint: manifest of 100,000 lists": Kind(
        lambda place: (place.step / "manifest.json").write_text("[" * 100_000), train_again, 3
    ),
    "checkpoint: weights that claim 1 TB": Kind(
        in_checkpoint("model.safetensors", lambda path, _: path.write_bytes((2**40).to_bytes(8, "little") + b"{}")),
        FROM_RUN, 3,
    ),
    "data: index, an .npy of objects": Kind(in_data("train.index.npy", write_npy), train_again, 2, numpy_load(INDEX)),
    "data: index, an .npz": Kind(in_data("train.index.npy", write_npz), train_again, 2, numpy_load(INDEX)),
    "data: index, a pickle": Kind(in_data("train.index.npy", write_pickle), train_again, 2, numpy_load(INDEX)),
    "data: index, source there": Kind(in_data("train.index.npy", write_npy, True), train_again, 2, numpy_load(INDEX)),
    "data: index of val": Kind(in_data("val.index.npy", write_npy), train_again, 2, numpy_load(VAL_INDEX)),
    "data: ids, a pickle": Kind(in_data("train.bin", write_even_pickle), train_again, 2, pickle_load(IDS)),
    "data: ids, an .npy of objects": Kind(in_data("train.bin", write_npy), train_again, 2, numpy_load(IDS)),
    "data: meta.json": Kind(in_data("meta.json", write_pickle), train_again, 2, pickle_load("prepared/*/meta.json")),
    "data: meta.json lists ../": Kind(
        lambda place: (place.text.unlink(), sign_data(place.prepared, **{"../text.txt": {"bytes": 0, "sha256": ""}})),
        train_again, 2,
    ),
    "data: a pipe": Kind(lambda place: (place.text.unlink(), pipe(place.prepared / "train.bin")), train_again, 2),
    "source: medquad.csv": raw_data("medquad.csv", "qa"),
    "source: medquad.csv, protocol 0": raw_data("medquad.csv", "qa", write_text),
    "source: an .npy called .csv": raw_data("medquad.csv", "qa", write_npy, numpy_load),
    "source: x.jsonl": raw_data("x.jsonl", "alpaca"),
    "source: x.jsonl, protocol 0": raw_data("x.jsonl", "alpaca", write_text),
    "source: x.json": raw_data("x.json", "alpaca"),
    "source: x.txt": raw_data("x.txt", "text"),
    "source: x.jsonl.gz": raw_data("x.jsonl.gz", "alpaca", write_gzip, gzip_load),
    "source: a pipe": Kind(lambda place: pipe(place.root / "x.jsonl"), prepare("x.jsonl", "alpaca"), 2),
    "prompts: x.txt": prompts("x.txt"),
    "prompts: x.jsonl": prompts("x.jsonl"),
    "prompts: a pipe": replace(prompts("x.txt"), make=lambda place: pipe(place.root / "x.txt"), unsafe=None),
}  # fmt: skip


# How it is tried


@dataclass(frozen=True)
class Attempt:
    """An action on a hostile file, `launched` as the scripts do it, or just so."""

    action: Callable[[Place], Any]
    place: Place
    forced: bool = False
    launched: bool = True


def outcomes_of(attempts: list[Attempt]) -> list[Outcome]:
    """Makes the attempts one after the other in a forked child, and goes on in another one when it has been killed."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(attempts):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 98
            try:
                total = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (total + 2**30,) * 2)
                for attempt in attempts[len(outcomes) :]:
                    os.write(writer, json.dumps(asdict(outcome_of(attempt))).encode() + b"\n")
                code = 0
            finally:
                os._exit(code)
        os.close(writer)
        with os.fdopen(reader) as lines:
            outcomes += [Outcome(**json.loads(line)) for line in lines]
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            outcomes.append(Outcome(code, "", "", 0, attempts[len(outcomes)].place.marker.exists()))
    return outcomes


def outcome_of(attempt: Attempt) -> Outcome:
    """Makes an attempt in this process, which has been forked for that."""
    signal.alarm(SECONDS)
    place = attempt.place
    shutil.rmtree(place.marker, ignore_errors=True)
    place.marker.unlink(missing_ok=True)
    paths = place.root / "stdout", place.root / "stderr"
    for descriptor, path in enumerate(paths, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
    os.environ.pop(FORCED, None)
    if attempt.forced:
        os.environ[FORCED] = "1"
    sys.argv[:] = ["train.py"]
    Path("/proc/self/clear_refs").write_text("5")  # from here on the largest resident size is counted anew
    before, code = resident("VmRSS"), 0
    try:
        if attempt.launched:
            launch.launch(lambda: attempt.action(place), "train")
        else:
            attempt.action(place)
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        code = 99
        traceback.print_exc()
    sys.stdout.flush()
    memory = resident("VmHWM") - before
    return Outcome(code, *(path.read_text(encoding="utf-8") for path in paths), memory, place.marker.exists())


def resident(name: str) -> int:
    """Bytes of memory that this process has (VmRSS), or has had (VmHWM)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Place:
    """Nothing in it is hostile yet."""
    place = Place(tmp_path_factory.mktemp("clean"))
    place.text.write_text("All work and no play makes Jack a dull boy.\n" * 20)
    train(settings(place))
    return place


@pytest.fixture(scope="module")
def place_for(clean, tmp_path_factory) -> Callable[[Kind], Place]:
    """A copy of the clean place in which one kind of hostile file has been put."""

    def make(kind: Kind) -> Place:
        place = Place(tmp_path_factory.mktemp("hostile"))
        shutil.copytree(clean.root, place.root, dirs_exist_ok=True)
        kind.make(place)
        return place

    return make


@pytest.fixture(scope="module")
def places(place_for) -> dict[str, Place]:
    return {name: place_for(kind) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def safe(places) -> dict[str, list[Outcome]]:
    """What comes of each kind, without and with the variable."""
    attempts = [Attempt(kind.action, places[name], forced) for name, kind in KINDS.items() for forced in (False, True)]
    outcomes = outcomes_of(attempts)
    return {name: outcomes[2 * i : 2 * i + 2] for i, name in enumerate(KINDS)}


@pytest.fixture(scope="module")
def unsafe(places) -> dict[str, Outcome]:
    """What comes of each kind with a payload when it is loaded the unsafe way."""
    names = [name for name, kind in KINDS.items() if kind.unsafe]
    outcomes = outcomes_of([Attempt(KINDS[name].unsafe, places[name], launched=False) for name in names])
    return dict(zip(names, outcomes, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_a_hostile_file_is_not_executed_and_ends_in_one_line_with_its_code(safe, name):
    for outcome in safe[name]:
        assert not outcome.executed, outcome
        assert outcome.code == KINDS[name].code, outcome
        assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1, outcome
        assert outcome.memory < MEMORY, outcome
        said = outcome.stdout + outcome.stderr
        assert "weights_only" not in said and "Traceback" not in said, outcome
        unseen = {"Cc", "Cf", "Cs", "Zl", "Zp"}
        assert not any(unicodedata.category(char) in unseen for char in said.replace("\n", "")), outcome


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.unsafe])
def test_the_payload_of_a_hostile_file_works_when_it_is_loaded_the_unsafe_way(unsafe, name):
    assert unsafe[name].executed, unsafe[name]


def test_no_payload_of_any_kind_was_executed(safe, unsafe, record_property):
    tried = [outcome for outcomes in safe.values() for outcome in outcomes]
    executed = sum(outcome.executed for outcome in tried)
    record_property(
        "count",
        f"{len(safe)} kinds of hostile files, {len(tried)} attempts with and without {FORCED}: {executed} executed; "
        f"{len(unsafe)} kinds hold a payload, {sum(outcome.executed for outcome in unsafe.values())} of these were "
        f"executed when loaded the unsafe way",
    )
    assert executed == 0 and len(unsafe) >= 25 and all(outcome.executed for outcome in unsafe.values())


def test_the_variable_does_make_torch_load_execute_a_pickle(place_for):
    place = place_for(KINDS["model: torch"])
    for forced in (False, True):
        (outcome,) = outcomes_of([Attempt(lambda place: torch.load(place.model), place, forced, launched=False)])
        assert outcome.executed == forced, outcome


@pytest.mark.parametrize("action", [train_again, FROM_RUN, FROM_MODEL, FROM_STEP, prepare("text.txt", "text")])
def test_what_nobody_has_touched_is_accepted(clean, action):
    (outcome,) = outcomes_of([Attempt(action, clean, True)])
    assert outcome.code == 0 and "error" not in outcome.stderr, outcome


def test_a_checkpoint_that_is_a_link_is_pruned_without_touching_what_it_leads_to(place_for):
    def link(place: Place) -> None:
        place.step.rename(place.root / "elsewhere")
        for number in range(3):
            (place.step.parent / f"step_0000000{number}").symlink_to(place.root / "elsewhere")

    place = place_for(Kind(link, train_again, 0))
    files = {path.name: path.read_bytes() for path in (place.root / "elsewhere").iterdir()}
    checkpoint.prune(place.step.parent, keep=1, step=5)
    checkpoint.recover(place.step.parent)
    assert [checkpoint.number_of(path) for path in checkpoint.listed(place.step.parent)] == [0, 2]  # best and newest
    assert {path.name: path.read_bytes() for path in (place.root / "elsewhere").iterdir()} == files


@pytest.mark.parametrize(
    "make",
    [
        lambda path: write_pickle(path, Payload(path.parent.parent / "marker")),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_text('{"id": "../../x"}'),
        lambda path: path.write_text('["id"]'),
        pipe,
        sparse,
    ],
    ids=["a pickle", "100,000 lists", "a path", "a list", "a pipe", "a terabyte"],
)
def test_a_hostile_wandb_json_gives_the_run_a_new_id(tmp_path, make):
    place = Place(tmp_path)
    place.run_dir.mkdir()
    make(place.run_dir / "wandb.json")
    (run_id,) = outcomes_of([Attempt(lambda place: print(run_id_of(place)), place, launched=False)])
    assert re.fullmatch(r"[0-9a-f]{8}\n", run_id.stdout) and not run_id.executed, run_id


def run_id_of(place: Place) -> str:
    return wandb_description.describe_run(settings(place), place.run_dir, resumed=True)["id"]
