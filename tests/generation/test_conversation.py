"""The turns of a conversation: what the model reads of them, what it computes of that, and what leaves."""

import json
import logging

import pytest
import torch
from conftest import model_config, modern_config
from test_generate import settings

from gpt import sampling, tokenizer
from gpt.data import chats
from gpt.errors import UserError
from gpt.generation.conversation import Conversation, gap, n_common
from gpt.model import GPT
from gpt.modern import Modern
from gpt.prompts import ALPACA_HEADER, format_prompt

BYTES = tokenizer.load("bytes")


@pytest.fixture(scope="module", params=["gpt2", "modern"])
def model(request):
    """In float64, where rounding does not decide what is drawn."""
    torch.manual_seed(0)
    kind, config = {"gpt2": (GPT, model_config), "modern": (Modern, modern_config)}[request.param]
    return kind(config(context_length=256, tie_weights=False), BYTES.n_vocab).double().eval()


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return GPT(model_config(context_length=64, tie_weights=False), BYTES.n_vocab).double().eval()


def opened(model, template="plain", **changes) -> Conversation:
    return Conversation(model, BYTES, template, settings("unused", **{"max_new_tokens": 12, **changes}))


def answers(conversation: Conversation, *written: str) -> list[str]:
    texts = []
    for text in written:
        conversation.make_room(text)
        texts.append("".join(conversation.answer(text, lambda: False)))
    return texts


def alone(model, text: str, sample: int = 0, **changes) -> str:
    """What generate.py makes of a text that is a whole prompt already."""
    cfg = settings("unused", **{"max_new_tokens": 12, **changes})
    draws = sampling.Draws.of(cfg, BYTES.eos)
    drawn = sampling.generate(model, BYTES.encode(text), draws, num_samples=sample + 1, seed=cfg.seed)
    return BYTES.decode(drawn[sample])


def writing(text: str, after: int) -> GPT:
    """A model that writes `text` after `after` tokens, whatever these are: it looks at nothing but the position."""
    ids = BYTES.encode(text)
    model = GPT(model_config(n_layer=1, n_embd=256, context_length=256, tie_weights=False), BYTES.n_vocab).eval()
    with torch.no_grad():
        for parameter in (*model.h.parameters(), model.wte.weight, model.lm_head.weight):
            parameter.zero_()
        model.wpe.weight.copy_(torch.eye(256))
        for number, token in enumerate(ids):
            model.lm_head.weight[token, after - 1 + number] = 1.0
    return model


class TestWhatTheModelReads:
    def test_a_first_turn_has_the_answer_that_it_has_as_a_prompt(self, model):
        for template in ("plain", "alpaca", "alpaca_stanford"):
            prompt = format_prompt(template, "Why ?")
            assert answers(opened(model, template), "Why ?") == [alone(model, prompt)]
        given = format_prompt("plain", "Sort.", "b, a")
        assert answers(opened(model, input="b, a"), "Sort.") == [alone(model, given)]
        assert answers(opened(model, None), "Once") == [alone(model, "Once")]

    def test_later_turns_follow_as_blocks_without_a_header(self, model):
        conversation = opened(model, "alpaca")
        [answer] = answers(conversation, "One ?")
        ids = conversation.turns[0].ids
        block = "\n\n### Instruction:\n{}\n\n### Response:\n".format
        expected = BYTES.encode(ALPACA_HEADER + block("One ?")) + ids + BYTES.encode(block("Two ?"))
        assert conversation.n_left == 0 and conversation.ids("Two ?") == expected
        assert BYTES.decode(ids) == answer

    def test_without_blocks_an_empty_line_stands_between_turns(self, small):
        conversation = opened(small)
        answers(conversation, "a")
        assert conversation.ids("b") == BYTES.encode("a\n") + conversation.turns[0].ids + BYTES.encode("\n\nb\n")

    def test_a_system_text_takes_the_place_of_the_header(self, small):
        block = "\n\n### Instruction:\na\n\n### Response:\n"
        for template, expected in (("alpaca", f"Be kind.{block}"), ("plain", "Be kind.\n\na\n")):
            conversation = opened(small, template)
            conversation.system = "Be kind."
            assert conversation.ids("a") == BYTES.encode(expected)

    def test_without_a_template_all_is_one_text_in_which_words_stay_apart(self, small):
        conversation = opened(small, None)
        answers(conversation, "Once")
        ids = conversation.turns[0].ids
        assert conversation.ids("") == BYTES.encode("Once") + ids
        assert [gap("a", "b"), gap("a", " b"), gap("a ", "b"), gap("a", ", b"), gap("", "b")] == [" ", "", "", "", ""]
        answers(conversation, "")
        assert conversation.record() == {"text": "Once" + BYTES.decode(ids) + conversation.turns[1].text}


