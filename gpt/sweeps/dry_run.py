"""Prints what a run, or each job of a sweep, will cost, in place of it (`dry_run=true`). Nothing is written."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.types import RunMode

from gpt.errors import UserError
from gpt.machine import rank_environment
from gpt.machine.cost import Cost
from gpt.sweeps import callback, composition, jobs
from gpt.terminal import console

log = logging.getLogger(__name__)


def run(main: Callable[[], Any], request: callback.DryRun) -> int:
    """Calls the function that `hydra.main` has made `main` of, as Hydra would, once or for each job of a sweep. Prints
    what it returns. Returns the exit code: 1 if a job of a sweep cannot run."""
    task, config = main.__wrapped__, request.config
    if config.hydra.mode != RunMode.MULTIRUN:
        show(composition.cost(task, config, Path(config.hydra.run.dir)))
        return 0
    all_overrides = enumerate(composition.all_jobs(config, request.loader))
    configs = [composition.compose(config, request.loader, overrides, number) for number, overrides in all_overrides]
    planned = [composition.as_job(job, number, set()) for number, job in enumerate(configs)]
    keys, costs = jobs.varied_keys(planned), []
    for job, config in zip(planned, configs, strict=True):
        try:
            costs.append(composition.cost(task, config, job.folder))
        except UserError as error:
            console.error(f"job {job.number} ({jobs.describe(job, keys) or 'no axis'}): {error}")
            costs.append(None)
    rows = [{"job": str(job.number)} | {key: job.setting(key) for key in keys} for job in planned]
    show_sweep(rows, keys, costs)
    return int(None in costs)


def show(cost: Cost) -> None:
    """The cost of one run, as a list."""
    model, train = cost.cfg.model, cost.cfg.train
    sizes = {name: size for name, size in vars(cost.memory).items() if size or name != "exchange"}
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.2f}" for name, size in sizes.items())
    of_each, left_out, who = "", "", "this run"
    if cost.ranks > 1:
        who = "a rank of this run"
        of_each, left_out = f" for each of {cost.ranks} ranks", " without what ranks exchange"
    chosen = cost.cfg.finetune
    trained = f", {cost.trained:,} trained (finetune={chosen.name})" if chosen else ""
    auto = ", by train.micro_batch=auto" if train.micro_batch == "auto" else ""
    console.describe(
        model=f"{model.name}, {cost.parameters:,} parameters{trained}, context {model.context_length}",
        memory=f"about {in_gb(cost.memory.total)}{of_each} ({parts}); {in_gb(cost.available)} can be had{of_each}",
        batch=f"{train.tokens_per_step:,} tokens a step, {cost.micro_batch} x {model.context_length} at a time{auto}",
        budget=f"{cost.steps:,} steps ({cost.budget}), {cost.tokens:,} tokens" if cost.steps else "not known",
        time=f"about {in_time(cost.seconds)} on {cost.where}, an estimate{left_out}" if cost.seconds else "not known",
    )
    if cost.note:
        console.say(cost.note)
    rank_environment.warn_alone(cost.cfg.parallel.name)
    if not cost.fits:
        log.warning(_excess(who, cost))


def show_sweep(rows: list[dict[str, Any]], keys: list[str], costs: list[Cost | None]) -> None:
    """A table with the cost of each job, and what they cost together. A job that cannot run has None.

    `keys`: the settings that differ from job to job.
    """
    table = [row if cost is None else row | _row(cost) for row, cost in zip(rows, costs, strict=True)]
    # In a narrow terminal the last columns are left out.
    columns = ["job", *keys, "fits", "minutes", "GB", "micro-batch", "steps", "tokens", "parameters"]
    print("\n" + console.table(table, columns) + "\n", flush=True)
    known = [cost for cost in costs if cost]
    bounded = [cost for cost in known if cost.seconds]
    if bounded:
        steps, tokens, seconds = (sum(getattr(c, name) for c in bounded) for name in ("steps", "tokens", "seconds"))
        left_out = f"; {len(rows) - len(bounded)} left out" if len(bounded) < len(rows) else ""
        time = f"about {in_time(seconds)} on {known[0].where}, an estimate"
        console.say(f"together {steps:,} steps, {tokens:,} tokens, {time}{left_out}")
    for text in dict.fromkeys(cost.note for cost in known if cost.note):
        console.say(text)
    for row, cost in zip(rows, costs, strict=True):
        if cost and not cost.fits:
            log.warning(_excess(f"job {row['job']}", cost))


def _excess(what: str, cost: Cost) -> str:
    return (
        f"{what} does not fit: it needs about {in_gb(cost.memory.total)}, and {in_gb(cost.available)} can be had; "
        "lower train.micro_batch, model.context_length or the model's size, or set train.gradient_checkpointing=true"
    )


def _row(cost: Cost) -> dict[str, Any]:
    return {
        "fits": "yes" if cost.fits else "no",
        "minutes": None if cost.seconds is None else round(cost.seconds / 60, 1),
        "GB": round(cost.memory.total / 1e9, 2),
        "micro-batch": cost.micro_batch,
        "steps": cost.steps,
        "tokens": cost.tokens,
        "parameters": cost.parameters,
    }


def in_gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def in_time(seconds: float) -> str:
    """7,380 -> 2 h 3 min"""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    days, hours = minutes // 1440, minutes // 60 % 24
    parts = [(days, "d"), (hours, "h"), (0 if days else minutes % 60, "min")]
    return " ".join(f"{number} {unit}" for number, unit in parts if number)
