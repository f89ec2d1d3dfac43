"""The network and the training step, held against transformers' GPT2LMHeadModel with the same weights."""

import itertools
import math
import random

import pytest
import torch
from conftest import adamw_config, model_config, schedule_config
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gpt import loop, optim
from gpt.data.batching import IGNORE, Batch
from gpt.machine.machine import Machine
from gpt.model import GPT
from gpt.objective import NEXT_TOKEN

CPU = torch.device("cpu")
ACTIVATIONS = {"tanh": "gelu_new", "exact": "gelu"}
N_SHAPES = 6


def drawn(seed):
    """A random shape, and a size of the vocabulary."""
    rng = random.Random(seed)
    n_head = rng.randint(1, 5)
    shape = {
        "n_layer": rng.randint(1, 4), "n_head": n_head, "n_embd": n_head * rng.choice([4, 6, 8, 16]),
        "context_length": rng.randint(8, 40), "gelu": list(ACTIVATIONS)[seed % 2],
    }  # fmt: skip
    return shape, rng.randint(30, 300)


def build(config, vocab_size: int) -> GPT:
    """A model whose attention is far from uniform, and whose norms and biases all do something."""
    model = GPT(config, vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() == 2 else 1).add_(0.1 * torch.randn_like(parameter))
    return model


def transformers_twin(model: GPT) -> GPT2LMHeadModel:
    """transformers' model with the weights of `model`."""
    c = model.config
    reference = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=model.vocab_size, n_positions=c.context_length, n_embd=c.n_embd, n_layer=c.n_layer,
            n_head=c.n_head, tie_word_embeddings=c.tie_weights, activation_function=ACTIVATIONS[c.gelu],
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    weights = with_transformers_names(model.state_dict())
    reference.load_state_dict({"lm_head.weight": model.wte.weight} | weights)
    return reference


def with_transformers_names(tensors):
    """Tensors of this project as transformers has them, whose Conv1D keeps (in, out)."""
    renamed = {}
    for name, tensor in tensors.items():
        is_conv1d = name.startswith("h.") and tensor.dim() == 2
        renamed[name if name.startswith("lm_head") else f"transformer.{name}"] = tensor.T if is_conv1d else tensor
    return renamed


