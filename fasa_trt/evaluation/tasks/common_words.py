"""Common words: the ten words of a long list that come more often than the others.

Source: RULER, arXiv 2404.06654, section 3.3.
"""

from __future__ import annotations

from typing import ClassVar

from fasa_trt.evaluation import wording
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.tasks.base import Document, Question, Task, TaskSettings, random_of, too_short
from fasa_trt.evaluation.tasks.haystack import words

BEFORE, AFTER = wording.WORDS_BEFORE, wording.WORDS_AFTER
COMMON, OFTEN, SELDOM = 10, 30, 3  # words to find, how often they come, how often the others do
MAX_ANSWER = 120


class CommonWords(Task):
    name: ClassVar[str] = "common_words"
    summary: ClassVar[str] = f"RULER: the {COMMON} words that come most often"

    def documents(self, model: EvalModel, context: int, settings: TaskSettings) -> list[Document]:
        head, tail = model.prompt(BEFORE, AFTER)
        room = context - len(head) - len(tail) - MAX_ANSWER - 16  # the order of the words may cost a few tokens
        often = min(OFTEN, room // (COMMON * 12))
        if often <= 2:
            raise too_short(self.name, context)
        seldom = min(SELDOM, often - 2)
        found = []
        for number in range(settings.samples):
            rng = random_of(settings, context, number)
            shuffled = rng.sample(words(), len(words()))
            common, others = shuffled[:COMMON], shuffled[COMMON:]
            low, high = 0, len(others)  # as many as fit
            while low < high:
                middle = (low + high + 1) // 2
                fits = len(model.encode(self._text(common * often + others[:middle] * seldom))) <= room
                low, high = (middle, high) if fits else (low, middle - 1)
            items = common * often + others[:low] * seldom
            rng.shuffle(items)
            tokens, end = model.prompt(BEFORE + self._text(items), AFTER)
            found.append(Document(str(number), tokens, (Question("", end, tuple(common), MAX_ANSWER),)))
        return found

    def _text(self, items: list[str]) -> str:
        return " ".join(f"{number}. {word}" for number, word in enumerate(items, start=1))
