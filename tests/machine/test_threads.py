"""How threads wait, how many there are, and what is said when others are using the processor."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from gpt.machine import threads

WITHOUT = {name: value for name, value in os.environ.items() if name not in threads.OWN}


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "0"}])
@pytest.mark.parametrize(
    ("script", "load", "spin_count"),
    [("train", 0.0, 1_000), ("generate", 0.1, 20_000), ("generate", 1.0, 1_000), ("evaluate", 0.0, 1_000)],
)
def test_the_spin_count_is_set_before_torch_is_loaded_unless_the_user_has_chosen(own, script, load, spin_count):
    code = f"""
import json, os, sys
sys.argv = ["{script}.py", "--help"]
os.getloadavg = lambda: ({load}, 9.0, 9.0)
from gpt.config import launch
launch.launch(lambda: print(json.dumps([dict(os.environ), "torch" in sys.modules])), "{script}")
"""
    run = subprocess.run([sys.executable, "-c", code], env=WITHOUT | own, cwd=ROOT, capture_output=True, text=True)
    variables, torch_is_loaded = json.loads(run.stdout)
    expected = own or {"GOMP_SPINCOUNT": str(spin_count)}
    assert {name: variables[name] for name in threads.OWN if name in variables} == expected and not torch_is_loaded


@pytest.mark.parametrize(
    "seen, warnings",
    [
        ([(0, 0), (20, 8), (40, 16)], 0),
        ([(0, 0), (20, 16), (40, 32)], 1),  # once
        ([(0, 0), (1, 3), (2, 6), (19, 18)], 1),  # too short a time says nothing, and is counted
        ([(0, 0), (100, 1), (104, 21)], 1),  # later in a long run
        ([None, (20, 20)], 0),  # not counted by this system
        ([(0, 0), None, (20, 20)], 1),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
def test_a_run_that_waits_for_processors_says_so_once_and_what_may_help(monkeypatch, caplog, seen, warnings, n):
    monkeypatch.setattr(torch, "get_num_threads", lambda: n)
    looks = iter(seen)
    monkeypatch.setattr(threads, "used_and_waited", lambda: next(looks))
    starvation = threads.Starvation()
    with caplog.at_level(logging.WARNING):
        for _ in seen[1:] if seen[0] else []:
            starvation.check()
    assert len(caplog.messages) == warnings
    assert all(text.endswith("(threads=1) may be faster" if n > 1 else "of computing") for text in caplog.messages)


def test_the_system_counts_the_time_on_and_the_time_without_a_processor():
    if not os.path.exists("/proc/self/schedstat"):
        pytest.skip("this system counts neither")
    before = threads.used_and_waited()
    sum(range(3_000_000))
    after = threads.used_and_waited()
    assert after[0] > before[0] and after[1] >= before[1]
