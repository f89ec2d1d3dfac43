"""Everything that bench.py compares, each in a process of its own: `python contestants.py <json>`.

The process builds its model, takes one step, and says so. Then it reads numbers of steps from standard input, takes
them and answers with their seconds and real tokens, one line of JSON each, until its input ends.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

STARTED = time.perf_counter()
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import yaml  # noqa: E402

if TYPE_CHECKING:
    from gpt.config.data import InstructionDataConfig

VOCABULARY = 50257
LR, BETAS, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0
Step = Callable[[], int]  # one optimizer step; returns the number of its tokens that are not padding


def random_rows(rows: int, context: int) -> Iterator[torch.Tensor]:
    """(rows, context + 1) ids, others in each step."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(VOCABULARY, (rows, context + 1), generator=generator)


def this_project(job: dict, device: torch.device, dtype: torch.dtype) -> Step:
    """A step as train.py takes it: on random rows, or on instruction data, packed."""
    from gpt import loop, optim
    from gpt.config.families import GPT2Config
    from gpt.config.optimizers import AdamWConfig
    from gpt.data.batching import Batch, Split, TrainBatches
    from gpt.machine import compilation
    from gpt.machine.device import keep_memory
    from gpt.machine.machine import Machine
    from gpt.model import GPT
    from gpt.objective import NEXT_TOKEN

    keep_memory()
    n_layer, n_head, n_embd = job["shape"]
    config = GPT2Config("gpt2", job["model"], n_layer, n_head, n_embd, job["context"], job["dropout"], True, "tanh")
    model = GPT(config, VOCABULARY).to(device).train()
    optimizer = optim.build(model, AdamWConfig("adamw", LR, WEIGHT_DECAY, *BETAS, 1e-8, None, None, None))
    if job["compile"]:
        compilation.compile_blocks(model, ROOT / "outputs" / "compiled")
    if job["data"]:
        batches = TrainBatches(Split.open(Path(job["data"]), "train"), *packed(job), seed=0)
        steps = map(batches.step, itertools.count())
    else:
        n = job["rows"] * job["context"]
        rows = random_rows(job["rows"], job["context"])
        steps = ([Batch(ids[:, :-1], ids[:, 1:], None, None, n, n)] for ids in rows)

    def step() -> int:
        micro_batches = next(steps)
        loop.train_step(model, optimizer, NEXT_TOKEN, micro_batches, Machine(device, dtype), grad_clip=CLIP)
        return sum(batch.n_tokens for batch in micro_batches)

    return step


def packed(job: dict) -> tuple:
    """(data, context_length, train) settings: those of conf/, with as many tokens in a step as 8 rows have."""
    from gpt.config.schema import TrainSection

    train = yaml.safe_load((ROOT / "conf/train.yaml").read_text())["train"]
    sizes = {"tokens_per_step": job["rows"] * job["context"], "micro_batch": job["rows"], "max_tokens": None}
    return medquad(prepared_dir=job["data"]), job["context"], TrainSection(**train | sizes)


def medquad(**changes: str) -> "InstructionDataConfig":
    """data=medquad, with some settings changed."""
    from gpt.config.data import InstructionDataConfig

    return InstructionDataConfig(**yaml.safe_load((ROOT / "conf/data/medquad.yaml").read_text()) | changes)


def plain_step(model: torch.nn.Module, logits: Callable, job: dict, device: torch.device, dtype: torch.dtype) -> Step:
    """A full step around somebody else's model: cross-entropy of all logits, clipping, fused AdamW."""
    model.to(device).train()
    if job["compile"]:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, betas=BETAS, fused=True)
    source = random_rows(job["rows"], job["context"])

    def step() -> int:
        rows = next(source).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = logits(model, rows[:, :-1])
        loss = torch.nn.functional.cross_entropy(output.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        return rows[:, 1:].numel()

    return step


def transformers(job: dict, device: torch.device, dtype: torch.dtype) -> Step:
    from transformers import GPT2Config, GPT2LMHeadModel

    n_layer, n_head, n_embd = job["shape"]
    pdrop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), job["dropout"])
    config = GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=job["context"], **pdrop)
    return plain_step(GPT2LMHeadModel(config), lambda model, ids: model(ids).logits, job, device, dtype)


def litgpt(job: dict, device: torch.device, dtype: torch.dtype) -> Step:
    """Its GPT in the shape of GPT-2, as far as it goes: positions are rotary, the head is not tied."""
    from litgpt import GPT, Config

    n_layer, n_head, n_embd = job["shape"]
    config = Config(
        name="gpt2", n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=job["context"], vocab_size=VOCABULARY,
        padded_vocab_size=VOCABULARY, norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP", bias=True,
        intermediate_size=4 * n_embd, gelu_approximate="tanh", parallel_residual=False, rotary_percentage=0.25,
    )  # fmt: skip
    return plain_step(GPT(config), lambda model, ids: model(ids), job, device, dtype)


def book(job: dict, device: torch.device, dtype: torch.dtype) -> Step:
    from book import book_way

    from gpt.data.batching import Split

    assert dtype == torch.float32
    split = Split.open(Path(job["data"]), "train")
    return book_way(split, *job["shape"], context_length=job["context"], dropout=job["dropout"], device=device)


def main() -> None:
    from gpt.machine.device import choose_device, memory_gb

    job = json.loads(sys.argv[1])
    device, dtype = choose_device("auto"), getattr(torch, job["dtype"])
    step = globals()[job["who"]](job, device, dtype)
    built = time.perf_counter()
    step()
    say(start=built - STARTED, first_step=time.perf_counter() - built)
    for line in sys.stdin:
        started, n_tokens = time.perf_counter(), 0
        for _ in range(int(line)):
            n_tokens += step()
        say(seconds=time.perf_counter() - started, tokens=n_tokens, memory_gb=memory_gb(device))


def say(**facts: float) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
