"""The figures of a run's evaluations that the tables of a sweep show."""

from made_run import make, settings

import evaluate
from gpt.evaluation import headlines


def test_each_kind_has_one_at_the_step_that_is_asked_for(tmp_path):
    run = make(tmp_path)
    evaluate.evaluate(settings("loss", "choice", "answers", checkpoint=str(run)))
    found = headlines.read(run, 3)
    assert found.keys() == {"answers_test ROUGE-L", "choice_test accuracy per byte", "loss_test loss"}
    assert headlines.read(run, 4) == {} == headlines.read(tmp_path, 3)


def test_what_is_damaged_or_no_result_is_left_out(tmp_path):
    (tmp_path / headlines.FOLDER).mkdir()
    for name, content in (("a", "{"), ("b", "{}"), ("c", '{"headline": "x", "figures": {}}')):
        (tmp_path / headlines.FOLDER / f"{name}_step_00000003.json").write_text(content)
    assert headlines.read(tmp_path, 3) == {}
