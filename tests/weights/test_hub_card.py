"""The card of an exported model: what the run says, in words and in the front matter that the hub reads."""

import functools
import math
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from test_checkpoint import IDENTITY, made
from test_conf import loaded as composed

from gpt.config.schema import LoRAFinetuneConfig, as_dict
from gpt.files.jsonl import RowFile
from gpt.progress import Progress
from gpt.runs import checkpoint
from gpt.runs.model_file import Loaded
from gpt.weights import hub_card

LORA = LoRAFinetuneConfig("lora", 1.0, 8, 16.0, ["attn.c_attn"])


MODEL, OPTIMIZER = made()


@functools.cache
def settings_of(data):
    return as_dict(composed(f"data={data}"))


def run(directory, data="medquad", init=None, finetune=None, **changes):
    """A run directory as far as a card needs it, without checkpoints."""
    directory.mkdir()
    settings = settings_of(data) | {"init": {"from": init, "revision": None}, "finetune": finetune}
    settings["data"] = settings["data"] | {"fingerprint": "f" * 64} | changes
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    rows = [
        {"step": step, "tokens": step * 2048, "val/loss": loss, "val/bpb": loss / 4, "val/perplexity": math.exp(loss)}
        for step, loss in ((50, 4.5), (100, 4.75))
    ]
    RowFile(directory / "metrics.jsonl").append(rows)
    (directory / "last_model.pt").touch()  # its weights are with the caller
    return directory


def card_of(path, step=50, template="alpaca"):
    return hub_card.text(Loaded(MODEL, "gpt2", template, step, path))


def front_matter(card):
    return ModelCard(card).data.to_dict()


@pytest.fixture(scope="module")
def medquad(tmp_path_factory):
    """With checkpoints of steps 50 and 100, of which the first is the better one."""
    directory = run(tmp_path_factory.mktemp("run") / "run", init="gpt2", finetune=as_dict(LORA))
    settings = yaml.safe_load((directory / "config.yaml").read_text())
    for step in (50, 100):
        progress = Progress(step=step, tokens=step * 2048, best=4.5, best_step=50)
        checkpoint.publish(directory, MODEL, OPTIMIZER, progress, IDENTITY, settings, keep=5)
    return directory


@pytest.mark.parametrize(("name", "step"), [("checkpoints/step_00000050", 50), ("last_model.pt", 100)])
def test_the_card_says_what_was_trained_on_what_how_and_how_well_it_does(medquad, name, step):
    card, about = card_of(medquad / name, step), settings_of("medquad")["data"]["card"]
    own = {50: "loss 4.5000 nats per token, 1.1250 bits per byte, perplexity 90.02", 100: "loss 4.7500"}
    for part in (
        "2 layers, 2 heads, 16 wide, context 16 tokens", "alpaca", about["license"], about["citation"],
        "BMC Bioinformatics 20, 511", "Fingerprint ffffffffffff", "| first weights | gpt2 |",
        "adapters (LoRA) of rank 8, alpha 16, on attn.c_attn; merged", f"{step} steps, {step * 2048:,} tokens",
        "adamw, learning rate", "seed 1337", "must not guide clinical decisions", f"at step {step}: {own[step]}",
        "held-out tokens", "hf upload <user>/<name>", "sha256sum -c SHA256SUMS", "### Instruction:\n{instruction}",
        "What are the symptoms of Glaucoma ?", "MIT license",
    ):  # fmt: skip
        assert part in card, part
    assert ("The best of the run was at step 50: loss 4.5000" in card) == (step == 100)
    assert "not recorded" not in card and str(medquad.parent) not in card


def test_the_program_in_the_card_needs_nothing_but_transformers(medquad):
    program = card_of(medquad / "last_model.pt").split("```python\n")[1].split("```")[0]
    lines = [line for line in program.splitlines() if "import" in line]
    assert lines == ["from transformers import AutoModelForCausalLM, AutoTokenizer"]


def test_the_front_matter_of_a_fine_tuned_gpt2_names_its_licence_language_and_base(medquad):
    assert front_matter(card_of(medquad / "last_model.pt")) == {
        "license": "mit", "language": ["en"], "library_name": "transformers", "pipeline_tag": "text-generation",
        "base_model": "openai-community/gpt2", "tags": ["gpt2", "medquad"],
    }  # fmt: skip


def test_the_licence_of_weights_that_began_as_anything_else_is_for_their_owner_to_choose(tmp_path):
    for number, init in enumerate((None, "/home/someone/gpt2/355M", "someone/gpt2")):
        card = card_of(run(tmp_path / str(number), init=init, data="helpsteer") / "last_model.pt")
        metadata = front_matter(card)
        assert metadata["license"] == "other" and "base_model" not in metadata
        assert metadata["datasets"] == ["nvidia/HelpSteer"]  # from the hub: no file was named
        assert "Whoever publishes them chooses one" in card and "/home" not in card
        assert f"| first weights | {('random', '355M', 'someone/gpt2')[number]} |" in card


def test_what_is_not_on_record_is_said_to_be_so_and_left_out_of_the_front_matter(tmp_path, medquad):
    for path in (tmp_path / "model.pth", tmp_path / "last_model.pt", medquad / "from_elsewhere.pt"):
        path.touch()
        card = card_of(path, step=0, template=None)
        assert card.count("not recorded") == 8 and "No evaluation is on record." in card
        assert front_matter(card).keys() == {"license", "library_name", "pipeline_tag", "tags"}
        assert "there is no template" in card


def test_the_loss_in_the_manifest_stands_in_for_metrics_that_are_lost(tmp_path, medquad):
    for step in (50, 100):
        name = f"checkpoints/step_{step:08d}"
        shutil.copytree(medquad / name, tmp_path / name)
    card = card_of(tmp_path / "checkpoints" / "step_00000050")
    assert "at step 50: loss 4.5000 nats per token, perplexity 90.02" in card
    assert "50 steps, tokens not recorded" in card
    assert "No evaluation is on record." in card_of(tmp_path / "checkpoints" / "step_00000100", step=100)


HOSTILE = [
    "a\n---\nlicense: apache-2.0", "| x | y |\n|---|---|", "\x1b[31mred\u202e", ["nested", {"a": 1}], 7, None, "x" * 999
]  # fmt: skip


def test_settings_with_anything_in_them_make_a_card_that_still_parses(tmp_path):
    for number, value in enumerate(HOSTILE):
        path = run(tmp_path / str(number), name=value, hub=value, path=None, prompts=[value], card=value, init=value)
        card = card_of(path / "last_model.pt")
        assert front_matter(card)["license"] == "other"
        assert card.count("\n---\n") == 1 and "\x1b" not in card and "\u202e" not in card
        assert all(line.replace("\\|", "").count("|") == 3 for line in card.splitlines() if line.startswith("|"))


@pytest.mark.parametrize("content", ["", "[", "- 1", "data: 3", "&a [*a, *a]", "!!python/object:os.system {}"])
def test_a_damaged_config_yaml_is_no_record(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    assert "| licence of the data | not recorded |" in card_of(tmp_path / "last_model.pt")
