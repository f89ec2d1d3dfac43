"""Every file under conf/ and experiments/ composes, is typed, and builds what it describes."""

import pytest
import torch
import yaml
from conftest import NO_SOAP, ROOT
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from test_launch import composed

from gpt import optim
from gpt.config import launch, schema, value_errors
from gpt.config.families import model_class
from gpt.config.schema import as_dict
from gpt.model import GPT
from gpt.prompts import TEMPLATES

CONF = ROOT / "conf"
PRETRAINED = {"pretrained", "pretrained_modern"}


def choices(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def choice(override):
    """What to type for a choice; two of them need weights to read their values from."""
    weights = {"model=pretrained": "tensorflow/tiny", "model=pretrained_modern": "qwen3"}
    return [
        override,
        *(f"init.from={ROOT / 'tests/golden' / name}" for key, name in weights.items() if key == override),
    ]


def loaded(*overrides):
    cfg = composed(*overrides)
    assert value_errors.find_errors(cfg, schema.TrainConfig) == []
    return launch.to_dataclass(cfg, schema.TrainConfig)


def test_the_groups_hold_what_the_readme_promises():
    modern = {"modern_tiny", "modern_mini", "modern_small"}
    assert set(choices("model")) == {"tiny", "mini", "small", "medium", "large", "xl"} | modern | PRETRAINED
    assert set(choices("finetune")) == {"full", "lora", "last_blocks"}
    assert set(choices("data")) == {"sample", "medquad", "helpsteer", "alpaca", "text"}
    assert set(choices("schedule")) == optim.CURVES.keys()


@pytest.mark.parametrize(
    "override",
    [
        f"{group}={name}"
        for group in ("model", "data", "optimizer", "schedule", "finetune", "parallel", "debug")
        for name in choices(group)
    ],
)
def test_each_choice_composes_and_is_typed(override):
    group, name = override.split("=")
    cfg = loaded(*choice(override))
    if group != "debug" and name not in PRETRAINED:
        assert getattr(cfg, group).name == name


def test_runs_of_debug_have_a_folder_of_their_own_so_that_they_can_be_removed():
    for name in choices("debug"):
        assert "out_dir: outputs/debug/${launch_id:}" in (CONF / "debug" / f"{name}.yaml").read_text()


def test_fine_tuning_has_a_lower_learning_rate_than_training_from_scratch():
    for name in choices("finetune"):
        assert loaded(f"finetune={name}").optimizer.lr < loaded().optimizer.lr / 4


@pytest.mark.parametrize("name", choices("model"))
def test_each_model_is_built(name):
    cfg = loaded(*choice(f"model={name}")).model
    with torch.device("meta"):
        model_class(cfg.family)(cfg, 50257)


@pytest.mark.parametrize(
    "optimizer", [pytest.param(name, marks=NO_SOAP if name == "soap" else ()) for name in choices("optimizer")]
)
@pytest.mark.parametrize("schedule", choices("schedule"))
def test_each_optimizer_goes_with_each_schedule(optimizer, schedule):
    cfg = loaded(f"optimizer={optimizer}", f"schedule={schedule}", "model.n_layer=1", "model.n_embd=8")
    built = optim.build(GPT(cfg.model, 20), cfg.optimizer)
    optim.set_lr(built, optim.lr_factor(cfg.schedule, 50, 100))


@pytest.mark.parametrize("name", choices("data"))
def test_each_data_set_names_its_licence_and_its_prompts(name):
    cfg = loaded(f"data={name}").data
    assert cfg.card.license and cfg.prompts and cfg.template in TEMPLATES


@pytest.mark.parametrize(
    ("script", "overrides"),
    [("generate", ["checkpoint=x", "prompt=y"]), ("prepare_data", []), ("evaluate", ["checkpoint=x"])],
)
def test_the_other_scripts_configurations_are_typed(script, overrides):
    assert value_errors.find_errors(composed(*overrides, script=script), launch.schema_of(script)) == []


YAML = sorted((ROOT / "experiments").rglob("*.yaml"))
STUDIES = [path for path in YAML if path.parent.name not in ("wandb", "tasks")]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_each_experiment_changes_known_keys_and_sweeps_over_known_keys(path):
    assert path.read_text().startswith("# @package _global_\n")  # anything above it makes Hydra ignore it silently
    values = yaml.safe_load(path.read_text())
    axes = values.pop("hydra", {"sweeper": {"params": {}}})["sweeper"]["params"]
    chosen = [line for line in values.pop("defaults", []) if line != "_self_"]
    pairs = [item for line in chosen for item in ({"experiments": line} if isinstance(line, str) else line).items()]
    chosen = [f"{key.removeprefix('override /')}={name}" for key, name in pairs]
    base = as_dict(loaded(*chosen))
    for section, changes in values.items():
        assert section in base and (not isinstance(changes, dict) or changes.keys() <= base[section].keys())
    first = [f"{key}={str(axis).split(',')[0]}" for key, axis in axes.items()]
    last = [f"{key}={str(axis).split(',')[-1]}" for key, axis in axes.items()]
    assert not axes or loaded(*chosen, *first) != loaded(*chosen, *last)
    is_alone = path.parent.name == "experiments"
    record = path.parent / path.stem if is_alone else path.parent  # of what was learned
    assert (record / "README.md").exists()


def test_an_experiment_is_composed_by_name_and_brings_its_own_axes():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=["experiments=lr_vs_context"], return_hydra_config=True)
    assert cfg.hydra.mode == RunMode.MULTIRUN
    n_values = {key: len(axis.split(",")) for key, axis in cfg.hydra.sweeper.params.items()}
    assert n_values == {"model.context_length": 3, "optimizer.lr": 4, "seed": 2}
    assert (cfg.model.name, cfg.data.name, cfg.sweep.name) == ("mini", "medquad", "lr_vs_context")
    assert (cfg.train.max_tokens, cfg.model.dropout, cfg.optimizer.name) == (65_536, 0.0, "adamw")


def test_the_tiny_model_is_the_default_on_the_sample_data():
    cfg = loaded()
    assert (cfg.model.name, cfg.data.name) == ("tiny", "sample")


def test_mini_has_six_layers_384_wide_with_six_heads_and_a_context_of_256():
    model = loaded("model=mini").model
    assert (model.n_layer, model.n_embd, model.n_head, model.context_length) == (6, 384, 6, 256)


def test_a_copy_of_a_model_or_of_a_data_set_is_called_by_its_own_file_name(tmp_path):
    for copied in ("model/mini", "data/alpaca"):
        (tmp_path / copied).parent.mkdir()
        for name in ("mine", "deep/mine"):
            copy = (tmp_path / copied).parent / f"{name}.yaml"
            copy.parent.mkdir(exist_ok=True)
            copy.write_text((CONF / f"{copied}.yaml").read_text())
    search = f"hydra.searchpath=[file://{tmp_path}]"
    cfg = launch.to_dataclass(composed(search, "model=mine", "data=mine"), schema.TrainConfig)
    assert (cfg.model.name, cfg.data.name) == ("mine", "mine")
    assert cfg.data.prepared_dir == str(ROOT / "outputs" / "data" / "mine")
    cfg = launch.to_dataclass(composed(search, "model=deep/mine", "data.name=typed"), schema.TrainConfig)
    assert (cfg.model.name, cfg.data.name) == ("deep_mine", "typed")
    cfg = composed(search, "data=deep/mine", script="prepare_data")
    assert cfg.data.prepared_dir == "outputs/data/deep_mine"
