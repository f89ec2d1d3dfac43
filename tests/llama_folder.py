"""Folders as the hub has them: tiny Llamas and Qwen3s that transformers makes, and their own tokenizers."""

import json
from functools import cache
from pathlib import Path

import torch
from conftest import ROOT
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

END, OTHER = "<|end|>", "<|im_start|>"  # ids 0 and 1
# How Qwen's models, and in much the same way Llama 3's, cut texts before they merge bytes.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def trained() -> Tokenizer:
    """A byte-level byte-pair encoding of 400 tokens, trained on the sample data."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END, OTHER], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((ROOT / "gpt" / "sample.csv").read_text().splitlines(), trainer)
    return tokenizer


def write_tokenizer(folder: Path, **settings: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    trained().save(str(folder / "tokenizer.json"))
    content = {"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def write_model(folder: Path, kind: str, shard: str = "1GB", **settings: object) -> torch.nn.Module:
    """A model of transformers, "Llama" or "Qwen3", with 20 rows in its embedding that no token has."""
    import transformers

    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 420, "eos_token_id": 0,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**shape | {"head_dim": 8} | settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():  # far from uniform
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return model
