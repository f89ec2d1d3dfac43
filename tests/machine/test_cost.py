"""What a run is said to cost against what is counted and measured. Its memory: tests/test_memory.py."""

from dataclasses import replace

import pytest
import torch
from conftest import finetune_config, model_config
from test_conf import loaded
from test_train import SMALL
from torch.utils.flop_counter import FlopCounterMode

from gpt import finetune
from gpt.machine import cost
from gpt.model import GPT

VOCABULARY = 61


def counted_operations(model, cfg):
    """Operations of each token, by torch's count."""
    gpt = GPT(model, VOCABULARY).train()
    finetune.prepare(gpt, cfg, seed=0)
    tokens = torch.randint(VOCABULARY, (2, model.context_length))
    with FlopCounterMode(display=False) as counter:
        gpt(tokens).sum().backward()
    return counter.get_total_flops() // tokens.numel()


@pytest.mark.parametrize("tie_weights", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("n_blocks", [None, 1, 2, 3])
def test_the_operations_of_a_token_are_those_that_torch_counts(n_blocks, tie_weights):
    model = model_config(n_layer=3, n_embd=32, n_head=4, context_length=24, dropout=0.1)  # attention as plain products
    model = replace(model, tie_weights=tie_weights)
    cfg = n_blocks and finetune_config(name="last_blocks", n_blocks=n_blocks)
    assert counted_operations(model, cfg) == sum(cost.flops_per_token(model, VOCABULARY, cfg=cfg))


@pytest.mark.parametrize("targets", [["attn.c_attn"], list(finetune.LINEAR)], ids=["default", "all"])
def test_the_operations_of_adapters_are_those_that_torch_counts_but_for_the_first_product(targets):
    """c_attn of the first block has no gradient to hand on, as the embeddings are frozen."""
    model = model_config(n_layer=3, n_embd=32, n_head=4, context_length=24, dropout=0.1)
    cfg = finetune_config(name="lora", targets=targets)
    first = 2 * (3 * 32 * 32 + cfg.rank * 32)  # through the weights and through A
    assert counted_operations(model, cfg) + first == sum(cost.flops_per_token(model, VOCABULARY, cfg=cfg))


def test_the_flops_of_gpt2_small_are_six_times_its_matrices_and_attention():
    blocks, head = cost.flops_per_token(loaded("model=small").model, 50257)
    assert blocks == 6 * 84_934_656 + 12 * 12 * 1024 * 768
    assert head == 6 * 38_597_376
    again, same = cost.flops_per_token(loaded("model=small").model, 50257, checkpointing=True)
    assert (again / blocks, same) == (pytest.approx(4 / 3), head)


def test_time_grows_with_steps_evaluations_and_samples_and_shrinks_with_speed():
    cfg = loaded(*SMALL)
    work, slow = cost.Work.expected(cfg.train), cost.Rates(1e9, 1e9, 1e9)

    def seconds(steps=100, rates=slow, **changes):
        changed = replace(cfg, train=replace(cfg.train, **changes))
        return cost.run_seconds(changed, work, steps, rates, 50257)

    assert seconds(steps=200) > seconds() > seconds(rates=cost.Rates(2e9, 2e9, 2e9))
    assert seconds(eval_every=1) > seconds() > seconds(sample_every=None)


def test_the_probe_finds_more_than_a_megaflop_per_second_even_where_bfloat16_is_emulated():
    rates = cost.probe(torch.device("cpu"), torch.bfloat16, 16, 257)
    assert min(vars(rates).values()) > 1e6


def test_frozen_weights_save_operations_and_time():
    cfg = loaded("model=small", "train.max_steps=100")
    work, rates = cost.Work.expected(cfg.train), cost.Rates(1e12, 1e12, 1e10)
    adapters, last_block = finetune_config(name="lora"), finetune_config(name="last_blocks", n_blocks=1)
    runs = [replace(cfg, finetune=chosen) for chosen in (None, adapters, last_block)]
    operations = [cost.run_flops(run, 50257, 100) for run in runs]
    seconds = [cost.run_seconds(run, work, 100, rates, 50257) for run in runs]
    assert operations[0] > operations[1] > operations[2] and seconds[0] > seconds[1] > seconds[2]
    assert operations[1] / operations[0] == pytest.approx(2 / 3, abs=0.05)  # forward and through the weights: 4 of 6
