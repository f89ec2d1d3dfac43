"""Offers what a notebook needs in few words: settings, models, loaders of text and examples, a loop, generation.

`settings`, `build_model`, `load_model` and `generate_text` do what the scripts do, from Python. The other functions are
those of the notebook that this project grew from: they hold all data in memory, and a batch is an (inputs, targets)
pair, where train.py uses the token files of gpt/data/batching.py and the loop of gpt/loop.py. experiments/tutorial has
a notebook that uses all of them.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gpt import sampling
from gpt import tokenizer as tokenizers
from gpt.config import places
from gpt.config.schema import METRIC, TrainConfig
from gpt.data import rows
from gpt.data.batching import IGNORE, Batch
from gpt.data.columns import Wanted
from gpt.errors import UserError
from gpt.files.paths import PROJECT_ROOT
from gpt.loop import evaluate, train_step
from gpt.machine.machine import Machine
from gpt.model import GPT, LanguageModel
from gpt.objective import NEXT_TOKEN
from gpt.prompts import format_prompt
from gpt.runs.model_file import Loaded
from gpt.sampling import eval_mode
from gpt.terminal.console import escape
from gpt.tokenizer import ordinary_ids
from gpt.weights import loading

log = logging.getLogger(__name__)

PAD = 50256  # GPT-2's end of text


def settings(*typed: str) -> TrainConfig:
    """The settings that `python train.py` would have with these arguments, such as "model=mini", "optimizer.lr=3e-4".
    Raises UserError with everything that is wrong with them."""
    from gpt.config import launch  # here, because Hydra is for those who compose

    return launch.compose(list(typed))


def build_model(*typed: str) -> LanguageModel:
    """The model that `python train.py` would begin with, given these arguments, on the CPU: its weights are random, or
    those of init.from. Raises UserError as `settings` does, and for weights that do not fit."""
    cfg = settings(*typed)
    weights = loading.find(cfg.init, cfg.model, cfg.data.tokenizer, PROJECT_ROOT)
    torch.manual_seed(cfg.seed)
    return loading.build(cfg.model, tokenizers.load(cfg.data.tokenizer).n_vocab, weights)


def load_model(
    name: str | Path, device: torch.device | str = "cpu", *, n_head: int | None = None, gelu: str | None = None
) -> Loaded:
    """The model called `name`, in evaluation mode: a run's folder, a last_model.pt, "gpt2", or whatever else
    generate.py takes as `checkpoint`; paths begin at the working directory. The result has the fields model,
    tokenizer_name, template, step and path. n_head and gelu ("tanh" or "exact") are for weights whose file does not say
    them. Raises UserError for what is not there or cannot be read."""
    found = places.absolute("checkpoint", str(name), Path.cwd())
    return loading.load(found, PROJECT_ROOT, torch.device(device), {"n_head": n_head, "gelu": gelu})


def generate_text(
    model: LanguageModel,
    tokenizer: tokenizers.Tokenizer,
    prompt: str,
    *,
    template: str | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    seed: int = 1337,
) -> str:
    """What the model writes after `prompt`, drawn as generate.py draws it, whose values are the defaults here, too.

    template: the text around the prompt, such as the `template` of a loaded model; None: none. The text ends before the
    end-of-text token. Raises UserError for an empty prompt.
    """
    ids = tokenizer.encode(format_prompt(template, prompt))
    draws = sampling.Draws(max_new_tokens, tokenizer.eos, temperature, top_k, top_p)
    [new] = sampling.generate(model, ids, draws, num_samples=1, seed=seed)
    return tokenizer.decode(new)


class GPTDatasetV1(Dataset):
    """Windows of `max_length` tokens, `stride` apart, over one text; each item is (inputs, targets), targets being
    the inputs one token later. Raises UserError when the text has no more than `max_length` tokens."""

    def __init__(self, txt: str, tokenizer: Any, max_length: int, stride: int) -> None:
        ids = ordinary_ids(tokenizer, txt)
        if len(ids) <= max_length:
            raise UserError(
                f"a text of {len(ids)} tokens is too short for windows of {max_length}",
                remedy=f"max_length must be below {len(ids)}",
            )
        self.ids = torch.tensor(ids)
        self.starts = range(0, len(ids) - max_length, stride)
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        start = self.starts[i]  # raises IndexError past the end, which is what ends an iteration
        window = self.ids[start : start + self.max_length + 1]
        return window[:-1], window[1:]


class GPTDatasetExamples(Dataset):
    """Alpaca records as token ids; each item is (ids, response_start): prompt and response, without the end of text.

    Prompt and response are tokenized apart and joined, so that the border between them is exact. Raises UserError for
    a record that lacks an instruction or an output, or has something else than text there.
    """

    def __init__(self, records: Iterable[dict[str, str]], tokenizer: Any, template: str = "alpaca") -> None:
        self.items: list[tuple[list[int], int]] = []
        for number, record in enumerate(records):
            instruction, given, output = example_texts(record, f"record {number}")
            prompt = ordinary_ids(tokenizer, format_prompt(template, instruction, given))
            self.items.append((prompt + ordinary_ids(tokenizer, output), len(prompt)))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[list[int], int]:
        return self.items[i]


def example_texts(record: dict[str, Any], where: str) -> tuple[str, str, str]:
    """(instruction, input, output) of a record; an input of None or none at all is empty. Raises UserError."""
    for key in ("instruction", "input", "output"):
        value = record.get(key)
        if not isinstance(value, str) and (key != "input" or value is not None):
            problem = f"{key} is {type(value).__name__}, text is needed" if key in record else f"no key {key}"
            raise UserError(f"{where}: {problem}", remedy="correct it")
    return record["instruction"], record.get("input") or "", record["output"]


def collate_examples(
    items: Sequence[tuple[Sequence[int], int]],
    pad: int = PAD,
    max_length: int | None = None,
    mask_prompt: bool = False,
) -> tuple[Tensor, Tensor]:
    """(ids, response_start) items -> inputs and targets, both (B, T), T the longest item.

    Each row is followed by one `pad`, which it learns to predict as the end of the text; the padding after that is
    IGNORE. Masking goes by position, not by value: a real end of text inside a row stays a target. `max_length` cuts
    rows. Raises UserError when no target remains in the batch.
    """
    rows = [[*ids, pad] for ids, _ in items]
    longest = max(len(row) for row in rows) - 1
    width = min(longest, max_length) if max_length else longest
    inputs = torch.full((len(rows), width), pad)
    targets = torch.full((len(rows), width), IGNORE)
    for b, (row, (_, response_start)) in enumerate(zip(rows, items, strict=True)):
        length = min(len(row) - 1, width)
        inputs[b, :length] = torch.tensor(row[:length])
        targets[b, :length] = torch.tensor(row[1 : length + 1])
        if mask_prompt:
            targets[b, : max(0, response_start - 1)] = IGNORE
    if not (targets != IGNORE).any():
        raise UserError(
            f"a batch of {len(rows)} rows has no supervised token within {width} tokens",
            remedy="raise max_length above the longest prompt, or do not mask prompts",
        )
    return inputs, targets


def create_dataloader_from_examples(
    examples: str | Path | Iterable[dict[str, str]],
    tokenizer: Any,
    batch_size: int = 8,
    max_length: int | None = None,
    template: str = "alpaca",
    mask_prompt: bool = False,
    shuffle: bool = True,
    drop_last: bool = False,
    seed: int = 0,
) -> DataLoader:
    """Records, or the path of a JSONL file with keys instruction, input, output -> padded (inputs, targets) batches.

    The order comes from a generator of its own, seeded with `seed`: no other random number changes it. Raises UserError
    for a file or a record that cannot be used; how many examples `max_length` cuts is logged.
    """
    if isinstance(examples, str | Path):
        examples = read_examples(Path(examples))
    dataset = GPTDatasetExamples(examples, tokenizer, template)
    n_cut = sum(len(ids) > max_length for ids, _ in dataset.items) if max_length else 0
    if n_cut:
        log.warning(f"{n_cut:,} of {len(dataset):,} examples are longer than {max_length} tokens and are cut there")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        collate_fn=lambda items: collate_examples(items, tokenizer_eos(tokenizer), max_length, mask_prompt),
        generator=torch.Generator().manual_seed(seed),
    )


def read_examples(path: Path) -> Iterator[dict[str, str]]:
    """The records of a file in any of rows.FORMATS. Raises UserError, with the line, for one that cannot be
    used."""
    for row in rows.read(path, rows.BadRows("error", setting=None), Wanted("examples")):
        where = f"{escape(row.where)}:{row.line}"
        yield dict(zip(("instruction", "input", "output"), example_texts(row.values, where), strict=True))


def tokenizer_eos(tokenizer: Any) -> int:
    """The end-of-text id of a Tokenizer or a tiktoken encoding."""
    return tokenizer.eos if hasattr(tokenizer, "eos") else tokenizer.eot_token


def train_model_simple(
    model: GPT,
    train_loader: DataLoader,
    val_loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str,
    num_epochs: int,
    eval_freq: int,
    eval_iter: int,
    start_context: str,
    tokenizer: Any,
) -> tuple[list[float], list[float], list[int]]:
    """The notebook's loop: returns (train_losses, val_losses, tokens_seen), one entry for each evaluation.

    Evaluates after steps 0, eval_freq, 2 eval_freq, ... on the first `eval_iter` batches of each loader, unshuffled,
    so that measuring does not change the order of training; prints a sample after each epoch.
    """
    machine, objective = Machine(torch.device(device)), NEXT_TOKEN
    model.to(device)
    train_losses, val_losses, tokens_seen = [], [], []
    seen, step = 0, -1
    for epoch in range(num_epochs):
        model.train()
        for inputs, targets in train_loader:
            train_step(model, optimizer, objective, [as_batch(inputs, targets)], machine)
            seen += inputs.numel()
            step += 1
            if step % eval_freq == 0:
                for losses, loader in ((train_losses, train_loader), (val_losses, val_loader)):
                    first = first_batches(loader, eval_iter)
                    losses.append(evaluate(model, objective, first, machine)[METRIC])
                tokens_seen.append(seen)
                print(f"epoch {epoch + 1} step {step:06d}  train {train_losses[-1]:.3f}  val {val_losses[-1]:.3f}")
        prompt = text_to_token_ids(start_context, tokenizer).to(device)
        ids = generate_text_simple(model, prompt, 50, model.config.context_length)
        print(escape(token_ids_to_text(ids, tokenizer).replace("\n", " ")))
    return train_losses, val_losses, tokens_seen


def as_batch(inputs: Tensor, targets: Tensor) -> Batch:
    """A loader's (inputs, targets) pair as a Batch."""
    return Batch(inputs, targets, None, None, inputs.numel(), int((targets != IGNORE).sum()))


