"""Question answering over documents of which one holds the answer.

In the manner of RULER's QA tasks (arXiv 2404.06654, section 3.4), which hide SQuAD's paragraphs among others. The facts
here are made up, so nothing can be known by heart and nothing needs to be downloaded.
"""

from __future__ import annotations

from typing import ClassVar

from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.tasks.base import Document, Question, Task, TaskSettings, random_of, too_short
from fasa_trt.evaluation.tasks.haystack import hide

BEFORE = (
    "Answer the question based on the given text. Only give me the answer and do not output any other words.\n\n"
    "The following is the given text.\n"
)
AFTER = (
    "\nAnswer the question based on the given text. Only give me the answer and do not output any other words.\n\n"
    "Question: In which city does {person} work?\nAnswer:"
)
SYLLABLES = ("bar", "cel", "dor", "fen", "gal", "hol", "kor", "lin", "mar", "nor", "pel", "ros", "sil", "tam", "vel")
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
            head, tail = model.prompt(BEFORE, question)
            room = context - len(head) - len(tail) - MAX_ANSWER
            text = hide(lambda text: len(model.encode(text)), facts, room, rng) if room > 0 else None
            if text is None:
                raise too_short(self.name, context)
            tokens, end = model.prompt(BEFORE + text, question)
            found.append(Document(str(number), tokens, (Question("", end, (cities[0],), MAX_ANSWER),)))
        return found
