"""Opens a run: its directory, the machine and the batches that it computes with, and what its checkpoints record."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gpt import optim, tokenizer
from gpt.config.schema import TrainConfig, as_dict, flatten
from gpt.data import batching, preparation, prepared, sources, token_files
from gpt.data.batching import Batches
from gpt.data.prepared import Prepared
from gpt.errors import UserError
from gpt.files import directory
from gpt.files.paths import PROJECT_ROOT
from gpt.machine import compilation, cost, device, memory, rank_environment
from gpt.machine.machine import Machine
from gpt.machine.ranks import ALONE, Ranks
from gpt.model import LanguageModel
from gpt.progress import Progress
from gpt.runs import origin, resume, saver
from gpt.runs.checkpoint import Identity
from gpt.terminal import console
from gpt.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# What machines of one run may have of their own.
OWN = ("threads", "device", "overrides", "environment.processor", "environment.threads", "environment.system")


@dataclass(frozen=True)
class Run:
    """A run that this process owns, and the checkpoint that it goes on from, if there is one."""

    cfg: TrainConfig
    directory: Path
    checkpoint: resume.Checkpoint | None
    tokens: Tokenizer
    ranks: Ranks = ALONE

    @property
    def recorded(self) -> dict[str, Any]:
        """The environment that the run began in; empty for a new one."""
        return self.checkpoint.environment if self.checkpoint else {}

    @property
    def identity(self) -> Identity:
        """What a file of this run's weights needs so that text can be generated from it."""
        template = None if self.cfg.data.kind == "text" else self.cfg.data.template
        return Identity(self.cfg.model, self.tokens.n_vocab, self.tokens.name, template, self.cfg.lora)

    def choose_machine(self) -> Machine:
        """Device, precision and rows of a micro-batch. Raises UserError for what is not there, or has no room."""
        cfg = self.cfg
        where, dtype, environment = device.choose(cfg.device, cfg.train, self.recorded, cfg.threads)
        rows = self.ranks.first(
            lambda: memory.micro_batch(cfg, self.tokens.n_vocab, where, dtype, self.recorded, self.ranks)
        )
        self.ranks.first(lambda: saver.check_space(self.directory, cfg, self.tokens.n_vocab))
        return Machine(where, dtype, environment | {"micro_batch": rows}, self.ranks)

    def open_batches(self, machine: Machine) -> Batches:
        """The batches of the run; data that is not prepared yet is. Raises UserError for data that does not suit it."""
        own = self.checkpoint.fingerprint if self.checkpoint else None
        is_typed = sources.path_is_typed(self.cfg.overrides, self.cfg.out_dir)
        opened: list[Prepared] = []

        def prepare(fingerprint: str | None) -> list[Any]:
            opened.append(preparation.ensure(self.cfg.data, PROJECT_ROOT, is_typed, fingerprint))
            meta = opened[0].meta
            return [meta["fingerprint"], token_files.seen(opened[0].folder, meta["files"])]

        fingerprint, known = self.ranks.first(prepare, own)
        if not opened:  # by this rank, which reads nothing through that the first one has read: it is one file system
            try:
                folder = prepared.directory_of(self.cfg.data, PROJECT_ROOT)
                opened.append(prepared.with_fingerprint(folder, fingerprint, known))
            except UserError:  # not so: it has data of its own, which may be the same
                prepare(fingerprint)
        cfg = memory.with_micro_batch(self.cfg, machine.environment["micro_batch"])
        n_vocab, n_bytes = self.tokens.n_vocab, self.tokens.bytes_per_token()
        batches = batching.open_batches(opened[0], cfg, n_vocab, n_bytes, self.ranks.share)
        optim.check_schedule(cfg.schedule, batches.total_steps)
        if idle := self.ranks.idle(batches.train.rows_in_step, cfg.model.context_length):
            log.warning(idle)
        return batches

    def decide_compilation(self, machine: Machine, batches: Batches) -> Machine:
        """The machine with the answer to train.compile=auto. Raises UserError (5) when it cannot compile and has to."""
        operations = cost.operations_to_compile(self.cfg, self.tokens.n_vocab, batches.total_steps, machine)
        cache = compilation.CACHE
        compiles = self.ranks.first(
            lambda: compilation.decide(self.cfg.train, self.recorded, machine, operations, cache)
        )
        if compiles:
            self.ranks.expect_compiling()
        return replace(machine, environment=machine.environment | {"compile": compiles})

    def settings(self, machine: Machine, batches: Batches, weights: Any) -> dict[str, Any]:
        """What each checkpoint says of its run: all settings, and what they have led to. `weights` describes the first
        weights, None for random ones."""
        settings = as_dict(self.cfg) | {"total_steps": batches.total_steps, "environment": machine.environment}
        settings["weights"] = self.checkpoint.config.get("weights") if self.checkpoint else weights
        settings["data"]["fingerprint"] = batches.data.meta["fingerprint"]
        self.ranks.check_same(without_differences(settings), "its settings or its data are")
        return settings

    def saver(self, model: LanguageModel, optimizer: optim.Optimizer, settings: dict[str, Any]) -> saver.Saver:
        """What publishes the run's checkpoints."""
        keep = self.cfg.train.keep_checkpoints
        return saver.Saver(self.directory, model, optimizer, self.identity, settings, keep, self.ranks)

    def restore(self, model: LanguageModel, optimizer: optim.Optimizer, settings: dict[str, Any]) -> Progress:
        """Fills model and optimizer from the run's checkpoint. Raises UserError when they are not the run's."""
        allowed = self.cfg.allow_changed
        progress = resume.restore(self.checkpoint, model, optimizer, self.identity, settings, allowed)
        self.ranks.spread(model.state_dict().values())  # processors may draw the first weights differently
        return progress


