"""Runs a function in a forked child and stops it at every system call that changes files below a directory.

A checkpoint is written by Python, C++ (torch.save) and Rust (safetensors), so that only the kernel sees all of it. A
seccomp filter stops the child at the few calls that matter, ptrace reports them here, and a test decides: go on, fail
with an errno without being executed, or die by a signal. Everything else runs at full speed. See seccomp(2), ptrace(2).
"""

import ctypes
import errno
import gc
import mmap
import os
import platform
import select
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NoReturn

from gpt.errors import UserError


@dataclass(frozen=True)
class Operation:
    """The n-th change, from 1; `path` is relative to the directory, for rename and link `old -> new`.

    Calls that are counted: CALLS. Not counted: changes of modes and times, and stores into mapped memory.
    """

    number: int
    name: str  # a verb: pwrite64, writev, sendfile ... are all "write"; an open of a file that is not there is "create"
    path: str


@dataclass(frozen=True)
class Outcome:
    """How the child ended: exit code, or -9 for a signal 9; the last operation of a killed child was not executed."""

    code: int
    operations: list[Operation]
    output: str  # stdout and stderr, with the traceback where there was one


Decide = Callable[[Operation], int | Literal["kill", "terminate"] | None]

SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM}
NEEDS_SPACE = {"create", "write", "allocate", "mkdir", "link", "symlink", "fsync"}

