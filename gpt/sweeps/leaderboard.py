"""Ranks the settings of a sweep by val/loss, and says whether the best one is more than chance.

Jobs that differ in nothing but the seed are one entry, and a sample of what its settings lead to. Only jobs that have
come to their end are compared: val/loss falls with the tokens read.
"""

import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gpt.config.schema import METRIC
from gpt.evaluation.statistics import rank_correlation
from gpt.sweeps.jobs import Job, as_text, describe, grouped, read, varied_keys
from gpt.terminal.console import escape

MOST_IN_NAME = 4  # settings in a sentence
RESAMPLES, SEED = 10_000, 0  # of the interval of a rank correlation
# Settings that change which tokens are scored, or what a token is, and what then still can be compared.
SCORED = {
    "data.mask": "the losses are those of different tokens",
    "train.eval_tokens": "the losses are means over different numbers of validation tokens",
    "data.tokenizer": "a token is not the same amount of text; compare val/bpb",
    "data.template": "the text around the scored tokens differs",
}


@dataclass(frozen=True)
class Entry:
    """The jobs that differ in nothing but the seed."""

    settings: dict[str, Any]  # varied key -> value, without "seed"
    jobs: list[Job]
    mean: float | None  # of val/loss over the completed jobs; when there is none, of what the others have reached
    std: float | None  # with n - 1 below the sum; this and the interval need two completed jobs
    low: float | None  # 95 % interval of the mean
    high: float | None
    bpb: float | None  # mean over the jobs that `mean` is of
    tokens: int  # likewise
    seconds: float  # sum over all jobs
    tokens_per_second: float | None  # median over all jobs
    status: str

    @property
    def counted(self) -> list[Job]:
        """The jobs that `mean` is of."""
        return counted(self.jobs)

    @property
    def scores(self) -> dict[str, float]:
        """The headline figures of evaluations that all of them have, as means."""
        of_jobs = [job.scores for job in self.counted]
        names = [name for name in of_jobs[0] if all(name in own for own in of_jobs)] if of_jobs else []
        return {name: statistics.fmean(own[name] for own in of_jobs) for name in names}

    @property
    def best(self) -> Job:
        """The one of them with the lowest val/loss; without any, the first of all."""
        return min(self.counted, key=lambda job: job.val_loss, default=self.jobs[0])

    @property
    def losses(self) -> list[float]:
        """val/loss of the completed jobs: what statistics are of."""
        return [job.val_loss for job in self.jobs if is_result(job)]


@dataclass(frozen=True)
class Results:
    """All that is said about a sweep, or about some runs that are compared."""

    directory: Path
    jobs: list[Job]
    entries: list[Entry]
    verdict: str
    caveats: list[str]
    predictions: list[str]
    failures: list[str]  # jobs that have failed, or are not done
    command: str  # goes on with the sweep, as typed in a shell; empty: these are single runs

    @functools.cached_property
    def agreement(self) -> list[str]:
        """See below: 10,000 resamples for each score, and three places that show them."""
        return agreement(self.jobs)

    @property
    def title(self) -> str:
        """The heading of its page."""
        return f"Sweep {self.directory.name}" if self.command else f"Runs {', '.join(job.id for job in self.jobs)}"

    @property
    def best(self) -> Job | None:
        """The best job, as in `best_of`. Single runs on different data have none: a sweep's settings were chosen to be
        compared."""
        return best_of(self.entries) if self.command or len(fingerprints(self.jobs)) < 2 else None

    def label(self, job: Job, keys: Sequence[str]) -> str:
        """The name of a job in a picture: the settings `keys`; before them a single run's folder."""
        settings = describe(job, keys)
        return (settings or job.id) if self.command else f"{job.id} {settings}".strip()


class Comparison(NamedTuple):
    """How far the mean of a second sample is above that of a first one."""

    difference: float
    low: float  # 95 % interval of the difference
    high: float
    p: float  # chance of a difference as large, or larger, between samples of one mean; two-sided


def best_job(directory: Path) -> Job | None:
    """The best job of a sweep's folder as it is now; None where none has come to its end."""
    return best_of(entries(read(directory)))


def best_of(entries: Sequence[Entry]) -> Job | None:
    """The job with the lowest val/loss of the best settings; None if no job has come to its end with one."""
    return entries[0].best if entries and entries[0].losses else None


def has_loss(job: Job) -> bool:
    """Whether it has been evaluated with a finite val/loss."""
    return job.val_loss is not None and math.isfinite(job.val_loss)


