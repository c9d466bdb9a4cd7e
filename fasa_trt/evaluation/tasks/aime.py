"""AIME: competition problems whose answers are whole numbers, solved by long reasoning.

Reads aime*.jsonl with `problem` (or `question`) and `answer` a line, as the public copies on the hub have them.
"""

from __future__ import annotations

from typing import ClassVar

from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation.metrics import same_number
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.tasks.base import Document, Question, TaskSettings, too_short
from fasa_trt.evaluation.tasks.files import FileTask, data_folder, field, records

AFTER = "\n\nPlease reason step by step, and put your final answer within \\boxed{}.\n"


class Aime(FileTask):
    name: ClassVar[str] = "aime"
    summary: ClassVar[str] = "aime*.jsonl in --data; answers as long as --contexts allows"

    def documents(self, model: EvalModel, context: int, settings: TaskSettings) -> list[Document]:
        folder = data_folder(self.name, settings)
        files = sorted(file for file in folder.rglob("*.jsonl") if file.stem.lower().startswith("aime"))
        if not files:
            raise FasaError(f"no AIME files in {folder}", hint="such as aime24.jsonl")
        found = []
        for file in files:
            for number, record in enumerate(records(file, settings.samples)):
                answer = str(field(record, file, "answer", "Answer")).strip()
                if not answer.isdigit():
                    raise FasaError(f"{file}, record {number + 1}: the answer {answer!r} is not a whole number")
                tokens, end = model.prompt(str(field(record, file, "problem", "question", "Problem")), AFTER)
                room = context - len(tokens) - len(end)
                if room < 16:
                    raise too_short(self.name, context)
                question = Question("", end, (answer,), min(room, settings.new_tokens or room))
                found.append(Document(f"{file.stem}/{number}", tokens, (question,), group=file.stem))
        return found

    def score(self, question: Question, prediction: str) -> float:
        return same_number(prediction, question.answers[0])
