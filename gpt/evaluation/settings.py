"""Defines the type and the allowed range of everything that `evaluate.py` reads. No torch."""

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from gpt.config.data import DataConfig, TemplateName
from gpt.config.fields import Count, DeviceName, PrecisionName, Seed, Text, Threads, section
from gpt.config.schema import KnownConfig, WandbConfig
from gpt.evaluation.registry import kinds

# A section for each kind, None for one that is not chosen.
Kinds = section(type("Kinds", (), {"__annotations__": {name: kind | None for name, kind in kinds().items()},
                                   **dict.fromkeys(kinds())}))  # fmt: skip


def _if_chosen(values: Any) -> Any:
    """Where no data is chosen, conf/evaluate.yaml has no more of it than a name."""
    return None if isinstance(values, dict) and set(values) == {"name"} else values


@section
class EvaluateConfig:
    """Everything that `evaluate.py` reads."""

    evaluate: Kinds
    checkpoint: Text | None
    compare: list[Text]
    checkpoints: Literal["best", "all"]
    model: KnownConfig
    data: Annotated[DataConfig | None, BeforeValidator(_if_chosen)]
    part: Literal["train", "val", "test"]
    file: Text | None
    n_questions: Count | None
    template: TemplateName | None
    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=100)] | None
    batch_size: Count
    resamples: Annotated[Count, Field(ge=100)]
    seed: Seed
    wandb: WandbConfig
    precision: PrecisionName | None
    device: DeviceName
    threads: Threads | None

    @property
    def chosen(self) -> dict[str, Any]:
        """The kinds that are evaluated, with their settings."""
        every = {field.name: getattr(self.evaluate, field.name) for field in fields(self.evaluate)}
        return {name: kind for name, kind in every.items() if kind is not None}
