"""Decides once for a run whether the blocks of its model are compiled (torch.compile), and compiles them.

Compiling costs about a minute when a run starts, less when the files of an earlier one are found, and makes each step
somewhat faster: worth it for long runs only. How much faster: experiments/speed/README.md.
"""

import contextlib
import logging
import math
import os
import re
import shutil
import struct
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gpt.config.schema import TrainSection
from gpt.errors import ENVIRONMENT, UserError
from gpt.files.atomic import why_refused
from gpt.files.paths import PROJECT_ROOT
from gpt.machine.machine import Machine
from gpt.model import LanguageModel
from gpt.terminal.console import escape

log = logging.getLogger(__name__)

CACHE = PROJECT_ROOT / "outputs" / "compiled"
ROOM = 2**23  # bytes that a compiled block and its gradients take there, about

LINKING = 5.0  # seconds after which no linker, of another run, still writes a library

COST = 60.0  # seconds at the start of a run
# The share of a run's time that compiling saves. In float32 nearly all of it goes into products of matrices, which
# stay what they are; it is what lies between them that gets faster.
SAVED = {torch.float32: 0.04, torch.bfloat16: 0.2, torch.float16: 0.2}
# Operations per second that a GPU, or a thread of a CPU, is taken to reach: rather too many, so that the length of a
# run is expected rather too short, and a short one is never made slower.
SPEED = {("cpu", torch.float32): 80e9, ("cpu", torch.bfloat16): 250e9, ("cuda", torch.float32): 2e13,
         ("cuda", torch.bfloat16): 3e14, ("cuda", torch.float16): 3e14}  # fmt: skip


def decide(
    cfg: TrainSection, recorded: dict[str, Any], machine: Machine, operations: float, cache: Path | None = None
) -> bool:
    """Whether a run of so many `operations` (floating-point, in all) compiles.

    train.compile=auto: as `recorded`, the environment of the run that is resumed, says; in a new run, when it is so
    long that compiling saves more than twice what it costs, and goes without when it cannot. Raises UserError (5) when
    compiling is wanted and this machine lacks what it takes, or fails at it with files in `cache` (None: not tried).
    """
    wanted, lacking = cfg.compile, missing(machine.device)
    if machine.ranks.is_sharded:
        lacking = "parallel=fsdp gathers weights in the midst of what would be compiled"
    if wanted == "auto":
        if isinstance(recorded.get("compile"), bool):
            wanted = recorded["compile"] and not lacking
        else:
            wanted = not lacking and is_long(machine, operations)
    if wanted and not lacking and cache:
        lacking = why_failing(machine.device, cache)
    if wanted and lacking:
        if cfg.compile != "auto":
            raise UserError("torch.compile does not work here", lacking, "use train.compile=false", ENVIRONMENT)
        log.warning(f"train.compile=auto: goes on without, as compiling fails here: {lacking}")
        wanted = False
    if recorded.get("compile", wanted) != wanted:
        log.warning(f"train.compile was {recorded['compile']}, is now {wanted}: results will differ in the last digits")
    return wanted


def is_long(machine: Machine, operations: float) -> bool:
    """Whether compiling saves more than twice its cost; no, where that has not been measured."""
    kind = machine.device.type
    speed = SPEED.get((kind, machine.dtype), math.inf) * (torch.get_num_threads() if kind == "cpu" else 1)
    return SAVED[machine.dtype] * operations / speed > 2 * COST


def missing(device: torch.device) -> str | None:
    """What torch.compile needs on a device and does not find, None when all is there."""
    if device.type == "cuda":
        return None if find_spec("triton") else "the package triton"
    compiler = os.environ.get("CXX", "clang++" if shutil.which("clang++") and not shutil.which("g++") else "g++")
    return None if shutil.which(compiler) else f"a C++ compiler, {compiler}"


def why_failing(device: torch.device, cache: Path) -> str | None:
    """Why compiling something small fails, None where it works. A compiler may be there and not work, headers may be
    missing, and the place for its files be full or read-only. It takes 5 s, 15 s with an empty cache."""
    use(cache)
    remove_cut_off(cache)
    try:
        with tempfile.TemporaryFile(dir=made(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))) as file:
            file.write(bytes(ROOM))
    except OSError as error:  # first of all: torch makes the folder as it loads its compiler, and stays half loaded
        place = os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
        return escape(f"{why_refused(error)}: {place}")
    x = torch.ones(64, 33, device=device, requires_grad=True)
    try:  # with a number that no earlier run has had, so that the compiler is called whatever the cache holds
        torch.compile(lambda x, number: (torch.nn.functional.gelu(x) * number).sum())(x, time.time()).backward()
    except Exception as error:  # of dynamo, of inductor, of the disk, of the compiler
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        telling = [line for line in lines if re.search(r"\berror:|No space left|Read-only|denied", line)]
        return escape(next(iter(telling or lines), type(error).__name__))[:300]
    return None


def made(folder: Path) -> Path:
    """The folder, which is there afterwards. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def use(cache: Path) -> None:
    """Keeps what is compiled in `cache` for later runs, unless TORCHINDUCTOR_CACHE_DIR names another directory."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))


def remove_cut_off(cache: Path) -> None:
    """Removes the libraries that a killed run has left cut off: torch would load them and fail."""
    for library in cache.rglob("*.so"):
        with contextlib.suppress(OSError):  # another run may have removed it, and it may be in a folder of others
            if is_cut_off(library) and time.time() - library.stat().st_mtime > LINKING:
                library.unlink()


def is_cut_off(library: Path) -> bool:
    """Whether the file is shorter than its header says, where that is one of ELF with 64 bits: the table of sections
    is the last thing that linkers write (ELF-64 Object File Format 1.5, figure 2)."""
    with open(library, "rb") as file:
        header = file.read(64)
    if not header.startswith(b"\x7fELF\x02\x01"):
        return not header  # a linker had only made the file; other systems have other formats
    if len(header) < 64:
        return True
    (start,), (size, number) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return library.stat().st_size < start + size * number


def compile_blocks(model: LanguageModel, cache: Path) -> None:
    """Compiles a block; all of them share the result, as they differ in nothing but weights. It is kept in `cache` for
    later runs, unless TORCHINDUCTOR_CACHE_DIR names another directory."""
    use(cache)
    torch.compiler.reset()  # an earlier job of a sweep may have left other shapes, which would make these dynamic
    for block in model.blocks:
        block.compile()
