"""Where a run computes, and in which precision."""

import ctypes
import os
import sys

import torch

from gpt.errors import ENVIRONMENT, UserError


def choose_device(name: str) -> torch.device:
    """ "auto" is cuda, else mps, else cpu. Raises UserError for a device that this machine does not have."""
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
    """The type that matrix products are computed in under autocast; float32 means no autocast.

    "auto" is bfloat16 where the processor multiplies in it: GPUs from Ampere on, CPUs with AVX512-BF16 or AMX. Other
    CPUs emulate it, hundreds of times slower than float32. Raises UserError for a type that cannot be used.
    """
    if device.type == "cuda":
        native_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native_bfloat16 = device.type == "cpu" and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
    if name == "auto":
        return torch.bfloat16 if native_bfloat16 else torch.float32
    if name == "float16":
        raise UserError(
            "train.dtype=float16 is not supported", "its gradients need loss scaling",
            "use train.dtype=bfloat16 or float32", ENVIRONMENT,
        )  # fmt: skip
    if name == "bfloat16" and device.type == "cuda" and not native_bfloat16:
        raise UserError(
            "train.dtype=bfloat16 is not supported", torch.cuda.get_device_name(device), "use train.dtype=float32",
            ENVIRONMENT,
        )  # fmt: skip
    return getattr(torch, name)


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


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """One phrase for the log: device, precision, threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{device} ({name}), {str(dtype).removeprefix('torch.')}"
