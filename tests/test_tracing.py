"""The harness that kills and fails file operations is itself shown to see all of them and to hit the right one."""

import ast
import ctypes
import errno
import itertools
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from tracing import CALLS, full_disk, run_and_kill, trace

from gpt.errors import UserError

TENSORS = {"weight": torch.arange(20_000.0), "bias": torch.zeros(10)}


def every_kind_of_change() -> list[tuple[str, str, object]]:
    """Verb, path and a function that does it in the current directory, by exactly one system call each."""
    files: dict[str, int | mmap.mmap] = {}
    libc = ctypes.CDLL(None)

    def source() -> int:
        return os.open(__file__, os.O_RDONLY)

    def keep(name: str, opened: int | mmap.mmap) -> None:
        files[name] = opened

    def store_in_memory() -> None:
        keep("memory", mmap.mmap(files["a"], 8))
        files["memory"][0:4] = b"mmap"

    def splice() -> None:
        end, start = os.pipe()
        os.write(start, b"splice")
        os.splice(end, files["a"], 6, offset_dst=60)

    return [
        ("mkdir", "d", lambda: os.mkdir("d")),
        ("create", "a", lambda: keep("a", os.open("a", os.O_CREAT | os.O_RDWR))),
        ("write", "a", lambda: os.write(files["a"], b"write")),
        ("write", "a", lambda: os.pwrite(files["a"], b"pwrite64", 10)),
        ("write", "a", lambda: os.writev(files["a"], [b"wri", b"tev"])),
        ("write", "a", lambda: libc.syscall(296, files["a"], b"\0" * 16, 1, 0, 0)),  # pwritev of nothing
        ("write", "a", lambda: os.pwritev(files["a"], [b"pwr", b"itev2"], 20)),
        ("write", "a", lambda: os.sendfile(files["a"], source(), 0, 8)),
        ("write", "a", lambda: os.copy_file_range(source(), files["a"], 8, 0, 40)),
        ("write", "a", splice),
        ("allocate", "a", lambda: os.posix_fallocate(files["a"], 0, 100)),
        ("truncate", "a", lambda: os.ftruncate(files["a"], 90)),
        ("truncate", "a", lambda: os.truncate("a", 80)),
        ("mmap", "a", store_in_memory),
        ("msync", "a", lambda: files["memory"].flush()),
        ("fsync", "a", lambda: os.fsync(files["a"])),
        ("fsync", "a", lambda: os.fdatasync(files["a"])),
        ("link", "a -> d/l", lambda: os.link("a", "d/l")),
        ("symlink", "s", lambda: os.symlink("d", "s")),
        ("rename", "d/l -> r", lambda: os.rename("s/l", "r")),
        ("open", "r", lambda: os.open("r", os.O_WRONLY | os.O_TRUNC)),
        ("unlink", "r", lambda: os.unlink("r")),
        ("fsync", "d", lambda: os.fsync(keep("d", os.open("d", os.O_RDONLY)) or files["d"])),
        ("mkdir", "d/e", lambda: os.mkdir("e", dir_fd=files["d"])),
        ("create", "d/f", lambda: os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=files["d"])),
        ("link", "d/f -> d/e/l", lambda: os.link("f", "e/l", src_dir_fd=files["d"], dst_dir_fd=files["d"])),
        ("symlink", "d/e/s", lambda: os.symlink("x", "e/s", dir_fd=files["d"])),
        ("rename", "d/f -> a", lambda: os.rename("f", "a", src_dir_fd=files["d"])),
        ("unlink", "d/e/l", lambda: os.unlink("e/l", dir_fd=files["d"])),
        ("unlink", "d/e/s", lambda: os.unlink("d/e/s")),
        ("rmdir", "d/e", lambda: os.rmdir("e", dir_fd=files["d"])),
        ("rename", "d -> d2", lambda: libc.syscall(316, -100, b"d", -100, b"d2", 0)),  # renameat2
        ("rmdir", "d2", lambda: os.rmdir("d2")),
        ("create", "raw", lambda: libc.syscall(2, b"raw", os.O_CREAT | os.O_WRONLY, 0o600)),  # open
        ("open", "raw", lambda: libc.syscall(85, b"raw", 0o600)),  # creat
        ("mkdir", "raw2", lambda: libc.syscall(83, b"raw2", 0o700)),
    ]


