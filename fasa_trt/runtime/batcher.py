"""Requests in, tokens out, one step at a time: what every backend's batching looks like from outside.

    number = batcher.submit(Request(prompt, max_new_tokens=100))
    while (turn := batcher.step()) is not None:
        for event in turn.events: ...

Requests join and leave between any two steps. Not thread-safe, but for `check`; `service.py` runs one in a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.sampling import Sampling
from fasa_trt.runtime.sequence import Preempted, Token


@dataclass
class Request:
    """prompt: token ids. stop_ids: tokens that end the answer, as its last one. dense: attend to everything.

    generator: where the draws come from; None for one of `sampling.seed`.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 128
    stop_ids: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    dense: bool = False
    generator: np.random.Generator | None = None

    def __post_init__(self) -> None:
        if self.generator is None:
            (self.generator,) = self.sampling.generators(1)


@dataclass(frozen=True)
class Failed:
    """The request is over, without a last token. error: why, in one line for who asked."""

    request: int
    error: FasaError


Event = Token | Preempted | Failed
NOBODY = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Turn:
    """What one step did.

    decoded: tokens in the cache after it, of each row that went on by one token; sparse: whether those rows attended
    sparsely. Seconds of a step with both kinds of rows are shared out by tokens.
    """

    events: list[Event]
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded: NDArray[np.int64] = field(default_factory=lambda: NOBODY)
    sparse: bool = True


class Batcher(Protocol):
    def check(self, request: Request) -> None:
        """Raises FasaError for a request that can never be served. Any thread may ask."""

    def submit(self, request: Request) -> int:
        """Queues a request and returns its number. Raises FasaError as `check` does."""

    def cancel(self, request: int) -> bool:
        """Drops a request; no event speaks of it again. False when it is not alive."""

    def step(self) -> Turn | None:
        """Computes the next step; None when no request is alive. A step that fails ends its requests with `Failed`."""
