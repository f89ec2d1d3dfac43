"""What several test modules need: small configurations, and a split of made-up documents."""

import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from gpt.config.data import DataConfig
from gpt.config.families import GPT2Config, ModelConfig, ModernConfig
from gpt.config.optimizers import AdamWConfig, MuonConfig
from gpt.config.schedules import ScheduleConfig
from gpt.config.schema import FinetuneConfig, TrainSection
from gpt.data.batching import Split
from gpt.files.jsonl import RowFile
from gpt.runs import interrupt
from gpt.sweeps import jobs
from gpt.sweeps.jobs import Job

ROOT = Path(__file__).resolve().parent.parent
REAL_MEDQUAD = ROOT.parent / "shared" / "data" / "medquad.csv"
THE_VERDICT = ROOT.parent / "shared" / "data" / "the-verdict.txt"

LINEAR = GPT2Config.linear_layers  # that may have adapters

torch.set_num_threads(1)  # for matrices this small a second thread only waits, for long on a busy machine

os.environ["WANDB_MODE"] = "offline"  # no test talks to a server, whatever the machine is logged in to

NO_SOAP = pytest.mark.skipif(find_spec("pytorch_optimizer") is None, reason="requirements-soap.txt is not installed")


@pytest.fixture
def handlers():
    """Puts back the handlers of signals that a test replaces."""
    before = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    yield
    interrupt.late = None
    for number, handler in before.items():
        signal.signal(number, handler)


def model_config(**changes) -> ModelConfig:
    return GPT2Config(**{
        "family": "gpt2", "name": "test", "n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 16,
        "dropout": 0.0, "tie_weights": True, "gelu": "tanh", **changes,
    })  # fmt: skip


def modern_config(**changes) -> ModernConfig:
    """A small Qwen3."""
    return ModernConfig(**{
        "family": "modern", "name": "test", "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "head_size": 6,
        "mlp_size": 48, "context_length": 16, "dropout": 0.0, "tie_weights": False, "activation": "swiglu",
        "norm_eps": 1e-6, "norm_weights": True, "rope_base": 100.0, "qk_norm": "before_rotation", "window": None,
        "window_layers": "SSL", "logit_softcap": None, "value_embeddings": False, "residual_scalars": False,
        "zero_init": False, **changes,
    })  # fmt: skip


# What no public model has, all at once, but for the start at 0.
UNPUBLISHED = {
    "qk_norm": "after_rotation", "activation": "relu2", "norm_weights": False, "window": 3, "logit_softcap": 5.0,
    "value_embeddings": True, "residual_scalars": True, "induction": True, "copy_order": 2,
}  # fmt: skip


def variant(section: Any, values: dict[str, Any]) -> Any:
    """The dataclass of a section with several kinds that `values` name, with those of them that are its keys."""
    kinds = get_args(section)[1]
    kind = kinds.kinds()[values[kinds.key]]
    return kind(**{field.name: values[field.name] for field in fields(kind)})


def data_config(**changes) -> DataConfig:
    return variant(DataConfig, {
        "name": "test", "kind": "qa", "path": None, "hub": None, "columns": {},
        "delimiter": None, "encoding": None, "document_separator": None, "prepared_dir": "unused",
        "tokenizer": "bytes", "template": "alpaca", "max_tokens": None, "split": "grouped", "val_fraction": 0.1,
        "test_fraction": 0.1, "split_seed": 0, "on_bad_row": "error",
        "card": {"title": "t", "description": "d", "license": "l", "citation": "c", "notice": None},
        "mask": "response", "batching": "packed", "overflow": "split", "prompts": [], **changes,
    })  # fmt: skip


def train_section(**changes) -> TrainSection:
    return TrainSection(**{
        "max_steps": 10, "max_epochs": None, "max_tokens": None, "tokens_per_step": 64, "micro_batch": 2,
        "grad_clip": 1.0, "eval_every": 5, "eval_tokens": 100, "log_every": 2, "sample_every": None, "save_every": 5,
        "keep_checkpoints": 2, "patience": None, "max_skipped": 0, "one_batch": False, "dtype": "float32",
        "compile": False, "gradient_checkpointing": False, "ema": None, **changes,
    })  # fmt: skip


def adamw_config(**changes) -> AdamWConfig:
    return AdamWConfig(**{
        "name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8,
        "embedding_lr": None, "head_lr": None, "scalar_lr": None, **changes,
    })  # fmt: skip


