"""Defines the second family of models: the architecture of Llama and Qwen3, and what has been tried on top of it.

Letters in shape comments:
    B rows of a batch        T tokens of a row         S tokens attended to (T, or T plus what a cache holds)
    C n_embd, the width      H n_head, K n_kv_head     D head_size, the width of one head
    M mlp_size               V tokens in the vocabulary

The keys of conf/model/modern_tiny.yaml choose its parts; each has its source there. Parameters carry the names of
transformers' LlamaForCausalLM and Qwen3ForCausalLM without the leading "model.", and the halves of a head are rotated
against each other as there, so that weights map one to one.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.config.families import ModernConfig
from gpt.model import INIT_STD, Cache, LanguageModel, attend, dropped, visible
from gpt.parts.copying import Copies, Copying

QUERY_KEY_SCALE = 1.2  # nanochat's, for both, where they are normalised after the rotation
GATE_INPUTS = 12  # numbers of the stream that decide how much of a value embedding is added; nanochat's
# Initial shares of the stream and of the embedding that the first block reads, and the last; nanochat's.
STREAM_SCALES = 1.15, 1.05
EMBEDDING_SCALES = 0.20, 0.05
FOLLOWER_SCALES = 0.6, 0.1  # initial share of what followed that the first block reads, and the others


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a weight for each number if there are weights (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, eps: float, has_weights: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if has_weights else None

    def forward(self, x: Tensor) -> Tensor:
        x = normalised(x, self.eps)
        return x if self.weight is None else x * self.weight


def normalised(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension. As F.rms_norm, which takes half as long again on a CPU."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
    return x * torch.rsqrt(square / x.shape[-1] + eps)


class Attention(nn.Module):
    """Causal self-attention of H queries over K <= H keys and values, with rotary positions.

    Grouped queries: Ainslie et al., 2023. Value embeddings: those of a token are added to its values, times a gate
    in (0, 3) for each head.
    """

    def __init__(self, config: ModernConfig, layer: int) -> None:
        super().__init__()
        if config.n_head % config.n_kv_head:
            raise ValueError(f"n_head {config.n_head} is not divisible by n_kv_head {config.n_kv_head}")
        C, D, eps = config.n_embd, config.head_size, config.norm_eps
        self.layer, self.config = layer, config
        self.q_proj = nn.Linear(C, config.n_head * D, bias=False)
        self.k_proj = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.v_proj = nn.Linear(C, config.n_kv_head * D, bias=False)
        self.o_proj = nn.Linear(config.n_head * D, C, bias=False)
        if config.qk_norm == "before_rotation":
            self.q_norm, self.k_norm = RMSNorm(D, eps), RMSNorm(D, eps)
        if has_value_embedding(config, layer):
            self.value_gate = nn.Linear(min(GATE_INPUTS, C), config.n_kv_head, bias=False)

    def forward(
        self, x: Tensor, values: Tensor | None, rotation: tuple[Tensor, Tensor], mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:  # fmt: skip
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.config.head_size) for p in (self.q_proj, self.k_proj, self.v_proj))
        dtype = v.dtype
        if values is not None:
            gate = 3 * torch.sigmoid(self.value_gate(x[..., :GATE_INPUTS]))  # (B, T, K)
            v = (v + gate[..., None] * values.view_as(v)).to(dtype)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D), and (B, K, T, D) twice
        # Angles, and the means of squares, are of float32, whatever the products are in.
        q, k = q.float(), k.float()
        if self.config.qk_norm == "before_rotation":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotated(q, *rotation), rotated(k, *rotation)
        if self.config.qk_norm == "after_rotation":
            q, k = (QUERY_KEY_SCALE * normalised(t, self.config.norm_eps) for t in (q, k))
        q, k = q.to(dtype), k.to(dtype)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, K, S, D), the keys rotated already
        grouped = self.config.n_kv_head < self.config.n_head
        if grouped and mask is not None and q.is_cuda:  # no kernel there takes both a mask and grouped queries
            k, v = (t.repeat_interleave(self.config.n_head // self.config.n_kv_head, dim=1) for t in (k, v))
            grouped = False
        x = attend(q.to(k.dtype), k, v, mask, self.config.dropout if self.training else 0.0, grouped)  # (B, H, T, D)
        x = self.o_proj(x.to(dtype).transpose(1, 2).flatten(2))
        return dropped(x, self.config.dropout, self.training)


class MLP(nn.Module):
    """swiglu: two layers, one of which gates the other (Shazeer, 2020); relu2: one, and its ReLU squared (So et al.,
    2021)."""

    def __init__(self, config: ModernConfig) -> None:
        super().__init__()
        if config.activation == "swiglu":
            self.gate_proj = nn.Linear(config.n_embd, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.n_embd, bias=False)
        self.activation, self.dropout = config.activation, config.dropout

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "swiglu":
            x = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (B, T, M)
        else:
            x = F.relu(self.up_proj(x)).square()  # (B, T, M)
        return dropped(self.down_proj(x), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """One layer: attention and MLP, each on the normalised stream, each added back to it (pre-norm)."""

    def __init__(self, config: ModernConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps, config.norm_weights)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps, config.norm_weights)
        self.mlp = MLP(config)
        if config.residual_scalars:
            depth = layer / max(1, config.n_layer - 1)  # 0 to 1
            scales = [first + depth * (last - first) for first, last in (STREAM_SCALES, EMBEDDING_SCALES)]
            self.residual_scalars = nn.Parameter(torch.tensor(scales))
        if config.induction:
            self.follower_scale = nn.Parameter(torch.tensor(FOLLOWER_SCALES[min(layer, 1)])[None])

    def forward(
        self, x: Tensor, embedded: Tensor | None, followers: Tensor | None, values: Tensor | None,
        rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None,
    ) -> Tensor:  # fmt: skip
        if embedded is not None:
            x = self.residual_scalars[0] * x + self.residual_scalars[1] * embedded
        if followers is not None:
            x = x + self.follower_scale * followers
        x = x + self.self_attn(self.input_layernorm(x), values, rotation, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Modern(LanguageModel):
    """Token ids in, logits of the next token out; no biases, and no positions but in the attention."""

    config: ModernConfig

    def __init__(self, config: ModernConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.logit_softcap = config.logit_softcap
        self.window = self.training_window = config.window
        self.embed_tokens = nn.Embedding(vocab_size, config.n_embd)
        self.value_embeddings = nn.ModuleDict({
            str(layer): nn.Embedding(vocab_size, config.n_kv_head * config.head_size)
            for layer in range(config.n_layer) if has_value_embedding(config, layer)
        })  # fmt: skip
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps, config.norm_weights)
        self.lm_head = None if config.tie_weights else nn.Linear(config.n_embd, vocab_size, bias=False)
        self.copying = None if config.copy_order is None else Copying(config.n_embd, config.copy_order)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """N(0, 0.02), and N(0, 0.02 / sqrt(2 n_layer)) for the 2 n_layer projections into the stream, as GPT-2 has it;
        with `zero_init` these and an untied head are 0."""
        into_stream = INIT_STD / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2 or name.startswith("copying."):
                continue  # norms, which stay 1, the scalars, and what begins as it is made
            is_last = name.endswith(("o_proj.weight", "down_proj.weight"))
            if self.config.zero_init and (is_last or name == "lm_head.weight"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, into_stream if is_last else INIT_STD)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        config, past = self.config, 0 if cache is None else cache.length
        if positions is None:
            positions = self.next_positions(tokens, past)
        rotation = angles(positions, config.head_size, config.rope_base)
        full = visible(tokens, past, documents)
        window = self.training_window if self.training else self.window
        windowed = full if window is None else within(window, full, tokens, past, documents)
        x = self.embedded(tokens)  # (B, T, C)
        embedded = x if config.residual_scalars else None
        followers = self.followers(tokens, x, full, cache) if config.induction else None
        x = dropped(x, config.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            values = self.value_embeddings[str(layer)](tokens) if has_value_embedding(config, layer) else None
            mask = windowed if config.is_windowed(layer) else full
            x = self.run(block, x, embedded, followers, values, rotation, mask, cache)
        return self.norm(x)

    def embedded(self, tokens: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, C), where the stream begins."""
        x = self.embed_tokens(tokens)
        return normalised(x, self.config.norm_eps) if self.config.residual_scalars else x

    def followers(self, tokens: Tensor, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """(B, T) ids and their embeddings -> (B, T, C): the mean embedding of the tokens that have followed the same
        one before, as far as it sees them; zeros after a token that is new."""
        ids, seen = self.context(tokens, mask, cache)
        if cache is not None:
            x = self.embedded(ids)  # (B, S, C)
        seen = seen & F.pad(seen[..., :-1], (1, 0))  # the token before it, too
        followed = tokens[:, :, None] == F.pad(ids[:, :-1], (1, 0))[:, None]  # (B, T, S)
        followed &= seen
        return (followed / followed.sum(-1, keepdim=True).clamp(min=1)).to(x.dtype) @ x

    def copies(
        self, hidden: Tensor, tokens: Tensor, documents: Tensor | None = None, cache: Cache | None = None
    ) -> Copies | None:
        if self.copying is None:
            return None
        mask = visible(tokens, 0 if cache is None else cache.length, documents)
        return self.copying(hidden, *self.context(tokens, mask, cache))

    def context(self, tokens: Tensor, mask: Tensor | None, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """(B, T) ids -> (B, S) ids, with those in the cache, and (B, T, S) bool, true where each token may look."""
        (B, T), ids = tokens.shape, tokens
        if cache is not None:  # keeps ids as the keys of one more layer
            column = tokens[:, None, :, None]
            ids = cache.extend(self.config.n_layer, column, column)[0][:, 0, :, 0]
        S = ids.shape[1]
        seen = torch.ones(T, S, dtype=torch.bool, device=ids.device).tril(S - T) if mask is None else mask
        return ids, seen.reshape(-1, T, S).expand(B, T, S)

    @property
    def head(self) -> nn.Parameter:
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers


def has_value_embedding(config: ModernConfig, layer: int) -> bool:
    """Every second layer has one, the last among them."""
    return config.value_embeddings and (config.n_layer - 1 - layer) % 2 == 0


def angles(positions: Tensor, D: int, base: float) -> tuple[Tensor, Tensor]:
    """(T,) or (B, T) positions p -> (T, D) or (B, 1, T, D) cosines and sines of p base^(-2i / D) for i < D / 2, each
    twice, the sines first negative: what `rotated` multiplies with (Su et al., 2021)."""
    frequencies = 1.0 / base ** (torch.arange(0, D, 2, device=positions.device) / D)  # (D / 2,)
    turns = positions[..., None] * frequencies
    if turns.dim() == 3:
        turns = turns[:, None]  # the same for all heads
    cos, sin = turns.cos(), turns.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, T, D) with numbers i and i + D / 2 of each head, a and b, turned by the angle i of the token's position:
    a cos - b sin and b cos + a sin."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def within(window: int, mask: Tensor | None, tokens: Tensor, past: int, documents: Tensor | None) -> Tensor | None:
    """The mask of `visible` with only itself and the `window` - 1 tokens before each token."""
    T = tokens.shape[1]
    S = past + T if documents is None else documents.shape[-1]
    if window >= S:
        return mask
    if documents is not None and documents.dtype == torch.bool:  # columns are positions: as many as it sees
        columns = torch.arange(S, device=tokens.device)
        return mask & (columns >= documents.sum(-1, keepdim=True) - window)[:, None]
    near = torch.ones(T, S, dtype=torch.bool, device=tokens.device).tril(S - T).triu(S - T - window + 1)
    return near if mask is None else mask & near
