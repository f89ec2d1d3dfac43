"""Shares a step between several processes, each with the whole model (data parallelism), through torch.distributed.

Small exchanges go through gloo on every kind of device, so that they never wait for a GPU; gradients of GPUs go through
NCCL. Everything that ranks exchange has a limit of time, and carries along whether a rank is to stop.
"""

import contextlib
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt.config.schema import ParallelConfig
from gpt.errors import ENVIRONMENT, UserError
from gpt.machine import group_faults, rank_environment
from gpt.machine.ranks import STEP, Ranks

T = TypeVar("T")
BUCKET = 2**26  # bytes; smaller gradients are added up together
POLL = 0.0005  # seconds between looks at an exchange of GPUs
CONNECTING = 300.0  # seconds in which the first rank has to listen; without torchrun it may have been started later
POLL_START = 0.05  # seconds between looks at ranks that are still to come
SLICE = 1.0  # seconds of waiting, after which signals are heard and other ranks' faults are looked for
NEVER = timedelta(days=30)  # torch's own limit; those of a group are shorter, and not always the same
FACTOR = 3  # by which a step may be longer than the longest so far
COMPILING = 300.0  # seconds within a step of a compiled model: a batch of another shape is compiled anew, in one rank


class ProcessGroup(Ranks):
    """The ranks that torchrun or SLURM has started together, as seen by one of them."""

    def __init__(
        self, place: rank_environment.RankEnvironment, cfg: ParallelConfig, faults: group_faults.Faults
    ) -> None:
        self.rank, self.count = place.rank, place.count
        self.seed = () if place.is_first else (place.rank,)
        self._cfg, self._faults = cfg, faults
        self._agent = os.getppid() if place.has_agent else None  # torchrun; without it nothing would end the ranks
        self._own_wish: Callable[[], int] = lambda: 0
        self._agreed = 0
        self._last = time.monotonic()  # when ranks last exchanged something
        self._longest: dict[str, float] = {}  # seconds, by what they were spent on
        self._shortest = cfg.step_timeout  # seconds, of the limits within steps

    def share(self, rows: list[T]) -> list[T]:
        """Neighbouring rows; where they cannot be shared evenly, the parts differ by one."""
        first, last = (rank * len(rows) // self.count for rank in (self.rank, self.rank + 1))
        return rows[first:last]

    def total(self, numbers: Sequence[float], of: str) -> list[float]:
        """As they are added up in the order of the ranks, all ranks get the same to the last bit."""
        parts = self._gather(numbers, of)
        return [type(own)(sum(column)) for own, column in zip(numbers, zip(*parts, strict=True), strict=True)]

    def gradients(self, loss: Tensor, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """Zeros stand for what a rank without rows does not have. What no rank has stays away, as in one process."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        has = torch.tensor([float(p.grad is not None) for p in trained], device=loss.device)
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._add([loss, has, *(parameter.grad for parameter in trained)])
        for parameter, n_ranks in zip(trained, has.tolist(), strict=True):
            if not n_ranks:
                parameter.grad = None
        return super().gradients(loss, trained)

    def spread(self, tensors: Iterable[Tensor]) -> None:
        tensors = [tensor.detach() for tensor in tensors]
        with self._exchange():
            works = [dist.broadcast(tensor, 0, async_op=True) for tensor in tensors]
            self._wait(works, None, any(tensor.is_cuda for tensor in tensors))

    def first(self, work: Callable[..., T], *arguments: Any) -> T:
        answer, failure = None, None
        if self.rank == 0:
            try:
                answer = json.dumps({"value": work(*arguments)}).encode()
            except UserError as error:
                failure, answer = error, json.dumps({"error": error.args}).encode()
        value = json.loads(self._from_first(answer or b""))
        if failure is not None:
            raise failure
        if "error" in value:
            raise UserError(*value["error"])
        return value["value"]

    def gather(self, value: Any) -> list[Any]:
        own = json.dumps(value).encode()
        lengths = [int(length) for (length,) in self._gather([len(own)])]
        buffer = torch.zeros(max(lengths), dtype=torch.uint8)
        buffer[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        parts = [torch.zeros_like(buffer) for _ in range(self.count)]
        with self._exchange():
            self._wait([dist.all_gather(parts, buffer, async_op=True)], None)
        return [json.loads(part[:n].numpy().tobytes()) for part, n in zip(parts, lengths, strict=True)]

    def in_turn(self, work: Callable[..., T], *arguments: Any) -> T:
        if self.rank == 0:
            result = work(*arguments)
        self._gather([])
        return result if self.rank == 0 else work(*arguments)

    def check_same(self, values: Mapping[str, Any], what: str) -> None:
        own = json.dumps(values, sort_keys=True, default=str)
        digest = int.from_bytes(hashlib.sha256(own.encode()).digest()[:6])
        digests = [int(part[0]) for part in self._gather([digest])]
        if len(set(digests)) == 1:
            return
        theirs, mine = json.loads(self._from_first(own.encode() if self.rank == 0 else b"")), json.loads(own)
        if digests[self.rank] != digests[0]:
            keys = [key for key in sorted({*theirs, *mine}) if theirs.get(key) != mine.get(key)]
            differ = ", ".join(f"{key} {mine.get(key)} != {theirs.get(key)}" for key in keys)
            where, remedy = f"rank {self.rank}", "start all ranks with one command, on the same files"
            raise UserError(f"{what} other than those of rank 0: {differ}", where, remedy)
        raise self._faults.explain(f"{what} differ")

    def expect_compiling(self) -> None:
        self._shortest = max(self._shortest, COMPILING)

    def watch(self, wish: Callable[[], int]) -> None:
        self._own_wish, self._agreed = wish, 0

    def wish(self, own: Callable[[], int]) -> int:
        return self._agreed

    @property
    def stops(self) -> bool:
        return self._agreed != 0

    def _from_first(self, content: bytes) -> bytes:
        """What the first rank has, in all of them."""
        length = int(self._gather([len(content)])[0][0])
        buffer = torch.zeros(length, dtype=torch.uint8)
        if self.rank == 0:
            buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self.spread([buffer])
        return buffer.numpy().tobytes()

    def _gather(self, numbers: Sequence[float], of: str | None = None) -> list[list[float]]:
        """The numbers of each rank, exact up to 2^53; with them, what each wishes."""
        is_orphan = self._agent is not None and os.getppid() != self._agent
        wish = signal.SIGTERM if is_orphan else self._own_wish()
        own = torch.tensor([wish, *numbers], dtype=torch.float64)
        parts = [torch.zeros_like(own) for _ in range(self.count)]
        with self._exchange():
            self._wait([dist.all_gather(parts, own, async_op=True)], of)
        table = [part.tolist() for part in parts]
        self._agreed = int(max(row[0] for row in table))
        return [row[1:] for row in table]

    def _add(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over all ranks: large ones as they are, others together in buckets."""
        buckets: list[list[Tensor]] = []
        size, kind = 0, None
        large = [tensor for tensor in tensors if tensor.nbytes >= BUCKET and tensor.is_contiguous()]
        for tensor in tensors:
            if tensor.nbytes >= BUCKET and tensor.is_contiguous():
                continue
            if not buckets or size + tensor.nbytes > BUCKET or tensor.dtype != kind:
                buckets.append([])
                size, kind = 0, tensor.dtype
            buckets[-1].append(tensor)
            size += tensor.nbytes
        with self._exchange():
            flat = [torch.cat([tensor.flatten() for tensor in bucket]) for bucket in buckets]
            works = [dist.all_reduce(tensor, async_op=True) for tensor in [*flat, *large]]
            self._wait(works, STEP, tensors[0].is_cuda)
        for bucket, sums in zip(buckets, flat, strict=True):
            sums = sums.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [part.view_as(t) for part, t in zip(sums, bucket, strict=True)])

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """An exchange that fails becomes the fault that it fails for."""
        try:
            yield
        except RuntimeError as error:
            raise self._faults.explain(" ".join(str(error).split())[:200]) from error

    def _wait(self, works: Sequence[dist.Work], of: str | None, on_gpu: bool = False) -> None:
        """Until all is exchanged. Raises RuntimeError when that fails or takes too long, GroupFault when another rank
        has left an error."""
        limit, waited = self._limit(of), 0.0  # by its own count: a machine may have slept meanwhile
        for work in works:
            while not is_done(work, on_gpu):
                waited += SLICE
                if waited >= limit:
                    raise RuntimeError(f"no answer for {waited:.0f} s")
                if cause := self._faults.cause():
                    raise cause
        now = time.monotonic()
        if of is not None:  # the first one compiles, or finds files that are not in memory
            self._longest[of] = max(self._longest[of], now - self._last) if of in self._longest else 0.0
        self._last = now

    def _limit(self, of: str | None) -> float:
        """Seconds for which this rank waits for the others."""
        if of not in self._longest:
            return self._cfg.start_timeout
        return max(self._shortest, FACTOR * self._longest[of])


def is_done(work: dist.Work, on_gpu: bool) -> bool:
    """Whether an exchange is over; waits a second for it at most. Raises RuntimeError when it has failed."""
    end = time.monotonic() + SLICE
    while on_gpu and not work.is_completed():  # NCCL would give the whole group up at the end of its wait
        if time.monotonic() > end:
            return False
        time.sleep(POLL)
    try:
        work.wait(timedelta(seconds=SLICE))
    except RuntimeError:
        if work.is_completed():
            raise
        return False
    return True


@contextlib.contextmanager
def opened(cfg: ParallelConfig, kind: type[ProcessGroup] = ProcessGroup) -> Iterator[ProcessGroup]:
    """The group of all ranks, until the end of the `with` block. Raises UserError (5) when they do not meet."""
    place = rank_environment.read()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"

    def meet() -> ProcessGroup:
        prefix, store = f"gpt-lab/{place.attempt}", meeting_place(place)
        faults = group_faults.Faults(dist.PrefixStore(prefix, store), place.rank, place.count)
        group_faults.join(faults)
        waiting = store.clone()  # a connection that waits can do nothing else meanwhile, such as tell of a fault
        present = [f"{prefix}/{group_faults.ABOUT}/{rank}" for rank in range(place.count)]
        waiting.wait(present, timedelta(seconds=cfg.start_timeout))
        torchs = dist.PrefixStore(f"{prefix}/torch", waiting)
        dist.init_process_group(backend, store=torchs, rank=place.rank, world_size=place.count, timeout=NEVER)
        return kind(place, cfg, faults)

    try:
        group = beside(meet)
    except RuntimeError as error:
        what = f"the {place.count} ranks do not meet: {' '.join(str(error).split())[:200]}"
        where, remedy = f"{place.address}:{place.port}", "check that all ranks are started and reach that address"
        raise UserError(what, where, remedy, ENVIRONMENT) from error
    yield group
    dist.destroy_process_group()  # not after an error: it would wait for what is under way


def beside(work: Callable[[], T]) -> T:
    """What `work()` returns or raises, in a thread of its own: a signal ends the process also while torch waits for a
    rank that does not come any more, inside of which Python hears none."""
    results: list[T] = []
    errors: list[BaseException] = []

    def do() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_START)
    if errors:
        raise errors[0]
    return results[0]


def meeting_place(place: rank_environment.RankEnvironment) -> dist.Store:
    """The store that all ranks connect to. torchrun keeps one that survives a new start of its ranks."""
    is_master = place.is_first and not place.has_agent
    limit = timedelta(seconds=CONNECTING)
    return dist.TCPStore(place.address, place.port, None, is_master, limit, wait_for_workers=False)


def launch_id(own: str) -> str:
    """The name of this start, the same for all ranks, and also for those that torchrun starts again in their place:
    that of the rank which asked first."""
    place = rank_environment.read()
    return meeting_place(place).compare_set("gpt-lab/launch_id", "", own).decode()
