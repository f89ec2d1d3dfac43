"""Keys and values of rows of different lengths, each in its slot."""

import torch

from gpt.generation.row_cache import COLUMNS, RowCache
from gpt.sampling import KVCache


def prompt_cache(n: int, value: float) -> KVCache:
    """One layer of two heads of width 3 that holds n tokens."""
    cache = KVCache(n)
    cache.extend(0, torch.full((1, 2, n, 3), value), torch.full((1, 2, n, 3), -value))
    cache.length = n
    return cache


def test_a_row_sees_its_own_tokens_and_the_new_one_and_nothing_that_was_in_its_slot_before():
    cache = RowCache(3, 100)
    cache.fill(1, prompt_cache(80, 9.0))  # a row that has ended
    cache.fill(0, prompt_cache(4, 1.0))
    cache.fill(1, prompt_cache(2, 2.0))
    positions = torch.tensor([4, 2, 0])
    mask = cache.move_to(positions)
    assert mask.shape == (3, 1, COLUMNS) and mask.sum(-1).flatten().tolist() == [5, 3, 1]
    new = torch.tensor([5.0, 6.0, 7.0])[:, None, None, None].expand(3, 2, 1, 3)
    keys, values = cache.extend(0, new, -new)
    assert keys.shape == values.shape == (3, 2, COLUMNS, 3)
    seen = [keys[row, 1, mask[row, 0], 2].tolist() for row in range(3)]
    assert seen == [[1, 1, 1, 1, 5], [2, 2, 6], [7]]
    assert torch.equal(values[mask[:, 0, :, None, None].expand(3, COLUMNS, 2, 3).transpose(1, 2)],
                       -keys[mask[:, 0, :, None, None].expand(3, COLUMNS, 2, 3).transpose(1, 2)])  # fmt: skip


def test_what_was_never_written_is_finite():
    cache = RowCache(2, 70)
    cache.fill(0, prompt_cache(3, 1.0))
    cache.move_to(torch.tensor([3, 65]))
    keys, values = cache.extend(0, torch.ones(2, 2, 1, 3), torch.ones(2, 2, 1, 3))
    assert keys.shape[2] == 2 * COLUMNS
    assert keys.isfinite().all() and values.isfinite().all()


def test_keys_and_values_in_bfloat16_are_attended_to_in_float32_as_those_of_a_single_text():
    cache, prompt = RowCache(2, 70), KVCache(8)
    new = torch.ones(2, 2, 1, 3, dtype=torch.bfloat16)
    single = prompt.extend(0, new[:1], new[:1])
    prompt.length = 1
    cache.fill(0, prompt)
    cache.move_to(torch.tensor([1, 0]))
    assert {tensor.dtype for tensor in [*single, *cache.extend(0, new, new)]} == {torch.float32}
    assert {tensor.dtype for pair in (cache.layers[0], prompt.layers[0]) for tensor in pair} == {torch.bfloat16}
