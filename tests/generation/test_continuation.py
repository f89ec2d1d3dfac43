"""Many prompts at once: each row is what its prompt alone gives, whatever is computed beside it."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import UNPUBLISHED, model_config, modern_config

from gpt import tokenizer
from gpt.config.families import model_class
from gpt.errors import UserError
from gpt.generation.continuation import Row, _Batch, continue_all, continue_each, draw_each
from gpt.model import LanguageModel
from gpt.sampling import Draws, draw, generate, probabilities, sample_generator

CONTEXT = 16
BYTES = tokenizer.load("bytes")
FAMILIES = {
    "gpt2": model_config(n_embd=32, dropout=0.1),
    "qwen3": modern_config(),
    "windows": modern_config(**UNPUBLISHED),
}
DRAWS = Draws(8, eos=None, temperature=1.0, top_k=None, top_p=None)
PROMPTS = [BYTES.encode(text) for text in ("Asthma", "a", "Croup ?", "What is", "x" * 12)]


def made(family: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """In float64, rounding decides about no token."""
    config = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config.family)(config, BYTES.n_vocab)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.4)  # else an untrained tied model repeats its last token for ever
    return model.to(dtype).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request) -> LanguageModel:
    return made(request.param)


@pytest.fixture(scope="module")
def gpt2() -> LanguageModel:
    return made("gpt2")


def alone(model: LanguageModel, prompt: list[int], n: int, sample: int = 0, eos: int | None = None) -> list[int]:
    draws = Draws(n, eos, temperature=1.0, top_k=40, top_p=None)
    return generate(model, prompt, draws, num_samples=sample + 1, seed=3)[sample]


def rows_of(prompts: list[list[int]], n: int) -> list[Row]:
    return [Row(prompt, n, sample_generator(3, 0)) for prompt in prompts]


def continued(model: LanguageModel, rows: list[Row], n_slots: int, **changes) -> list[Row]:
    draws = Draws(CONTEXT, eos=None, temperature=1.0, top_k=40, top_p=None)
    return list(continue_each(model, rows, n_slots, **{"draws": draws, "n_columns": CONTEXT} | changes))


class TestContinueAll:
    def together(self, model, prompts, **changes):
        draws = Draws(8, BYTES.eos, temperature=0.0, top_k=None, top_p=None)
        return continue_all(model, prompts, replace(draws, **changes), [sample_generator(3, 0) for _ in prompts])

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_each_row_is_what_the_prompt_alone_gives_and_ends_where_its_own_context_is_full(self, model, temperature):
        rows = self.together(model, PROMPTS, temperature=temperature, max_new_tokens=30)
        for prompt, row in zip(PROMPTS, rows, strict=True):
            room = CONTEXT - len(prompt)
            draws = Draws(room, BYTES.eos, temperature, top_k=None, top_p=None)
            [ids] = generate(model, prompt, draws, num_samples=1, seed=3)
            assert row.ids == ids and row.stopped == (len(ids) < room)
        assert len({token for row in rows for token in row.ids}) > 10

    def test_the_same_batch_gives_the_same_texts_each_time(self, gpt2):
        single = made("gpt2", torch.float32)
        assert self.together(single, PROMPTS) == self.together(single, PROMPTS)

    def test_rows_that_have_ended_leave_and_the_others_go_on(self, gpt2):
        ends = self.together(gpt2, PROMPTS)[0].ids[1]
        rows = self.together(gpt2, PROMPTS, eos=ends)
        assert rows[0].stopped and len(rows[0].ids) <= 1
        assert all(ends not in row.ids and (row.stopped or len(row.ids) in (4, 8)) for row in rows)
        assert any(not row.stopped for row in rows)

    def test_a_prompt_without_room_or_without_tokens_is_refused(self, gpt2):
        with pytest.raises(ValueError, match="16 tokens fills the context"):
            self.together(gpt2, [[1] * CONTEXT])
        with pytest.raises(UserError, match="the prompt is empty"):
            self.together(gpt2, [[1], []])


class TestContinueEach:
    def test_more_prompts_than_slots_take_the_slots_of_rows_that_are_over(self, model):
        prompts = [PROMPTS[i % 5] + [i] for i in range(23)]
        rows = [Row(prompt, 1 + i % 3, sample_generator(3, 0)) for i, prompt in enumerate(prompts)]
        over = continued(model, rows, n_slots=3)
        assert sorted(map(id, over)) == sorted(map(id, rows))
        assert [row.new for row in rows] == [alone(model, row.prompt, row.max_new_tokens) for row in rows]

    def test_a_row_that_fills_the_context_goes_on_as_it_does_alone_and_disturbs_no_other(self, model):
        rows = rows_of(PROMPTS, 2 * CONTEXT)
        continued(model, rows, n_slots=4)
        assert [row.new for row in rows] == [alone(model, prompt, 2 * CONTEXT) for prompt in PROMPTS]

    def test_samples_of_one_prompt_are_the_numbered_ones_of_generate(self, gpt2):
        rows = [Row(PROMPTS[2], 6, sample_generator(3, sample)) for sample in range(5)]
        continued(gpt2, rows, n_slots=2)
        assert [row.new for row in rows] == [alone(gpt2, PROMPTS[2], 6, sample) for sample in range(5)]

    def test_a_row_ends_with_what_is_given_to_end_it(self, gpt2):
        whole = alone(gpt2, PROMPTS[0], 8)
        rows = rows_of(PROMPTS[:1], 8)
        continued(gpt2, rows, 1, ends=lambda ids: ids[-1] == whole[4])
        assert rows[0].new == whole[: whole.index(whole[4]) + 1]

    def test_no_row_is_computed_after_it_is_told_to_stop(self, gpt2):
        answers = iter([False] * 4 + [True])
        rows = rows_of(PROMPTS, 8)
        assert not continued(gpt2, rows, 5, stop=lambda: next(answers))
        assert [len(row.new) for row in rows] == [1, 1, 1, 1, 0]  # four prompts were read, and no step was made

    def test_the_caller_has_gradients_and_modes_between_rows(self, gpt2):
        gpt2.train()
        for _ in continue_each(gpt2, rows_of(PROMPTS, 2), 2, DRAWS, n_columns=CONTEXT):
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            assert all(module.training for module in gpt2.modules())
        gpt2.eval()

    def test_logits_that_are_not_finite_are_a_numerical_stop(self):
        broken = made("gpt2")
        with torch.no_grad():
            broken.ln_f.weight.fill_(math.nan)
        with pytest.raises(UserError, match="not finite") as error:
            continued(broken, rows_of(PROMPTS, 2), 2)
        assert error.value.code == 4


def with_room_for_long_rows(family: str, dtype: torch.dtype) -> LanguageModel:
    config = replace(FAMILIES[family], context_length=200, n_embd=64)
    torch.manual_seed(0)
    return model_class(config.family)(config, BYTES.n_vocab).to(dtype).eval()


@pytest.fixture
def two_threads():
    """A kernel that rounds by the thread is not found out by one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_slots", [5, 8])
