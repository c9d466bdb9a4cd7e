"""Decode steps as CUDA graphs: one for each of a few batch sizes, to which smaller batches are filled up.

A graph remembers the state of the execution context that it was captured from, so each has a context of its own; all of
them share one working memory. The first step of a size runs without a graph, which TensorRT asks for before a capture.
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/advanced.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.device_memory import Device


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, then multiples of 8 to 64, of 16 beyond: a batch is filled up by a fifth at most from 32 on."""
    sizes = {1, 2, 4, *range(8, 65, 8), *range(80, largest, 16), largest}
    return sorted(size for size in sizes if size <= largest)


class DecodeGraphs:
    """off: why there are no graphs; None while there are. A capture that fails switches them off for good."""

    def __init__(self, device: Device, largest: int) -> None:
        self.off: str | None = None
        self._device, self._sizes = device, batch_sizes(largest)
        self._contexts: dict[int, Any] = {}
        self._graphs: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def padded(self, rows: int) -> int:
        """The size that a step of `rows` decoding rows is to have."""
        return rows if self.off else next(size for size in self._sizes if size >= rows)

    def run(self, size: int, new_context: Callable[[], Any], enqueue: Callable[[Any], None]) -> None:
        """Replays the graph of a size; for the first time, runs `enqueue` with a new context and then captures it.

        Raises FasaError when the step fails; a failing capture is no failure of the step, which has run by then.
        """
        if size in self._graphs:
            self._device.launch(self._graphs[size])
            return
        if size not in self._contexts:
            self._contexts[size] = new_context()
        context = self._contexts[size]
        enqueue(context)
        try:
            self._graphs[size] = self._device.capture(lambda: enqueue(context))
        except FasaError as error:
            self.off = str(error)
            self._graphs.clear()
            self._contexts.clear()
