"""Chooses device and precision of a run, and says how exactly it can be repeated there."""

import ctypes
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch

from gpt.config.schema import TrainSection
from gpt.errors import ENVIRONMENT, UserError
from gpt.machine import free_memory, rank_environment
from gpt.machine.rank_environment import RankEnvironment
from gpt.terminal.console import count

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO_DTYPE = "GPT_LAB_AUTO_DTYPE"  # the environment variable that says what train.dtype=auto means
PRODUCTS = 5  # of each type that are timed, a few milliseconds together


def choose_device(name: str, threads: int | None = None) -> torch.device:
    """ "auto" is cuda, else mps, else cpu; torch then computes with so many `threads` on the CPU, None: as many as it
    does. Raises UserError for a device that this machine does not have."""
    if threads is not None:
        torch.set_num_threads(threads)
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + available
    if name == "auto":
        return torch.device(available[0])
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in available:
        here = f"this machine has {', '.join(available)}"
        raise UserError(f"device={name} is not available", here, "use device=auto", ENVIRONMENT)
    return torch.device(wanted)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that matrix products are computed in under autocast; float32 means no autocast. "tf32" is float32 whose
    products are rounded to 10 bits on the way in (GPUs from Ampere on), see `choose`.

    "auto" is bfloat16 where the processor multiplies faster in it: GPUs from Ampere on, and CPUs by measurement. The
    environment variable GPT_LAB_AUTO_DTYPE decides it otherwise, so that different machines of a cluster compute alike.
    Raises UserError for a type that cannot be used.
    """
    native_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = os.environ.get(AUTO_DTYPE)
        if name is None:
            is_faster = native_bfloat16 or (device.type == "cpu" and bfloat16_is_faster())
            name = "bfloat16" if is_faster else "float32"
        if name not in DTYPES:
            raise UserError(f"{AUTO_DTYPE}={name}", remedy=f"set it to one of {', '.join(DTYPES)}, or unset it")
    if name == "tf32":
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
            where = f"{device} has no TF32 products"
            raise UserError("train.dtype=tf32 is not supported", where, "use train.dtype=float32", ENVIRONMENT)
        return torch.float32
    if name == "bfloat16" and device.type == "cuda" and not native_bfloat16:
        raise UserError(
            "train.dtype=bfloat16 is not supported", torch.cuda.get_device_name(device), "use train.dtype=float32",
            ENVIRONMENT,
        )  # fmt: skip
    return DTYPES[name]


@cache
def bfloat16_is_faster() -> bool:
    """Whether the CPU multiplies faster in bfloat16 than in float32: the shortest of a few products of each, in turns.

    The processor's flags do not say it. With AMX, and with AVX512-BF16 on AMD's processors, it is several times as
    fast; on Intel's with AVX512-BF16 alone, as in virtual machines without AMX, half as fast; and processors without
    either emulate it, hundreds of times slower.
    """
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return False
    taken: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(PRODUCTS):
        for dtype, seconds in taken.items():
            matrix = torch.ones(512, 512, dtype=dtype)
            start = time.perf_counter()
            matrix @ matrix
            seconds.append(time.perf_counter() - start)
    return min(taken[torch.bfloat16]) < min(taken[torch.float32])


def choose(
    name: str, cfg: TrainSection, recorded: dict[str, Any], n_threads: int | None = None
) -> tuple[torch.device, torch.dtype, dict[str, Any]]:
    """Device, precision and the whole environment of a run.

    `recorded` is the environment of the run that is resumed, or empty: what "auto" was taken to mean then, and the
    number of threads, which decides in what order sums are made, are taken from it; what cannot be repeated is said.
    `n_threads`, if it is given, goes before it.
    Raises UserError as `choose_device` and `choose_dtype` do.
    """
    keep_memory()
    place = rank_environment.read()
    device = of_rank(recorded_or(name, recorded.get("device"), choose_device), place)
    precision = recorded_or(cfg.dtype, recorded.get("dtype"), lambda d: choose_dtype(d, device))
    dtype = choose_dtype(precision, device)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    before = recorded.get("threads") if recorded.get("world_size", 1) == place.count else None
    threads = n_threads or before or rank_environment.cores_for_each()
    if device.type == "cpu" and isinstance(threads, int) and 0 < threads <= 1024:
        torch.set_num_threads(threads)
    now = environment(device, "tf32" if precision == "tf32" else str(dtype).removeprefix("torch."), place.count)
    changed = [f"{key} {recorded[key]} != {now[key]}" for key in now if recorded.get(key, now[key]) != now[key]]
    if changed:
        log.warning(f"not as before: {', '.join(changed)}; the run goes on, though not bit for bit as it would have")
    return device, dtype, now


def of_rank(name: str, place: RankEnvironment) -> torch.device:
    """As `choose_device`; of several ranks on a machine each has a GPU of its own."""
    if place.count == 1:
        return choose_device(name)
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={name} cannot be that of {place.count} ranks", remedy="use device=auto, cuda or cpu")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = choose_device(f"cuda:{place.local_rank}")
    torch.cuda.set_device(device)  # where NCCL looks for it
    return device


def recorded_or(name: str, recorded: Any, choose: Callable[[str], Any]) -> str:
    """`name`; if that is "auto", what was recorded, unless `choose` refuses it."""
    if name != "auto" or not isinstance(recorded, str):
        return name
    try:
        choose(recorded)
    except (UserError, KeyError):
        return name
    return recorded


def environment(device: torch.device, precision: str, world_size: int = 1) -> dict[str, Any]:
    """What results depend on, to the last bit, besides the settings; `world_size` counts the ranks."""
    on_gpu = device.type == "cuda"
    return {
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "dtype": precision,
        "threads": torch.get_num_threads(),
        "world_size": world_size,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


@contextmanager
def memory_errors(
    where: str = "checkpoints are intact",
    remedy: str = "lower train.micro_batch, model.context_length or the model's size",
) -> Iterator[None]:
    """Running out of memory becomes a UserError (5) that names the settings to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text):
            raise
        raise UserError(
            f"out of memory: {' '.join(text.split())[:150]}", where, remedy, ENVIRONMENT,
        ) from error  # fmt: skip


def keep_memory() -> bool:
    """Makes glibc keep freed memory for the next step; returns whether it does.

    By default it gives every large block back to the kernel, which clears it page by page when the next step asks for
    it again: a third of a step's time on a CPU, see experiments/speed/README.md. Setting any MALLOC_ variable of
    glibc's (such as MALLOC_TRIM_THRESHOLD_=131072, its default) leaves the allocator alone.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library, such as musl
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD in malloc.h
    return bool(mallopt(mmap_threshold, 2**30) and mallopt(trim_threshold, 2**31 - 1))


def memory_gb(device: torch.device) -> float:
    """The most memory in use so far, in 10^9 bytes: of the GPU, or resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return free_memory.peak() / 1e9


def describe(device: torch.device, environment: dict[str, Any]) -> str:
    """One phrase for the log: device, threads, precision, and whether the model is compiled."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else count(torch.get_num_threads(), "thread")
    ranks = f"{environment['world_size']} ranks with " if environment.get("world_size", 1) > 1 else ""
    return f"{ranks}{device} ({name}), {environment['dtype']}{', compiled' if environment.get('compile') else ''}"