def is_result(job: Job) -> bool:
    """Whether it has come to its end, with a val/loss that can be compared."""
    return job.status == "completed" and has_loss(job)


def counted(jobs: Iterable[Job]) -> list[Job]:
    """The completed jobs that have a val/loss; when there are none, the others that have one."""
    evaluated = [job for job in jobs if has_loss(job)]
    return [job for job in evaluated if is_result(job)] or evaluated


def entries(jobs: Sequence[Job]) -> list[Entry]:
    """Best first. What has not been completed follows what has, and without a val/loss comes last."""
    keys = [key for key in varied_keys(jobs) if key != "seed"]

    def place(entry: Entry) -> tuple[int, float, int]:
        stage = 2 if entry.mean is None else 0 if entry.losses else 1
        return stage, 0.0 if entry.mean is None else entry.mean, entry.jobs[0].number

    return sorted((_entry(keys, group) for group in grouped(jobs, keys)), key=place)


def _entry(keys: Sequence[str], jobs: list[Job]) -> Entry:
    sample = counted(jobs)
    losses = [job.val_loss for job in sample]
    mean = statistics.fmean(losses) if losses else None
    std = statistics.stdev(losses) if len(losses) > 1 and is_result(sample[0]) else None
    # mean +- t s / sqrt(n), t the 97.5 % quantile of Student's distribution with n - 1 degrees of freedom
    half = None if std is None else t_quantile(len(losses) - 1) * std / math.sqrt(len(losses))
    bpbs = [job.val_bpb for job in sample if job.val_bpb is not None]
    speeds = [job.tokens_per_second for job in jobs if job.tokens_per_second is not None]
    return Entry(
        settings={key: jobs[0].setting(key) for key in keys},
        jobs=jobs,
        mean=mean,
        std=std,
        low=None if half is None else mean - half,
        high=None if half is None else mean + half,
        bpb=statistics.fmean(bpbs) if bpbs else None,
        tokens=round(statistics.fmean(job.tokens for job in sample or jobs)),
        seconds=sum(job.seconds for job in jobs),
        tokens_per_second=statistics.median(speeds) if speeds else None,
        status=_status(jobs),
    )


def _status(jobs: list[Job]) -> str:
    """completed; halved at 51,200 tokens; 2 completed, 1 failed"""
    parts = []
    for status in dict.fromkeys(job.status for job in sorted(jobs, key=lambda job: job.status != "completed")):
        group = [job for job in jobs if job.status == status]
        text = status if len(group) == len(jobs) else f"{len(group)} {status}"
        if status not in ("new", "completed", "failed", "damaged"):
            least, most = min(job.tokens for job in group), max(job.tokens for job in group)
            text += f" at {least:,} tokens" if least == most else f" at {least:,} to {most:,} tokens"
        parts.append(text)
    without = sum(job.status == "completed" and not has_loss(job) for job in jobs)
    return ", ".join(parts) + (f", {without} without a val/loss" if without else "")


