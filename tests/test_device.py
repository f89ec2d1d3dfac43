"""Choice of device and precision."""

import pytest
import torch

from gpt.device import choose_device, choose_dtype, describe
from gpt.errors import UserError


def test_a_device_that_is_not_there_is_an_environment_error_that_names_those_that_are():
    with pytest.raises(UserError, match=r"device=cuda:63 is not available \(this machine has .*cpu\)") as caught:
        choose_device("cuda:63")
    assert caught.value.code == 5


def test_auto_takes_a_device_that_exists():
    torch.ones(1, device=choose_device("auto"))


def test_float16_is_refused_because_it_needs_loss_scaling():
    with pytest.raises(UserError, match="float16") as caught:
        choose_dtype("float16", torch.device("cpu"))
    assert caught.value.code == 5


def test_auto_computes_in_bfloat16_only_where_the_processor_does():
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert choose_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if native else torch.float32)
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16  # slow perhaps, but what was asked for


def test_the_description_names_device_and_precision():
    assert describe(torch.device("cpu"), torch.float32).endswith("threads), float32")
