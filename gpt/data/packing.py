"""Plans which segments of the training data are read together, and when, in an epoch.

The plan for records is arrays, a few numbers for each segment. That for running text, whose segments are all windows
of one length, is computed: it takes no memory and no time, however long the text is.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 8  # of the Feistel network: four suffice for large numbers (Luby and Rackoff, 1988), small ones need more


@dataclass(frozen=True)
class Plan:
    """The steps of an epoch, each of some rows, each of some segments."""

    segments: np.ndarray  # the numbers of all segments, in the order in which they are read
    rows: np.ndarray  # where each row begins among `segments`, and where the last one ends
    steps: np.ndarray  # where each step begins among the rows, and where the last one ends

    def __len__(self) -> int:
        """Number of steps."""
        return len(self.steps) - 1

    @property
    def rows_in_step(self) -> int:
        """Half of the steps have no more rows."""
        return int(np.median(np.diff(self.steps)))

    def step(self, number: int) -> list[np.ndarray]:
        """The segments of each row of a step."""
        borders = self.rows[self.steps[number] : self.steps[number + 1] + 1]
        return np.split(self.segments[borders[0] : borders[-1]], borders[1:-1] - borders[0])


@dataclass(frozen=True)
class WindowPlan:
    """As `Plan`, for one segment in each row: the order is computed anew for each step and never stored."""

    n_windows: int
    rows_per_step: int
    key: tuple[int, ...]  # another key, another order

    def __len__(self) -> int:
        """Number of steps."""
        return -(-self.n_windows // self.rows_per_step)

    @property
    def rows_in_step(self) -> int:
        """Of all steps but the last."""
        return min(self.rows_per_step, self.n_windows)

    def step(self, number: int) -> list[np.ndarray]:
        """The window of each row of a step."""
        first = number * self.rows_per_step
        places = np.arange(first, min(first + self.rows_per_step, self.n_windows))
        return list(permuted(places, self.n_windows, self.key)[:, None])


def permuted(places: np.ndarray, n: int, key: Sequence[int]) -> np.ndarray:
    """What a pseudorandom permutation of 0..n-1 has at some places, without computing it anywhere else.

    A Feistel network permutes the numbers of 2h bits, n <= 4^h < 4n; a result that is not below n goes through it
    again until it is, which leaves a permutation of 0..n-1 (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
    CT-RSA 2002, cycle walking). Not for secrets: the rounds use splitmix64 (Steele et al., 2014) instead of a cipher.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    x = places.astype(np.uint64)
    walking = np.arange(len(x))
    while len(walking):
        left, right = x[walking] >> half, x[walking] & mask
        for round_key in round_keys:
            left, right = right, left ^ (splitmix64(right + round_key) & mask)
        x[walking] = left << half | right
        walking = walking[x[walking] >= n]
    return x.astype(np.int64)


def splitmix64(z: np.ndarray) -> np.ndarray:
    """64 bits -> 64 bits that depend on all of them; multiplication is modulo 2^64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def plan_packed(lengths: np.ndarray, context_length: int, rows_per_step: int, rng: np.random.Generator) -> Plan:
    """Rows of context_length tokens, filled with several whole segments each."""
    segments, rows = pack(lengths, context_length, rng)
    n_rows = len(rows) - 1
    segments, rows = reordered(segments, rows, rng.permutation(n_rows))
    return Plan(segments, rows, np.append(np.arange(0, n_rows, rows_per_step), n_rows))


def pack(lengths: np.ndarray, capacity: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing bin packing: each segment, longest first, goes into the fullest row that has room for it.

    Returns the segments row by row, and where each row begins. Segments of equal length come in random order, so rows
    differ from epoch to epoch but their number does not. As segments of one length are placed alike, a row that has
    room for several takes them at once, and so do all rows that have the same room.
    """
    order = rng.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    descending = lengths[order]
    firsts = np.flatnonzero(np.diff(descending, prepend=-1)).tolist()  # of the segments of each length
    row_of = np.empty(len(order), np.int64)
    n_rows = 0
    by_room: dict[int, list[np.ndarray]] = {}  # stacks of rows that are not full, by the room they have left
    rooms: list[int] = []  # the keys of by_room, ascending

    def put(rows: np.ndarray, room: int) -> None:
        if room > 0 and len(rows):
            if room not in by_room:
                bisect.insort(rooms, room)
            by_room.setdefault(room, []).append(rows)

    for first, last in zip(firsts, [*firsts[1:], len(order)], strict=True):
        length = int(descending[first])
        while first < last:
            i = bisect.bisect_left(rooms, length)
            room = rooms[i] if i < len(rooms) else capacity
            fit = room // length
            needed = -(-(last - first) // fit)
            if i == len(rooms):
                taken = np.arange(n_rows, n_rows + needed)
                n_rows += needed
            else:
                taken = by_room[room].pop()
                if not by_room[room]:
                    del by_room[room], rooms[i]
                put(taken[:-needed], room)
                taken = taken[::-1][:needed]  # the one put there last is taken first
            placed = min(len(taken) * fit, last - first)
            row_of[first : first + placed] = np.repeat(taken, fit)[:placed]
            in_last = placed - (len(taken) - 1) * fit  # the last row may get fewer
            put(taken[:-1], room - fit * length)
            put(taken[-1:], room - in_last * length)
            first += placed
    rows = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=n_rows))])
    return order[np.argsort(row_of, kind="stable")], rows


def plan_unpacked(lengths: np.ndarray, by_length: bool, tokens_per_step: int, rng: np.random.Generator) -> Plan:
    """One segment a row: in random order ("padded"), or neighbours in length together ("bucketed").

    The sequence of segments is cut where its running number of tokens passes each multiple of an equal share, so a
    step has about tokens_per_step real tokens and the number of steps does not depend on the order.
    """
    n = len(lengths)
    order = rng.permutation(n)
    if by_length:
        order = order[np.argsort(lengths[order], kind="stable")]
    running = np.cumsum(lengths[order])
    n_steps = int(-(-running[-1] // tokens_per_step))
    k = np.arange(1, n_steps)
    cuts = np.searchsorted(running, k * running[-1] / n_steps)
    cuts = np.maximum.accumulate(np.maximum(cuts, k) - k) + k  # at least one segment for each step ...
    cuts = np.minimum(cuts, n - n_steps + k)  # ... also for the last ones
    steps = np.concatenate([[0], cuts, [n]])
    if by_length:
        order, steps = reordered(order, steps, rng.permutation(n_steps))
    return Plan(order, np.arange(n + 1), steps)


def reordered(items: np.ndarray, starts: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Items in groups that begin at `starts[:-1]`, with the groups in another order: items and starts."""
    counts = np.diff(starts)[order]
    new_starts = np.concatenate([[0], np.cumsum(counts)])
    return items[np.repeat(starts[order] - new_starts[:-1], counts) + np.arange(len(items))], new_starts


def limit_slots(lengths: list[int], slots: int) -> list[list[int]]:
    """Groups of neighbouring rows such that rows times longest row, padding included, stays within `slots`."""
    groups: list[list[int]] = []
    longest = 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if not groups or (len(groups[-1]) + 1) * longest > slots:
            groups.append([])
            longest = length
        groups[-1].append(i)
    return groups
