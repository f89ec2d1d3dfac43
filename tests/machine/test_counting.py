"""What is counted on tensors without content is what real ones take."""

import subprocess
import sys

import pytest
import torch
from conftest import LINEAR, ROOT, UNPUBLISHED, finetune_config, model_config, modern_config
from torch.utils.flop_counter import FlopCounterMode

from gpt import finetune
from gpt.machine import counting
from gpt.model import GPT
from gpt.modern import Modern

VOCABULARY = 61
CHOICES = {
    "full": None,
    "the last block": finetune_config(name="last_blocks", n_blocks=1),
    "two blocks": finetune_config(name="last_blocks", n_blocks=2),
    "adapters": finetune_config(name="lora", rank=4, targets=["attn.c_attn"]),
    "all adapters": finetune_config(name="lora", rank=4, targets=list(LINEAR)),
}


def built(chosen, **shape):
    cfg = model_config(**{"n_layer": 3, "n_embd": 32, "n_head": 4, "context_length": 24, **shape})
    model = GPT(cfg, VOCABULARY).train()
    finetune.prepare(model, chosen, seed=0)
    return cfg, model


@pytest.mark.parametrize("choice", CHOICES)
def test_the_operations_are_those_that_torch_counts_in_a_real_step(choice):
    """With dropout attention is made of plain products on a CPU, which torch's own table has."""
    cfg, model = built(CHOICES[choice], dropout=0.1)
    tokens = torch.randint(VOCABULARY, (2, cfg.context_length))
    with FlopCounterMode(display=False) as counter:
        model.hidden(tokens).sum().backward()
    count = counting.step(cfg, CHOICES[choice], VOCABULARY, rows=2)
    assert count.forward + count.backward == counter.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True], ids=["one document a row", "several"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_bytes_are_those_of_a_real_step(choice, dropout, masked, dtype):
    """The same meter over the same step with real tensors."""
    cfg, model = built(CHOICES[choice], dropout=dropout)
    real = counting.run(model, 3, False, masked, dtype)
    counted = counting.step(cfg, CHOICES[choice], VOCABULARY, rows=3, masked=masked, dtype=dtype)
    assert counted.bytes == pytest.approx(real.bytes, rel=0.02) and counted.forward == real.forward


@pytest.mark.parametrize("changes", [{}, {"window": None, "qk_norm": "before_rotation"}], ids=["masks", "none"])
def test_a_modern_model_is_counted_as_it_computes(changes):
    cfg = modern_config(**UNPUBLISHED | {"dropout": 0.1, "context_length": 24} | changes)
    model = Modern(cfg, VOCABULARY).train()
    with FlopCounterMode(display=False) as counter:
        model.hidden(torch.randint(VOCABULARY, (3, cfg.context_length))).sum().backward()
    count = counting.step(cfg, None, VOCABULARY, rows=3)
    assert count.forward + count.backward == counter.get_total_flops()
    assert count.bytes == pytest.approx(counting.run(model, 3, False, False, torch.float32).bytes, rel=0.02)


def test_counting_loads_no_compiler_also_for_a_model_that_makes_tensors_of_numbers():
    code = """
import sys
from conftest import UNPUBLISHED, modern_config
from gpt.machine import counting
counting.step(modern_config(**UNPUBLISHED), None, 61, rows=3)
print("torch._dynamo" in sys.modules)
"""
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


def test_checkpointing_computes_the_blocks_twice_and_holds_less():
    cfg, _ = built(None, n_layer=8)
    plain, again = (counting.step(cfg, None, VOCABULARY, rows=8, checkpointing=on) for on in (False, True))
    # torch ends the second pass of a block as soon as it has what backward needs: before its last product
    assert 0.6 * plain.forward < again.backward - plain.backward <= plain.forward and again.bytes < plain.bytes


def test_a_later_micro_batch_finds_gradients_there():
    cfg, _ = built(None)
    first, later = (counting.step(cfg, None, VOCABULARY, is_later=later) for later in (False, True))
    assert later.bytes > first.bytes and later.forward == first.forward
