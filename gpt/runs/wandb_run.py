"""Sends the record of a run, or of a sweep, to Weights & Biases while the work goes on, and ends in bounded time.

Nothing that W&B does, or fails to do, changes or stops that work. Only this file imports wandb.
"""

import contextlib
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpt.errors import exit_code, one_line
from gpt.files.paths import PROJECT_ROOT
from gpt.runs import wandb_description, wandb_switches

log = logging.getLogger(__name__)

OUTPUTS = PROJECT_ROOT / "outputs"
INIT_TIMEOUT, FINISH_TIMEOUT = 20, 35  # seconds; the defaults are 90 and for ever
START_DELAY = 3  # seconds, or until there is something to send: importing wandb slows a short first evaluation down
HASTY_TIMEOUT = 5  # for the end of an interrupted run
SLOW_UPLOAD = 5  # seconds: an artifact is asked about on the server first, and 19 s are waited for the answer


class WandbRun:
    """The W&B run that shows the record in `directory`, of a run or of a sweep (`what`)."""

    def __init__(self, directory: Path, what: str) -> None:
        self.stop_requested = False  # somebody has pressed "Stop run" in the dashboard
        self.url: str | None = None
        self.sync_command: str | None = None  # uploads what is not in the cloud yet
        self._directory, self._what = directory, what
        self._run: Any = None  # the open wandb.Run
        self._needed = threading.Event()  # there is something to send
        self._connected = threading.Event()  # it is open, or there will be none
        self._waiting: list[Callable[[Any], None]] = []  # what is to be done as soon as it is open
        self._lock = threading.Lock()  # of these two
        self._abandoned = False  # nobody waits for that any more
        self._works, self._takes_files = True, True  # until W&B fails
        self._refused = False  # by W&B's server, with an answer after which W&B tries no more

    @contextlib.contextmanager
    def opened(self, about: dict[str, Any], mode: str, first: Callable[[Any], None]) -> Iterator[None]:
        """Opens the run with `about`, arguments of wandb.init, and closes it whatever happens: as failed after an
        exception. The body goes on while W&B is connected to: that takes a second, or half a minute with no network.
        `first` is called with the open run before anything else is.

        W&B keeps the files of all runs in one folder, $WANDB_DIR or else outputs/.
        """
        root = Path(os.environ.get("WANDB_DIR") or OUTPUTS)
        requested, remark = wandb_switches.resolve(mode)
        if remark:
            log.info(f"W&B: {remark}")
        os.environ.setdefault("WANDB_DATA_DIR", str(root / "wandb-data"))  # or artifacts pile up in the home directory
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # reports to W&B, for which an exit waits up to 10 s
        # A token, as W&B's process records all variables that begin with SLURM_; a mode that has been decided.
        hidden = ["SLURM_JWT", "WANDB_MODE"]
        if about["id"] != os.environ.get("WANDB_RUN_ID"):
            hidden += wandb_description.AGENT  # for W&B these go before any other id

        def connect() -> None:
            self._needed.wait(START_DELAY)
            try:
                if requested != "disabled" and not self._abandoned:
                    self._connect(about, root, requested)
                    self._perform(first)
                    self._perform(_put_earlier_aside)
            finally:
                with self._lock:
                    for action in self._waiting:
                        self._perform(action)
                    self._connected.set()

        code, seconds = 0, FINISH_TIMEOUT + 5
        with _hidden(*hidden):
            try:
                threading.Thread(target=connect, daemon=True).start()
                yield
            except BaseException as error:
                code = exit_code(error)
                if isinstance(error, KeyboardInterrupt):
                    seconds = HASTY_TIMEOUT
                    if not self._connected.wait(1):
                        self._abandon()
                raise
            finally:
                self._close(code, seconds)  # not `with run:`, which prints the traceback of an exception

    def do(self, action: Callable[[Any], None]) -> None:
        """Calls `action` with the W&B run, if there is one: now, or as soon as it is open."""
        self._needed.set()
        with self._lock:
            if not self._connected.is_set():
                self._waiting.append(action)
                return
        self._perform(action)

    def files(self, name: str, kind: str, paths: list[Path]) -> None:
        """Uploads files as one W&B artifact, which is called `name` followed by the run's id."""
        self._connected.wait()
        if self._run is None or not (self._works and self._takes_files):
            return
        started = time.monotonic()
        try:
            import wandb

            artifact = wandb.Artifact(f"{name}-{self._run.id}", type=kind)
            for path in paths:
                artifact.add_file(str(path))  # a copy: the file on disk may be replaced or pruned before the upload
            self._run.log_artifact(artifact)
            problem = "" if time.monotonic() - started < SLOW_UPLOAD else "no answer"
        except Exception as error:
            problem = one_line(error, 200)
        if problem:  # every further one would hold the run up as long
            log.warning(f"W&B does not take weights ({problem}); no more are sent to it, they are in {self._directory}")
            self._takes_files = False

    def _perform(self, action: Callable[[Any], None]) -> None:
        if self._run is None or not self._works:
            return
        try:
            action(self._run)
        except Exception as error:
            if not self._abandoned:
                what = self._what
                log.warning(f"W&B stopped working ({one_line(error, 200)}); nothing more of this {what} is sent to it")
            self._works = False

    def _abandon(self) -> None:
        """Waits no longer for a W&B that is still not open: the record is on the disk, and sent when it goes on."""
        self._abandoned = True
        self._needed.set()
        end = time.monotonic() + HASTY_TIMEOUT
        while not self._connected.is_set() and time.monotonic() < end:
            _end_service()
            self._connected.wait(0.5)

    def _close(self, exit_code: int, seconds: float) -> None:
        """Ends the run; W&B has `seconds` for what it has not uploaded yet."""
        self._needed.set()
        end = time.monotonic() + seconds
        answered = False
        try:
            answered = self._abandoned or self._connected.wait(seconds)
        finally:  # a signal may come while we wait
            if not answered:
                upload = f"; to upload: {self.sync_command}" if self.sync_command else ""
                log.warning(f"W&B does not answer; the {self._what} is recorded in {self._directory} only{upload}")
                self._abandon()
        self._end(exit_code, max(HASTY_TIMEOUT, end - time.monotonic()))

    def _end(self, exit_code: int, seconds: float) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        problems, finished = [], threading.Event()

        def finish() -> None:
            try:
                run.finish(exit_code=exit_code)
            except Exception as error:
                problems.append(one_line(error, 200))
            finally:
                finished.set()

        threading.Thread(target=finish, daemon=True).start()  # W&B's own timeout is fixed once a run is open
        try:
            finished.wait(seconds)
        finally:  # a signal may come while we wait
            if not finished.is_set():
                problems.insert(0, "no answer")
            if problems:
                _end_service()
            if self._refused:
                problems.append("its server refuses the data")
            if self.url and exit_code == 0 and not problems and self._works and self._takes_files:
                with contextlib.suppress(OSError):
                    wandb_description.remember(self._directory, run.id, "online", self.url, complete=True)
            if problems and self._works and not self._abandoned:
                reason, what = problems[0], self._what
                log.warning(f"W&B has not received all of the {what} ({reason}); to upload: {self.sync_command}")

    def _connect(self, about: dict[str, Any], root: Path, requested: str) -> None:
        """Opens the W&B run: online, or offline when that is requested or nothing else is possible."""
        try:
            import wandb

            if "wandb.sdk.launch" not in sys.modules:  # then nobody has declared inputs of a W&B Launch job to it
                # A private name: without this, wandb.init imports all of Launch, 0.4 s, to find that there are none.
                wandb.Run._detect_and_apply_job_inputs = lambda run: None
            root.mkdir(parents=True, exist_ok=True)  # wandb leaves a missing directory for /tmp
            wandb.setup(wandb.Settings(silent=True, mode="offline" if requested == "offline" else "online"))
            mode = requested if requested == "offline" else _online_or_offline(requested, self._what)
            settings = wandb.Settings(
                console="off",
                silent=True,
                init_timeout=INIT_TIMEOUT,
                finish_timeout=FINISH_TIMEOUT,
                finish_timeout_raises=True,
                x_transaction_log_flush_interval=1,  # second; what is not written is lost when its process is ended
                # Without it the dashboard's button raises KeyboardInterrupt, which ends a whole sweep.
                stop_fn=lambda: setattr(self, "stop_requested", True),
                # Left to itself W&B uploads the difference to the last commit and the remote's URL, with a token in it.
                disable_git=True,
                git_commit=wandb_description.commit(),
                git_remote_url="",
                disable_code=True,
                save_code=False,
            )

            def init(mode: str) -> Any:
                # First: a run that is killed now goes on under this id.
                wandb_description.remember(self._directory, about["id"], mode)
                # Offline the record of a resumed run is complete: what became of the one before is not known here, and
                # its file may be torn, at which `wandb sync` stops. Without `resume` the rows keep their steps in a
                # sync, so that those which the server has are replaced (wandb/wandb#12668) and not added.
                resume = "allow" if mode == "online" else None
                return wandb.init(**about, dir=str(root), mode=mode, resume=resume, settings=settings)

            try:
                run = init(mode)
            except Exception as error:
                if mode == "offline" or self._abandoned:
                    raise
                log.warning(f"W&B cannot be reached ({one_line(error, 200)}); this {self._what} is recorded offline")
                _end_service()
                mode = "offline"
                run = init(mode)
            self._run = run
            wandb.termsetup(run.settings, _Messages(self))
            option = "--include-online " if mode == "online" else ""
            self.sync_command = f"wandb sync {option}{shlex.quote(run.settings.sync_dir)}"
            self.url = run.url if mode == "online" else None
            wandb_description.remember(self._directory, run.id, mode, self.url)
            title = "W&B" if self._what == "run" else f"W&B, the whole {self._what}"
            log.info(f"{title}: {self.url}" if self.url else f"{title}: offline; to upload: {self.sync_command}")
        except Exception as error:
            if not self._abandoned:
                log.warning(f"W&B does not work ({one_line(error, 200)}); the {self._what} is recorded in "
                            f"{self._directory} only")  # fmt: skip
            self._end(1, HASTY_TIMEOUT)


