"""Writes report.html: all of a sweep on one page that needs no network, no server and no other file.

report.html.j2 is the page. What comes from files and from models is not trusted: it is escaped, and the page's own
policy lets a browser fetch nothing and run no script but report.js. The same jobs give the same bytes.
"""

import base64
import hashlib
import logging
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from gpt.config.data import DISCLAIMER
from gpt.config.schema import METRIC
from gpt.files import atomic
from gpt.files.paths import PROJECT_ROOT
from gpt.sweeps import chart, tables
from gpt.sweeps.chart import Curve
from gpt.sweeps.jobs import STATUSES, Job, as_text, describe, generate_command, override_key, varied_keys
from gpt.sweeps.leaderboard import Entry, Results, is_result
from gpt.terminal.console import escape
from gpt.terminal.figures import Grid, colour_range, not_in_view

log = logging.getLogger(__name__)

SCRIPT = ["python", str(PROJECT_ROOT / "train.py")]
NAME = "report.html"


def write(sweep: Results) -> Path:
    """Writes report.html into a sweep's directory. Raises OSError, and then an older report is still there."""
    jobs, entries = sweep.jobs, sweep.entries
    # Jobs are numbered as they come in the leaderboard: tables, curves and the script know them by these numbers.
    numbers = {job.folder: i for i, job in enumerate(job for entry in entries for job in entry.jobs)}
    styled = list(zip(entries, _styles(entries), strict=True))
    varied = varied_keys(jobs)
    curves = [
        Curve(numbers[job.folder], _name(job, varied), style, points)
        for entry, style in styled
        for job in entry.jobs
        if (points := chart.points(job.rows))
    ]
    best, worst = sweep.best, max(filter(is_result, jobs), key=lambda job: job.val_loss, default=None)
    compared = [("best", best)] * (best is not None) + [("worst", worst)] * (worst is not best)
    heatmap = tables.grid(entries)
    script, style = (Path(__file__).with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".js", ".css"))
    page = _template().render(
        sweep=sweep,
        styled=styled,
        result_columns=tables.result_columns(entries),
        scores=tables.score_names(entries),
        keys=tables.setting_keys(entries),
        varied=varied,
        numbers_of=lambda jobs: " ".join(str(numbers[job.folder]) for job in jobs),
        picture=chart.Picture(curves) if curves else None,
        legend=_legend(sweep, styled),
        grid=heatmap,
        depth=_depth(heatmap),
        failures=[(job, _error(job)) for job in jobs if job.status in ("failed", "damaged")],
        compared=compared,
        prompts=_samples([job for _, job in compared]),
        other_settings=_other_settings(jobs, varied),
        commands=_commands(sweep, best),
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path = sweep.directory / NAME
    atomic.write(path, page)
    return path


def status_line(jobs: Sequence[Job]) -> str:
    """12 jobs: 7 completed, 1 interrupted, 1 failed, 3 new"""
    counts = Counter(job.status for job in jobs)
    statuses = sorted((status for status in STATUSES if counts[status]), key=lambda status: status != "completed")
    parts = ", ".join(f"{counts[status]} {status}" for status in statuses)
    return f"{len(jobs)} job{'' if len(jobs) == 1 else 's'}: {parts}" if jobs else "no jobs"


def reproduce(job: Job) -> str:
    """The shell command that runs one job of a sweep again, alone and from its start."""
    of_the_sweep = ("sweep.", "hydra", "out_dir", "resume")
    kept = [override for override in job.overrides if not override_key(override).startswith(of_the_sweep)]
    # A study from experiments/ asks for a sweep by itself.
    alone = ["hydra.mode=RUN"] if any(override_key(override) == "experiments" for override in kept) else []
    return shlex.join([*SCRIPT, *alone, *kept])


def shortened(value: object, longest: int, keep_newlines: bool = False) -> str:
    """A value as text of at most `longest` characters, of a longer one begin and end: names may differ in either."""
    text = escape(value, keep_newlines) if isinstance(value, str) else plain(value)
    end = longest // 3
    return text if len(text) <= longest else f"{text[: longest - end - 3]} … {text[len(text) - end :]}"


def plain(value: object) -> str:
    """A value as text on one line; None is empty."""
    return "" if value is None else as_text(value)


def lines(value: str, longest: int) -> Markup:
    """A text whose line feeds stay what they are."""
    return Markup.escape(shortened(value, longest, keep_newlines=True))


def breakable(name: str) -> Markup:
    """A column's name, which may break after a dot or an underscore."""
    return Markup(re.sub("([._])", r"\1<wbr>", str(Markup.escape(shortened(name, 120)))))


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else plain(value),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters |= {"shortened": shortened, "lines": lines, "breakable": breakable}
    environment.globals |= {
        "METRIC": METRIC,
        "DISCLAIMER": DISCLAIMER,
        "zip": zip,
        "not_in_view": not_in_view,
    }
    environment.globals |= {"describe": describe, "results": tables.results, "status_line": status_line}
    return environment.get_template("report.html.j2")


def _styles(entries: Sequence[Entry]) -> list[str | None]:
    """The class of each entry's curves; None for one without any."""
    styles: list[str | None] = []
    for entry in entries:
        rank = len(styles) - styles.count(None)
        has_curve = any(chart.points(job.rows) for job in entry.jobs)
        styles.append((f"c{rank}" if rank < chart.COLOURED else "other") if has_curve else None)
    return styles


def _name(job: Job, keys: Sequence[str]) -> list[str]:
    return [f"job {escape(job.id)}", *(shortened(f"{key}={as_text(job.setting(key))}", 120) for key in keys)]


def _legend(sweep: Results, styled: Sequence[tuple[Entry, str | None]]) -> list[tuple[str, list[Job], str]]:
    """(style, jobs, name) of each colour, and of all others together."""
    coloured = [(style, entry.jobs, sweep.label(entry.best, list(entry.settings)))
                for entry, style in styled if style and style != "other"]  # fmt: skip
    others = [entry for entry, style in styled if style == "other"]
    jobs = [job for entry in others for job in entry.jobs]
    return [*coloured, ("other", jobs, f"{len(others)} others")] if others else coloured


def _depth(grid: Grid | None) -> Callable[[float], float]:
    """How much colour a cell of the heatmap has, from 0 to 1."""
    low, high = colour_range(loss for row in grid.losses for loss in row) if grid else (0.0, 1.0)
    return lambda loss: max(0.0, (high - loss) / (high - low))


def _error(job: Job) -> str:
    return job.error or ("its job.json cannot be read" if job.status == "damaged" else "no reason is recorded")


def _samples(jobs: Sequence[Job]) -> list[tuple[str, list[str | None]]]:
    """Each prompt with the last sample of each job; None where a job has none to it."""
    samples = [_last_samples(job) for job in jobs]
    places = dict.fromkeys(place for of_a_job in samples for place in of_a_job)
    return [(place[0].strip(), [of_a_job.get(place) for of_a_job in samples]) for place in places]


def _last_samples(job: Job) -> dict[tuple[str, int], str]:
    """{(prompt, how many there were to it before): text} of the last step with samples."""
    try:
        rows = [row for row in job.samples() if isinstance(row.get("step"), int)]
    except OSError as error:
        log.warning(f"{job.folder / 'samples.jsonl'} cannot be read ({error.strerror})")
        return {}
    last = max((row["step"] for row in rows), default=0)
    samples: dict[tuple[str, int], str] = {}
    seen: Counter[str] = Counter()
    for row in rows:
        if row["step"] == last:
            prompt = str(row.get("prompt", ""))
            samples[prompt, seen[prompt]] = str(row.get("text", ""))
            seen[prompt] += 1
    return samples


def _other_settings(jobs: Sequence[Job], varied: Sequence[str]) -> dict[str, dict[str, str]]:
    """What differs between the jobs beside what was varied, and what all have in common: {title: {key: values}}."""
    configs = [job.config for job in jobs if job.config]
    follows, common = {}, {}
    for key in sorted({key for config in configs for key in config}):
        values = dict.fromkeys(as_text(config[key]) if key in config else "(absent)" for config in configs)
        if len(values) == 1:
            common[key] = next(iter(values))
        elif key not in varied:
            follows[key] = ", ".join(values)
    return {"What follows from these settings": follows, "What all jobs have in common": common}


def _commands(sweep: Results, best: Job | None) -> list[tuple[str, str]]:
    """(title, shell command)."""
    again = "The sweep again; what is finished is skipped, what was interrupted goes on:"
    compared = sweep.directory.name if sweep.command else f"[{','.join(str(job.folder) for job in sweep.jobs)}]"
    return [
        *([(f"Text from the best job, {best.folder}:", generate_command(best))] if best else []),
        *([("The best job again, alone:", reproduce(best))] if best else []),
        *([(again, sweep.command)] if sweep.command else []),
        ("This report again, at any time:", shlex.join([*SCRIPT, f"report={compared}"])),
    ]
