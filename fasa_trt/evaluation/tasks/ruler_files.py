"""RULER's own files: `input`, `outputs` and perhaps `answer_prefix` a line, as its prepare.py writes them.

Source: NVIDIA/RULER, scripts/data and scripts/eval/synthetic/constants.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation.model import EvalModel
from fasa_trt.evaluation.tasks.base import Document, Question, TaskSettings
from fasa_trt.evaluation.tasks.files import FileTask, data_folder, field, records

NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}  # by the first part of a task's name


class RulerFiles(FileTask):
    name: ClassVar[str] = "ruler"
    summary: ClassVar[str] = "TASK/validation.jsonl or TASK.jsonl in --data"

    def documents(self, model: EvalModel, context: int, settings: TaskSettings) -> list[Document]:
        folder = data_folder(self.name, settings)
        named = {f: f.parent.name if f.stem in ("validation", "test") else f.stem for f in folder.rglob("*.jsonl")}
        files = sorted((name, f) for f, name in named.items() if name.split("_")[0] in NEW_TOKENS)
        if not files:
            raise FasaError(f"no RULER files in {folder}", hint="such as niah_single_1/validation.jsonl")
        return [
            self._document(model, context, name, file, number, record)
            for name, file in files
            for number, record in enumerate(records(file, settings.samples))
        ]

    def _document(
        self, model: EvalModel, context: int, name: str, file: Path, number: int, record: dict[str, Any]
    ) -> Document:
        text = str(field(record, file, "input")) + str(record.get("answer_prefix") or "")
        before, _, after = text.rstrip().rpartition("\n")  # the question is the last line
        tokens, end = model.prompt(f"{before}\n" if before else "", after)
        new_tokens = NEW_TOKENS[name.split("_")[0]]
        total = len(tokens) + len(end) + new_tokens
        if total > context:
            raise FasaError(f"{file}: record {number} needs {total} tokens, not {context}", hint="raise --contexts")
        answers = tuple(str(answer) for answer in field(record, file, "outputs"))
        question = Question("", end, answers, new_tokens, {"set": name})
        return Document(f"{name}/{number}", tokens, (question,), group=name)

    def score(self, question: Question, prediction: str) -> float:
        """Share of the answers that it contains; for QA whether it contains one."""
        found = [answer.lower() in prediction.lower() for answer in question.answers]
        return float(any(found)) if question.facts["set"].startswith("qa") else sum(found) / len(found)
