"""Names what is compared: jobs of sweeps by their settings, other models by their place; runs that differ in the seed
alone have one name."""

from collections.abc import Sequence
from pathlib import Path

from gpt.config.places import stored
from gpt.config.value_errors import as_typed
from gpt.runs import catalogue
from gpt.sweeps import comparison, jobs, leaderboard


def labels(names: Sequence[str]) -> dict[str, str]:
    """{what is compared: its label}; several of one label are seeds. Jobs of a sweep have their settings without the
    seed, and the sweep's name before them where anything else is compared with it. Single runs that differ in the seed
    alone share one label where there is another model to compare them with."""
    sweeps = dict.fromkeys(Path(name).parent for name in names if (Path(name) / "job.json").is_file())
    is_one_sweep = len(sweeps) == 1 and all(Path(name).parent in sweeps for name in names)
    found = {}
    for folder in sweeps:
        is_known_by_name = [other.name for other in sweeps].count(folder.name) == 1
        title = folder.name if is_known_by_name else stored("compare", str(folder))
        for entry in leaderboard.entries(jobs.read(folder)):
            settings = " ".join(f"{key}={as_typed(value)}" for key, value in entry.settings.items())
            label = settings if is_one_sweep and settings else f"{title} {settings}".strip()
            found |= {str(job.folder): label for job in entry.jobs}
    found = {name: found.get(name, stored("checkpoint", name)) for name in names}
    groups = seeds([name for name in names if Path(name).parent not in sweeps])
    if len(sweeps) + len(groups) > 1:
        for group in groups:
            more = f" and {len(group) - 1} more seed{'s' if len(group) > 2 else ''}" if len(group) > 1 else ""
            found |= {name: stored("checkpoint", group[0]) + more for name in group}
    return found


def seeds(names: Sequence[str]) -> list[list[str]]:
    """The names in groups: those of runs with the same settings and data, each with another seed, are one. The same
    run twice is no second seed."""
    runs = [comparison.read_run(Path(name), i) for i, name in enumerate(names) if catalogue.is_run(Path(name))]
    groups: dict[object, dict[object, str]] = {}  # of each: seed -> name
    for entry in leaderboard.entries(list(map(comparison.comparable, runs))):
        for run in entry.jobs:
            group = groups.setdefault((str(entry.settings), run.fingerprint), {})
            seed = run.config.get("seed")
            if seed is None or seed in group:
                group = groups.setdefault(run.number, {})
            group[seed] = names[run.number]
    known = {name for group in groups.values() for name in group.values()}
    found = [list(group.values()) for group in groups.values() if group]
    return sorted([*found, *([name] for name in names if name not in known)], key=lambda group: names.index(group[0]))
