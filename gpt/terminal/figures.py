"""Draws PNG figures: the loss of a run, the curves and the heatmap of a sweep, the token lengths of prepared data.

The same numbers give the same bytes on the same machine. Figures are made without pyplot, which keeps state.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.config.schema import METRIC

if TYPE_CHECKING:  # matplotlib takes 0.4 s to import: only when a figure is drawn
    from matplotlib.axes import Axes

LABELLED = 30  # curves of a sweep with a colour and a line in the legend
Row = dict[str, Any]


def loss_curve(rows: list[Row], path: Path, title: str) -> None:
    """train/loss and val/loss over tokens, from the rows of a metrics.jsonl."""

    def draw(axes: "Axes") -> None:
        for key, style in (("train/loss", {"linewidth": 1}), (METRIC, {"linewidth": 2, "marker": "o"})):
            axes.plot(*_series(rows, key), label=key, markersize=4, **style)
        axes.set(title=_plain(title), xlabel="tokens", ylabel="loss (nats per token)")
        _tokens_axis(axes)
        axes.legend()

    _save(draw, path)


def curves(jobs: dict[str, list[Row]], path: Path, title: str) -> None:
    """val/loss over tokens, one curve for each job of a sweep, best first in the legend, the last ones grey."""

    def draw(axes: "Axes") -> None:
        from matplotlib import colormaps

        series = {label: _series(rows, METRIC) for label, rows in jobs.items()}
        best = {
            label: min((loss for loss in losses if not math.isnan(loss)), default=math.inf)
            for label, (_, losses) in series.items()
        }
        for number, label in enumerate(sorted(jobs, key=lambda label: (best[label], label))):
            # Ten colours, then the same ones dashed and dotted.
            style = {"color": colormaps["tab10"](number % 10), "linestyle": ("-", "--", ":")[number // 10 % 3]}
            style |= {"label": f"{best[label]:.3f}  {_plain(label)}", "marker": "o", "markersize": 3}
            axes.plot(*series[label], **style if number < LABELLED else {"color": "0.8", "linewidth": 0.8, "zorder": 1})
        low, high, outside = loss_range([list(zip(*points, strict=True)) for points in series.values()])
        axes.set_ylim(low, high)
        axes.set(xlabel="tokens", ylabel="val/loss (nats per token)")
        axes.set_title(_plain(title), pad=18)
        _tokens_axis(axes)
        axes.annotate(not_in_view(outside, high), (0.5, 1.01), fontsize=8, xycoords="axes fraction", ha="center",
                      va="bottom", color="0.4")  # fmt: skip
        others = f"\n(grey: {len(jobs) - LABELLED} others)" if len(jobs) > LABELLED else ""
        axes.legend(title="best val/loss" + others, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0,
                    fontsize=8)  # fmt: skip

    _save(draw, path)


def loss_range(curves: list[list[tuple[float, float]]]) -> tuple[float, float, int]:
    """Lowest and highest loss of a picture of curves, (tokens, loss) each, and how many evaluations lie above it: those
    before training, and those of jobs that have diverged: whose loss has risen by more than the best has fallen."""
    finite = [(tokens, loss) for points in curves for tokens, loss in points if math.isfinite(loss)]
    untrained = [loss for tokens, loss in finite if tokens == 0]
    trained = [loss for tokens, loss in finite if tokens > 0] or untrained or [0.0, 1.0]
    low = min(trained)
    first = max([*untrained, low]) if untrained else math.inf
    low, high = _with_margin(low, max(loss for loss in trained if loss <= first + max(first - low, abs(first) / 10)))
    return low, high, sum(loss > high for _, loss in finite)


def not_in_view(outside: int, high: float) -> str:
    """The note on evaluations above the picture; empty without any."""
    many = "evaluations, those before training among them, are" if outside > 1 else "evaluation is"
    return f"{outside} {many} above {high:.3g}, out of view" if outside else ""


def colour_range(losses: Iterable[float]) -> tuple[float, float]:
    """The losses between which a heatmap's colours change. A tenth of the cells may lie above, so that a few jobs that
    have diverged do not make all others look alike."""
    shown = sorted(loss for loss in losses if math.isfinite(loss)) or [0.0, 1.0]
    low, spread = shown[0], shown[len(shown) // 2] - shown[0]
    most = min(shown[len(shown) * 9 // 10], low + 10 * spread)
    return _with_margin(low, min(shown[-1], max(low + 3 * spread, most)))


def _with_margin(low: float, high: float) -> tuple[float, float]:
    margin = (high - low) * 0.05 or max(abs(high) * 0.05, 1e-3)
    return low - margin, high + margin


@dataclass(frozen=True)
class Grid:
    """Mean val/loss over two settings, `losses[row][column]`, NaN where there is none."""

    keys: tuple[str, str]  # of the rows, of the columns
    rows: list[str]  # values of the first key, in order
    columns: list[str]
    losses: list[list[float]]
    best: tuple[int, int] | None  # the lowest loss of jobs that came to their end
    unfinished: set[tuple[int, int]]  # cells whose jobs did not


def heatmap(grid: Grid, path: Path, title: str) -> None:
    """val/loss in a cell for each pair of values, dark is low; the best one framed, those of unfinished jobs with *."""

    def draw(axes: "Axes") -> None:
        import numpy as np
        from matplotlib.patches import Rectangle

        losses = np.array(grid.losses, dtype=float)
        low, high = colour_range(losses.ravel())
        image = axes.imshow(losses, cmap="viridis", vmin=low, vmax=high, aspect="auto")
        axes.figure.colorbar(image, label="val/loss (nats per token)", extend="max" if (losses > high).any() else None)
        axes.set_xticks(*_thinned(grid.columns), rotation=30 if max(map(len, grid.columns)) > 8 else 0)
        axes.set_yticks(*_thinned(grid.rows))
        note = "\n* did not come to an end" if grid.unfinished else ""
        axes.set(title=_plain(title) + note, xlabel=_plain(grid.keys[1]), ylabel=_plain(grid.keys[0]))
        if losses.size <= 150:
            for (i, j), loss in np.ndenumerate(losses):
                text = "" if np.isnan(loss) else f"{loss:.3f}" + "*" * ((i, j) in grid.unfinished)
                colour = "black" if loss > (low + high) / 2 else "white"
                axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
        if grid.best:
            i, j = grid.best
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="tab:red", linewidth=3))

    _save(draw, path)


def over_steps(points: list[tuple[int, float, float, float]], levels: dict[str, float], path: Path, name: str) -> None:
    """A figure over the steps of training, (step, value, low, high) each, with its intervals, and the `levels` of what
    does not learn as lines."""

    def draw(axes: "Axes") -> None:
        steps, values, low, high = zip(*points, strict=True)
        below = [value - end for value, end in zip(values, low, strict=True)]
        above = [end - value for value, end in zip(values, high, strict=True)]
        axes.errorbar(steps, values, yerr=[below, above], marker="o", markersize=4, capsize=3, label="model")
        for number, (label, level) in enumerate(levels.items()):
            axes.axhline(level, color=f"C{number + 1}", linestyle="--", label=_plain(label))
        axes.set(title=_plain(name), xlabel="step", ylabel=_plain(name))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)

    _save(draw, path)


def length_histogram(lengths: list[int], limit: int | None, path: Path) -> None:
    """How long the documents are in tokens, on a logarithmic axis, with percentiles and the limit marked. A limit that
    is longer than all documents is only named."""

    def draw(axes: "Axes") -> None:
        import numpy as np
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        values = np.asarray(lengths)
        n_bins = min(60, 10 + len(values) // 20)
        bins = np.geomspace(max(min(lengths, default=1), 1), max(lengths, default=1) + 1, n_bins + 1)
        axes.hist(values, bins=bins, color="tab:blue", alpha=0.6)
        if len(values):
            for percent, style in ((50, "-"), (95, "--"), (99, ":")):
                value = np.percentile(values, percent)
                axes.axvline(value, color="black", linestyle=style, label=f"{percent} % have at most {value:,.0f}")
        if limit is not None:
            over = int((values > limit).sum())
            axes.axvline(limit, color="tab:red", linewidth=2, label=f"limit {limit:,} ({over:,} documents are longer)")
        axes.set_xscale("log")
        axes.set_xlim(bins[0], bins[-1])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(title=f"{len(values):,} documents", xlabel="tokens per document", ylabel="documents")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)

    _save(draw, path)


def _series(rows: list[Row], key: str) -> tuple[list[float], list[float]]:
    points = [(row["tokens"], row[key]) for row in rows if key in row and "tokens" in row]
    return [x for x, _ in points], [y for _, y in points]


def _tokens_axis(axes: "Axes") -> None:
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k, 1M
    axes.grid(alpha=0.3)


def _thinned(labels: list[str], most: int = 25) -> tuple[list[int], list[str]]:
    """Places and texts of at most about `most` ticks, evenly spread."""
    step = -(-len(labels) // most)
    return list(range(0, len(labels), step)), [_plain(label, 24) for label in labels[::step]]


def _plain(text: str, length: int = 60) -> str:
    """Text of bounded length in which matplotlib finds no formula."""
    return (text if len(text) <= length else text[: length - 2] + "..").replace("$", r"\$")


def _save(draw: Callable[["Axes"], None], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without "Software", whose value is matplotlib's version. The default has no date.
    figure.savefig(path, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
