"""Checkpoints as a run goes on, on a disk that does not always take them."""

import shutil

import pytest
from conftest import ROOT
from test_checkpoint import IDENTITY, made
from test_conf import loaded

from gpt.errors import UserError
from gpt.files import directory
from gpt.machine.sizes import count_sizes
from gpt.progress import Progress
from gpt.runs import checkpoint, saver


def saver_in(run_dir):
    model, optimizer = made()
    return saver.Saver(run_dir, model, optimizer, IDENTITY, {"seed": 1}, keep=2)


def obstruct(run_dir, step):
    """A file where the checkpoint's temporary directory would be made."""
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    (run_dir / "checkpoints" / f".step_{step:08d}.new").write_bytes(b"in the way")


def test_a_checkpoint_that_cannot_be_written_is_a_warning_and_the_third_in_a_row_an_error(tmp_path, caplog):
    checkpoints = saver_in(tmp_path)
    assert checkpoints.save(Progress(step=1)).name == "step_00000001"
    for step in (2, 3, 5, 6, 7):
        obstruct(tmp_path, step)
    assert checkpoints.save(Progress(step=2)) is None
    assert "checkpoint 2 not written: File exists (needs " in caplog.text
    assert "training continues, 1 valid checkpoints" in caplog.text
    assert checkpoints.save(Progress(step=3)) is None
    assert checkpoints.save(Progress(step=4)).name == "step_00000004"  # the count starts again
    assert checkpoints.save(Progress(step=5)) is checkpoints.save(Progress(step=6)) is None
    with pytest.raises(UserError, match="checkpoint 7 not written") as caught:
        checkpoints.save(Progress(step=7))
    assert caught.value.code == 5
    assert checkpoints.newest() == "step_00000004"


def test_what_must_be_saved_is_not_forgiven(tmp_path):
    obstruct(tmp_path, 1)
    with pytest.raises(UserError, match="checkpoint 1 not written"):
        saver_in(tmp_path).save(Progress(step=1), forgive=False)


def test_the_same_progress_is_saved_once_also_by_the_next_process(tmp_path):
    path = saver_in(tmp_path).save(Progress(step=1, reported=1))
    before = path.stat().st_ino
    assert saver_in(tmp_path).save(Progress(step=1, reported=1)).stat().st_ino == before
    assert saver_in(tmp_path).save(Progress(step=1, reported=0)).stat().st_ino != before


def test_a_stop_for_its_numbers_names_the_last_good_checkpoint(tmp_path):
    with pytest.raises(UserError, match="lower the rate; last good checkpoint: step_00000001"), saver_in(tmp_path) as s:
        s.save(Progress(step=1))
        raise UserError("loss nan", remedy="lower the rate", code=4)


def test_room_for_the_checkpoints_is_asked_for_before_anything_is_built(tmp_path):
    cfg = loaded("model=xl", "train.keep_checkpoints=1000")
    with pytest.raises(UserError) as caught:
        saver.check_space(tmp_path, cfg, 50257)
    assert caught.value.code == 5
    gigabytes = 1_557_611_200 * 4 * 3 / 1e9  # weights and two moments of GPT-2 xl, in float32
    assert f"1001 checkpoints of {gigabytes:.1f} GB need {1001 * gigabytes:.1f} GB" in str(caught.value)
    saver.check_space(tmp_path, loaded("model=tiny"), 50257)


@pytest.mark.parametrize("name", ["lora", "last_blocks"])
def test_room_for_the_optimizers_state_is_asked_for_what_is_trained_only(name, tmp_path):
    cfg = loaded("model=xl", "train.keep_checkpoints=1000", f"finetune={name}")
    trained = count_sizes(cfg.model, cfg.finetune, 50257).trained
    numbers = 1_557_611_200 + 2 * trained + (trained if name == "lora" else 0)  # weights, two moments, adapters
    with pytest.raises(UserError, match=f"1001 checkpoints of {4 * numbers / 1e9:.1f} GB need"):
        saver.check_space(tmp_path, cfg, 50257)


def test_checkpoints_that_are_there_already_need_no_more_room(tmp_path, monkeypatch):
    cfg = loaded("model=tiny", "train.keep_checkpoints=2")
    size = 7_242_624 * 4 * 3
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, int(1.5 * size)))
    with pytest.raises(UserError, match="3 checkpoints"):
        saver.check_space(tmp_path, cfg, 50257)
    for step in (1, 2):
        shutil.copytree(ROOT / "tests/golden/format_2/checkpoints", tmp_path / "checkpoints", dirs_exist_ok=True)
        (tmp_path / "checkpoints" / "step_00000003").rename(tmp_path / "checkpoints" / f"step_0000000{step}")
    assert len(checkpoint.listed(tmp_path / "checkpoints")) == 2
    saver.check_space(tmp_path, cfg, 50257)


def test_sizes_are_said_in_the_largest_unit_that_fits():
    assert [directory.in_bytes(n) for n in (12, 1500, 2_500_000, 18_691_334_400)] == [
        "12 bytes", "1.5 kB", "2.5 MB", "18.7 GB"
    ]  # fmt: skip


def test_a_checkpoint_is_there_before_its_evaluation_and_is_then_marked_without_being_written_again(tmp_path):
    checkpoints = saver_in(tmp_path)
    for step in (1, 2):
        checkpoints.save(Progress(step=step, reported=step))
    waiting = Progress(step=3, reported=2)
    checkpoints.save_first(waiting)
    folder = tmp_path / "checkpoints"
    assert [path.name[-1] for path in checkpoint.listed(folder)] == ["1", "2", "3"]  # no older one is removed yet
    path, inodes = folder / "step_00000003", {}
    for entry in path.iterdir():
        inodes[entry.name] = entry.stat().st_ino
    assert checkpoint.verify(path).progress == waiting
    checkpoints.save_first(waiting, best=2.5)  # samples are still to come: a run that goes on evaluates again
    assert (checkpoint.verify(path).progress, checkpoint.verify(path).val_loss) == (waiting, 2.5)
    reported = Progress(step=3, reported=3, best=2.5, best_step=3)
    assert checkpoints.save(reported) == path
    assert (checkpoint.verify(path).progress, checkpoint.verify(path).val_loss) == (reported, 2.5)
    changed = {entry.name for entry in path.iterdir() if entry.stat().st_ino != inodes[entry.name]}
    assert changed <= {"manifest.json"}  # whose first number may be given again
    assert [path.name[-1] for path in checkpoint.listed(folder)] == ["2", "3"]


def test_a_checkpoint_whose_evaluation_is_not_finite_is_taken_back(tmp_path):
    with pytest.raises(UserError, match="last good checkpoint: step_00000001"), saver_in(tmp_path) as checkpoints:
        checkpoints.save(Progress(step=1, reported=1))
        checkpoints.save_first(Progress(step=2, reported=1))
        raise UserError("val/loss nan", code=4)
    assert [path.name for path in checkpoint.listed(tmp_path / "checkpoints")] == ["step_00000001"]


def test_a_step_whose_checkpoint_the_disk_refuses_counts_once(tmp_path, caplog):
    checkpoints = saver_in(tmp_path)
    for step in (1, 2):
        obstruct(tmp_path, step)
        checkpoints.save_first(Progress(step=step))
        checkpoints.save_first(Progress(step=step), best=1.0)
        assert checkpoints.save(Progress(step=step, reported=step)) is None
    assert caplog.text.count("not written") == 2