def page(html: str) -> Any:
    """A page of HTML as a value of a row. A wandb.Table would be an artifact, about which the server is asked first: no
    answer halts training for 19 s, and a wrong one crashes W&B's process."""
    import wandb

    return wandb.Html(html, inject=False, data_is_not_path=True)


def table(columns: list[str], rows: list[list[Any]]) -> Any:
    """A table that can be sorted and filtered in the dashboard, as a value of a row; see `page` for what it risks."""
    import wandb

    return wandb.Table(columns=columns, data=rows, allow_mixed_types=True)


def image(path: Path) -> Any:
    """A picture as a value of a row."""
    import wandb

    return wandb.Image(str(path))


class _Messages:
    """Receives what W&B would print, for one message that W&B gives in no other way."""

    def __init__(self, owner: WandbRun) -> None:
        self._owner = owner

    def warning(self, message: str) -> None:
        self._owner._refused |= "Fatal error while uploading data" in message

    info = error = warning


def _put_earlier_aside(run: Any) -> None:
    """Renames the run's earlier offline folders: what they have is online or in the current one, and a sync of both
    would count rows twice."""
    current = Path(run.settings.sync_dir)
    for folder in current.parent.glob(f"offline-run-*-{run.id}*"):  # the second one of a second ends in -1
        if folder != current:
            target = folder.with_name(f"superseded-{folder.name}")
            while target.exists():  # the name has been free again within the second that it says
                target = target.with_name(f"{target.name}+")
            folder.rename(target)


