"""Asking an engine many questions about one document that it has read once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fasa_trt.calibrate.recall import VALUE_DIGITS, RecallDocument, answer_of, note_line
from fasa_trt.runtime.backend import RowBackend
from fasa_trt.runtime.generate import Engine
from fasa_trt.runtime.onnxruntime import OnnxRuntimeBackend
from fasa_trt.runtime.rows import PREFILL_CHUNK

MAX_ANSWER = VALUE_DIGITS + 3  # tokens: the digits, a space before them, a newline after them, one to spare
ZERO = np.zeros(1, np.int64)


@dataclass(frozen=True)
class Answer:
    """What both modes said to one question. depth: place of the note, 0 the document's start, 1 its end."""

    document: int
    key: str
    depth: float
    expected: str
    dense: str
    fasa: str


class Reader:
    """One row of an engine's cache that holds a document, and answers after it again and again.

    Slots from the document's end on are overwritten by the next question, so every question starts from the same
    cache, and so do both modes: prefill is dense, as it always is.
    """

    def __init__(self, engine: Engine) -> None:
        assert isinstance(engine.backend, OnnxRuntimeBackend)
        self.engine, self.backend = engine, engine.backend
        self.length = 0
        self.seconds = {"prefill": 0.0, "dense": 0.0, "fasa": 0.0}
        self.steps = {"prefill": 0, "dense": 0, "fasa": 0}

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return list(self.engine.tokenizer(text, add_special_tokens=False).input_ids)

    def read(self, text: str) -> None:
        """Starts over with `text`."""
        tokens = self.engine.encode(text)
        started = time.perf_counter()
        self.backend.allocate(1)
        for start in range(0, len(tokens), PREFILL_CHUNK):
            _step(self.backend, tokens[start : start + PREFILL_CHUNK], start, sparse=False)
        self._count("prefill", started, len(tokens))
        self.length = len(tokens)

    def ask(self, prompt: str, *, sparse: bool) -> str:
        """The greedy continuation of document and prompt, up to a newline.

        The prompt's tokens are decode steps as well: a sparse answer has no dense look at the document.
        """
        mode, started = "fasa" if sparse else "dense", time.perf_counter()
        position, token = self.length, -1
        for token in self.encode(prompt):
            token, position = _step(self.backend, [token], position, sparse=sparse), position + 1
        answer: list[int] = []
        text = ""
        while token not in self.engine.eos and "\n" not in text:
            answer.append(token)
            text = str(self.engine.tokenizer.decode(answer))
            if len(answer) == MAX_ANSWER:
                break
            token, position = _step(self.backend, [token], position, sparse=sparse), position + 1
        self._count(mode, started, position - self.length)
        return text

    def _count(self, kind: str, started: float, steps: int) -> None:
        self.seconds[kind] += time.perf_counter() - started
        self.steps[kind] += steps


def answers(
    reader: Reader, documents: Sequence[RecallDocument], per_document: int, tick: Callable[[], None]
) -> list[Answer]:
    """Asks the first `per_document` questions of each document in both modes; calls `tick` after each question."""
    found = []
    for number, document in enumerate(documents):
        reader.read(document.text)
        for question in document.questions[:per_document]:
            dense, fasa = (answer_of(reader.ask(question.prompt, sparse=sparse)) for sparse in (False, True))
            place = document.text.index(note_line(question.key, question.answer)) / len(document.text)
            found.append(Answer(number, question.key, round(place, 4), question.answer, dense, fasa))
            tick()
    return found


def _step(backend: RowBackend, tokens: Sequence[int], position: int, *, sparse: bool) -> int:
    """Appends tokens at `position` and returns the likeliest next one."""
    last = np.array([[len(tokens) - 1]])
    logits = backend.step(np.array([tokens]), ZERO + position, ZERO, last, sparse=sparse)
    return int(logits[0, 0].argmax())
