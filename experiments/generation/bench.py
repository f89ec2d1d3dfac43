"""How fast text is generated, by precision and against others, and what a precision costs in quality.

    python experiments/generation/bench.py ceilings speed                  tables for the shapes of GPT-2 small
    python experiments/generation/bench.py many                            64 prompts together against one at a time
    python experiments/generation/bench.py quality lookup --checkpoint outputs/runs/mini

Weights of `speed` and `many` are random: numbers of another value take as long. What is compared runs in turns, in
`speed` each in a process of its own that is stopped in between, and medians are printed. A share of the bandwidth is of
the ceiling measured beside it. Threads wait for each other as in generate.py.
"""

import argparse
import copy
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from gpt.machine import threads  # noqa: E402

threads.prepare(are_tokens_made=True)  # before torch is loaded

import torch  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from gpt import sampling, tokenizer  # noqa: E402
from gpt.config.families import GPT2Config  # noqa: E402
from gpt.generation import packed_linear, precision, prompt_lookup  # noqa: E402
from gpt.generation.continuation import Row, continue_each  # noqa: E402
from gpt.generation.meter import bytes_of_weights  # noqa: E402
from gpt.machine import device, rates  # noqa: E402
from gpt.model import GPT, LanguageModel  # noqa: E402
from gpt.notebook import load_model  # noqa: E402
from gpt.prompts import format_prompt  # noqa: E402
from gpt.sampling import Draws  # noqa: E402

CPU = torch.device("cpu")
VOCABULARY = 50257
PROMPT = 128  # tokens before those whose speed is measured
DRAWS = Draws(128, eos=None, temperature=0.8, top_k=50, top_p=None)
# What one run of a contestant took: seconds to the first token, and for each of the others.
Run = Callable[[list[int], int], tuple[float, float]]


def small(n_layer: int) -> LanguageModel:
    device.keep_memory()  # as generate.py does
    torch.manual_seed(0)
    return GPT(GPT2Config("gpt2", "small", n_layer, 12, 768, 1024, 0.0, True, "tanh"), VOCABULARY).eval()


def prepared(model: LanguageModel, name: str) -> LanguageModel:
    """A copy of a model in a precision."""
    return model if name == "float32" else precision.prepare(copy.deepcopy(model), name)


def ours(model: LanguageModel) -> Run:
    def run(prompt: list[int], n: int) -> tuple[float, float]:
        started = time.perf_counter()
        cache = sampling.KVCache(model.config.context_length)
        logits, draws = sampling.read(model, prompt, cache), replace(DRAWS, max_new_tokens=n)
        new = sampling.stream(model, prompt, logits, cache, draws, sampling.sample_generator(0, 0))
        next(new)
        first = time.perf_counter() - started
        for _ in new:
            pass
        return first, (time.perf_counter() - started - first) / (n - 1)

    return run


def transformers(n_layer: int, dtype: torch.dtype, is_compiled: bool) -> Run:
    from transformers import CompileConfig, GPT2LMHeadModel
    from transformers import GPT2Config as TheirConfig

    model = GPT2LMHeadModel(TheirConfig(n_layer=n_layer)).to(dtype).eval()
    cache = {}
    if is_compiled:
        cache = {"cache_implementation": "static", "compile_config": CompileConfig(mode="default")}
        cache["compile_config"]._compile_all_devices = True  # else on GPUs only

    def generate(prompt: list[int], n: int) -> float:
        started, ids = time.perf_counter(), torch.tensor([prompt])
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=True,
            temperature=DRAWS.temperature, top_k=DRAWS.top_k, pad_token_id=0, **cache,
        )  # fmt: skip
        return time.perf_counter() - started

    def run(prompt: list[int], n: int) -> tuple[float, float]:
        first = generate(prompt, 1)
        return first, (generate(prompt, n) - first) / (n - 1)

    return run


def contestant(given: argparse.Namespace) -> None:
    """Answers each line of standard input, numbers of tokens of a prompt and of new ones, with a line of seconds."""
    name, *rest = given.who.split()
    model = None
    if name == "transformers":
        run = transformers(given.layers, getattr(torch, rest[0]), "compiled" in rest)
    elif name == "llama.cpp":
        import llama_cpp

        run = llama_cpp.contestant(small(given.layers), rest[0], given.threads)
    else:
        model = precision.prepare(small(given.layers), name)  # as generate.py does, without a copy of the weights
        run = ours(model)
    generator = torch.Generator().manual_seed(0)
    run(torch.randint(VOCABULARY, (32,), generator=generator).tolist(), 2)
    print(json.dumps({"bytes": bytes_of_weights(model) if model else 0}), flush=True)
    for line in sys.stdin:
        n, new = json.loads(line)
        first, of_token = run(torch.randint(VOCABULARY, (n,), generator=generator).tolist(), new)
        print(json.dumps({"first": first, "token": of_token, "memory": device.memory_gb(CPU)}), flush=True)


