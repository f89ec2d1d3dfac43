"""The curves of a report: every evaluation is in its place, whatever the losses are."""

import math
import re

import pytest

from gpt.sweeps import chart
from gpt.sweeps.chart import Curve, Picture

POINTS = [(0, 10.8), (100, 7.0), (200, 6.5), (300, 6.0)]


def curve(points, number=0, name="job a") -> Curve:
    return Curve(number, [name], "c0", points)


def test_the_rows_of_evaluations_are_the_points():
    rows = [{"tokens": 0, "val/loss": 10.8}, {"tokens": 50, "train/loss": 9.0}, {"step": 3, "val/loss": 8.0}]
    assert chart.points(rows) == [(0, 10.8)]
    assert chart.points([{"tokens": 5, "val/loss": math.nan}]) == chart.points([]) == []
    assert chart.points([{"tokens": math.inf, "val/loss": 5.0}]) == []


def test_lower_losses_are_drawn_lower_and_more_tokens_to_the_right():
    [line] = (picture := Picture([curve(POINTS)])).curves
    places = [tuple(map(float, place)) for place in re.findall(r"([\d.-]+) ([\d.-]+)", picture.path(line))]
    assert len(places) == 4
    assert places == sorted(places) and [y for _, y in places] == sorted(y for _, y in places)
    assert places[0][1] < 0 < places[1][1]  # the loss before training is above the picture
    assert all(0 <= x <= 1000 for x, _ in places) and picture.lowest == places[-1]


def test_a_loss_that_is_not_finite_leaves_a_gap_and_a_point_alone_is_visible():
    broken = curve([(0, 7.0), (1, math.nan), (2, 6.0), (3, 5.0), (4, math.inf)])
    picture = Picture([broken])
    path = picture.path(broken)
    assert path.count("M") == path.count("h0") == 2 and path.count("L") == 1
    assert picture.gaps == 2
    assert "nan" not in path and "inf" not in path


@pytest.mark.parametrize("points", [[(0, 5.0)], [(0, 0.0)], [(10, 6.0), (20, 6.0)], [(1, 1e300)], [(1, -3.0)]])
def test_curves_without_any_extent_can_be_drawn(points):
    picture = Picture([curve(points)])
    assert "nan" not in picture.path(picture.curves[0]) and picture.loss_ticks() and picture.token_ticks()


def test_the_script_gets_the_places_of_all_finite_losses():
    picture = Picture([curve([*POINTS, (400, math.nan)], 7)])
    (data,) = picture.data()
    assert data["name"] == ["job a"] and data["number"] == "7" and len(data["points"]) == 4
    assert [point[:2] for point in data["points"]] == [list(point) for point in POINTS]
    assert [point[2:] for point in data["points"]] == [[picture.x(x), picture.y(y)] for x, y in POINTS]


def test_ticks_of_tokens_are_short():
    assert Picture([curve([(0, 9.0), (102400, 5.0)])]).token_ticks()[1] == (20000, "20k")


@pytest.mark.parametrize(
    ("low", "high", "most"), [(0, 102400, 6), (6.1, 7.3, 8), (-1, 1, 4), (0, 1, 5), (1e-9, 3e-9, 8)]
)
def test_ticks_are_few_round_numbers_inside_the_range(low, high, most):
    ticks = chart.round_numbers(low, high, most)
    assert 2 <= len(ticks) <= most + 1
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks)
    step = ticks[1] - ticks[0]
    assert f"{step:.0e}"[0] in "125"
