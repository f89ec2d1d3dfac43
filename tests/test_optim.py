"""Optimizers, decay groups and schedules."""

import subprocess
import sys
from dataclasses import replace
from typing import Any, get_args

import pytest
import safetensors.torch
import torch
from conftest import NO_SOAP, ROOT, adamw_config, finetune_config, model_config, muon_config, schedule_config

from gpt import optim
from gpt.config.fields import section
from gpt.config.optimizers import OPTIMIZERS, SGDConfig, SOAPConfig
from gpt.errors import UserError
from gpt.finetune import lr_scales, prepare
from gpt.machine import sizes
from gpt.model import GPT

CONFIGS = [
    adamw_config(),
    muon_config(),
    SGDConfig(name="sgd", lr=0.1, weight_decay=0.01, momentum=0.9),
]
SOAP = SOAPConfig(
    name="soap", lr=3e-3, weight_decay=0.1, beta1=0.95, beta2=0.95, eps=1e-8, precondition_every=2, adamw_lr=1e-3,
    embedding_lr=None, head_lr=None, scalar_lr=None,
)  # fmt: skip
NEW_MUON = muon_config(
    nesterov=False, scale="match_rms_adamw", orthogonalization="polar_express", cautious_decay=True, momentum_warmup=4,
    second_moment=0.95,
)  # fmt: skip
by_name = pytest.mark.parametrize(
    "cfg",
    [*(pytest.param(cfg, id=cfg.name) for cfg in CONFIGS), pytest.param(NEW_MUON, id="muon, all that is new"),
     pytest.param(SOAP, marks=NO_SOAP, id="soap")],
)  # fmt: skip


def test_every_optimizer_has_a_configuration_here():
    assert {type(cfg) for cfg in [*CONFIGS, SOAP]} == set(get_args(OPTIMIZERS))


@by_name
def test_each_parameter_is_in_one_group_and_biases_and_norms_are_not_decayed(cfg):
    model = GPT(model_config(tie_weights=False), 50)
    groups = optim.build(model, cfg).param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for p in group["params"])


@by_name
def test_a_frozen_parameter_is_left_out(cfg):
    model = GPT(model_config(), 50)
    model.wpe.weight.requires_grad_(False)
    grouped = [p for group in optim.build(model, cfg).param_groups for p in group["params"]]
    assert all(p is not model.wpe.weight for p in grouped)


@by_name
def test_steps_lower_the_loss_and_saved_state_goes_on_in_the_same_way(cfg):
    def run(model, optimizer, steps):
        tokens = torch.arange(32).view(2, 16)
        for _ in range(steps):
            loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    model = GPT(model_config(), 50)
    optimizer = optim.build(model, cfg)
    assert run(model, optimizer, 5) < 3.9  # ln 50 = 3.91
    twin = GPT(model_config(), 50)
    twin.load_state_dict(model.state_dict())
    twin_optimizer = optim.build(twin, cfg)
    saved = {name: tensor.clone() for name, tensor in optim.state_tensors(optimizer).items()}  # as in a file
    optim.load_state_tensors(twin_optimizer, saved)
    assert run(model, optimizer, 3) == run(twin, twin_optimizer, 3)


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_state_stays_with_its_weight_where_other_learning_rates_make_other_groups(decay):
    model = GPT(model_config(tie_weights=False), 50)  # whose head and embedding are of one shape
    of_one_rate, of_several = adamw_config(), adamw_config(embedding_lr=1e-2, head_lr=5e-3, scalar_lr=1e-4)
    optimizer = optim.build(model, of_several)
    weights_after(model, optimizer, 2)
    saved = {name: tensor.clone() for name, tensor in optim.state_tensors(optimizer).items()}
    other = optim.build(model, of_one_rate, finetune_config("full", layer_decay=decay))
    optim.load_state_tensors(other, saved)
    for weight in model.parameters():
        assert torch.equal(other.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg"])
    numbered = optim.flatten_state({"adamw": other.state_dict()})  # as older checkpoints have it
    optim.load_state_tensors(other, numbered)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in optim.state_tensors(other).items())


