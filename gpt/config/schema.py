"""Defines the type and the allowed range of every configuration value. Values themselves live in conf/ only.

Nothing here imports torch, so that a wrong value is reported before the two seconds that torch takes to load. The
modules import their section from here; gpt/config/launch.py turns a composed Hydra config into one of the three
scripts' dataclasses at the bottom.
"""

import dataclasses
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from gpt.config.data import DISCLAIMER, DataConfig, TemplateName
from gpt.config.families import AnyModelConfig
from gpt.config.fields import (
    BelowOne,
    Count,
    CountOrAuto,
    DeviceName,
    Distinct,
    Flag,
    FlagOrAuto,
    Float,
    NonNegative,
    Positive,
    PositiveFraction,
    PrecisionName,
    Rising,
    Seed,
    Text,
    Threads,
    Variants,
    Whole,
    section,
    variants,
    with_texts,
)
from gpt.config.optimizers import OptimizerConfig
from gpt.config.places import stored, with_paths
from gpt.config.schedules import ScheduleConfig

METRIC = "val/loss"  # what is minimised: it decides the best checkpoint, when to stop early, and every leaderboard
MEAN_METRIC = f"{METRIC}_ema"  # the same of the mean of the weights, with train.ema; it decides nothing


@section
class InitConfig:
    """Where the first weights come from: None, random ones; else what gpt/weights/weight_files.py can read."""

    from_: Annotated[Text | None, Field(alias="from")]  # `from` is a keyword of Python
    revision: Text | None


Targets = Annotated[list[Text], Field(min_length=1), Distinct]  # of the linear layers that the family names


@section
class LoRAConfig:
    """Which linear layers of each block have an adapter, and how wide it is. See gpt/lora.py."""

    rank: Count
    alpha: Positive
    targets: Targets


@section
class FullFinetuneConfig:
    """All weights are trained. See gpt/finetune.py, also for the other two."""

    name: Literal["full"]
    layer_decay: PositiveFraction

    lora: ClassVar[None] = None


@section
class LoRAFinetuneConfig:
    """Only adapters are trained."""

    name: Literal["lora"]
    layer_decay: PositiveFraction
    rank: Count
    alpha: Positive
    targets: Targets

    @property
    def lora(self) -> LoRAConfig:
        return LoRAConfig(self.rank, self.alpha, self.targets)


@section
class LastBlocksConfig:
    """Only the last blocks and the final norm are trained."""

    name: Literal["last_blocks"]
    layer_decay: PositiveFraction
    n_blocks: Count

    lora: ClassVar[None] = None


FinetuneConfig = variants(FullFinetuneConfig | LoRAFinetuneConfig | LastBlocksConfig, "name")


@section
class TrainSection:
    """Budget, batch size and rhythm of a run. All intervals are in optimizer steps."""

    max_steps: Count | None
    max_epochs: Count | None
    max_tokens: Count | None
    tokens_per_step: Count
    micro_batch: CountOrAuto
    grad_clip: Positive | None
    eval_every: Count
    eval_tokens: Count
    log_every: Count
    sample_every: Count | None
    save_every: Count
    keep_checkpoints: Count
    patience: Count | None
    max_skipped: Whole
    one_batch: Flag
    dtype: Literal["auto", "float32", "tf32", "bfloat16", "float16"]
    compile: FlagOrAuto
    gradient_checkpointing: Flag
    ema: BelowOne | None

    def rows_per_step(self, context_length: int) -> int:
        """Rows of `context_length` tokens in an optimizer step: as many as come nearest to `tokens_per_step`."""
        return max(1, round(self.tokens_per_step / context_length))


@section
class ParallelConfig:
    """How several processes share a run, and how many seconds they wait for each other. See gpt/machine/ranks.py."""

    name: Literal["auto", "ddp", "fsdp"]
    step_timeout: Positive
    start_timeout: Positive


@section
class SampleConfig:
    """How text is drawn from the model while it trains."""

    references: Whole
    max_new_tokens: Count
    temperature: NonNegative
    top_k: Count | None
    top_p: PositiveFraction | None


