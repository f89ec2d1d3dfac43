"""Says whether the jobs with the lowest val/loss also have the best scores of evaluations."""

from collections.abc import Iterable

from gpt.config.schema import METRIC
from gpt.evaluation import statistics
from gpt.sweeps.jobs import Job
from gpt.sweeps.leaderboard import fingerprints, is_result

RESAMPLES, SEED = 10_000, 0


def sentences(jobs: Iterable[Job]) -> list[str]:
    """The rank correlation of val/loss and each score over the completed jobs; none for jobs on different data."""
    ended = [job for job in jobs if is_result(job)]
    if len(fingerprints(ended)) > 1:
        return []
    said = []
    for name in dict.fromkeys(name for job in ended for name in job.scores):
        pairs = [(job.val_loss, job.scores[name]) for job in ended if name in job.scores]
        figure = statistics.rank_correlation(pairs, RESAMPLES, SEED)
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