@by_name
def test_state_that_does_not_fit_is_refused_by_its_name(cfg):
    model = GPT(model_config(), 50)
    optimizer = optim.build(model, cfg)
    model(torch.arange(8)[None]).sum().backward()
    optimizer.step()
    saved = optim.state_tensors(optimizer)
    name = next(name for name, tensor in saved.items() if tensor.dim() == 2)
    with pytest.raises(ValueError, match=name):
        optim.load_state_tensors(optim.build(model, cfg), saved | {name: torch.ones(3, 5)})


FINETUNE = finetune_config("full", layer_decay=0.5)


@by_name
def test_with_layer_decay_each_weight_has_its_own_rate_and_the_largest_comes_first(cfg):
    model = GPT(model_config(tie_weights=False), 50)
    optimizer = optim.build(model, cfg, FINETUNE)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == set(names.values())
    for name, rate in rates.items():
        is_muons = name.startswith("h.") and not name.endswith("bias") and ".ln_" not in name
        base = cfg.adamw_lr if cfg.name in ("muon", "soap") and not is_muons else cfg.lr
        assert rate == base * lr_scales(model, 0.5)[name]
    assert optimizer.param_groups[0]["peak_lr"] == max(rates.values())
    for group in optimizer.param_groups:
        assert len({p.dim() >= 2 for p in group["params"]}) == 1
        assert (group["weight_decay"] > 0) == (group["params"][0].dim() >= 2)


@by_name
def test_each_kind_of_weight_may_have_a_rate_of_its_own_and_the_first_is_still_the_one_of_all_others(cfg):
    if cfg.name == "sgd":
        pytest.skip("it has one rate")
    model = GPT(model_config(tie_weights=False), 50)
    optimizer = optim.build(model, replace(cfg, embedding_lr=0.3, head_lr=0.008, scalar_lr=0.5), FINETUNE)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    scales = lr_scales(model, 0.5)
    for name, base in (("wte.weight", 0.3), ("wpe.weight", 0.3), ("lm_head.weight", 0.008), ("h.0.ln_1.weight", 0.5),
                       ("h.1.mlp.c_fc.bias", 0.5), ("ln_f.bias", 0.5), ("h.1.attn.c_attn.weight", cfg.lr)):  # fmt: skip
        assert rates[name] == base * scales[name]
    assert sorted(rates) == sorted(names.values())
    assert optimizer.param_groups[0]["peak_lr"] == cfg.lr * 0.5  # of the last block, whatever larger ones there are


@by_name
def test_weights_with_rates_of_their_own_go_on_from_a_checkpoint(cfg):
    if cfg.name != "sgd":
        cfg = replace(cfg, embedding_lr=0.03, scalar_lr=0.05)
    model, twin = GPT(model_config(), 50), GPT(model_config(), 50)
    optimizer, twin_optimizer = optim.build(model, cfg, ema=0.9), optim.build(twin, cfg, ema=0.9)
    weights_after(model, optimizer, 4)
    twin.load_state_dict(model.state_dict())
    optim.load_state_tensors(twin_optimizer, {k: v.clone() for k, v in optim.state_tensors(optimizer).items()})
    assert torch.equal(weights_after(model, optimizer, 4), weights_after(twin, twin_optimizer, 4))
    one, other = optim.state_tensors(optimizer), optim.state_tensors(twin_optimizer)
    assert one.keys() == other.keys() and all(torch.equal(other[name], tensor) for name, tensor in one.items())


def test_a_mean_of_the_weights_may_begin_later_and_end_earlier_than_the_run():
    model = GPT(model_config(), 50)
    optimizer = optim.build(model, adamw_config(), ema=0.9)
    weights_after(model, optimizer, 2)
    saved = optim.state_tensors(optimizer)
    without = optim.build(model, adamw_config())
    optim.load_state_tensors(without, saved)
    assert optim.state_tensors(without).keys() == {name for name in saved if not name.startswith("ema.")}
    later = optim.build(model, adamw_config(), ema=0.9)
    optim.load_state_tensors(later, optim.state_tensors(without))
    weights_after(model, later, 1)
    assert all(torch.equal(state["mean"], weights) for weights, state in later.parts["ema"].state.items())