def _end_service() -> None:
    """Ends W&B's process at once, which else holds up the exit of ours while a server does not answer. What it has
    written to its files stays. The next wandb.init starts another one."""
    import wandb

    with contextlib.suppress(Exception):  # private names: without them teardown waits for up to FINISH_TIMEOUT
        wandb.sdk.wandb_setup.singleton()._connection._proc._process.kill()
    with contextlib.suppress(Exception, SystemExit):  # it exits when its process ended in any other way than by 0
        wandb.teardown()


def _online_or_offline(requested: str, what: str) -> str:
    """Online when there are credentials: WANDB_API_KEY, netrc or wandb's settings. Asks nobody and no server."""
    import wandb

    try:
        if wandb.login(prompt=False, verify=False):
            return "online"
        problem = "no credentials, see `wandb login`"
    except wandb.Error as error:  # a malformed key
        problem = one_line(error, 200)
        requested = "online"
    if requested == "online":
        log.warning(f"W&B: {problem}; this {what} is recorded offline")
    return "offline"


def is_online(mode: str) -> bool:
    """Whether a run with this `wandb.mode` would go online. Asks no server."""
    requested, _ = wandb_switches.resolve(mode)
    if requested in ("offline", "disabled"):
        return False
    with _hidden("WANDB_MODE"), contextlib.suppress(Exception):
        import wandb

        wandb.setup(wandb.Settings(silent=True, mode="online"))
        return bool(wandb.login(prompt=False, verify=False))
    return False


@contextlib.contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Until the end of the `with` block these variables are not in the environment."""
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)
