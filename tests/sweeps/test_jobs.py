"""The jobs of a sweep, from what is in their folders: identity, state, metrics, what differs between them."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT, sweep_job
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from test_conf import loaded
from test_launch import composed

from gpt.config import launch
from gpt.config.schema import as_dict
from gpt.files.jsonl import RowFile
from gpt.sweeps import composition as composition
from gpt.sweeps import jobs
from gpt.sweeps.jobs import Job

GROUPS = ("model", "data", "optimizer", "schedule", "debug")
default = functools.cache(composed)


def identified(*overrides):
    """(name of the folder, settings by which it is known) of a job with these overrides."""
    if any(jobs.override_key(override) in GROUPS for override in overrides):
        cfg = composed(*overrides)
    else:
        cfg = default().copy()
        ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(list(overrides)), cfg)
    found = composition.identity(cfg)
    return jobs.name_of(found), found


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["optimizer.lr=1e-3"], ["optimizer.lr=0.001"]),
        (["train.eval_tokens=1e2"], ["train.eval_tokens=100"]),
        (["train.max_tokens=100.0"], ["train.max_tokens=100"]),
        (["sample.temperature=1"], ["sample.temperature=1.0"]),
        (["optimizer.lr=0.01", "seed=3"], ["seed=3", "optimizer.lr=0.01"]),
        (["model=tiny", "model.n_layer=2"], ["model.n_layer=2"]),  # what is the default anyway
        (["train.max_steps=5", "train.max_tokens=1"], ["train.max_steps=5"]),  # steps overrule tokens
        (["train.max_epochs=1", "train.max_tokens=1"], ["train.max_epochs=1", "train.max_tokens=2"]),
        *([[key], []] for key in (
            "out_dir=elsewhere", "resume=never", "allow_changed=[data]", "dry_run=true", "wandb.mode=disabled",
            "wandb.tags=[a]", "sweep.name=x", "sweep.rungs=[5]", "sweep.pause_at=5",
        )),
    ],
    ids=str,
)  # fmt: skip
def test_the_same_settings_are_the_same_job_however_they_are_typed(first, second):
    assert identified(*first) == identified(*second)


DIFFERENT = [
    "optimizer.lr=0.002", "seed=1", "model.n_layer=3", "train.max_tokens=5000", "train.max_steps=5",
    "train.max_epochs=1", "data.prompts=[a]", "data.mask=all", "model=mini", "data=medquad", "optimizer=sgd",
    "sample.top_k=null", "train.compile=false", "data.card.title=t",
]  # fmt: skip


def test_any_other_setting_makes_another_job():
    names = {identified()[0], *(identified(change)[0] for change in DIFFERENT)}
    assert len(names) == len(DIFFERENT) + 1
    assert identified("train.max_steps=5")[0] != identified("train.max_steps=6")[0]


def test_every_setting_of_a_run_identifies_it_unless_it_is_listed_as_volatile():
    known = identified()[1].keys()
    every = jobs.flatten(as_dict(loaded()))
    assert {key for key in every if key.split(".")[0] not in jobs.VOLATILE} - {"data.card.notice"} == known
    assert {key.split(".")[0] for key in every} - {key.split(".")[0] for key in known} == jobs.VOLATILE - {"hydra"}


def test_an_interpolation_is_known_by_its_value_and_one_that_leads_nowhere_by_its_text():
    assert identified("train.eval_every=5", "train.save_every=${train.eval_every}") == identified(
        "train.eval_every=5", "train.save_every=5"
    )
    assert identified("train.save_every=${nope}")[1]["train.save_every"] == "${nope}"


def test_the_name_of_a_folder_is_eight_hexadecimal_digits():
    assert all(len(identified(*o)[0]) == 8 and int(identified(*o)[0], 16) >= 0 for o in ([], ["seed=5"]))
    assert jobs.name_of({"a": math.nan}) == jobs.name_of({"a": math.nan}) != jobs.name_of({"a": None})


JOB = {
    "model.family": "gpt2",
    "data.delimiter": None,
    "data.encoding": None,
    "objective.name": "next_token",
    "optimizer.lr": 0.001,
    "model.context_length": 64,
    "seed": 1,
}


def test_what_is_written_is_what_is_read(tmp_path):
    fields = {"error": "é\x1b", "code": 4, "log": "/a/train.log", "seconds": 1.5, "fingerprint": "f", "name": "lr=é"}
    job = sweep_job(tmp_path, 3, JOB, [5.0, 4.0], status="failed", **fields)
    assert jobs.read(tmp_path) == [job]
    assert (job.number, job.config, job.status, job.id) == (3, jobs.current(JOB), "failed", jobs.name_of(JOB))
    assert {name: getattr(job, name) for name in fields} == fields
    assert (job.val_loss, job.val_bpb, job.tokens, job.tokens_per_second) == (4.0, 2.0, 1000, 500.0)
    assert jobs.load(job.folder) == replace(job, rows=[])


def test_jobs_come_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 0, 7):
        sweep_job(tmp_path, number, {"seed": number})
    (tmp_path / "no_job").mkdir()
    (tmp_path / "leaderboard.md").write_text("")
    assert [job.number for job in jobs.read(tmp_path)] == [0, 2, 7, 10]
    assert jobs.read(tmp_path / "nowhere") == []


def test_a_job_of_no_metrics_has_no_result(tmp_path):
    job = sweep_job(tmp_path, 0, JOB, status="new")
    assert (job.best, job.val_loss, job.val_bpb, job.tokens, job.tokens_per_second) == ({}, None, None, 0, None)
    assert job.samples() == []


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([math.nan, 5.0, 4.0, math.nan], 4.0),
        ([math.nan, math.nan], None),
        ([5.0, math.inf], 5.0),
        ([math.inf], math.inf),
        ([3.0, 3.0], 3.0),
    ],
)
def test_nan_is_never_the_lowest_loss(tmp_path, losses, best):
    job = sweep_job(tmp_path, 0, JOB, losses)
    assert len(job.rows) == len(losses) and job.val_loss == best


def test_the_speed_is_the_median_and_the_best_row_the_first_of_equal_trained_ones(tmp_path):
    job = sweep_job(tmp_path, 0, JOB)
    RowFile(job.folder / "metrics.jsonl").append(
        [{"step": i, "tokens": i, "val/loss": 3.0, "tokens_per_second": speed} for i, speed in enumerate([1, 900, 20])]
    )
    job = jobs.read_one(job.folder)
    assert (job.tokens_per_second, job.best["step"]) == (20, 1)


MALFORMED = [
    '{"step": 1, "tokens": 5, "val/loss": "low"}', '{"step": 1, "tokens": "5", "val/loss": 1.0}',
    '{"step": null, "tokens": 5, "val/loss": 1.0}', '{"step": 1, "tokens": [5], "val/loss": 1.0}',
    '{"step": 1, "tokens": "NaN", "val/loss": 1.0}', '{"step": 1, "tokens": Infinity, "val/loss": 1.0}',
    '{"step": 1, "tokens": 5, "val/loss": 1.0, "val/bpb": {}}', "[1, 2]", "nonsense", "null", "[" * 100_000,
    '{"step": 1, "tokens": 5, "val/loss": 1.0, "tokens_per_second": "fast"}', '{"step": 1e999, "tokens": 1}',
    '{"step": 1, "tokens": 5, "val/loss": 1' + "0" * 400 + "}", '{"step": 1, "tokens": 5, "val/loss": \xff}',
    '{"step": 1, "tokens": 5, "val/loss": -1e308}',
]  # fmt: skip


def test_malformed_rows_are_left_out_and_all_others_count(tmp_path, record_property):
    job = sweep_job(tmp_path, 0, JOB, [5.0])
    path = job.folder / "metrics.jsonl"
    good = '{"step": 90, "tokens": 95, "val/loss": 4.0}\n{"step": 99, "tokens": 99, "val/loss": "NaN"}\n'
    text = path.read_text() + "\n".join(MALFORMED) + "\n" + good + '{"step": 1, "tokens": 7, "val/lo'
    path.write_bytes(text.encode("latin-1"))
    job = jobs.read_one(job.folder)
    assert [row["step"] for row in job.rows] == [0, 90, 99]
    assert (job.val_loss, job.tokens) == (4.0, 99)
    record_property("count", f"{len(MALFORMED)} malformed rows of metrics and a torn one left out, 3 others counted")


def test_metrics_that_cannot_be_read_are_a_warning(tmp_path, caplog):
    job = sweep_job(tmp_path, 0, JOB)
    (job.folder / "metrics.jsonl").mkdir()
    assert jobs.read_one(job.folder) == job
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "metrics.jsonl cannot be read (Is a directory)" in caplog.text


def changed(**values):
    """job.json with other values."""
    return lambda stored: json.dumps(stored | values).encode()


def without(key):
    return lambda stored: json.dumps({name: value for name, value in stored.items() if name != key}).encode()


DAMAGE = {
    "torn": lambda stored: json.dumps(stored).encode()[:60],
    "empty": lambda stored: b"",
    "zeros": lambda stored: bytes(500),
    "deeply nested": lambda stored: b"[" * 100_000,
    "deeply nested inside": lambda stored: json.dumps(stored).encode()[:-1] + b', "x": ' + b"[" * 100_000,
    "not UTF-8": lambda stored: json.dumps(stored | {"error": "@"}).encode().replace(b"@", b"\xff"),
    "a list": lambda stored: b"[]",
    "null": lambda stored: b"null",
    "a number": lambda stored: b"5",
    "another format": changed(format=1),
    "no such status": changed(status="fine"),
    "a status of another type": changed(status=["completed"]),
    "a number that is none": changed(number="3"),
    "settings that are a list": changed(config=[]),
    "settings that are null": changed(config=None),
    "overrides that are a text": changed(overrides="seed=1"),
    "overrides that are numbers": changed(overrides=[1]),
    "overrides that are null": changed(overrides=None),
    "a time that is a text": changed(seconds="long"),
    "a time that is NaN": changed(seconds=math.nan),
    "a time below zero": changed(seconds=-1),
    "a time of 400 digits": changed(seconds=10**400),
    "a number of 5,000 digits": lambda stored: json.dumps(stored | {"number": 77}).encode().replace(b"77", b"7" * 5000),
    "an error that is a list": changed(error=[]),
    "a name that is null": changed(name=None),
    "a code that is a text": changed(code="1"),
    "a fingerprint that is a number": changed(fingerprint=5),
    "no name": without("name"),
    "no overrides": without("overrides"),
    "no format": without("format"),
}


@pytest.fixture(scope="module")
def config_with_lr():
    return loaded("optimizer.lr=0.005")


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_job_file_is_one_warning_and_the_job_is_known_by_its_other_files(
    tmp_path, caplog, damage, config_with_lr
):
    good = sweep_job(tmp_path, 0, {"seed": 1}, [4.0])
    job = sweep_job(tmp_path, 1, identified("optimizer.lr=0.005")[1], [5.0, 3.0])
    launch.save(config_with_lr, job.folder / "config.yaml")
    path = job.folder / "job.json"
    path.write_bytes(damage(json.loads(path.read_text())))
    found = jobs.read(tmp_path)
    assert found[0] == good and len(found) == 2
    assert (found[1].status, found[1].id, found[1].val_loss, found[1].rows) == ("damaged", job.id, 3.0, job.rows)
    assert found[1].config == job.config and found[1].setting("optimizer.lr") == 0.005
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} is damaged; the job is known by its other files"
    ]


def test_a_directory_in_the_place_of_a_job_file_is_a_damaged_job_too(tmp_path, caplog):
    folder = tmp_path / "0badcafe"
    (folder / "job.json").mkdir(parents=True)
    [job] = jobs.read(tmp_path)
    assert (job.status, job.id, job.config, job.rows) == ("damaged", "0badcafe", {}, [])
    assert len(caplog.records) == 1
    jobs.write(Job(folder, 0, [], {}))
    assert caplog.records[-1].getMessage() == f"{folder / 'job.json'} cannot be written (Is a directory)"
    assert [path.name for path in folder.iterdir()] == ["job.json"]


@pytest.mark.parametrize("content", [b"", b"[1]", b"{a: [", b"\xff\xff", b"[" * 500, b"a: !!python/object:os.x {}"])
def test_a_damaged_job_whose_settings_cannot_be_read_either_has_none(tmp_path, content):
    (tmp_path / "0badcafe").mkdir()
    (tmp_path / "0badcafe" / "job.json").write_text("{")
    (tmp_path / "0badcafe" / "config.yaml").write_bytes(content)
    [job] = jobs.read(tmp_path)
    assert (job.status, job.config) == ("damaged", {})


def test_the_configuration_that_a_run_writes_identifies_the_same_job(tmp_path):
    for overrides in ([], ["optimizer.lr=1e-5", "train.max_tokens=1e6", "data=medquad", "model=mini"]):
        launch.save(loaded(*overrides), tmp_path / "config.yaml")
        assert jobs.name_of(jobs.settings_of(jobs.config_of(tmp_path))) == identified(*overrides)[0], overrides


HOLD = """
import sys, pathlib
from gpt.files import directory
with directory.owned(pathlib.Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_a_running_job_whose_process_has_gone_is_interrupted(tmp_path):
    job = sweep_job(tmp_path, 0, JOB, [5.0], status="running")
    assert job.status == "interrupted"  # nobody holds the folder
    command = [sys.executable, "-c", HOLD, str(job.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "mine\n"
        assert jobs.read_one(job.folder).status == "running"
        for status in ("completed", "failed", "halved", "stopped"):  # said by the job itself
            jobs.write(replace(job, status=status))
            assert jobs.read_one(job.folder).status == status
        jobs.write(replace(job, status="running"))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert [job.status for job in jobs.read(tmp_path)] == ["interrupted"]
    assert jobs.load(job.folder).status == "running"  # reading changes nothing


def typed(number, *overrides, **config):
    """A job; `config` with __ for the dots of keys."""
    return Job(ROOT / f"{number}", number, list(overrides), {key.replace("__", "."): v for key, v in config.items()})


def test_what_was_typed_and_differs_is_varied_in_the_order_of_typing():
    found = [
        typed(0, "data=sample", "optimizer.lr=1e-3", "seed=1", optimizer__lr=0.001, seed=1, model__n_layer=2),
        typed(1, "data=sample", "optimizer.lr=3e-3", "seed=1", optimizer__lr=0.003, seed=1, model__n_layer=2),
        typed(2, "data=sample", "optimizer.lr=1e-3", "seed=2", optimizer__lr=0.001, seed=2, model__n_layer=2),
    ]
    assert jobs.varied_keys(found) == ["optimizer.lr", "seed"]
    assert jobs.describe(found[1], ["optimizer.lr", "seed"]) == "optimizer.lr=0.003 seed=1"
    assert jobs.varied_keys(found[:1]) == jobs.varied_keys([]) == []


def test_numbers_that_are_typed_differently_and_are_the_same_do_not_vary():
    found = [
        typed(0, "optimizer.lr=1e-3", "seed=1", optimizer__lr=0.001, seed=1),
        typed(1, "optimizer.lr=0.001", "seed=2", optimizer__lr=0.001, seed=2),
    ]
    assert jobs.varied_keys(found) == ["seed"]


def test_the_choice_of_a_file_is_one_key_and_not_all_of_its_settings():
    tiny = {"model__name": "tiny", "model__n_layer": 4, "model__n_embd": 128, "seed": 1}
    mini = {"model__name": "mini", "model__n_layer": 6, "model__n_embd": 384, "seed": 1}
    found = [
        typed(0, "model=mini", "seed=1", **mini),
        typed(1, "model=tiny", "seed=1", **tiny),
        typed(2, "model=tiny", "seed=2", **tiny | {"seed": 2}),
    ]
    assert jobs.varied_keys(found) == ["model", "seed"]
    assert [job.setting("model") for job in found] == ["mini", "tiny", "tiny"]
    assert jobs.describe(found[0], ["model", "seed"]) == "model=mini seed=1"
    assert found[0].setting("model.n_layer") == 6 and found[0].setting("nothing") is None


def test_a_file_that_changed_between_two_starts_is_found_by_its_own_key():
    found = [
        typed(0, "model=tiny", "seed=1", model__n_layer=4, model__n_embd=128, seed=1),
        typed(1, "model=mini", "seed=1", model__n_layer=6, model__n_embd=384, seed=1),
        typed(2, "model=tiny", "seed=1", model__n_layer=5, model__n_embd=128, seed=1),
    ]
    assert jobs.varied_keys(found) == ["model", "model.n_layer"]
    assert len({tuple(job.setting(key) for key in ("model", "model.n_layer")) for job in found}) == 3


def test_settings_that_one_job_lacks_vary_and_those_of_sweep_wandb_and_hydra_do_not():
    found = [
        typed(0, "sweep.name=a", "wandb.mode=online", "hydra.job.num=1", "optimizer=sgd", optimizer__momentum=0.9),
        typed(1, "sweep.name=b", "wandb.mode=offline", "hydra.job.num=2", "optimizer=sgd"),
    ]
    assert jobs.varied_keys(found) == ["optimizer.momentum"]
    assert [jobs.describe(job, ["optimizer.momentum"]) for job in found] == [
        "optimizer.momentum=0.9", "optimizer.momentum=null",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"), (True, "true"), (False, "false"), (0.001, "0.001"), (3e-05, "3e-05"), (64, "64"),
        (math.nan, "nan"), ("mini", "mini"), ("a\x1b[31m\nb", "a\\x1b[31m\\nb"), ([1, 2], "[1, 2]"),
    ],
)  # fmt: skip
def test_a_setting_is_shown_as_one_types_it(value, text):
    assert jobs.as_text(value) == text


@pytest.mark.parametrize(
    ("override", "key"), [("a.b=1", "a.b"), ("+a=x=y", "a"), ("++a=1", "a"), ("~a.b", "a.b"), ("~a=1", "a")]
)
def test_the_key_of_an_override(override, key):
    assert jobs.override_key(override) == key
