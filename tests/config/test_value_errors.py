"""Faults of a composed configuration: each wrong value by its full key, and values that contradict each other."""

import pytest
from conftest import muon_config
from omegaconf import OmegaConf
from test_launch import composed

from gpt.config import schema
from gpt.config.value_errors import find_errors, unknown_key, valid_keys

DELETED = object()


@pytest.fixture(scope="module")
def default():
    return composed()


def errors_of(default, changes):
    cfg = default.copy()
    OmegaConf.set_struct(cfg, False)
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        if value is DELETED:
            del OmegaConf.select(cfg, section)[name]
        else:
            OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    return find_errors(cfg, schema.TrainConfig)


def test_the_default_configuration_has_no_problem(default):
    assert errors_of(default, {}) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optimizer.lr": 0}, "optimizer.lr=0: input should be greater than 0"),
        ({"optimizer.lr": -1e-3}, "optimizer.lr=-0.001: input should be greater than 0"),
        ({"optimizer.lr": float("nan")}, "optimizer.lr=nan: input should be a finite number"),
        ({"optimizer.lr": "fast"}, "optimizer.lr=fast: input should be a valid number"),
        ({"optimizer.lr": None}, "optimizer.lr=null: input should be a valid number"),
        ({"optimizer.lr": {"a": 1}}, "optimizer.lr={'a': 1}: input should be a valid number"),
        ({"optimizer.lr": "???"}, "missing key optimizer.lr"),
        ({"optimizer.lr": "${nope}"}, "optimizer.lr: Interpolation key 'nope' not found"),
        ({"optimizer.lr": "${optimizer.lr}"}, "optimizer.lr: Recursive interpolation detected"),
        ({"wandb.project": "${wandb}"}, "wandb.project: Interpolation to parent node detected"),
        ({"model.dropout": 1.5}, "model.dropout=1.5: input should be less than 1"),
        ({"model.n_layer": 2.5}, "model.n_layer=2.5: input should be a valid integer"),
        ({"model.n_layer": True}, "model.n_layer=true: input should be a valid integer"),
        ({"model.n_layer": 2**63}, "model.n_layer=9223372036854775808: input should be less than"),
        ({"model.n_layer": "x" * 500}, f"model.n_layer={'x' * 57}...: input should be a valid integer"),
        ({"model.n_head": 3}, "model.n_embd 128 is not divisible by model.n_head 3"),
        ({"train.tokens_per_step": 64}, "train.tokens_per_step 64 is less than one row of model.context_length 128"),
        ({"optimizer.learning_rate": 1}, "unknown key optimizer.learning_rate"),
        ({"optimizer.momentum": 0.9}, "unknown key optimizer.momentum"),  # of another optimizer
        ({"optimzer.lr": 1}, "unknown key optimzer.lr, did you mean optimizer.lr?"),
        ({"train.max_step": 1}, "unknown key train.max_step, did you mean train.max_steps?"),
        ({"train": 5}, "train=5: it is a section"),
        ({"optimizer": [1]}, "optimizer=[1]: it is a section"),
        ({"train.eval_every": DELETED}, "missing key train.eval_every"),
        ({"data.mask": "prompt"}, "data.mask=prompt: input should be 'response' or 'all'"),
        ({"data.prompts": ["a", ""]}, "data.prompts.1=: string should have at least 1 character"),
        ({"data.path": "a\0b"}, "data.path=a\0b: string should match"),
        (
            {"optimizer.head_lr": 0.1},
            "optimizer.head_lr 0.1: with model.tie_weights the head is the embedding; set optimizer.embedding_lr",
        ),
        ({"optimizer.name": "adam"}, "optimizer.name=adam: it is one of adamw, muon, soap, sgd"),
        ({"schedule.name": "sine"}, "schedule.name=sine: it is one of constant, cosine, linear, wsd"),
        ({"data.kind": "csv"}, "data.kind=csv: it is one of qa, helpsteer, alpaca, text"),
        ({"model.family": "gpt5"}, "model.family=gpt5: it is one of gpt2"),
        ({"schedule.decay": 0.1}, "unknown key schedule.decay"),  # of another schedule
        ({"optimizer.name": DELETED}, "missing key optimizer.name"),
        ({"device": "gpu"}, "device=gpu"),
        ({"data.val_fraction": 0}, "data.val_fraction 0 and data.test_fraction"),
        ({"data.val_fraction": 0.6, "data.test_fraction": 0.4}, "data.val_fraction 0.6 and data.test_fraction 0.4"),
        ({"sweep.rungs": [2000, 1000]}, "sweep.rungs=[2000, 1000]: each number should be larger than the one before"),
        ({"sweep.rungs": [1000, 1000]}, "sweep.rungs=[1000, 1000]: each number should be larger than the one before"),
        ({"sweep.rungs": [0]}, "sweep.rungs.0=0: input should be greater than"),
        ({"sweep.rungs": [1.5]}, "sweep.rungs.0=1.5: "),
        ({"sweep.rungs": 1000}, "sweep.rungs=1000: input should be a valid list"),
        ({"sweep.rungs": None}, "sweep.rungs=null: input should be a valid list"),
        (
            {"sweep.rungs": [100, 10_240], "train.max_tokens": 10_240, "train.tokens_per_step": 1024},
            "sweep.rungs [100, 10240]: the last one is not below the budget, train.max_tokens 10240",
        ),
        ({"sweep.keep": 0}, "sweep.keep=0: input should be greater than 0"),
        ({"sweep.keep": 1}, "sweep.keep=1: input should be less than 1"),
        ({"sweep.keep": float("nan")}, "sweep.keep=nan: input should be a finite number"),
        ({"sweep.keep": "half"}, "sweep.keep=half: input should be a valid number"),
        ({"sweep.pause_at": 0}, "sweep.pause_at=0: input should be greater than"),
        ({"report": 1}, "report=1: input should be a valid list"),
        ({"sweep.report": "first"}, "unknown key sweep.report, did you mean report?"),
        ({"sweep.name": ".."}, "sweep.name=..: string should match"),
        ({"train.max_tokens": None}, "train.max_steps, train.max_epochs and train.max_tokens are all null"),
        ({"train.max_tokens": 1.5}, "train.max_tokens=1.5"),
        ({"train.max_steps": 50, "schedule.warmup": 51}, "schedule.warmup 51 is longer than the run: 50 steps"),
        (
            {"train.max_steps": 50, "schedule.name": "wsd", "schedule.decay": 100},
            "schedule.decay 100 is longer than the run: 50 steps",
        ),
        (
            {"train.max_tokens": 10_240, "train.tokens_per_step": 1024, "schedule.warmup": 11},
            "schedule.warmup 11 is longer than the run: 10 steps by train.max_tokens",
        ),
        ({"schedule.window_warmup": 0.5}, "schedule.window_warmup 0.5: no layer of the model has a window"),
    ],
)
def test_a_fault_is_named_by_its_full_key_and_alone(default, changes, expected):
    errors = errors_of(default, changes)
    assert len(errors) == 1 and errors[0].startswith(expected), errors


