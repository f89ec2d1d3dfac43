"""Writes report.html: all of a sweep on one page that needs no network, no server and no other file.

What comes from files and from models is not trusted: it is escaped, and the page's own policy lets a browser fetch
nothing and run no script but report.js. The same jobs give the same bytes.
"""

import base64
import hashlib
import html
import logging
import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt.config.schema import METRIC
from gpt.files import atomic
from gpt.files.paths import PROJECT_ROOT
from gpt.runs.model_card import DISCLAIMER
from gpt.sweeps import chart
from gpt.sweeps.chart import Curve
from gpt.sweeps.jobs import STATUSES, Job, describe, is_number, key_of, shown, varied_keys
from gpt.sweeps.leaderboard import Entry, is_result
from gpt.sweeps.markup import cell, listing, shortened, table, text
from gpt.terminal.console import escape
from gpt.terminal.figures import Grid, loss_range

log = logging.getLogger(__name__)

SCRIPT = ["python", str(PROJECT_ROOT / "train.py")]
OPEN = 20  # jobs: with more, the table of all of them is folded
LONGEST_SAMPLE = 5000  # characters
HEADER = [METRIC, "95 % interval", "seeds", "val/bpb", "tokens", "seconds", "tokens/s", "status"]


def write(
    directory: Path,
    jobs: Sequence[Job],
    entries: Sequence[Entry],
    verdict: str,
    caveats: Sequence[str],
    predictions: Sequence[object],
    command: str,
) -> Path:
    """Writes report.html into a sweep's directory. `command` is what started the sweep, as typed in a shell; of a
    prediction its str() is shown. Raises OSError, and then an older report is still there."""
    # Jobs are numbered as they come in the leaderboard: tables, curves and the script know them by these numbers.
    numbers = {job.folder: i for i, job in enumerate(job for entry in entries for job in entry.jobs)}
    styles = _styles(entries)
    curves = _curves(entries, styles, numbers, varied_keys(jobs))
    sections = {
        "Leaderboard": _leaderboard(entries, styles, numbers),
        "Curves": _picture(entries, styles, numbers, curves),
        "Heatmap": _heatmap(grid(entries)),
        "Prediction": listing(predictions),
        "Failures": _failures(jobs),
        "Samples": _samples(entries, jobs),
        "Settings": _settings(jobs, numbers),
        "Commands": _commands(directory, entries, command),
    }
    caveat = f'<div class="warn"><b>Not comparable as they are:</b>{listing(caveats)}</div>' if caveats else ""
    head = f"""\
<h1>Sweep {text(directory.name, 200)}</h1>
<p class="soft">{status_line(jobs)}</p>
<p class="verdict">{text(verdict)}</p>
{caveat}"""
    path = directory / "report.html"
    atomic.write(path, _page(directory.name, head, sections, chart.data(curves)))
    return path


def _page(name: str, head: str, sections: dict[str, str], data: str) -> str:
    script, style = (Path(__file__).with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".js", ".css"))
    # The policy names the one script by its hash: another one would not run even if it came through the escaping.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sections = {title: content for title, content in sections.items() if content}
    links = " ".join(f'<a href="#{title.lower()}">{title}</a>' for title in sections)
    body = "\n".join(
        f'<section id="{title.lower()}">\n<h2>{title}</h2>\n{content}</section>' for title, content in sections.items()
    )
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Sweep {text(name, 200)}</title>
<style>
{style}</style>
</head>
<body>
<header>
{head}
<nav>{links}</nav>
</header>
<main>
{body}
</main>
<footer><p><b>{DISCLAIMER}</b></p></footer>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def status_line(jobs: Sequence[Job]) -> str:
    """12 jobs: 7 completed, 1 interrupted, 1 failed, 3 new"""
    counts = Counter(job.status for job in jobs)
    found = sorted((status for status in STATUSES if counts[status]), key=lambda status: status != "completed")
    parts = ", ".join(f"{counts[status]} {status}" for status in found)
    return f"{len(jobs)} job{'' if len(jobs) == 1 else 's'}: {parts}" if jobs else "no jobs"


