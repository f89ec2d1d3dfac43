"""`report=`: the list of all runs, and the comparison of some of them, beside runs that are broken or are none."""

import json

import pytest
import yaml
from conftest import sweep_job

from gpt.errors import UserError
from gpt.files.jsonl import RowFile
from gpt.sweeps import comparison

NAMES = {"model": "tiny", "data": "sample", "optimizer": "adamw"}


def add_run(folder, losses, fingerprint="f" * 64, typed=(), **settings):
    """A run's folder as train.py leaves it, with an evaluation every 1,000 tokens."""
    names = NAMES | {key: settings.pop(key) for key in list(settings) if key in NAMES}
    values = {group: {"name": name} for group, name in names.items()}
    values["optimizer"] |= {"lr": settings.pop("lr", 1e-3)}
    values |= {"train": {"max_steps": 30} | settings, "seed": 1, "overrides": list(typed), "out_dir": str(folder)}
    checkpoint = folder / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    (checkpoint / "config.json").write_text(json.dumps({"data": {"fingerprint": fingerprint}}))
    (folder / "last_model.pt").touch()
    rows = [{"step": 10 * i, "tokens": 1000 * i, "val/loss": loss, "val/bpb": 1.0} for i, loss in enumerate(losses)]
    RowFile(folder / "metrics.jsonl").append(rows)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Three runs, of which one is on other data, a sweep, and what is damaged or foreign."""
    outputs = tmp_path_factory.mktemp("project") / "outputs"
    runs = outputs / "runs"
    add_run(
        runs / "mine", [10.8, 7.0, 6.0], typed=["optimizer.lr=0.001", f"out_dir={runs / 'mine'}", "wandb.mode=offline"]
    )
    add_run(runs / "other", [10.8, 6.5, 5.5], lr=3e-3, typed=["optimizer.lr=3e-3", "train.max_steps=30"])
    add_run(runs / "on other data", [10.8, 3.0], fingerprint="e" * 64, model="mini")
    sweep_job(outputs / "sweeps" / "first", 0, {"optimizer.lr": 0.01, "seed": 1}, [10.8, 8.0], fingerprint="f" * 64)
    (runs / "foreign").mkdir()
    (runs / "foreign" / "notes.txt").write_text("mine")
    (runs / "broken").mkdir()
    (runs / "broken" / "config.yaml").write_text("{torn: [\x1b")
    (runs / "broken" / "metrics.jsonl").write_bytes(b"\xff\x00{torn\n[]\n")
    (runs / "hostile\x1b[31m" / "checkpoints" / "step_00000001").mkdir(parents=True)
    (runs / "hostile\x1b[31m" / "checkpoints" / "step_00000001" / "config.json").write_text("[")
    return outputs


def answer(outputs, monkeypatch, *names, columns=160):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(outputs.parent)
    return comparison.answer(names, outputs / "sweeps", outputs)


def test_all_runs_are_listed_and_neither_broken_nor_foreign_folders_stop_it(outputs, monkeypatch, capsys):
    assert answer(outputs, monkeypatch, "runs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "data", "lr", "steps", "val/loss", "status", "folder", "W&B"]
    rows = {line.split("outputs/")[1].strip(): line.split() for line in lines if "outputs/" in line}
    assert len(rows) == 6 and "runs/foreign" not in rows and "runs/hostile\\x1b[31m" in rows
    assert rows["runs/mine"][:-1] == ["tiny", "sample", "ffff", "0.001", "20", "6.000", "completed"]
    assert rows["runs/on other data"][:3] == ["mini", "sample", "eeee"]  # prepared differently
    assert rows["runs/broken"][0] == "?" and any(name.startswith("sweeps/first/") for name in rows)
    assert "val/loss can be compared between runs on the same data only." in lines
    answer(outputs, monkeypatch, "runs", columns=60)
    narrow = capsys.readouterr().out.splitlines()
    assert "outputs/runs/mine" in " ".join(narrow) and max(map(len, narrow)) <= 60


def test_no_run_at_all_is_said(tmp_path, capsys):
    comparison.show_runs(tmp_path / "outputs")
    assert capsys.readouterr().out == f"no run yet ({tmp_path / 'outputs'})\n"


def test_runs_are_compared_by_what_differs_and_nothing_is_written_into_them(outputs, monkeypatch, capsys):
    before = sorted((outputs / "runs").rglob("*"))
    assert (
        answer(outputs, monkeypatch, "outputs/runs/mine", "other") == 0
    )  # a path from here, or a name in outputs/runs
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert ["lr", "0.003", "0.001"] in [line.split() for line in lines]
    assert [line.split()[-1] for line in lines if line[:1] in "12" and line] == ["other", "mine"]
    assert "The best is optimizer.lr=0.003: val/loss 5.5000" in text
    assert "generate from it: " in text and "checkpoint=outputs/runs/other" in text
    (directory,) = (outputs / "reports").glob("mine_other_*")
    assert lines[-1] == f"report: {directory / 'report.html'}"
    page = (directory / "report.html").read_text()
    assert "<h1>Runs mine, other</h1>" in page and "mine optimizer.lr=0.001" in page and "The sweep again" not in page
    assert f"report=[{outputs / 'runs' / 'mine'},{outputs / 'runs' / 'other'}]" in page
    assert (directory / "curves.png").stat().st_size > 1000
    assert sorted((outputs / "runs").rglob("*")) == before


def test_runs_on_different_data_have_no_best(outputs, monkeypatch, capsys):
    answer(outputs, monkeypatch, "mine", "on other data", "first")  # of a sweep, all jobs
    text = capsys.readouterr().out
    assert "These runs are not on the same data: none is the best." in text
    assert "The prepared data differs, 2 on that of mine; 1 on that of on other data" in text
    assert "best job" not in text and len([line for line in text.splitlines() if line[:1] in ("1", "2", "3")]) == 3


def test_two_runs_of_the_same_settings_are_not_two_seeds(outputs, monkeypatch, capsys, tmp_path):
    add_run(tmp_path / "again", [10.8, 7.0, 6.1])
    add_run(tmp_path / "once", [10.8, 7.0, 6.0])
    values = yaml.safe_load((tmp_path / "once" / "config.yaml").read_text())
    (tmp_path / "once" / "config.yaml").write_text(yaml.safe_dump(dict(reversed(values.items())), sort_keys=False))
    (tmp_path / "link").symlink_to(tmp_path / "again")
    answer(outputs, monkeypatch, *(str(tmp_path / name) for name in ("link", "again", "once")))
    text = capsys.readouterr().out
    assert "The best is run=once: val/loss 6.0000, 1 seed." in text and "run=link" not in text


def test_settings_of_a_strangers_run_that_stand_for_gigabytes_are_not_read(outputs, monkeypatch, capsys, tmp_path):
    add_run(tmp_path / "bomb", [10.8, 7.0])
    lines = [f"a{i}: &a{i} {{" + ", ".join(f"k{j}: *a{i - 1}" for j in range(9)) + "}" for i in range(1, 9)]
    (tmp_path / "bomb" / "config.yaml").write_text("a0: &a0 x\n" + "\n".join(lines) + "\nmodel: *a8\n")
    answer(outputs, monkeypatch, str(tmp_path / "bomb"), "mine")
    assert "val/loss 6.0000" in capsys.readouterr().out


def test_a_name_of_nothing_is_one_line(outputs, monkeypatch):
    for name in ("frist", "outputs/runs/foreign", "a\0b"):
        with pytest.raises(UserError, match=r"no run and no sweep is called .*; report=runs lists them") as caught:
            answer(outputs, monkeypatch, name)
        assert caught.value.code == 2
