"""Defines the network: the interface of every architecture, then GPT-2 in plain PyTorch, in reading order.

Letters in shape comments:
    B rows of a batch        T tokens of a row         S tokens attended to (T, or T plus what a cache holds)
    C n_embd, the width      H n_head                  D = C / H, the width of one head
    V tokens in the vocabulary

Sources: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), and OpenAI's released code for
it. Parameters carry the names of that code (wte, wpe, h, ln_1, c_attn, ...), so weights from elsewhere map one to one.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gpt.config.families import GPT2Config, ModelConfig
from gpt.parts.copying import Copies

INIT_STD = 0.02  # GPT-2's
LAYER_NORM_EPS = 1e-5


class Cache(Protocol):
    """The keys and values of earlier tokens, of as many heads as a model has of them; the sampler's is KVCache in
    gpt/sampling.py."""

    length: int

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (B, H, T, D) keys and values of one layer; returns all of that layer's, (B, H, S, D), in the type
        that attention shall be computed in."""
        ...


class LanguageModel(nn.Module, ABC):
    """The interface of every family: the rest of the project uses nothing else of a model.

    A family defines `hidden`, `head` and `blocks`, `copies` if something is mixed into the probabilities, and calls
    each block through `run`. Three conventions: weights of an nn.Embedding lie below the blocks, all others outside of
    them above; adapters (LoRA) stand beside each nn.Linear of a block that the config's `linear_layers` names; a matrix
    is a parameter of two dimensions. Parameters, operations and memory are counted by running the model on tensors
    without content (gpt/machine/counting.py).

    window: tokens that a windowed layer sees, its own among them; None: no layer has a window.
    training_window: the same in training mode, where a schedule may begin with fewer; an evaluation has all of them.
    logit_softcap: c, where logits z are c tanh(z / c) and so never beyond c (Gemma 2, 2024); None: they are z.
    """

    window: int | None = None
    training_window: int | None = None
    logit_softcap: float | None = None

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.gradient_checkpointing = False  # True: keeps only the stream between blocks until backward
        self.packed_head: nn.Module | None = None  # a head in fewer bits, see gpt/generation/precision.py

    @abstractmethod
    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """(B, T) ids -> (B, T, C), the normalised stream that the head reads.

        positions: (B, T) place of each token in its document; default: in its row, after what the cache holds.
        documents: (B, S) number of the document that each token belongs to, those in the cache first, for rows that
        hold several or are padded; tokens see only their own. Or (B, T, S) bool, true where each token may look, for a
        cache in which the column of a token is its position. Raises ValueError when the row and the cache together
        exceed the context length and no positions are given, as padding takes up none.
        """

    def copies(
        self, hidden: Tensor, tokens: Tensor, documents: Tensor | None = None, cache: Cache | None = None
    ) -> Copies | None:
        """What is mixed into the probabilities of the head, for the (B, T, C) that `hidden` has given of the same
        arguments, before the cache is told its new length; None: nothing."""
        return None

    @property
    @abstractmethod
    def head(self) -> nn.Parameter:
        """(V, C), the matrix that turns the stream into logits; may be the embedding."""

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The layers, from the embedding to the head."""

    def next_positions(self, tokens: Tensor, past: int) -> Tensor:
        """(B, T) ids -> (T,) places in their row, after `past` tokens. Raises ValueError beyond the context length."""
        end = past + tokens.shape[1]
        if end > self.config.context_length:
            raise ValueError(f"{end} tokens exceed the context length {self.config.context_length}")
        return torch.arange(past, end, device=tokens.device)

    def run(self, block: nn.Module, *inputs: Any) -> Tensor:
        """The output of a block; with gradient checkpointing it is computed a second time in backward."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def output_matrix(self) -> Tensor:
        """(V, C), the matrix that logits are computed with; of a packed head, in the type of its products."""
        packed = self.packed_head
        return self.head if packed is None else packed.dequantised(packed.products)

    def logits(self, hidden: Tensor, copies: Copies | None = None) -> Tensor:
        """(..., C), and what is mixed in there -> (..., V)"""
        logits = F.linear(hidden, self.head) if self.packed_head is None else self.packed_head(hidden)
        c = self.logit_softcap
        logits = logits if c is None else c * torch.tanh(logits.float() / c)
        return logits if copies is None else copies.mixed(logits)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        where: int | slice = slice(None),
    ) -> Tensor:
        """(B, T) ids -> (B, T, V) logits, or those at `where` of the T tokens. Other arguments as in `hidden`."""
        hidden = self.hidden(tokens, positions, documents, cache)
        copies = self.copies(hidden, tokens, documents, cache)
        return self.logits(hidden[:, where], None if copies is None else copies[:, where])

    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


