"""The numbers in a model's weights are those of the model that is made."""

import pytest
import torch
from conftest import model_config
from test_conf import loaded
from test_counting import CHOICES, VOCABULARY, built

from gpt.machine.sizes import count_sizes
from gpt.model import GPT


@pytest.mark.parametrize("tie_weights", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("choice", CHOICES)
def test_the_sizes_are_those_of_the_model(choice, tie_weights):
    cfg, model = built(CHOICES[choice], tie_weights=tie_weights)
    sizes = count_sizes(cfg, CHOICES[choice], VOCABULARY)
    assert sizes.held == model.n_parameters() == sum(p.numel() for p in model.parameters())
    assert sizes.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes.parameters == GPT(cfg, VOCABULARY).n_parameters()
    assert (sizes.head, sizes.head_is_trained) == (VOCABULARY * 32, model.head.requires_grad)


@pytest.mark.parametrize(
    ("name", "parameters"), [("small", 124_439_808), ("medium", 354_823_168), ("xl", 1_557_611_200)]
)
def test_the_parameters_of_gpt2_are_the_published_ones(name, parameters):
    assert count_sizes(loaded(f"model={name}").model, None, 50257).parameters == parameters


def test_counting_leaves_torch_as_it_was():
    state = torch.get_rng_state()
    count_sizes(model_config(n_layer=1, n_embd=8), None, 11)
    assert torch.equal(torch.get_rng_state(), state) and torch.ones(1).item() == 1.0
