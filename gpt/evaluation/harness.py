"""Lets EleutherAI's lm-evaluation-harness ask a model of this project: the three requests of its interface, with its
rules of encoding, of cutting and of windows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn import functional as F

from gpt import sampling
from gpt.errors import UserError
from gpt.evaluation.task import Task
from gpt.generation.continuation import continue_all

DEFAULT_NEW = 256  # tokens of an answer where a task does not say: the harness's own number


class HarnessModel(TemplateLM):
    """The model of a task. Texts that are too long for the context lose their beginning, as in the harness."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._task, self._model, self._tokens = task, task.model, task.tokens
        self._context = task.model.config.context_length

    @property
    def eot_token_id(self) -> int:
        return self._tokens.eos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._tokens.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows without overlap, the end of a text before the first token."""
        windows, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            own = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self._context, 1)
            for context, continuation in map(make_disjoint_window, own):
                windows.append((("", ""), context, continuation))
                owners.append(number)
        values = [value for value, _ in self._loglikelihood_tokens(windows)]
        return np.bincount(owners, values, minlength=len(requests)).tolist() if owners else [0.0] * len(requests)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """(sum of the log-likelihoods, whether each token is the likeliest) of continuations."""
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self._context:
            what = f"a continuation of {longest} tokens is longer than the context of {self._context}"
            raise UserError(what, "evaluate=tasks", "leave this task out, or take a model with a longer context")
        rows = [(context + continuation)[-self._context - 1 :] for _, context, continuation in requests]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self._task.batch_size):
            group = order[start : start + self._task.batch_size]
            width = len(rows[group[0]]) - 1
            inputs = torch.tensor([rows[i][:-1] + [0] * (width - len(rows[i]) + 1) for i in group])  # padded at the end
            with sampling.eval_mode(self._model), torch.inference_mode():
                inputs = inputs.to(self._task.device)
                hidden = self._model.hidden(inputs)
                copies = self._model.copies(hidden, inputs)
                for row, i in enumerate(group):
                    n, end = len(requests[i][2]), len(rows[i]) - 1
                    here = row, slice(end - n, end)
                    logits = self._model.logits(hidden[here], None if copies is None else copies[here])
                    logs = F.log_softmax(logits.float(), dim=-1).cpu()  # (n, V)
                    targets = torch.tensor(rows[i][len(rows[i]) - n :])
                    if not logs.isfinite().all():
                        raise sampling.not_finite("logits")
                    value = logs.gather(1, targets[:, None]).sum().item()
                    found[i] = value, bool((logs.argmax(-1) == targets).all())
        return [found[i] for i in range(len(rows))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first of the texts that end an answer."""
        asked = [request.args for request in requests]
        prompts = [self.tok_encode(context) or [self.eot_token_id] for context, _ in asked]
        order = sorted(range(len(asked)), key=lambda i: (repr(asked[i][1]), len(prompts[i])))
        texts: dict[int, str] = {}
        while order:
            options = asked[order[0]][1]
            group = [i for i in order if asked[i][1] == options][: self._task.batch_size]
            order = [i for i in order if i not in group]
            n = int(options.get("max_gen_toks", DEFAULT_NEW))
            n = min(n, self._context - 1)
            temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
            draws = sampling.Draws(n, self.eot_token_id, temperature, options.get("top_k"), options.get("top_p"))
            written = continue_all(
                self._model, [prompts[i][-(self._context - n) :] for i in group], draws,
                [sampling.sample_generator(self._task.seed, i) for i in group],
            )  # fmt: skip
            until = options.get("until") or []
            for i, new in zip(group, written, strict=True):
                texts[i] = cut(self._tokens.decode(new.ids), [until] if isinstance(until, str) else until)
        return [texts[i] for i in range(len(asked))]


def cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first of some others."""
    for end in until:
        text = text.split(end)[0] if end else text
    return text
