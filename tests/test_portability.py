"""Other versions of Python, other systems, and an installation without this repository."""

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = ("train.py", "generate.py", "prepare_data.py")
OLD = """
import runpy, sys
sys.version_info = (3, 10, 13)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def python(*arguments, executable=sys.executable, cwd=ROOT):
    return subprocess.run([executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=300)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_that_is_too_old_is_refused_in_one_line(script):
    done = python("-c", OLD, script)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert done.returncode == 5 and done.stdout == ""
    error = rf"error: Python \S+ is too old \({re.escape(sys.executable)}\); use {re.escape(version)} or later\n"
    assert re.fullmatch(error, done.stderr)


def test_what_refuses_an_old_python_can_be_read_by_it():
    for name in ("gpt/__init__.py", *SCRIPTS):
        ast.parse((ROOT / name).read_text(), feature_version=(3, 9))


# What only POSIX systems have is hidden from this project, and from nobody else: the libraries have been imported.
WITHOUT_POSIX = """
import builtins, importlib, os, pkgutil, runpy, signal, sys

sys.path.insert(0, "")
modules = pkgutil.walk_packages(["gpt"], "gpt.")
names = ["train", "generate", "prepare_data", "evaluate", "gpt", *(module.name for module in modules)]
names.remove("gpt.evaluation.harness")  # which needs requirements-tasks.txt
names.remove("gpt.optimizers.soap")  # requirements-soap.txt
for name in names:
    importlib.import_module(name)
for name in names:
    del sys.modules[name]

def import_(name, globals=None, *others):
    hidden = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "posix", "syslog", "readline"}
    if name in hidden and globals and globals["__name__"] in {"__main__", *names}:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return import_before(name, globals, *others)

import_before, builtins.__import__ = builtins.__import__, import_
for module, attributes in {
    os: "fork forkpty setpgid killpg getuid geteuid getgid uname sysconf sched_getaffinity mkfifo chown fchmod",
    signal: "SIGKILL SIGHUP SIGALRM SIGUSR1 SIGCHLD SIGPIPE alarm setitimer pthread_sigmask pthread_kill sigwait",
}.items():
    for attribute in attributes.split():
        delattr(module, attribute)
for name in names:
    importlib.import_module(name)
del sys.argv[0]
if sys.argv:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


TRAIN = ("train.py", "model=tiny", "train.max_steps=1", "train.sample_every=null")


@pytest.mark.parametrize("arguments", [(), pytest.param(TRAIN, marks=pytest.mark.exhaustive)], ids=["import", "train"])
def test_nothing_needs_what_windows_lacks(tmp_path, arguments):
    places = [f"out_dir={tmp_path / 'run'}", f"data.prepared_dir={tmp_path / 'data'}"] if arguments else []
    done = python("-c", WITHOUT_POSIX, *arguments, *places)
    assert done.returncode == 0, done.stderr
    if arguments:
        assert f"run directory:\n{tmp_path / 'run'}" in done.stdout


ASK = """
import gpt.notebook, gpt.data, gpt.sweeps
from pathlib import Path
from gpt.files.paths import PROJECT_ROOT
for place in (PROJECT_ROOT, *(Path(each.__path__[0]) for each in (gpt, gpt.sweeps))):
    print(place, *sorted(path.name for pattern in ("sample.*", "report.[chj]*") for path in place.glob(pattern)))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("how", ["editable", "regular"])
def test_the_package_is_installed_from_a_clone_and_imported_from_anywhere(tmp_path, how):
    clone, elsewhere, environment = (tmp_path / name for name in ("clone", "elsewhere", "environment"))
    elsewhere.mkdir()
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).rstrip("\0").split("\0"):
        if not name.startswith(("tests/", "experiments/")):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    assert python("-m", "venv", "--without-pip", environment).returncode == 0
    executable, paths = environment / "bin" / "python", {"base": environment, "platbase": environment}
    site = sysconfig.get_path("purelib", "venv", paths)
    (Path(site) / "libraries.pth").write_text(sysconfig.get_path("purelib"))  # those of this environment
    options = ["--no-index", "--no-deps", "--no-build-isolation", *["--editable"] * (how == "editable")]
    installed = python("-m", "pip", "--python", executable, "install", *options, clone)
    assert installed.returncode == 0, installed.stderr

    asked = python("-c", ASK, executable=executable, cwd=elsewhere)
    package, root = (clone / "gpt", clone) if how == "editable" else (Path(site) / "gpt", elsewhere)
    files = "report.css report.html.j2 report.js"
    assert asked.stdout.splitlines() == [str(root), f"{package} sample.csv", f"{package / 'sweeps'} {files}"], (
        asked.stderr
    )
    needed = metadata.Distribution.at(next(Path(site).glob("gpt_lab-*.dist-info"))).requires
    assert "torch==2.13.0" in needed and len(needed) > 15

    script = clone / "train.py" if how == "editable" else Path(shutil.copy(ROOT / "train.py", elsewhere))
    started = python(script, "--cfg", "job", executable=executable, cwd=elsewhere)
    if how == "editable":
        assert started.returncode == 0 and "optimizer:" in started.stdout
    else:
        remedy = "run the script in a clone of the repository, or pip install -e ."
        assert (started.returncode, started.stderr) == (2, f"error: no conf/ ({elsewhere}); {remedy}\n")
