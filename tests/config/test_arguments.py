"""The command line reaches Hydra as it was meant, and its faults are reported in one line."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from launcher import launcher
from omegaconf import OmegaConf

from gpt.config import arguments, launch


def prepare(typed, script):
    return arguments.prepare(typed, script, launch.architecture)


@pytest.fixture(scope="module")
def starts():
    with launcher() as process:
        yield process


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (
            ["optimzer.lr=1", "train.max_step=5", "seed=-1", "model.n_head=5"],
            ["did you mean optimizer.lr?", "did you mean train.max_steps?", "seed=-1", "n_head 5"],
        ),
        (["modle=small"], ["unknown key modle, did you mean model?"]),
        (
            ["model={n_layr: 3}", "train={max_step: 3}"],
            ["did you mean model.n_layer?", "did you mean train.max_steps?"],
        ),
        (["+optimzer.lr=1", "experiment=x"], ["did you mean optimizer.lr?", "unknown key experiment, did you mean"]),
        (["wandb.project=${nope}", "seed=x"], ["wandb.project: Interpolation key 'nope'", "seed=x"]),
        (["wandb.tags=[3]", "device=gpu"], ["wandb.tags.0=3: input should be a valid string", "device=gpu"]),
        (["-m", "optimizer.lr=1e-3,1e-4", "modl.n_head=1,2"], ["unknown key modl.n_head, did you mean model.n_head?"]),
        (["-m", "optimizer.lr=y,x"], ["optimizer.lr=x: input should be a valid number"]),
        (["optimizer.momentum=0.9", "optimizer.lr=-1"], ["unknown key optimizer.momentum", "optimizer.lr=-1"]),
        (["data=text", "data.path=x", "data.template=plain", "sede=1"], ["data.template", "did you mean seed?"]),
        (["finetune.rank=4", "seed=x"], ["missing key finetune.name: it is one of full, lora, last_blocks", "seed=x"]),
        (["experiments=lr_vs_context", "optimizer.momentum=0.1", "sede=1"], ["optimizer.momentum", "unknown key sede"]),
        (["-m", "optimizer.momentum=0.1,0.2", "optimizer.lr=-1"], ["optimizer.momentum", "optimizer.lr=-1"]),
        (["-m", "optimizer=adamw,sgd", "optimizer.momentum=0.1"], ["unknown key optimizer.momentum"]),
        (["data.columns.answer=reply", "seed=-1"], ["seed=-1"]),  # a key of the user's own within a dict
    ],
)
def test_all_wrong_values_and_misspelt_keys_are_named_in_one_line(typed, expected, starts, tmp_path):
    start = starts.start(*typed, f"hydra.sweep.dir={tmp_path / 'sweep'}", f"hydra.run.dir={tmp_path / 'run'}")
    assert start.code == 2 and start.stderr.count("\n") == 1 and "Traceback" not in start.stderr, start
    assert all(part in start.stderr for part in expected), start.stderr
    assert "unknown key data.columns" not in start.stderr and "torch" not in start.imports


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["model=huge", "seed=-1"], "Could not find 'model/huge'"),
        (["experiments=lr_vs_contxt"], "Could not find 'experiments/lr_vs_contxt'"),
        (["~nowhere"], "Could not delete"),
        (["hydra/launcher=basc"], "Could not find 'hydra/launcher/basc'"),
        (["optimizer.lr=["], "no viable alternative"),
        (["seed"], "missing EQUAL"),
        (["hydra.run.dirr=x"], "hydra.run.dirr"),
        (["optimizer.lr=1e-3,1e-4"], "optimizer.lr=1e-3,1e-4"),
        (["--config-name=trian"], "Cannot find primary config 'trian'"),
        (["--config-dir=nowhere"], "nowhere"),
    ],
)
def test_what_hydra_refuses_is_its_own_message_in_one_line(typed, expected, starts):
    start = starts.start(*typed)
    assert start.code == 2 and start.stderr.startswith("error: ") and start.stderr.count("\n") == 1, start
    assert expected in start.stderr and "Traceback" not in start.stderr and not start.imports, start.stderr


def test_misspelt_keys_in_a_file_of_a_group_and_on_the_axes_of_a_study_are_named(starts, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [tiny]\nmodel: {n_layrs: 3}\ntrian: {max_steps: 3, max_epochs: 1}\n"
    )
    where = [f"--config-dir={tmp_path}", f"hydra.sweep.dir={tmp_path}/sweep", f"hydra.run.dir={tmp_path}/run"]
    start = starts.start(*where, "model=mine", "seed=-1")
    assert start.code == 2
    for part in ("n_layrs, did you mean model.n_layer?", "trian.max_steps, did", "trian.max_epochs, did", "seed=-1"):
        assert part in start.stderr


@pytest.mark.parametrize(
    "typed",
    [
        ["+hydra.job.env_set.PROBE=seen"],
        ["+hydra.callbacks.mine._target_=hydra.experimental.callback.Callback"],
        ["hydra/job_logging=default"],
        ["hydra.verbose=true"],
    ],
)
def test_what_hydra_offers_works_as_anywhere_else(typed, starts, tmp_path):
    start = starts.start(*typed, f"hydra.run.dir={tmp_path / 'run'}")
    assert start.code == 0 and start.stderr == "", start
    assert start.stdout.startswith("valid " + ("seen" if "PROBE" in typed[0] else "")), start


def test_the_environment_can_be_read(starts, tmp_path):
    start = starts.start("wandb.entity=${oc.env:TEAM}", f"hydra.run.dir={tmp_path / 'run'}", TEAM="blue")
    assert (start.code, start.stderr) == (0, "")
    start = starts.start("wandb.entity=${oc.env:TEAM_OF_NOBODY}", f"hydra.run.dir={tmp_path / 'run'}")
    assert start.code == 2 and "wandb.entity: " in start.stderr and "TEAM_OF_NOBODY" in start.stderr, start


def test_sentences_reach_hydra_as_texts():
    sentence = "prompt=What's up, doc (or ${nobody})?"
    [typed] = prepare([sentence], "generate")
    assert typed == "prompt='What\\'s up, doc (or \\${nobody})?'"
    assert prepare(["prompt=null", "prompt='quoted'"], "generate") == [
        "prompt=null", "prompt='quoted'",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["medquad (1).csv", "epoch=3-loss=2.10.ckpt", "a,b.csv", "[1].txt", "{x}.txt", "~x", "#1", "John's.csv",
     "Größe.txt", "choice(a,b)", "1e-3", "a'b\"c", "back\\slash", "a b ", "${x", "%", "null.csv"],
)  # fmt: skip
def test_paths_are_taken_as_typed_in_each_script_and_for_each_key(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script, keys in (
        ("train", ("data.path", "data.prepared_dir", "init.from", "out_dir", "hydra.sweep.dir")),
        ("generate", ("checkpoint", "prompts", "export", "output")),
        ("prepare_data", ("data.path", "+data.prepared_dir", "++data.path")),
    ):
        for key in keys:
            typed = prepare([f"{key}={name}"], script)[-1]
            assert value_of(typed) == f"{tmp_path}/{name}", typed


def value_of(argument):
    """What Hydra makes of the value of an argument."""
    override = OverridesParser.create().parse_override(argument)
    return OmegaConf.create({"x": override.value()})["x"]


def test_sentences_and_names_are_taken_as_typed():
    for key in ("wandb.group", "wandb.project", "data.card.title", "data.columns.question", "sweep.name"):
        for text in ("lr=1e-3, first (try)", "2024", "it's", "[a]"):
            assert value_of(prepare([f"{key}={text}"], "train")[-1]) == text
    assert prepare(["wandb.group=null"], "train") == ["wandb.group=null"]


def test_several_values_are_choice_or_files_that_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def values(text, *mode):
        typed = prepare([f"data.path={text}", *mode], "train")[-1]
        override = OverridesParser.create().parse_override(typed)
        values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
        return [str(getattr(value, "text", value)).strip("'").removeprefix(f"{tmp_path}/") for value in values]

    for name in ("a.txt", "b (1).txt", "c,d.txt"):
        (tmp_path / name).write_text("x")
    assert values("choice(a.txt,'b (1).txt')", "-m") == ["a.txt", "b (1).txt"]
    assert values("a.txt,b (1).txt", "-m") == ["a.txt", "b (1).txt"]
    assert values("c,d.txt", "-m") == ["c,d.txt"]
    assert values("a.txt,gone.txt", "-m") == ["a.txt,gone.txt"]
    assert values("a.txt,b (1).txt") == ["a.txt,b (1).txt"]


def test_a_path_with_an_interpolation_is_left_to_hydra(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = prepare(["out_dir=runs/${model.name}, b", "data.path=${oc.env:X}/y"], "train")
    assert typed == [f"out_dir='{tmp_path}/runs/${{model.name}}, b'", "data.path='${oc.env:X}/y'"]


def test_a_path_in_a_section_that_is_typed_begins_where_the_user_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"init.from={tmp_path}/x.pt" in prepare(["init={from: x.pt}"], "train")


def test_weights_that_are_not_there_hide_no_other_fault(starts, tmp_path):
    start = starts.start("init.from=epoch=3.ckpt", "optimizer.lr=-1", "sead=3", f"hydra.run.dir={tmp_path / 'run'}")
    assert start.code == 2 and start.stderr.count("\n") == 1
    for part in ("epoch=3.ckpt", "optimizer.lr=-1", "did you mean seed?"):
        assert part in start.stderr
    assert "set init.from" not in start.stderr and start.stderr.count("no such file") == 1
    start = starts.start("init.from=epoch=3.ckpt", f"hydra.run.dir={tmp_path / 'run'}")
    assert start.code == 3 and "no such file" in start.stderr


def test_what_may_have_been_meant_is_said_of_weights_too_where_several_faults_share_a_line(starts, tmp_path):
    (tmp_path / "trainer" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "trainer" / "checkpoint-5" / "config.json").write_text("{}")
    start = starts.start(f"init.from={tmp_path / 'trainer'}", "sead=3", f"hydra.run.dir={tmp_path / 'run'}")
    assert start.code == 2 and start.stderr.count("\n") == 1
    for meant in (f"did you mean {tmp_path / 'trainer' / 'checkpoint-5'}?;", "did you mean seed?"):
        assert meant in start.stderr


def test_weights_from_elsewhere_bring_their_architecture_and_are_trained_gently_unless_something_else_is_typed():
    def typed(*words):
        return prepare(list(words), "train")

    assert typed("init.from=gpt2") == ["model=pretrained", "finetune=full", "init.from=gpt2"]
    assert typed("init.from=gpt2", "finetune=lora") == ["model=pretrained", "init.from=gpt2", "finetune=lora"]
    assert typed("init.from=null") == ["init.from=null"]
    assert typed("init.from=gpt2", "experiments=medquad_finetune") == ["init.from=gpt2", "experiments=medquad_finetune"]


def test_a_flag_may_stand_anywhere():
    assert prepare(["model=mini", "-m", "seed=1,2"], "train") == ["-m", "model=mini", "seed=1,2"]


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("runs", ["runs"]),
        ("first", ["first"]),
        (
            "[outputs/runs/2026-11-29_13-03-34_ae75, a (1)/it's]",
            ["outputs/runs/2026-11-29_13-03-34_ae75", "a (1)/it's"],
        ),
        ("mine,other", ["mine", "other"]),  # zsh takes brackets for a pattern
    ],
)
def test_the_names_of_a_report_are_taken_as_typed_with_and_without_brackets(value, names):
    (argument,) = prepare([f"report={value}"], "train")
    override = OverridesParser.create().parse_override(argument)
    assert [getattr(name, "text", name) for name in override.value()] == names
    assert prepare(["report=null"], "train") == ["report=null"]


@pytest.mark.parametrize(
    ("typed", "strings"),
    [
        ("[###]", ["###"]),  # what bash makes of stop=["###"]
        ('["###"]', ["###"]),
        ("###", ["###"]),
        ("\n\n", ["\n\n"]),
        ("[Question:,### Answer]", ["Question:", "### Answer"]),
        ("['a, b',c]", ["a, b", "c"]),
        ("[]", []),
        ("don't, ${x}", ["don't, ${x}"]),
        ("[<|end|>,it's]", ["<|end|>", "it's"]),
    ],
)
def test_strings_that_end_a_text_are_taken_as_typed(typed, strings):
    assert list(value_of(prepare([f"stop={typed}"], "generate")[-1])) == strings
