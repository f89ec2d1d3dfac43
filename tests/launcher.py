"""Many starts of a script in little time: one process imports what a start imports, and forks for each request.

The real way: gpt.config.launch, a function decorated by hydra.main over conf/, sys.argv, exit codes, stdout and stderr.
Only the work is left out: the function loads its configuration and prints `valid` and the environment variable PROBE.
"""

import contextlib
import gc
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
SLOW = ("torch", "wandb", "datasets", "pandas", "matplotlib")  # nobody waits for these before a word on errors


@dataclass(frozen=True)
class Start:
    """How one start ended; `imports` are the slow modules that it has imported."""

    code: int
    stdout: str
    stderr: str
    imports: list[str]
    seconds: float


class Launcher:
    """`exact=True` takes back what `_hasten` has changed in Hydra."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, *arguments: str, script: str = "train", **environment: str) -> Start:
        """One start in a process of its own."""
        return self.start_all([arguments], script, **environment)[0]

    def start_all(
        self, command_lines: list[Sequence[str]], script: str, exact: bool = False, **environment: str
    ) -> list[Start]:
        """Starts one after another in one process."""
        request = {"command_lines": command_lines, "script": script, "exact": exact}
        self._process.stdin.write(json.dumps(request | {"environment": environment}) + "\n")
        self._process.stdin.flush()
        return [Start(**answer) for answer in json.loads(self._process.stdout.readline())]


@contextlib.contextmanager
def launcher() -> Iterator[Launcher]:
    command = [sys.executable, str(Path(__file__))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        yield Launcher(process)
        process.stdin.close()


def _serve() -> None:
    sys.path.insert(0, str(ROOT))
    import hydra
    from hydra._internal import defaults_list
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.config_repository import ConfigRepository
    from hydra._internal.hydra import Hydra

    changed = [
        (ConfigLoaderImpl, "_compose_config_from_defaults_list"),
        (ConfigRepository, "load_config"), (Hydra, "get_mode"), (defaults_list, "_create_interpolation_map"),
        (sys.modules["hydra.core.utils"], "copy"), (sys.modules["hydra._internal.config_repository"], "copy"),
    ]  # fmt: skip
    originals = [(owner, name, getattr(owner, name)) for owner, name in changed]
    from gpt.config import launch

    _hasten(ConfigLoaderImpl, ConfigRepository, Hydra, defaults_list)
    answers, terminal = os.fdopen(os.dup(1), "w"), os.dup(2)
    with tempfile.TemporaryDirectory() as run_dir:
        for script in launch.SCHEMAS:  # fills the caches, those of the parsers too
            command_lines = [[f"hydra.run.dir={run_dir}", "seed=-1"], ["sede=1", "~seed"]]
            list(_run({"command_lines": command_lines, "script": script}, hydra, launch))
    os.dup2(terminal, 2)
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile("w+") as answer:
            child = os.fork()
            if child == 0:
                try:
                    for owner, name, function in originals * request["exact"]:
                        setattr(owner, name, function)
                    os.environ.update(request["environment"])
                    sys.path[:0] = filter(None, [request["environment"].get("PYTHONPATH")])
                    json.dump(list(_run(request, hydra, launch)), answer)
                    answer.flush()
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            answer.seek(0)
            answers.write(answer.read() + "\n")
            answers.flush()


def _run(request, hydra, config) -> Iterator[dict]:
    imported = []
    sys.addaudithook(lambda event, args: imported.append(args[0]) if event == "import" and args[0] in SLOW else None)
    script = request["script"]

    @hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name=script)
    def main(cfg) -> float | SimpleNamespace:
        typed = config.load(cfg, config.schema_of(script))
        if getattr(typed, "dry_run", False):  # asked before the first job of a sweep
            return SimpleNamespace(cfg=typed)
        print("valid", os.environ.get("PROBE", ""))
        return 0.0

    for arguments in request["command_lines"]:
        sys.argv = [f"{script}.py", *arguments]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            started = time.perf_counter()
            try:
                config.launch(main, script)
                code = 70
            except SystemExit as end:
                code = end.code
            except BaseException:  # would be a traceback and code 1
                traceback.print_exc()
                code = 71
            seconds = time.perf_counter() - started
            sys.stdout.flush()
            sys.stderr.flush()
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode("utf-8", "backslashreplace"))
        yield {"code": code, "stdout": texts[0], "stderr": texts[1], "imports": imported[:], "seconds": seconds}
        imported.clear()


def _hasten(loader, repository, hydra, defaults_list) -> None:
    """Four fifths of a start is reading the files of conf/ and merging them. Hydra does it twice, the first time only
    to look for hydra.mode; here it does it once for each set of files, and looks for hydra.mode in the arguments."""
    from hydra.core.object_type import ObjectType

    load, merge = repository.load_config, loader._compose_config_from_defaults_list
    get_mode, list_choices = hydra.get_mode, defaults_list._create_interpolation_map
    loaded, merged = {}, {}  # pickled, because what is loaded is changed by merging, and what is merged by overrides
    listed = {}

    def load_config(self, config_path):
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        key = (source and source.path, config_path)
        if key not in loaded:
            loaded[key] = pickle.dumps(load(self, config_path))
        return pickle.loads(loaded[key])

    def compose(self, defaults, repo):
        key = (*((default.config_path, default.package) for default in defaults), *map(str, repo.get_sources()))
        if key not in merged:
            merged[key] = pickle.dumps(merge(self, defaults, repo))
        return pickle.loads(merged[key])

    def look_for_mode(self, config_name, overrides):
        is_plain = config_name in ("train", "generate", "prepare_data") and "experiments=" not in str(overrides)
        return None if is_plain and "hydra.mode" not in str(overrides) else get_mode(self, config_name, overrides)

    def create_interpolation_map(overrides, defaults, self_added):
        key = repr((overrides.known_choices, defaults, self_added))
        if key not in listed:
            listed[key] = list_choices(overrides, defaults, self_added)
        return listed[key]

    repository.load_config, loader._compose_config_from_defaults_list = load_config, compose
    hydra.get_mode, defaults_list._create_interpolation_map = look_for_mode, create_interpolation_map
    for name in ("core.utils", "_internal.config_repository"):  # both copy whole configurations
        sys.modules[f"hydra.{name}"].copy = SimpleNamespace(deepcopy=lambda value: pickle.loads(pickle.dumps(value)))


if __name__ == "__main__":
    _serve()
