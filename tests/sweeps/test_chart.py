"""The curves of a report: every evaluation is in its place, whatever the losses are."""

import json
import math
import re

import pytest

from gpt.sweeps import chart
from gpt.sweeps.chart import Curve

POINTS = [(0, 10.8), (100, 7.0), (200, 6.5), (300, 6.0)]


def curve(points, number=0, name="job a") -> Curve:
    return Curve(number, [name], "c0", points)


def paths(html: str) -> list[str]:
    return re.findall(r'<path [^>]*d="([^"]*)"', html)


def test_the_rows_of_evaluations_are_the_points():
    rows = [{"tokens": 0, "val/loss": 10.8}, {"tokens": 50, "train/loss": 9.0}, {"step": 3, "val/loss": 8.0}]
    assert chart.points(rows) == [(0, 10.8)]
    assert chart.points([{"tokens": 5, "val/loss": math.nan}]) == chart.points([]) == []
    assert chart.points([{"tokens": math.inf, "val/loss": 5.0}]) == []


def test_lower_losses_are_drawn_lower_and_more_tokens_to_the_right():
    (path,) = paths(chart.draw([curve(POINTS)], []))
    places = [tuple(map(float, place)) for place in re.findall(r"([\d.-]+) ([\d.-]+)", path)]
    assert len(places) == 4
    assert places == sorted(places) and [y for _, y in places] == sorted(y for _, y in places)
    assert places[0][1] < 0 < places[1][1]  # the loss before training is above the picture
    assert all(0 <= x <= 1000 for x, _ in places)


def test_a_loss_that_is_not_finite_leaves_a_gap_and_a_point_alone_is_visible():
    broken = [(0, 7.0), (1, math.nan), (2, 6.0), (3, 5.0), (4, math.inf)]
    html = chart.draw([curve(broken)], [])
    (path,) = paths(html)
    assert path.count("M") == path.count("h0") == 2 and path.count("L") == 1
    assert "2 evaluations without a finite loss are left out" in html
    assert "nan" not in path and "inf" not in path


@pytest.mark.parametrize("points", [[(0, 5.0)], [(0, 0.0)], [(10, 6.0), (20, 6.0)], [(1, 1e300)], [(1, -3.0)]])
def test_curves_without_any_extent_can_be_drawn(points):
    html = chart.draw([curve(points)], [("c0", [0], "the only one")])
    assert len(paths(html)) == 1 and "nan" not in html and "tick y" in html


def test_a_name_or_number_in_the_data_neither_ends_the_element_nor_begins_a_comment():
    hostile = "</script><!--<script>\u2028'\""
    text = chart.data([curve([*POINTS, (400, math.nan)], 7, hostile)])
    assert "<" not in text
    (found,) = json.loads(text)
    assert found["name"] == [hostile] and found["number"] == "7" and len(found["points"]) == 4
    assert [point[:2] for point in found["points"]] == [list(point) for point in POINTS]
    assert chart.data([]) == "[]"


@pytest.mark.parametrize(
    ("low", "high", "most"), [(0, 102400, 6), (6.1, 7.3, 8), (-1, 1, 4), (0, 1, 5), (1e-9, 3e-9, 8)]
)
def test_ticks_are_few_round_numbers_inside_the_range(low, high, most):
    ticks = chart.round_numbers(low, high, most)
    assert 2 <= len(ticks) <= most + 1
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks)
    step = ticks[1] - ticks[0]
    assert f"{step:.0e}"[0] in "125"