@functools.cache
def t_quantile(dof: float) -> float:
    """97.5 % quantile of Student's t distribution: what a two-sided 95 % interval takes. `dof` degrees of freedom."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import, this a third of it

    return float(stdtrit(dof, 0.975))


def welch(first: Sequence[float], second: Sequence[float]) -> Comparison | None:
    """Welch's t test: the means of two samples whose variances may differ, two values each or more.

    B. L. Welch, "The generalization of 'Student's' problem when several different population variances are involved",
    Biometrika 34 (1947). Jobs of one seed in both samples are not paired. None if neither sample varies: no test.
    """
    from scipy.special import stdtr

    a, b = (statistics.variance(sample) / len(sample) for sample in (first, second))  # variances of the two means
    if a + b == 0:
        return None
    error = math.sqrt(a + b)
    dof = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    difference = statistics.fmean(second) - statistics.fmean(first)
    half = t_quantile(dof) * error
    p = 2 * float(stdtr(dof, -abs(difference) / error))
    return Comparison(difference, difference - half, difference + half, p)


def verdict(entries: Sequence[Entry]) -> str:
    """The best settings, and whether they are distinguishable from the next at 5 %: two sentences."""
    ended = [entry for entry in entries if entry.losses]
    if not ended:
        return "No job has come to its end with a val/loss: there is no best yet."
    best = ended[0]
    winner = f"The best is {_name(best)}: val/loss {_loss(best)}"
    if len(ended) == 1:
        return f"{winner}. No other settings have been completed to compare it with."
    second = ended[1]
    next_best = f"{_name(second)} ({_loss(second)})"
    n_seeds = min(len(best.losses), len(second.losses))
    if n_seeds < 2:
        return (
            f"{winner}. Whether that is more than chance compared with the next, {next_best}, "
            "cannot be told from one seed: run both with several, as in seed=1,2,3."
        )
    test = welch(best.losses, second.losses)
    if test is None:
        return (
            f"{winner}. The seeds of the best and of the next, {next_best}, all lead to one "
            "loss each: without any spread there is no test of the difference."
        )
    p = f"= {test.p:.2g}" if test.p >= 0.0001 else "below 0.0001"
    weak = "; two seeds are a weak test" if n_seeds == 2 else ""
    return (
        f"{winner}. It is {'' if test.p < 0.05 else 'not '}distinguishable from the next, {next_best}: "
        f"the difference is {test.difference:.4f}, 95 % interval {test.low:.4f} to {test.high:.4f} "
        f"(Welch's t test, p {p}{weak})."
    )


def _name(entry: Entry) -> str:
    """optimizer.lr=0.001 model.context_length=64; where that would be long, the folder of its best job"""
    if len(entry.settings) > MOST_IN_NAME:
        return escape(entry.best.id)
    return " ".join(f"{escape(key)}={as_text(value)}" for key, value in entry.settings.items()) or "the only setting"


def _loss(entry: Entry) -> str:
    """4.3120 +- 0.0101, 2 of 3 seeds"""
    n, total = len(entry.losses), len(entry.jobs)
    seeds = f"{n} of {total} seeds" if n < total else "1 seed" if n == 1 else f"{n} seeds"
    return f"{mean_text(entry)}, {seeds}"


def mean_text(entry: Entry) -> str:
    """4.3120 +- 0.0101"""
    if entry.mean is None:
        return ""
    return f"{entry.mean:.4f}" + ("" if entry.std is None else f" +- {entry.std:.4f}")


def fingerprints(jobs: Sequence[Job]) -> list[str]:
    """Those of the prepared data of jobs, each once."""
    return list(dict.fromkeys(job.fingerprint for job in jobs if job.fingerprint is not None))


def caveats(jobs: Sequence[Job]) -> list[str]:
    """Why val/loss cannot be compared between all of the jobs that have one: a sentence each, none if it can."""
    evaluated = [job for job in jobs if has_loss(job)]
    sentences = []
    data = fingerprints(evaluated)
    if len(data) > 1:
        ids = [[escape(job.id) for job in evaluated if job.fingerprint == fingerprint] for fingerprint in data]
        groups = "; ".join(f"{len(group)} on that of {group[0]}" for group in ids)
        sentences.append(f"The prepared data differs, {groups}: the losses are those of different texts.")
    for key, consequence in SCORED.items():
        values = dict.fromkeys(as_text(job.config[key]) for job in evaluated if key in job.config)
        if len(values) > 1:
            sentences.append(f"{key} differs ({', '.join(values)}): {consequence}.")
    budgets = [job.tokens for job in evaluated if job.status == "completed"]
    if budgets and max(budgets) > 1.02 * min(budgets):
        sentences.append(
            f"The budgets differ by more than 2 % ({min(budgets):,} to {max(budgets):,} tokens): "
            "more tokens are an advantage of their own."
        )
    return sentences


def agreement(jobs: Iterable[Job]) -> list[str]:
    """Whether the lowest val/loss also has the best scores: the rank correlation of both over the completed jobs, a
    sentence for each score; none for jobs on different data."""
    ended = [job for job in jobs if is_result(job)]
    if len(fingerprints(ended)) > 1:
        return []
    said = []
    for name in dict.fromkeys(name for job in ended for name in job.scores):
        pairs = [(job.val_loss, job.scores[name]) for job in ended if name in job.scores]
        figure = rank_correlation(pairs, RESAMPLES, SEED)
        if figure is None:
            continue
        if figure.low is not None and figure.high < 0:
            meaning = f"a lower loss goes with a higher {name}"
        elif figure.low is not None and figure.low > 0:
            meaning = f"a lower loss goes with a lower {name}"
        else:
            meaning = "the loss does not tell which job has the best"
        said.append(f"Rank correlation of {METRIC} and {name} over {len(pairs)} jobs: {figure}; {meaning}.")
    return said
