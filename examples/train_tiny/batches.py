"""Training batches from background processes, which keep ahead of the accelerator."""

from __future__ import annotations

import multiprocessing
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from examples.train_tiny.sequences import SequenceGenerator


class Batch(NamedTuple):
    """Arrays of [batch, length + 1]: inputs and targets, one token on, are both cut from them."""

    length: int
    tokens: npt.NDArray[np.uint16]
    weights: npt.NDArray[np.float16]
    answers: npt.NDArray[np.int8]


class BatchSource:
    """A context that runs the data processes; `next` returns a batch of the length asked for."""

    def __init__(self, work: Path, *, length: int, batch_tokens: int, workers: int, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._length: Synchronized[int] = context.Value("i", length)
        self._queue: Queue[Batch] = context.Queue(48)
        self._workers = [
            context.Process(
                target=_produce,
                args=(work, 1000 + 50 * seed + index, self._length, self._queue, batch_tokens),
                daemon=True,
            )
            for index in range(workers)
        ]

    def __enter__(self) -> BatchSource:
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.join()

    def next(self, length: int) -> Batch:
        """The next batch of this length; those still queued from an earlier length are dropped."""
        self._length.value = length
        while True:
            batch = self._queue.get(timeout=90)
            if batch.length == length:
                return batch


def _produce(work: Path, seed: int, length: Synchronized[int], queue: Queue[Batch], batch_tokens: int) -> None:
    generator = SequenceGenerator(np.load(work / "train.npy", mmap_mode="r"), seed, work / "tok.json")
    while True:
        current = length.value
        samples = [generator.training(current + 1) for _ in range(max(1, batch_tokens // current))]
        queue.put(
            Batch(
                current,
                np.stack([sample.tokens for sample in samples]).astype(np.uint16),
                np.stack([sample.weights for sample in samples]).astype(np.float16),
                np.stack([sample.answers for sample in samples]),
            )
        )
