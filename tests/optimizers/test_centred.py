"""The mean row of a head, kept at zero."""

import torch
from conftest import model_config, muon_config

from gpt import optim
from gpt.model import GPT
from gpt.optimizers.centred import Centred


def test_the_mean_row_is_taken_out_and_no_probability_changes():
    head = torch.nn.Parameter(torch.randn(50, 8, dtype=torch.float64) + 3)
    hidden = torch.randn(5, 8, dtype=torch.float64)
    before = (hidden @ head.t()).log_softmax(-1)
    Centred(head).step()
    assert head.mean(0).abs().max() < 1e-12
    torch.testing.assert_close((hidden @ head.t()).log_softmax(-1), before)


def test_a_step_of_muon_with_it_is_one_without_it_but_for_the_mean():
    heads = []
    for centred_head in (False, True):
        torch.manual_seed(0)
        model = GPT(model_config(), 40)
        optimizer = optim.build(model, muon_config(centred_head=centred_head))
        model(torch.arange(8)[None]).square().sum().backward()
        optimizer.step()
        heads.append(model.head.detach())
    torch.testing.assert_close(heads[1], heads[0] - heads[0].mean(0))


def test_a_checkpoint_is_the_same_with_and_without_it():
    model = GPT(model_config(), 40)
    optimizer = optim.build(model, muon_config(centred_head=True))
    model(torch.arange(8)[None]).square().sum().backward()
    optimizer.step()
    state = optim.state_tensors(optimizer)
    for centred_head in (False, True):
        other = optim.build(model, muon_config(centred_head=centred_head))
        optim.load_state_tensors(other, state)
        assert optim.state_tensors(other).keys() == state.keys()


def test_a_head_that_is_not_trained_stays():
    model = GPT(model_config(), 40)
    model.head.requires_grad_(False)
    before = model.head.clone()
    model(torch.arange(8)[None]).square().sum().backward()
    optim.build(model, muon_config(centred_head=True)).step()
    assert torch.equal(model.head, before)
