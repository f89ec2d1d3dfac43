"""A kind of evaluation is a file of code and one of values."""

from dataclasses import fields

import yaml
from conftest import ROOT
from hydra import compose, initialize_config_dir
from test_launch import composed

from gpt.config import launch, value_errors
from gpt.evaluation.registry import kinds
from gpt.evaluation.settings import EvaluateConfig


def test_each_kind_has_its_values_and_offers_all_that_is_asked_of_it():
    assert {path.stem for path in (ROOT / "conf" / "evaluate").glob("*.yaml")} == kinds().keys()
    for name, kind in kinds().items():
        values = yaml.safe_load((ROOT / "conf" / "evaluate" / f"{name}.yaml").read_text())
        assert values.keys() == {field.name for field in fields(kind)}
        offered = ("batches", "compute", "finish", "measures", "remarks")
        assert all(callable(getattr(kind, method)) for method in offered)


def test_one_kind_and_several_compose_and_are_typed():
    for typed, expected in (("answers", {"answers"}), ("[loss,choice]", {"loss", "choice"})):
        cfg = composed("checkpoint=x", f"evaluate={typed}", script="evaluate")
        assert value_errors.find_errors(cfg, EvaluateConfig) == []
        assert launch.to_dataclass(cfg, EvaluateConfig).chosen.keys() == expected


def test_a_data_set_may_be_chosen_and_is_none_at_first():
    cfg = launch.to_dataclass(composed("checkpoint=x", script="evaluate"), EvaluateConfig)
    assert cfg.data is None
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        names = compose("evaluate", overrides=["checkpoint=x", "data=sample"])
    assert names.data.kind == "qa"
    cfg = launch.to_dataclass(composed("checkpoint=x", "data=sample", script="evaluate"), EvaluateConfig)
    assert (cfg.data.name, cfg.data.kind) == ("sample", "qa")
