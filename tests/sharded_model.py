"""Trains a small model in a process, or in ranks that it is sharded over: what both must agree on. Run by ranks."""

from contextlib import nullcontext

import torch
from conftest import UNPUBLISHED, adamw_config, model_config, modern_config, muon_config
from torch import Tensor

from gpt import lora, optim
from gpt.config.optimizers import SGDConfig
from gpt.config.schema import LoRAConfig
from gpt.data.batching import Batch
from gpt.loop import evaluate, train_step
from gpt.machine.machine import Machine
from gpt.machine.ranks import ALONE, COUNTS, Ranks
from gpt.model import GPT
from gpt.modern import Modern
from gpt.objective import NEXT_TOKEN
from gpt.optimizers.running_mean import in_place
from gpt.runs.manifest import Identity

ADAPTERS = LoRAConfig(2, 4.0, ("attn.c_attn", "mlp.c_fc"))  # less rows than four ranks
MODERN_ADAPTERS = LoRAConfig(2, 4.0, ("self_attn.k_proj", "mlp.up_proj"))
CPU, VOCABULARY = torch.device("cpu"), 257  # tokens: divisible neither by 2 nor by 4
IDENTITY = Identity(model_config(n_embd=36), VOCABULARY, "bytes", "alpaca")
OPTIMIZERS = {
    "adamw": adamw_config(lr=1e-3),
    "muon": muon_config(momentum=0.9),
    "muon of today": muon_config(
        nesterov=False,
        scale="match_rms_adamw",
        orthogonalization="polar_express",
        cautious_decay=True,
        momentum_warmup=4,
        embedding_lr=3e-3,
        scalar_lr=2e-3,
    ),
    "sgd": SGDConfig("sgd", 0.1, 0.1, 0.9),
}


class Trained:
    """A model that is trained with steps of 3, 3, 3, 1, ... rows, in micro-batches of one row."""

    def __init__(
        self, ranks: Ranks = ALONE, optimizer: str = "adamw", dtype: torch.dtype = torch.float32, seed: int = 0,
        adapters: bool = False, checkpointing: bool = False, ema: float | None = None, family: str = "gpt2",
        **changes,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        if family == "gpt2":
            self.model = GPT(model_config(**{"n_embd": 36, "n_head": 2} | changes), VOCABULARY)
        else:
            self.model = Modern(modern_config(**UNPUBLISHED | {"norm_weights": True} | changes), VOCABULARY)
        self.model.gradient_checkpointing = checkpointing
        if adapters:
            lora.add(self.model, ADAPTERS if family == "gpt2" else MODERN_ADAPTERS, seed)
        self.machine = Machine(CPU, dtype, ranks=ranks)
        self.model = ranks.place(self.model, CPU, dtype)
        self.optimizer = optim.build(self.model, OPTIMIZERS[optimizer], ema=ema, dtype=dtype)

    def step(self, number: int) -> tuple[float, float]:
        rows = self.machine.ranks.share(rows_of(number))
        own = [batch.n_targets for batch in rows]
        (n_targets,) = self.machine.ranks.total([sum(own)], COUNTS)
        return train_step(
            self.model, self.optimizer, NEXT_TOKEN, rows, self.machine, grad_clip=0.5, n_targets=n_targets
        )  # fmt: skip

    def steps(self, first: int, last: int) -> list[float]:
        return [self.step(number)[0] for number in range(first, last)]

    def evaluate(self) -> float:
        """The loss, with `ema` that of the mean weights."""
        mean = optim.parts(self.optimizer).get("ema")
        with in_place(mean) if mean else nullcontext():
            return evaluate(self.model, NEXT_TOKEN, rows_of(10**6), self.machine)["val/loss"]

    def whole(self) -> dict[str, Tensor]:
        """All weights; ranks gather them."""
        return {
            name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            for name, tensor in self.model.state_dict().items()
        }


def rows_of(number: int) -> list[Batch]:
    """The rows of a step, a batch each; every fourth step has one, and rows have 7 to 12 targets."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, VOCABULARY, (3, 13), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[1, :5] = targets[2, 10:] = -100
    sums = (targets >= 0).sum(1).tolist()
    batches = [Batch(tokens[i : i + 1, :-1], targets[i : i + 1], None, None, 12, sums[i]) for i in range(3)]
    return batches[:1] if number % 4 == 3 else batches
