"""Drawing tokens, continuing a prompt, and the cache."""

import itertools
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gpt import tokenizer
from gpt.config.families import GPT2Config
from gpt.config.schema import SampleConfig
from gpt.errors import UserError
from gpt.model import GPT
from gpt.notebook import generate_text_simple
from gpt.prompts import Question
from gpt.sampling import (
    Draws,
    KVCache,
    _warned,
    draw,
    eval_mode,
    fit_prompt,
    generate,
    largest,
    nucleus,
    preview,
    probabilities,
    read,
    sample_generator,
    stream,
)

CONTEXT = 16
CONFIG = GPT2Config(
    family="gpt2", name="test", n_layer=2, n_head=2, n_embd=32, context_length=CONTEXT, dropout=0.1, tie_weights=True,
    gelu="tanh",
)  # fmt: skip
BYTES = tokenizer.load("bytes")
PROMPT = BYTES.encode("Asthma")
LOGITS = torch.tensor([4.51, 0.89, -1.9, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79])

DRAWS = Draws(30, eos=None, temperature=1.0, top_k=None, top_p=None)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIG, BYTES.n_vocab)
    with torch.no_grad():
        model.wpe.weight.mul_(30)  # else an untrained tied model repeats its last token for ever
    return model.eval()


@pytest.fixture(autouse=True)
def visible_warnings(monkeypatch):
    monkeypatch.setattr(logging.getLogger("gpt"), "propagate", True)  # console.setup() of another test turns it off


def texts(
    model: GPT, prompt: list[int] = PROMPT, num_samples=1, seed=0, use_cache=True, stop=lambda: False, **changes
) -> list[list[int]]:
    draws = replace(DRAWS, **changes)
    return generate(model, prompt, draws, num_samples=num_samples, seed=seed, use_cache=use_cache, stop=stop)


class TestProbabilities:
    def test_top_3_of_a_known_vector(self):
        expected = torch.tensor([0.0615, 0, 0, 0.5775, 0, 0, 0, 0.3610, 0], dtype=torch.float64)
        torch.testing.assert_close(probabilities(LOGITS, 1.0, top_k=3), expected, rtol=0, atol=5e-5)

    def test_equals_of_the_kth_largest_stay(self):
        assert largest(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2).tolist() == [1, 2, 3]

    def test_more_than_the_vocabulary_keeps_everything(self):
        assert largest(LOGITS, 100).tolist() == list(range(9))
        assert torch.equal(probabilities(LOGITS, 1.0, top_k=100), probabilities(LOGITS, 1.0))

    def test_top_k_comes_before_temperature_and_top_p_after_it(self):
        hot = probabilities(LOGITS, 100.0, top_k=2, top_p=0.5)
        assert hot.nonzero().flatten().tolist() == [3]  # at this temperature the two are almost equal: .501, .499
        assert probabilities(LOGITS, 100.0, top_k=2, top_p=0.51).nonzero().flatten().tolist() == [3, 7]

    @pytest.mark.parametrize(
        ("p", "kept"), [(0.01, [1]), (0.5, [1]), (0.51, [1, 2]), (0.8, [0, 1, 2]), (1.0, [0, 1, 2, 3])]
    )
    def test_the_nucleus_is_the_smallest_set_that_reaches_p_and_never_empty(self, p, kept):
        chances = torch.tensor([0.125, 0.5, 0.25, 0.125], dtype=torch.float64)
        assert nucleus(chances, p).sort().values.tolist() == kept  # of the equal ones, the lower id is taken first
        assert probabilities(chances.log(), 1.0, top_p=p).nonzero().flatten().tolist() == kept

    def test_rows_of_a_batch_are_independent(self):
        batch = torch.stack([LOGITS, LOGITS.flip(0)])
        both = probabilities(batch, 0.7, top_k=4, top_p=0.9)
        torch.testing.assert_close(both[1], both[0].flip(0))

    @pytest.mark.parametrize("temperature", [0, 1e-3, 1e-30, 1e-310])
    def test_temperature_to_zero_is_argmax(self, temperature):
        cold = probabilities(LOGITS, temperature)
        torch.testing.assert_close(cold, torch.eye(9, dtype=torch.float64)[3], rtol=0, atol=1e-200)

    def test_temperature_zero_takes_the_lowest_of_equal_ids(self):
        assert probabilities(torch.tensor([1.0, 2.0, 2.0]), 0).tolist() == [0, 1, 0]

    @pytest.mark.parametrize("V", [3, 64, 300, 5000])
    @pytest.mark.parametrize("spread", ["wide", "flat", "equal", "rounded"])
    def test_no_bit_differs_from_computing_with_all_of_the_vocabulary(self, V, spread):
        """Against top-k, temperature and top-p as their definitions say, each over all tokens."""
        logits = torch.randn(V, generator=torch.Generator().manual_seed(V)) * (0.01 if spread == "flat" else 4)
        logits = {"equal": torch.zeros(V), "rounded": logits.round()}.get(spread, logits)
        for top_k, top_p, temperature in itertools.product((None, 1, 50, 4000), (None, 0.1, 0.9, 0.9999), (0.8, 1.0)):
            z = logits.double()
            if top_k is not None:
                z = z.masked_fill(z < z.sort(descending=True).values[min(top_k, V) - 1], -torch.inf)
            z = (z - z.max()) / temperature
            if top_p is not None:
                ordered, ids = z.softmax(-1).sort(descending=True, stable=True)
                is_out = ordered.cumsum(-1) - ordered >= top_p
                is_out[0] = False
                z = z.masked_fill(torch.zeros(V, dtype=torch.bool).scatter(0, ids, is_out), -torch.inf)
            assert torch.equal(probabilities(logits, temperature, top_k, top_p), z.softmax(-1))

    def test_tokens_are_drawn_as_often_as_they_are_probable(self):
        wanted = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0], dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        counts = torch.bincount(torch.tensor([draw(wanted, generator) for _ in range(4000)]), minlength=5)
        torch.testing.assert_close(counts / 4000, wanted, rtol=0, atol=0.03, check_dtype=False)
        assert counts[[1, 4]].tolist() == [0, 0]


