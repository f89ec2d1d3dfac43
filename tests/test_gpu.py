"""What only a CUDA device can show; elsewhere these are left out. The rest of these paths is tested on the CPU."""

import copy

import pytest
import torch
from conftest import adamw_config, data_config, made_split, model_config, train_section

from gpt import loop, optim
from gpt.data.batching import TrainBatches
from gpt.data.read_ahead import ReadAhead
from gpt.machine import device
from gpt.machine.machine import Machine
from gpt.model import GPT
from gpt.objective import NEXT_TOKEN

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SPLIT = made_split([5, 9, 17, 4, 30, 12, 8, 8, 6, 21, 7, 11] * 3)


def curve(where, dtype, n_steps=20, compiled=False):
    torch.manual_seed(0)
    model = GPT(model_config(), 50).to(where)
    if compiled:
        for block in model.h:
            block.compile()
    optimizer = optim.build(model, adamw_config(lr=1e-2))
    batches = TrainBatches(SPLIT, data_config(), 16, train_section(), seed=3)
    ahead = ReadAhead(batches.step, where)
    losses = []
    for step in range(n_steps):
        micro_batches = ahead.step(step)
        with ahead.preparing(step + 1):
            scale = 1024.0 if dtype == torch.float16 else 1.0
            losses.append(
                loop.train_step(
                    model,
                    optimizer,
                    NEXT_TOKEN,
                    micro_batches,
                    Machine(where, dtype),
                    1.0,
                    loss_scale=scale,
                )[0]
            )
    return losses


def test_float32_follows_the_curve_of_the_cpu():
    assert curve(GPU, torch.float32) == pytest.approx(curve(CPU, torch.float32), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_follows_it_roughly(dtype):
    assert curve(GPU, dtype) == pytest.approx(curve(CPU, torch.float32), abs=0.05)


def test_compiled_blocks_follow_it_too():
    assert curve(GPU, torch.float32, compiled=True) == pytest.approx(curve(CPU, torch.float32), abs=1e-3)


def test_tf32_rounds_products_and_float32_does_not():
    if torch.cuda.get_device_capability(GPU) < (8, 0):
        pytest.skip("this GPU has no TF32 products")
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ a.double()
    errors = {}
    for dtype in ("tf32", "float32"):
        where, torch_dtype, environment = device.choose("cuda", train_section(dtype=dtype), {})
        assert (torch_dtype, environment["dtype"]) == (torch.float32, dtype)
        errors[dtype] = ((a.to(where) @ a.to(where)).cpu().double() - exact).abs().max().item()
    assert errors["tf32"] > 10 * errors["float32"]


def test_auto_is_bfloat16_from_ampere_on():
    expected = torch.bfloat16 if torch.cuda.get_device_capability(GPU) >= (8, 0) else torch.float32
    assert device.choose_dtype("auto", GPU) == expected


def test_the_optimizer_is_fused():
    optimizer = optim.build(GPT(model_config(), 50).to(GPU), adamw_config())
    assert all(group["fused"] for group in optimizer.param_groups)


def test_attention_is_a_fused_kernel_under_bfloat16():
    """The kernel refuses what it cannot do, so leaving it the only choice shows that it is used."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = GPT(model_config(n_embd=64, n_head=2), 50).to(GPU)
    tokens = torch.zeros((2, 16), dtype=torch.long, device=GPU)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast("cuda", torch.bfloat16):
        model(tokens).sum().backward()


def test_batches_read_ahead_are_in_page_locked_memory():
    ahead = ReadAhead(TrainBatches(SPLIT, data_config(), 16, train_section(), seed=3).step, GPU)
    assert all(batch.inputs.is_pinned() for batch in ahead.step(0))


def test_a_step_waits_for_the_gpu_once():
    torch.manual_seed(0)
    model = GPT(model_config(), 50).to(GPU)
    optimizer = optim.build(model, adamw_config())
    batches = [batch.to(GPU) for batch in TrainBatches(SPLIT, data_config(), 16, train_section(), seed=3).step(0)]
    loop.train_step(model, copy.copy(optimizer), NEXT_TOKEN, batches, Machine(GPU))
    with torch.profiler.profile() as profile:
        loop.train_step(model, optimizer, NEXT_TOKEN, batches, Machine(GPU))
    waits = [event for event in profile.events() if event.name == "aten::_local_scalar_dense"]
    assert len(waits) <= 1
