"""Computes the cross-entropy of the next token without ever holding the logits of all positions.

Letters in shape comments: N scored positions, C width, V tokens in the vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# The logarithms of a share s and a probability q, each (N,), where p(target) is s times the head's and q.
Mixture = tuple[Tensor, Tensor]


def reference(
    hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None = None, mixture: Mixture | None = None
) -> Tensor:
    """(N, C) stream, (V, C) head, (N,) ids -> (N,) losses: -ln p(target) in nats. Everything below equals this.

    softcap: that of the model's logits, see LanguageModel. mixture: see gpt/parts/copying.py.

    At GPT-2's vocabulary these logits are by far the largest tensor of a training step: 412 MB for 2,048 positions in
    float32, and as much again for their gradient. The functions below take a few positions at a time, turn their logits
    into losses and gradients, and multiply these by the head. That is at least as fast as the two lines, and a step
    takes a third of the memory (experiments/speed/README.md).
    """
    logits = F.linear(hidden, head).float()  # (N, V)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses if mixture is None else -torch.logaddexp(mixture[0] - losses, mixture[1])


CHUNK = 512  # positions in one matrix product: fewer are slower, more take more memory
CACHED = 8  # positions for each thread whose probabilities stay in its cache from one pass over them to the next
SLAB = 4096  # tokens whose part of the head's gradient is still in the cache when it is converted and added
ALIGNMENT = 64  # rows of logits begin at multiples of this; at 50,257 apart products with them take a third longer


def cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None = None, mixture: Mixture | None = None
) -> Tensor:
    """(N,) float32 losses, without a gradient. Arguments as in `reference`."""
    return _losses_and_gradients(hidden, head, targets, softcap, mixture, None, None, None)


def cross_entropy_sum(
    hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None = None, mixture: Mixture | None = None
) -> Tensor:
    """The sum of `cross_entropy`, with a gradient for `hidden`, `head` and the mixture.

    Products are in the type of autocast where that is on, probabilities and the sums over positions in float32.
    """
    return _CrossEntropySum.apply(hidden, head, targets, softcap, *(mixture or (None, None)))


class _CrossEntropySum(torch.autograd.Function):
    """d loss / d logits = softmax(logits) - one_hot(target), so the gradient is known as soon as the loss is; where
    the logits y are c tanh(z / c), dy / dz = 1 - (y / c)^2. In a mixture all of it is multiplied by the part r of
    p(target) that is the head's, and the losses fall by r and 1 - r for what the two logarithms rise.

    It is computed in `forward`, where the logits exist. Computing them again in `backward` would cost a third more
    products with the head.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None, kept: Tensor | None,
        added: Tensor | None,
    ) -> Tensor:  # fmt: skip
        need_hidden, need_head, *_ = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if need_hidden else None  # (N, C)
        d_head = torch.zeros_like(head) if need_head else None  # (V, C)
        mixture = None if kept is None else (kept, added)
        parts = None if kept is None else torch.empty_like(kept)  # (N,)
        losses = _losses_and_gradients(hidden, head, targets, softcap, mixture, d_hidden, d_head, parts)
        ctx.gradients = d_hidden, d_head, *((None, None) if parts is None else (-parts, parts - 1))
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head, *d_mixture = (None if d is None else d.mul_(upstream) for d in ctx.gradients)
        ctx.gradients = None  # scaled in place, so they serve one backward pass only
        return d_hidden, d_head, None, None, *d_mixture