@by_name
def test_the_estimate_of_the_state_is_what_it_takes_with_a_mean_of_the_weights_too(cfg):
    config = model_config(tie_weights=False)
    model = GPT(config, 50)
    for ema in (None, 0.9):
        optimizer = optim.build(model, cfg, ema=ema)
        weights_after(model, optimizer, 2)
        held = sum(t.nbytes for t in optim.state_tensors(optimizer).values() if t.dtype == torch.float32 and t.dim())
        assert sizes.state_bytes(config, None, 50, cfg, ema) == held


@pytest.mark.skipif(not NO_SOAP.args[0], reason="requirements-soap.txt is installed")
def test_a_package_that_is_not_installed_is_said_with_the_command_that_installs_it():
    with pytest.raises(UserError, match=r"pytorch-optimizer is not installed.*pip install .*requirements-soap.txt"):
        optim.build(GPT(model_config(), 50), SOAP)


@by_name
def test_without_layer_decay_parameters_are_numbered_as_in_the_checkpoints_that_there_are(cfg):
    model = GPT(model_config(tie_weights=False), 50)
    named = list(model.named_parameters())
    decayed, plain = [p for _, p in named if p.dim() == 2], [p for _, p in named if p.dim() == 1]
    expected = [decayed, plain]
    if cfg.name in ("muon", "soap"):
        matrices = [p for name, p in named if p.dim() == 2 and name.startswith("h.")]
        expected = [matrices, [model.wte.weight, model.wpe.weight, model.lm_head.weight], plain]
    for finetune in (None, replace(FINETUNE, layer_decay=1.0)):
        groups = optim.build(model, cfg, finetune).param_groups
        assert [list(map(id, group["params"])) for group in groups] == [list(map(id, group)) for group in expected]
        assert groups[0]["lr"] == groups[0]["peak_lr"] == cfg.lr


