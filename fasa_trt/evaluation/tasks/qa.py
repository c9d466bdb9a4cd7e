"""Question answering over documents of which one holds the answer.

In the manner of RULER's QA tasks (arXiv 2404.06654, section 3.4), which hide SQuAD's paragraphs among others. The facts
here are made up, so nothing can be known by heart and nothing needs to be downloaded.
"""

from __future__ import annotations

from typing import ClassVar

from fasa_trt.evaluation import wording
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.tasks.base import Document, Question, Task, TaskSettings, random_of
from fasa_trt.evaluation.tasks.haystack import hidden_prompt

BEFORE, AFTER = wording.QA_BEFORE, wording.QA_AFTER
SYLLABLES = wording.SYLLABLES
PEOPLE = 12
MAX_ANSWER = 32


class QuestionAnswering(Task):
    name: ClassVar[str] = "qa"
    summary: ClassVar[str] = f"where one of {PEOPLE} people works, in two steps: person to company to city"

    def documents(self, model: EvalModel, context: int, settings: TaskSettings) -> list[Document]:
        found = []
        for number in range(settings.samples):
            rng = random_of(settings, context, number)
            names: list[str] = []
            while len(names) < 3 * PEOPLE:
                name = "".join(rng.choices(SYLLABLES, k=3)).capitalize()
                names += [name] * (name not in names)
            people, companies, cities = (names[i::3] for i in range(3))
            facts = [f"{person} is an engineer at {firm}." for person, firm in zip(people, companies, strict=True)]
            facts += [f"The company {firm} has its office in {c}." for firm, c in zip(companies, cities, strict=True)]
            rng.shuffle(facts)
            question = AFTER.format(person=people[0])
            tokens, end = hidden_prompt(self.name, model, (BEFORE, question), facts, context, MAX_ANSWER, rng)
            found.append(Document(str(number), tokens, (Question("", end, (cities[0],), MAX_ANSWER),)))
        return found
