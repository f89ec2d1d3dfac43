"""A run goes on by its folder alone: config.yaml has its settings, and is read as data."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, modern_config, muon_config
from hydra import compose, initialize_config_dir

from gpt.config import arguments, launch, run_settings
from gpt.config.schema import TrainConfig, as_dict
from gpt.errors import UserError
from gpt.sweeps import composition


def started(*typed: str) -> TrainConfig:
    """The settings of `python train.py *typed`."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", arguments.prepare(list(typed), "train", launch.architecture), return_hydra_config=True)
    return launch.validated(composition.without_hydra(cfg), TrainConfig)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of the muon optimizer that has a checkpoint."""
    (tmp_path / "run" / "checkpoints" / "step_00000003").mkdir(parents=True)
    typed = ["model.n_layer=3", "optimizer=muon", "optimizer.lr=0.03", "finetune=lora", "init.from=gpt2", "model=mini"]
    first = started(*typed, "schedule=linear", "train.max_steps=7", "wandb.mode=disabled", f"out_dir={tmp_path}/run")
    launch.save(first, tmp_path / "run" / "config.yaml")
    return tmp_path / "run"


def changed(run_dir: Path, **sections) -> None:
    """Edits config.yaml; None for a section removes it."""
    values = yaml.safe_load((run_dir / "config.yaml").read_text())
    for name, value in sections.items():
        values[name] = values.get(name, {}) | value if isinstance(value, dict) else value
    (run_dir / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))


def test_the_folder_alone_gives_all_settings_and_a_typed_value_or_group_changes_its_own_only(run_dir):
    before = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert as_dict(started(f"out_dir={run_dir}")) | {"overrides": []} == before | {"overrides": []}
    longer = started(f"out_dir={run_dir}", "train.max_steps=9", "finetune.rank=2")
    assert (longer.train.max_steps, longer.finetune.rank, longer.optimizer.lr) == (9, 2, 0.03)
    assert "finetune.rank=2" in longer.overrides and "train.max_steps=7" not in longer.overrides
    other = started(f"out_dir={run_dir}", "model=small", "optimizer=adamw")
    assert (other.model.n_layer, other.model.name, other.optimizer.name) == (12, "small", "adamw")
    assert other.schedule.name == "linear" and other.train == started(f"out_dir={run_dir}").train


def test_processes_share_a_run_as_before_unless_another_way_is_typed(run_dir):
    """Its folder alone goes on with fsdp: with ddp, a model may not fit."""
    changed(run_dir, parallel={"name": "fsdp", "step_timeout": 7.0})
    again, other = (started(f"out_dir={run_dir}", *typed).parallel for typed in ([], ["parallel=ddp"]))
    assert (again.name, again.step_timeout) == ("fsdp", 7.0)
    assert (other.name, other.step_timeout) == ("ddp", 20.0)
    assert started(f"out_dir={run_dir}", "parallel.step_timeout=5").parallel.step_timeout == 5
    changed(run_dir, parallel=None)  # as before there was such a section
    assert started(f"out_dir={run_dir}").parallel.name == "auto"
    assert started(f"out_dir={run_dir}", "parallel=fsdp").parallel.name == "fsdp"


def test_what_is_of_one_start_is_not_taken_over(run_dir):
    changed(
        run_dir,
        resume="never",
        dry_run=True,
        report="runs",
        allow_changed=["seed"],
        sweep={"name": "first", "pause_at": 100},
    )
    cfg = started(f"out_dir={run_dir}")
    assert (cfg.resume, cfg.dry_run, cfg.report, cfg.allow_changed) == ("auto", False, None, [])
    assert (cfg.sweep.name, cfg.sweep.pause_at) == ("first", None)


def test_a_typed_budget_replaces_the_budgets_of_the_run_that_would_go_before_it(run_dir):
    def budgets(*typed):
        train = started(f"out_dir={run_dir}", *typed).train
        return train.max_steps, train.max_epochs

    assert budgets("seed=3") == budgets("train.max_tokens=null") == (7, None)
    assert budgets("train.max_tokens=5000") == (None, None)
    assert budgets("train.max_epochs=2") == (None, 2)
    changed(run_dir, train={"max_epochs": 1})
    assert budgets("train.max_steps=900") == (900, None)


def test_a_number_that_was_edited_by_hand_is_read_as_in_conf(run_dir):
    text = (run_dir / "config.yaml").read_text().replace("project: gpt-lab", "project: 2026-01-31")
    (run_dir / "config.yaml").write_text(text.replace("lr: 0.03", "lr: 3e-4"))
    cfg = started(f"out_dir={run_dir}")
    assert (cfg.optimizer.lr, cfg.wandb.project) == (3e-4, "2026-01-31")


@pytest.mark.parametrize("typed", [["debug=fast"], ["-m", "seed=1,2"], ["experiments=lr_vs_context"]])
def test_where_no_run_is_meant_nothing_is_taken(run_dir, tmp_path, typed):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("mine: 1")
    assert run_settings.choices([f"out_dir={tmp_path / 'mine'}"]) == []
    assert run_settings.choices([f"out_dir={tmp_path / 'new'}"]) == []
    assert run_settings.choices([f"out_dir={run_dir}", *typed]) == []


def test_an_older_file_has_todays_values_for_what_came_later_and_else_says_what_to_type(run_dir):
    values = yaml.safe_load((run_dir / "config.yaml").read_text())
    del values["objective"], values["train"]["max_skipped"], values["data"]["delimiter"], values["model"]["family"]
    values["sweep"]["gone"], values["gone"] = 1, {"x": 2}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values))
    came_later = "nesterov scale orthogonalization cautious_decay momentum_warmup second_moment centred_head"
    for key in came_later.split():
        del values["optimizer"][key]
    for kind in ("embedding", "head", "scalar"):
        del values["optimizer"][f"{kind}_lr"]
    del values["schedule"]["window_warmup"], values["schedule"]["window_start"]
    del values["train"]["ema"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values))
    again = started(f"out_dir={run_dir}")
    assert again.objective.name == "next_token" and again.train.ema is None
    assert again.optimizer == muon_config(lr=0.03)
    del values["model"]["gelu"], values["optimizer"]["momentum"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(
        UserError, match=r"lack model.gelu, optimizer.momentum, .*type them, as in model.gelu="
    ) as error:
        started(f"out_dir={run_dir}")
    assert error.value.code == 2
    assert started(f"out_dir={run_dir}", "model.gelu=tanh", "optimizer=muon").model.n_layer == 3


def test_a_run_of_before_a_key_of_its_family_goes_on_as_it_was(run_dir):
    changed(run_dir, model=vars(modern_config()), finetune=None)
    values = yaml.safe_load((run_dir / "config.yaml").read_text())
    del values["model"]["induction"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values))
    assert started(f"out_dir={run_dir}").model.induction is False


def test_what_a_file_would_read_from_the_environment_is_refused_until_its_user_types_it(run_dir, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    changed(run_dir, wandb={"project": "${oc.env:SECRET}", "tags": ["x", "${oc.env:SECRET}"]})
    with pytest.raises(UserError, match=r"wandb.project, wandb.tags: .* typed again") as error:
        started(f"out_dir={run_dir}", "seed=3")
    assert "hunter2" not in str(error.value)
    assert started(f"out_dir={run_dir}", "wandb.project=mine", "wandb.tags=[a]").wandb.project == "mine"
    changed(run_dir, overrides=["data.path=${oc.env:SECRET}"], wandb={"project": "p", "tags": []})
    assert started(f"out_dir={run_dir}").overrides == []


def test_a_file_may_switch_wandb_off_and_not_on(run_dir):
    assert started(f"out_dir={run_dir}").wandb.mode == "disabled"
    changed(run_dir, wandb={"mode": "online"})
    assert started(f"out_dir={run_dir}").wandb.mode == "auto"
    assert "wandb.mode=online" in launch.resume_command(started(f"out_dir={run_dir}", "wandb.mode=online"))


def test_the_command_that_goes_on_is_the_folder_and_what_comes_from_the_environment(run_dir, monkeypatch):
    assert launch.resume_command(started(f"out_dir={run_dir}")).endswith(f"train.py out_dir={run_dir}")
    monkeypatch.setenv("TEAM", "blue")
    cfg = started(f"out_dir={run_dir}", "wandb.entity=${oc.env:TEAM}")
    assert launch.resume_command(cfg).endswith(f"train.py 'wandb.entity=${{oc.env:TEAM}}' out_dir={run_dir}")


@pytest.mark.parametrize(
    "content",
    [b"", b"- a", b"a: [", b"\xff", b"[" * 100_000, b"a: &a [1]\nb: *a", b"a: !!python/name:os.system x",
     b"a: !!python/object/apply:pathlib.Path [x]", b"#" * 2**21],
    ids=range(9),
)  # fmt: skip
def test_a_file_that_is_no_settings_is_refused(run_dir, content):
    (run_dir / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"not the settings of a run.*remove it, and type"):
        run_settings.choices([f"out_dir={run_dir}"])


def test_nothing_in_a_strangers_file_is_executed(run_dir, tmp_path):
    touched = tmp_path / "touched"
    call = {"_target_": "pathlib.Path.touch", "self": str(touched)}
    hydra = {"callbacks": {"x": call}, "job": {"env_set": {"PROBE": "1"}}, "run": {"dir": str(tmp_path / "elsewhere")}}
    changed(run_dir, hydra=hydra, defaults=[{"x": "y"}], _target_="os.system", seed="x", data=call)
    program = [sys.executable, str(ROOT / "train.py"), f"out_dir={run_dir}"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: seed=x: ") and done.stderr.count("\n") == 1, done
    assert not touched.exists() and not (tmp_path / "elsewhere").exists()