class TestGenerate:
    @pytest.mark.parametrize("new", [5, CONTEXT - len(PROMPT), 3 * CONTEXT])
    @pytest.mark.parametrize("temperature", [0, 1.0])
    def test_cached_ids_equal_uncached_ids_within_and_past_the_context(self, model, new, temperature):
        cached, uncached = (
            texts(model, max_new_tokens=new, temperature=temperature, num_samples=3, use_cache=use_cache)
            for use_cache in (True, False)
        )
        assert cached == uncached
        assert [len(ids) for ids in cached] == [new] * 3

    def test_greedy_ids_equal_those_of_generate_text_simple(self, model):
        simple = generate_text_simple(model, torch.tensor([PROMPT]), 3 * CONTEXT, CONTEXT)
        assert texts(model, max_new_tokens=3 * CONTEXT, temperature=0) == [simple[0, len(PROMPT) :].tolist()]
        assert len(set(simple[0].tolist())) > 10  # not the same token over and over

    def test_same_seed_same_text_alone_or_with_others(self, model):
        four = texts(model, num_samples=4, seed=5)
        assert texts(model, num_samples=1, seed=5) == four[:1]
        assert texts(model, num_samples=2, seed=5) == four[:2]
        assert texts(model, num_samples=7, seed=5)[:4] == four

    def test_samples_and_seeds_all_differ(self, model):
        drawn = [tuple(ids) for seed in range(3) for ids in texts(model, num_samples=3, seed=seed)]
        assert len(set(drawn)) == 9

    def test_each_sample_stops_at_its_own_end_of_text_and_does_not_contain_it(self, model):
        endless = texts(model, num_samples=6, seed=1)
        eos = endless[0][10]
        ended = texts(model, num_samples=6, seed=1, eos=eos)
        assert ended == [ids[: ids.index(eos)] if eos in ids else ids for ids in endless]
        assert len({len(ids) for ids in ended}) > 1

    def test_a_prompt_longer_than_the_context_keeps_its_end_with_a_warning(self, model, caplog):
        prompt = BYTES.encode("What are the symptoms of Asthma?")
        with caplog.at_level(logging.WARNING, "gpt"):
            long = texts(model, prompt, max_new_tokens=6)
        assert caplog.messages == ["the prompt has 32 tokens, the context 16: only its last 10 are used"]
        assert long == texts(model, prompt[-10:], max_new_tokens=6)

    def test_a_prompt_as_long_as_the_context_is_used_whole(self, model, caplog):
        texts(model, BYTES.encode("What is Asthma ?"))
        assert not caplog.messages

    def test_an_empty_prompt_is_refused(self, model):
        with pytest.raises(UserError, match="the prompt is empty") as error:
            texts(model, [])
        assert error.value.code == 2

    @pytest.mark.parametrize("new", [0, -3])
    def test_fewer_than_one_new_token_is_refused(self, model, new):
        with pytest.raises(UserError, match=f"max_new_tokens={new}: must be at least 1") as error:
            texts(model, max_new_tokens=new)
        assert error.value.code == 2

    def test_it_stops_before_the_next_token_when_asked_to(self, model):
        answers = iter([False] * 7 + [True] * 9)
        stopped = texts(model, num_samples=2, max_new_tokens=5, stop=lambda: next(answers))
        whole = texts(model, num_samples=2, max_new_tokens=5)
        assert stopped == [whole[0], whole[1][:2]]

    def test_logits_that_are_not_finite_are_a_numerical_stop(self):
        broken = GPT(CONFIG, BYTES.n_vocab)
        nn.init.constant_(broken.ln_f.weight, torch.nan)
        with pytest.raises(UserError, match="not finite") as error:
            texts(broken)
        assert error.value.code == 4

    def test_the_global_random_numbers_are_neither_used_nor_moved(self, model):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = texts(model, num_samples=2)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert texts(model, num_samples=2) == first