def without_differences(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings in which all ranks have to be the same, by full key."""
    return {key: value for key, value in flatten(settings).items() if key not in OWN}


@contextlib.contextmanager
def shared(cfg: TrainConfig) -> Iterator[Ranks]:
    """The ranks of a run: those that torchrun or SLURM has started together, or this process alone."""
    if rank_environment.read().count == 1:
        yield ALONE
        return
    from gpt.machine import process_group  # here, as one process needs nothing of it

    kind = process_group.ProcessGroup
    if cfg.parallel.name == "fsdp":
        from gpt.machine.sharding import ShardedGroup as kind

    with process_group.opened(cfg.parallel, kind) as ranks:
        ranks.check_same(without_differences(as_dict(cfg)), "its settings are")
        yield ranks


@contextlib.contextmanager
def opened(cfg: TrainConfig) -> Iterator[Run]:
    """Locks the directory of a run, logs into it, and looks for a checkpoint to go on from. Of several ranks the first
    does that, and the others go on from the same checkpoint. Raises UserError (3) for checkpoints that cannot be used,
    (5) where nothing can be written, (6) when another process has it."""
    run_dir = Path(cfg.out_dir)
    found: list[resume.Checkpoint | None] = []

    def begin() -> str | None:
        ended.enter_context(directory.owned(run_dir))
        ended.enter_context(console.log_to(run_dir / "train.log"))
        found.append(resume.find(run_dir, cfg.resume))
        recorded = found[0] and found[0].config.get("out_dir")
        origin.settle(run_dir, recorded if isinstance(recorded, str) else None)
        return str(found[0].path) if found[0] else None

    with shared(cfg) as ranks, contextlib.ExitStack() as ended, device.memory_errors():
        path = ranks.first(begin)
        checkpoint = found[0] if found else path and resume.reread(Path(path))
        rank_environment.warn_alone(cfg.parallel.name)
        if checkpoint is None and cfg.init.from_ is None and cfg.finetune and cfg.finetune.name != "full":
            log.warning(f"finetune={cfg.finetune.name} trains a part of the weights, and all begin as random ones; "
                        "init.from names weights to begin with")  # fmt: skip
        yield Run(cfg, run_dir, checkpoint, tokenizer.load(cfg.data.tokenizer), ranks)
