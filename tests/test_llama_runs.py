"""Llamas and Qwen3s of transformers: they are read, fine-tuned with their own tokenizers, and handed back."""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from llama_folder import END, OTHER, trained, write_model, write_tokenizer
from peft import PeftModel
from test_conf import loaded
from test_train import in_directory
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt import sampling, tokenizer
from gpt.config import launch, schema
from gpt.errors import UserError
from gpt.modern import Modern
from gpt.runs import checkpoint
from gpt.weights import export, loading
from train import train

CPU = torch.device("cpu")
WINDOW = {
    "use_sliding_window": True, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 5000.0}
KINDS = {
    "llama": ("Llama", {"rope_parameters": PLAIN, "tie_word_embeddings": False, "shard": "30KB"}),
    "llama tied": ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen3 with windows": ("Qwen3", {"tie_word_embeddings": False, **WINDOW}),
}
SMALL = [
    "model=pretrained_modern", "train.tokens_per_step=64", "train.max_steps=2", "train.micro_batch=1",
    "train.eval_every=2", "train.eval_tokens=64", "train.save_every=2", "train.sample_every=2",
    "sample.max_new_tokens=4", "device=cpu", "wandb.mode=disabled", "train.dtype=float32", "optimizer.lr=0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name -> transformers' model and its folder."""
    folder = tmp_path_factory.mktemp("models")
    return {name: (write_model(folder / name, kind, **s), folder / name) for name, (kind, s) in KINDS.items()}


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """Settings and folder of a run that begins with the Qwen3."""
    return trained_from(models["qwen3"][1], tmp_path_factory.mktemp("run"), "finetune=full")


def trained_from(weights, folder, *changes):
    cfg = loaded(*SMALL, f"init.from={weights}", f"data.prepared_dir={folder / 'data'}", *changes)
    cfg = in_directory(cfg, folder / "run")
    train(cfg)
    return cfg, folder / "run"


def logits(theirs, tokens):
    with torch.inference_mode():
        return theirs(tokens).logits[..., :400]  # all that have a token


@pytest.mark.parametrize("name", KINDS)
def test_transformers_computes_the_same_logits_before_and_after_the_way_through_this_project(name, models, tmp_path):
    theirs, folder = models[name]
    ours = loading.load(str(folder), ROOT, CPU)
    tokens = torch.randint(400, (2, 40))
    with torch.inference_mode():
        torch.testing.assert_close(ours.model(tokens), logits(theirs, tokens), rtol=0, atol=1e-5)
    export.write(ours, tmp_path / "exported")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(info.values()) and type(again) is type(theirs)
    torch.testing.assert_close(logits(again, tokens), logits(theirs, tokens), rtol=0, atol=1e-5)


def test_it_is_fine_tuned_with_its_own_tokenizer_and_handed_back_with_it(models, run, tmp_path):
    cfg, run_dir = run
    theirs, folder = models["qwen3"]
    assert cfg.data.tokenizer == str(folder) and cfg.model.context_length == 64
    ours = loading.load(str(run_dir), ROOT, CPU)
    export.write(ours, tmp_path / "exported")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokens = torch.randint(400, (2, 40))
    with torch.inference_mode():
        torch.testing.assert_close(ours.model(tokens), logits(again, tokens), rtol=0, atol=1e-5)
    assert (logits(again, tokens) - logits(theirs, tokens)).abs().max() > 0.01  # it has learned something
    own, its = tokenizer.load(ours.tokenizer_name), AutoTokenizer.from_pretrained(tmp_path / "exported")
    text = f"  What is asthma?\n\n{END} naïve {OTHER} 漢字"
    assert its(text, split_special_tokens=True)["input_ids"] == own.encode(text)
    assert (its.eos_token_id, its.decode(own.encode(text))) == (own.eos, text)
    prompt = own.encode("What is")
    draws = sampling.Draws(8, own.eos, temperature=0, top_k=None, top_p=None)
    [new] = sampling.generate(ours.model, prompt, draws, num_samples=1, seed=0)
    assert (
        again.generate(torch.tensor([prompt]), max_new_tokens=8)[0].tolist()[: len(prompt) + len(new)] == prompt + new
    )


def test_checkpoint_model_file_and_data_carry_the_tokenizer(run, monkeypatch, tmp_path):
    cfg, run_dir = run
    step, name = run_dir / "checkpoints" / "step_00000002", tokenizer.load(cfg.data.tokenizer).name
    [data] = [path.parent for path in (run_dir.parent / "data").glob("*/tokenizer.json")]
    for place in (step, data):
        assert tokenizer.read(place).name == name
    shutil.copytree(step, tmp_path / step.name)
    for path in (step, run_dir / "last_model.pt"):
        tokenizer.load.cache_clear()
        monkeypatch.setattr(tokenizer, "_read", {})  # as in another process
        assert (
            tokenizer.load(loading.load(str(path), ROOT, CPU).tokenizer_name).encode("x") == trained().encode("x").ids
        )
    (tmp_path / step.name / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: 2 bytes, not"):
        checkpoint.verify(tmp_path / step.name)


def test_a_run_goes_on_with_the_tokenizer_of_its_checkpoint_and_with_no_other(run, tmp_path):
    cfg, run_dir = run
    shutil.copytree(run_dir, tmp_path / "run")
    typed = [*SMALL, f"init.from={cfg.init.from_}", f"data.prepared_dir={cfg.data.prepared_dir}", "finetune=full"]
    own = tmp_path / "run" / "checkpoints" / "step_00000002"
    train(in_directory(loaded(*typed, f"data.tokenizer={own}"), tmp_path / "run"))
    other = write_tokenizer(tmp_path / "other", eos_token=OTHER)
    with pytest.raises(UserError, match="the checkpoint is of another model: tokenizer json-"):
        train(in_directory(loaded(*typed, f"data.tokenizer={other}"), tmp_path / "run"))


def test_a_run_that_begins_with_another_run_takes_its_architecture_and_tokenizer(run, tmp_path):
    cfg = loaded(*SMALL, f"init.from={run[1]}")
    assert cfg.data.tokenizer == str(run[1] / "checkpoints" / "step_00000002")
    assert (cfg.model.qk_norm, cfg.model.head_size) == ("before_rotation", 16)


def test_peft_reads_the_adapter_of_a_run(models, tmp_path):
    targets = "finetune.targets=[self_attn.q_proj,mlp.down_proj]"
    _, run_dir = trained_from(models["llama"][1], tmp_path, "finetune=lora", targets)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(models["llama"][1]), run_dir / "adapter")
    tokens = torch.randint(400, (2, 40))
    for path in (run_dir, run_dir / "adapter"):
        ours = loading.load(str(path), ROOT, CPU).model
        with torch.inference_mode():
            torch.testing.assert_close(ours(tokens), logits(theirs, tokens), rtol=0, atol=1e-5)


def test_a_model_that_no_public_class_computes_is_not_exported_and_all_of_its_own_settings_are_named(models, tmp_path):
    ours = loading.load(str(models["llama"][1]), ROOT, CPU)
    config = replace(ours.model.config, activation="relu2", logit_softcap=15.0)
    with pytest.raises(UserError) as caught:
        export.write(replace(ours, model=Modern(config, 400)), tmp_path / "exported")
    reason = "neither LlamaForCausalLM nor Qwen3ForCausalLM has model.activation=relu2, model.logit_softcap=15.0"
    assert caught.value.what == f"the model cannot be exported: {reason}" and not list(tmp_path.iterdir())


def test_init_from_alone_chooses_the_settings_of_the_family(models):
    assert launch.architecture("gpt2", None) == "pretrained"
    assert launch.architecture(str(models["llama"][1]), None) == "pretrained_modern"
    cfg = launch.compose([f"init.from={models['llama'][1]}"])
    assert isinstance(cfg, schema.TrainConfig) and cfg.model.family == "modern" and cfg.finetune.name == "full"
    with pytest.raises(UserError, match="several architectures, model=pretrained and model=pretrained_modern"):
        launch.compose(["-m", f"init.from=choice(gpt2,'{models['llama'][1]}')"])
    with pytest.raises(UserError, match=r"is of the family modern.*set model=pretrained_modern"):
        loaded("model=pretrained", f"init.from={models['llama'][1]}")
