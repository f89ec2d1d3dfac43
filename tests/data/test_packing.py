"""Which segments are read together, and in which order."""

import bisect
import itertools
import tracemalloc

import numpy as np
import pytest

from gpt.data.packing import Plan, WindowPlan, limit_slots, pack, permuted, plan_packed, plan_unpacked


@pytest.mark.parametrize("n", [*range(1, 70), 1023, 1024, 1025, 54_321])
def test_the_pseudorandom_order_has_every_window_exactly_once_and_depends_on_the_key_only(n):
    order = permuted(np.arange(n), n, (1, 2))
    assert np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(permuted(np.arange(n), n, (1, 2)), order)
    some = np.arange(n)[::-3]  # asked for elsewhere and in another order
    assert np.array_equal(permuted(some, n, (1, 2)), order[::-3])
    if n > 20:
        assert not np.array_equal(permuted(np.arange(n), n, (1, 3)), order)


@pytest.mark.parametrize("n", [2, 3, 10, 37])
def test_over_many_keys_each_window_comes_at_each_place_and_before_each_other_equally_often(n):
    """Pearson's chi-square; with so many cells it is within 5 standard deviations of its mean, if they are alike."""
    keys = 1000
    orders = np.array([permuted(np.arange(n), n, (0, key)) for key in range(keys)])
    at_place = np.array([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    neighbours = np.bincount((orders[:, :-1] * n + orders[:, 1:]).ravel(), minlength=n * n).reshape(n, n)
    pairs = neighbours[~np.eye(n, dtype=bool)]  # no window follows itself
    for counts in (at_place.ravel(), pairs):
        expected = counts.mean()
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < len(counts) + 5 * np.sqrt(2 * len(counts)), chi_square


def test_a_pseudorandom_order_mixes_near_and_far():
    n = 100_000
    order = permuted(np.arange(n), n, (3,))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02  # a standard deviation is 0.003
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.02
    assert abs(np.abs(order - np.arange(n)).mean() / n - 1 / 3) < 0.01  # that of two independent uniform numbers


def test_a_plan_of_windows_costs_nothing_however_many_there_are():
    plan = WindowPlan(10**15, 4, (0, 0))
    tracemalloc.start()
    try:
        rows = [plan.step(step) for step in (0, 1, 10**13, len(plan) - 1)]
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    windows = np.concatenate([row for step in rows for row in step])
    assert len(plan) == 10**15 // 4 and len(set(windows.tolist())) == 16
    assert windows.min() >= 0 and windows.max() < 10**15 and windows.std() > 10**14


def test_the_last_step_of_a_plan_of_windows_has_what_remains():
    plan = WindowPlan(11, 4, (0, 0))
    assert [len(plan.step(step)) for step in range(len(plan))] == [4, 4, 3]
    assert sorted(int(row[0]) for step in range(len(plan)) for row in plan.step(step)) == list(range(11))


def packed_one_by_one(lengths, capacity, rng):
    """The definition of best-fit decreasing, a segment at a time."""
    order = rng.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    rows, by_room, rooms = [], {}, []
    for segment, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        i = bisect.bisect_left(rooms, length)
        if i == len(rooms):
            row, room = [], capacity
            rows.append(row)
        else:
            room = rooms[i]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[i]
        row.append(segment)
        if room > length:
            if room - length not in by_room:
                bisect.insort(rooms, room - length)
            by_room.setdefault(room - length, []).append(row)
    return rows


@pytest.mark.parametrize("seed", range(40))
def test_packing_all_segments_of_a_length_at_once_is_packing_them_one_by_one(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 100))
    lengths = rng.integers(1, rng.integers(1, capacity + 1) + 1, rng.integers(1, 500))
    segments, rows = pack(lengths, capacity, np.random.default_rng(seed))
    expected = packed_one_by_one(lengths, capacity, np.random.default_rng(seed))
    assert [row.tolist() for row in np.split(segments, rows[1:-1])] == expected


def medquad_like(n):
    """Lengths whose median is 181 tokens, as measured."""
    return np.clip(np.random.default_rng(0).lognormal(5.2, 0.9, n), 30, 1024).astype(int)


def test_packing_leaves_less_than_two_percent_of_padding_on_lengths_like_medquads():
    lengths = medquad_like(5000)
    segments, rows = pack(lengths, 1024, np.random.default_rng(0))
    assert sorted(segments.tolist()) == list(range(5000))
    assert np.add.reduceat(lengths[segments], rows[:-1]).max() <= 1024
    assert 1 - lengths.sum() / ((len(rows) - 1) * 1024) < 0.02


@pytest.mark.parametrize("kind", ["packed", "bucketed", "padded"])
def test_a_plan_of_records_is_a_few_numbers_for_each_segment(kind):
    def bytes_for(n):
        lengths, rng = medquad_like(n), np.random.default_rng(0)
        tracemalloc.start()
        try:
            if kind == "packed":
                plan = plan_packed(lengths, 1024, 8, rng)
            else:
                plan = plan_unpacked(lengths, kind == "bucketed", 8192, rng)
            kept, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert isinstance(plan, Plan)
        return kept, peak

    few, many = bytes_for(20_000), bytes_for(60_000)
    kept, peak = ((b - a) / 40_000 for a, b in zip(few, many, strict=True))
    assert 8 <= kept < 24 and peak < 100


def test_rows_times_the_longest_row_stay_within_the_slots():
    lengths = [3, 3, 9, 2, 2, 2, 2, 16, 16, 1]
    groups = limit_slots(lengths, 18)
    assert list(itertools.chain(*groups)) == list(range(len(lengths)))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 18 for g in groups)
