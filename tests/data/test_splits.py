"""What is held out shares no question and no topic with what is learned."""

import random

import pytest
from conftest import data_config

from gpt.data import splits
from gpt.data.records import Record
from gpt.errors import UserError


def made(n_topics=100, rows_each=4, sources=("A", "B")):
    """`rows_each` questions about each topic, the topics in turn from each source, shuffled."""
    found = [
        Record(f"q{i} of {topic} ?", "", "a", source=sources[topic % len(sources)], focus=f"Topic {topic}")
        for topic in range(n_topics)
        for i in range(rows_each)
    ]
    random.Random(0).shuffle(found)
    return found


def split(records, **config):
    return splits.split(records, data_config(**config))


def topics(records, indices):
    return {records[i].focus for i in indices}


@pytest.mark.parametrize("method", ["grouped", "random", "sequential"])
def test_every_record_is_in_one_split_and_the_shares_are_kept(method):
    records = made()
    parts = split(records, split=method, val_fraction=0.1, test_fraction=0.05)
    assert sorted(i for part in parts.values() for i in part) == list(range(400))
    assert {name: len(part) for name, part in parts.items()} == {"train": 340, "val": 40, "test": 20}


def test_a_topic_is_never_in_two_splits():
    records = made()
    parts = split(records)
    train, val, test = (topics(records, part) for part in parts.values())
    assert not train & val and not train & test and not val & test
    assert splits.leaks(records, parts) == {name: {"question": 0.0, "focus": 0.0} for name in ("val", "test")}


def test_each_source_is_split_in_the_same_shares():
    records = made(n_topics=200)
    in_val = [records[i].source for i in split(records, val_fraction=0.1)["val"]]
    assert in_val.count("A") == in_val.count("B") == 40


def test_sources_of_a_single_row_still_fill_every_split():
    records = made(n_topics=50, rows_each=1, sources=tuple(f"source {i}" for i in range(50)))
    assert len(split(records, val_fraction=0.1)["val"]) == 5


def test_running_text_is_cut_in_the_order_train_test_val_without_a_gap():
    cfg = data_config(val_fraction=0.2, test_fraction=0.1)
    assert splits.text_ranges(101, cfg) == [("train", 0, 70), ("test", 70, 80), ("val", 80, 101)]
    assert splits.text_ranges(0, cfg) == [("train", 0, 0), ("test", 0, 0), ("val", 0, 0)]


def test_rows_are_tied_by_topic_and_by_question_in_chains():
    rows = [
        Record("q1", "", "a", focus="Gout"),
        Record("q2", "", "a", focus=" gout "),
        Record("Q2 ", "", "b", focus="Other"),
        Record("q3", "", "a"),
        Record("q4", "", "a"),
        Record("q4", "with input", "a"),
    ]
    assert splits.groups(rows) == [[0, 1, 2], [3], [4], [5]]


def test_the_seed_decides():
    records = made()
    assert split(records, split_seed=1) == split(records, split_seed=1) != split(records, split_seed=2)


def test_random_and_sequential_splits_leak_and_the_report_says_how_much():
    records = made()
    at_random = splits.leaks(records, split(records, split="random"))
    assert at_random["test"]["focus"] > 0.9 and at_random["test"]["question"] == 0.0
    records += [Record("What is it ?", "", f"answer {i}") for i in range(400)]
    assert 0.3 < splits.leaks(records, split(records, split="random"))["val"]["question"] < 0.7


def test_sequential_takes_the_end_of_the_file():
    parts = split(made(), split="sequential", val_fraction=0.1, test_fraction=0.05)
    assert (parts["test"], parts["val"]) == (list(range(340, 360)), list(range(360, 400)))


def test_the_publishers_validation_rows_stay_and_what_asks_the_same_joins_them():
    records = made()
    for i in range(10):
        records[i].split = "val"
    parts = split(records, val_fraction=0.3, test_fraction=0.1)
    assert topics(records, parts["val"]) == topics(records, range(10))
    assert len(parts["test"]) == pytest.approx(40, abs=6)
    parts = split(records, split="random", val_fraction=0.3, test_fraction=0.1)
    assert parts["val"] == list(range(10)) and len(parts["test"]) == 39


def of_sizes(*sizes):
    return [Record(f"q{n} {i}", "", "a", focus=f"f{n}") for n, size in enumerate(sizes) for i in range(size)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "sizes, val, test, expected",
    [
        ((60, 30, 10), 0.1, 0.0, (90, 10, 0)),
        ((60, 30, 10), 0.1, 0.3, (60, 10, 30)),
        ((70, 10, 10, 5, 5), 0.1, 0.1, (80, 10, 10)),
        ((45, 45, 4, 3, 3), 0.1, 0.0, (90, 10, 0)),
    ],
)
def test_the_groups_that_make_up_a_share_are_found(sizes, val, test, expected, seed):
    records = of_sizes(*sizes)
    parts = split(records, val_fraction=val, test_fraction=test, split_seed=seed)
    assert tuple(len(parts[name]) for name in splits.NAMES) == expected
    cfg = data_config(val_fraction=val, test_fraction=test)
    assert splits.missed_shares(records, parts, cfg) is None


def test_a_share_that_misses_its_target_by_more_than_a_fifth_is_said_with_the_cause():
    records = of_sizes(60, 27, 13)
    cfg = data_config(val_fraction=0.1, test_fraction=0.0)
    said = splits.missed_shares(records, splits.split(records, cfg), cfg)
    assert said.startswith("val has 13.0% of the rows, not 10.0%: rows with a question or a focus area in common")
    assert "the largest of 3 groups have 60, 27, 13 rows; data.split=random" in said


@pytest.mark.parametrize("sizes", [(100,), (50, 50)])
def test_a_split_that_no_group_fits_is_an_error_with_the_cause(sizes):
    with pytest.raises(UserError, match=r"a split is empty: .* kept together, and the largest of .*data.split=random"):
        split(of_sizes(*sizes), val_fraction=0.1, test_fraction=0.0)


def test_leaks_are_counted_without_punctuation_too_and_without_focus_areas_nothing_is_said_of_them():
    records = [Record(text, "", "a") for text in ("What is Croup?", "what is  croup ?", "(Why)", "New")]
    parts = {"train": [0], "val": [1, 3], "test": [2]}
    assert splits.leaks(records, parts) == {
        "val": {"question": 0.0, "question_bare": 0.5}, "test": {"question": 0.0}
    }  # fmt: skip