def rows(model: GPT, padding: str, generator: torch.Generator):
    """For 4 rows of several lengths: (arguments of transformers' model, of GPT, labels, which tokens are real)."""
    T = model.config.context_length
    tokens = torch.randint(model.vocab_size, (4, T), generator=generator)
    lengths = torch.tensor([T, T // 2, T - 1, 3]) if padding else torch.full((4,), T)
    place = torch.arange(T).expand(4, T)
    real = place >= T - lengths[:, None] if padding == "left" else place < lengths[:, None]
    labels = tokens.masked_fill(~real, IGNORE)
    if padding == "left":
        labels[real & (place == T - lengths[:, None])] = IGNORE  # else a padding would predict the first token
        positions = (real.cumsum(1) - 1).clamp(min=0)
        for_reference = {"attention_mask": real.long(), "position_ids": positions}
        for_model = {"positions": positions, "documents": real.long()}
    else:
        for_reference = {"attention_mask": real.long()} if padding else {}
        for_model = {"positions": None, "documents": None}
    return {"input_ids": tokens, **for_reference}, {"inputs": tokens, **for_model}, labels, real


def as_batch(inputs, labels) -> Batch:
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # the token behind each
    return Batch(**inputs, targets=targets, n_tokens=targets.numel(), n_targets=int((targets != IGNORE).sum()))


def some(inputs, labels, which) -> Batch:
    """A micro-batch of some of the rows."""
    return as_batch({k: None if v is None else v[which] for k, v in inputs.items()}, labels[which])


def largest_difference(given, expected, near=1e-5):
    """The largest difference of two sets of tensors. Fails for one that is not near."""
    for name in expected:
        torch.testing.assert_close(given[name], expected[name], rtol=near, atol=near, msg=lambda m, n=name: f"{n}: {m}")
    return max(float((given[name] - expected[name]).detach().abs().max()) for name in expected)


@pytest.mark.parametrize("seed", range(N_SHAPES))
def test_logits_loss_and_every_gradient_equal_those_of_transformers(seed, record_property):
    """Tied and untied, each without padding, with padding on the right and on the left."""
    shape, vocab_size = drawn(seed)
    worst = {"logits": 0.0, "loss": 0.0, "gradients": 0.0}
    for tied, padding in itertools.product([True, False], ["", "right", "left"]):
        model = build(model_config(**shape, tie_weights=tied), vocab_size).train()
        reference = transformers_twin(model).train()
        for_reference, for_model, labels, real = rows(model, padding, torch.Generator().manual_seed(seed))

        output = reference(**for_reference, labels=labels)
        logits = model(for_model["inputs"], for_model["positions"], for_model["documents"])

        # Weighted by tokens, not by rows
        parts = [some(for_model, labels, slice(0, 1)), some(for_model, labels, slice(1, 4))]
        loss = sum(NEXT_TOKEN.loss(model, part)[0] for part in parts) / sum(part.n_targets for part in parts)
        loss.backward()
        output.loss.backward()
        gradients = with_transformers_names({name: parameter.grad for name, parameter in model.named_parameters()})
        expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
        assert gradients.keys() == expected.keys() and ("lm_head.weight" in gradients) == (not tied)
        assert all(gradient.abs().max() > 1e-4 for name, gradient in expected.items()), "nothing would be compared"
        for name, a, b in (
            ("logits", {"logits": logits[real]}, {"logits": output.logits[real]}),
            ("loss", {"loss": loss}, {"loss": output.loss}),
            ("gradients", gradients, expected),
        ):
            worst[name] = max(worst[name], largest_difference(a, b))
    text = ", ".join(f"{name} {difference:.0e}" for name, difference in worst.items())
    record_property("count", f"parity with transformers, {shape}: 6 variants, largest differences: {text}")


def cosine(step, total, warmup, final):
    """Of the peak learning rate, at a step counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_ten_training_steps_equal_the_same_steps_of_transformers_model_and_torchs_adamw(tied, record_property):
    total, clip, decay, peak = 10, 1.0, 0.1, 3e-3
    model = build(model_config(n_layer=3, n_head=4, n_embd=32, context_length=24, tie_weights=tied), 101).train()
    reference = transformers_twin(model).train()
    start = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    optimizer = optim.build(model, adamw_config(lr=peak, weight_decay=decay))
    matrices = [p for p in reference.parameters() if p.dim() == 2]
    vectors = [p for p in reference.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    torch_optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), eps=1e-8)

    generator = torch.Generator().manual_seed(0)
    losses, norms, rates = [], [], []
    for step in range(total):
        for_reference, for_model, labels, _ = rows(model, ["", "right", "left"][step % 3], generator)
        optim.set_lr(optimizer, optim.lr_factor(schedule_config(warmup=3), step, total))
        micro_batches = [some(for_model, labels, slice(0, 1)), some(for_model, labels, slice(1, 4))]
        loss, norm = loop.train_step(model, optimizer, NEXT_TOKEN, micro_batches, Machine(CPU), grad_clip=clip)

        for group in torch_optimizer.param_groups:
            group["lr"] = peak * cosine(step, total, warmup=3, final=0.1)
        rates.append(torch_optimizer.param_groups[0]["lr"])
        expected = reference(**for_reference, labels=labels).loss
        expected.backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
        torch_optimizer.step()
        torch_optimizer.zero_grad()
        losses.append((loss, expected.item()))
        norms.append((norm, expected_norm.item()))

    for mine, reference_loss in losses:
        assert mine == pytest.approx(reference_loss, rel=1e-4)
    for mine, reference_norm in norms:
        assert mine == pytest.approx(reference_norm, rel=1e-3)
    assert any(norm > clip for norm, _ in norms) and losses[-1][0] < losses[0][0]
    parameters = with_transformers_names(dict(model.named_parameters()))
    for name, parameter in reference.named_parameters():
        moved = (parameter - start[name]).abs().max()
        difference = (parameters[name] - parameter).abs()
        if name.endswith("c_attn.bias"):
            # A bias of the keys changes no attention: its gradient is 0 but for rounding, which AdamW makes large.
            queries, keys, values = difference.chunk(3)
            assert keys.max() <= 2 * sum(rates)
            difference = torch.cat([queries, values])
        assert difference.max() < 1e-3 * moved, name
    difference = max(abs(mine / reference_loss - 1) for mine, reference_loss in losses)
    record_property("count", f"10 steps, tied={tied}: losses as transformers' within {difference:.0e} of themselves")
