"""Rows on disk: JSON as the standard has it, whole lines, and nothing lost when a disk is full for a while."""

import json
import logging
import math
import resource
from typing import Any

import pytest

from gpt.files.jsonl import RowFile, read_rows


def strict_json(line: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_numbers_that_json_lacks_become_strings_and_are_read_back_as_numbers(tmp_path):
    file = RowFile(tmp_path / "rows.jsonl")
    file.append([{"step": 1, "train/loss": math.nan, "grad_norm": math.inf, "lr": -math.inf}])
    file.append([{"step": 2, "train/loss": 2.5}, {"step": 3, "text": "NaN"}])
    lines = [strict_json(line) for line in file.path.read_text().splitlines()]
    assert lines[0] == {"step": 1, "train/loss": "NaN", "grad_norm": "Infinity", "lr": "-Infinity"}
    row, *others = read_rows(file.path)
    assert math.isnan(row["train/loss"]) and (row["grad_norm"], row["lr"]) == (math.inf, -math.inf)
    assert others == lines[1:] == [{"step": 2, "train/loss": 2.5}, {"step": 3, "text": "NaN"}]


def test_a_torn_last_line_is_left_out_and_a_damaged_one_is_reported(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "train/lo')
    assert read_rows(path) == [{"step": 1}, {"step": 2}]
    assert not caplog.records
    for damaged in ("\x00\x00", "[" * 100_000, "[1]"):
        path.write_text(f'{{"step": 1}}\n{damaged}\n{{"step": 3}}\n')
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert read_rows(path) == [{"step": 1}, {"step": 3}]
        assert "rows.jsonl:2" in caplog.text
    assert read_rows(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(("step", "left"), [(-1, []), (0, [0]), (5, [0, 4]), (9, [0, 4, 9])])
def test_rows_after_a_step_are_dropped_and_a_row_can_follow_a_torn_one(tmp_path, step, left):
    file = RowFile(tmp_path / "rows.jsonl")
    assert file.drop_after(step) == []
    file.path.write_text('{"step": 0}\n{"step": 4}\n{"step": "x"}\n{}\n{"step": 9}\n{"step": 10, "tor')
    assert file.drop_after(step) == [{"step": s} for s in left]
    file.append([{"step": 20}])
    assert read_rows(file.path) == [{"step": s} for s in [*left, 20]]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_full_disk_is_one_warning_and_the_rows_wait_for_room(tmp_path, caplog):
    full, file = tmp_path / "full", RowFile(tmp_path / "rows.jsonl")
    file.append([{"step": 1}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))  # bytes: no room in the middle of the second row
    try:
        for step in (2, 3):
            file.append([{"step": step}])
            assert file.path.read_text() == '{"step": 1}\n'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    file.append([{"step": 4}])
    assert file.path.read_text() == "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4))
    full.symlink_to("/dev/full")
    RowFile(full).append([{"step": 1}])
    messages = [record.getMessage() for record in caplog.records]
    assert [m.partition(" cannot be written ")[2] for m in messages] == [
        "(File too large); training continues, its rows wait",
        "(No space left on device); training continues, its rows wait",
    ]
