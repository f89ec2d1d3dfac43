"""Instruction tuning as in the book: what this project's packed training is measured against.

After Sebastian Raschka, "Build a Large Language Model (From Scratch)" (Manning, 2024), chapters 3 to 7, in our own
words: separate query, key and value layers, attention written out with a mask buffer and dropout, LayerNorm and GELU of
their own, an untied head, float32, AdamW, records in random order, eight to a batch, padded to the longest of them.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gpt.data.batching import Split

PADDING, IGNORE = 50256, -100  # the end of text, and the target that cross_entropy leaves out


class BookLayerNorm(nn.Module):
    """Mean 0 and variance 1 over the last dimension, then a scale and a shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        variance = x.var(dim=-1, keepdim=True, unbiased=False)
        return self.scale * (x - mean) / torch.sqrt(variance + 1e-5) + self.shift


class BookGELU(nn.Module):
    """The tanh form, one elementary operation after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


class BookAttention(nn.Module):
    """Causal attention of several heads; all (T, T) weights of each are held."""

    def __init__(self, width: int, n_head: int, context_length: int, dropout: float) -> None:
        super().__init__()
        self.n_head = n_head
        self.W_query, self.W_key, self.W_value = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", torch.ones(context_length, context_length).tril())

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            layer(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for layer in (self.W_query, self.W_key, self.W_value)
        )  # each (B, H, T, D)
        scores = q @ k.transpose(2, 3)  # (B, H, T, T)
        scores = scores.masked_fill(self.mask[:T, :T] == 0, -torch.inf)
        weights = self.dropout(torch.softmax(scores / k.shape[-1] ** 0.5, dim=-1))
        return self.out_proj((weights @ v).transpose(1, 2).reshape(B, T, C))


class BookBlock(nn.Module):
    """Attention and feed-forward, each on the normalised stream and added to it."""

    def __init__(self, width: int, n_head: int, context_length: int, dropout: float) -> None:
        super().__init__()
        self.att = BookAttention(width, n_head, context_length, dropout)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), BookGELU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = BookLayerNorm(width), BookLayerNorm(width)
        self.drop_shortcut = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_shortcut(self.att(self.norm1(x)))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class BookGPT(nn.Module):
    """(B, T) ids -> (B, T, V) logits."""

    def __init__(
        self, n_layer: int, n_head: int, width: int, context_length: int, dropout: float, vocab_size: int
    ) -> None:
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(vocab_size, width), nn.Embedding(context_length, width)
        self.drop_emb = nn.Dropout(dropout)
        self.trf_blocks = nn.Sequential(*(BookBlock(width, n_head, context_length, dropout) for _ in range(n_layer)))
        self.final_norm = BookLayerNorm(width)
        self.out_head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_emb(tokens) + self.pos_emb(torch.arange(tokens.shape[1], device=tokens.device))
        return self.out_head(self.final_norm(self.trf_blocks(self.drop_emb(x))))


def padded(records: list[list[int]], context_length: int) -> tuple[Tensor, Tensor, int]:
    """Records, each with its end of text -> (B, T) inputs, (B, T) targets, number of inputs that are no padding.

    T is the longest record's, or the context: what is longer is cut. The loss is on prompts as well, as in the book.
    """
    records = [record[: context_length + 1] for record in records]
    width = max(map(len, records)) - 1
    inputs = torch.tensor([r[:-1] + [PADDING] * (width - len(r) + 1) for r in records])
    targets = torch.tensor([r[1:] + [IGNORE] * (width - len(r) + 1) for r in records])
    return inputs, targets, sum(len(r) - 1 for r in records)


def book_way(
    split: Split,
    n_layer: int,
    n_head: int,
    width: int,
    context_length: int = 512,
    dropout: float = 0.1,
    batch_size: int = 8,
    vocab_size: int = 50257,
    device: str | torch.device = "cpu",
    seed: int = 123,
) -> Callable[[], int]:
    """A function that takes one training step on the next batch and returns how many real tokens were in it.

    `split`: prepared records, as `Split.open(directory, "train")`. Epochs follow each other, each in another order.
    """
    torch.manual_seed(seed)
    model = BookGPT(n_layer, n_head, width, context_length, dropout, vocab_size).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.1)
    records = [split.ids[start:end].tolist() for start, _, end in split.documents.tolist()]
    loader = DataLoader(
        records, batch_size, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed),
        collate_fn=lambda batch: padded(batch, context_length),
    )  # fmt: skip
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> int:
        inputs, targets, n_tokens = next(batches)
        optimizer.zero_grad()
        logits = model(inputs.to(device))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.to(device).flatten(), ignore_index=IGNORE)
        loss.backward()
        optimizer.step()
        loss.item()
        return n_tokens

    return step
