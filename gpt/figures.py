"""PNG figures: the loss of a run, the comparison of a sweep, the token lengths of prepared data.

The same numbers give the same bytes on the same machine. Figures are made without pyplot, which keeps state.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # matplotlib takes 0.4 s to import: only when a figure is drawn
    from matplotlib.axes import Axes

Row = dict[str, Any]


def loss_curve(rows: list[Row], path: Path, title: str) -> None:
    """train/loss and val/loss over tokens, from the rows of a metrics.jsonl."""

    def draw(axes: "Axes") -> None:
        for key, style in (("train/loss", {"linewidth": 1}), ("val/loss", {"linewidth": 2, "marker": "o"})):
            axes.plot(*_series(rows, key), label=key, markersize=4, **style)
        axes.set(title=_plain(title), xlabel="tokens", ylabel="loss (nats per token)")
        _tokens_axis(axes)
        axes.legend()

    _save(draw, path)


def comparison(curves: dict[str, list[Row]], path: Path, title: str) -> None:
    """val/loss over tokens, one curve for each job of a sweep, best first in the legend."""

    def draw(axes: "Axes") -> None:
        from matplotlib import colormaps

        best = {label: _lowest(_series(rows, "val/loss")[1]) for label, rows in curves.items()}
        for number, label in enumerate(sorted(curves, key=lambda label: (best[label], label))):
            # Ten colours, then the same ones dashed, dotted and dash-dotted.
            style = {"color": colormaps["tab10"](number % 10), "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}
            tokens, losses = _series(curves[label], "val/loss")
            axes.plot(tokens, losses, label=f"{best[label]:.3f}  {_plain(label)}", marker="o", markersize=3, **style)
        axes.set(title=_plain(title), xlabel="tokens", ylabel="val/loss (nats per token)")
        _tokens_axis(axes)
        axes.legend(title="best val/loss", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, fontsize=8)

    _save(draw, path)


def length_histogram(lengths: list[int], limit: int | None, path: Path) -> None:
    """How long the documents are in tokens, on a logarithmic axis, with percentiles and the limit marked."""

    def draw(axes: "Axes") -> None:
        import numpy as np
        from matplotlib.ticker import ScalarFormatter

        values = np.asarray(lengths)
        top = max(values.max(initial=1), limit or 1)
        axes.hist(values, bins=np.geomspace(max(values.min(initial=top), 1), top + 1, 60), color="tab:blue", alpha=0.6)
        if len(values):
            for percent, style in ((50, "-"), (95, "--"), (99, ":")):
                value = np.percentile(values, percent)
                axes.axvline(value, color="black", linestyle=style, label=f"{percent} % have at most {value:,.0f}")
        if limit is not None:
            over = int((values > limit).sum())
            axes.axvline(limit, color="tab:red", linewidth=2, label=f"limit {limit:,} ({over:,} documents are longer)")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set(title=f"{len(values):,} documents", xlabel="tokens per document", ylabel="documents")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)

    _save(draw, path)


def _series(rows: list[Row], key: str) -> tuple[list[float], list[float]]:
    points = [(row["tokens"], row[key]) for row in rows if key in row and "tokens" in row]
    return [x for x, _ in points], [y for _, y in points]


def _tokens_axis(axes: "Axes") -> None:
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k, 1M
    axes.grid(alpha=0.3)


def _lowest(losses: list[float]) -> float:
    return min((loss for loss in losses if not math.isnan(loss)), default=math.inf)


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
