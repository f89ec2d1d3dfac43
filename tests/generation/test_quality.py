"""What fewer bits cost and gain, and which precision is chosen for it."""

import json
import logging
import math
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT, adamw_config, data_config, model_config
from torch.nn import functional as F

from gpt import optim, tokenizer
from gpt.config.schema import as_dict
from gpt.data import preparation
from gpt.data.batching import Split
from gpt.errors import UserError
from gpt.generation import packed_model, precision, quality
from gpt.generation.quality import Measured
from gpt.model import GPT
from gpt.progress import Progress
from gpt.runs import checkpoint
from gpt.runs.checkpoint import Identity
from gpt.weights import loading as plain_loading

BYTES = tokenizer.load("bytes")
CPU = torch.device("cpu")
MODEL = model_config(n_embd=64, context_length=32)
NAMES = ["float32", "bfloat16", "int8", "int4"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run with its data, and random weights."""
    folder = tmp_path_factory.mktemp("run")
    rows = [f"What is {i} ?,{i} is {'very ' * (i % 7)}rare,source,topic {i}" for i in range(40)]
    (folder / "rows.csv").write_text("\n".join(["question,answer,source,focus_area", *rows]) + "\n")
    cfg = data_config(name="topics", path=str(folder / "rows.csv"), prepared_dir=str(folder / "data"), val_fraction=0.3)
    prepared = preparation.ensure(cfg, folder)
    torch.manual_seed(0)
    model = GPT(MODEL, BYTES.n_vocab)
    settings = {"data": as_dict(cfg) | {"fingerprint": prepared.meta["fingerprint"]}, "seed": 0}
    identity = Identity(MODEL, BYTES.n_vocab, "bytes", "plain")
    optimizer = optim.build(model, adamw_config())
    checkpoint.publish(folder / "run", model, optimizer, Progress(step=3), identity, settings, keep=None)
    return folder


@pytest.fixture
def run(original, tmp_path, monkeypatch):
    """A copy of the run alone, and what is said about it."""
    monkeypatch.setattr(logging.getLogger("gpt"), "propagate", True)
    return shutil.copytree(original / "run", tmp_path / "run")


def load(run):
    return plain_loading.load(str(run), ROOT, CPU)


def results(**changes) -> dict[str, Measured]:
    """Each twice as fast as the one before, and as good."""
    found = {name: Measured(1.0, 1.0 / 2**i) for i, name in enumerate(NAMES)}
    return found | changes


def measured_before(run, found) -> None:
    loaded = load(run)
    quality.keep(quality.beside(loaded.path), quality.identity_of(loaded), "a text", found)


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "int4"),
        ({"int4": Measured(1.0011, 0.1)}, "int8"),
        ({"int4": Measured(1.0009, 0.1)}, "int4"),
        ({"int4": Measured(1.02, 0.1), "int8": Measured(1.0, 0.6)}, "bfloat16"),
        ({name: Measured(1.0, 2.0) for name in NAMES[1:]}, "float32"),
        ({"int4": Measured(0.9, 5.0)}, "int8"),
    ],
)
def test_the_fastest_below_a_thousandth_is_taken_and_said(changes, chosen, run, caplog):
    measured_before(run, results(**changes))
    with caplog.at_level(logging.INFO, "gpt"):
        assert quality.choose(load(run)) == chosen
    assert f"precision=auto is {chosen}, the fastest below +0.1%, on a text: float32 1000.0 ms a token" in caplog.text
    assert "measures" not in caplog.text


def test_a_checkpoint_is_measured_once_on_its_held_out_data(run, caplog):
    with caplog.at_level(logging.INFO, "gpt"):
        loaded, chosen = packed_model.load(str(run), ROOT, CPU, {}, "auto")
        content = json.loads((run / "precision_step_00000003.json").read_text())
        assert packed_model.load(str(run), ROOT, CPU, {}, "auto")[1] == chosen
    assert caplog.text.count("measures the model in each precision, once") == 1
    assert content["text"] == "the val split of topics" and list(content["measured"]) == NAMES
    assert content["identity"]["weights"]["model.safetensors"]
    assert (loaded.model.packed_head is None) == (chosen == "float32")


@pytest.mark.parametrize("change", ["weights", "threads", "processor", "format"])
def test_it_is_measured_again_for_other_weights_or_another_processor(change, run):
    loaded = load(run)
    path, identity = quality.beside(loaded.path), quality.identity_of(loaded)
    quality.keep(path, identity, "a text", results())
    assert quality.read(path, identity) == ("a text", results())
    assert quality.read(path, identity | {change: "other"}) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content["measured"].pop("float32"),
        lambda content: content["measured"].update(int2=asdict(Measured(1.0, 1.0))),
        lambda content: content["measured"]["int8"].update(bits_per_byte=math.nan),
        lambda content: content["measured"]["int8"].update(seconds_per_token="fast"),
        lambda content: content["measured"]["int8"].update(more=1.0),
        lambda content: content.update(measured=[]),
        lambda content: content.pop("text"),
        lambda content: content.clear(),
    ],
)
def test_what_is_damaged_is_measured_again(damage, run):
    loaded = load(run)
    path, identity = quality.beside(loaded.path), quality.identity_of(loaded)
    quality.keep(path, identity, "a text", results())
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    assert quality.read(path, identity) is None
    path.write_text("{")
    assert quality.read(path, identity) is None


def test_a_folder_that_cannot_be_written_to_is_no_error(run, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "gpt"):
        quality.keep(tmp_path / "nowhere" / "file.json", {}, "a text", results())
    assert "is not written: No such file or directory; the next time measures again" in caplog.text


def test_bits_per_byte_are_those_of_the_definition():
    torch.manual_seed(0)
    model = GPT(MODEL, BYTES.n_vocab).eval()
    ids = np.array([*BYTES.encode("What is it ? It is rare."), BYTES.eos])
    split = Split(ids, np.array([[0, 10, len(ids)]]), "val")
    for mask, first in (("all", 1), ("response", 10)):
        with torch.no_grad():
            losses = F.cross_entropy(model(torch.tensor(ids[None, :-1]))[0], torch.tensor(ids[1:]), reduction="none")
        wanted = float(losses[first - 1 : -1].double().mean()) / math.log(2)  # a byte each, and no end of text
        got = quality.bits_per_byte(model, split, mask, BYTES.bytes_per_token())
        assert got == pytest.approx(wanted, rel=1e-6)


def test_on_text_of_its_own_a_model_is_better_than_any_other(run):
    loaded = load(run)
    with torch.no_grad():
        loaded.model.wte.weight.mul_(8)  # so that it has something to say
    split, mask, source = quality.written(loaded)
    assert source == "text of the model's own" and len(split.ids) >= quality.TARGETS
    sizes = BYTES.bytes_per_token()
    own = quality.bits_per_byte(loaded.model, split, mask, sizes)
    for noise in (0.3, 0.6):
        with torch.no_grad():
            other = load(run).model
            other.wte.weight.mul_(8).add_(noise * torch.randn(other.wte.weight.shape) * 0.16)
        assert quality.bits_per_byte(other, split, mask, sizes) > own


def test_without_its_data_a_run_is_measured_on_text_of_its_own(original, run, monkeypatch):
    folder = original / "data"
    away = shutil.move(folder, original / "away")
    try:
        assert quality.held_out(load(run)) is None
    finally:
        shutil.move(away, folder)
    assert quality.held_out(load(run))[2] == "the val split of topics"


@pytest.mark.parametrize(
    "data", [{"fingerprint": "ab"}, {"prepared_dir": "data"}, {"prepared_dir": 3, "fingerprint": ["ab"]}, [], None]
)
def test_a_run_whose_record_does_not_say_its_data_is_measured_on_text_of_its_own(data, tmp_path):
    model = GPT(MODEL, BYTES.n_vocab)
    identity, optimizer = Identity(MODEL, BYTES.n_vocab, "bytes", "plain"), optim.build(model, adamw_config())
    checkpoint.publish(tmp_path, model, optimizer, Progress(step=3), identity, {"data": data}, keep=None)
    assert quality.held_out(load(tmp_path)) is None


def test_of_a_text_without_bytes_nothing_is_known_and_float32_stays(run):
    loaded = load(run)
    eos = np.full(quality.TARGETS, BYTES.eos)
    split = Split(eos, np.array([[0, 1, len(eos)]]), "own")
    found = {name: quality.measure(loaded, name, split, "all") for name in NAMES}
    assert {own.bits_per_byte for own in found.values()} == {0.0}
    assert [name for name in NAMES if quality.loss(found[name], found["float32"]) < math.inf] == ["float32"]


def test_a_model_whose_losses_are_not_finite_is_a_numerical_stop(run):
    loaded = load(run)
    torch.nn.init.constant_(loaded.model.ln_f.weight, torch.nan)
    with pytest.raises(UserError, match="losses are not finite") as error:
        quality.choose(loaded)
    assert error.value.code == 4


def test_a_file_of_weights_has_its_measurement_beside_it(tmp_path):
    assert quality.beside(tmp_path / "one.pt") == tmp_path / "one.pt.precision.json"


def test_a_precision_that_the_device_lacks_is_left_out(run, monkeypatch):
    def lacking(*arguments):
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", lacking)
    split, mask, _ = quality.held_out(load(run))
    assert quality.measure(load(run), "int4", split, mask) is None
    assert quality.measure(load(run), "bfloat16", split, mask).seconds_per_token > 0
    assert precision.LAYERS.keys() == set(NAMES[1:])
