"""What the figures show is for people to judge; here is what can be checked: they are made, from any rows."""

import math

import matplotlib.image
import pytest

from gpt import figures

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
    figures.comparison({"0: a": rows, "1: b": ROWS}, tmp_path / "comparison.png", "a sweep")
    assert size(tmp_path / "loss.png") and size(tmp_path / "comparison.png")


def test_the_legend_of_a_large_sweep_stands_beside_the_curves(tmp_path):
    many = {f"{i}: optimizer.lr={i} data.prompts=['$x$ {'long ' * 30}']": ROWS for i in range(25)}
    figures.comparison(many, tmp_path / "many.png", "costs $5")
    figures.loss_curve(ROWS, tmp_path / "one.png", "one")
    assert size(tmp_path / "many.png")[0] > size(tmp_path / "one.png")[0] + 200


@pytest.mark.parametrize(("lengths", "limit"), [([5, 80, 300, 5520], 1024), ([7], None), ([0, 1], 1), ([], 128)])
def test_token_lengths_are_drawn_with_and_without_a_limit(tmp_path, lengths, limit):
    figures.length_histogram(lengths, limit, tmp_path / "lengths.png")
    assert size(tmp_path / "lengths.png")