def grid(entries: Sequence[Entry]) -> Grid | None:
    """val/loss over the two settings that vary besides the seed; None when there are fewer or more, or no loss."""
    keys = list(entries[0].settings) if entries else []
    evaluated = [entry for entry in entries if entry.mean is not None]
    if len(keys) != 2 or not evaluated:
        return None
    # A page may be long but not wide: the shorter axis is that of the columns.
    axes = sorted(((key, _values(entries, key)) for key in keys), key=lambda axis: -len(axis[1]))
    (row_key, rows), (column_key, columns) = axes
    losses = [[math.nan] * len(columns) for _ in rows]
    best, unfinished = None, set()
    for entry in evaluated:
        row, column = rows.index(shown(entry.settings[row_key])), columns.index(shown(entry.settings[column_key]))
        losses[row][column] = entry.mean
        if not entry.losses:
            unfinished.add((row, column))
        elif best is None:  # entries come best first
            best = row, column
    return Grid((row_key, column_key), rows, columns, losses, best, unfinished)


def reproduce(job: Job) -> str:
    """The shell command that runs one job of a sweep again, alone and from its start."""
    kept = [typed for typed in job.overrides if not key_of(typed).startswith(("sweep.", "hydra", "out_dir", "resume"))]
    # A study from experiments/ asks for a sweep by itself.
    alone = ["hydra.mode=RUN"] if any(key_of(typed) == "experiments" for typed in kept) else []
    return shlex.join([*SCRIPT, *alone, *kept])


def _values(entries: Sequence[Entry], key: str) -> list[str]:
    """The values of a setting: numbers first, in order of size, then texts."""
    values = {shown(entry.settings[key]): entry.settings[key] for entry in entries}

    def place(label: str) -> tuple[bool, float, str]:
        value = values[label]
        return not is_number(value), value if is_number(value) else 0, label

    return sorted(values, key=place)


def _styles(entries: Sequence[Entry]) -> list[str | None]:
    """The class of each entry's curves; None for one without any."""
    drawn = [any(chart.points(job.rows) for job in entry.jobs) for entry in entries]
    ranks = [sum(drawn[:i]) for i in range(len(entries))]
    return [
        (f"c{rank}" if rank < chart.COLOURED else "other") if has_curve else None
        for rank, has_curve in zip(ranks, drawn, strict=True)
    ]


def _curves(
    entries: Sequence[Entry], styles: Sequence[str | None], numbers: dict[Path, int], keys: Sequence[str]
) -> list[Curve]:
    """The evaluated jobs in the order of the leaderboard."""
    found = []
    for entry, style in zip(entries, styles, strict=True):
        for job in entry.jobs:
            if points := chart.points(job.rows):
                settings = [shortened(f"{key}={shown(job.setting(key))}", 120) for key in keys]
                found.append(Curve(numbers[job.folder], [f"job {escape(job.id)}", *settings], str(style), points))
    return found


def _numbered(entry: Entry, numbers: dict[Path, int]) -> str:
    return chart.numbered(numbers[job.folder] for job in entry.jobs)


