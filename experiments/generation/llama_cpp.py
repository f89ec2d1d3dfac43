"""llama.cpp as a contestant of bench.py, with the same weights, written as GGUF by the package gguf.

`pip install xllamacpp`: its server without a network says itself how long a prompt and each token took.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import gguf

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpt import tokenizer
from gpt.model import LAYER_NORM_EPS, LanguageModel

TYPES = {"F32": gguf.GGMLQuantizationType.F32, "BF16": gguf.GGMLQuantizationType.BF16,
         "Q8_0": gguf.GGMLQuantizationType.Q8_0, "Q4_0": gguf.GGMLQuantizationType.Q4_0}  # fmt: skip


def write(model: LanguageModel, path: Path, kind: str) -> None:
    """Writes a GPT-2 with a tied head; matrices in a type of TYPES, all else, and positions, in float32."""
    c = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(c.n_layer)
    writer.add_context_length(c.context_length)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(LAYER_NORM_EPS)
    vocabulary, merges = (tokenizer.openai_file(name) for name in (tokenizer.ENCODER, tokenizer.MERGES))
    words = json.loads(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    ordered = sorted(words, key=words.get)
    writer.add_token_list(ordered)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if word == tokenizer.END_OF_TEXT else normal for word in ordered])
    writer.add_token_merges(merges.decode().splitlines()[1:])
    writer.add_eos_token_id(len(words) - 1)
    writer.add_bos_token_id(len(words) - 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, c.n_layer)
    for name, tensor in model.state_dict().items():
        place = names.get_name(f"transformer.{name}", try_suffixes=(".weight", ".bias"))
        is_matrix = tensor.dim() == 2 and name != "wpe.weight"
        own = TYPES[kind] if is_matrix else TYPES["F32"]
        writer.add_tensor(place, gguf.quants.quantize(tensor.numpy(), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def contestant(model: LanguageModel, kind: str, threads: int) -> Callable[[list[int], int], tuple[float, float]]:
    """A function as bench.py's: seconds to the first token and for each of the others, without a cached prompt."""
    import xllamacpp

    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "model.gguf"
    write(model, path, kind)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = model.config.context_length
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup = True
    server = xllamacpp.Server(params)

    def run(prompt: list[int], n: int) -> tuple[float, float]:
        answer = server.handle_completions({
            "prompt": prompt, "n_predict": n, "ignore_eos": True, "cache_prompt": False, "temperature": 0.8,
            "top_k": 50,
        })  # fmt: skip
        timings = (answer if isinstance(answer, dict) else json.loads(answer))["timings"]
        assert timings["predicted_n"] == n and timings["prompt_n"] == len(prompt), timings
        return timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000 / (n - 1)

    run.folder = folder  # the file is there as long as the function
    return run
