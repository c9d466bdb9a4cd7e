"""What comes of a request: its text as tokens come in, and accounts of a whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fasa_trt.core.engine_dir import EngineDirectory
from fasa_trt.runtime.batcher import Turn
from fasa_trt.runtime.sequence import Token
from fasa_trt.runtime.text import TextStream
from fasa_trt.runtime.traffic import kv_elements_read


@dataclass(frozen=True)
class Piece:
    """Some newly certain text of one row of the batch; may be empty when the row finishes."""

    row: int
    text: str


@dataclass
class Completion:
    """One finished row. finish_reason: "eos", "stop" (a stop string) or "length"."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    finish_reason: Literal["eos", "stop", "length"] = "length"


class Answer:
    """The text of one request. done: whether no token of it is wanted any more."""

    def __init__(self, tokenizer: Any, prompt_tokens: int, stop: Sequence[str] = ()) -> None:
        self.completion = Completion(prompt_tokens=prompt_tokens)
        self.done = False
        self._text = TextStream(tokenizer, stop)

    def push(self, event: Token) -> str:
        """The text that a token makes certain, perhaps none."""
        completion, text = self.completion, self._text
        completion.tokens.append(event.token)
        certain = "" if event.finish == "eos" else text.push(event.token)
        if event.finish or text.stopped:
            certain += self.end()
            completion.finish_reason = "stop" if text.stopped else event.finish or "length"
        return certain

    def end(self) -> str:
        """The text that was held back, when no more tokens come."""
        self.done = True
        held = self._text.finish()
        self.completion.text = self._text.text
        return held


@dataclass
class Statistics:
    """Of one batch. kv_read, kv_dense: cache elements that decode steps read, and would have read densely."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decoded_tokens: int = 0  # new tokens but the first of each row, which prefill yields
    kv_read: int = 0
    kv_dense: int = 0

    @property
    def prefill_rate(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def kv_share(self) -> float:
        return self.kv_read / self.kv_dense if self.kv_dense else 1.0

    def count(self, turn: Turn, engine: EngineDirectory) -> None:
        self.new_tokens += sum(isinstance(event, Token) for event in turn.events)
        self.prefill_seconds += turn.prefill_seconds
        self.decode_seconds += turn.decode_seconds
        self.decoded_tokens += len(turn.decoded)
        read, dense = kv_elements_read(engine, turn.decoded, sparse=turn.sparse)
        self.kv_read += read
        self.kv_dense += dense
