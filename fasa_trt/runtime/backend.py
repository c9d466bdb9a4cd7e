"""What a backend offers: steps over a batch of rows that each own a cache."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]


class Backend(Protocol):
    """Runs an engine's decoder. The caller keeps track of how many slots of each row are in use."""

    max_seq_len: int
    max_batch_size: int

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
    ) -> NDArray[np.float32]:
        """Appends tokens [B, T] at slots cache_position [B] and returns logits [B, N, vocab] of columns
        logit_index [B, N]. left_padding [B]: unused slots at the start of each row; a token's position is its slot
        minus that. Slots at and after cache_position are overwritten, so padding on the right and going back to an
        earlier position need nothing special. sparse: False attends densely whatever the length."""

    def describe(self) -> dict[str, Any]:
        """Facts for humans: provider, threads, bytes of cache."""