# System calls of x86_64 by number: what they do, and the arguments that name files, each as (descriptor, path):
# (0, None) the open file in argument 0, (None, 0) a path, (0, 1) a path relative to the directory in argument 0.
CALLS: dict[int, tuple[str, list[tuple[int | None, int | None]]]] = {
    2: ("open", [(None, 0)]),
    257: ("open", [(0, 1)]),  # openat
    85: ("open", [(None, 0)]),  # creat
    1: ("write", [(0, None)]),
    18: ("write", [(0, None)]),  # pwrite64
    20: ("write", [(0, None)]),  # writev
    296: ("write", [(0, None)]),  # pwritev
    328: ("write", [(0, None)]),  # pwritev2
    40: ("write", [(0, None)]),  # sendfile
    326: ("write", [(2, None)]),  # copy_file_range
    275: ("write", [(2, None)]),  # splice
    9: ("mmap", [(4, None)]),
    26: ("msync", []),  # names an address
    76: ("truncate", [(None, 0)]),
    77: ("truncate", [(0, None)]),  # ftruncate
    285: ("allocate", [(0, None)]),  # fallocate
    74: ("fsync", [(0, None)]),
    75: ("fsync", [(0, None)]),  # fdatasync
    82: ("rename", [(None, 0), (None, 1)]),
    264: ("rename", [(0, 1), (2, 3)]),  # renameat
    316: ("rename", [(0, 1), (2, 3)]),  # renameat2
    86: ("link", [(None, 0), (None, 1)]),
    265: ("link", [(0, 1), (2, 3)]),  # linkat
    88: ("symlink", [(None, 1)]),
    266: ("symlink", [(1, 2)]),  # symlinkat
    87: ("unlink", [(None, 0)]),
    263: ("unlink", [(0, 1)]),  # unlinkat
    83: ("mkdir", [(None, 0)]),
    258: ("mkdir", [(0, 1)]),  # mkdirat
    84: ("rmdir", [(None, 0)]),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
ONLY_IF = {  # (argument, bits): most calls of these change no file, and stopping at them would be slow
    2: [(1, WRITING)],
    257: [(2, WRITING)],
    9: [(2, mmap.PROT_WRITE), (3, mmap.MAP_SHARED)],
}
REFUSED = (437, 425)  # openat2, io_uring_setup: "not implemented", and the program falls back to calls seen here
AT_FDCWD, AT_REMOVEDIR = 2**32 - 100, 0x200

PTRACE_POKEUSER, PTRACE_CONT, PTRACE_SEIZE, PTRACE_GET_SYSCALL_INFO = 6, 7, 0x4206, 0x420E
EVENT_SECCOMP = 7
# Follow fork, vfork and clone; stop at what the filter names; kill what is left when the tracing thread ends.
OPTIONS = 1 << 1 | 1 << 2 | 1 << 3 | 1 << EVENT_SECCOMP | 1 << 20
WAIT_FOR_TRACED = 0x40000000 | 0x20000000  # __WALL | __WNOTHREAD: threads too, but no child of another thread
RAX, ORIG_RAX = 10 * 8, 15 * 8  # offsets in struct user

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long


def trace(
    function: Callable[[], object], directory: Path, decide: Decide = lambda operation: None, timeout: float = 60
) -> Outcome:
    """Runs `function` in a child, calls `decide` before each operation below `directory`, while the child stands still.

    None goes on, an errno makes the operation fail, "kill" kills the child before it, "terminate" sends SIGTERM and
    goes on. Processes that the child leaves running are killed. Raises TimeoutError when the child hangs.
    """
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise RuntimeError("tests/tracing.py knows the system calls of Linux on x86_64 only")
    ready, go = os.pipe()

    def traced() -> None:
        os.close(go)
        if os.read(ready, 1):  # empty: the tracer is gone
            install_filter()
            function()

    with tempfile.TemporaryFile() as output:
        child = fork(traced, output)
        os.close(ready)
        try:
            # waitpid in a thread of its own waits for what that thread traces, and for no other child of the tests.
            with ThreadPoolExecutor(1) as tracer:
                future = tracer.submit(follow, child, os.path.realpath(directory), decide, go)
                try:
                    code, operations = future.result(timeout)
                except BaseException:  # the time is up, the tracer failed, Ctrl-C
                    os.kill(child, signal.SIGKILL)
                    raise
        except TimeoutError as error:
            raise TimeoutError(f"the child did not end within {timeout} s; its output: {text_of(output)}") from error
        finally:
            os.close(go)
            with suppress(ChildProcessError):  # the tracer has seen it end
                os.waitpid(child, 0)
        return Outcome(code, operations, text_of(output))


def full_disk(first: int) -> Decide:
    """From operation number `first` on, whatever needs space fails; unlink, rmdir, rename and the like still work."""
    return lambda operation: errno.ENOSPC if operation.number >= first and operation.name in NEEDS_SPACE else None


def run_and_kill(function: Callable[[], object], after_seconds: float) -> bool:
    """Runs `function` in a child, kills it after so many seconds, and returns whether it was still running.

    Raises RuntimeError with its output when the child ended before, but not well. Processes of the child live on.
    """
    with tempfile.TemporaryFile() as output:
        child = fork(function, output)
        ended = os.pidfd_open(child)
        try:
            select.select([ended], [], [], after_seconds)
        finally:
            os.close(ended)
            os.kill(child, signal.SIGKILL)  # a child that has ended is still there to be waited for
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the child ended with {code} before it was killed: {text_of(output)}")
        return code == -signal.SIGKILL


def fork(function: Callable[[], object], output: IO[bytes]) -> int:
    """The id of a child that runs `function`, with its stdout and stderr in `output`, and then ends at once."""
    gc.freeze()  # the child's garbage collections leave the parent's objects alone, and so do not copy their pages
    pid = os.fork()
    if pid:
        gc.unfreeze()
    return pid if pid else run_and_exit(function, output)


def run_and_exit(function: Callable[[], object], output: IO[bytes]) -> NoReturn:
    """What a child does, with its stdout and stderr in `output`."""

    def with_output() -> None:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
        function()

    end_with(with_output)


def end_with(function: Callable[[], object]) -> NoReturn:
    """Runs `function` and ends the process with its exit code: nothing of pytest, neither its captured streams nor its
    exit handlers, has a part in it."""
    code = 1
    try:
        function()
        code = 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.code
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
        finally:  # a child that went on here would run the rest of the tests
            os._exit(code)


def text_of(output: IO[bytes]) -> str:
    output.seek(0)
    return output.read().decode(errors="replace")


def install_filter() -> None:
    """Tells the kernel to stop this process, and those it starts, at the calls of CALLS. Raises OSError."""
    load, jump_if_equal, jump_if_set, leave = 0x20, 0x15, 0x45, 0x06  # opcodes of classic BPF
    allow, stop, refuse = 0x7FFF0000, 0x7FF00000, 0x00050000 | errno.ENOSYS
    # struct seccomp_data: the number at 0, the architecture at 4, the arguments from 16 on, 8 bytes each
    program = [(load, 0, 0, 4), (jump_if_equal, 1, 0, 0xC000003E), (leave, 0, 0, allow), (load, 0, 0, 0)]
    for number in REFUSED:
        program += [(jump_if_equal, 0, 1, number), (leave, 0, 0, refuse)]
    for number in CALLS:
        conditions = []
        for argument, bits in reversed(ONLY_IF.get(number, [])):
            conditions = [(load, 0, 0, 16 + 8 * argument), (jump_if_set, 0, len(conditions) + 1, bits), *conditions]
        body = [*conditions, (leave, 0, 0, stop), (leave, 0, 0, allow)]
        program += [(jump_if_equal, 0, len(body), number), *body]
    program.append((leave, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    arguments = [(no_new_privileges, 1, 0), (set_seccomp, filter_mode, ctypes.c_char_p(header))]
    for option, value, pointer in arguments:
        if libc.prctl(option, value, pointer, 0, 0):
            raise OSError(ctypes.get_errno(), "this kernel refuses the seccomp filter that tests/tracing.py needs")


def follow(child: int, directory: str, decide: Decide, go: int) -> tuple[int, list[Operation]]:
    """Traces the child to its end: its exit code and the operations. All of it in one thread, as ptrace demands."""
    if libc.ptrace(PTRACE_SEIZE, child, None, OPTIONS):
        reason = os.strerror(ctypes.get_errno())
        raise RuntimeError(f"ptrace is not permitted here ({reason}); a container needs --cap-add=SYS_PTRACE")
    os.write(go, b"1")
    operations: list[Operation] = []
    killed = False
    while True:
        task, status = os.waitpid(-1, WAIT_FOR_TRACED)
        if not os.WIFSTOPPED(status):
            if task == child:
                return os.waitstatus_to_exitcode(status), operations
            continue
        event = status >> 16
        change = describe(task, directory) if event == EVENT_SECCOMP and not killed else None
        if change:
            operations.append(Operation(len(operations) + 1, *change))
            answer = decide(operations[-1])
            if isinstance(answer, str):
                os.kill(child, SIGNALS[answer])
                killed = answer == "kill"
            elif answer:
                libc.ptrace(PTRACE_POKEUSER, task, ORIG_RAX, 2**64 - 1)  # no such call: the kernel does nothing
                libc.ptrace(PTRACE_POKEUSER, task, RAX, 2**64 - answer)  # and this is what it returns
        if not killed:  # otherwise everything stands still until the child has ended
            libc.ptrace(PTRACE_CONT, task, None, None if event else os.WSTOPSIG(status))


def describe(task: int, directory: str) -> tuple[str, str] | None:
    """Verb and path of the call that a thread stands at, or None if it concerns nothing below the directory."""
    info = ctypes.create_string_buffer(88)  # struct ptrace_syscall_info
    libc.ptrace(PTRACE_GET_SYSCALL_INFO, task, len(info), info)
    number, *arguments = struct.unpack_from("7Q", info, 24)
    name, files = CALLS[number]
    try:
        paths = [path_of(task, arguments, *file) for file in files]
        if name == "msync":
            paths = [mapped_at(task, arguments[0])]
    except OSError:  # a descriptor or an address that is not valid: the call will fail
        return None
    if name == "open":  # follows links
        paths = [os.path.realpath(paths[0])]
        flags = {2: arguments[1], 257: arguments[2], 85: os.O_CREAT}[number]
        name = "create" if flags & os.O_CREAT and not os.path.exists(paths[0]) else "open"
    elif number == 263 and arguments[2] & AT_REMOVEDIR:
        name = "rmdir"
    shown = [path[len(directory) + 1 :] or "." if f"{path}/".startswith(f"{directory}/") else path for path in paths]
    return (name, " -> ".join(shown)) if shown != paths else None


def path_of(task: int, arguments: list[int], descriptor: int | None, path: int | None) -> str:
    """The absolute path that arguments of a system call name. Raises OSError for what does not exist."""
    number = AT_FDCWD if descriptor is None else arguments[descriptor] % 2**32
    base = os.readlink(f"/proc/{task}/cwd" if number == AT_FDCWD else f"/proc/{task}/fd/{number}")
    if path is None:
        return base
    with open(f"/proc/{task}/mem", "rb", buffering=0) as memory:
        memory.seek(arguments[path])
        name = memory.read(4096).split(b"\0")[0]
    folder, last = os.path.split(os.path.join(base, os.fsdecode(name)).rstrip("/"))
    return os.path.join(os.path.realpath(folder), last)


def mapped_at(task: int, address: int) -> str:
    """The file that is mapped at an address, or "" for none."""
    for line in Path(f"/proc/{task}/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        start, end = (int(edge, 16) for edge in span.split("-"))
        if start <= address < end:
            return path[0] if path else ""
    return ""
