"""A command line that Hydra refuses at its first fault is explained as a whole."""

import pytest
from launcher import launcher


@pytest.fixture(scope="module")
def starts():
    with launcher() as process:
        yield process


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model=huge", "seed=-1"], ["model=huge: no such file, there are large", "seed=-1"]),
        (["experiments=lr_vs_contxt", "model=smal"], ["did you mean lr_vs_context?", "did you mean small?"]),
        (
            ["experiments=null", "~model=small", "+debug=fast"],
            ["experiments=null: no", "~model=small: ", "leave out the +"],
        ),
        (["hydra/launcher=basc", "tests=3"], ["hydra/launcher=basc: no such file, did you mean basic?", "tests=3"]),
        (["model=[tiny,mni]", "hydra.run.dirr=x"], ["mni", "did you mean hydra.run.dir?"]),
        (
            ["model={n_layr: 3}", "train={max_step: 3}"],
            ["did you mean model.n_layer?", "did you mean train.max_steps?"],
        ),
        (["optimizer.lr=[", "seed"], ["optimizer.lr=[: ", "seed: missing EQUAL"]),
        (
            ["+optimzer.lr=1", "experiment=x"],
            ["did you mean optimizer.lr?", "unknown key experiment, did you"],
        ),
        (["out_dir=${nope}", "seed=${out_dir}"], ["out_dir: Interpolation key 'nope'", "seed: "]),
        (["out_dir=3", "device=gpu"], ["out_dir=3: input should be a valid string", "device=gpu"]),
        (["optimizer.lr=1e-3,1e-4"], ["optimizer.lr=1e-3,1e-4: several values need -m"]),
        (["-m", "optimizer.lr=1e-3,1e-4", "modl.n_head=1,2"], ["unknown key modl.n_head, did you mean model.n_head?"]),
        (["-m", "model=tiny,smal", "seed=interval(0,1)", "x=1"], ["model=smal: no such file", "unknown key x"]),
        (["hydra.mode=FOO", "hydra.sweeper=null"], ["hydra.mode=FOO: Invalid value", "hydra.sweeper: "]),
        (["--config-dir=nowhere", "seed=-1"], ["--config-dir=nowhere: no such directory", "seed=-1"]),
        (["seed=range(0,1000000)", "nope=1"], ["several values need -m", "unknown key nope"]),
        (["--config-name=trian", "seed=-1"], ["Cannot find primary config 'trian'"]),
    ],
)
def test_what_hydra_refuses_is_one_line_that_names_it_all(arguments, expected, starts, tmp_path):
    start = starts.start(*arguments, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert start.code == 2 and start.stderr.count("\n") == 1 and "Traceback" not in start.stderr, start
    assert all(part in start.stderr for part in expected), start.stderr


def test_misspelt_keys_in_a_file_of_a_group_and_on_the_axes_of_a_study_are_named(starts, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [tiny]\nmodel: {n_layrs: 3}\ntrian: {max_steps: 3, max_epochs: 1}\n"
    )
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text(
        "# @package _global_\n"
        "hydra: {mode: MULTIRUN, sweeper: {params: {optimizer.lrr: '1e-3,1e-4', model: 'tiny,mni'}}}\n"
    )
    arguments = [f"--config-dir={tmp_path}", f"hydra.sweep.dir={tmp_path}/sweep", f"hydra.run.dir={tmp_path}/run"]
    start = starts.start(*arguments, "model=mine", "seed=-1")
    assert start.code == 2
    for part in ("n_layrs, did you mean model.n_layer?", "trian.max_steps, did", "trian.max_epochs, did", "seed=-1"):
        assert part in start.stderr
    start = starts.start(*arguments, "experiments=mine")
    assert start.code == 2 and "optimizer.lrr, did you mean optimizer.lr?" in start.stderr
    assert "model=mni: no such file, did you mean mini?" in start.stderr
