"""What a backend offers: a batcher to generate with; and, where each row owns its cache, steps over a batch of rows."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fasa_trt.runtime.batcher import Batcher

Tokens = NDArray[np.int64]


class Backend(Protocol):
    """A loaded engine."""

    max_seq_len: int
    max_batch_size: int

    def batcher(self, rows: int | None = None) -> Batcher:
        """What serves requests, up to `rows` at a time; None for max_batch_size. There is one at a time: a second one
        may take over the first one's cache."""

    def describe(self) -> dict[str, Any]:
        """Facts for humans: provider, threads, bytes of cache."""


class RowBackend(Protocol):
    """Runs an engine's decoder on rows that each own a cache. The caller keeps track of how many slots of each row are
    in use."""

    max_seq_len: int
    max_batch_size: int
    vocab_size: int

    def allocate(self, batch: int) -> None:
        """Starts over with `batch` rows and empty caches."""

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
        """Appends tokens [B, T] at slots cache_position [B] of rows first_row to first_row + B, and returns logits
        [B, N, vocab] of columns logit_index [B, N]; other rows are not touched. left_padding [B]: unused slots at the
        start of each row; a token's position is its slot minus that. Slots at and after cache_position are
        overwritten, so padding on the right and going back to an earlier position need nothing special. sparse: False
        attends densely whatever the length. Raises FasaError when it fails."""
