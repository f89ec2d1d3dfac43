import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, model_config, train_section

from gpt.errors import UserError
from gpt.machine import compilation
from gpt.machine.machine import Machine
from gpt.model import GPT

CPU = torch.device("cpu")
HOUR = 3600 * 80e9 * torch.get_num_threads()  # operations of an hour at the speed that is taken for granted
COMPILER = pytest.mark.skipif(compilation.missing(CPU) is not None, reason="compiling needs a C++ compiler")


def decide(operations, recorded=None, cache=None, **train):
    return compilation.decide(train_section(**train), recorded or {}, Machine(CPU), operations, cache)


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
def test_a_library_that_a_killed_run_has_left_cut_off_is_removed_and_whole_ones_stay(tmp_path):
    (tmp_path / "x").mkdir()
    whole = tmp_path / "x" / "whole.so"
    (tmp_path / "x.c").write_text("int one(void) { return 1; }")
    subprocess.run(["g++", "-shared", "-fPIC", "-o", whole, tmp_path / "x.c"], check=True)
    content = whole.read_bytes()
    cuts = [*range(0, 64, 7), 64, len(content) // 2, len(content) - 1]
    for cut in cuts:
        (tmp_path / "x" / f"{cut}.so").write_bytes(content[:cut])
    (tmp_path / "x" / "of another system.so").write_bytes(b"\xcf\xfa\xed\xfe")
    for path in (tmp_path / "x").iterdir():
        os.utime(path, (0, 0))
    (tmp_path / "x" / "being written.so").touch()
    compilation.remove_cut_off(tmp_path)
    assert {path.name for path in (tmp_path / "x").iterdir()} == {
        "whole.so", "of another system.so", "being written.so",
    }  # fmt: skip


BROKEN = """#!/bin/sh
case "$*" in
*-shared*|*-c*|*.cpp*) echo "x.cpp:3:10: fatal error: Python.h: No such file or directory" >&2; exit 1;;
esac
exec g++ "$@"
"""


@COMPILER
@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", ["a compiler that fails", "no place for its files"])
def test_where_compiling_fails_auto_goes_on_without_in_one_line_and_true_ends_in_one(tmp_path, fault):
    cache, variables = tmp_path / "cache", {}
    if "compiler" in fault:
        compiler = tmp_path / "g++"
        compiler.write_text(BROKEN)
        compiler.chmod(0o755)
        variables["CXX"] = str(compiler)
    else:
        cache.write_text("a file, where a folder is needed")
    code = f"""
import sys, torch
from pathlib import Path
from test_compilation import decide, HOUR
from gpt.errors import UserError
cache = Path({str(cache)!r})
print("auto", decide(100 * HOUR, compile="auto", cache=cache))
try:
    decide(1, compile=True, cache=cache)
except UserError as error:
    print(error.code, error)
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHINDUCTOR")}
    environment |= variables | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    auto, refused = result.stdout.splitlines()
    assert auto == "auto False" and refused.startswith("5 torch.compile does not work here ("), result.stderr
    reason = "Python.h" if "compiler" in fault else "File exists"
    assert reason in refused and refused.endswith("; use train.compile=false")
    [line] = [line for line in result.stderr.splitlines() if "train.compile=auto" in line]
    assert "goes on without, as compiling fails here" in line and reason in line


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
