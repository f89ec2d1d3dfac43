"""Scores the answers that a model writes to held-out questions, beside those of baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from gpt.config.fields import Count, NonNegative, PositiveFraction, section
from gpt.errors import UserError
from gpt.evaluation import baselines, overlap, similarity, statistics
from gpt.evaluation.registry import Kind

if TYPE_CHECKING:
    from gpt.evaluation.statistics import Figure, Measure
    from gpt.evaluation.task import Task
    from gpt.model import LanguageModel

BASE = "model before fine-tuning"
COMPARED = ("ROUGE-1", "ROUGE-2", "ROUGE-L", "F1", "chrF", "BLEU")  # in which a model should be above baselines
OF_MODELS = ("stopped", "loss of the reference", "copied span", "copied share")
BaselineName = Literal["bm25", "frequent", "another", "base"]


@section
class Evaluation(Kind):
    """evaluate=answers. Units are questions; those that leave no room for an answer in the context are left out."""

    headline: ClassVar[str] = "ROUGE-L"

    max_new_tokens: Count
    temperature: NonNegative
    top_k: Count | None
    top_p: PositiveFraction | None
    baselines: list[BaselineName]

    def batches(self, task: Task) -> list[list[int]]:
        """Questions of like length together."""
        task.part.need_questions("answers")
        lengths = [response - start for start, response, _ in task.part.split.documents.tolist()]
        fitting = [i for i, n in enumerate(lengths) if n < task.model.config.context_length]
        if not fitting:
            shortest, context = min(lengths), task.model.config.context_length
            what = f"no question fits into the context of {context} tokens: the shortest prompt has {shortest}"
            raise UserError(what, task.part.source, "evaluate=loss has no such limit")
        fitting.sort(key=lambda i: (lengths[i], i))
        return [fitting[i : i + task.batch_size] for i in range(0, len(fitting), task.batch_size)]

    def compute(self, task: Task, units: list[int]) -> list[dict[str, Any]]:
        """The answers of the model, and of the one before fine-tuning; the loss of the references."""
        rows = [{"model": answer} for answer in self._answers(task, task.model, units)]
        if "base" in self.baselines and (before := task.before_training()):
            for row, answer in zip(rows, self._answers(task, before, units), strict=True):
                row[BASE] = answer
        return rows

    def recorded(self) -> dict[str, Any]:
        return {"signatures": similarity.signatures()}

    def finish(self, task: Task, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        part = task.part
        answered = sorted(i for batch in self.batches(task) for i in batch)
        asked = [part.questions[i] for i in answered]
        own = {"bm25": baselines.NEAREST, "frequent": baselines.FREQUENT, "another": baselines.ANOTHER}
        wanted = {own[name] for name in self.baselines if name in own}
        for name, texts in baselines.answers(asked, part.retrieved).items():
            for row, text in zip(rows, texts if name in wanted else [], strict=name in wanted):
                row[name] = {"answer": text}
        corpus = part.training.texts if part.training else []
        for name in list(rows[0]):
            for row, question in zip(rows, asked, strict=True):
                row[name] |= similarity.scores(row[name]["answer"], question.reference or "")
            if corpus and name in ("model", BASE):
                spans = overlap.longest_spans([row[name]["answer"] for row in rows], corpus)
                for row, span in zip(rows, spans, strict=True):
                    row[name] |= {"copied span": span, "copied share": span / max(1, row[name]["words"])}
        return [
            {"id": part.ids[i], "instruction": q.instruction, "input": q.input, "reference": q.reference,
             "systems": row}
            for i, q, row in zip(answered, asked, rows, strict=True)
        ]  # fmt: skip

    def measures(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, Measure]]:
        found = {}
        for name in rows[0]["systems"]:
            own = [row["systems"][name] for row in rows]
            found[name] = similarity.measures(own)
            for key in OF_MODELS:
                if key == "loss of the reference" and "nats" in own[0]:
                    found[name][key] = statistics.ratio([r["nats"] for r in own], [r["tokens"] for r in own])
                elif key in own[0]:
                    found[name][key] = statistics.mean([float(r[key]) for r in own], key == "stopped")
        return found

    def remarks(self, task: Task, rows: list[dict[str, Any]], figures: dict[str, dict[str, Figure]]) -> list[str]:
        said = []
        left_out = len(task.part.questions) - len(rows)
        if left_out:
            context = task.model.config.context_length
            said.append(f"{left_out} of {len(task.part.questions)} questions are left out: their prompts fill the "
                        f"context of {context} tokens")  # fmt: skip
        ended = sum(row["systems"]["model"]["ended by the context"] for row in rows)
        if ended:
            said.append(f"{ended} of {len(rows)} answers were ended by the context, not by the model or max_new_tokens")
        for name, own in figures.items():
            below = [key for key in COMPARED if name != "model" and figures["model"][key].value < own[key].value]
            if below:
                said.append(f"below a baseline ({name}): {', '.join(below)}")
        return said

    def _answers(self, task: Task, model: LanguageModel, units: list[int]) -> list[dict[str, Any]]:
        from gpt import sampling
        from gpt.evaluation import scoring
        from gpt.generation import continuation

        context = min(model.config.context_length, task.model.config.context_length)
        prompts = [task.part.prompt(i) for i in units]
        generators = [sampling.sample_generator(task.seed, i) for i in units]
        draws = sampling.Draws(self.max_new_tokens, task.tokens.eos, self.temperature, self.top_k, self.top_p)
        written = continuation.continue_all(model, prompts, draws, generators)
        references = scoring.of_documents(
            model, task.part.split, units, context, task.tokens.bytes_per_token(), task.batch_size * context
        )
        return [
            {
                "answer": task.tokens.decode(new.ids),
                "stopped": new.stopped,
                "ended by the context": not new.stopped and len(new.ids) < self.max_new_tokens,
                "nats": row["nats"],
                "tokens": row["tokens"],
            }
            for new, row in zip(written, references, strict=True)
        ]
