"""The model card."""

import pytest
from conftest import model_config
from test_conf import loaded

from gpt.runs import model_card


def test_the_card_says_what_was_trained_on_what_and_how_well_it_does(tmp_path):
    meta = {
        "splits": {"train": {"documents": 1234, "tokens": 56789}}, "fingerprint": "f" * 64, "tokenizer": "gpt2",
        "n_vocab": 50257,
    }  # fmt: skip
    evaluations = [(0, 10.8), (50, 4.5), (100, 4.75)]
    rows = [
        {"step": step, "tokens": step * 2048, "val/loss": loss, "val/bpb": loss / 4, "val/perplexity": 2.718**loss}
        for step, loss in evaluations
    ]
    cfg = loaded()
    model_card.write(tmp_path / "README.md", cfg, rows, 7_000_000, meta)
    card = (tmp_path / "README.md").read_text()
    for part in (
        "4 layers, 4 heads, 128 wide", "7,000,000", "1,234 documents, 56,789 tokens", "100 steps, 204,800 tokens",
        "loss 4.5000 nats", "1.1250 bits per byte", "at step 50", cfg.data.card.license, cfg.data.card.citation,
        "must not guide clinical decisions", "on 4,096 held-out tokens", "| first weights | random |",
        "| trained weights | all |",
    ):  # fmt: skip
        assert part in card, part


def test_a_card_names_no_folder_of_the_machine_and_has_the_notice_of_its_data(tmp_path):
    meta = {"splits": {"train": {"documents": 1, "tokens": 2}}, "fingerprint": "f", "tokenizer": "x", "n_vocab": 3}
    model_card.write(tmp_path / "README.md", loaded("data=text", "init.from=/home/me/x.pt", "model=tiny"), [], 1, meta)
    card = (tmp_path / "README.md").read_text()
    assert f"checkpoint={tmp_path.name} " in card and str(tmp_path) not in card and "/home/me" not in card
    assert "1 document, 2 tokens" in card and "clinical" not in card
    assert "clinical" in model_card.notice({}) and model_card.notice({"data": {"card": {"notice": "x\ny"}}}) == "x y\n"


def test_of_a_training_that_only_made_it_worse_the_card_names_the_step_of_the_best_checkpoint_and_says_so():
    rows = [{"step": step, "val/loss": loss} for step, loss in ((0, 7.1), (5, 7.2), (10, 7.3))]
    text = model_card.validation(rows, {})
    assert "Best validation: loss 7.2000 nats per token, at step 5" in text
    assert text.endswith("The first weights were better: loss 7.1000 nats per token.")
    assert "first weights" not in model_card.validation([rows[2], rows[1] | {"step": 15}], {})
    assert "at step 0" in model_card.validation(rows[:1], {}) and "better" not in model_card.validation(rows[:1], {})


def test_a_run_whose_metrics_could_not_be_written_still_gets_a_card(tmp_path):
    golden = {"splits": {"train": {"documents": 1, "tokens": 2}}, "fingerprint": "f", "tokenizer": "x", "n_vocab": 3}
    model_card.write(tmp_path / "README.md", loaded(), [], 1, golden)
    assert "No evaluation is on record." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("finetune", "expected"),
    [
        (None, "all"),
        ({"name": "full"}, "all"),
        ({"name": "last_blocks", "n_blocks": 2}, "the last 2 blocks"),
        ({"name": "lora", "rank": 8, "alpha": 16.0, "targets": ["attn.c_attn", "mlp.c_fc"]},
         "adapters (LoRA) of rank 8, alpha 16, on attn.c_attn, mlp.c_fc; merged"),
        ({"name": "something newer"}, "not recorded"),
        ("full", "not recorded"),
    ],
)  # fmt: skip
def test_a_fine_tuned_model_says_which_of_its_weights_have_learned(finetune, expected):
    assert model_card.trained_weights({"finetune": finetune}) == expected
    assert model_card.trained_weights({}) == "not recorded"


def test_the_head_and_the_form_of_gelu_are_part_of_the_architecture():
    config = model_config(tie_weights=False, gelu="exact")
    assert model_card.architecture(config, 7)["architecture"].endswith("gelu exact, head a matrix of its own")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1e-5, "1e-05"), (16.0, "16"), (1337, "1337"), ("a\n b", "a b"), ("a|b", "a\\|b"), ("\x1b[1m", "\\x1b[1m"),
        (["a", 2], "a, 2"),
    ],
)  # fmt: skip
def test_any_value_is_shown_on_one_line_of_a_table(value, expected):
    assert model_card.shown(value) == expected
