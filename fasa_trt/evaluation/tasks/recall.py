"""Recall of notes all over a document, at every depth: what `calibrate/recall.py` describes."""

from __future__ import annotations

from typing import ClassVar

from fasa_trt.calibrate.recall import VALUE_DIGITS, answer_of, note_line, recall_document, recall_prompt
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.tasks.base import Document, Question, Task, TaskSettings, too_short

MAX_ANSWER = VALUE_DIGITS + 3  # tokens: the digits, a space before them, a newline after them, one to spare
QUESTIONS = 11  # a document, from all depths


class Recall(Task):
    """One note of many, asked for at the end. Its needles and questions differ in nothing but their key."""

    name: ClassVar[str] = "recall"
    summary: ClassVar[str] = "one of up to 33 notes in source code, at every depth"
    late: ClassVar[bool] = True
    stop: ClassVar[str | None] = "\n"

    def documents(self, model: EvalModel, context: int, settings: TaskSettings) -> list[Document]:
        notes = min(33, context // 64)
        longest = len(model.encode(recall_prompt("x" * 6))) + 6  # random letters make more tokens than equal ones
        length = context - len(model.prefix) - longest - MAX_ANSWER
        if notes < 1 or length < 64:
            raise too_short(self.name, context)
        found = []
        for number in range(settings.samples):
            made = recall_document(model.encode, length=length, notes=notes, seed=settings.seed + number)
            depth = {q.key: made.text.index(note_line(q.key, q.answer)) / len(made.text) for q in made.questions}
            ordered = sorted(made.questions, key=lambda question: depth[question.key])
            questions = []
            asked = min(QUESTIONS, notes)
            for question in (ordered[i * notes // asked] for i in range(asked)):
                tokens, facts = model.encode(question.prompt), {"depth": round(depth[question.key], 4)}
                questions.append(Question(question.key, tokens, (question.answer,), MAX_ANSWER, facts))
            found.append(Document(str(number), [*model.prefix, *model.encode(made.text)], tuple(questions)))
        return found

    def score(self, question: Question, prediction: str) -> float:
        return float(answer_of(prediction) == question.answers[0])
