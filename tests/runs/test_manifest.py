"""What a manifest says: of which format a checkpoint is, and what its files are called."""

import json
from dataclasses import replace

import pytest
from test_checkpoint import publish

from gpt.errors import UserError
from gpt.runs import checkpoint, manifest
from gpt.runs.manifest import FileFacts


def test_a_newer_format_is_refused(tmp_path):
    path = publish(tmp_path, 1)
    content = json.loads((path / "manifest.json").read_text())["content"] | {"format": 99}
    (path / "manifest.json").write_text(json.dumps({"content": content, "sha256": manifest.hash_json(content)}))
    with pytest.raises(UserError, match=f"format 99, this version reads 1 to {manifest.SHARDED}") as caught:
        checkpoint.verify(path)
    assert caught.value.code == 3


def test_every_format_can_be_brought_to_the_current_one():
    assert manifest.UPGRADES.keys() == set(range(1, manifest.FORMAT)) and manifest.SHARDED == manifest.FORMAT + 1


def test_one_process_has_two_files_of_tensors_and_four_ranks_have_eight(tmp_path):
    one = manifest.read_manifest(publish(tmp_path, 1))
    assert (one.format, one.weights, one.state) == (5, ["model.safetensors"], ["state.safetensors"])
    files = {f"{stem}.{n}-of-4.safetensors": FileFacts(1, "") for n in (1, 2, 3, 4) for stem in ("model", "state")}
    four = replace(one, format=manifest.SHARDED, files=files)
    assert four.weights + four.state == [name for stem in ("model", "state") for name in files if stem in name]