def contents(folder: Path) -> dict[str, object]:
    """What is below a folder; the random names that safetensors gives its temporary files are made equal."""
    entries = {}
    for path in sorted(folder.rglob("*")):
        name = re.sub(r"\.tmp\w+", ".tmp", str(path.relative_to(folder)))
        entries[name] = os.readlink(path) if path.is_symlink() else path.is_dir() or path.read_bytes()
    return entries


def save_in_every_way(folder: Path) -> None:
    with open(folder / "python.txt", "w") as file:
        file.write("one")
        file.flush()
        os.fsync(file.fileno())
    torch.save(TENSORS, folder / "cpp.pt")
    with open(folder / "stream.pt", "wb") as file:
        torch.save(TENSORS, file)
    safetensors.torch.save_file(TENSORS, folder / "rust.safetensors")


def names(outcome) -> list[tuple[str, str]]:
    return [(operation.name, operation.path) for operation in outcome.operations]


def test_every_kind_of_change_is_seen_in_order_and_a_kill_leaves_exactly_what_was_done_before(tmp_path):
    def change_everything(folder):
        os.chdir(folder)
        states = [contents(folder)]
        for _, _, change in every_kind_of_change():
            change()
            states.append(contents(folder))
        print(states)  # what every change leaves, as the child itself sees it

    (tmp_path / "undisturbed").mkdir()
    undisturbed = trace(lambda: change_everything(tmp_path / "undisturbed"), tmp_path / "undisturbed")
    assert undisturbed.code == 0, undisturbed.output
    expected = [(name, path) for name, path, _ in every_kind_of_change()]
    assert names(undisturbed) == expected
    assert {name for name, _ in expected} == {"create", *(name for name, _ in CALLS.values())}
    states = ast.literal_eval(undisturbed.output)
    assert sum(one != two for one, two in itertools.pairwise(states)) >= 25  # the others only synchronise

    for n in range(1, len(expected) + 1):
        folder = tmp_path / str(n)
        folder.mkdir()
        outcome = trace(
            lambda folder=folder: change_everything(folder),
            folder,
            lambda operation, n=n: "kill" if operation.number == n else None,
        )
        assert (outcome.code, names(outcome)) == (-9, expected[:n]), outcome.output
        assert contents(folder) == states[n - 1], f"killed before {outcome.operations[-1]}"


def test_writes_from_python_cpp_and_rust_are_seen_and_a_kill_before_any_of_them_stops_it(tmp_path):
    states = []
    whole = trace(lambda: save_in_every_way(tmp_path), tmp_path, lambda _: states.append(contents(tmp_path)))
    assert whole.code == 0, whole.output
    seen = names(whole)
    for file in ("python.txt", "cpp.pt", "stream.pt"):
        assert [name for name, path in seen if path == file][:2] == ["create", "write"]
    assert ("fsync", "python.txt") in seen and seen[-1][1].endswith("rust.safetensors")
    assert seen.index(("create", "python.txt")) < seen.index(("create", "cpp.pt")) < seen.index(("create", "stream.pt"))
    assert any(0 < len(state["cpp.pt"]) < len(contents(tmp_path)["cpp.pt"]) for state in states if "cpp.pt" in state)

    for n in range(1, len(seen) + 1):
        for path in tmp_path.iterdir():
            path.unlink()
        outcome = trace(
            lambda: save_in_every_way(tmp_path),
            tmp_path,
            lambda operation, n=n: "kill" if operation.number == n else None,
        )
        assert (outcome.code, len(outcome.operations)) == (-9, n)
        assert contents(tmp_path) == states[n - 1]