def first_batches(loader: DataLoader, n: int) -> list[Batch]:
    """The first `n` batches of a loader in the order of its data set, without touching the loader's own generator."""
    ordered = DataLoader(
        loader.dataset, batch_size=loader.batch_size, collate_fn=loader.collate_fn, generator=torch.Generator()
    )
    return [as_batch(*pair) for pair, _ in zip(ordered, range(n), strict=False)]


def text_to_token_ids(text: str, tokenizer: Any) -> Tensor:
    """Text -> (1, T) ids, with a tokenizer of gpt/tokenizer.py or an encoding of tiktoken. Text that looks like a
    control token is text."""
    return torch.tensor([ordinary_ids(tokenizer, text)], dtype=torch.long)


def token_ids_to_text(ids: Tensor, tokenizer: Any) -> str:
    """(1, T) or (T,) ids -> text."""
    return tokenizer.decode(ids.flatten().tolist())


def generate_text_simple(model: nn.Module, idx: Tensor, max_new_tokens: int, context_size: int) -> Tensor:
    """(B, T) ids -> (B, T + max_new_tokens): each row with its likeliest continuation. For any module that maps (B, T)
    ids to (B, T, V) logits; it sees the last context_size tokens."""
    with eval_mode(model), torch.no_grad():  # not inference_mode: what is returned may be trained on
        for _ in range(max_new_tokens):
            logits = model(idx[:, -context_size:])[:, -1]  # (B, V)
            idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], dim=1)
    return idx