@pytest.mark.parametrize(
    "changes",
    [
        {"train.max_tokens": 1e6},  # how people write a million
        {"sweep.rungs": [], "sweep.keep": 0.01},
        {"sweep.rungs": [1e3, 2000, 10_239], "train.max_tokens": 10_240, "sweep.keep": 0.99},
        {"train.max_steps": 50, "schedule.warmup": 50.9},  # in whole steps
        {
            "train.max_steps": 1,
            "schedule.name": "wsd",
            "schedule.warmup": 0.9,
            "schedule.decay": 0.9,
        },  # below 1: fractions of the run
        {"train.max_tokens": 10_240, "train.tokens_per_step": 1024, "schedule.warmup": 10},
        {"train.max_tokens": 1, "schedule.warmup": 1},  # a run has one step at least
        {"train.max_epochs": 1, "schedule.warmup": 10_000},  # only the data says how long that is
        {"train.max_steps": 50, "train.max_tokens": 1, "schedule.warmup": 50},  # tokens do not count then
    ],
)
def test_what_goes_together_is_no_problem(default, changes):
    assert errors_of(default, changes) == []


def test_a_window_grows_only_where_layers_have_one_that_is_wider_than_its_start():
    def errors(*typed):
        cfg = composed("model=modern_mini", "schedule.window_warmup=0.5", "train.max_steps=10", *typed)
        return find_errors(cfg, schema.TrainConfig)

    assert errors("model.window=128") == []
    for typed in ([], ["model.window=128", "model.window_layers=L"], ["model.window=128", "model.n_layer=1"]):
        assert len(errors(*typed)) == 1 and "no layer of the model has a window" in errors(*typed)[0]
    assert errors("model.window=64") == ["schedule.window_start 64 is not below model.window 64"]
    assert errors("model.window=128", "schedule.window_warmup=11") == [
        "schedule.window_warmup 11 is longer than the run: 10 steps by train.max_steps"
    ]


