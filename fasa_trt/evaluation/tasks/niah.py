"""Needles in a haystack: several numbers hidden in prose.

Source: "RULER: What's the Real Context Size of Your Long-Context Language Models?", arXiv 2404.06654, section 3.1:
multi-key, multi-value and multi-query retrieval, with its wording.
"""

from __future__ import annotations

from typing import ClassVar

from fasa_trt.evaluation import wording
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.tasks.base import Document, Question, Task, TaskSettings, random_of
from fasa_trt.evaluation.tasks.haystack import hidden_prompt, words

BEFORE, AFTER = wording.NEEDLES_BEFORE, wording.NEEDLES_AFTER
MAX_ANSWER = 128


class MultiKey(Task):
    """One of several keys is asked for; the others distract."""

    name: ClassVar[str] = "niah_multikey"
    summary: ClassVar[str] = "RULER: one of four needles"
    keys: ClassVar[int] = 4
    values: ClassVar[int] = 1
    asked: ClassVar[int] = 1

    def documents(self, model: EvalModel, context: int, settings: TaskSettings) -> list[Document]:
        found = []
        for number in range(settings.samples):
            rng = random_of(settings, context, number)
            keys = rng.sample(words(), self.keys)
            values = {key: [str(rng.randrange(10**6, 10**7)) for _ in range(self.values)] for key in keys}
            needles = [f"One of the special magic numbers for {k} is: {v}." for k in keys for v in values[k]]
            rng.shuffle(needles)
            asked = keys[: self.asked]
            question = AFTER.format(keys=", ".join(asked))
            tokens, end = hidden_prompt(self.name, model, (BEFORE, question), needles, context, MAX_ANSWER, rng)
            answers = tuple(value for key in asked for value in values[key])
            found.append(Document(str(number), tokens, (Question("", end, answers, MAX_ANSWER),)))
        return found


class MultiValue(MultiKey):
    name: ClassVar[str] = "niah_multivalue"
    summary: ClassVar[str] = "RULER: all four values of one key"
    keys: ClassVar[int] = 1
    values: ClassVar[int] = 4


class MultiQuery(MultiKey):
    name: ClassVar[str] = "niah_multiquery"
    summary: ClassVar[str] = "RULER: the values of four keys"
    asked: ClassVar[int] = 4
