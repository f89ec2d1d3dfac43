"""report.html, as text and in a real browser: Debian's `chromium`, driven by playwright."""

import json
import math
import os
import re
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt.files.jsonl import RowFile
from gpt.sweeps import jobs, leaderboard, prediction, report
from gpt.sweeps.jobs import Job
from gpt.sweeps.leaderboard import Results
from gpt.terminal.console import escape

HOSTILE = "</pre><script>document.title='run'</script>\"><img src=x onerror=\"document.title='run'\"> \u202egnp\x1b[31m"
LRS, CONTEXTS = (3e-4, 1e-3, 3e-3), (64, 128)
COMMAND = "python train.py -m optimizer.lr=3e-4,1e-3,3e-3 'data.prompts=[a b]'"


def add_job(directory: Path, settings: dict, losses: list[float], samples=(), **changes) -> Job:
    """A job's folder as a run leaves it, with an evaluation every 100 tokens."""
    config = {"model.n_layer": 4, "data.name": "medquad"} | settings
    overrides = ["data=medquad", "sweep.name=x", *(f"{key}={value}" for key, value in settings.items())]
    number = len(list(directory.glob("*")))
    folder = directory / jobs.name_of(config)
    jobs.write(replace(Job(folder, number, overrides, config, status="completed", seconds=60.0), **changes))
    rows = [{"step": i, "tokens": 100 * i, "val/loss": loss, "val/bpb": loss / 3} for i, loss in enumerate(losses)]
    RowFile(folder / "metrics.jsonl").append(rows)
    RowFile(folder / "samples.jsonl").append(list(samples))


def add_grid(directory: Path, seeds=(1,), evaluations: int = 6) -> None:
    """A job for each learning rate and context length; the best one has 1e-3 and 128."""
    for lr in LRS:
        for context in CONTEXTS:
            for seed in seeds:
                end = 6 + abs(math.log10(lr) + 3) + 6.4 / context + 0.05 * seed
                losses = [10.8, *(end + 3 / i**2 - 3 / evaluations**2 for i in range(1, evaluations))]
                samples = [
                    {"step": 0, "prompt": "What is gout ?", "text": "noise of the first step"},
                    {"step": 5, "prompt": "What is gout ?", "text": f"Gout, at {lr}.\n\nA second line."},
                    {"step": 5, "prompt": HOSTILE, "text": HOSTILE},
                ]
                settings = {"optimizer.lr": lr, "model.context_length": context, "seed": seed}
                add_job(directory, settings, losses, samples)


def write(directory: Path) -> str:
    return report.write(results(directory, jobs.read(directory))).read_text(encoding="utf-8")


def results(directory: Path, found: list[Job]) -> Results:
    entries = leaderboard.entries(found)
    predictions = [str(one) for one in prediction.predictions(found)]
    verdict, caveats = leaderboard.verdict(entries), leaderboard.caveats(found)
    return Results(directory, found, entries, verdict, caveats, predictions, [], COMMAND)


class Page(HTMLParser):
    """Elements with their attributes, and the text without that of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self._tag = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._tag = tag

    def handle_endtag(self, tag):
        self._tag = ""

    def handle_data(self, data):
        self.text += data if self._tag not in ("script", "style") else ""

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep with all there can be: a grid with seeds, failures, hostile names and texts; as a page too."""
    directory = tmp_path_factory.mktemp("sweeps") / "lr 'vs' <b>context"
    directory.mkdir()
    add_grid(directory, seeds=(1, 2))
    settings = {"optimizer.lr": 0.1, "model.context_length": 64, "seed": 1}
    error = "the loss is not finite at step 2 " + HOSTILE
    add_job(directory, settings, [10.8, 12.0, math.nan], status="failed", error=error, code=4, log="/runs/x/train.log")
    add_job(directory, settings | {"optimizer.lr": "\"><b id=got>'quoted'"}, [], status="new")
    html = write(directory)
    return SimpleNamespace(directory=directory, html=html, page=Page(html), jobs=jobs.read(directory))


