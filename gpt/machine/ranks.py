"""Shares a step between the processes of a run: the ranks. One process is the trivial case, and all that is here.

gpt/loop.py and train.py ask a Ranks object and nothing else; gpt/machine/process_group.py has the one for several
processes. What is defined here must cost one process nothing: no collective, and no import of torch.distributed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from gpt.terminal import console

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from gpt.model import LanguageModel

    M = TypeVar("M", bound=LanguageModel)

T = TypeVar("T")
# What ranks have a limited time for, once they have done it, see ParallelConfig. COUNTS go before the passes of a STEP.
COUNTS, STEP, EVALUATION = "counts", "step", "evaluation"


class Ranks:
    """One process, which computes all of a step; its sums are the whole."""

    rank, count = 0, 1
    is_sharded = False  # whether each rank has only some rows of the weights: then all have to compute at once
    seed: tuple[int, ...] = ()  # what the random numbers of a step depend on besides the run's seed and the step

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes, prints and saves."""
        return self.rank == 0

    def share(self, rows: list[T]) -> list[T]:
        """This rank's part of the rows of a step, which may be none."""
        return rows

    def idle(self, rows: int, context_length: int) -> str:
        """What is wrong with steps of so many rows: that ranks have none of them. Empty where all have."""
        if rows >= self.count:
            return ""
        what = f"{self.count - rows} of {self.count} ranks have nothing to compute"
        remedy = f"start {rows}, or set train.tokens_per_step={self.count * context_length} or more"
        return f"{what} in steps of {console.count(rows, 'row')}; {remedy}"

    def total(self, numbers: Sequence[float], of: str) -> list[float]:
        """The sum over all ranks of each number; whole numbers stay whole. `of` is COUNTS or EVALUATION."""
        return list(numbers)

    def gradients(self, loss: "Tensor", parameters: Iterable["nn.Parameter"]) -> "list[Tensor]":
        """The gradients of all ranks together, once all micro-batches are computed: each gradient becomes the sum over
        the ranks, and so does `loss`. Returns the gradients of this rank's parameters."""
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    def each(self, micro_batches: list[T]) -> Iterable[T]:
        """The micro-batches of a step that this rank computes, and for their backward passes what they need."""
        return micro_batches

    def even(self, batches: Sequence[T], n: int) -> Sequence[T]:
        """The batches of an evaluation that this rank computes, of which a rank has at most `n`."""
        return batches

    def norm(self, gradients: "list[Tensor]") -> "Tensor":
        """The norm of all gradients together, those of other ranks included where they are sharded."""
        from torch.nn.utils import get_total_norm

        return get_total_norm(gradients)

    def place(self, model: "M", device: "torch.device", dtype: "torch.dtype") -> "M":
        """A model that is on the CPU, on its device. Its trained parameters are chosen; its optimizer comes later."""
        return model.to(device)

    def with_model(self, work: Callable[..., T], model: "nn.Module", *arguments: Any) -> T:
        """What `work(model, *arguments)` returns, for the first rank to record: what is as `first` returns it. The last
        argument says whether to stop. Where the model is sharded, all ranks call it, and stop together."""
        return self.first(work, model, *arguments)

    def computing(self, model: "nn.Module") -> AbstractContextManager[None]:
        """What a model computes in: the passes of a step, of an evaluation, or of drawing samples."""
        return nullcontext()

    def spread(self, tensors: Iterable["Tensor"]) -> None:
        """Every rank gets the tensors of the first: its weights, before the first step."""

    def first(self, work: Callable[..., T], *arguments: Any) -> T:
        """What `work(*arguments)` returns, or the UserError that it raises, which the first rank alone calls: in all
        ranks. It has to be something that JSON can hold. The others wait as long as the start of a run may take."""
        return work(*arguments)

    def gather(self, value: Any) -> list[Any]:
        """The value of each rank, in all of them. It has to be something that JSON can hold."""
        return [value]

    def in_turn(self, work: Callable[..., T], *arguments: Any) -> T:
        """What `work(*arguments)` returns in this rank. The first one calls it before all others, which find what it
        has left for them, such as downloads."""
        return work(*arguments)

    def check_same(self, values: Mapping[str, Any], what: str) -> None:
        """Raises UserError in a rank that has others of these values by name than the first rank."""

    def expect_compiling(self) -> None:
        """From now on a rank may have to compile within any step, and the others wait for it."""

    def watch(self, wish: Callable[[], int]) -> None:
        """From now on `wish()` says whether this rank is to stop, and why: 0 for no, else the number of a signal, or 1.
        It is asked whenever ranks exchange something."""

    def wish(self, own: Callable[[], int]) -> int:
        """What the ranks agreed on when they last exchanged something: the largest of their wishes, so that all of them
        stop at the same step. For one process what it wishes now."""
        return own()

    @property
    def stops(self) -> bool:
        """Whether the ranks have agreed to stop. One process asks for itself, before each micro-batch."""
        return False


ALONE = Ranks()


class Planned(Ranks):
    """So many ranks of a run whose cost is estimated: none of them is there, and nothing is exchanged."""

    def __init__(self, count: int, is_sharded: bool) -> None:
        self.count, self.is_sharded = count, is_sharded and count > 1


class Shared:
    """The batches of an evaluation, for ranks to share out; iterated over, all of them. See `parts`."""

    def __init__(self, batches: Sequence[Any], ranks: Ranks, ready: Callable[[Iterable[Any]], Iterator[Any]]) -> None:
        self.batches, self.ranks, self.ready = batches, ranks, ready

    def __iter__(self) -> Iterator[Any]:
        return self.ready(self.batches)


def parts(batches: Iterable[T]) -> tuple[Iterable[T], Callable[[Sequence[float]], list[float]]]:
    """The batches that this rank evaluates, and what adds numbers up over all ranks. Where nothing is shared, those are
    all batches, and the numbers as they are. An objective that does not call this evaluates all batches in each rank,
    with the same result."""
    if not isinstance(batches, Shared):
        return batches, list
    ranks = batches.ranks
    most = -(-len(batches.batches) // ranks.count)
    part = batches.ready(ranks.even(batches.batches[ranks.rank :: ranks.count], most))
    return part, lambda numbers: ranks.total(numbers, EVALUATION)
