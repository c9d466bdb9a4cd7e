"""One request on its way back to the client."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.service import Item, Stream


class Answer:
    """Sends responses from what the runtime tells: one when the text is complete, or, when it `streams`, one for each
    piece of text and a last one, perhaps without text, that has the reason of the end.

    request: Triton's; its response sender is what remains of it. stream, streams: to be set before `started`.
    """

    def __init__(self, pb_utils: Any, request: Any) -> None:
        self._utils = pb_utils
        self._sender = request.get_response_sender()
        self._wanted = frozenset(request.requested_output_names())
        self.stream: Stream | None = None
        self.streams = False
        self.started = threading.Event()
        self._cancelled = False
        self._text = ""  # not sent yet
        self._tokens = self._sent = 0  # that the runtime told of, and of them those that were sent

    @property
    def prompt_tokens(self) -> int:
        return self.stream.answer.completion.prompt_tokens if self.stream else 0

    @property
    def generated_tokens(self) -> int:
        return len(self.stream.answer.completion.tokens) if self.stream else 0

    def outcome(self, item: Item) -> str | None:
        """How the request ends (one of `metrics.OUTCOMES`) when `item` ends it."""
        assert self.stream is not None
        if isinstance(item, str):
            return None
        if isinstance(item, FasaError):
            return "error"
        return "cancelled" if self._cancelled else self.stream.answer.completion.finish_reason

    def send(self, item: Item) -> None:
        """Sends what `item` calls for, if anything."""
        if isinstance(item, str):
            self._text += item
            self._tokens += 1
            if self.streams and self._text and not self._cancelled:
                self._sender.send(self._response(""))
        elif isinstance(item, FasaError):
            self.fail(str(item), self._utils.TritonError.INTERNAL)
        elif self._cancelled:
            self.fail("the client cancelled the request", self._utils.TritonError.CANCELLED)
        else:
            assert self.stream is not None
            self._tokens = self.generated_tokens
            self._send_last(self._response(self.stream.answer.completion.finish_reason))

    def fail(self, reason: str, code: int) -> None:
        """Ends the request with an error."""
        error = self._utils.TritonError(" ".join(reason.split()), code)
        self._send_last(self._utils.InferenceResponse(output_tensors=[], error=error))

    def cancel_if_asked(self) -> None:
        if not self._cancelled and self._sender.is_cancelled():
            assert self.stream is not None
            self._cancelled = True
            self.stream.cancel()

    def _send_last(self, response: Any) -> None:
        self._sender.send(response, flags=self._utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _response(self, finish_reason: str) -> Any:
        assert self.stream is not None
        completion = self.stream.answer.completion
        tokens = completion.tokens[self._sent : self._tokens]
        tensors = {
            "text_output": np.array([self._text.encode("utf-8")], dtype=object),
            "output_ids": np.array(tokens, np.int32),
            "finish_reason": np.array([finish_reason.encode()], dtype=object),
            "num_input_tokens": np.array([completion.prompt_tokens], np.int32),
            "num_output_tokens": np.array([self._tokens], np.int32),
        }
        self._text, self._sent = "", self._tokens
        wanted = [self._utils.Tensor(name, value) for name, value in tensors.items() if name in self._wanted]
        return self._utils.InferenceResponse(output_tensors=wanted)
