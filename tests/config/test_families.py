"""Each family of models has its own keys, and its wrong values are reported like all others."""

from typing import Literal

import pytest
from test_conf import composed

from gpt.config import families
from gpt.config.families import MODELS, Family, GPT2Config, ModelConfig, model_class
from gpt.config.fields import Count, section
from gpt.config.launch import validated
from gpt.config.schema import TrainConfig
from gpt.config.value_errors import find_errors


@section
class RotaryConfig(ModelConfig):
    family: Literal["rotary"]
    theta: Count


@pytest.fixture
def rotary(monkeypatch):
    monkeypatch.setitem(MODELS, "rotary", Family(RotaryConfig, "fractions:Fraction"))


ROTARY = ["model.family=rotary", "~model.gelu", "+model.theta=10000"]


def test_gpt2_is_there_and_its_files_say_so():
    assert validated(composed(), TrainConfig).model == GPT2Config("gpt2", "tiny", 4, 4, 128, 128, 0.0, True, "tanh")


def test_a_family_that_is_registered_before_composing_is_accepted(rotary):
    model = validated(composed(*ROTARY), TrainConfig).model
    assert isinstance(model, RotaryConfig) and model.theta == 10_000
    assert model_class("rotary").__name__ == "Fraction"


def test_all_that_is_wrong_with_a_family_of_the_users_is_reported(rotary):
    cfg = composed("model.family=rotary", "+model.theta=0", "model.n_layer=0")
    assert sorted(find_errors(cfg, TrainConfig)) == [
        "model.n_layer=0: input should be greater than or equal to 1",
        "model.theta=0: input should be greater than or equal to 1",
        "unknown key model.gelu",
    ]


def test_an_unknown_family_is_reported_with_those_that_there_are(rotary):
    problems = find_errors(composed("model.family=gpt3", "model.n_head=0"), TrainConfig)
    assert problems == [
        "model.family=gpt3: it is one of gpt2, modern, rotary",
        "model.n_head=0: input should be greater than or equal to 1",
    ]


def test_settings_of_models_are_known_without_torch():
    assert "torch" not in vars(families)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["model.n_kv_head=3"], "model.n_head 2 is not divisible by model.n_kv_head 3"),
        (["model.head_size=33"], "model.head_size=33: input should be a multiple of 2"),
        (["model.window_layers=SSM"], "model.window_layers=SSM: string should match pattern '^[SL]+$'"),
        (["model.gelu=exact"], "unknown key model.gelu"),
        (
            ["finetune=lora", "finetune.targets=[mlp.gate_proj]", "model.activation=relu2"],
            "finetune.targets ['mlp.gate_proj']: with model.activation relu2 there is no mlp.gate_proj",
        ),
    ],
)
def test_what_is_wrong_with_a_modern_model_is_one_fault(typed, expected):
    typed = [f"+{text}" if text.startswith("model.gelu") else text for text in typed]
    assert find_errors(composed("model=modern_tiny", *typed), TrainConfig) == [expected]


def test_a_width_that_heads_do_not_divide_is_refused_where_heads_are_slices_of_it():
    assert find_errors(composed("model.n_head=3"), TrainConfig) == [
        "model.n_embd 128 is not divisible by model.n_head 3"
    ]
    assert find_errors(composed("model=modern_tiny", "model.n_head=6", "model.n_embd=100"), TrainConfig) == []
