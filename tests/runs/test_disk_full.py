"""A disk that is full at any write: nothing published is lost, nothing half-made stays, the run goes on if it can."""

import errno

import pytest
import torch
from test_checkpoint import IDENTITY, made
from test_kill import Run, Sharded
from tracing import NEEDS_SPACE, full_disk, trace

from gpt.progress import Progress
from gpt.runs import checkpoint


def fail_at(number, code):
    """Only this operation fails; the disk has room again at the next one."""
    return lambda operation: code if operation.number == number else None


@pytest.fixture(scope="module")
def objects():
    torch.set_num_threads(1)
    return made()


@pytest.fixture
def one_published(tmp_path, objects):
    def save(step):
        checkpoint.publish(tmp_path, *objects, Progress(step=step, reported=step), IDENTITY, {"seed": 1}, keep=2)

    save(1)
    return tmp_path, lambda: save(2)


def test_whichever_write_of_a_save_finds_the_disk_full_the_checkpoint_before_stays_valid_and_nothing_else(
    one_published, record_property
):
    run_dir, save_2 = one_published
    operations = [op for op in trace(save_2, run_dir, fail_at(0, 0)).operations if op.name in NEEDS_SPACE]
    checkpoint.shutil.rmtree(run_dir / "checkpoints" / "step_00000002")
    n_failed = 0
    for operation in operations:
        for decide in (full_disk(operation.number), fail_at(operation.number, errno.ENOSPC)):
            outcome = trace(save_2, run_dir, decide)
            assert outcome.code == 5, f"{operation}: {outcome.output}"
            assert "error: checkpoint 2 not written: disk full (needs " in outcome.output, outcome.output
            assert checkpoint.verify(run_dir / "checkpoints" / "step_00000001").step == 1
            # The rename comes last but for one thing: that its directory is on the disk too.
            left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
            assert left == ["step_00000001"] or (operation.path == "checkpoints" and left[1:] == ["step_00000002"])
            checkpoint.shutil.rmtree(run_dir / "checkpoints" / "step_00000002", ignore_errors=True)
            n_failed += 1
    assert n_failed >= 20
    record_property("count", f"ENOSPC at each of {len(operations)} writes of a save, alone and with all after it: "
                             f"{n_failed} failed saves, checkpoint before valid, 0 temporaries left")  # fmt: skip


def test_all_of_a_checkpoint_is_on_the_disk_before_its_manifest_and_that_before_its_name(one_published):
    """What a power cut could take is what has not been synced: nothing of a checkpoint that is there."""
    run_dir, save_2 = one_published
    new, final = "checkpoints/.step_00000002.new", "checkpoints/step_00000002"
    done = [(operation.name, operation.path) for operation in trace(save_2, run_dir).operations]
    published = done.index(("rename", f"{new} -> {final}"))
    manifest = done.index(("create", f"{new}/{checkpoint.MANIFEST}"))
    for name in (checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.CONFIG):
        synced = done.index(("fsync", f"{new}/{name}"))
        assert synced < manifest and ("write", f"{new}/{name}") not in done[synced:]
    synced = done.index(("fsync", f"{new}/{checkpoint.MANIFEST}"))
    assert manifest < synced < done.index(("fsync", new)) < published < done.index(("fsync", "checkpoints"))


def test_whichever_operation_of_a_save_fails_the_checkpoint_before_stays_valid(one_published):
    run_dir, save_2 = one_published
    for operation in trace(save_2, run_dir).operations:
        checkpoint.shutil.rmtree(run_dir / "checkpoints" / "step_00000002", ignore_errors=True)
        outcome = trace(save_2, run_dir, fail_at(operation.number, errno.EIO))
        assert outcome.code in (0, 5) and "Traceback" not in outcome.output, f"{operation}: {outcome.output}"
        assert checkpoint.verify(run_dir / "checkpoints" / "step_00000001").step == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("full")).undisturbed()


def no_room_for(*names):
    """Whatever concerns one of these names finds the disk full."""

    def decide(operation):
        concerned = any(name in operation.path for name in names)
        return errno.ENOSPC if concerned and operation.name in NEEDS_SPACE else None

    return decide


def test_a_checkpoint_that_finds_the_disk_full_is_left_out_and_training_goes_on(run):
    run, expected = run
    outcome = trace(run.fresh().with_output, run.directory, no_room_for("step_00000004"))
    assert outcome.code == 0, outcome.output
    assert "warning: checkpoint 4 not written: disk full (needs " in outcome.output
    assert "training continues, 1 valid checkpoints" in outcome.output
    assert run.result()[0] == expected[0] and run.result()[-1] == expected[-1]


def test_the_third_checkpoint_in_a_row_that_finds_the_disk_full_ends_the_run(run):
    run, _ = run
    outcome = trace(
        run.fresh().with_output, run.directory, no_room_for("step_00000003", "step_00000004", "step_00000006")
    )
    assert outcome.code == 5 and outcome.output.count("warning: checkpoint") == 2, outcome.output
    assert outcome.output.splitlines()[-1].startswith("error: checkpoint 6 not written: disk full")
    assert [path.name for path in checkpoint.listed(run.directory / "checkpoints")] == ["step_00000002"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_for_which_one_rank_finds_the_disk_full_is_left_out_and_the_third_in_a_row_ends_all(
    tmp_path, rank
):
    run, expected = Sharded(tmp_path).undisturbed()
    for steps, code in ((4,), 0), ((3, 4, 6), 5):
        outcome, other_code, output = run.fresh()(rank, no_room_for(*(f"step_{step:08d}" for step in steps)))
        first = output if rank else outcome.output
        assert outcome.code == other_code == code, first
        for step in steps[:2]:
            assert first.count(f"warning: checkpoint {step} not written: disk full (needs ") == 1, first
        if code == 0:
            assert run.result()[0] == expected[0] and run.result()[-1] == expected[-1]
    assert first.splitlines()[-1].startswith("error: checkpoint 6 not written: disk full")
    assert [path.name for path in (run.directory / "checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "train.log"])
def test_a_record_that_finds_the_disk_full_is_one_warning_and_training_goes_on(run, name):
    run, expected = run
    outcome = trace(run.fresh().with_output, run.directory, no_room_for(name))
    assert outcome.code == 0, outcome.output
    assert len([line for line in outcome.output.splitlines() if line.startswith("warning") and name in line]) == 1
    assert run.result()[2:] == expected[2:]


def test_a_directory_without_room_for_a_byte_is_refused_before_the_model_is_built(run):
    run, _ = run
    outcome = trace(run.fresh().with_output, run.directory, no_room_for(""))
    assert outcome.code == 5 and outcome.output.startswith("error: cannot write to the run directory"), outcome.output
