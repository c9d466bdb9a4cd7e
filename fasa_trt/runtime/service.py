"""Requests at any time, from any thread: one thread runs the steps, everybody else waits for text.

    with Service(load("engine-dir")) as service:
        stream = service.submit("def fibonacci(n):", max_new_tokens=64)
        for text in stream:
            print(text, end="")

The engine must not generate by itself meanwhile.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.batcher import Failed, Request
from fasa_trt.runtime.completion import Answer, Completion
from fasa_trt.runtime.generate import Engine
from fasa_trt.runtime.sampling import Sampling
from fasa_trt.runtime.sequence import Preempted

Item = str | FasaError | None  # text, perhaps none; or why there is no more; or the end
Listener = Callable[[Item], None]


class Stream:
    """One request. Iterating yields text as soon as it is certain, and ends with the answer; FasaError when it failed.

    One thread may iterate; any may cancel. With a listener, it hears everything, and there is nothing to iterate.
    """

    def __init__(self, service: Service, request: Request, answer: Answer, listener: Listener | None = None) -> None:
        self.request, self.answer = request, answer
        self._service = service
        self._pieces: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._over = False
        self.put: Listener = listener or self._pieces.put

    def __iter__(self) -> Iterator[str]:
        while not self._over:
            piece = self._pieces.get()
            if piece is None:
                self._over = True
            elif isinstance(piece, FasaError):
                self._over = True
                raise piece
            elif piece:
                yield piece

    def result(self) -> Completion:
        """Waits for the end. Of a cancelled request: what there was. Raises FasaError when it failed."""
        for _ in self:
            pass
        return self.answer.completion

    def cancel(self) -> None:
        """Ends the answer where it is. Does nothing when the request is over."""
        self._service.cancel(self)


class Service:
    """Starts its thread at once; `close`, or leaving a `with` block, ends it and all requests."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._batcher = engine.backend.batcher()
        self._wake = threading.Condition()
        self._arriving: list[Stream] = []  # these three under the condition's lock
        self._leaving: list[Stream] = []
        self._error: FasaError | None = None
        self._alive: dict[int, Stream] = {}  # the thread's own
        self._thread = threading.Thread(target=self._run, name="fasa-trt service", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        chat: bool = False,
        dense: bool = False,
        ignore_eos: bool = False,
        generator: np.random.Generator | None = None,
        listener: Listener | None = None,
    ) -> Stream:
        """prompt: text or token ids; options as for `Engine.stream`. ignore_eos: let end-of-sequence tokens end
        nothing. generator: as of `Request`. listener: is called with each item in the service's thread, which it must
        not hold up, and into which it must raise nothing.

        Raises FasaError at once for a request that the engine can never serve, and when the service is closed."""
        engine = self.engine
        tokens = engine.encode(prompt, chat=chat) if isinstance(prompt, str) else [int(token) for token in prompt]
        stop_ids: frozenset[int] = frozenset() if ignore_eos else engine.eos
        request = Request(tokens, max_new_tokens, stop_ids, sampling or Sampling(), dense, generator)
        self._batcher.check(request)
        stream = Stream(self, request, Answer(engine.tokenizer, len(request.prompt), stop), listener)
        with self._wake:
            if self._error is not None:
                raise self._error
            self._arriving.append(stream)
            self._wake.notify()
        return stream

    def cancel(self, stream: Stream) -> None:
        with self._wake:
            self._leaving.append(stream)
            self._wake.notify()

    @property
    def num_requests(self) -> int:
        """That are not over."""
        with self._wake:
            return len(self._arriving) + len(self._alive)

    @property
    def error(self) -> FasaError | None:
        """Why no request is served any more; None while all is well."""
        with self._wake:
            return self._error

    def close(self) -> None:
        """Ends all requests with an error, and the thread; waits for the step that runs."""
        with self._wake:
            self._error = self._error or FasaError("the service was closed", hint="start it again")
            self._wake.notify()
        self._thread.join()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while self._exchange():
                self._step()
        except Exception as error:  # a mistake in the code: nobody may wait for ever
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            with self._wake:
                self._error = FasaError(f"the service broke: {type(error).__name__}: {reason}", hint="start it again")
            raise
        finally:
            with self._wake:
                assert self._error is not None
                for number, stream in self._alive.items():
                    self._batcher.cancel(number)
                    stream.put(self._error)
                for stream in self._arriving:
                    stream.put(self._error)
                self._alive, self._arriving = {}, []

    def _exchange(self) -> bool:
        """Takes in who has come and lets go who has left; waits while there is nothing to do. False at the end."""
        with self._wake:
            while not (self._alive or self._arriving or self._leaving or self._error):
                self._wake.wait()
            if self._error is not None:
                return False
            arriving, leaving, self._arriving, self._leaving = self._arriving, self._leaving, [], []
            for stream in arriving:
                try:
                    self._alive[self._batcher.submit(stream.request)] = stream
                except FasaError as error:
                    stream.put(error)
            for number in [number for number, stream in self._alive.items() if stream in leaving]:
                self._batcher.cancel(number)
                self._alive[number].put(self._alive[number].answer.end())
                self._end(number, None)
        return True

    def _step(self) -> None:
        turn = self._batcher.step()
        for event in turn.events if turn else ():
            if isinstance(event, Preempted):
                continue
            stream = self._alive.get(event.request)
            if stream is None:  # ended by an event before this one
                continue
            if isinstance(event, Failed):
                self._end(event.request, event.error)
                continue
            stream.put(stream.answer.push(event))
            if stream.answer.done:
                if not event.finish:  # a stop string
                    self._batcher.cancel(event.request)
                self._end(event.request, None)

    def _end(self, number: int, last: FasaError | None) -> None:
        self._alive.pop(number).put(last)
