"""What the models of a comparison are called, and which of them are seeds of one."""

import yaml
from conftest import sweep_job

from gpt.evaluation.labels import labels
from gpt.files.paths import PROJECT_ROOT


def sweep(folder, *settings):
    jobs = [sweep_job(folder, i, own, [3.0]) for i, own in enumerate(settings)]
    return [str(job.folder) for job in jobs]


def run(folder, **settings):
    """A single run's folder, with what of it is read."""
    folder.mkdir(parents=True)
    values = {"model": {"name": "tiny"}, "optimizer": {"lr": 0.1}, "overrides": []} | settings
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    (folder / "metrics.jsonl").write_text('{"step": 0, "tokens": 0, "val/loss": 3.0}\n')
    return str(folder)


def test_jobs_of_a_sweep_that_differ_in_the_seed_alone_are_one_entry(tmp_path):
    own = sweep(tmp_path / "first", *({"optimizer.lr": lr, "seed": s} for lr, s in [(0.1, 1), (0.1, 2), (0.2, 1)]))
    assert list(labels(own).values()) == ["optimizer.lr=0.1", "optimizer.lr=0.1", "optimizer.lr=0.2"]
    others = ["gpt2", str(PROJECT_ROOT / "outputs/a")]
    assert list(labels([*own, *others]).values()) == [
        "first optimizer.lr=0.1", "first optimizer.lr=0.1", "first optimizer.lr=0.2", "gpt2", "outputs/a",
    ]  # fmt: skip


def test_the_same_settings_in_two_sweeps_are_no_seeds_of_one(tmp_path):
    a = sweep(tmp_path / "a", {"optimizer.lr": 0.1, "seed": 1}, {"optimizer.lr": 0.2, "seed": 1})
    b = sweep(tmp_path / "b", {"optimizer.lr": 0.1, "seed": 1}, {"optimizer.lr": 0.2, "seed": 1})
    assert [label.partition(" ")[0] for label in labels([*a, *b]).values()] == ["a", "a", "b", "b"]
    again = sweep(tmp_path / "x" / "a", {"optimizer.lr": 0.1, "seed": 2})
    assert len(set(labels([*a, *again]).values())) == 3


def test_a_sweep_of_seeds_alone_has_its_own_name(tmp_path):
    assert set(labels(sweep(tmp_path / "first", {"seed": 1}, {"seed": 2})).values()) == {"first"}


def test_single_runs_that_differ_in_the_seed_alone_are_one_entry_beside_another_one(tmp_path):
    a, b, c = (run(tmp_path / f"base_{seed}", seed=seed) for seed in (1, 2, 3))
    other = run(tmp_path / "other", seed=1, optimizer={"lr": 0.2})
    found = labels([a, other, b, c])
    assert found == {a: f"{a} and 2 more seeds", b: f"{a} and 2 more seeds", c: f"{a} and 2 more seeds", other: other}


def test_where_nothing_else_is_compared_seeds_are_compared_with_each_other(tmp_path):
    names = [run(tmp_path / f"base_{seed}", seed=seed) for seed in (1, 2)]
    assert labels(names) == {name: name for name in names}


def test_the_same_run_twice_is_no_second_seed(tmp_path):
    names = [run(tmp_path / name, seed=1) for name in "abc"]
    assert labels(names) == {name: name for name in names}


def test_a_fine_tuned_run_for_each_seed_is_one_entry_though_each_began_with_other_weights(tmp_path):
    bases = [run(tmp_path / f"base_{seed}", seed=seed) for seed in (1, 2)]
    tuned = [
        run(tmp_path / f"tuned_{s}", seed=s, init={"from": f"base_{s}"}, finetune={"name": "full"}) for s in (1, 2)
    ]
    assert len(set(labels([*bases, *tuned]).values())) == 2