@section
class WandbConfig:
    """The mirror of the run in Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"]
    project: Text
    entity: Text | None
    group: Text | None
    tags: list[Text]
    log_model: Literal["none", "best", "last", "all"]


# One name, or a list of them.
Names = Annotated[list[Text], Field(min_length=1), BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
SweepName = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]


@section
class SweepConfig:
    """The sweep that a run belongs to: `name` is None outside one, and names a folder and the W&B group."""

    name: SweepName | None
    rungs: Annotated[list[Count], Rising]  # budgets in tokens at which only the best jobs go on
    keep: Annotated[Float, Field(gt=0, lt=1)]  # the part of them that does
    pause_at: Count | None  # tokens, set for each job by the sweep that it is part of

    def pauses_after(self, row: dict[str, Any]) -> bool:
        """Whether a job stops at this row of metrics: at its first evaluation with so many tokens."""
        return self.pause_at is not None and METRIC in row and row["tokens"] >= self.pause_at


# One of gpt/objective.py's, which stands above this file: its settings are the fields of its class.
AnyObjective = Annotated[Any, Variants("name", lambda: import_module("gpt.objective").OBJECTIVES)]


def _check_kinds(names: list[str]) -> list[str]:
    known = import_module("gpt.evaluation.registry").kinds() if names else {}
    for name in names:
        if name not in known:
            raise PydanticCustomError("kind", f"{name} is not one of {', '.join(known)}")
    return names


@section
class TrainConfig:
    """Everything that `train.py` reads."""

    model: AnyModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    objective: AnyObjective
    init: InitConfig
    finetune: FinetuneConfig | None
    train: TrainSection
    parallel: ParallelConfig
    sample: SampleConfig
    wandb: WandbConfig
    sweep: SweepConfig
    seed: Seed
    device: DeviceName
    threads: Threads | None
    out_dir: Text
    resume: Literal["auto", "never"]
    allow_changed: list[Text]
    overrides: list[str]
    dry_run: Flag
    evaluate_at_end: Annotated[list[Text], Distinct, AfterValidator(_check_kinds)]
    report: Names | None
    unresolved: dict[str, str] = Field(default_factory=dict)  # no setting: see gpt/config/environment.py

    @property
    def lora(self) -> LoRAConfig | None:
        """The adapters that are trained, if any."""
        return self.finetune.lora if self.finetune else None


@section
class KnownConfig:
    """What the user knows of a model whose file does not say it; None: what is usual."""

    n_head: Count | None
    gelu: Literal["tanh", "exact"] | None


@section
class GenerateConfig:
    """Everything that `generate.py` reads."""

    checkpoint: Text
    model: KnownConfig
    export: Text | None
    prompt: str | None
    input: str
    prompts: Text | None
    template: TemplateName | None
    max_new_tokens: Count
    temperature: NonNegative
    top_k: Count | None
    top_p: PositiveFraction | None
    num_samples: Count
    stop: list[Text]
    stats: Flag
    batch_size: CountOrAuto
    output: Text | None
    lookup: Count | None
    seed: Seed
    precision: PrecisionName | None
    device: DeviceName
    threads: Threads | None


@section
class PrepareConfig:
    """Everything that `prepare_data.py` reads."""

    data: DataConfig


# Settings that came after the first runs and sweeps, with the value that all before have.
ADDED = {"model.family": "gpt2", "model.induction": False, "model.copy_order": None,
         "objective.name": "next_token",
         "data.delimiter": None, "data.encoding": None, "data.document_separator": None,
         "data.card.notice": DISCLAIMER, "train.ema": None,
         "optimizer.embedding_lr": None, "optimizer.head_lr": None, "optimizer.scalar_lr": None,
         "optimizer.nesterov": True, "optimizer.scale": "original", "optimizer.orthogonalization": "newton_schulz",
         "optimizer.cautious_decay": False, "optimizer.momentum_warmup": 0, "optimizer.second_moment": None,
         "optimizer.centred_head": False,
         "schedule.window_warmup": None, "schedule.window_start": 64,
}  # fmt: skip


def as_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dicts, lists, str, int, float, bool and None, for YAML, W&B and checkpoints. Paths
    inside the project are relative to it, but for the run's own. What was read from the environment is not in it, but
    the text that names the variable."""
    values = dataclasses.asdict(config, dict_factory=lambda items: {key_of(name): value for name, value in items})
    texts, run_dir = values.pop("unresolved", {}), values.get("out_dir")
    values = with_paths(values, stored)
    return with_texts(values | ({"out_dir": run_dir} if run_dir else {}), texts)


def key_of(field: str) -> str:
    """The key of a dataclass's field: `from_` is init.from."""
    return field.rstrip("_")


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"model.n_layer": 6} -> {"model": {"n_layer": 6}}"""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = tree
        for section_name in sections:
            if not isinstance(place.get(section_name), dict):
                place[section_name] = {}
            place = place[section_name]
        place[name] = value
    return tree


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"n_layer": 6}} -> {"model.n_layer": 6}"""
    flat: dict[str, Any] = {}
    for key, item in values.items():
        flat |= flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat
