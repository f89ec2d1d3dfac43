"""SOAP as it is used here; what it does with a model is in test_optim.py."""

import pytest
import torch

soap = pytest.importorskip("gpt.optimizers.soap", reason="requirements-soap.txt is not installed")


def test_its_eigenvectors_are_orthogonal_and_lie_in_memory_as_a_file_would_restore_them():
    matrix = torch.nn.Parameter(torch.randn(6, 4))
    optimizer = soap.SOAP([matrix], lr=0.1, precondition_frequency=2)
    for step in range(5):
        matrix.grad = torch.randn(6, 4)
        optimizer.step()
        for vectors in optimizer.state[matrix]["Q"]:
            assert vectors.is_contiguous(), step
            assert torch.allclose(vectors.T @ vectors, torch.eye(len(vectors)), atol=1e-5)


def test_gradients_that_are_turned_give_the_same_updates_turned_as_its_axes_are_those_of_the_gradients():
    """Which holds for no optimizer that divides each number by its own mean square, such as Adam."""
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    gradients = torch.randn(9, 4, 4, dtype=torch.float64)

    def moved(kind, gradients, **settings):
        matrix = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
        optimizer = kind([matrix], lr=0.1, betas=(0.95, 0.95), weight_decay=0.0, **settings)
        for gradient in gradients:
            matrix.grad = gradient.clone()
            optimizer.step()
        return matrix.detach()

    for kind, settings in ((soap.SOAP, {"precondition_frequency": 3}), (torch.optim.AdamW, {})):
        once, turned = moved(kind, gradients, **settings), moved(kind, turn @ gradients, **settings)
        assert torch.allclose(turned, turn @ once, atol=1e-3) == (kind is soap.SOAP)