def weights_after(model, optimizer, steps):
    """All weights, flat, after steps on one batch."""
    for _ in range(steps):
        model(torch.arange(32).view(2, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@by_name
@pytest.mark.parametrize("name", ["lora", "last_blocks"])
def test_only_what_is_trained_has_a_state_which_is_saved_and_goes_on(cfg, name):
    def prepared():
        model = GPT(model_config(tie_weights=False), 50)
        prepare(model, finetune, seed=0)
        return model, optim.build(model, cfg, finetune)

    finetune = finetune_config(name, layer_decay=0.5, rank=2, alpha=2.0)
    model, optimizer = prepared()
    weights_after(model, optimizer, 2)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    with_state = {id(p) for part in optim.parts(optimizer).values() for p in part.state}
    assert with_state == trained and 0 < len(trained) < len(list(model.parameters()))
    twin, twin_optimizer = prepared()
    twin.load_state_dict(model.state_dict())
    optim.load_state_tensors(twin_optimizer, {k: v.clone() for k, v in optim.state_tensors(optimizer).items()})
    assert torch.equal(weights_after(model, optimizer, 2), weights_after(twin, twin_optimizer, 2))


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_where_nothing_is_trained_that_muon_or_adamw_is_for_the_other_works_alone(kind):
    model = GPT(model_config(), 50).requires_grad_(False)
    (model.h[0].mlp.c_fc.weight if kind == "muon" else model.wpe.weight).requires_grad_(True)
    optimizer = optim.build(model, CONFIGS[1])
    assert optimizer.parts.keys() == {kind}
    model(torch.arange(8)[None]).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optim.load_state_tensors(optimizer, optim.state_tensors(optimizer))
    weight = "h.0.mlp.c_fc.weight" if kind == "muon" else "wpe.weight"
    assert all(name.startswith(f"{kind}.{weight}.") for name in optim.state_tensors(optimizer))


def test_muon_gets_the_matrices_of_the_blocks_and_nothing_else():
    model = GPT(model_config(tie_weights=False), 50)
    muon = optim.build(model, CONFIGS[1]).parts["muon"]
    names = {name for name, p in model.named_parameters() if any(p is q for q in muon.param_groups[0]["params"])}
    assert names == {
        f"h.{i}.{name}.weight" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


@pytest.mark.parametrize(("dtype", "of_muon"), [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16),
])  # fmt: skip
def test_muon_multiplies_in_the_type_of_the_run_which_is_the_fast_one(dtype, of_muon):
    """bfloat16 on a processor that emulates it would take a hundred times as long."""
    muon = optim.build(GPT(model_config(), 50), CONFIGS[1], dtype=dtype).parts["muon"]
    assert [group["dtype"] for group in muon.param_groups] == [of_muon]


def test_the_schedule_scales_every_group_from_its_own_peak():
    optimizer = optim.build(GPT(model_config(), 50), CONFIGS[1])
    optim.set_lr(optimizer, 0.5)
    optim.set_lr(optimizer, 0.5)  # from the peak, not from what it was
    assert {group["lr"] for group in optimizer.param_groups} == {0.01, 0.0005}


UPDATES = [
    ("AdamW", {"lr": 0.01, "fused": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
]


@pytest.mark.parametrize(("name", "settings"), UPDATES, ids=[name for name, _ in UPDATES])
def test_an_optimizer_without_torchs_wrappers_does_what_torchs_own_does_bit_for_bit(name, settings):
    def run(kind):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(33, 17)) for _ in range(4)]
        groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]
        optimizer = kind(groups, **settings)
        for step in range(7):
            sum(((step + 1) * p.sin()).sum() for p in parameters).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in parameters)
        twin = kind(groups, **settings)
        twin.load_state_dict(optimizer.state_dict())
        return parameters, optimizer.state_dict(), twin.state_dict()

    unhooked, original = run(optim.without_compiler_hooks(getattr(torch.optim, name))), run(getattr(torch.optim, name))
    assert all(map(torch.equal, unhooked[0], original[0]))
    for mine, torchs in zip(unhooked[1:], original[1:], strict=True):
        assert mine["param_groups"] == torchs["param_groups"]
        assert mine["state"].keys() == torchs["state"].keys() and len(mine["state"]) == 4
        for number, state in torchs["state"].items():
            assert mine["state"][number].keys() == state.keys()
            assert all(torch.equal(mine["state"][number][key], tensor) for key, tensor in state.items())


OF_TORCH = {
    "Adafactor": {"weight_decay": 0.01, "beta2_decay": -0.8, "eps": [None, 1e-3], "d": 1.0},
    "RMSprop": {"weight_decay": 0.01, "alpha": 0.9, "momentum": 0.5, "centered": True},
    "Adagrad": {"lr_decay": 0.1},
    "NAdam": {"betas": [0.9, 0.95], "decoupled_weight_decay": True},
    "Adadelta": {"rho": 0.9}, "Rprop": {}, "ASGD": {"lambd": 1e-4}, "RAdam": {}, "Adamax": {},
    "Adam": {"amsgrad": True},
}  # fmt: skip


def of_torch(name: str):
    """A configuration as a reader would add it for one of torch's optimizers."""
    settings = {"name": name.lower(), "lr": 0.01, **OF_TORCH[name]}
    kind = type(name, (), {
        "__annotations__": dict.fromkeys(settings, Any), "built_by": f"torch.optim:{name}", "__module__": __name__,
    })  # fmt: skip
    return section(kind)(**settings)


@pytest.mark.parametrize("name", OF_TORCH)
def test_any_optimizer_of_torchs_needs_a_dataclass_only_and_goes_on_from_a_checkpoint(tmp_path, name):
    config, cfg = model_config(tie_weights=False), of_torch(name)
    model = GPT(config, 50)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer = optim.build(model, cfg)
    assert not torch.equal(weights_after(model, optimizer, 3), before)
    twin = GPT(config, 50)
    twin.load_state_dict(model.state_dict())
    safetensors.torch.save_file(optim.state_tensors(optimizer), tmp_path / "state.safetensors")
    twin_optimizer = optim.build(twin, cfg)
    optim.load_state_tensors(twin_optimizer, safetensors.torch.load_file(tmp_path / "state.safetensors"))
    assert torch.equal(weights_after(model, optimizer, 3), weights_after(twin, twin_optimizer, 3))
    held = sum(t.nbytes for t in optim.state_tensors(optimizer).values() if t.dim())
    assert sizes.state_bytes(config, None, 50, cfg, None) == held