def muon_config(**changes) -> MuonConfig:
    return MuonConfig(**{
        "name": "muon", "lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True, "scale": "original",
        "orthogonalization": "newton_schulz", "cautious_decay": False, "momentum_warmup": 0, "second_moment": None,
        "centred_head": False,
        "adamw_lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8,
        "embedding_lr": None, "head_lr": None, "scalar_lr": None, **changes,
    })  # fmt: skip


def schedule_config(**changes) -> ScheduleConfig:
    return variant(ScheduleConfig, {
        "name": "cosine", "warmup": 0.1, "window_warmup": None, "window_start": 2, "decay": 0.2, "final": 0.1,
        **changes,
    })  # fmt: skip


def finetune_config(name: str = "full", **changes) -> FinetuneConfig:
    return variant(FinetuneConfig, {
        "name": name, "layer_decay": 1.0, "n_blocks": 1, "rank": 8, "alpha": 16.0, "targets": ["attn.c_attn"],
        **changes,
    })  # fmt: skip


def run_config(shape: dict[str, Any], rows: int, **train: Any) -> SimpleNamespace:
    """The sections of a run that decide what a step costs; all of a step's rows in one micro-batch."""
    model = model_config(**{"n_layer": 4, "n_head": 4, "n_embd": 128, **shape})
    section = train_section(**{"tokens_per_step": rows * model.context_length, "micro_batch": rows, **train})
    return SimpleNamespace(
        model=model, train=section, data=data_config(mask="all"), optimizer=adamw_config(), finetune=None
    )


def made_split(lengths: list[int], prompt: int = 3, vocab_size: int = 50, seed: int = 0, name: str = "train") -> Split:
    """Documents of the given lengths in tokens, each starting with a prompt of `prompt` tokens."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    documents = np.stack([starts, np.minimum(starts + prompt, ends), ends], axis=1).astype(np.int64)
    return Split(rng.integers(1, vocab_size, ends[-1]).astype(np.uint16), documents, name)


def sweep_job(
    sweep: Path, number: int, config: dict[str, Any], losses: Sequence[float] = (), status: str = "completed",
    **fields: Any,
) -> Job:  # fmt: skip
    """A job's folder in the directory of a sweep, as a run leaves it with an evaluation every 1,000 tokens."""
    fields = {"overrides": [f"{key}={value}" for key, value in config.items()], "seconds": 10.0} | fields
    fields = {"name": " ".join(fields["overrides"])} | fields
    job = Job(sweep / jobs.name_of(config), number, config=config, status=status, **fields)
    jobs.write(job)
    rows = [
        {"step": 10 * i, "tokens": 1000 * i, "val/loss": loss, "val/bpb": loss / 2, "tokens_per_second": 500.0}
        for i, loss in enumerate(losses)
    ]
    RowFile(job.folder / "metrics.jsonl").append(rows)
    return jobs.read_one(job.folder)


@pytest.fixture(autouse=True)
def one_seed_for_each_test():
    torch.manual_seed(0)


@pytest.fixture
def logger():
    """The project's logger without handlers, put back afterwards."""
    logger = logging.getLogger("gpt")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers.clear()
    yield logger
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="gpt")
    return lambda: [record.getMessage() for record in caplog.records]


LONGEST = [
    f"test_{name}.py"
    for name in ("kill", "callback", "train", "signals", "config_fuzz", "hostile_files", "run_log", "damage", "loading")
]


def pytest_collection_modifyitems(items):
    """The longest files first, so that both processes end at about the same time; more time for exhaustive tests."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        if item.get_closest_marker("exhaustive"):
            item.add_marker(pytest.mark.timeout(3600))


left_out: set[str] = set()  # the exhaustive tests that this run passes over


def pytest_deselected(items):
    left_out.update(item.nodeid for item in items if item.get_closest_marker("exhaustive"))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a process of xdist, which has collected the tests
        session.config.workeroutput["left_out"] = sorted(left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    left_out.update(getattr(node, "workeroutput", {}).get("left_out", []))


def pytest_terminal_summary(terminalreporter):
    """Prints what tests counted, `record_property("count", "400 mutations: ...")`, and how many were left out."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    for line in sorted(text for report in reports for name, text in report.user_properties if name == "count"):
        terminalreporter.write_line(f"count: {line}")
    if left_out:
        terminalreporter.write_line(f"{len(left_out)} slow tests are left to `pytest -m exhaustive`")


def packed_and_alone(model, vocab_size):
    """The logits of two documents packed into one row, and those that each gets alone, one after the other."""
    first, second = torch.randint(vocab_size, (1, 5)), torch.randint(vocab_size, (1, 4))
    packed = model(
        torch.cat([first, second], dim=1),
        positions=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]),
        documents=torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1]]),
    )
    return packed, torch.cat([model(first), model(second)], dim=1)
