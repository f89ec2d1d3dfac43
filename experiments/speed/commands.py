"""What whole commands take, from the start of the process: `python experiments/speed/commands.py --help`.

    first step     python train.py train.log_every=1, the default run: until the row of step 1 is on the disk
    job            python train.py -m with one job and with five of one step each, without samples and next to no
                   evaluation: a quarter of the difference is what a job takes besides training, that is composition,
                   model, W&B offline, checkpoint, figures, model card
    medquad        python prepare_data.py data=medquad, with --medquad
    text           python prepare_data.py data=text of 25, 100 and 400 MB: the same text again and again, with --text

Each is repeated; medians are printed, and the least and the most. Everything is written to a temporary folder.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"WANDB_MODE": "offline"}


def run(*arguments: str) -> tuple[float, float, str]:
    """Seconds, peak memory in 10^6 bytes, and output of a command."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(arguments)}: status {status}\n{output}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e6, output


def first_step(folder: Path, number: int) -> float:
    """Seconds from the start of the default run until its first step has been recorded; then it is interrupted."""
    out = folder / f"first_{number}"
    rows = out / "metrics.jsonl"
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "train.py", "train.log_every=1", f"out_dir={out}"], cwd=ROOT, env=ENVIRONMENT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (rows.exists() and any(json.loads(line)["step"] == 1 for line in rows.read_text().splitlines())):
        if process.poll() is not None:
            sys.exit("the run ended before its first step")
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    process.terminate()
    process.wait()
    return seconds


def sweep(folder: Path, number: int, jobs: int) -> float:
    seeds = ",".join(map(str, range(jobs)))
    name = f"overhead-{os.getpid()}-{number}-{jobs}"
    directory = f"hydra.sweep.dir={folder / name}"
    least = ["train.max_steps=1", "train.eval_tokens=128", "train.sample_every=null"]
    return run("train.py", "-m", f"seed={seeds}", *least, f"sweep.name={name}", directory)[0]


def prepare(folder: Path, *arguments: str) -> tuple[float, float, int]:
    """Seconds, peak memory in MB, and tokens."""
    seconds, memory, _ = run("prepare_data.py", *arguments, f"data.prepared_dir={folder / 'prepared'}")
    meta = json.loads((folder / "prepared" / "meta.json").read_text())
    return seconds, memory, sum(split["tokens"] for split in meta["splits"].values())


def show(what: str, values: list[float], unit: str) -> None:
    print(f"{what}: {statistics.median(values):.2f} {unit} ({min(values):.2f} to {max(values):.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--medquad", metavar="CSV", type=Path)
    parser.add_argument("--text", metavar="TXT", type=Path)
    parser.add_argument("--parts", choices=["train", "prepare"], nargs="+", default=["train", "prepare"])
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run("prepare_data.py")
        if "train" in args.parts:
            show("first step", [first_step(folder, i) for i in range(args.turns)], "s")
            jobs = [(sweep(folder, i, 5) - sweep(folder, i, 1)) / 4 for i in range(args.turns)]
            show("job of a sweep", jobs, "s")
        if args.medquad and "prepare" in args.parts:
            found = [prepare(folder, "data=medquad", f"data.path={args.medquad.resolve()}") for _ in range(args.turns)]
            show("medquad", [seconds for seconds, *_ in found], "s")
            show("medquad, peak memory", [memory for _, memory, _ in found], "MB")
        if args.text and "prepare" in args.parts:
            content = re.sub(r"\r\n?", "\n", args.text.read_text(encoding="utf-8"))
            for megabytes in (25, 100, 400):
                big = folder / "big.txt"
                with open(big, "w", encoding="utf-8") as file:  # in pieces: a child's peak begins with its parent's
                    for _ in range(megabytes * 1_000_000 // len(content.encode())):
                        file.write(content)
                n = args.turns if megabytes <= 100 else 1
                found = [prepare(folder, "data=text", f"data.path={big}") for _ in range(n)]
                show(f"text of {megabytes} MB", [seconds for seconds, *_ in found], "s")
                show("  millions of tokens a second", [tokens / seconds / 1e6 for seconds, _, tokens in found], "")
                show("  peak memory", [memory for _, memory, _ in found], "MB")


if __name__ == "__main__":
    main()