def _leaderboard(entries: Sequence[Entry], styles: Sequence[str | None], numbers: dict[Path, int]) -> str:
    rows = []
    for rank, (entry, style) in enumerate(zip(entries, styles, strict=True), start=1):
        loss = (
            "" if entry.mean is None else f"{entry.mean:.4f}" + (f" ± {entry.std:.4f}" if entry.std is not None else "")
        )
        interval = "" if entry.low is None else f"{entry.low:.4f} to {entry.high:.4f}"
        cells = [
            f'<td class="rank">{rank if entry.losses else ""} {chart.swatch(style)}</td>',
            *(cell(value) for value in entry.settings.values()),
            f'<td class="number">{loss}</td><td class="number">{interval}</td>{cell(len(entry.counted))}',
            cell(entry.bpb, 4) + cell(entry.tokens, 0) + cell(entry.seconds, 0) + cell(entry.tokens_per_second, 0),
            f'<td class="{"status" if entry.status == "completed" else "status bad"}">{text(entry.status)}</td>',
        ]
        kind = ' class="best"' if rank == 1 and entry.losses else ""
        rows.append(f'<tr data-jobs="{_numbered(entry, numbers)}"{kind}>{"".join(cells)}</tr>')
    if not rows:
        return '<p class="soft">There are no jobs yet.</p>\n'
    keys = list(entries[0].settings)
    return table(["", *keys, *HEADER], rows, "board") + (
        '<p class="soft">val/loss: the lowest of each job, mean ± standard deviation over the seeds, with the 95 % '
        "interval of that mean (Student's t). tokens: mean; seconds: sum. What has not come to its end has no rank."
        "</p>\n"
    )


def _picture(
    entries: Sequence[Entry], styles: Sequence[str | None], numbers: dict[Path, int], curves: list[Curve]
) -> str:
    if not curves:
        return '<p class="soft">No job has been evaluated yet.</p>\n'
    drawn = [(style, entry) for style, entry in zip(styles, entries, strict=True) if style]
    legend = [
        (
            style,
            [numbers[job.folder] for job in entry.jobs],
            describe(entry.jobs[0], list(entry.settings)) or "all jobs",
        )
        for style, entry in drawn[: chart.COLOURED]
    ]
    if len(drawn) > chart.COLOURED:
        others = [numbers[job.folder] for _, entry in drawn[chart.COLOURED :] for job in entry.jobs]
        legend.append(("other", others, f"{len(drawn) - chart.COLOURED} others"))
    return chart.draw(curves, legend)


def _heatmap(cells: Grid | None) -> str:
    if cells is None:
        return ""
    low, high, _ = loss_range([[(1, loss)] for line in cells.losses for loss in line])
    rows = []
    for i, name in enumerate(cells.rows):
        line = f'<th scope="row">{text(name, 60)}</th>'
        for j, loss in enumerate(cells.losses[i]):
            if math.isnan(loss):
                line += "<td></td>"
                continue
            depth = max(0.0, (high - loss) / (high - low))
            kind = ' class="best"' if cells.best == (i, j) else ""
            star = "*" * ((i, j) in cells.unfinished)
            line += f'<td{kind} style="--v:{depth:.3f}">{loss:.4f}{star}</td>'
        rows.append(f"<tr>{line}</tr>")
    note = " * did not come to its end." if cells.unfinished else ""
    return table([f"{cells.keys[0]} \\ {cells.keys[1]}", *cells.columns], rows, "heat") + (
        f'<p class="soft">Mean val/loss; {text(cells.keys[0])} downward, {text(cells.keys[1])} across. '
        f"More colour is a lower loss, the frame is the best.{note}</p>\n"
    )


def _failures(jobs: Sequence[Job]) -> str:
    keys = varied_keys(jobs)
    rows = []
    for job in jobs:
        if job.status not in ("failed", "damaged"):
            continue
        error = job.error or ("its job.json cannot be read" if job.status == "damaged" else "no reason is recorded")
        code = "" if job.code is None else f" (exit code {text(job.code)})"
        rows.append(
            f'<tr><td>{text(job.id)}</td>{cell(describe(job, keys), longest=300)}<td class="long bad">'
            f"{text(error, 1000)}{code}</td>{cell(str(job.log or job.folder), longest=300)}</tr>"
        )
    return table(["job", "settings", "error", "log"], rows) if rows else ""


