"""What the figures show is for people to judge; here is what can be checked: they are made, from any rows."""

import math
from dataclasses import replace

import matplotlib.image
import pytest

from gpt.terminal import figures

ROWS = [
    {"step": 0, "tokens": 0, "val/loss": 10.8},
    {"step": 10, "tokens": 20480, "train/loss": 7.5},
    {"step": 20, "tokens": 40960, "train/loss": 6.5, "val/loss": 6.4},
]


def size(path) -> tuple[int, int]:
    height, width, _ = matplotlib.image.imread(path).shape
    return width, height


def test_the_same_rows_give_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        figures.loss_curve(ROWS, tmp_path / "new folder" / name, "tiny on sample")
    first, second = ((tmp_path / "new folder" / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second
    assert size(tmp_path / "new folder" / "a.png")[0] > 600


@pytest.mark.parametrize("rows", [[], [{"step": 1}], [*ROWS, {"step": 30, "tokens": 61440, "val/loss": math.nan}]])
def test_a_curve_is_drawn_from_rows_that_lack_something(tmp_path, rows):
    figures.loss_curve(rows, tmp_path / "loss.png", "an unfinished run")
    figures.curves({"0: a": rows, "1: b": ROWS}, tmp_path / "curves.png", "a sweep")
    assert size(tmp_path / "loss.png") and size(tmp_path / "curves.png")


def test_the_legend_of_a_large_sweep_stands_beside_the_curves(tmp_path):
    many = {f"{i}: optimizer.lr={i} data.prompts=['$x$ {'long ' * 30}']": ROWS for i in range(25)}
    figures.curves(many, tmp_path / "many.png", "costs $5")
    figures.loss_curve(ROWS, tmp_path / "one.png", "one")
    assert size(tmp_path / "many.png")[0] > size(tmp_path / "one.png")[0] + 200


def test_of_a_very_large_sweep_all_curves_are_drawn_and_the_best_are_named(tmp_path):
    jobs = {f"job {i}": [{"tokens": 0, "val/loss": 9.0}, {"tokens": 99, "val/loss": 6 + i / 200}] for i in range(200)}
    figures.curves(jobs, tmp_path / "curves.png", "200 jobs")
    assert size(tmp_path / "curves.png")[1] < 1000  # the legend does not grow with the sweep
    image = matplotlib.image.imread(tmp_path / "curves.png")[..., :3]
    assert (abs(image - 0.8) < 0.01).all(-1).sum() > 1000  # the grey of those without a name


def test_all_evaluations_but_the_first_and_those_of_jobs_that_diverged_are_in_view():
    few = [[(0, 10.85), (25_600, 7.4 - job / 10), (51_200, 7.0 - job / 100)] for job in range(4)]
    low, high, outside = figures.loss_range(few)
    assert low < 6.97 and 7.4 < high < 7.5 and outside == 4
    assert "4 evaluations, those before training among them" in figures.not_in_view(outside, high)
    diverged = [(0, 10.85), (25_600, 40.0), (51_200, 60.0)]
    assert figures.loss_range([*few, diverged]) == (low, high, 7)
    worse_than_before = [[(0, 3.0), (1, 3.2), (2, 3.1)]]  # fine-tuning at too high a rate
    low, high, outside = figures.loss_range(worse_than_before)
    assert low < 3.1 and high > 3.2 and outside == 0
    assert figures.not_in_view(0, 1.0) == ""


def test_the_colours_of_a_heatmap_are_not_those_of_one_cell_that_diverged():
    low, high = figures.colour_range([6.5, 6.4, 6.3, 6.2, 900.0, math.nan])
    assert 6 < low < 6.2 and high < 10
    assert figures.colour_range([]) < (0.1, 2.0)


@pytest.mark.parametrize(
    "curves", [[], [[]], [[(0, math.nan)]], [[(5, math.inf), (6, 4.0)]], [[(0, 0.0)]], [[(1, -2.0)]]]
)
def test_a_picture_has_a_height_whatever_is_in_it(curves):
    low, high, outside = figures.loss_range(curves)
    assert math.isfinite(low) and math.isfinite(high) and low < high and outside == 0


GRID = figures.Grid(
    ("optimizer.lr", "model.context_length"),
    ["0.0003", "0.001"],
    ["64", "128", "256"],
    [[6.5, 6.4, math.nan], [6.2, 6.3, 6.9]],
    (1, 0),
    {(1, 2)},
)


def reddish(path) -> tuple[float, float]:
    """Where the frame around the best cell is, as parts of the width and the height."""
    image = matplotlib.image.imread(path)[..., :3]
    frame = (abs(image - [0.839, 0.153, 0.157]) < 0.02).all(-1)  # matplotlib's tab:red
    ys, xs = frame.nonzero()
    return xs.mean() / image.shape[1], ys.mean() / image.shape[0]


def test_the_best_cell_of_a_heatmap_is_framed(tmp_path):
    figures.heatmap(GRID, tmp_path / "a.png", "lr by context")
    figures.heatmap(replace(GRID, best=(0, 1)), tmp_path / "b.png", "lr by context")
    (x, y), (other_x, other_y) = reddish(tmp_path / "a.png"), reddish(tmp_path / "b.png")
    assert x < 0.4 < other_x and other_y < 0.5 < y


@pytest.mark.parametrize(
    "grid",
    [
        replace(GRID, rows=["$x$", "adamw" * 30], losses=[[6.5, 6.4, 900.0], [6.2, 6.3, math.nan]], best=None),
        replace(GRID, rows=["1"], columns=[str(i) for i in range(200)], losses=[[5 + i / 100 for i in range(200)]]),
    ],
)
def test_a_heatmap_of_any_size_is_drawn(tmp_path, grid):
    figures.heatmap(grid, tmp_path / "heatmap.png", "costs $5")
    assert size(tmp_path / "heatmap.png")[0] < 1500


@pytest.mark.parametrize(("lengths", "limit"), [([5, 80, 300, 5520], 1024), ([7], None), ([0, 1], 1), ([], 128)])
def test_token_lengths_are_drawn_with_and_without_a_limit(tmp_path, lengths, limit):
    figures.length_histogram(lengths, limit, tmp_path / "lengths.png")
    assert size(tmp_path / "lengths.png")


def test_the_documents_fill_the_picture_of_lengths_from_side_to_side(tmp_path):
    """Blue from the first column of the axes to the last, also where the limit is far beyond all documents, and the
    legend covers none of it."""
    figures.length_histogram(list(range(40, 120)) * 5, 4096, tmp_path / "lengths.png")
    image = matplotlib.image.imread(tmp_path / "lengths.png")[..., :3]
    blue = (abs(image - [0.474, 0.678, 0.825]) < 0.03).all(-1)  # tab:blue, 0.6 of it on white
    columns = blue.any(0).nonzero()[0]
    black = (image < 0.1).all(-1).sum(0)  # the frame's two sides are the longest black columns
    sides = (black > black.max() * 0.95).nonzero()[0]
    assert columns[0] - sides[0] < 5 and sides[-1] - columns[-1] < 5