class TestTheCache:
    def test_of_a_later_turn_only_what_is_new_is_computed_and_the_answer_is_that_of_the_whole_prompt(self, model):
        conversation = opened(model)
        answers(conversation, "What is Croup ?", "And Asthma ?")
        seen = []
        hook = model.blocks[0].register_forward_hook(lambda block, inputs, output: seen.append(inputs[0].shape[1]))
        prompt = conversation.ids("Why ?")
        [answer] = answers(conversation, "Why ?")
        hook.remove()
        last_answer_ends_with = 1  # the token that was drawn last, and not read
        assert seen == [last_answer_ends_with + len(BYTES.encode("\n\nWhy ?\n"))] + [1] * 11
        assert answer == alone_of(model, prompt, sample=2)

    @pytest.mark.parametrize("change", ["reset", "system"])
    def test_another_beginning_is_computed_anew(self, small, change):
        conversation = opened(small)
        answers(conversation, "Croup ?")
        if change == "reset":
            conversation.reset()
            assert answers(conversation, "Why ?") == [alone(small, "Why ?\n")]
        else:
            conversation.system = "S"
            prompt = conversation.ids("Why ?")
            assert answers(conversation, "Why ?") == [alone_of(small, prompt, sample=1)]

    def test_the_same_conversation_has_the_same_answers_and_another_seed_others(self, small):
        texts = [answers(opened(small, seed=seed), "a", "b", "a") for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]
        assert texts[0][0] != texts[0][2]

    def test_how_many_ids_begin_two_lists(self):
        assert [n_common(a, b) for a, b in (([], [1]), ([1, 2], [1, 2]), ([1, 2, 3], [1, 5]), ([2], [1]))] == [
            0,
            2,
            1,
            0,
        ]


def alone_of(model, prompt: list[int], sample: int) -> str:
    """The answer to these ids, all of which are read for it."""
    cfg = settings("unused", max_new_tokens=12)
    draws = sampling.Draws.of(cfg, BYTES.eos)
    drawn = sampling.generate(model, prompt, draws, num_samples=sample + 1, seed=cfg.seed, use_cache=False)
    return BYTES.decode(drawn[sample])


