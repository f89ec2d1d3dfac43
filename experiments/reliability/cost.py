"""What a checkpoint costs: the time of publishing one against writing and syncing the same bytes, in one run.

    python experiments/reliability/cost.py [model] [folder]      for example: small outputs

Both write to the same disk, turn by turn, and both remove what they wrote before only when the new one is there: memory
for the disk's cache that has just been freed is much faster to write to. The last line has medians and ratios.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from gpt import optim
from gpt.config import launch
from gpt.model import GPT
from gpt.progress import Progress
from gpt.runs import checkpoint

ROUNDS = 9


def main(model_name: str, folder: str) -> None:
    cfg = launch.compose([f"model={model_name}"])
    torch.manual_seed(0)
    model = GPT(cfg.model, 50257)
    optimizer = optim.build(model, cfg.optimizer)
    for parameter in model.parameters():  # one step, so that the optimizer has its state
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    identity = checkpoint.Identity(cfg.model, 50257, "gpt2", None)
    tensors = [*checkpoint.weights_of(model).values(), *optim.state_tensors(optimizer).values()]
    print(f"{model_name}: {sum(tensor.nbytes for tensor in tensors) / 1e9:.2f} GB, {os.cpu_count()} cores")
    Path(folder).mkdir(parents=True, exist_ok=True)
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    try:
        times: dict[str, list[float]] = {"written and synced": [], "published": []}
        for number in range(ROUNDS):
            times["written and synced"].append(write_and_sync(run_dir / "plain", tensors))
            started = time.perf_counter()
            checkpoint.publish(run_dir, model, optimizer, Progress(step=number), identity, {}, keep=1)
            times["published"].append(time.perf_counter() - started)
            print("  ".join(f"{name} {values[-1]:.2f} s" for name, values in times.items()))
    finally:
        shutil.rmtree(run_dir)
    pairs = zip(times["published"], times["written and synced"], strict=True)
    ratios = sorted(ours / plain for ours, plain in pairs)
    medians = "  ".join(f"{name} {statistics.median(values):.2f} s" for name, values in times.items())
    print(f"median: {medians}  ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def write_and_sync(path: Path, tensors: list[torch.Tensor]) -> float:
    """Seconds that one file of the same bytes takes, and the removal of the one before."""
    started = time.perf_counter()
    new = path.with_suffix(".new")
    with open(new, "wb", buffering=0) as file:
        for tensor in tensors:
            file.write(memoryview(tensor.reshape(-1).numpy()).cast("B"))
        os.fsync(file.fileno())
    new.replace(path)
    return time.perf_counter() - started


if __name__ == "__main__":
    main(*(sys.argv[1:] + ["small", "outputs"][len(sys.argv) - 1 :]))
