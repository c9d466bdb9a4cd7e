"""What a task is: documents with questions, and how an answer is measured."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fasa_trt.core.errors import FasaError
from fasa_trt.evaluation.cache import EvalCache
from fasa_trt.evaluation.decoder import Decoder, answer
from fasa_trt.evaluation.methods.base import Method
from fasa_trt.evaluation.model import EvalModel

FIRST_SEED = 1_000_000  # calibration makes its documents from small seeds


@dataclass(frozen=True)
class Question:
    """tokens: decoded after the document, or read as its end. answers: right ones. facts: kept in the record."""

    id: str
    tokens: Sequence[int]
    answers: tuple[str, ...] = ()
    max_new_tokens: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def room(self) -> int:
        return len(self.tokens) + self.max_new_tokens


@dataclass(frozen=True)
class Document:
    """tokens: read once, densely. group: part of the task that it is counted in, such as a data set's name."""

    id: str
    tokens: Sequence[int]
    questions: tuple[Question, ...]
    group: str = ""


@dataclass(frozen=True)
class TaskSettings:
    """samples: documents of each context length (of each data set). data: folder of public data sets. text: to measure
    perplexity on. new_tokens: length of long answers; None for a task's own."""

    samples: int = 2
    seed: int = FIRST_SEED
    data: Path | None = None
    text: Path | None = None
    new_tokens: int | None = None


@dataclass(frozen=True)
class Batch:
    """Documents that have been read, a row of the cache for each question. first: logits [B, V] after questions that
    belong to the prompt and have been read, too; None where they are still to be decoded. reference: what the task's
    `prepare` returned."""

    decoder: Decoder
    cache: EvalCache
    questions: Sequence[Question]
    first: Tensor | None = None
    reference: Any = None

    @property
    def model(self) -> EvalModel:
        return self.decoder.model

    @property
    def rows(self) -> list[list[int]]:
        """The questions' tokens."""
        return [list(question.tokens) for question in self.questions]

    def answers(self, method: Method, *, stop: str | None = None) -> tuple[list[list[int]], float]:
        """Greedy answers' tokens, and the share of the KV cache's bytes that they took."""
        limits = [question.max_new_tokens for question in self.questions]
        tokens, traffic = answer(self.decoder, self.cache, method, self.rows, limits, first=self.first, stop=stop)
        return tokens, round(traffic.share, 5)


class Task(ABC):
    """name, summary: for people. metric: what `score` is. late: questions come as decode steps, as in a conversation
    about a document; else they are the end of the prompt, as in most papers. asks: False where a question's tokens are
    themselves what is measured, and so always decoded. solved: the least dense score at which
    the task tells anything about a method, None where any does. grid: has documents of every context length."""

    name: ClassVar[str]
    summary: ClassVar[str]
    metric: ClassVar[str] = "accuracy"
    late: ClassVar[bool] = False
    asks: ClassVar[bool] = True
    solved: ClassVar[float | None] = 0.5
    grid: ClassVar[bool] = True
    stop: ClassVar[str | None] = None

    def check(self, settings: TaskSettings) -> None:
        """Raises FasaError where the settings lack what the task needs. Called before anything slow."""
        return None

    @abstractmethod
    def documents(self, model: EvalModel, context: int, settings: TaskSettings) -> list[Document]:
        """Documents whose tokens and longest question and answer fill `context` tokens, or at most as many where
        there is no `grid`. The same arguments give the same documents. Raises FasaError where there are none."""

    def prepare(self, batch: Batch) -> Any:
        """Called once for a batch, before all methods."""
        return None

    def measure(self, batch: Batch, method: Method) -> list[dict[str, Any]]:
        """A record for each question: at least `score` and `kv_share`. By default greedy answers, scored."""
        tokens, share = batch.answers(method, stop=self.stop)
        texts = [batch.model.decode(row) for row in tokens]
        return [
            {"score": self.score(question, text), "prediction": text, "kv_share": share}
            for question, text in zip(batch.questions, texts, strict=True)
        ]

    def score(self, question: Question, prediction: str) -> float:
        """0 (wrong) to 1 (right). By default the share of the answers that the prediction contains."""
        return sum(wanted.lower() in prediction.lower() for wanted in question.answers) / len(question.answers)

    def aggregate(self, records: Sequence[dict[str, Any]]) -> float:
        return sum(float(record["score"]) for record in records) / len(records)


def random_of(settings: TaskSettings, context: int, number: int) -> random.Random:
    """The source of a document's choices."""
    return random.Random(f"{settings.seed} {context} {number}")


def too_short(task: str, context: int) -> FasaError:
    return FasaError(f"{task} does not fit into {context} tokens", hint="raise --contexts")