class TestStream:
    def begun(self, model, stop=lambda: False, **changes):
        cache = KVCache(CONTEXT)
        logits = read(model, PROMPT, cache)
        return stream(model, PROMPT, logits, cache, replace(DRAWS, **changes), sample_generator(0, 0), stop)

    def test_it_yields_each_id_of_generate_before_the_next_is_computed(self, model):
        asked = []
        ids = self.begun(model, stop=lambda: bool(asked.append(None)))
        assert [(next(ids), len(asked)) for _ in range(3)] == [*zip(texts(model)[0][:3], (1, 2, 3), strict=True)]
        assert list(ids) == texts(model)[0][3:]

    def test_what_a_cache_holds_of_the_beginning_is_not_computed_again_and_of_another_text_is_forgotten(self, model):
        whole, cache = read(model, PROMPT, None), KVCache(CONTEXT)
        read(model, [*PROMPT[:3], 5, 6, 7], cache)
        cache.length = 3
        seen = []
        hook = model.h[0].register_forward_hook(lambda block, inputs, output: seen.append(inputs[0].shape[1]))
        logits = read(model, PROMPT, cache)
        hook.remove()
        assert seen == [len(PROMPT) - 3] and cache.length == len(PROMPT)
        torch.testing.assert_close(logits, whole)
        streams = [stream(model, PROMPT, logits, cache, DRAWS, sample_generator(0, number)) for number in range(2)]
        assert [list(ids) for ids in streams] == texts(model, num_samples=2)

    def test_the_caller_computes_as_before_between_two_ids_and_after_it_has_left(self, model):
        model.train()
        ids = self.begun(model)
        next(ids)
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        ids.close()
        assert model.training
        model.eval()

    def test_the_last_token_is_not_read(self, model):
        cache = KVCache(CONTEXT)
        logits = read(model, PROMPT, cache)
        draws = replace(DRAWS, max_new_tokens=4)
        assert len(list(stream(model, PROMPT, logits, cache, draws, sample_generator(0, 0)))) == 4
        assert cache.length == len(PROMPT) + 3


