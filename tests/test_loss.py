"""The cross-entropy in chunks equals the two-line reference in gpt/loss.py: torch's, of all logits at once."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gpt import loss
from gpt.loss import cross_entropy, cross_entropy_sum

VOCABULARIES = [257, 320, 50257]  # not a multiple of loss.ALIGNMENT, one, GPT-2's


def example(n, n_vocab, n_embd=16, scale=1.0):
    generator = torch.Generator().manual_seed(n + n_vocab)
    hidden = torch.randn(n, n_embd, generator=generator) * scale
    weight = torch.randn(n_vocab, n_embd, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(n_vocab, (n,), generator=generator)


@pytest.mark.parametrize(("n_vocab", "softcap"), [*((n, None) for n in VOCABULARIES), (257, 5.0), (320, 5.0)])
@pytest.mark.parametrize("n", [1, loss.CACHED + 1, loss.CHUNK, 2 * loss.CHUNK + 3])
def test_losses_and_gradients_are_those_of_all_logits_at_once(n, n_vocab, softcap):
    hidden, weight, targets = example(n, n_vocab)
    reference = loss.reference(hidden, weight, targets, softcap)
    expected = torch.autograd.grad(reference.sum() / 7, (hidden, weight))
    assert torch.allclose(cross_entropy(hidden, weight, targets, softcap), reference, atol=1e-5)
    total = cross_entropy_sum(hidden, weight, targets, softcap)
    assert total.item() == pytest.approx(reference.sum().item(), rel=1e-6)
    for gradient, exact in zip(torch.autograd.grad(total / 7, (hidden, weight)), expected, strict=True):
        assert torch.allclose(gradient, exact, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("n", [1, loss.CACHED + 1, 2 * loss.CHUNK + 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_losses_and_gradients_of_a_mixture_are_those_of_all_logits_at_once(n, softcap):
    hidden, weight, targets = example(n, 257)
    generator = torch.Generator().manual_seed(n)
    kept = torch.rand(n, generator=generator)
    added = (1 - kept) * torch.rand(n, generator=generator) * (torch.arange(n) % 3 > 0)  # 0 for each third
    inputs = hidden, weight, kept.log().requires_grad_(), added.log().requires_grad_()
    mixture = inputs[2:]
    chances = kept * torch.exp(-loss.reference(hidden, weight, targets, softcap)) + added
    reference = loss.reference(hidden, weight, targets, softcap, mixture)
    torch.testing.assert_close(reference.exp(), 1 / chances)
    expected = torch.autograd.grad(reference.sum() / 7, inputs)
    torch.testing.assert_close(cross_entropy(hidden, weight, targets, softcap, mixture), reference.detach())
    total = cross_entropy_sum(hidden, weight, targets, softcap, mixture)
    for gradient, exact in zip(torch.autograd.grad(total / 7, inputs), expected, strict=True):
        assert torch.allclose(gradient, exact, atol=1e-5 * exact.abs().max().item())


def test_huge_logits_neither_overflow_nor_lose_the_loss():
    """Logits of some thousands: exp of the largest is no float32, and the probability of most targets is 0."""
    hidden, weight, targets = example(100, 320, scale=1000.0)
    reference = F.cross_entropy((hidden @ weight.t()).double(), targets, reduction="none")
    assert reference.max() > 5000
    assert torch.allclose(cross_entropy(hidden, weight, targets).double(), reference, rtol=1e-5, atol=1e-2)


def test_a_logit_that_is_not_a_number_makes_the_loss_not_a_number():
    hidden, weight, targets = example(3, 257)
    with torch.no_grad():
        hidden[1, 0] = torch.nan
    assert cross_entropy(hidden, weight, targets).isnan().tolist() == [False, True, False]


def test_no_scored_position_is_a_loss_of_zero():
    hidden, weight, targets = example(0, 257)
    total = cross_entropy_sum(hidden, weight, targets)
    total.backward()
    assert total.item() == 0 and not weight.grad.any()


@pytest.mark.parametrize(("n_vocab", "softcap"), [(257, None), (257, 5.0), (loss.SLAB + 65, None)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_products_are_rounded_and_the_loss_is_not(dtype, n_vocab, softcap):
    """With inputs that are exact in the lower type, what remains is the rounding of each logit: 2^-8 of some logits of
    size 10, and 2^-11 in float16."""
    hidden, weight, targets = example(100, n_vocab)
    with torch.no_grad():
        for tensor in (hidden, weight):
            tensor.copy_(tensor.to(dtype).float())
    reference = loss.reference(hidden, weight, targets, softcap)
    expected = torch.autograd.grad(reference.sum(), (hidden, weight))
    with torch.autocast("cpu", dtype):
        losses = cross_entropy(hidden, weight, targets, softcap)
        total = cross_entropy_sum(hidden, weight, targets, softcap)
    assert losses.dtype == torch.float32
    error = (losses - reference).abs().max().item()
    assert 0 < error < 20 * torch.finfo(dtype).eps
    for gradient, exact in zip(torch.autograd.grad(total, (hidden, weight)), expected, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - exact).abs().max() < 20 * torch.finfo(dtype).eps * exact.abs().max()


def test_logits_of_all_positions_are_never_held():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result = operator(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    hidden, weight, targets = example(8 * loss.CHUNK, 320)
    with Largest() as largest:
        cross_entropy_sum(hidden, weight, targets).backward()
    assert largest.numel == loss.CHUNK * 320