def test_another_kinds_name_alone_is_one_fault_and_not_one_for_each_of_its_keys(default):
    expected = "its other keys are those of"
    for changes in ({"data.kind": "text"}, {"data.kind": "text", "data.path": "x.txt"}):
        [error] = errors_of(default, changes)
        assert error == f"data.kind=text: {expected} qa; choose a file of the group"
    muon = vars(muon_config(name="muon")) | {"name": "sgd"}
    assert errors_of(default, {"optimizer": muon}) == [
        f"optimizer.name=sgd: {expected} muon; choose a file of the group"
    ]
    assert errors_of(default, {"optimizer": muon | {"lr": -1.0}})[1].startswith("optimizer.lr=-1.0")


def test_all_faults_are_reported_together_and_a_bad_value_takes_part_in_no_contradiction(default):
    changes = {
        "optimizer.lr": -1, "model.dropout": 1.5, "train.max_step": 1, "model.n_head": "five", "seed": -1,
        "optimizer.name": "adam", "wandb.tags": ["${nope}"], "sweep.name": "???", "data.val_fraction": 0,
        "train.tokens_per_step": "many", "schedule.warmup": 10**9,
    }  # fmt: skip
    errors = errors_of(default, changes)
    keys = [*changes, "data.test_fraction"]
    assert len(errors) == len(changes) - 1  # how long the warm-up may be depends on train.tokens_per_step
    assert all(any(key in line for key in keys) for line in errors)


def test_two_sections_that_refer_to_each_other_are_a_fault_and_not_an_endless_loop(default):
    errors = errors_of(default, {"a": {"x": "${b}"}, "b": {"x": "${a}"}})
    assert 0 < len(errors) <= 4 and all("a.x" in line or "b.x" in line for line in errors)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optimzer.lr", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("train.lr", "optimizer.lr"),
        ("n_heads", "model.n_head"),
        ("train.n_heads", "model.n_head"),
        ("modle", "model"),
        ("modle.nlayer", "model.n_layer"),
        ("max_steps", "train.max_steps"),
        ("data.colums", "data.columns"),
        ("hydra.run.dirr", "hydra.run.dir"),
        ("something.else", None),
        ("optimizer.momentum", None),
    ],
)
def test_the_nearest_key_is_suggested_and_none_when_nothing_is_near(key, meant):
    valid = [*valid_keys(schema.TrainConfig, {"optimizer": {"name": "adamw"}}), "hydra.run.dir", "hydra.sweep.dir"]
    assert unknown_key(key, valid) == f"unknown key {key}" + (f", did you mean {meant}?" if meant else "")
