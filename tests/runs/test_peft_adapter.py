"""Adapters in peft's files: the library itself, on transformers' model with the same weights, is the reference."""

import copy
import json

import pytest
import torch
from conftest import LINEAR, ROOT, model_config
from test_lora import TOKENS, adapted, build

from gpt import lora
from gpt.config.schema import LoRAConfig
from gpt.errors import CHECKPOINT, ENVIRONMENT, UserError
from gpt.model import GPT
from gpt.runs import peft_adapter
from gpt.runs.checkpoint import Identity
from gpt.runs.model_file import save_model
from gpt.weights import loading

pytestmark = pytest.mark.filterwarnings("ignore:.*(is_gradient_checkpointing|have invalid shape)")


def near(a, b, tolerance=1e-5):
    return (a - b).abs().max() < tolerance


@pytest.fixture(scope="module")
def gpt2():
    """Makes transformers' model with the weights of ours."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=257, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    weights = {
        f"transformer.{name}": tensor.T if name.endswith(tuple(f"{target}.weight" for target in LINEAR)) else tensor
        for name, tensor in build().state_dict().items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied
    assert near(model(TOKENS).logits, build()(TOKENS))
    return lambda: copy.deepcopy(model)


@pytest.fixture
def by_peft(gpt2, tmp_path):
    """Makes an adapter with peft and saves it with peft; returns its directory and the logits with it."""
    import peft

    def make(kind="LoraConfig", **settings):
        torch.manual_seed(2)
        cfg = getattr(peft, kind)(task_type="CAUSAL_LM", fan_in_fan_out=True, **settings)
        model = peft.get_peft_model(gpt2(), cfg).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
        model.save_pretrained(tmp_path / "peft")
        return tmp_path / "peft", model(TOKENS).logits

    return make


def write_base(directory, model):
    """The model that an adapter is for, beside it and named by it."""
    save_model(directory / "base.pt", model, Identity(model.config, 257, "bytes", None), 0)
    with_settings(base_model_name_or_path="base.pt")(directory)


def load(directory):
    """The merged model of an adapter, as generate.py loads it."""
    return loading.load(str(directory), ROOT, torch.device("cpu")).model


def merged(directory, model):
    write_base(directory, model)
    return load(directory)


@pytest.mark.parametrize(
    ("rank", "alpha", "targets"),
    [(4, 8, ["attn.c_attn"]), (3, 2.5, ["mlp.c_proj"]), (1, 1, ["attn.c_proj", "mlp.c_fc"]), (2, 4, list(LINEAR))],
)
def test_peft_computes_with_a_saved_adapter_what_we_do(rank, alpha, targets, gpt2, tmp_path):
    from peft import PeftModel

    cfg = LoRAConfig(rank, alpha, targets)
    model = adapted(cfg)
    peft_adapter.save(tmp_path / "adapter", model, cfg, "gpt2")
    theirs = PeftModel.from_pretrained(gpt2(), str(tmp_path / "adapter")).eval()
    assert near(theirs(TOKENS).logits, model(TOKENS)) and not near(build()(TOKENS), model(TOKENS), 0.01)
    adapted_layers = {name.rsplit(".lora_A", 1)[0] for name, _ in theirs.named_modules() if name.endswith(".lora_A")}
    assert adapted_layers == {f"base_model.model.transformer.h.{i}.{target}" for i in (0, 1) for target in targets}
    assert theirs.peft_config["default"].base_model_name_or_path == "gpt2"


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]},
        {"r": 3, "lora_alpha": 16, "target_modules": ["c_proj"], "lora_dropout": 0.1},
        {"r": 2, "lora_alpha": 5, "target_modules": r".*\.mlp\.c_(fc|proj)", "init_lora_weights": "gaussian"},
        {"r": 4, "lora_alpha": 3, "target_modules": "all-linear", "use_rslora": True},
        {"r": 4, "lora_alpha": 64, "target_modules": ["c_attn", "c_fc"], "layers_to_transform": [1]},
    ],
    ids=["c_attn", "c_proj", "regex", "rslora", "one layer"],
)
def test_we_compute_with_an_adapter_of_pefts_what_it_does(settings, by_peft):
    directory, logits = by_peft(**settings)
    assert near(merged(directory, build())(TOKENS), logits) and not near(build()(TOKENS), logits, 0.01)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "use_dora true"),
        ({"bias": "all"}, "bias all"),
        ({"lora_bias": True}, "lora_bias true"),
        ({"modules_to_save": ["ln_f"]}, r'modules_to_save \["ln_f"\]'),
        ({"rank_pattern": {"h.0.attn.c_attn": 1}}, "rank_pattern"),
        ({"alpha_pattern": {"h.0.attn.c_attn": 1}}, "alpha_pattern"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa, with which the weights of the model change"),
        (
            {"target_modules": ["c_attn", "wte"]},
            "not an adapter of a linear layer of GPT-2, Llama or Qwen3: .*wte.lora_embedding_A",
        ),
        ({"kind": "IA3Config", "feedforward_modules": []}, "peft_type IA3, not LORA"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_pefts_adapters_can_and_ours_cannot_is_refused_with_the_reason(settings, reason, by_peft):
    directory, _ = by_peft(**{"target_modules": ["c_attn"], **settings})
    with pytest.raises(UserError, match=reason) as caught:
        merged(directory, build())
    assert caught.value.code == CHECKPOINT


@pytest.fixture
def saved(tmp_path):
    cfg = LoRAConfig(4, 8, ["attn.c_attn"])
    model = adapted(cfg)
    directory = tmp_path / "run" / "adapter"
    peft_adapter.save(directory, model, cfg, None)
    write_base(directory, build())
    return directory, model


def test_what_is_saved_is_read_back(saved):
    directory, model = saved
    adapter = peft_adapter.read(directory)
    assert (adapter.lora, adapter.base) == (LoRAConfig(4, 8, ["attn.c_attn"]), "base.pt")
    assert all(torch.equal(tensor, adapter.tensors[name]) for name, tensor in lora.adapters(model).items())
    assert near(load(directory)(TOKENS), model(TOKENS))
    assert {path.name for path in directory.iterdir()} == {peft_adapter.CONFIG, peft_adapter.WEIGHTS, "base.pt"}


@pytest.mark.parametrize("base", [None, ""])
def test_an_adapter_that_does_not_name_its_model_says_what_to_do(base, saved):
    directory, _ = saved
    with_settings(base_model_name_or_path=base)(directory)
    with pytest.raises(UserError, match=r"does not say which model it is for .*; name the model in") as caught:
        load(directory)
    assert caught.value.code == CHECKPOINT
    (directory.parent / "last_model.pt").touch()
    with pytest.raises(UserError, match=r"the merged model is .*last_model.pt"):
        load(directory)


def test_a_model_that_is_not_there_is_named(saved):
    with_settings(base_model_name_or_path="./gone")(saved[0])
    with pytest.raises(UserError, match=r"the model that the adapter is for, ./gone: no such file") as caught:
        load(saved[0])
    assert caught.value.code == CHECKPOINT


def with_settings(**changes):
    def damage(directory):
        file = directory / peft_adapter.CONFIG
        settings = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in settings.items() if value != "left out"}))

    return damage


def cut(name, n_bytes):
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:n_bytes])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda directory: (directory / peft_adapter.CONFIG).unlink(),
            "no config.json beside the weights: adapter_model.safetensors, base.pt",
        ),
        (lambda directory: (directory / peft_adapter.WEIGHTS).unlink(), "adapter_model.safetensors: missing"),
        (cut(peft_adapter.CONFIG, 20), "adapter_config.json damaged"),
        (cut(peft_adapter.WEIGHTS, 100), "adapter_model.safetensors damaged"),
        (cut(peft_adapter.WEIGHTS, -4), "adapter_model.safetensors damaged"),
        (lambda directory: (directory / peft_adapter.CONFIG).write_text("[" * 10**5), "adapter_config.json damaged"),
        (
            lambda directory: (directory / peft_adapter.CONFIG).write_bytes(b" " * (2**20 + 1)),
            "more than 1048576 bytes",
        ),
        (with_settings(r=10**12), "r is 1000000000000 in adapter_config.json"),
        (with_settings(r="left out"), "'r' missing"),
        (with_settings(r=True), "rank: "),
        (with_settings(lora_alpha=float("nan")), "alpha: "),
        (with_settings(lora_alpha=1e308, use_rslora=True, r=4), "alpha: "),
        (with_settings(base_model_name_or_path=[1]), "string"),
        (with_settings(init_lora_weights={}), "init_lora_weights"),
        (with_settings(something_of_tomorrow=True), "something_of_tomorrow true"),
    ],
)
def test_damaged_and_hostile_files_are_refused_with_the_reason(damage, reason, saved):
    damage(saved[0])
    with pytest.raises(UserError, match=reason) as caught:
        load(saved[0])
    assert caught.value.code == CHECKPOINT


def test_an_adapter_of_a_model_of_another_shape_is_refused_with_both_shapes(saved):
    write_base(saved[0], GPT(model_config(n_embd=32), 257))
    with pytest.raises(UserError, match=r"A \[4, 16\] and B \[48, 4\].* the weight, which is \[96, 32\]") as caught:
        load(saved[0])
    assert caught.value.code == CHECKPOINT


def test_an_adapter_that_cannot_be_written_leaves_the_one_before_and_no_other_file(saved, tmp_path):
    directory, model = saved
    (directory / peft_adapter.WEIGHTS).unlink()
    (directory / peft_adapter.WEIGHTS).mkdir()  # cannot be replaced by a file
    before = (directory / peft_adapter.CONFIG).read_bytes()
    with pytest.raises(UserError, match="adapter not written: Is a directory") as caught:
        peft_adapter.save(directory, model, LoRAConfig(4, 16, ["attn.c_attn"]), None)
    assert caught.value.code == ENVIRONMENT
    assert (directory / peft_adapter.CONFIG).read_bytes() == before
    assert sorted(path.name for path in directory.iterdir()) == [peft_adapter.CONFIG, peft_adapter.WEIGHTS, "base.pt"]


def test_how_peft_gets_a_model_that_it_does_not_read_stands_beside_the_adapter(tmp_path):
    ours, theirs, files = tmp_path / "my run", tmp_path / "hf", tmp_path / "step"
    for folder in (ours, theirs, files):
        folder.mkdir()
    (theirs / "config.json").write_text("{}")
    (files / "config.json").write_text("{}")
    (files / "manifest.json").write_text("{}")
    names = ["gpt2", "someone/tiny", str(theirs), str(ours), str(files), "weights.pth", "models/weights.pth"]
    assert [peft_adapter.can_load(name) for name in names] == [True, True, True, False, False, False, False]
    adapter = tmp_path / "run" / "adapter"
    peft_adapter.say_how(adapter, str(ours))
    text = (adapter / "README.md").read_text()
    assert f"generate.py 'checkpoint={ours}' export={adapter.parent / 'base'}" in text
    assert (
        f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{adapter.parent / 'base'}'), '{adapter}')"
        in text
    )
