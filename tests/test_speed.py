"""The benchmark of experiments/speed runs to its end; what it measures is no test."""

import csv
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.exhaustive  # three processes that import torch
def test_the_benchmark_measures_and_writes_a_table_and_a_figure(tmp_path):
    command = ["--model", "tiny", "--rows", "2", "--context", "16", "--turns", "2", "--steps", "1", "--no-compiled"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments/speed/bench.py"), *command, "--out", str(tmp_path)],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "GFLOP/s" in done.stdout
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["who"].startswith("this project") and float(rows[0]["first_is_faster_by"]) == 1
    assert all(float(row["tokens_per_second"]) > 0 and float(row["memory_gb"]) > 0.1 for row in rows)
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
