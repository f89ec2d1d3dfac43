"""The model card."""

import json

from test_conf import loaded

from gpt import model_card


def test_the_card_says_what_was_trained_on_what_and_how_well_it_does(tmp_path):
    meta = {
        "splits": {"train": {"documents": 1234, "tokens": 56789}}, "fingerprint": "f" * 64, "tokenizer": "gpt2",
        "n_vocab": 50257,
    }  # fmt: skip
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    evaluations = [(0, 10.8), (50, 4.5), (100, 4.75)]
    rows = [
        {"step": step, "tokens": step * 2048, "val/loss": loss, "val/bpb": loss / 4, "val/perplexity": 2.718**loss}
        for step, loss in evaluations
    ]
    cfg = loaded()
    model_card.write(tmp_path / "README.md", cfg, rows, 7_000_000, tmp_path)
    card = (tmp_path / "README.md").read_text()
    for part in (
        "4 layers, 4 heads, 128 wide", "7,000,000", "1,234 documents, 56,789 tokens", "100 steps, 204,800 tokens",
        "loss 4.5000 nats", "1.1250 bits per byte", "at step 50", cfg.data.card.license, cfg.data.card.citation,
        "must not guide clinical decisions",
    ):  # fmt: skip
        assert part in card, part


def test_a_run_whose_metrics_could_not_be_written_still_gets_a_card(tmp_path):
    golden = {"splits": {"train": {"documents": 1, "tokens": 2}}, "fingerprint": "f", "tokenizer": "x", "n_vocab": 3}
    (tmp_path / "meta.json").write_text(json.dumps(golden))
    model_card.write(tmp_path / "README.md", loaded(), [], 1, tmp_path)
    assert "No evaluation is on record." in (tmp_path / "README.md").read_text()