class TestTheModelIsLeftAsItWas:
    @pytest.mark.parametrize("training", [True, False])
    def test_every_submodule_is_back_in_its_mode(self, model, training):
        model.train(training)
        model.h[1].eval()
        modes = [module.training for module in model.modules()]
        texts(model, max_new_tokens=2)
        generate_text_simple(model, torch.tensor([PROMPT]), 2, CONTEXT)
        assert [module.training for module in model.modules()] == modes
        model.eval()

    def test_an_exception_restores_it_too(self, model):
        model.train()
        with pytest.raises(ZeroDivisionError):
            texts(model, stop=lambda: 1 / 0)
        assert model.training
        model.eval()

    def test_dropout_is_off_while_text_is_drawn(self, model):
        model.train()
        in_training = texts(model)
        model.eval()
        assert in_training == texts(model)

    def test_it_can_be_trained_on_afterwards(self, model):
        texts(model, max_new_tokens=3)
        ids = generate_text_simple(model, torch.tensor([PROMPT]), 3, CONTEXT)
        model(ids).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        model.zero_grad()

    def test_blocks_compiled_for_training_are_not_compiled_again(self):
        compiled = GPT(CONFIG, BYTES.n_vocab)
        graphs = []
        for block in compiled.h:
            block.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
        texts(compiled, max_new_tokens=3)
        assert not graphs
        compiled(torch.tensor([PROMPT]))
        assert graphs

    def test_a_module_frozen_in_evaluation_mode_stays_frozen(self):
        modules = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        with eval_mode(modules):
            assert not modules[0].training
        assert [module.training for module in modules] == [True, False]


class TestPreview:
    SAMPLE = SampleConfig(references=0, max_new_tokens=8, temperature=0.8, top_k=50, top_p=None)
    CFG = SimpleNamespace(sample=SAMPLE, seed=3)

    def test_each_prompt_comes_back_with_the_text_that_follows_it(self, model):
        previews = preview(model, BYTES, [Question("Asthma"), Question("Croup")], None, self.CFG)
        assert [p["prompt"] for p in previews] == ["Asthma", "Croup"]
        [ids] = texts(model, max_new_tokens=8, temperature=0.8, top_k=50, eos=BYTES.eos, seed=3)
        assert previews[0]["text"] == BYTES.decode(ids)

    def test_a_template_is_put_around_the_prompt(self, model):
        [templated] = preview(model, BYTES, [Question("Asthma")], "plain", self.CFG)
        [raw] = preview(model, BYTES, [Question("Asthma\n")], None, self.CFG)
        assert templated == {"prompt": "Asthma", "text": raw["text"]}

    def test_a_question_with_an_answer_brings_it_along_for_comparison_and_the_model_does_not_see_it(self, model):
        [alone] = preview(model, BYTES, [Question("Asthma", "now")], "plain", self.CFG)
        [compared] = preview(model, BYTES, [Question("Asthma", "now", "Airways.")], "plain", self.CFG)
        assert compared == alone | {"reference": "Airways."}
        [without_input] = preview(model, BYTES, [Question("Asthma")], "plain", self.CFG)
        assert without_input["text"] != alone["text"]

    def test_a_long_prompt_loses_its_beginning_which_is_said_once(self, model, caplog):
        _warned.discard(model)  # as other tests have the same one
        questions = [Question("What are the symptoms of Asthma")]
        with caplog.at_level("WARNING"):
            [long] = preview(model, BYTES, questions, None, self.CFG)
            assert preview(model, BYTES, questions, None, self.CFG) == [long]
        (line,) = caplog.messages  # once, however often a run samples
        assert line.startswith("1 of 1 prompts of the samples lose their beginning: no room in the context of ")
        [end] = preview(model, BYTES, [Question("f Asthma")], None, self.CFG)
        assert long["text"] == end["text"]
        assert caplog.messages == [line]

    @pytest.mark.parametrize(("new", "kept"), [(1, 15), (4, 12), (8, 8), (100, 8)])
    def test_room_is_left_for_the_new_tokens_but_never_more_than_half_of_the_context(self, new, kept):
        assert fit_prompt(list(range(40)), CONTEXT, new) == list(range(40 - kept, 40))
        assert fit_prompt([1, 2], CONTEXT, new) == [1, 2]


def test_a_cache_keeps_layers_and_rows_apart_and_forgets_what_lies_behind_its_length():
    cache = KVCache(CONTEXT)
    one, two = torch.ones(2, 2, 3, 16), torch.full((2, 2, 1, 16), 2.0)
    cache.extend(0, one, one)
    cache.extend(1, -one, -one)
    cache.length = 3
    keys, values = cache.extend(1, two, two)
    assert keys[0, 0, :, 0].tolist() == values[1, 1, :, 0].tolist() == [-1, -1, -1, 2]
    cache.length = 1
    assert cache.extend(0, two, two)[0][0, 0, :, 0].tolist() == [1, 2]
