"""Computes the picture of val/loss over tokens that report.html.j2 draws as an SVG."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gpt.config.schema import METRIC
from gpt.terminal.figures import loss_range

COLOURED = 8  # entries of a leaderboard whose curves have a colour; the others are grey


class Curve(NamedTuple):
    """The evaluations of a job."""

    number: int  # by which rows of tables and the script know the job
    name: list[str]  # "job 1a2b3c4d", "optimizer.lr=0.001", ...
    style: str  # a class of report.css
    points: list[tuple[float, float]]  # (tokens, loss); NaN makes a gap


class Picture:
    """Places of one curve or more, best first, in a picture of 1000 x 1000, y downward."""

    def __init__(self, curves: Sequence[Curve]) -> None:
        self.curves = curves
        self.low, self.high, self.outside = loss_range([curve.points for curve in curves])
        self.most_tokens = max(tokens for curve in curves for tokens, _ in curve.points) or 1
        evaluations = [(loss, tokens, curve) for curve in curves for tokens, loss in curve.points]
        finite = [evaluation for evaluation in evaluations if math.isfinite(evaluation[0])]
        self.gaps = len(evaluations) - len(finite)
        loss, tokens, self.best = min(finite, key=lambda evaluation: evaluation[0])
        self.lowest = self.x(tokens), self.y(loss)  # the best curve's lowest point

    def x(self, tokens: float) -> float:
        return round(15 + 970 * tokens / self.most_tokens, 1)

    def y(self, loss: float) -> float:
        return round(1000 * (self.high - loss) / (self.high - self.low), 1)

    def loss_ticks(self) -> list[float]:
        return round_numbers(self.low, self.high, most=8)

    def token_ticks(self) -> list[tuple[float, str]]:
        """(tokens, label), as in (20000, "20k")."""
        from matplotlib.ticker import EngFormatter

        label = EngFormatter(sep="").format_eng
        return [(tokens, label(tokens)) for tokens in round_numbers(0, self.most_tokens, most=6)]

    def path(self, curve: Curve) -> str:
        """The `d` of an SVG path."""
        path, pen = "", "M"
        for tokens, loss in curve.points:
            if math.isfinite(loss):
                # A point alone is a line without length, which round caps make visible.
                path += f"{pen}{self.x(tokens)} {self.y(loss)}" + ("h0" if pen == "M" else "")
            pen = "L" if math.isfinite(loss) else "M"
        return path

    def data(self) -> list[dict[str, object]]:
        """What report.js shows of each curve; a point is tokens, loss, x and y."""
        return [
            {
                "number": str(curve.number),
                "name": curve.name,
                "points": [[x, y, self.x(x), self.y(y)] for x, y in curve.points if math.isfinite(y)],
            }
            for curve in self.curves
        ]


def points(rows: Iterable[dict[str, float]]) -> list[tuple[float, float]]:
    """(tokens, val/loss) of the evaluations among a job's rows; none if no loss is finite."""
    evaluations = [(row["tokens"], row[METRIC]) for row in rows if "tokens" in row and METRIC in row]
    evaluations = [(tokens, loss) for tokens, loss in evaluations if math.isfinite(tokens)]
    return evaluations if any(math.isfinite(loss) for _, loss in evaluations) else []


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`, with at most `most` gaps between them."""
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in ticks if low <= tick <= high]