def test_a_row_gets_the_same_bits_in_every_slot_beside_any_others(family, dtype, n_slots, two_threads):
    model = with_room_for_long_rows(family, dtype)
    prompts = [torch.randint(0, 256, (n,)).tolist() for n in (5, 17, 64, 3, 90, 33, 8, 150, 11, 1)]
    found: dict[int, list[torch.Tensor]] = {}
    for arrangement in ([0, 1, 2, 3, 4], [3, 9, 1, 0, 2], [8, 8, 7, 0, 1], [9, 2, 6, 3], [4]):
        rows = rows_of([prompts[number] for number in arrangement], 9)
        batch = _Batch(model, iter(rows), n_slots, replace(DRAWS, temperature=0), 200, lambda ids: False)
        with torch.inference_mode():
            for _ in rows:
                batch.step()  # reads a prompt
            logits = batch.logits()
        for slot, number in enumerate(arrangement):
            found.setdefault(number, []).append(logits[slot])
    for outputs in found.values():
        assert all(torch.equal(outputs[0], other) for other in outputs)
    assert sum(len(outputs) > 1 for outputs in found.values()) >= 7


class TestDrawing:
    @pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
    @pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (7, None), (None, 0.8), (50, 0.9), (500, None)])
    def test_each_row_gets_the_token_that_it_is_given_alone(self, temperature, top_k, top_p):
        logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(1)) * 4
        for turn in range(5):
            together = [sample_generator(turn, row) for row in range(40)]
            each = [sample_generator(turn, row) for row in range(40)]
            drawn = draw_each(logits, Draws(1, None, temperature, top_k, top_p), together)
            chances = probabilities(logits, temperature, top_k, top_p)
            assert drawn == [draw(p, g) for p, g in zip(chances, each, strict=True)]
            assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(together, each, strict=True))

    def test_equals_of_the_kth_largest_may_be_drawn_in_every_row(self):
        logits = torch.zeros(2, 9).index_fill_(1, torch.tensor([4]), 1.0)
        logits[1, 7] = 0.5
        draws = replace(DRAWS, top_k=2)
        seen = [draw_each(logits, draws, [sample_generator(n, 0), sample_generator(n, 1)]) for n in range(200)]
        assert {first for first, _ in seen} == set(range(9)) and {second for _, second in seen} == {4, 7}

    def test_at_temperature_0_it_is_the_first_of_the_largest(self):
        draws = replace(DRAWS, temperature=0, top_k=5, top_p=0.5)
        assert draw_each(torch.tensor([[1.0, 2, 2], [3, 0, 1]]), draws, []) == [1, 0]
