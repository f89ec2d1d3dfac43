"""What a run is before it trains."""

import pytest
from conftest import ROOT
from test_conf import loaded
from test_train import SMALL

from gpt import optim
from gpt.config.schema import as_dict
from gpt.errors import UserError
from gpt.model import GPT
from gpt.progress import Progress
from gpt.runs import run as runs


def settings(tmp_path, *changes):
    return loaded(*SMALL, *changes, f"data.prepared_dir={tmp_path / 'data'}", f"out_dir={tmp_path / 'run'}")


def test_a_new_run_has_a_machine_batches_and_settings_and_begins_at_step_0(tmp_path):
    cfg = settings(tmp_path)
    (tmp_path / "run").mkdir()
    with runs.opened(cfg) as run:
        machine = run.choose_machine()
        batches = run.open_batches(machine)
        machine = run.decide_compilation(machine, batches)
        assert run.checkpoint is None and run.recorded == {}
        assert machine.environment["micro_batch"] == cfg.train.micro_batch and not machine.environment["compile"]
        assert batches.total_steps == cfg.train.max_steps and batches.data.folder.is_dir()
        recorded = run.settings(machine, batches, weights=None)
        assert as_dict(cfg).keys() < recorded.keys() and len(recorded["data"]["fingerprint"]) == 64
        model = GPT(cfg.model, run.tokens.n_vocab)
        optimizer = optim.build(model, cfg.optimizer)
        assert run.restore(model, optimizer, recorded) == Progress()
        assert (run.identity.tokenizer, run.identity.template) == (cfg.data.tokenizer, cfg.data.template)
    assert "gpt.runs" not in (tmp_path / "run" / "train.log").read_text()


def test_running_text_has_no_template(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox. " * 500)
    cfg = settings(tmp_path, "data=text", f"data.path={text}", "data.tokenizer=bytes")
    with runs.opened(cfg) as run:
        assert run.identity.template is None


def test_nobody_else_opens_a_run_that_is_open(tmp_path):
    cfg = settings(tmp_path)
    with runs.opened(cfg), pytest.raises(UserError) as caught, runs.opened(cfg):
        pass
    assert caught.value.code == 6 and str(ROOT) not in str(caught.value.what)


@pytest.mark.parametrize(("parallel", "warnings"), [("auto", 0), ("ddp", 1), ("fsdp", 1)])
def test_a_way_to_share_steps_is_without_effect_in_one_process_and_that_is_said(tmp_path, parallel, warnings, caplog):
    with runs.opened(settings(tmp_path, f"parallel={parallel}")):
        pass
    assert caplog.text.count(f"parallel={parallel}: there is one process, which shares") == warnings


@pytest.mark.parametrize("finetune", ["lora", "last_blocks"])
def test_a_part_of_random_weights_is_trained_with_a_warning(tmp_path, finetune, caplog):
    small = {"lora": ["finetune.rank=2"], "last_blocks": ["finetune.n_blocks=1"]}[finetune]
    with runs.opened(settings(tmp_path, f"finetune={finetune}", *small)):
        pass
    assert f"finetune={finetune} trains a part of the weights, and all begin as random ones" in caplog.text
