"""Training batches from background processes, which keep ahead of the accelerator."""

from __future__ import annotations

import multiprocessing
import queue
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import Synchronized
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from examples.train_tiny.mix import Sequences
from examples.train_tiny.settings import Settings
from fasa_trt.core.errors import FasaError


class Batch(NamedTuple):
    """Arrays of [batch, length + 1], from which inputs and targets, one token on, are both cut; kinds: [batch]."""

    length: int
    kinds: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.uint16]
    weights: npt.NDArray[np.float16]
    answers: npt.NDArray[np.int8]


class BatchSource:
    """A context that runs the data processes; `next` returns a batch of the length asked for."""

    def __init__(self, settings: Settings, *, length: int, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._length: Synchronized[int] = context.Value("i", length)
        self._queue: Queue[Batch] = context.Queue(48)
        self._workers = [
            context.Process(
                target=_produce,
                args=(settings, 1000 * (seed + 1) + 3 * index, self._length, self._queue),
                daemon=True,
            )
            for index in range(settings.workers)
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
            try:
                batch = self._queue.get(timeout=2)
            except queue.Empty:
                self._check()
                continue
            if batch.length == length:
                return batch

    def _check(self) -> None:
        """Raises FasaError when a data process has died: the others might never fill its place."""
        dead = [worker.exitcode for worker in self._workers if worker.exitcode is not None]
        if dead:
            raise FasaError(f"a data process ended with status {dead[0]}", hint="see its message above")


def _produce(settings: Settings, seed: int, length: Synchronized[int], batches: Queue[Batch]) -> None:
    sequences = Sequences(settings.work, settings.mix, seed)
    while True:
        current = length.value
        drawn = [sequences.training(current + 1) for _ in range(max(1, settings.batch_tokens // current))]
        batches.put(
            Batch(
                current,
                np.array([each.kind for each in drawn]),
                np.stack([each.sample.tokens for each in drawn]).astype(np.uint16),
                np.stack([each.sample.weights for each in drawn]).astype(np.float16),
                np.stack([each.sample.answers for each in drawn]),
            )
        )
