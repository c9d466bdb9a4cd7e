"""A row backend over the arithmetic of `simulated_engine.py`: a cache of numbers for each row."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.backend import Tokens
from fasa_trt.runtime.rows import RowBatcher
from tests.simulated_engine import VOCAB, attend, cell

UNUSED = -1


class SimulatedRows:
    """fail: how many steps go well before all others fail. steps: rows, tokens a row and sparse, of each step."""

    vocab_size = VOCAB

    def __init__(self, max_batch_size: int, max_seq_len: int) -> None:
        self.max_batch_size, self.max_seq_len = max_batch_size, max_seq_len
        self.cache = np.zeros((0, 0), np.int64)
        self.steps: list[tuple[int, int, bool]] = []
        self.fail: int | None = None

    def batcher(self, rows: int | None = None) -> RowBatcher:
        return RowBatcher(self, rows)

    def describe(self) -> dict[str, Any]:
        return {"backend": "simulated"}

    def allocate(self, batch: int) -> None:
        assert 1 <= batch <= self.max_batch_size
        self.cache = np.full((batch, self.max_seq_len), UNUSED, np.int64)

    def step(
        self,
        tokens: Tokens,
        cache_position: Tokens,
        left_padding: Tokens,
        logit_index: Tokens,
        *,
        sparse: bool = True,
        first_row: int = 0,
    ) -> NDArray[np.float32]:
        batch, count = tokens.shape
        assert cache_position.shape == left_padding.shape == (batch,) and not left_padding.any()
        assert first_row + batch <= len(self.cache) and cache_position.max() + count <= self.max_seq_len
        self.steps.append((batch, count, sparse))
        if self.fail is not None and len(self.steps) > self.fail:
            raise FasaError("the engine broke")
        logits = np.zeros((batch, logit_index.shape[1], VOCAB), np.float32)
        for b in range(batch):
            row, start = self.cache[first_row + b], int(cache_position[b])
            before = int(row[start - 1]) if start else 0
            row[start : start + count] = list(itertools.accumulate(tokens[b].tolist(), cell, initial=before))[1:]
            for n, column in enumerate(logit_index[b]):
                logits[b, n, attend(row[: start + int(column) + 1].tolist())] = 1
        return logits