@torch.no_grad()
def _losses_and_gradients(
    hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None, mixture: Mixture | None,
    d_hidden: Tensor | None, d_head: Tensor | None, parts: Tensor | None,
) -> Tensor:  # fmt: skip
    """(N,) losses. Also fills `d_hidden` with the gradient of their sum, adds that of the head to `d_head`, and fills
    `parts` with the part of each target's probability that is the head's."""
    device_type = hidden.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else head.dtype
    n_vocab = len(head)
    width = -(-n_vocab // ALIGNMENT) * ALIGNMENT
    rows = min(CHUNK, len(hidden))
    group = cached_positions(rows, device_type)
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    with torch.autocast(device_type, enabled=False):
        # The columns from V to `width` are no tokens. A head that is converted to another type gets rows for them;
        # otherwise it is used as it is, and the logits fill only the first V columns of the buffer.
        weight = head
        if dtype != head.dtype:
            weight = head.new_empty((width, head.shape[1]), dtype=dtype)
            weight[:n_vocab].copy_(head)
            weight[n_vocab:] = 0
        buffer = torch.empty((rows, width), dtype=dtype, device=hidden.device)  # for one chunk after the other
        wide = torch.empty((group, width), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), CHUNK):
            here = slice(start, start + CHUNK)
            h = hidden[here].to(dtype)  # (n, C)
            logits = buffer[: len(h), : len(weight)]  # (n, V), or (n, width)
            torch.mm(h, weight.t(), out=logits)
            buffer[:, n_vocab:] = -torch.inf  # so that their probabilities and gradients are 0
            for i in range(0, len(h), group):
                part = buffer[i : min(i + group, len(h))]
                first, last = start + i, start + i + len(part)
                losses[first:last] = _losses_and_logit_gradients(part, n_vocab, targets[first:last], softcap, wide)
                if mixture is not None:
                    kept, added = (logs[first:last] for logs in mixture)
                    of_head = kept - losses[first:last]
                    losses[first:last] = -torch.logaddexp(of_head, added)
                    if parts is not None:
                        parts[first:last] = torch.exp(of_head + losses[first:last])
            if d_hidden is not None:
                d_hidden[here] = logits @ weight
            if parts is not None:  # a row of gradients times a number, without another pass over all of its logits
                h = h * parts[here, None].to(dtype)
                if d_hidden is not None:
                    d_hidden[here] *= parts[here, None]
            if d_head is not None and dtype == head.dtype:
                d_head.addmm_(logits.t(), h)
            elif d_head is not None:
                for tokens in range(0, n_vocab, SLAB):
                    d_slab = d_head[tokens : tokens + SLAB]
                    d_slab += logits[:, tokens : tokens + len(d_slab)].t() @ h
    return losses


def _losses_and_logit_gradients(
    logits: Tensor, n_vocab: int, targets: Tensor, softcap: float | None, wide: Tensor
) -> Tensor:
    """(n, width) logits -> (n,) losses. Overwrites the logits with the gradient of the losses' sum. `wide` is a buffer
    for logits that are not in float32."""
    n = torch.arange(len(logits), device=logits.device)
    p = logits if logits.dtype == wide.dtype else wide[: len(logits)].copy_(logits)  # logits first, then probabilities
    if softcap is not None:
        capped = p[:, :n_vocab]  # the columns after these stay minus infinity
        capped.div_(softcap).tanh_().mul_(softcap)
        slope = capped.div(softcap).square_().neg_().add_(1)
    largest, of_target = p.amax(-1), p[n, targets]
    torch.softmax(p, dim=-1, out=p)
    # ln of the sum of exp(logits), from the largest logit and its probability: it can neither under- nor overflow.
    losses = largest - p.amax(-1).log() - of_target
    p[n, targets] -= 1
    if softcap is not None:
        p[:, :n_vocab] *= slope
    if p is not logits:
        logits.copy_(p)
    return losses


def cached_positions(rows: int, kind: str) -> int:
    """Of a chunk of so many rows, those that passes over probabilities take at a time on a device of type `kind`."""
    return min(rows, CACHED * torch.get_num_threads()) if kind == "cpu" else rows


def head_operations(n_positions: int, weight: int, is_trained: bool) -> int:
    """Multiplications and additions, forward and backward, in the products with a head of `weight` numbers."""
    return (6 if is_trained else 4) * n_positions * weight


def head_bytes(n_positions: int, vocab_size: int, weight: int, is_trained: bool, kind: str, itemsize: int) -> int:
    """Bytes that the loss of a micro-batch takes on a device of type `kind`: a chunk's logits and their probabilities,
    the head's gradient and, where autocast computes in `itemsize` 2, a copy of the head."""
    rows = min(CHUNK, n_positions)
    logits = rows * vocab_size * itemsize + cached_positions(rows, kind) * vocab_size * 4
    copies = itemsize * weight if itemsize < 4 else 0
    return logits + copies + (4 * weight if is_trained else 0)