def test_an_injected_error_reaches_python_cpp_and_rust_whatever_the_operation(tmp_path):
    def save():
        try:
            save_in_every_way(tmp_path)
        except (OSError, RuntimeError, SafetensorError) as error:
            print(type(error).__name__)
            raise SystemExit(5) from error

    count = len(trace(save, tmp_path).operations)
    raised = set()
    for n in range(1, count + 1):
        for path in tmp_path.iterdir():
            path.unlink()
        outcome = trace(save, tmp_path, lambda operation, n=n: errno.ENOSPC if operation.number == n else None)
        assert outcome.code == 5, (n, outcome)
        raised.add(outcome.output.strip())
    assert raised == {"OSError", "RuntimeError", "SafetensorError"}


def test_an_operation_that_is_made_to_fail_is_not_executed_and_the_child_goes_on(tmp_path):
    def work():
        try:
            os.mkdir(tmp_path / "refused")
        except OSError as error:
            (tmp_path / "reason").write_text(errno.errorcode[error.errno])

    outcome = trace(work, tmp_path, lambda operation: errno.EDQUOT if operation.name == "mkdir" else None)
    assert contents(tmp_path) == {"reason": b"EDQUOT"} and outcome.code == 0
    assert names(outcome) == [("mkdir", "refused"), ("create", "reason"), ("write", "reason")]


def test_on_a_full_disk_what_needs_space_fails_from_then_on_and_the_rest_works(tmp_path):
    (tmp_path / "old").write_text("x")
    (tmp_path / "old2").write_text("x")
    results = []

    def work():
        file = os.open(tmp_path / "new", os.O_CREAT | os.O_WRONLY)
        for attempt in (
            lambda: os.write(file, b"y"),
            lambda: os.pwrite(file, b"y", 0),
            lambda: os.mkdir(tmp_path / "d"),
            lambda: os.open(tmp_path / "new2", os.O_CREAT | os.O_WRONLY),
            lambda: os.fsync(file),
            lambda: os.open(tmp_path / "old", os.O_CREAT | os.O_WRONLY),
            lambda: os.rename(tmp_path / "old", tmp_path / "older"),
            lambda: os.unlink(tmp_path / "old2"),
        ):
            try:
                attempt()
                results.append("ok")
            except OSError as error:
                results.append(errno.errorcode[error.errno])
        print(*results)

    assert trace(work, tmp_path, full_disk(2)).output.split() == ["ENOSPC"] * 5 + ["ok"] * 3
    assert contents(tmp_path) == {"new": b"", "older": b"x"}


def test_threads_and_processes_are_followed_and_what_changes_nothing_below_the_directory_is_not_counted(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (inside / "read").write_bytes(bytes(5000))
    (outside / "link").symlink_to(inside / "target")

    def work():
        (inside / "read").read_bytes()
        np.memmap(inside / "read", mode="r").sum()
        (outside / "file").write_text("x")
        (tmp_path / "inside2").write_text("the name only begins alike")
        print("some output", flush=True)
        thread = threading.Thread(target=lambda: (inside / "thread").write_text("x"))
        thread.start()
        thread.join()
        subprocess.run(["sh", "-c", "echo x > process"], cwd=inside, start_new_session=True, check=True)
        os.rename(outside / "file", inside / "moved")
        (outside / "link").write_text("x")

    assert names(trace(work, inside)) == [
        ("create", "thread"), ("write", "thread"), ("create", "process"), ("write", "process"),
        ("rename", f"{outside}/file -> moved"), ("create", "target"), ("write", "target"),
    ]  # fmt: skip


def test_calls_that_could_change_files_unseen_are_refused(tmp_path):
    def work():
        libc = ctypes.CDLL(None, use_errno=True)
        for number in (437, 425):  # openat2, io_uring_setup
            assert libc.syscall(number, 0, 0, 0, 0) == -1
            print(errno.errorcode[ctypes.get_errno()])

    assert trace(work, tmp_path).output.split() == ["ENOSYS", "ENOSYS"]


def test_a_thread_is_killed_with_the_child_before_it_can_write_on(tmp_path):
    def work():
        thread = threading.Thread(target=lambda: [(tmp_path / str(i)).touch() for i in range(100)])
        thread.start()
        thread.join()

    assert trace(work, tmp_path, lambda operation: "kill" if operation.number == 51 else None).code == -9
    assert len(contents(tmp_path)) == 50


def test_processes_of_a_killed_child_stand_still_and_die_with_it(tmp_path):
    def work():
        touch = "for i in $(seq 200); do : > $0$i; done"
        processes = [subprocess.Popen(["sh", "-c", touch, name], cwd=tmp_path) for name in "ab"]
        for process in processes:
            process.wait()

    outcome = trace(work, tmp_path, lambda operation: "kill" if operation.number == 100 else None)
    assert outcome.code == -9 and len(outcome.operations) == 100
    assert len(contents(tmp_path)) in (98, 99)  # one process is stopped at its next file, the other may be at one, too
    time.sleep(0.05)
    assert len(contents(tmp_path)) in (98, 99)


def test_a_termination_signal_arrives_at_the_operation_and_lets_it_happen(tmp_path):
    def work():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        for i in range(100):
            (tmp_path / str(i)).touch()

    outcome = trace(work, tmp_path, lambda operation: "terminate" if operation.number == 3 else None)
    assert outcome.code == 143 and sorted(contents(tmp_path)) == ["0", "1", "2"]


def ends_with_an_error():
    raise UserError("disk full", "here", "make room", code=5)


@pytest.mark.parametrize(
    ("function", "code", "output"),
    [
        (lambda: print("hällo"), 0, "hällo\n"),
        (lambda: os.system("echo from a process"), 0, "from a process\n"),
        (lambda: sys.exit(), 0, ""),
        (lambda: sys.exit(3), 3, ""),
        (ends_with_an_error, 5, "error: disk full (here); make room\n"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), -15, ""),
    ],
)
def test_exit_code_and_output_of_the_child_come_back(tmp_path, function, code, output):
    outcome = trace(function, tmp_path)
    assert (outcome.code, outcome.output) == (code, output)