def test_the_same_jobs_give_the_same_bytes(sweep):
    assert write(sweep.directory) == sweep.html


def test_nothing_of_the_page_is_elsewhere(sweep):
    for tag, attributes in sweep.page.elements:
        assert not {"src", "srcset", "action", "formaction", "data", "poster", "background"} & set(attributes), tag
        assert attributes.get("href", "#").startswith(("#", "data:,")), tag
        assert not any(name.startswith("on") for name in attributes), tag
    assert not re.search(r"url\(|@import|https?://", sweep.html)
    (policy,) = (a["content"] for _, a in sweep.page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ") and "script-src 'sha256-" in policy


def test_texts_from_files_are_shown_and_are_nothing_else(sweep):
    assert sweep.page.count("script") == 2 and sweep.page.count("img") == 0
    assert sweep.page.count("b") == 1  # of the note
    assert "\u202e" not in sweep.html and "\x1b" not in sweep.html
    shown = HOSTILE.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
    # twice as prompt and sample of two jobs, which share a heading; and once as an error
    assert sweep.page.text.count(shown) == 4
    assert "lr 'vs' <b>context" in sweep.page.text


@pytest.mark.parametrize(
    "hostile", [HOSTILE, "</script><!--<script>\u2028'\"", "</td></table>&lt;", "{{ 7 * 191 }}{% x %}"]
)
def test_a_text_stays_a_text_wherever_it_stands(tmp_path, hostile):
    """In the names of settings and of the sweep, values, errors, paths, samples, sentences, and the script's data."""
    directory = tmp_path / hostile.replace("/", "|")
    samples = [{"step": 1, "prompt": hostile, "text": f"{hostile}\nsecond line"}]
    for value in (hostile, "a", "b"):
        for other in (hostile, "c"):
            add_job(directory, {hostile: value, "other": other}, [5.0, math.nan, 6.0], samples)
    add_job(directory, {hostile: 1, "other": 2}, [], status="failed", error=hostile, log=hostile, code=4)
    said = {"verdict": hostile, "caveats": [hostile], "predictions": [hostile], "command": hostile}
    html = report.write(replace(results(directory, jobs.read(directory)), **said)).read_text(encoding="utf-8")
    page, visible = Page(html), escape(hostile)
    assert page.count("script") == 2 and page.count("img") == 0 and page.count("b") == 2 and "1337" not in page.text
    assert not set(html) & set("\u202e\u2028\x1b") and page.text.count(visible) > 20
    assert f"{visible}\nsecond line" in page.text
    data = re.search(r'id="data">(.*?)</script>', html)[1]
    assert "<" not in data
    names = [job["name"] for job in json.loads(data)]
    assert len(names) == 6 and any(line.endswith(f"={visible}") for name in names for line in name)


def test_the_page_says_what_came_of_the_sweep(sweep):
    text = sweep.page.text
    assert "14 jobs: 12 completed, 1 new, 1 failed" in text
    entries = leaderboard.entries(sweep.jobs)
    assert leaderboard.verdict(entries) in text
    for entry in entries[:6]:
        assert f"{entry.mean:.4f} ± {entry.std:.4f}" in text and f"{entry.low:.4f} to {entry.high:.4f}" in text
    assert all(str(one) in text for one in prediction.predictions(sweep.jobs))
    assert "the loss is not finite at step 2" in text and "(exit code 4)" in text and "/runs/x/train.log" in text
    assert COMMAND in text and "must not guide clinical decisions" in text
    assert f"report={sweep.directory.name}" in shlex.split(text[text.index("This report again") :])


def test_the_last_samples_of_best_and_worst_stand_side_by_side(sweep):
    text = sweep.page.text
    completed = sorted((job for job in sweep.jobs if job.status == "completed"), key=lambda job: job.val_loss)
    pair = text[text.index("What is gout ?") :]
    best, first = f"best, val/loss {completed[0].val_loss:.4f}", "Gout, at 0.001.\n\nA second line."
    worst, second = f"worst, val/loss {completed[-1].val_loss:.4f}", "Gout, at 0.0003.\n\nA second line."
    assert pair.index(best) < pair.index(first) < pair.index(worst) < pair.index(second)
    assert text.count("What is gout ?") == 1 and "noise of the first step" not in text


def test_settings_are_told_apart_into_those_that_vary_and_those_in_common(tmp_path):
    for number, (model, layers) in enumerate([("tiny", 4), ("mini", 8)]):
        add_job(
            tmp_path, {"seed": number, "model.n_layer": layers}, [5.0], overrides=[f"model={model}", f"seed={number}"]
        )
    text = Page(write(tmp_path)).text
    settings = text[text.index("Every job (2)") :]
    assert settings.index("tiny") < settings.index("mini")
    follows = settings[settings.index("What follows from these settings (1)") : settings.index("in common (")]
    assert "model.n_layer" in follows and "4, 8" in follows
    assert "data.name" in settings[settings.index("in common (") :]


def test_the_best_job_can_be_run_again_with_the_command_that_is_shown(sweep):
    job = replace(
        sweep.jobs[0], overrides=['+data.prompts=[it\'s, "$x"]', "seed=1", "sweep.name=a b", "hydra/launcher=joblib"]
    )
    words = shlex.split(report.reproduce(job))
    assert words[0] == "python" and Path(words[1]).is_file() and words[2:] == ['+data.prompts=[it\'s, "$x"]', "seed=1"]
    job = replace(job, overrides=["experiments=lr_vs_context", "optimizer.lr=0.001"])
    assert shlex.split(report.reproduce(job))[2:] == [
        "hydra.mode=RUN",
        "experiments=lr_vs_context",
        "optimizer.lr=0.001",
    ]
    best = min((job for job in sweep.jobs if job.status == "completed"), key=lambda job: job.val_loss)
    assert report.reproduce(best) in sweep.page.text


@pytest.mark.parametrize("losses", [None, [], [math.nan, math.inf], [5.0], [0.0, 0.0], [7.0, math.nan, 6.0, 1e300]])
@pytest.mark.parametrize("status", ["completed", "interrupted", "failed"])
def test_any_single_job_has_a_page(tmp_path, losses, status):
    if losses is not None:
        add_job(tmp_path, {"seed": 1, "name": "x" * 3000}, losses, status=status)
    page = Page(write(tmp_path))
    assert page.count("path") == bool(losses and any(map(math.isfinite, losses)))
    assert ("1 job: 1 " if losses is not None else "no jobs") in page.text
    assert "nan" not in page.text.lower() and len(page.text) < 8000


def test_two_hundred_jobs_stay_legible_and_none_is_left_out(tmp_path):
    many = []
    for i in range(200):
        config = {"optimizer.lr": 1e-4 * (1 + i), "data.prompts": "a very long setting " * 50 + str(i)}
        rows = [{"tokens": 0, "val/loss": 10.0}, {"tokens": 100, "val/loss": 6.0 + i / 100}]
        overrides = [f"{key}={value}" for key, value in config.items()]
        many.append(Job(tmp_path / f"{i:08x}", i, overrides, config, status="completed", rows=rows))
    html = report.write(replace(results(tmp_path, many), verdict="")).read_text(encoding="utf-8")
    page = Page(html)
    assert page.count("path") == 200 and page.count("li") == 9  # a legend of the best 8, and of the others
    assert sum("data-jobs" in attributes for tag, attributes in page.elements if tag == "tr") == 400
    assert len(html) < 1_000_000
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    assert len({tuple(job["name"][1:]) for job in data}) == 200  # shortened, and still told apart
    assert max(len(line) for job in data for line in job["name"]) <= 120


def test_a_damaged_job_and_unreadable_samples_do_not_stop_the_report(tmp_path, logger):
    add_grid(tmp_path)
    best, other, *_ = jobs.read(tmp_path)
    (other.folder / "job.json").write_text('{"format": 2')
    (best.folder / "samples.jsonl").unlink()
    (best.folder / "samples.jsonl").mkdir()
    (best.folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 5, "val/loss": 0.5}\n')
    text = Page(write(tmp_path)).text
    assert "its job.json cannot be read" in text and str(other.folder) in text
    assert "(no sample)" in text and "What is gout ?" in text


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path):
    add_grid(tmp_path)
    before = write(tmp_path)
    (tmp_path / ".report.html.new").mkdir()
    with pytest.raises(OSError):
        write(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


def test_a_long_text_keeps_its_begin_and_its_end_and_the_given_length():
    assert report.shortened("abc", 3) == "abc"
    for longest in (10, 11, 120):
        short = report.shortened("begin" + "-" * 200 + "end", longest)
        assert len(short) == longest and short.startswith("begi") and short.endswith("end")
    assert report.lines("<" * 1000, 100).count("&lt;") == 97  # cut before it is escaped, never inside a code


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (0.001, '<td class="number">0.001</td>'),
        (6, '<td class="number">6</td>'),
        (True, "<td>true</td>"),
        ("mini", "<td>mini</td>"),
        ("x" * 25, f'<td class="long">{"x" * 25}</td>'),
        (None, "<td></td>"),
    ],
)
def test_numbers_stand_to_the_right_and_what_is_not_there_is_an_empty_cell(tmp_path, value, cell):
    for number, one in enumerate([value, "another"]):
        add_job(tmp_path, {"optimizer.lr": one}, [6.25 + number])
    html = write(tmp_path)
    assert html.count(cell) >= 2  # in the leaderboard, and in the table of all jobs
    assert '<td class="number">6.2500</td>' in html


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def visit(chromium, sweep):
    """Opens the sweep's page, or another file, in a window of its own and records what it does."""

    def visit(path: Path = sweep.directory / "report.html", **options):
        page = chromium.new_context(viewport={"width": 1280, "height": 900}, **options).new_page()
        page.requests, page.refused, page.complaints = [], [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("requestfailed", lambda request: page.refused.append((request.url, request.failure)))
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("dialog", lambda dialog: page.complaints.append(dialog.message))
        page.goto(path.as_uri())
        return page

    return visit


@pytest.fixture(scope="module")
def page(visit):
    return visit()


def test_a_browser_shows_the_curves_without_complaint_and_asks_nobody(page, sweep, tmp_path):
    evaluated = [job for job in sweep.jobs if job.val_loss is not None]
    assert page.locator("#plot svg path").count() == len(evaluated) == 13
    boxes = "[...document.querySelectorAll('#plot path')].map((path) => path.getBoundingClientRect().width)"
    assert all(width > 50 for width in page.evaluate(boxes))
    box = page.locator("#plot").bounding_box()
    assert box["width"] > 800 and box["height"] > 300
    screenshot = page.screenshot(path=tmp_path / "report.png", full_page=True)
    if copy := os.environ.get("REPORT_SCREENSHOT"):
        Path(copy).write_bytes(screenshot)
    assert len(screenshot) > 50_000
    assert page.requests == [(sweep.directory / "report.html").as_uri()] and page.complaints == []
    assert page.title() == f"Sweep {sweep.directory.name}"  # which the hostile texts would change
    assert page.locator("#got, img").count() == 0


def test_pointing_at_a_curve_names_its_job_and_marks_its_row(page, sweep):
    best = min((job for job in sweep.jobs if job.status == "completed"), key=lambda job: job.val_loss)
    page.locator("#plot").scroll_into_view_if_needed()
    point = page.locator(".best-point").bounding_box()
    page.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    text = page.locator("#tip").inner_text()
    assert f"job {best.id}" in text and "optimizer.lr=0.001" in text and "model.context_length=128" in text
    assert "tokens 500" in text and f"val/loss {best.val_loss:.4f}" in text
    assert page.locator("#plot path.on").count() == 1
    assert page.locator("#leaderboard tr.on").get_attribute("class") == "best on"
    page.mouse.move(5, 5)
    assert page.locator("#tip").is_hidden() and page.locator(".on").count() == 0
    page.locator("#leaderboard tbody tr").nth(1).hover()
    assert page.locator("#plot path.on").count() == 2  # both seeds of the second best
    page.mouse.move(5, 5)


def test_the_keyboard_reaches_every_curve_and_row(page):
    def press(key: str, times: int = 1) -> str:
        for _ in range(times):
            page.keyboard.press(key)
        return page.locator("#tip").inner_text()

    page.locator("#leaderboard tbody tr").first.focus()
    assert page.locator("#plot path.on").count() == 2
    page.locator("#plot").focus()
    first = press("ArrowLeft")
    assert "tokens 400" in first
    below = press("ArrowDown")
    assert "tokens 400" in below and below != first
    assert "tokens 0" in press("ArrowLeft", 6)  # a point above the picture
    plot, tip = page.locator("#plot").bounding_box(), page.locator("#tip").bounding_box()
    assert plot["y"] <= tip["y"] and tip["y"] + tip["height"] <= plot["y"] + plot["height"]
    assert len({press("ArrowDown").split("\n")[0] for _ in range(12)}) == 11  # from the second of 13, to the last
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden() and page.complaints == []


def test_a_click_or_enter_on_a_heading_sorts_a_table_with_what_is_missing_last(visit):
    page = visit()

    def column(number: int) -> list[str]:
        return page.locator(f"#leaderboard tbody tr td:nth-child({number})").all_inner_texts()

    headings = page.locator("#leaderboard thead th")
    names = headings.all_inner_texts()
    losses = names.index("val/loss") + 1
    before = column(losses)
    values = [float(text.split()[0]) for text in before if text]
    headings.nth(losses - 1).click()
    assert [float(text.split()[0]) for text in column(losses) if text] == sorted(values)
    page.keyboard.press("Enter")  # the heading has the focus: the other way round
    assert [float(text.split()[0]) for text in column(losses) if text] == sorted(values, reverse=True)
    assert column(losses)[-1] == "" == before[-1]
    assert headings.nth(losses - 1).get_attribute("aria-sort") == "descending"
    tokens = names.index("tokens") + 1
    headings.nth(tokens - 1).click()
    assert headings.nth(losses - 1).get_attribute("aria-sort") is None
    numbers = [int(text.replace(",", "")) for text in column(tokens) if text]
    assert numbers == sorted(numbers) and page.complaints == []


def test_the_page_fits_a_phone_a_dark_screen_and_paper(page):
    for width, scheme, media in [(400, "light", "screen"), (400, "dark", "screen"), (800, "dark", "print")]:
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(media=media, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        ticks = sorted((one.bounding_box() for one in page.locator(".tick.x").all()), key=lambda box: box["x"])
        assert len(ticks) > 2 and all(a["x"] + a["width"] < b["x"] for a, b in pairwise(ticks))
        colours = page.evaluate("(({backgroundColor: b, color: c}) => [b, c])(getComputedStyle(document.body))")
        back, text = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in colours)
        assert back < 0.2 and text > 0.8 if (scheme, media) == ("dark", "screen") else back > 0.9 and text < 0.2
        assert page.locator("nav").is_hidden() == (media == "print")


def test_without_scripts_the_curves_and_tables_are_there_all_the_same(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("#plot svg path").count() == page.locator("#plot path title").count() == 13
    assert page.locator("#leaderboard tbody tr").count() == 8 and page.complaints == []


def test_even_markup_that_came_through_would_neither_run_nor_fetch(visit, sweep, tmp_path):
    hostile = "document.title='run'"
    attack = f'<script>{hostile}</script><img src=x onerror="{hostile}"><img src="http://127.0.0.1:9/">'
    path = tmp_path / "attacked.html"
    path.write_text(sweep.html.replace("<main>", "<main>" + attack), encoding="utf-8")
    page = visit(path)
    assert page.locator("img").count() == 2 and page.locator("#plot path").count() == 13
    assert page.title() != "run" and len(page.complaints) >= 3  # what Chromium says that it refused
    assert page.requests[0] == path.as_uri() and len(page.requests) == 3
    assert page.refused == [(url, "csp") for url in page.requests[1:]]
