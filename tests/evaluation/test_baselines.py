"""What answers a question without a model."""

from gpt.evaluation import baselines
from gpt.evaluation.baselines import ANOTHER, FREQUENT, NEAREST
from gpt.prompts import Question

TRAINING = [
    Question("What causes Croup ?", "", "A virus."),
    Question("What are the symptoms of Gout ?", "", "Pain."),
    Question("How is Gout treated ?", "", "Rest."),
    Question("How is Mumps treated ?", "", "Rest."),
]


def test_the_nearest_question_shares_the_rarest_words_and_the_library_prints_nothing(caplog):
    asked = [Question("Is there a treatment for Gout, and how is it treated ?"), Question("croup causes?")]
    assert baselines.nearest(asked, TRAINING) == [2, 0]
    assert not caplog.records


def test_a_question_without_any_known_word_still_gets_an_answer():
    assert baselines.nearest([Question("?"), Question("Zzz")], TRAINING) == [0, 0]


def test_each_baseline_gives_an_answer_to_each_question():
    asked = [Question("Croup causes ?", "", "x"), Question("Gout symptoms ?", "", "y")]
    found = baselines.answers(asked, TRAINING)
    assert found == {NEAREST: ["A virus.", "Pain."], FREQUENT: ["Rest."] * 2, ANOTHER: ["y", "x"]}


def test_without_training_data_only_the_references_are_left_and_of_one_question_nothing():
    assert baselines.answers([Question("a", "", "x"), Question("b", "", "y")], []) == {ANOTHER: ["y", "x"]}
    assert baselines.answers([Question("a", "", "x")], []) == {}