class Attention(nn.Module):
    """Causal self-attention with H heads (Vaswani et al., 2017, section 3.2)."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not divisible by n_head {config.n_head}")
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).unbind(2)  # each (B, T, H, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, H, S, D)
        x = attend(q.to(k.dtype), k, v, mask, self.dropout if self.training else 0.0).to(q.dtype)  # (B, H, T, D)
        x = x.transpose(1, 2).reshape(B, T, C)
        return dropped(self.c_proj(x), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with GELU between them: GPT-2's tanh form, or exactly x times Phi(x)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.approximate = "tanh" if config.gelu == "tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate=self.approximate)  # (B, T, 4C)
        return dropped(self.c_proj(x), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """One layer: attention and MLP, each on the normalised stream, each added back to it (pre-norm)."""

    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(LanguageModel):
    """GPT-2: token ids in, logits of the next token out."""

    def __init__(self, config: GPT2Config, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context_length, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=LAYER_NORM_EPS)
        # A tied head is the embedding matrix itself: there is no second tensor that could drift from it.
        self.lm_head = None if config.tie_weights else nn.Linear(config.n_embd, vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """N(0, 0.02), biases 0, and N(0, 0.02 / sqrt(2 n_layer)) for the 2 n_layer projections into the stream.

        The stream is a sum of those projections; scaled so, its variance does not grow with depth (GPT-2, section
        2.3). The loss of a model in this state is ln V.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:  # all but the weights of the norms, which stay 1
                into_stream = name.endswith("c_proj.weight")
                parameter.normal_(0.0, INIT_STD / math.sqrt(2 * self.config.n_layer) if into_stream else INIT_STD)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        past = 0 if cache is None else cache.length
        if positions is None:
            positions = self.next_positions(tokens, past)
        mask = visible(tokens, past, documents)
        x = dropped(self.wte(tokens) + self.wpe(positions), self.config.dropout, self.training)  # (B, T, C)
        for block in self.blocks:
            x = self.run(block, x, mask, cache)
        return self.ln_f(x)

    @property
    def head(self) -> nn.Parameter:
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    @property
    def blocks(self) -> nn.ModuleList:
        return self.h


def dropped(x: Tensor, p: float, training: bool) -> Tensor:
    """In training x with each number 0 at a chance of p, and the others divided by 1 - p (Srivastava et al., 2014)."""
    return F.dropout(x, p) if training else x  # 25 calls that change nothing are 2 % of the time of a token


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, grouped: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of (B, H, T, D) queries and (B, H or K, S, D) keys and values -> (B, H, T, D).

    One token in each of many rows, whose masks differ, takes plain products: torch's kernel on a CPU rounds by the
    thread that a row falls to, and so the same row would give other numbers beside other rows."""
    if mask is not None and mask.dim() == 4 and q.shape[2] == 1 and not dropout:
        (B, H, _, D), K = q.shape, k.shape[1]
        q = q.view(B, K, H // K, D).transpose(2, 3)  # (B, K, D, H/K), queries that share keys
        scores = (k @ q).transpose(2, 3) * D**-0.5  # (B, K, H/K, S)
        shares = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        return (shares @ v).reshape(B, H, 1, D)
    return F.scaled_dot_product_attention(  # never holds all of (T, S) at once
        q, k, v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and q.shape[2] > 1,  # one new token may see everything before it
        enable_gqa=grouped,
    )  # fmt: skip


def visible(tokens: Tensor, past: int, documents: Tensor | None) -> Tensor | None:
    """(B, T) ids after `past` others -> (B, 1, T, S) or (T, S) mask, true where each of them may look: not the future,
    and only its own document. None where attention needs no mask for that."""
    T = tokens.shape[1]
    if documents is not None and documents.dtype == torch.bool:
        return documents[:, None]
    if documents is not None:
        return same_document(documents, T)
    if past > 0 and T > 1:
        return torch.ones(T, past + T, dtype=torch.bool, device=tokens.device).tril(past)
    return None


def same_document(documents: Tensor, T: int) -> Tensor:
    """(B, S) document numbers -> (B, 1, T, S) mask, true where each of the last T tokens may look: its own document,
    not the future."""
    S = documents.shape[1]
    same = documents[:, S - T :, None] == documents[:, None, :]  # (B, T, S)
    causal = torch.ones(T, S, dtype=torch.bool, device=documents.device).tril(S - T)
    return (same & causal)[:, None]