class TestAFullContext:
    def test_the_oldest_turns_leave_until_the_rest_and_an_answer_fit(self, small):
        conversation = opened(small)
        n_left = []
        for number in range(8):
            n_left.append(conversation.make_room(f"turn {number}"))
            assert len(conversation.ids(f"turn {number}")) <= 64 - 12
            list(conversation.answer(f"turn {number}", lambda: False))
            assert not conversation.is_full()
        assert n_left[:2] == [0, 0] and sum(n_left) > 3
        oldest = conversation.turns[conversation.n_left]
        begins = BYTES.encode(f"turn {conversation.n_left}\n") + oldest.ids
        assert conversation.ids("x")[: len(begins)] == begins
        assert len(conversation.record()["messages"]) == 16

    def test_a_header_stays_when_the_turn_that_had_it_leaves(self, small):
        conversation = opened(small)
        conversation.system = "S"
        answers(conversation, "a" * 30, "b" * 30)
        assert conversation.n_left == 1 and conversation.ids("c")[:4] == BYTES.encode("S\n\nb")

    def test_half_of_the_context_is_for_turns_however_long_an_answer_may_be(self, small):
        conversation = opened(small, max_new_tokens=1000)
        conversation.make_room("a" * 20)
        ids = conversation.ids("a" * 20)
        assert conversation.n_left == 0 and len(ids) < 32
        list(conversation.answer("a" * 20, conversation.is_full))
        assert len(ids) + len(conversation.turns[0].ids) == 64 + 2 and conversation.is_full()
        assert conversation.make_room("b") == 1

    def test_a_turn_longer_than_the_context_keeps_its_end_and_is_answered(self, small, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("gpt"), "propagate", True)
        conversation = opened(small)
        [answer] = answers(conversation, "x" * 100)
        assert caplog.messages == ["the prompt has 101 tokens, the context 64: only its last 52 are used"]
        assert answer == alone(small, "x" * 51 + "\n")
        assert conversation.make_room("y") == 1

    def test_of_one_text_the_beginning_leaves(self, small):
        conversation = opened(small, None)
        answers(conversation, "a" * 30, "")
        assert conversation.make_room("b" * 20) == 30 + 12 + 12 + len(gap(conversation.turns[1].text, "b")) + 20 - 52
        kept = conversation.ids("b" * 20)[-52:]
        assert answers(conversation, "b" * 20) == [alone_of(small, kept, sample=2)]


class TestTheEndOfAnAnswer:
    def test_a_stop_string_is_neither_shown_nor_read_again(self, small):
        whole = alone(small, "a\n", max_new_tokens=30)
        stop = whole[6:8]
        conversation = opened(small, max_new_tokens=30, stop=[stop])
        text = whole[: whole.index(stop)]
        assert answers(conversation, "a") == [text]
        assert conversation.ids("b") == BYTES.encode(f"a\n{text}\n\nb\n")

    def test_a_model_that_goes_on_with_the_next_instruction_by_itself_is_stopped(self):
        model = writing("A.\n\n### Instruction:\nB", after=len(BYTES.encode(format_prompt("alpaca", "Q"))))
        conversation = opened(model, "alpaca", max_new_tokens=22, temperature=0.0)
        assert answers(conversation, "Q") == ["A.\n\n"]

    def test_an_answer_that_is_ended_stays_as_far_as_it_came(self, small):
        asked = []
        conversation = opened(small)
        text = "".join(conversation.answer("a", lambda: len(asked) == 3 or bool(asked.append(1))))
        assert len(conversation.turns[0].ids) == 3 and conversation.turns[0].text == text

    def test_nan_is_a_numerical_stop_and_no_turn(self, small):
        broken = GPT(small.config, BYTES.n_vocab).eval()
        torch.nn.init.constant_(broken.ln_f.weight, torch.nan)
        conversation = opened(broken)
        with pytest.raises(UserError, match="not finite") as error:
            answers(conversation, "a")
        assert error.value.code == 4 and not conversation.turns

    def test_an_empty_text_is_refused(self, small):
        with pytest.raises(UserError, match="the prompt is empty"):
            answers(opened(small, None), "")

    def test_the_temperature_can_change(self, small):
        conversation = opened(small)
        conversation.temperature = 0.0
        assert answers(conversation, "a") == [alone(small, "a\n", temperature=0.0)]


def test_a_conversation_of_one_turn_is_a_row_that_data_is_read_from(small):
    conversation = opened(small)
    conversation.system = "S"
    [answer] = answers(conversation, "Why ?")
    read = chats.read(json.loads(json.dumps(conversation.record()))["messages"])
    assert (read.instruction, read.output, read.others) == ("Why ?", answer, ["system"])
