"""In-flight batching over rows that each own a cache: a request joins where a row is free, and leaves it when it ends.

Prompts go through the model alone, in chunks, so that a joining request pads nobody; what decodes goes on in one batch
between the chunks. A row that has nothing to do in a step is left out, or rides along at a slot that is not in use.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.backend import RowBackend
from fasa_trt.runtime.batcher import Event, Failed, Request, Turn
from fasa_trt.runtime.sampling import sample
from fasa_trt.runtime.sequence import FinishReason, Token, check_prompt

PREFILL_CHUNK = 512  # tokens a step: large enough for the matrix products, small enough for the scores


@dataclass(eq=False)
class Row:
    """A request in row `slot`. Of its tokens, prompt and answer, the cache holds the first `computed`."""

    id: int
    request: Request
    tokens: list[int]
    slot: int = -1
    computed: int = 0
    served: int = 0  # the last step that it had a part in

    @property
    def decoding(self) -> bool:
        return self.computed >= len(self.request.prompt)


class RowBatcher:
    """A `Batcher`; `rows` of them at a time. Its first request makes the backend start over."""

    def __init__(self, backend: RowBackend, rows: int | None = None) -> None:
        self.backend = backend
        self.rows = backend.max_batch_size if rows is None else min(rows, backend.max_batch_size)
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []  # the oldest first
        self._next_id = self._steps = 0

    def check(self, request: Request) -> None:
        limit, vocab = self.backend.max_seq_len, self.backend.vocab_size
        check_prompt(request.prompt, request.max_new_tokens, max_seq_len=limit, vocab_size=vocab)

    def submit(self, request: Request) -> int:
        self.check(request)
        self.waiting.append(Row(self._next_id, request, [int(token) for token in request.prompt]))
        self._next_id += 1
        return self.waiting[-1].id

    def cancel(self, request: int) -> bool:
        for row in (*self.running, *self.waiting):
            if row.id == request:
                self._drop(row)
                return True
        return False

    def step(self) -> Turn | None:
        if not self.running and not self.waiting:
            return None
        try:
            self._admit()
        except FasaError as error:  # no memory
            return Turn(self._fail(list(self.waiting), error))
        self._steps += 1
        row = min(self.running, key=lambda row: (row.served, row.id))  # who has waited longest has a part
        rows = [row]
        if row.decoding:
            rows = [other for other in self.running if other.decoding and other.request.dense == row.request.dense]
        for row in rows:
            row.served = self._steps
        try:
            return self._decode(rows) if row.decoding else self._prefill(row)
        except FasaError as error:
            return Turn(self._fail(rows, error))

    def _admit(self) -> None:
        if not self.running:
            self.backend.allocate(self.rows)  # gives back what the last ones had grown to
        free = sorted(set(range(self.rows)) - {row.slot for row in self.running})
        for slot in free[: len(self.waiting)]:  # the lowest, since a step covers all rows up to the last in use
            self.running.append(self.waiting.popleft())
            self.running[-1].slot, self.running[-1].served = slot, self._steps

    def _prefill(self, row: Row) -> Turn:
        """The next chunk of a prompt."""
        chunk = row.tokens[row.computed : row.computed + PREFILL_CHUNK]
        started = time.perf_counter()
        logits = self.backend.step(
            np.asarray([chunk], np.int64),
            np.asarray([row.computed]),
            np.zeros(1, np.int64),
            np.asarray([[len(chunk) - 1]]),
            sparse=False,
            first_row=row.slot,
        )[:, 0]
        seconds = time.perf_counter() - started
        row.computed += len(chunk)
        return Turn(self._sample([row], logits) if row.decoding else [], prefill_seconds=seconds)

    def _decode(self, rows: list[Row]) -> Turn:
        """The next token of each."""
        first = min(row.slot for row in rows)
        at = [row.slot - first for row in rows]
        count = max(at) + 1
        # The others ride along at a slot that nobody has reached: at a short length, all would attend densely.
        position = np.full(count, max(row.computed for row in self.running), np.int64)
        position[at] = [row.computed for row in rows]
        tokens = np.zeros((count, 1), np.int64)
        tokens[at, 0] = [row.tokens[-1] for row in rows]
        zero, sparse = np.zeros(count, np.int64), not rows[0].request.dense
        started = time.perf_counter()
        logits = self.backend.step(tokens, position, zero, zero[:, None], sparse=sparse, first_row=first)[at, 0]
        seconds = time.perf_counter() - started
        for row in rows:
            row.computed += 1
        lengths = np.asarray([row.computed for row in rows], np.int64)
        return Turn(self._sample(rows, logits), decode_seconds=seconds, decoded=lengths, sparse=sparse)

    def _sample(self, rows: Sequence[Row], logits: NDArray[np.float32]) -> list[Event]:
        events: list[Event] = []
        for row, scores in zip(rows, logits, strict=True):
            assert row.request.generator is not None
            try:
                token = sample(scores, row.request.sampling, row.request.generator)
            except FasaError as error:
                events += self._fail([row], error)
                continue
            row.tokens.append(token)
            finish = self._finish(row)
            events.append(Token(row.id, token, finish))
            if finish:
                self._drop(row)
        return events

    def _finish(self, row: Row) -> FinishReason | None:
        if row.tokens[-1] in row.request.stop_ids:
            return "eos"
        full = len(row.tokens) >= min(len(row.request.prompt) + row.request.max_new_tokens, self.backend.max_seq_len)
        return "length" if full else None

    def _fail(self, rows: Sequence[Row], error: FasaError) -> list[Event]:
        for row in rows:
            self._drop(row)
        return [Failed(row.id, error) for row in rows]

    def _drop(self, row: Row) -> None:
        if row in self.running:
            self.running.remove(row)
        else:
            self.waiting.remove(row)
