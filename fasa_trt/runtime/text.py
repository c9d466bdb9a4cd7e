"""Turning a growing list of tokens into text, piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a decoder prints for the first bytes of a longer character


class TextStream:
    """Detokenises one sequence. Text is held back while it may still become part of a character or a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._tokens: list[int] = []
        self._start = self._end = 0  # tokens before _end are decoded; _start leaves the decoder some context
        self._pending = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is now certain, perhaps none."""
        self._tokens.append(token)
        before, now = (self._decode(self._tokens[self._start : end]) for end in (self._end, None))
        if len(now) <= len(before) or now.endswith(INCOMPLETE):
            return ""
        self._start, self._end = self._end, len(self._tokens)
        self._pending += now[len(before) :]
        return self._release(hold=True)

    def finish(self) -> str:
        """Returns what was held back, when no more tokens come."""
        if not self.stopped and self._end < len(self._tokens):
            before, now = (self._decode(self._tokens[self._start : end]) for end in (self._end, None))
            self._end = len(self._tokens)
            self._pending += now[len(before) :]
        return self._release(hold=False)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _release(self, *, hold: bool) -> str:
        if self.stopped:
            return ""
        found = [at for stop in self._stop if (at := self._pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain, self._pending = self._pending[: min(found)], ""
        else:
            kept = self._possible_stop() if hold else 0
            cut = len(self._pending) - kept
            certain, self._pending = self._pending[:cut], self._pending[cut:]
        self.text += certain
        return certain

    def _possible_stop(self) -> int:
        """Length of the longest end of the pending text that begins a stop string."""
        return max(
            (
                size
                for stop in self._stop
                for size in range(1, min(len(stop), len(self._pending) + 1))
                if self._pending.endswith(stop[:size])
            ),
            default=0,
        )