def _samples(entries: Sequence[Entry], jobs: Sequence[Job]) -> str:
    """The last samples of the best and of the worst completed job, those to one prompt side by side."""
    completed = sorted(filter(is_result, jobs), key=lambda job: job.val_loss)
    if not completed:
        return ""
    best = min(entries[0].counted, key=lambda job: job.val_loss)
    shown_jobs = [("best", best)] + [("worst", completed[-1])] * (completed[-1] is not best)
    found = [_last_samples(job) for _, job in shown_jobs]
    keys = varied_keys(jobs)
    parts = []
    for prompt, occurrence in dict.fromkeys(place for samples in found for place in samples):
        columns = ""
        for (rank, job), samples in zip(shown_jobs, found, strict=True):
            sample = samples.get((prompt, occurrence))
            name = f"{rank}, val/loss {job.val_loss:.4f}: {text(describe(job, keys) or job.id, 300)}"
            written = "(no sample)" if sample is None else text(sample.strip() or "(nothing)", LONGEST_SAMPLE, True)
            columns += f'<div><p class="soft">{name}</p><pre>{written}</pre></div>\n'
        parts.append(f'<div class="pair"><h3>{text(prompt.strip(), 1000, True)}</h3>\n{columns}</div>\n')
    return "".join(parts) or '<p class="soft">These jobs have written no samples (train.sample_every).</p>\n'


def _last_samples(job: Job) -> dict[tuple[str, int], str]:
    """{(prompt, how many there were to it before): text} of the last step with samples."""
    try:
        rows = [row for row in job.samples() if isinstance(row.get("step"), int)]
    except OSError as error:
        log.warning(f"{job.folder / 'samples.jsonl'} cannot be read ({error.strerror})")
        return {}
    last = max((row["step"] for row in rows), default=0)
    found: dict[tuple[str, int], str] = {}
    seen: Counter[str] = Counter()
    for row in rows:
        if row["step"] == last:
            prompt = str(row.get("prompt", ""))
            found[prompt, seen[prompt]] = str(row.get("text", ""))
            seen[prompt] += 1
    return found


def _settings(jobs: Sequence[Job], numbers: dict[Path, int]) -> str:
    """What each job has, what follows from it, and what all have in common."""
    keys = varied_keys(jobs)
    rows = []
    for job in jobs:
        values = "".join(cell(job.setting(key)) for key in keys)
        result = cell(job.val_loss, 4) + cell(job.tokens, 0) + cell(job.status)
        rows.append(f'<tr data-jobs="{numbers[job.folder]}">{cell(job.id)}{values}{result}</tr>')
    each = table(["job", *keys, METRIC, "tokens", "status"], rows, "board")
    parts = [f"<details{' open' * (len(jobs) <= OPEN)}><summary>Every job ({len(jobs)})</summary>\n{each}</details>\n"]
    seen: dict[str, dict[str, int]] = defaultdict(dict)  # key: its values as shown, each once
    known = [job for job in jobs if job.config]
    for key in sorted({key for job in known for key in job.config}):
        for job in known:
            seen[key][shown(job.config[key]) if key in job.config else "(absent)"] = 1
    follows = {key: found for key, found in seen.items() if len(found) > 1 and key not in keys}
    common = {key: found for key, found in seen.items() if len(found) == 1}
    for title, group in (("What follows from these settings", follows), ("What all jobs have in common", common)):
        if group:
            lines = [f"<tr><td>{text(key, 120)}</td>{cell(', '.join(group[key]), longest=500)}</tr>" for key in group]
            parts.append(
                f"<details><summary>{title} ({len(group)})</summary>\n{table(['setting', 'value'], lines)}</details>\n"
            )
    return "".join(parts)


def _commands(directory: Path, entries: Sequence[Entry], command: str) -> str:
    commands: list[tuple[str, Any]] = []
    if entries and entries[0].losses:
        best = min(entries[0].counted, key=lambda job: job.val_loss)
        commands.append(("The best job again, alone:", reproduce(best)))
    if command:
        commands.append(("The sweep again; what is finished is skipped, what was interrupted goes on:", command))
    commands.append(("This report again, at any time:", shlex.join([*SCRIPT, f"sweep.report={directory.name}"])))
    return "".join(
        f'<p>{title}</p><pre class="command">{html.escape(escape(line))}</pre>\n' for title, line in commands
    )
