"""A loopback W&B server for tests: as much of its protocol as `wandb.init`, logging, finish and `wandb sync` need.

It can fail in the ways in which a real one is away: answers of 500, silence, no listener. Like the real one it keeps
the history of a run by `_step`: a line that comes again replaces the one before (wandb/wandb#12668), and it also keeps
every line as it came. `Children` are processes that talk to it and can be killed.
"""

import atexit
import base64
import contextlib
import functools
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEY = "5ec2e7" * 6 + "abcd"  # 40 characters, like a real one
STREAM_FILES = {"wandb-history.jsonl": "lines", "wandb-events.jsonl": "events"}
_COMMAND = """
import shlex, sys
from wandb.cli.cli import cli
sys.argv = shlex.split(arguments[0])
cli()
"""


@dataclass
class Run:
    """What the server knows of one run."""

    lines: list[str] = field(default_factory=list)  # history as it came, a JSON object each
    events: list[str] = field(default_factory=list)  # system metrics
    summary: str = "{}"
    config: str = "{}"
    exit_code: int | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The history as the dashboard shows it: one row for each `_step`, without the columns that W&B adds."""
        by_step = {row["_step"]: row for row in map(json.loads, self.lines)}
        return [{k: v for k, v in by_step[step].items() if k[0] != "_"} for step in sorted(by_step)]


class Server:
    """Runs in threads of the test's process. Used as a context manager."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.received: list[tuple[str, str, bytes]] = []  # request line, headers but Authorization, body
        self.keys: set[str] = set()  # that clients have shown
        self.stopped = False  # somebody has pressed "Stop run"
        self.broken: str | None = None  # "error": every answer is 500; "deny": to data it is 403; "hang": none comes
        self.hang_at_finish = False
        self._gone = threading.Event()  # set when the server ends, so that no hanging thread is left
        self._lock = threading.Lock()
        self._http: ThreadingHTTPServer | None = None
        self.port = 0
        self.appear()

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.port}", "WANDB_MODE": "online", "WANDB_API_KEY": KEY}

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.disappear()

    def appear(self) -> None:
        """Listens, after `disappear` on the same port as before."""
        self._gone.clear()
        self._http = _Listener(("127.0.0.1", self.port), _handler(self))
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def disappear(self) -> None:
        """Connections are cut and new ones refused."""
        if self._http is not None:
            self._gone.set()
            self._http.shutdown()
            self._http.server_close()
            self._http.cut()
            self._http = None

    def answer(self, path: str, body: bytes) -> Any:
        with self._lock:
            if path == "/graphql":
                query = json.loads(body)
                return {"data": self._graphql(query["operationName"], query.get("variables") or {})}
            if path.endswith("/file_stream"):
                return self._file_stream(path.split("/")[-2], json.loads(body))
            return {}

    def _file_stream(self, run_id: str, message: dict[str, Any]) -> Any:
        run = self.runs.setdefault(run_id, Run())
        for name, chunk in (message.get("files") or {}).items():
            if name in STREAM_FILES:
                lines = getattr(run, STREAM_FILES[name])
                # A chunk that is sent again, because its answer was lost, has the same offset as before.
                lines[chunk["offset"] : chunk["offset"] + len(chunk["content"])] = chunk["content"]
            elif name == "wandb-summary.json":
                run.summary = chunk["content"][-1]
        if message.get("complete"):
            run.exit_code = message["exitcode"]
        return {"exitcode": None, "limits": {}, "stopped": self.stopped}

    def _graphql(self, name: str, values: dict[str, Any]) -> Any:
        if name == "UpsertBucket":
            inserted = values["name"] not in self.runs
            run = self.runs.setdefault(values["name"], Run())
            run.config = values.get("config") or run.config
            project = {"id": "p", "name": values.get("project") or "test", "entity": {"id": "e", "name": "entity"}}
            bucket = {"id": "b", "name": values["name"], "displayName": values["name"], "config": run.config}
            bucket |= {"project": project, "historyLineCount": len(run.lines)}
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if name == "RunResumeStatus":
            run = self.runs.get(values["name"])
            return {"model": {"id": "p", "name": "test", "entity": None, "bucket": run and _resume_status(values, run)}}
        if name == "Viewer":
            return {
                "viewer": {"id": "v", "entity": "entity", "username": "user", "flags": "{}", "teams": {"edges": []}}
            }
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": self._upload(file)} for file in values["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if name == "CreateArtifact":  # of a table: committed already, so that it is not uploaded a second time
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        return {"project": None}  # what artifacts there are

    def _upload(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/storage/{name}"


def _resume_status(values: dict[str, Any], run: Run) -> dict[str, Any]:
    return {
        "id": "b", "name": values["name"], "displayName": values["name"], "tags": [], "notes": None,
        "config": run.config, "summaryMetrics": run.summary, "wandbConfig": '{"t": 1}', "logLineCount": 0,
        "historyLineCount": len(run.lines), "historyTail": json.dumps(run.lines[-1:]),
        "eventsLineCount": len(run.events), "eventsTail": json.dumps(run.events[-1:]),
    }  # fmt: skip


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, *arguments: Any) -> None:
        self._open: set[Any] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def cut(self) -> None:
        for request in list(self._open):
            with contextlib.suppress(OSError):
                request.shutdown(2)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            scheme, _, secret = self.headers.get("Authorization", "").partition(" ")
            if scheme == "Basic":
                server.keys.add(base64.b64decode(secret).decode().removeprefix("api:"))
            del self.headers["Authorization"]
            server.received.append((f"{self.command} {self.path}", str(self.headers), body))
            is_data = self.path.endswith("/file_stream")
            finishing = is_data and b'"complete":true' in body
            if server.broken == "hang" or (server.hang_at_finish and finishing):
                server._gone.wait()
                self.close_connection = True
                return
            status = {"error": 500, "deny": 403 if is_data else 200}.get(server.broken, 200)
            data = json.dumps(server.answer(self.path, body) if status == 200 else {}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = respond

    return Handler


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


class Child:
    """A process that `Children.start` has started."""

    def __init__(self, parent: "Children", pid: int, folder: Path) -> None:
        self.pid, self._parent, self._folder = pid, parent, folder

    @property
    def stdout(self) -> str:
        return (self._folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self._folder / "stderr").read_text()

    @property
    def code(self) -> int | None:
        """The exit code; minus its number after a signal, None while the child runs."""
        return self._parent._poll(self.pid)

    def wait_for(self, line: str) -> None:
        """Until the child has printed `line`."""
        wait_for(lambda: line in self.stdout.splitlines() or self.code is not None, f"no {line!r}")
        assert line in self.stdout.splitlines(), self.stdout + self.stderr

    def go_on(self) -> None:
        """What the child waits for in `pause()`."""
        (self._folder / "go").touch()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def wait(self, seconds: float = 120) -> int:
        """Until the child has ended. Returns `code`."""
        wait_for(lambda: self.code is not None, "the child does not end", seconds)
        return self.code


class Children:
    """Forks processes from one that has imported all that takes long: a second less for each.

    The code of a child sees its `arguments`, and `pause(line)`, which prints the line and waits until the test calls
    `go_on`.
    """

    def __init__(self, modules: str) -> None:
        command = [sys.executable, __file__, modules]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        self._folder = tempfile.TemporaryDirectory()
        self._started = 0
        self._codes: dict[int, int] = {}

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(10)
        self._folder.cleanup()

    def start(self, code: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> Child:
        folder = Path(self._folder.name) / str(self._started)
        folder.mkdir()
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        self._started += 1
        pid = self._ask({"code": code, "arguments": arguments, "cwd": str(cwd), "folder": str(folder),
                         "environment": environment})  # fmt: skip
        return Child(self, pid, folder)

    def _poll(self, pid: int) -> int | None:
        if pid not in self._codes and (code := self._ask({"poll": pid})) is not None:
            self._codes[pid] = code
        return self._codes.get(pid)

    def _ask(self, request: dict[str, Any]) -> Any:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@functools.cache
def children() -> Children:
    """The one parent of all processes that record runs and run W&B's commands; it ends with the tests' process."""
    slow = (
        "wandb.cli.cli wandb.sdk.launch.inputs.internal pandas"  # what W&B imports when a run begins, and its command
    )
    return Children(f"{slow} gpt.runs.run_log gpt.terminal.console test_run_log")


def command(line: str, **environment: str) -> str:
    """What a command of W&B prints to stdout, `wandb sync ...` for one."""
    child = children().start(_COMMAND, line, **environment)
    assert child.wait() == 0, child.stderr
    return child.stdout


def _become_child(request: dict[str, Any]) -> None:
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    folder = Path(request["folder"])
    for number, name in ((0, os.devnull), (1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_RDWR | os.O_CREAT), number)
    if media := sys.modules.get("wandb.sdk.data_types._private"):  # or the first child that ends removes it for all
        media.MEDIA_TMP._finalizer.detach()
        media.MEDIA_TMP.name = tempfile.mkdtemp(dir=folder)
    names = {"__name__": "__main__", "arguments": request["arguments"]}
    names["pause"] = lambda line: (print(line, flush=True), wait_for((folder / "go").exists, "nobody says go on"))
    code = 0
    try:
        exec(compile(request["code"], "<child>", "exec"), names)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # else the interpreter takes apart all modules of the parent, page by page: a second


def _serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            _become_child(request)


if __name__ == "__main__":
    sys.path[:0] = map(str, [ROOT, ROOT / "tests", ROOT / "tests" / "runs"])
    for module in sys.argv[1].split():
        __import__(module)
    _serve()
    atexit._run_exitfuncs()
    os._exit(0)  # as its children, for the same reason
