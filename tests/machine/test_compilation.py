import pytest
import torch
from conftest import model_config, train_section

from gpt.errors import UserError
from gpt.machine import compilation
from gpt.machine.machine import Machine
from gpt.model import GPT

CPU = torch.device("cpu")
HOUR = 3600 * 80e9 * torch.get_num_threads()  # operations of an hour at the speed that is taken for granted
COMPILER = pytest.mark.skipif(compilation.missing(CPU) is not None, reason="compiling needs a C++ compiler")


def decide(operations, recorded=None, **train):
    return compilation.decide(train_section(**train), recorded or {}, Machine(CPU), operations)


@COMPILER
def test_auto_compiles_long_runs_only():
    assert [decide(hours * HOUR, compile="auto") for hours in (0.01, 0.5, 10)] == [False, False, True]
    assert not compilation.is_long(Machine(torch.device("mps")), 1e30)  # where nothing has been measured


@COMPILER
def test_a_resumed_run_repeats_what_auto_decided_however_little_of_it_is_left():
    assert decide(1, {"compile": True}, compile="auto")
    assert not decide(100 * HOUR, {"compile": False}, compile="auto")


@COMPILER
def test_a_resumed_run_does_as_it_is_told_and_says_what_has_changed(caplog):
    assert not decide(1, {"compile": True}, compile=False)
    assert "train.compile was True, is now False" in caplog.text


def test_without_a_compiler_auto_does_without_and_true_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not decide(100 * HOUR, compile="auto")
    with pytest.raises(UserError, match="no-such-compiler") as caught:
        decide(1, compile=True)
    assert caught.value.code == 5


@COMPILER
@pytest.mark.exhaustive  # half a minute of compiling
def test_a_compiled_model_computes_the_same_and_compiles_one_block(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = GPT(model_config(n_layer=3), 257)
    tokens = torch.randint(257, (2, 16))
    expected = model(tokens)
    torch._dynamo.utils.counters.clear()
    compilation.compile_blocks(model, tmp_path / "not used")
    assert torch.allclose(model(tokens), expected, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert (tmp_path / "cache").is_dir() and not (tmp_path / "not used").exists()
