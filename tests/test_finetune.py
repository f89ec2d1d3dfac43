"""Which weights are trained, and how fast."""

import copy

import conftest
import pytest
import torch
from conftest import LINEAR, adamw_config, model_config

from gpt import optim
from gpt.config import launch
from gpt.finetune import describe, lr_scales, n_trained, prepare
from gpt.loop import train_step
from gpt.machine.machine import Machine
from gpt.model import GPT
from gpt.notebook import as_batch
from gpt.objective import NEXT_TOKEN

CPU = torch.device("cpu")


def finetune_config(name, **changes):
    return conftest.finetune_config(name, **{"rank": 2, "alpha": 4.0, **changes})


def prepared(cfg, **shape):
    model = GPT(model_config(**{"n_layer": 3, **shape}), 50)
    prepare(model, cfg, seed=0)
    return model


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


CHOICES = [
    None,
    finetune_config("full"),
    finetune_config("lora"),
    finetune_config("lora", rank=5, targets=list(LINEAR)),
    finetune_config("lora", rank=1, targets=["mlp.c_proj", "attn.c_proj"]),
    finetune_config("last_blocks"),
    finetune_config("last_blocks", n_blocks=3),
]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("cfg", CHOICES, ids=lambda cfg: cfg.name if cfg else "none")
def test_what_is_trained_is_counted_right_without_a_model(cfg, tied):
    model = prepared(cfg, tie_weights=tied)
    counted = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert n_trained(model) == counted > 0


def test_a_run_says_what_it_trains():
    assert describe(prepared(None), None) == "10,928 parameters"
    cfg = finetune_config("lora")  # rank 2, 16 + 48 numbers for each of them and of 3 blocks
    assert describe(prepared(cfg), cfg) == "10,928 parameters, 384 trained (finetune=lora)"


def test_from_scratch_and_full_train_everything():
    everything = GPT(model_config(n_layer=3), 50).state_dict().keys()
    assert trained(prepared(None)) == trained(prepared(finetune_config("full"))) == everything


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_last_blocks_are_these_the_final_norm_and_a_head_of_its_own(tied):
    model = prepared(finetune_config("last_blocks", n_blocks=2), tie_weights=tied)
    below = {"wte.weight", "wpe.weight"} | {name for name in model.state_dict() if name.startswith("h.0.")}
    assert trained(model) == model.state_dict().keys() - below
    assert ("lm_head.weight" in trained(model)) == (not tied)


@pytest.mark.parametrize("cfg", CHOICES[2:], ids=lambda cfg: cfg.name)
def test_steps_of_the_loop_move_every_trained_weight_and_not_one_bit_of_the_others(cfg):
    model = prepared(cfg)
    before = copy.deepcopy(model.state_dict())
    optimizer = optim.build(model, adamw_config(), cfg)
    tokens = torch.arange(50)[torch.randint(50, (2, 17))]
    for _ in range(5):
        batch = as_batch(tokens[:, :-1], tokens[:, 1:])
        loss, norm = train_step(model, optimizer, NEXT_TOKEN, [batch], Machine(CPU), grad_clip=0.5)
        assert loss > 0 and norm > 0
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == trained(model)
    model(tokens[:, :-1]).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained(model)


def test_adapters_come_from_the_seed_and_shift_no_other_random_number():
    state = torch.get_rng_state()
    model = GPT(model_config(), 50)
    after_weights = torch.get_rng_state()
    assert not torch.equal(state, after_weights)
    prepare(model, finetune_config("lora"), seed=7)
    assert torch.equal(torch.get_rng_state(), after_weights)
    drawn = [GPT(model_config(), 50) for _ in range(2)]
    for other, seed in zip(drawn, (7, 8), strict=True):
        prepare(other, finetune_config("lora"), seed)
    first, same, another = (m.h[0].attn.c_attn.lora_a for m in (model, *drawn))
    assert torch.equal(first, same) and not torch.equal(first, another)


def test_the_learning_rate_falls_by_the_decay_with_each_layer_below_the_loss():
    model = GPT(model_config(n_layer=3, tie_weights=False), 50)
    prepare(model, finetune_config("lora"), seed=0)
    scales = lr_scales(model, 0.5)
    names = ["lm_head.weight", "ln_f.bias", "h.2.ln_1.weight", "h.1.mlp.c_fc.bias", "h.0.attn.c_attn.lora_a"]
    assert [scales[name] for name in names] == [1, 1, 0.5, 0.25, 0.125]
    assert [scales[name] for name in ("wte.weight", "wpe.weight")] == [0.0625, 0.0625]
    assert lr_scales(GPT(model_config(n_layer=12), 50), 0.9)["h.10.ln_1.weight"] == pytest.approx(0.81)


@pytest.mark.parametrize("name", ["full", "lora", "last_blocks"])
def test_each_choice_under_conf_is_typed_and_lowers_the_learning_rate(name):
    cfg = launch.compose([f"finetune={name}"])
    assert cfg.finetune.name == name and cfg.optimizer.lr < launch.compose([]).optimizer.lr
