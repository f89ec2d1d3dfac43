"""Values that a configuration reads from the environment are used and not stored."""

import pytest
from omegaconf import OmegaConf
from test_launch import composed

from gpt.config import launch
from gpt.config.environment import unresolved
from gpt.config.schema import TrainConfig, as_dict


@pytest.fixture
def entity(monkeypatch):
    monkeypatch.setenv("TEAM", "s3cret")
    cfg = composed("wandb.entity=${oc.env:TEAM}", "wandb.tags=[a,${oc.env:TEAM}]", "wandb.group=by-${wandb.entity}")
    return launch.to_dataclass(cfg, TrainConfig)


def test_the_value_is_used(entity):
    assert (entity.wandb.entity, entity.wandb.tags, entity.wandb.group) == ("s3cret", ["a", "s3cret"], "by-s3cret")


def test_the_text_of_the_interpolation_is_stored(entity):
    stored = as_dict(entity)
    assert "s3cret" not in str(stored) and "unresolved" not in stored
    assert stored["wandb"]["entity"] == "${oc.env:TEAM}" and stored["wandb"]["tags"] == ["a", "${oc.env:TEAM}"]
    assert stored["wandb"]["group"] == "by-${wandb.entity}"


def test_what_does_not_come_from_the_environment_is_stored_as_it_is(monkeypatch):
    monkeypatch.setenv("WIDTH", "64")
    cfg = OmegaConf.create(
        {"a": "${oc.env:WIDTH}", "b": 3, "c": "${b}", "d": {"e": "${a}"}, "f": "???", "g": "${nope}"}
    )
    assert unresolved(cfg) == {"a": "${oc.env:WIDTH}", "d.e": "${a}"}
