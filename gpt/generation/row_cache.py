"""Holds the keys and values of rows of a batch that are at different lengths, each in a slot of its own.

Letters in shape comments are those of gpt/model.py: R slots, S columns attended to, H heads, D width of one.
"""

import torch
from torch import Tensor

from gpt.sampling import KVCache, for_attention

COLUMNS = 64  # attended to in whole multiples of so many: what a sum is divided into does not depend on other rows


class RowCache:
    """gpt.model.Cache for one new token a row. The column of a token is its position, so no row is padded, and a row
    that ends leaves its slot to another one, without a copy of the rest.

    What a row gets out of it does not depend on its slot, nor on what other slots hold, nor on how long they are.
    """

    def __init__(self, n_slots: int, n_columns: int) -> None:
        """n_columns: the most tokens that a row will have."""
        self.n_slots, self.n_columns = n_slots, whole(n_columns)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, each (R, H, n_columns, D)
        self.slots = torch.arange(n_slots)
        self.positions = torch.zeros(n_slots, dtype=torch.long)  # of the tokens that are written next
        self.length = 0  # columns that are attended to, the new ones among them

    def fill(self, slot: int, prompt: KVCache) -> None:
        """Copies the one row of another cache into a slot."""
        n = prompt.length
        for layer, pair in prompt.layers.items():
            if layer not in self.layers:
                # Zeros: a column that is not attended to counts 0 times its value, and 0 times NaN is NaN.
                self.layers[layer] = tuple(
                    t.new_zeros(self.n_slots, t.shape[1], self.n_columns, t.shape[3]) for t in pair
                )
            for target, source in zip(self.layers[layer], pair, strict=True):
                target[slot, :, :n] = source[0, :, :n]

    def move_to(self, positions: Tensor) -> Tensor:
        """Says where the next token of each row goes: (R,) positions -> (R, 1, S), true where it may look."""
        self.length = whole(int(positions.max()) + 1)
        self.slots, self.positions = self.slots.to(positions.device), positions
        return (torch.arange(self.length, device=positions.device) <= positions[:, None])[:, None]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(R, H, 1, D) keys and values of one layer -> all of its, each (R, H, S, D)."""
        all_keys, all_values = self.layers[layer]
        all_keys[self.slots, :, self.positions] = keys[:, :, 0]
        all_values[self.slots, :, self.positions] = values[:, :, 0]
        return for_attention(all_keys[:, :, : self.length], all_values[:, :, : self.length], n_queries=1)


def whole(columns: int) -> int:
    """The next multiple of COLUMNS."""
    return -(-columns // COLUMNS) * COLUMNS