class Contestant:
    """A process that runs `contestant`, and is stopped while others have their turn: llama.cpp's threads wait busily,
    also when nobody asks for anything."""

    def __init__(self, who: str, given: argparse.Namespace) -> None:
        self.first: dict[int, list[float]] = {}
        self.token: list[float] = []
        command = [sys.executable, __file__, "contestant", "--who", who, "--layers", str(given.layers)]
        command += ["--threads", str(given.threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.bytes = self._answer()["bytes"]
        self.process.send_signal(signal.SIGSTOP)

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries print, too
                return json.loads(line)
        sys.exit(f"a contestant has ended with {self.process.wait()}")

    def turn(self, n: int, new: int) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(f"{json.dumps([n, new])}\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.process.send_signal(signal.SIGSTOP)
        self.first.setdefault(n, []).append(answer["first"])
        if n == PROMPT:
            self.token.append(answer["token"])
        self.memory = answer["memory"]


def ceilings(given: argparse.Namespace) -> None:
    """What the machine can do at most, at this moment."""
    print(f"threads spin {os.environ.get('GOMP_SPINCOUNT', 'as they are told')} turns")
    print(f"memory read: {rates.read_rate(CPU) / 1e9:.1f} GB/s")
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(2048, 2048).to(dtype)
        seconds = rates.shortest_duration(lambda a=a: a @ a, CPU)
        print(f"{dtype} products: {2 * 2048**3 / seconds / 1e9:.0f} GFLOP/s")


def speed(given: argparse.Namespace) -> None:
    """Tokens per second after 128 tokens of prompt, and the time to the first token after 32 and 512."""
    names = [*given.precisions, *(f"transformers {way}" for way in given.transformers)]
    runs = {who: Contestant(who, given) for who in (*names, *(f"llama.cpp {kind}" for kind in given.llama))}
    bandwidth = []
    for _ in range(given.turns):
        bandwidth.append(rates.read_rate(CPU))
        for run in runs.values():
            for n in (32, PROMPT, 512):
                run.turn(n, given.new if n == PROMPT else 2)
    peak = statistics.median(bandwidth)
    print("| | tokens/s | share of bandwidth | first token, prompt of 32 | 512 | weights read | most memory |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, run in runs.items():
        run.process.kill()
        of_token = statistics.median(run.token)
        share, size = (f"{run.bytes / of_token / peak:.2f}", f"{run.bytes / 1e6:.0f} MB") if run.bytes else ("", "")
        after = [f"{1000 * statistics.median(run.first[n]):.0f} ms" for n in (32, 512)]
        print(f"| {name} | {1 / of_token:.1f} | {share} | {' | '.join(after)} | {size} | {run.memory:.2f} GB |")
    print(f"bandwidth {peak / 1e9:.1f} GB/s ({min(bandwidth) / 1e9:.1f} to {max(bandwidth) / 1e9:.1f})")


def many(given: argparse.Namespace) -> None:
    """Prompts together against one at a time. Of the latter only some are computed, and prompts are equally long."""
    model = small(given.layers)
    lengths = [16 + n % 32 for n in range(given.prompts)]
    prompts = [torch.randint(VOCABULARY, (n,)).tolist() for n in lengths]
    for name in given.precisions:
        own = prepared(model, name)
        ratios, per_second = [], []
        for _ in range(given.turns):
            started = given.clock()
            for prompt in prompts[:2]:
                ours(own)(prompt, given.new)
            alone = 2 * given.new / (given.clock() - started)
            rows = [Row(prompt, given.new, sampling.sample_generator(0, 0)) for prompt in prompts]
            started = given.clock()
            for _ in continue_each(own, rows, given.prompts, DRAWS, n_columns=max(lengths) + given.new):
                pass
            together = given.new * given.prompts / (given.clock() - started)
            per_second.append(together)
            ratios.append(together / alone)
        what = f"{name}: {given.prompts} prompts, {given.new} new tokens each"
        spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
        print(f"{what}: {statistics.median(per_second):.0f} tokens/s together, "
              f"{statistics.median(ratios):.1f} x one at a time ({spread})", flush=True)  # fmt: skip


def quality(given: argparse.Namespace) -> None:
    """Bits per byte of MedQuAD's test answers, and against float32 the likeliest tokens and the KL divergence."""
    loaded, tokens, records = trained(given)
    length = loaded.model.config.context_length
    texts = [format_prompt("alpaca", r["instruction"], r["input"]) + r["output"] for r in records]
    rows = [tokens.encode(text)[:length] for text in texts]
    n_bytes = torch.from_numpy(tokens.bytes_per_token())
    logs: dict[str, list[torch.Tensor]] = {}
    print("| | bits per byte | top-1 agreement | KL against float32, nats |\n| --- | --- | --- | --- |")
    for name in given.precisions:
        own = prepared(loaded.model, name)
        with torch.inference_mode():
            logs[name] = [F.log_softmax(in_pieces(own, row[:-1]).double(), -1) for row in rows]
        targets = [torch.tensor(row[1:]) for row in rows]
        nats = -sum(one.gather(-1, to[:, None]).sum() for one, to in zip(logs[name], targets, strict=True))
        bits = nats / sum(n_bytes[to].sum() for to in targets) / torch.tensor(2.0).log()
        pairs = list(zip(logs["float32"], logs[name], strict=True))
        n = sum(map(len, targets))
        same = sum((p.argmax(-1) == q.argmax(-1)).sum() for p, q in pairs) / n
        divergence = sum((p.exp() * (p - q)).sum() for p, q in pairs) / n
        print(f"| {name} | {bits:.4f} | {same:.2%} | {divergence:.2e} |", flush=True)


def in_pieces(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """(T, V) logits of T tokens, few at a time, so that they come from the kernels that make a token."""
    cache, logits = sampling.KVCache(model.config.context_length), []
    for piece in torch.tensor(ids).split(packed_linear.FEW):
        logits.append(model(piece[None], cache=cache)[0])
        cache.length += len(piece)
    return torch.cat(logits)


def lookup(given: argparse.Namespace) -> None:
    """Answers with and without guessed tokens: passes of the model for a token, and tokens per second."""
    loaded, tokens, records = trained(given)
    model = loaded.model
    prompts = [tokens.encode(format_prompt(loaded.template or "alpaca", r["instruction"])) for r in records]
    n = min(given.new, model.config.context_length - max(map(len, prompts)))
    own = replace(DRAWS, max_new_tokens=n, eos=tokens.eos)
    passes = [0]
    model.blocks[0].register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    for name, draws in (("greedy", replace(own, temperature=0.0)), ("temperature 0.8, top_k 50", own)):
        for n_drafted in (None, 2, 4, 8):
            n_tokens, seconds, passes[0] = 0, 0.0, 0
            for prompt in prompts:
                cache = sampling.KVCache(model.config.context_length)
                logits = sampling.read(model, prompt, cache)
                started = given.clock()
                stream = prompt_lookup.stream_of(n_drafted)
                new = stream(model, prompt, logits, cache, draws, sampling.sample_generator(0, 0))
                n_tokens += sum(1 for _ in new)
                seconds += given.clock() - started
            print(f"{name}, lookup={n_drafted}: {n_tokens / (passes[0] - len(prompts)):.2f} tokens a pass, "
                  f"{n_tokens / seconds:.1f} tokens/s", flush=True)  # fmt: skip


def trained(given: argparse.Namespace) -> tuple:
    """The checkpoint, its tokenizer, and the first records of MedQuAD's test split."""
    loaded = load_model(given.checkpoint)
    with open(ROOT / "outputs/data/medquad/test.jsonl", encoding="utf-8") as file:
        return loaded, tokenizer.load(loaded.tokenizer_name), [json.loads(line) for line in islice(file, given.prompts)]


def main() -> None:
    parts = {part.__name__: part for part in (ceilings, speed, many, quality, lookup, contestant)}
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="+", choices=parts)
    parser.add_argument("--checkpoint")
    parser.add_argument("--who", help="of `contestant`")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16", "int8", "int4"])
    parser.add_argument("--transformers", nargs="*", default=["float32", "bfloat16"],
                        help='also "bfloat16 compiled"')  # fmt: skip
    parser.add_argument("--llama", nargs="*", default=[], help="F32 BF16 Q8_0 Q4_0, with the package xllamacpp")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="of this process, where others use the processor, too")
    given = parser.parse_args()
    given.clock = time.process_time if given.cpu_time else time.perf_counter
    torch.set_num_threads(given.threads)
    for part in given.parts:
        parts[part](given)


if __name__ == "__main__":
    main()