def test_an_exception_in_the_child_comes_back_as_its_traceback(tmp_path):
    outcome = trace(lambda: {}["missing"], tmp_path)
    assert outcome.code == 1 and outcome.output.endswith("KeyError: 'missing'\n") and "Traceback" in outcome.output


def test_a_child_that_hangs_is_killed_and_reported_with_its_output(tmp_path):
    def hang():
        print(os.getpid(), flush=True)
        time.sleep(60)

    with pytest.raises(TimeoutError, match=r"did not end within 0.2 s; its output: \d+") as error:
        trace(hang, tmp_path, timeout=0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(int(str(error.value).split()[-1]), 0)


def test_an_error_in_the_decision_ends_the_child_and_reaches_the_test(tmp_path):
    def work():
        (tmp_path / "process").write_text(str(os.getpid()))
        os.unlink(tmp_path / "process")

    def decide(operation):
        assert operation.name != "unlink", f"unexpected {operation.name}"

    with pytest.raises(AssertionError, match="unexpected unlink"):
        trace(work, tmp_path, decide)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "process").read_text()), 0)


def test_another_child_of_the_tests_that_ends_meanwhile_keeps_its_exit_code(tmp_path):
    with subprocess.Popen(["sh", "-c", "exit 7"]) as other:
        trace(lambda: time.sleep(0.1), tmp_path)
        assert other.wait() == 7


def test_where_ptrace_is_not_permitted_the_message_says_so(tmp_path):
    # A process that is traced already cannot be traced again: the kernel refuses as it does in a closed container.
    outcome = trace(lambda: trace(lambda: None, tmp_path), tmp_path)
    assert outcome.code == 1
    assert "RuntimeError: ptrace is not permitted here (Operation not permitted)" in outcome.output


def test_a_kill_after_some_time_says_whether_the_child_was_still_running(tmp_path):
    def touch_and(then):
        (tmp_path / "started").touch()
        then()

    assert run_and_kill(lambda: touch_and(lambda: time.sleep(60)), 0.1) is True
    assert (tmp_path / "started").exists()
    started = time.monotonic()
    assert run_and_kill(lambda: None, 30) is False
    assert time.monotonic() - started < 10  # it does not wait for a child that has ended
    with pytest.raises(RuntimeError, match="ended with 5 before it was killed: error: disk full"):
        run_and_kill(ends_with_an_error, 30)
