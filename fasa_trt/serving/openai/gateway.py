"""Between the event loop and the runtime's threads: answers of one HTTP request as an asynchronous iterator.

Text is made in the service's thread. It crosses over to the loop with one wake-up for all that a step yields, instead
of one a token. Prompts are tokenised in a thread of their own, one at a time: tokenizers are not made for several.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.completion import Completion
from fasa_trt.runtime.service import Item, Listener, Service, Stream
from fasa_trt.serving.openai.errors import ApiError
from fasa_trt.serving.openai.limits import Admission
from fasa_trt.serving.openai.metrics import Metrics, Stopwatch
from fasa_trt.serving.request import GenerationRequest

Numbered = tuple[int, Item]  # which answer, and what comes of it


class Gateway:
    """service: stays its owner's to close. capacity: answers at once, those that wait included."""

    def __init__(self, service: Service, capacity: int) -> None:
        self.service = service
        self.admission = Admission(capacity)
        self.metrics = Metrics(lambda: self.admission.taken, lambda: service.error is None)
        self._tokenizer = ThreadPoolExecutor(1, "fasa-trt tokenizer")
        self._crossing: deque[tuple[asyncio.Queue[Numbered], Numbered]] = deque()
        self._woken = False

    def close(self) -> None:
        self._tokenizer.shutdown(wait=False, cancel_futures=True)

    async def ask(self, count: int, make: Callable[[], Sequence[GenerationRequest]]) -> Answers:
        """Starts `count` answers; the caller must close them. make: gives the requests, in the tokenizer's thread.

        Raises ApiError: 400 for requests that cannot be served, 429 when the queue is full, 503 after the engine broke.
        """
        self.check_health()
        self.admission.enter(count)
        answers = Answers(self, count)
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._tokenizer, answers.start, loop, make)
        except FasaError as error:
            answers.close()
            self.check_health()
            raise ApiError(400, str(error)) from None
        except BaseException:
            answers.close()
            raise
        return answers

    def check_health(self) -> None:
        """Raises ApiError, 503, when the engine serves no more."""
        if (error := self.service.error) is not None:
            raise ApiError(503, str(error), code="engine_broken")

    def listener(self, loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[Numbered], number: int) -> Listener:
        def hear(item: Item) -> None:
            if item == "":
                return
            self._crossing.append((inbox, (number, item)))
            if not self._woken:
                self._woken = True
                try:
                    loop.call_soon_threadsafe(self._deliver)
                except RuntimeError:  # the loop is closed: nobody listens any more
                    self._crossing.clear()

        return hear

    def _deliver(self) -> None:
        self._woken = False  # first: what arrives from here on wakes the loop again
        while self._crossing:
            inbox, item = self._crossing.popleft()
            inbox.put_nowait(item)


class Answers:
    """Iterating yields (number, text) as text comes, and (number, None) when that answer is complete.

    Raises ApiError when one fails. `close`, at any time, cancels what is not over.
    """

    def __init__(self, gateway: Gateway, count: int) -> None:
        self.count = count
        self._gateway = gateway
        self._inbox: asyncio.Queue[Numbered] = asyncio.Queue()
        self._streams: list[Stream] = []
        self._over: set[int] = set()
        self._closed = False
        self._watches = [Stopwatch(gateway.metrics) for _ in range(count)]

    def start(self, loop: asyncio.AbstractEventLoop, make: Callable[[], Sequence[GenerationRequest]]) -> None:
        """Hands the requests to the runtime; called in the tokenizer's thread."""
        for number, request in enumerate(make()):
            listener = self._gateway.listener(loop, self._inbox, number)
            self._streams.append(request.submit(self._gateway.service, listener))
            if self._closed:  # the server is stopping
                self._streams[-1].cancel()
        assert len(self._streams) == self.count

    async def __aiter__(self) -> AsyncIterator[tuple[int, str | None]]:
        while len(self._over) < self.count:
            number, item = await self._inbox.get()
            if isinstance(item, FasaError):
                self._end(number, "error")
                self._gateway.check_health()
                raise ApiError(500, str(item))
            if item is None:
                self._end(number, self.completion(number).finish_reason)
                self._watches[number].end()
            else:
                self._watches[number].text()
            yield number, item

    def completion(self, number: int) -> Completion:
        """The answer so far; complete when iterating has said so."""
        return self._streams[number].answer.completion

    @property
    def prompt_tokens(self) -> list[int]:
        """Of each answer's prompt."""
        return [len(stream.request.prompt) for stream in self._streams]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._gateway.admission.leave(self.count)
        self._gateway.metrics.prompt_tokens.inc(sum(self.prompt_tokens))
        for number, stream in enumerate(self._streams):
            if number not in self._over:
                stream.cancel()
                self._end(number, "cancelled")

    def _end(self, number: int, reason: str) -> None:
        self._over.add(number)
        self._gateway.metrics.answers.labels(reason).inc()
        self._gateway.metrics.generated_tokens.inc(len(self.completion(number).tokens))