def test_a_state_that_is_no_tensor_is_kept_as_it_is():
    model = GPT(model_config(), 50)
    optimizer = optim.build(model, CONFIGS[2])
    state = {"seen": 3, "share": 0.1, "name": None, "list": [1, 2.5, True], "by": {"a": -1}}
    optimizer.state[model.wte.weight] = dict(state)
    tensors = optim.state_tensors(optimizer)
    assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()) and len(tensors) == len(state)
    twin = optim.build(model, CONFIGS[2])
    optim.load_state_tensors(twin, tensors)
    assert twin.state[model.wte.weight] == state


def test_no_optimizer_loads_torchs_compiler_which_takes_longer_than_the_first_step():
    code = """
import sys, torch
from test_optim import CONFIGS, GPT, model_config, optim
for cfg in CONFIGS:
    model = GPT(model_config(), 50)
    optimizer = optim.build(model, cfg)
    model(torch.arange(32).view(2, 16)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optim.load_state_tensors(optimizer, optim.state_tensors(optimizer))
    print(cfg.name, "torch._dynamo" in sys.modules)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, capture_output=True, text=True)
    assert result.stdout == "".join(f"{cfg.name} False\n" for cfg in CONFIGS), result.stderr


@pytest.mark.parametrize(
    ("name", "at_half", "at_end"),
    [("constant", 1.0, 1.0), ("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("wsd", 1.0, 0.1)],
)
def test_the_schedule_warms_up_to_one_and_ends_at_its_final_value(name, at_half, at_end):
    cfg = schedule_config(name=name, warmup=10, decay=20, final=0.1)
    assert optim.lr_factor(cfg, 0, 110) == pytest.approx(0.1)
    assert optim.lr_factor(cfg, 9, 110) == 1.0
    assert optim.lr_factor(cfg, 60, 110) == pytest.approx(at_half)  # half of the hundred steps after warm-up
    assert optim.lr_factor(cfg, 110, 110) == pytest.approx(at_end)


def test_wsd_decays_over_its_last_part_only():
    cfg = schedule_config(name="wsd", warmup=0, decay=0.2, final=0.0)
    assert [optim.lr_factor(cfg, step, 100) for step in (0, 80, 90)] == [1.0, 1.0, 0.5]


def test_lengths_below_one_are_fractions_of_the_run_and_others_steps():
    assert [optim.in_steps(length, 200) for length in (0, 0.05, 1, 30)] == [0, 10, 1, 30]


def test_the_window_grows_in_equal_stages_of_its_start_and_is_whole_from_the_end_of_its_warmup_on():
    cfg = schedule_config(window_warmup=0.5, window_start=64)
    assert [optim.training_window(cfg, 256, step, 12) for step in range(7)] == [64, 64, 128, 128, 192, 192, 256]
    assert [optim.training_window(cfg, 200, step, 12) for step in (4, 5, 6, 11)] == [192, 192, 200, 200]
    in_steps = schedule_config(window_warmup=2, window_start=64)
    assert [optim.training_window(in_steps, 256, step, 1000) for step in range(3)] == [64, 128, 256]


def test_without_a_window_or_its_warmup_nothing_grows():
    assert optim.training_window(schedule_config(window_warmup=0.5), None, 0, 10) is None
    assert optim.training_window(schedule_config(window_warmup=None), 256, 0, 10) == 256


@pytest.mark.parametrize("key", ["warmup", "decay", "window_warmup"])
def test_a_part_longer_than_the_run_is_an_error(key):
    with pytest.raises(UserError, match=f"schedule.{key}=30 is longer than the run of 20 steps"):
        optim.check_schedule(schedule_config(name="wsd", **{key: 30}), 20)
