"""In-flight batching over a paged pool: the scheduler decides each step, a runner computes it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.batcher import Event, Failed, Request, Turn
from fasa_trt.runtime.sampling import NOT_FINITE, Draw, draw, not_finite
from fasa_trt.runtime.scheduler import Scheduler
from fasa_trt.runtime.step import Step


class Runner(Protocol):
    def run(self, step: Step, draws: Sequence[Draw]) -> list[int]:
        """Computes a step; a token for each of step.logit_rows, or NOT_FINITE. Raises FasaError when it fails."""


class PagedBatcher:
    """A `Batcher`."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self.scheduler, self.runner = scheduler, runner
        self._requests: dict[int, Request] = {}  # those that are alive

    def check(self, request: Request) -> None:
        if request.dense:
            raise FasaError(
                "an engine of the plugin lowering cannot attend densely on request",
                hint="build a second engine whose --dense-layers are all layers",
            )
        self.scheduler.check_request(request.prompt, request.max_new_tokens)

    def submit(self, request: Request) -> int:
        self.check(request)
        number = self.scheduler.submit(request.prompt, max_new_tokens=request.max_new_tokens, stop_ids=request.stop_ids)
        self._requests[number] = request
        return number

    def cancel(self, request: int) -> bool:
        self._requests.pop(request, None)
        return self.scheduler.cancel(request)

    def step(self) -> Turn | None:
        step = self.scheduler.step()
        if step is None:
            return None
        draws = [self._draw(step.requests[row]) for row in step.logit_rows]
        started = time.perf_counter()
        try:
            tokens = self.runner.run(step, draws)
        except FasaError as error:  # whatever it had written of their keys and values is not to be trusted
            self.scheduler.abandon()
            return Turn([self._fail(number, error) for number in step.requests])
        seconds = time.perf_counter() - started
        events: list[Event] = []
        for row, token in zip(step.logit_rows, tokens, strict=True):
            if token == NOT_FINITE:
                events.append(self._fail(step.requests[row], not_finite()))
        for event in self.scheduler.advance(tokens):
            events.append(event)
            if getattr(event, "finish", None):
                del self._requests[event.request]
        lengths = step.sequence_length[step.num_context_rows :].astype(np.int64)
        share = len(lengths) / len(step.input_ids)
        return Turn(
            events, prefill_seconds=seconds * (1 - share), decode_seconds=seconds * share, decoded=lengths, sparse=True
        )

    def _draw(self, number: int) -> Draw:
        request = self._requests[number]
        assert request.generator is not None
        return draw(request.sampling, request.generator)

    def _fail(self, number: int, error: FasaError) -> Failed:
        self.cancel(number)
        return Failed(number, error)
