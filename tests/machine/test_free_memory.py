"""What a machine has free and what limits leave, from files as Linux writes them and from real limits."""

import mmap
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from gpt.machine import free_memory

MB = 2**20


def machine(root, available_mb, cgroup="", **files):
    """A folder with the files that Linux has in /proc and /sys; in `files`, / is written as __."""
    contents = {
        "proc__meminfo": f"MemTotal: 99999999 kB\nMemAvailable: {available_mb * 1024} kB\nHugePages_Total: 0\n",
        "proc__self__cgroup": cgroup,
    } | files
    for name, text in contents.items():
        path = root.joinpath(*name.split("__"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_limits_it_is_what_the_machine_has_available(tmp_path):
    assert free_memory.free_of_machine(machine(tmp_path, 3000)) == 3000 * MB


def test_a_container_leaves_its_limit_less_what_it_uses_file_pages_not_counted(tmp_path):
    root = machine(tmp_path, 9000, "0::/\n", **{
        "sys__fs__cgroup__memory.max": f"{2000 * MB}\n", "sys__fs__cgroup__memory.current": f"{1500 * MB}\n",
        "sys__fs__cgroup__memory.stat": f"anon 5\ninactive_file {300 * MB}\nslab 7\n",
    })  # fmt: skip
    assert free_memory.free_of_machine(root) == 800 * MB


def test_the_tightest_of_the_groups_around_a_process_counts(tmp_path):
    root = machine(tmp_path, 9000, "0::/user/job\n", **{
        "sys__fs__cgroup__user__job__memory.max": "max\n", "sys__fs__cgroup__user__job__memory.current": "0\n",
        "sys__fs__cgroup__user__memory.max": f"{700 * MB}\n", "sys__fs__cgroup__user__memory.current": f"{100 * MB}\n",
    })  # fmt: skip
    assert free_memory.free_of_machine(root) == 600 * MB


def test_groups_of_version_1_are_read_too(tmp_path):
    root = machine(tmp_path, 9000, "5:devices:/x\n4:cpu,memory:/job\n0::/\n", **{
        "sys__fs__cgroup__memory__job__memory.limit_in_bytes": f"{500 * MB}\n",
        "sys__fs__cgroup__memory__job__memory.usage_in_bytes": f"{400 * MB}\n",
        "sys__fs__cgroup__memory__job__memory.stat": f"total_inactive_file {50 * MB}\n",
        "sys__fs__cgroup__memory__memory.limit_in_bytes": "9223372036854771712\n",
        "sys__fs__cgroup__memory__memory.usage_in_bytes": f"{4000 * MB}\n",
    })  # fmt: skip
    assert free_memory.free_of_machine(root) == 150 * MB


def test_a_limit_that_is_used_up_leaves_nothing_and_never_less(tmp_path):
    root = machine(tmp_path, 9000, "0::/\n", **{
        "sys__fs__cgroup__memory.max": "1000\n", "sys__fs__cgroup__memory.current": "2000\n",
    })  # fmt: skip
    assert free_memory.free_of_machine(root) == 0


def test_without_any_of_these_files_it_is_the_memory_that_is_built_in(tmp_path):
    assert free_memory.free_of_machine(tmp_path) > 2**28


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_what_ulimit_leaves_shrinks_by_what_is_taken(kind):
    program = (
        f"import resource; resource.setrlimit(resource.{kind}, (2**30, 2**30))\n"
        "from gpt.machine import free_memory\n"
        "before = free_memory.free_of_machine(); taken = bytearray(2**28)\n"
        "print(before, before - free_memory.free_of_machine())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert result.returncode == 0, result.stderr
    before, less = map(int, result.stdout.split())
    assert 2**29 < before < 2**30 and less == pytest.approx(2**28, rel=0.05)


def test_memory_in_use_grows_by_what_is_touched():
    cpu = torch.device("cpu")
    before = free_memory.in_use(cpu)
    with mmap.mmap(-1, 2**27) as taken:  # not from the heap, which may have as much left from other tests
        for _ in range(2**7):
            taken.write(bytes(2**20))
        after = free_memory.in_use(cpu)
    assert after - before == pytest.approx(2**27, rel=0.1)


def test_the_peak_of_a_process_is_its_own_however_much_the_one_had_that_started_it():
    program = "from gpt.machine import free_memory; print(free_memory.peak())"
    ballast = bytearray(200 * MB)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert 5 * MB < int(result.stdout) < 150 * MB
    assert free_memory.peak() > len(ballast)
