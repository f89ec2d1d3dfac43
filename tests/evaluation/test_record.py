"""The files of results: what is kept of an interrupted evaluation, and what is said of another one."""

import json

import pytest

from gpt.errors import UserError
from gpt.evaluation import record
from gpt.evaluation.record import Record, differing, readme
from gpt.evaluation.statistics import Figure

IDENTITY = {"kind": "loss", "settings": {"stride": 3}, "step": 7, "weights": {"a.pt": "00ff"},
            "questions": {"source": "x|y", "documents": 2, "sha256": "ab"}}  # fmt: skip
FIGURES = {"model": {"loss": Figure(1.5, 1.0, 2.0)}, "chance": {"loss": Figure(2.0, None, None)}}


def finished(folder, identity=IDENTITY):
    own = Record(folder, "loss", identity)
    own.add(0, [1], [{"nats": 2.0}])
    own.add(1, [0], [{"nats": 1.0}])
    own.publish(own.rows(), {"figures": record.as_json(FIGURES), "remarks": ["a < b"], "notice": "It can be wrong."})
    return own


def test_rows_come_in_the_order_of_the_units_and_the_partial_file_goes(tmp_path):
    own = finished(tmp_path)
    assert record.read_rows(own.rows_path) == [{"nats": 1.0}, {"nats": 2.0}]
    assert {path.name for path in tmp_path.iterdir()} == {"loss.json", "loss.jsonl", "README.md"}
    content = own.finished()
    assert record.from_json(content["figures"]) == FIGURES


def test_rows_with_any_separator_of_lines_in_their_texts_are_read_as_they_were_written(tmp_path):
    rows = [{"answer": "a\u2028b\u0085c\u2029d\x0be\r\nf"}, {"answer": ""}]
    own = Record(tmp_path, "loss", IDENTITY)
    own.add(0, [0, 1], rows)
    own = Record(tmp_path, "loss", IDENTITY)
    own.publish(own.rows(), {"figures": record.as_json(FIGURES), "remarks": [], "notice": ""})
    assert record.read_rows(own.rows_path) == rows


def test_batches_are_kept_for_the_same_evaluation_only_and_a_torn_line_is_left_out(tmp_path):
    own = Record(tmp_path, "loss", IDENTITY)
    own.add(0, [0], [{"nats": 1.0}])
    own.add(1, [1], [{"nats": 2.0}])
    partial = tmp_path / "loss.partial.jsonl"
    partial.write_bytes(partial.read_bytes()[:-5])
    again = Record(tmp_path, "loss", IDENTITY)
    assert again.computed(0) and not again.computed(1)
    again.add(1, [1], [{"nats": 2.0}])
    assert Record(tmp_path, "loss", IDENTITY).rows() == [{"nats": 1.0}, {"nats": 2.0}]
    assert not Record(tmp_path, "loss", IDENTITY | {"step": 8}).computed(0)
    assert not partial.exists()


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"identity": 3}'])
def test_damaged_results_are_computed_again(tmp_path, damage, lines, logger):
    logger.propagate = True
    own = finished(tmp_path)
    own.path.write_text(damage)
    assert own.finished() is None and any("loss.json is replaced" in line for line in lines())


def test_rows_that_somebody_has_changed_are_no_results(tmp_path):
    own = finished(tmp_path)
    own.rows_path.write_text('{"nats": 0.0}\n')
    assert own.finished() is None


def test_the_first_difference_is_named_by_its_key():
    other = IDENTITY | {"questions": IDENTITY["questions"] | {"sha256": "cd"}}
    assert differing(IDENTITY, other) == "questions.sha256 was ab, now cd"
    assert differing(IDENTITY, {**IDENTITY, "new": 1}) == "new was None, now 1"


def test_the_readme_has_a_table_of_each_result_with_its_hashes(tmp_path):
    finished(tmp_path)
    (tmp_path / "other.json").write_text(json.dumps({"somebody": "else's"}))
    text = readme(tmp_path)
    assert "| loss | 1.5 [1, 2] | 2 |" in text and "a.pt 00ff" in text and "sha256 ab" in text and "- a \\< b" in text
    assert text.count("## ") == 1 and "It can be wrong." in text


def test_a_folder_that_cannot_be_written_is_an_error_of_the_environment(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught, record.owned(tmp_path / "file" / "evaluations"):
        pass
    assert caught.value.code == 5
