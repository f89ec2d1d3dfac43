"""A configuration from anybody executes nothing: what works on plain Hydra does not work with gpt/config/guard.py."""

import os
import pickle
from dataclasses import dataclass

import pytest
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from launcher import launcher


@pytest.fixture(scope="module")
def starts():
    with launcher() as process:
        yield process


@dataclass
class Folder:
    """What an attacker hands over: a folder for --config-dir. Each payload would make the file `marker`."""

    path: os.PathLike

    @property
    def marker(self):
        return self.path / "marker"

    def write(self, text, name="experiments/theirs.yaml", first_line="# @package _global_\n"):
        text = text.replace("COPY", COPY).replace("DIR", str(self.path))
        (self.path / name).write_text(first_line + text)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "experiments").mkdir()
    for slot in ("launcher", "sweeper"):
        (tmp_path / "hydra" / slot).mkdir(parents=True)
    (tmp_path / "source").write_text("PWNED=1\n")
    (tmp_path / "package_of_theirs").mkdir()
    (tmp_path / "package_of_theirs" / "__init__.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    (tmp_path / "theirs.pickle").write_bytes(pickle.dumps(Payload()))
    folder = Folder(tmp_path)
    folder.write(
        f"_target_: {BasicLauncher.__module__}.BasicLauncher\nevil: {{COPY}}", "hydra/launcher/theirs.yaml", ""
    )
    return folder


CHOSEN = ("+experiments=theirs", "checkpoint=x", "hydra.sweep.dir=DIR/sweep")
COPY = "_target_: shutil.copyfile, src: DIR/source, dst: DIR/marker"  # not on Hydra's own list of what is forbidden
HANDLER = "version: 1, root: {handlers: [h]}, handlers: {h: {HERE}}"
OVERWRITE = HANDLER.replace("HERE", "class: logging.FileHandler, filename: DIR/marker, mode: w")
IMPORT = HANDLER.replace("HERE", "class: logging.StreamHandler, stream: ext://package_of_theirs.x")
FACTORY = HANDLER.replace("HERE", "(): shutil.copyfile, src: DIR/source, dst: DIR/marker")
# What it is: the file, the arguments, and what the error must name.
PAYLOADS = {
    "a callback": ("hydra: {callbacks: {evil: {COPY}}}", CHOSEN, "hydra.callbacks.evil._target_"),
    "a callback in a callback": (
        "hydra: {callbacks: {evil: {x: [{COPY}]}}}", CHOSEN, "hydra.callbacks.evil.x.0._target_",
    ),
    "a callback named like ours": ("hydra: {callbacks: {sweep: {COPY}}}", CHOSEN, "hydra.callbacks.sweep._target_"),
    "a callback that unpickles": (
        "hydra: {callbacks: {evil: {_target_: pandas.read_pickle, filepath_or_buffer: DIR/theirs.pickle}}}",
        CHOSEN, "hydra.callbacks.evil._target_",
    ),
    "a callback by interpolation": ("evil: {x: {COPY}}\nhydra: {callbacks: '${evil}'}", CHOSEN, "hydra.callbacks:"),
    "a callback as the default of an interpolation": (
        "x: DIR/source\ny: DIR/marker\n"
        "hydra: {callbacks: {evil: '${oc.select:no,{_target_:shutil.copyfile,src:${x},dst:${y}}}'}}",
        CHOSEN, "hydra.callbacks:",
    ),
    "an argument of the launcher": ("", ("-m", "hydra/launcher=theirs", *CHOSEN[1:]), "hydra.launcher.evil._target_"),
    "an argument of the sweeper": (
        "hydra: {mode: MULTIRUN, sweeper: {params: {evil: {COPY}}}}", CHOSEN, "hydra.sweeper.params.evil._target_",
    ),
    "an argument of the sweeper by interpolation": (
        "evil: {x: {COPY}}\nhydra: {sweeper: {params: '${evil}'}}", ("-m", *CHOSEN), "hydra.sweeper.params",
    ),
    "a log file over another file": (f"hydra: {{job_logging: {{{OVERWRITE}}}}}", CHOSEN, "hydra.job_logging"),
    "a factory in Hydra's logging": (f"hydra: {{hydra_logging: {{{FACTORY}}}}}", CHOSEN, "hydra.hydra_logging"),
    "an import by logging": (f"hydra: {{job_logging: {{{IMPORT}}}}}", CHOSEN, "hydra.job_logging"),
    "a log file at --help": (f"hydra: {{hydra_logging: {{{OVERWRITE}}}}}", ("--help", *CHOSEN), "hydra.hydra_logging"),
    "a package to search": ("", ("hydra.searchpath=[pkg://package_of_theirs]",), "pkg://package_of_theirs"),
    "a package to search, in a primary file": (
        "defaults: [generate, _self_]\nhydra: {searchpath: ['pkg://package_of_theirs']}",
        ("--config-name=experiments/theirs", "hydra.run.dir=DIR"), "pkg://package_of_theirs",
    ),
    "a package for the primary file": ("", ("--config-path=pkg://package_of_theirs",), "pkg://package_of_theirs"),
    "a pickle to run again": ("", ("--experimental-rerun=DIR/theirs.pickle",), "--experimental-rerun"),
}  # fmt: skip


@pytest.mark.parametrize("name", PAYLOADS)
def test_what_works_on_plain_hydra_is_refused_by_its_key(name, folder, starts):
    text, arguments, named = PAYLOADS[name]
    folder.write(text)
    arguments = [f"--config-dir={folder.path}", *(argument.replace("DIR", str(folder.path)) for argument in arguments)]
    refused(starts, folder, arguments, named, script="generate")


def refused(starts, folder, arguments, named, script, **environment):
    """Starts `script` without the guard, which must execute the payload, and with it, which must name its key."""
    environment |= {"PYTHONPATH": str(folder.path)}
    unguarded = starts.start(*arguments, script=script, guarded=False, **environment)
    assert folder.marker.exists(), unguarded  # else the payload proves nothing
    os.rmdir(folder.marker) if folder.marker.is_dir() else folder.marker.unlink()

    start = starts.start(*arguments, script=script, **environment)
    assert not folder.marker.exists()
    assert start.code == 2 and start.stderr.count("\n") == 1 and named in start.stderr, start


OPTUNA = (
    "{_target_: hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper, sampler: null, direction: minimize, "
    "storage: null, study_name: null, n_trials: 1, n_jobs: 1, max_failure_rate: 1, search_space: null, "
    "custom_search_space: null, params: null}"
)
SUBMITIT = "_target_: hydra_plugins.hydra_submitit_launcher.submitit_launcher.{}Launcher, submitit_folder: DIR/submitit"
SWEEPER = "_target_: hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
# The file hydra/<slot>/theirs.yaml, what the error must name, and the plugin that the payload needs.
SECTIONS = {
    "a sampler that is none": ("sweeper", f"{{{SWEEPER}, sampler: {{COPY}}}}", "hydra.sweeper.sampler._target_", None),
    "a sampler's argument": (
        "sweeper", f"{{{SWEEPER}, sampler: {{_target_: optuna.samplers.TPESampler, seed: {{COPY}}}}}}",
        "hydra.sweeper.sampler.seed._target_", "optuna",
    ),
    "a sampler in a list": (
        "sweeper", f"{{{SWEEPER}, sampler: [{{COPY}}]}}", "hydra.sweeper.sampler.0._target_", None,
    ),
    "a sampler elsewhere": ("sweeper", f"{{{SWEEPER}, other: {{COPY}}}}", "hydra.sweeper.other._target_", None),
    "a search space that is a function": (
        "sweeper", OPTUNA.replace("custom_search_space: null", "custom_search_space: package_of_theirs.x"),
        "hydra.sweeper.custom_search_space", "hydra_plugins.hydra_optuna_sweeper",
    ),
    "commands before a job": (
        "launcher", f"{{{SUBMITIT.format('Local')}, setup: [mkdir DIR/marker]}}", "hydra.launcher.setup",
        "hydra_plugins.hydra_submitit_launcher",
    ),
    "commands before a job of a cluster": (
        "launcher", f"{{{SUBMITIT.format('Slurm')}, setup: [mkdir DIR/marker]}}", "hydra.launcher.setup",
        "hydra_plugins.hydra_submitit_launcher",
    ),
    "a line break in a batch script": (
        "launcher", f'{{{SUBMITIT.format("Slurm")}, partition: "x\\nmkdir DIR/marker #"}}', "hydra.launcher.partition",
        "hydra_plugins.hydra_submitit_launcher",
    ),
    "a line break in a parameter of a batch script": (
        "launcher", f'{{{SUBMITIT.format("Slurm")}, additional_parameters: {{x: "\\nmkdir DIR/marker #"}}}}',
        "hydra.launcher.additional_parameters", "hydra_plugins.hydra_submitit_launcher",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SECTIONS)
def test_what_a_launcher_or_a_sweeper_would_run_is_refused_by_its_key(name, folder, starts):
    slot, text, named, plugin = SECTIONS[name]
    if plugin:
        pytest.importorskip(plugin, reason="requirements-sweeps.txt is not installed")
    folder.write(text, f"hydra/{slot}/theirs.yaml", "")
    for command in ("srun", "sbatch"):  # stand-ins for SLURM's: the batch script runs here, and then is not accepted
        (folder.path / command).write_text('#!/bin/sh\nbash "$1" > /dev/null 2>&1\nexit 1\n')
        (folder.path / command).chmod(0o700)
    arguments = ["-m", f"--config-dir={folder.path}", f"hydra/{slot}=theirs", "checkpoint=x"]
    arguments.append(f"hydra.sweep.dir={folder.path}/sweep")
    path = f"{folder.path}:{os.environ['PATH']}"
    refused(starts, folder, arguments, named, script="generate", PATH=path)


@pytest.mark.parametrize(
    ("choice", "change", "named"),
    [
        ("hydra/launcher=submitit_slurm", "hydra.sweep.dir='DIR/a\nmkdir x #'", "hydra.launcher.submitit_folder: "),
        ("hydra/launcher=submitit_slurm", "hydra.launcher.name='a\nb'", "hydra.launcher.name: "),
        ("hydra/launcher=submitit_slurm", "hydra.launcher.mem_gb=[1]", "hydra.launcher.mem_gb: "),
        ("hydra/launcher=submitit_slurm", "+hydra.launcher.srun_args=['--export=x']", "hydra.launcher.srun_args: "),
        ("hydra/launcher=joblib", "+hydra.launcher.pre_dispatch='2*n_jobs'", "hydra.launcher.pre_dispatch: "),
        ("hydra/launcher=joblib", "hydra.launcher.n_jobs=${seed}", "hydra.launcher.n_jobs=${seed}: no interpolation"),
        ("hydra/sweeper=optuna", "hydra.sweeper.storage=redis://host", "hydra.sweeper.storage: "),
        ("hydra/sweeper=optuna", "hydra.sweeper.storage='sqlite:///x.db?plugin=y'", "hydra.sweeper.storage: "),
        ("hydra/sweeper=optuna", "hydra.sweeper.storage=[sqlite:///x.db]", "hydra.sweeper.storage: "),
        ("hydra/sweeper=optuna", "hydra.sweeper.custom_search_space=os.getcwd", "hydra.sweeper.custom_search_space: "),
        ("hydra/sweeper=optuna", "hydra.sweeper.sampler._target_=os.system", "sampler._target_=os.system: "),
        ("hydra/sweeper=optuna", "hydra.sweeper.sampler._target_=optuna.samplers.CmaEsSampler", "CmaEsSampler: "),
        ("hydra/sweeper=optuna", "hydra.sweeper.sampler._target_=[os.system]", "sampler._target_.0=os.system: "),
        ("hydra/sweeper=optuna", "+hydra.sweeper.sampler.x._target_=os.system", "sampler.x._target_=os.system: "),
        ("hydra/sweeper=optuna", "+hydra.sweeper._args_=[x]", "hydra.sweeper._args_: "),
    ],
)
def test_a_value_that_a_plugin_would_do_more_with_than_read_is_refused(choice, change, named, folder, starts):
    change = change.replace("DIR", str(folder.path))
    start = starts.start("-m", f"hydra.sweep.dir={folder.path}/sweep", choice, change)
    assert start.code == 2 and start.stderr.count("\n") == 1 and named in start.stderr, start
    assert not (folder.path / "sweep").exists()


ROUTES = {
    "chosen": ("experiments=theirs",),
    "chosen in a folder of the search path": ("hydra.searchpath=['file://DIR']", "experiments=theirs"),
    "as the primary file": ("--config-name=theirs",),
    "as the second job of a sweep": ("-m", "experiments=fine,theirs"),
    "as the primary file of a sweep": ("-m", "--config-name=theirs"),
}


@pytest.mark.parametrize("route", ROUTES)
def test_no_way_to_a_file_leads_around_the_guard(route, folder, starts):
    evil = f"hydra: {{job_logging: {{{OVERWRITE}}}}}"
    folder.write(evil)
    folder.write("defaults: [_self_, {model: tiny}]\n" + evil, "theirs.yaml")
    folder.write("seed: 3", "experiments/fine.yaml")
    arguments = [argument.replace("DIR", str(folder.path)) for argument in ROUTES[route]]
    if "searchpath" not in arguments[0]:
        arguments.insert(0, f"--config-dir={folder.path}")
    arguments += [f"hydra.run.dir={folder.path}/run", f"hydra.sweep.dir={folder.path}/sweep"]
    refused(starts, folder, arguments, "hydra.job_logging", script="train")


def test_a_configuration_sets_no_environment_variables(folder, starts):
    folder.write("hydra: {job: {env_set: {PROBE: set by a file}}}")
    arguments = [f"--config-dir={folder.path}", *CHOSEN[:2]]
    assert starts.start(*arguments, script="generate", guarded=False).stdout == "valid set by a file\n"
    start = starts.start(*arguments, script="generate")
    assert (start.code, start.stdout) == (2, "") and "hydra.job.env_set" in start.stderr


def test_a_configuration_does_not_read_the_environment(folder, starts):
    folder.write("wandb: {project: '${oc.env:PROBE}'}")
    arguments = [f"--config-dir={folder.path}", "experiments=theirs", f"out_dir={folder.path}/run", "seed=-1"]
    start = starts.start(*arguments, PROBE="canary")
    assert start.code == 2 and "canary" not in start.stdout + start.stderr
    assert "wandb.project: " in start.stderr and "seed=-1" in start.stderr


@pytest.mark.parametrize("flag", ["--cfg=all", "--cfg=job", "--help", "--hydra-help", "--info"])
def test_looking_at_a_hostile_configuration_executes_nothing(flag, folder, starts):
    folder.write("evil: {COPY}\nhydra: {callbacks: {evil: {COPY}}}")
    chosen = () if flag == "--hydra-help" else CHOSEN[:2]
    start = starts.start(f"--config-dir={folder.path}", *chosen, flag, script="generate")
    assert not folder.marker.exists()
    assert start.code == (2 if chosen else 0), start


def test_a_target_in_a_section_of_the_project_is_an_unknown_key(folder, starts):
    folder.write("model: {COPY}")
    start = starts.start(f"--config-dir={folder.path}", "experiments=theirs", "seed=-1")
    assert start.code == 2 and not folder.marker.exists()
    assert "model._target_" in start.stderr and "seed=-1" in start.stderr


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"seed: !!python/object/apply:os.mkdir [DIR/marker]", "theirs.yaml:1: could not determine a constructor"),
        (b"seed: \xff\xfe", "experiments=theirs: "),
        (b"- 1\n- 2\n", "unknown key experiments"),
        (b"just words", "unknown key experiments.just words"),
        (b"seed: &a [*a]", "experiments=theirs: "),
        (b"seed: 1\nseed: 2\n", "duplicate key seed"),
        (b"[" * 400, "experiments=theirs: "),
        (b"# @package _global_\ndefaults: [nothing]\n", "experiments=theirs: "),
        (b"# @package _global_\nhydra: 3\n", "experiments=theirs: "),
        (b"# @package _global_\nhydra: {job: {env_copy: [NO_SUCH_VARIABLE]}}\n", "NO_SUCH_VARIABLE"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_line(content, named, folder, starts):
    (folder.path / "experiments" / "theirs.yaml").write_bytes(content.replace(b"DIR", bytes(folder.path)))
    start = starts.start(f"--config-dir={folder.path}", *CHOSEN[:2], "temperature=-1", script="generate")
    assert start.code == 2 and start.stderr.count("\n") == 1 and "Traceback" not in start.stderr, start
    assert named in start.stderr and "temperature=-1" in start.stderr
    assert not folder.marker.exists()


@pytest.mark.parametrize("name", ["a\\0b", "\\ud800", "${oc.env:NOTHING}"])
def test_a_directory_that_no_file_system_has_is_named_by_its_key(name, folder, starts):
    folder.write(f'out_dir: "{name}"')
    start = starts.start(f"--config-dir={folder.path}", "experiments=theirs", "seed=-1")
    assert start.code == 2 and start.stderr.count("\n") == 1 and "out_dir" in start.stderr, start
    assert "seed=-1" in start.stderr
