"""The card says where data is from, what was done to it, and what may not be concluded from it."""

from gpt.data import data_card

META = {
    "format": 1, "fingerprint": "ab" * 32, "name": "made",
    "kind": "qa", "tokenizer": "gpt2", "n_vocab": 50257, "template": "alpaca",
    "settings": {
        "split": "grouped", "val_fraction": 0.1, "test_fraction": 0.05, "split_seed": 7,
        "card": {"title": "Made up", "description": "Not true.", "license": "CC0", "citation": "nobody"},
    },
    "source": {"files": [{"file": "made.csv", "bytes": 1234, "sha256": "ab" * 32}]},
    "ladder": [["rows", 16412], ["with an answer", 16407]],
    "splits": {name: {"documents": 3, "tokens": 2000, "response_tokens": 1500} for name in ("train", "val", "test")},
    "tokens_before_length_filter": 5_070_428,
    "lengths": {"document": data_card.percentiles([1, 2, 3]), "response": data_card.percentiles([1])},
    "leaks": {name: {"question": 0.186, "focus": 0.85} for name in ("val", "test")},
    "publisher_splits": [],
    "oddities": {"answers under 50 characters": 30, "bad rows left out": 0},
    "scores": {},
}  # fmt: skip


def test_percentiles_are_whole_tokens():
    assert data_card.percentiles(list(range(1, 101))) == {"mean": 50, "median": 50, "p95": 95, "p99": 99, "max": 100}


def test_the_card_gives_licence_citation_counts_leaks_and_how_to_make_it_again():
    card = data_card.data_card(META)
    for part in (
        "# Made up", "Not true.", "Licence: CC0", "Citation: nobody",
        "`made.csv` (1,234 bytes, sha256 abababababab...)",
        "| rows | 16,412 |", "| train | 3 | 2,000 | 1,500 |", "| test | 18.6% | 85.0% |", "5,070,428 tokens",
        "| document | 2 | 2 | 3 | 3 | 3 |", "- answers under 50 characters: 30", "prepare_data.py data=made", "seed 7",
    ):  # fmt: skip
        assert part in card
    assert "bad rows" not in card and "Scores" not in card


def test_scores_and_the_publishers_splits_are_told():
    row = {"count": 3.0, "mean": 2.3333}
    card = data_card.data_card(META | {"scores": {"helpfulness": row}, "publisher_splits": ["val"]})
    assert "| helpfulness | 3 | 2.333 |" in card
    assert "The publisher's own rows for val are used as such" in card


def test_data_of_the_hub_is_named_with_its_revision():
    assert "nvidia/HelpSteer on the Hugging Face hub, revision abc" in data_card.data_card(
        META | {"source": {"hub": "nvidia/HelpSteer", "revision": "abc"}}
    )


def test_the_card_of_a_text_has_no_leaks():
    meta = {key: value for key, value in META.items() if key not in ("leaks", "lengths", "oddities", "scores")}
    card = data_card.data_card(meta | {"kind": "text"})
    assert "cut by characters, val 10%, test 5%" in card and "Leaks" not in card


def test_the_summary_lists_steps_splits_and_leaks():
    assert data_card.summary(META).splitlines() == [
        "      16,412  rows",
        "      16,407  with an answer",
        "       train  3 documents, 2,000 tokens",
        "         val  3 documents, 2,000 tokens",
        "        test  3 documents, 2,000 tokens",
        "         val  18.6% of the questions occur in train, 85.0% share their focus with train",
        "        test  18.6% of the questions occur in train, 85.0% share their focus with train",
    ]
