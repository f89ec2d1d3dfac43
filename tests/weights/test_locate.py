"""What `init.from` and `checkpoint` name, and the architecture that a command line takes from it."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from test_launch import composed, run_script

from gpt.config import arguments, launch, schema
from gpt.errors import UserError
from gpt.weights import locate
from gpt.weights.source import Architecture

GPT2 = {"model_type": "gpt2", "n_layer": 3, "n_head": 2, "n_embd": 32, "n_positions": 24, "vocab_size": 50257}
HPARAMS = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1024, "n_head": 16, "n_layer": 24}
STEP = "runs/mine/checkpoints/step_00000007"
FILES = {
    f"{STEP}/manifest.json": "{}", f"{STEP}/model.safetensors": "", f"{STEP}/state.safetensors": "",
    "runs/mine/last_model.pt": "", "runs/mine/config.yaml": "",
    "hf/config.json": json.dumps(GPT2), "hf/model.safetensors": "", "hf/pytorch_model.bin": "", "hf/vocab.json": "{}",
    "hf/fine_tuned.pth": "", "hf/other.safetensors": "",
    "355M/hparams.json": json.dumps(HPARAMS), "355M/model.ckpt.index": "", "355M/model.ckpt.meta": "",
    "355M/model.ckpt.data-00000-of-00001": "", "355M/checkpoint": "",
    "fine_tuned.pth": "", "ckpt.pt": "", "weights.safetensors": "", "gpt2/config.json": json.dumps(GPT2),
    "nothing/notes.txt": "", "nothing/readme.md": "",
    "above/hf/config.json": json.dumps(GPT2), "above/notes.txt": "",
    "adapter/adapter_config.json": "{}", "adapter/adapter_model.safetensors": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with something of every kind; what is in the files is not looked at."""
    root = tmp_path_factory.mktemp("root")
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    (root / "empty").mkdir()
    os.mkfifo(root / "pipe")
    return root


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """Nobody answers, and nothing has been downloaded before."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def problem(name: str, root: Path, code: int = 3) -> UserError:
    with pytest.raises(UserError) as caught:
        locate.find(name, None, root)
    assert caught.value.code == code and "\n" not in str(caught.value), str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("name", "kind", "path"),
    [
        ("runs/mine", "own", "runs/mine"),
        (STEP, "own", STEP),
        (f"{STEP}/model.safetensors", "own", STEP),
        (f"{STEP}/manifest.json", "own", STEP),
        ("runs/mine/last_model.pt", "file", "runs/mine/last_model.pt"),
        ("hf", "transformers", "hf"),
        ("hf/", "transformers", "hf"),
        ("./hf", "transformers", "hf"),
        ("hf/model.safetensors", "transformers", "hf"),
        ("hf/pytorch_model.bin", "transformers", "hf"),
        ("hf/config.json", "transformers", "hf"),
        ("hf/fine_tuned.pth", "file", "hf/fine_tuned.pth"),
        ("hf/other.safetensors", "file", "hf/other.safetensors"),
        ("355M", "tensorflow", "355M"),
        ("355M/model.ckpt.index", "tensorflow", "355M"),
        ("355M/model.ckpt.meta", "tensorflow", "355M"),
        ("355M/model.ckpt.data-00000-of-00001", "tensorflow", "355M"),
        ("355M/checkpoint", "tensorflow", "355M"),
        ("355M/hparams.json", "tensorflow", "355M"),
        ("fine_tuned.pth", "file", "fine_tuned.pth"),
        ("ckpt.pt", "file", "ckpt.pt"),
        ("weights.safetensors", "file", "weights.safetensors"),
    ],
)
def test_what_a_name_is_taken_for(root, monkeypatch, name, kind, path):
    source = locate.find(name, None, root)
    assert (source.name, source.kind, source.path.resolve(), source.revision) == (name, kind, root / path, None)
    elsewhere = Path("/nowhere")
    assert locate.find(str(root / name), None, elsewhere).path.resolve() == root / path
    monkeypatch.setenv("HOME", str(root))
    assert locate.find(f"~/{name}", None, elsewhere).path.resolve() == root / path


def test_a_folder_called_gpt2_is_meant_by_its_path_and_the_hubs_by_its_name(root, no_hub):
    assert locate.find("./gpt2", None, root).path == root / "gpt2"
    assert locate.find(str(root / "gpt2"), None, root).path == root / "gpt2"
    assert "openai-community/gpt2 cannot be had" in problem("gpt2", root, code=5).what


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "someone/tiny"])
def test_without_the_hub_a_line_says_at_once_where_to_put_the_files(root, no_hub, name):
    started = time.perf_counter()
    error = problem(name, root, code=5)
    assert time.perf_counter() - started < 5
    folder = root / "outputs" / "weights" / name
    assert f"put config.json and model.safetensors into {folder}" in error.remedy


def test_what_was_put_there_is_found(tmp_path, no_hub):
    folder = tmp_path / "outputs" / "weights" / "gpt2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(GPT2))
    source = locate.find("gpt2", None, tmp_path)
    assert (source.path, source.kind, source.revision) == (folder, "transformers", None)
    other = tmp_path / "another"
    shutil.copytree(tmp_path / "outputs", other / "outputs")
    (other / "outputs" / "weights" / "gpt2" / "config.json").write_text('{"model_type": "mistral"}')
    assert "a mistral model, not GPT-2, Llama or Qwen3" in problem("gpt2", other).what


@pytest.mark.parametrize(
    "name",
    [
        "hf/gone", "hf/gone.pth", "gone.pth", "./someone/tiny", "a/b/c", "/gone/x", "someone/", "~/x", "../x",
        "models/gpt2_small_trained.pth", "models/last_model.pt", "models/x.CKPT", "models/x.safetensors",
        "hf/model-00001-of-00002.safetensors", "models/model.ckpt.index", "models/pytorch_model.bin", "gpt2/355M",
    ],
)  # fmt: skip
def test_a_path_that_is_not_there_is_no_name_on_the_hub(root, no_hub, name):
    error = problem(name, root)
    assert error.what == "no such file or directory" and "gpt2-xl" in error.remedy


def test_a_directory_without_weights_says_what_is_in_it_and_where_they_may_be(root):
    assert problem("empty", root).what == "an empty directory"
    assert problem("nothing", root).what == "no weights: notes.txt, readme.md"
    above = problem("above", root)
    assert above.what == "no weights: hf, notes.txt" and above.remedy == f"did you mean {root / 'above' / 'hf'}?"
    (root / "bare").mkdir()
    for name in ("adapter_model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors"):
        (root / "bare" / name).touch()
    bare = problem("bare", root)
    assert bare.what.startswith("no config.json beside the weights: adapter_model.safetensors, model-0")
    assert bare.remedy == f"did you mean {root / 'bare' / 'model.safetensors'}?"
    assert locate.find("adapter", None, root).kind == "adapter"
    assert problem("pipe", root).what == problem("/dev/null", root).what == "not an ordinary file"


def test_the_architecture_is_what_the_configuration_says(root):
    architecture = locate.architecture(locate.find("hf", None, root), root)
    assert architecture == Architecture(3, 2, 32, 24, 50257, True, "tanh", ("n_head", "gelu"))
    architecture = locate.architecture(locate.find("355M", None, root), root)
    assert architecture == Architecture(24, 16, 1024, 1024, 50257, True, "tanh", ("n_head",))


# Command lines


def settings(*typed: str) -> schema.TrainConfig:
    """What train.py gets from these arguments."""
    typed = [*arguments.choices_for_weights(list(typed), launch.architecture), *typed]
    return launch.to_dataclass(composed(*typed), schema.TrainConfig)


def test_init_from_alone_takes_the_architecture_and_fine_tunes(root):
    cfg = settings(f"init.from={root / 'hf'}")
    m = cfg.model
    assert (m.name, m.n_layer, m.n_head, m.n_embd, m.context_length) == ("hf", 3, 2, 32, 24)
    assert (m.tie_weights, m.gelu) == (True, "tanh")
    assert cfg.finetune.name == "full" and cfg.optimizer.lr < settings().optimizer.lr and settings().finetune is None
    assert settings(f"init.from={root / '355M'}").model.n_layer == 24


def test_what_is_given_beside_it_wins(root):
    name = f"init.from={root / 'hf'}"
    assert settings(name, "model.context_length=16").model.context_length == 16
    cfg = settings(name, "model=tiny", "finetune=lora")
    assert (cfg.model.name, cfg.finetune.name) == ("tiny", "lora")
    for typed in (["init.from=null"], []):
        assert arguments.choices_for_weights(typed, launch.architecture) == []


def test_the_name_of_a_model_is_never_empty(root, monkeypatch):
    assert locate.setting(".", None, root / "hf", "name") == "hf"
    assert locate.setting(f"{root}/hf/", None, root, "name") == "hf"


def test_a_pretrained_model_needs_weights(root):
    with pytest.raises(UserError, match=r"set init\.from=gpt2"):
        locate.setting(None, None, root, "n_layer")


@pytest.mark.parametrize(("name", "what"), [("gone", "no such file or directory"), ("empty", "an empty directory")])
def test_weights_that_cannot_be_read_are_the_error_of_a_configuration(root, name, what):
    with pytest.raises(UserError) as caught:
        launch.validated(composed(f"init.from={root / name}", "model=pretrained"), schema.TrainConfig)
    assert caught.value.code == 3 and str(caught.value).startswith(f"{what} ({root / name})")


def test_another_family_of_models_ends_a_command_line_with_its_own_line_and_code(tmp_path):
    other = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(other))
    result = run_script(f"init.from={tmp_path}", f"out_dir={tmp_path / 'run'}")
    assert result.returncode == 3, result.stderr
    expected = f"error: a mistral model (MistralForCausalLM), not GPT-2, Llama or Qwen3 ({tmp_path / 'config.json'});"
    assert result.stderr.splitlines() == [f"{expected} only these can be read"] and not list(tmp_path.glob("run/*"))
