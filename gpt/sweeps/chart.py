"""Draws curves of val/loss over tokens as an SVG that is complete without a script, and the data with which report.js
shows what one points at.

The text around the SVG is HTML: on a narrow page the picture is compressed and the letters are not.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gpt.config.schema import METRIC
from gpt.sweeps.markup import text
from gpt.terminal.figures import loss_range

COLOURED = 8  # entries of a leaderboard whose curves have a colour; the others are grey


class Curve(NamedTuple):
    """The evaluations of a job."""

    number: int  # by which rows of tables and the script know the job
    name: list[str]  # "job 1a2b3c4d", "optimizer.lr=0.001", ...
    style: str  # a class of report.css
    points: list[tuple[float, float]]  # (tokens, loss); NaN makes a gap


class Scale:
    """From tokens and loss to a picture of 1000 x 1000, y downward."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        self.low, self.high, self.outside = loss_range([curve.points for curve in curves])
        self.tokens = max(tokens for curve in curves for tokens, _ in curve.points) or 1

    def x(self, tokens: float) -> float:
        return round(15 + 970 * tokens / self.tokens, 1)

    def y(self, loss: float) -> float:
        return round(1000 * (self.high - loss) / (self.high - self.low), 1)


def points(rows: Iterable[dict[str, float]]) -> list[tuple[float, float]]:
    """(tokens, val/loss) of the evaluations among a job's rows; none if no loss is finite."""
    found = [(row["tokens"], row[METRIC]) for row in rows if "tokens" in row and METRIC in row]
    found = [(tokens, loss) for tokens, loss in found if math.isfinite(tokens)]
    return found if any(math.isfinite(loss) for _, loss in found) else []


def draw(curves: Sequence[Curve], legend: Sequence[tuple[str, Sequence[int], str]]) -> str:
    """HTML of the picture of one curve or more, best first. `legend` has style, numbers and name of each line."""
    scale = Scale(curves)
    # The best one is drawn last, on top of the others.
    lines = "\n".join(_line(curve, scale) for curve in reversed(curves))
    ruled, ticks = [], []
    for loss in round_numbers(scale.low, scale.high, most=8):
        y = scale.y(loss)
        ruled.append(f'<line class="grid" x1="0" y1="{y}" x2="1000" y2="{y}"/>')
        ticks.append(f'<span class="tick y" style="top:{y / 10:.2f}%">{loss:.6g}</span>')
    for tokens in round_numbers(0, scale.tokens, most=6):
        left = scale.x(tokens) / 10
        ticks.append(f'<span class="tick x" style="left:{left:.2f}%">{_short(tokens)}</span>')
    names = "".join(
        f'<li data-jobs="{numbered(numbers)}">{swatch(style)}{text(name, 120)}</li>' for style, numbers, name in legend
    )
    notes = ["The dot is the lowest val/loss."]
    if scale.outside:
        notes.append(f"{scale.outside} evaluations above {scale.high:.3g} are not in view.")
    if gaps := sum(not math.isfinite(loss) for curve in curves for _, loss in curve.points):
        notes.append(f"{gaps} evaluations without a finite loss are left out.")
    return f"""\
<figure><div class="chart"><div class="axis">val/loss (nats per token)</div>
<div class="plot" id="plot" role="group" aria-label="val/loss over tokens. Arrow keys: up and down to another job,
left and right along its curve">
<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="Curves of val/loss over tokens">
{"".join(ruled)}
{lines}
{_dot(curves, scale)}
</svg>{"".join(ticks)}<div id="dot" hidden></div><div id="tip" role="status" hidden></div></div>
<div class="axis below">tokens</div></div>
<ul class="legend">{names}</ul>
<figcaption>{" ".join(notes)} <span class="hint">Point at a curve or at a row of a table, or go there with Tab and the
arrow keys.</span></figcaption></figure>
"""


def data(curves: Sequence[Curve]) -> str:
    """The curves as JSON in which nothing ends the element or begins a comment: for a script element of its own.

    Points are tokens, loss, x and y.
    """
    found = []
    if curves:
        scale = Scale(curves)
        for curve in curves:
            places = [[x, y, scale.x(x), scale.y(y)] for x, y in curve.points if math.isfinite(y)]
            found.append({"number": str(curve.number), "name": curve.name, "points": places})
    return json.dumps(found, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def swatch(style: str | None) -> str:
    """A short piece of a curve, for a legend; an empty place without a style."""
    line = f'<line class="curve {style}" x1="1" y1="5" x2="25" y2="5"/>' if style else ""
    return f'<svg class="swatch" viewBox="0 0 26 10" aria-hidden="true">{line}</svg>'


def numbered(numbers: Iterable[int]) -> str:
    """The value of `data-jobs`, by which what belongs together is highlighted together."""
    return " ".join(map(str, numbers))


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`, with at most `most` gaps between them."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * most >= high - low)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _line(curve: Curve, scale: Scale) -> str:
    path, pen = "", "M"
    for tokens, loss in curve.points:
        if math.isfinite(loss):
            # A point alone is a line without length, which round caps make visible.
            path += f"{pen}{scale.x(tokens)} {scale.y(loss)}" + ("h0" if pen == "M" else "")
        pen = "L" if math.isfinite(loss) else "M"
    name = text(" ".join(curve.name), 400)
    return f'<path class="curve {curve.style}" data-jobs="{curve.number}" d="{path}"><title>{name}</title></path>'


def _dot(curves: Sequence[Curve], scale: Scale) -> str:
    places = [(loss, tokens, curve) for curve in curves for tokens, loss in curve.points if math.isfinite(loss)]
    loss, tokens, curve = min(places, key=lambda place: place[0])
    x, y = scale.x(tokens), scale.y(loss)
    return f'<line class="best-point {curve.style}" x1="{x}" y1="{y}" x2="{x}" y2="{y}"/>'


def _short(number: float) -> str:
    """20000 -> 20k"""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.4g}"
