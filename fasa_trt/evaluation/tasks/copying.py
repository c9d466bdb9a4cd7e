"""Copying a line of random tokens that stood somewhere in the document: exact, token by token, long-range."""

from __future__ import annotations

from typing import Any, ClassVar

from fasa_trt.evaluation.methods.base import Method
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.tasks.base import Batch, Document, Question, Task, TaskSettings, random_of, too_short
from fasa_trt.evaluation.tasks.haystack import filler

GIVEN, ASKED = 8, 16  # tokens of the line that start the copy, and that are to be copied
LINES = 4  # in a document


class Copying(Task):
    name: ClassVar[str] = "copy"
    summary: ClassVar[str] = f"the next {ASKED} tokens of a random line in source code, after its first {GIVEN}"
    late: ClassVar[bool] = True

    def documents(self, model: EvalModel, context: int, settings: TaskSettings) -> list[Document]:
        hashes, newline = model.encode("#"), model.encode("\n")
        line_length = len(hashes) + GIVEN + ASKED + len(newline)
        room = context - len(model.prefix) - (LINES + 1) * line_length
        if room < 64:
            raise too_short(self.name, context)
        plain = self._plain_tokens(model)
        source = filler("source")
        found = []
        for number in range(settings.samples):
            rng = random_of(settings, context, number)
            code: list[list[int]] = []
            start, size = rng.randrange(len(source)), 0
            while size < room:
                code.append(model.encode(source[(start + len(code)) % len(source)]))
                size += len(code[-1])
            code.pop()
            lines = [rng.choices(plain, k=GIVEN + ASKED) for _ in range(LINES)]
            places = sorted(rng.randrange(len(code) + 1) for _ in lines)
            for place, line in reversed(list(zip(places, lines, strict=True))):
                code.insert(place, [*hashes, *line, *newline])
            questions = tuple(
                Question(
                    str(i), [*hashes, *line[:GIVEN]], (), ASKED,
                    {"depth": round(places[i] / len(code), 4), "expected": line[GIVEN:]},
                )
                for i, line in enumerate(lines)
            )  # fmt: skip
            tokens = [*model.prefix, *(token for line in code for token in line)]
            found.append(Document(str(number), tokens, questions))
        return found

    def measure(self, batch: Batch, method: Method) -> list[dict[str, Any]]:
        tokens, share = batch.answers(method)
        return [
            {"score": float(row == question.facts["expected"]), "tokens": row, "kv_share": share}
            for question, row in zip(batch.questions, tokens, strict=True)
        ]

    def _plain_tokens(self, model: EvalModel) -> list[int]:
        """Tokens of letters and digits alone: any sequence of them is a line."""
        special = set(model.tokenizer.all_special_ids)
        size = min(len(model.tokenizer), int(model.checkpoint.config.vocab_size))
        texts = ((token, str(model.tokenizer.decode([token]))) for token in range(size) if token not in special)
        return [token for token, text in texts if text.strip().isalnum() and text.isascii()]
