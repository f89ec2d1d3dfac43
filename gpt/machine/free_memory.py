"""Reads how much memory a process may still take: what the machine has free, and what its limits leave."""

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None

if TYPE_CHECKING:  # torch takes seconds, and only GPUs need it here
    import torch


def free(device: "torch.device") -> int:
    """Bytes that this process can still get: of the GPU, or of the machine's memory."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return free_of_machine()


def in_use(device: "torch.device") -> int:
    """Bytes that this process has already, where `free` counts what comes on top of them."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_reserved(device)
    if sys.platform == "linux":
        return _status().get("VmRSS", 0)
    return peak()


def peak() -> int:
    """The most bytes of the machine's memory that this process has had at once."""
    highest = _status().get("VmHWM")  # in Linux ru_maxrss begins with that of the parent process
    if highest is not None:
        return highest
    if resource is None:
        counters = (ctypes.c_uint64 * 9)(72)  # PROCESS_MEMORY_COUNTERS: its size, and eight counts of bytes
        ctypes.windll.kernel32.K32GetProcessMemoryInfo(ctypes.c_void_p(-1), ctypes.byref(counters), 72)
        return counters[1]  # PeakWorkingSetSize
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, else in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_of_machine(root: Path = Path("/")) -> int:
    """The least of: free memory, what the limits of this process and of its control groups (containers) leave.

    Linux has all of these in files below `root`, Windows has a call for the first; elsewhere, it is all memory that is
    built in.
    """
    limits = [*_available(root), *_left_by_groups(root), *_left_by_limits(root)]
    if limits:
        return max(0, min(limits))
    if resource is None:
        status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX: its size, and seven counts of bytes
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return status[2]  # ullAvailPhys
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _available(root: Path) -> Iterator[int]:
    """MemAvailable: free memory and what the kernel would give up for it, without swapping."""
    sizes = _sizes(root / "proc" / "meminfo")
    if "MemAvailable" in sizes:
        yield sizes["MemAvailable"]


def _left_by_groups(root: Path) -> Iterator[int]:
    """What the memory limit of each control group leaves that this process is in; pages of files that the group has
    not used for long do not count, as the kernel drops them first."""
    for line in _lines(root / "proc" / "self" / "cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2
            mount, limit, usage, inactive = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):  # version 1
            mount, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            inactive = "total_inactive_file"
        else:
            continue
        top = root / mount
        here = top / group.lstrip("/")
        for folder in [here, *here.parents]:  # a limit holds for all groups within; a container may see its own only
            if folder == top.parent or not folder.is_relative_to(top):
                break
            limits, used = _number(folder / limit), _number(folder / usage)
            if limits is not None and used is not None:
                counts = dict(line.split() for line in _lines(folder / "memory.stat") if len(line.split()) == 2)
                yield limits - used + int(counts.get(inactive, 0))


def _left_by_limits(root: Path) -> Iterator[int]:
    """What `ulimit -v` and `ulimit -d` leave."""
    if resource is None:
        return
    sizes = _status(root)
    for kind, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit - sizes.get(name, 0)


def _status(root: Path = Path("/")) -> dict[str, int]:
    return _sizes(root / "proc" / "self" / "status")


def _sizes(path: Path) -> dict[str, int]:
    """{"VmRSS": bytes} of lines such as `VmRSS:    1234 kB`."""
    words = (line.split() for line in _lines(path))
    return {each[0].rstrip(":"): int(each[1]) * 1024 for each in words if len(each) == 3 and each[2] == "kB"}


def _number(path: Path) -> int | None:
    """The number in a file; None if there is none: no such file, or `max`."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
