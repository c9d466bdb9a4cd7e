"""Variable tracking: a chain of assignments hidden in prose.

Source: RULER, arXiv 2404.06654, section 3.2.
"""

from __future__ import annotations

import string
from typing import ClassVar

from fasa_trt.evaluation import wording
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.tasks.base import Document, Question, Task, TaskSettings, random_of
from fasa_trt.evaluation.tasks.haystack import hidden_prompt

BEFORE, AFTER = wording.VARIABLES_BEFORE, wording.VARIABLES_AFTER
VARIABLES = 5  # of the chain
MAX_ANSWER = 30


class VariableTracking(Task):
    name: ClassVar[str] = "variable_tracking"
    summary: ClassVar[str] = f"RULER: a chain of {VARIABLES} variables"

    def documents(self, model: EvalModel, context: int, settings: TaskSettings) -> list[Document]:
        found = []
        for number in range(settings.samples):
            rng = random_of(settings, context, number)
            names = ["".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(VARIABLES)]
            value = str(rng.randrange(10_000, 100_000))
            pairs = zip(names[1:], names, strict=False)
            chain = [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old}" for new, old in pairs)]
            question = AFTER.format(value=value, hops=VARIABLES)
            tokens, end = hidden_prompt(self.name, model, (BEFORE, question), chain, context, MAX_ANSWER, rng)
            found.append(Document(str(number), tokens, (Question("", end, tuple(names), MAX_ANSWER),)))
        return found
