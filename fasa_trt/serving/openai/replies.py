"""The two shapes that answers are sent in: text completions and chat, each as a whole or as a stream of chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, ClassVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from fasa_trt.serving.openai import schemas
from fasa_trt.serving.openai.errors import ApiError
from fasa_trt.serving.openai.gateway import Answers
from fasa_trt.serving.openai.streaming import DONE, EventStream, event, while_connected

CLIENT_GONE = 499  # nginx's; only logs and metrics see it


class Reply:
    """One response. n: answers to each prompt."""

    kind: ClassVar[str]  # of the response's ID
    chunk: ClassVar[str]  # the object type of chunks

    def __init__(self, answers: Answers, model: str, n: int) -> None:
        self.answers, self.n = answers, n
        self.head: dict[str, Any] = {
            "id": f"{self.kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    async def send(self, request: Request, body: schemas.Options) -> Response:
        """Raises ApiError when an answer fails; a stream ends with the error object instead."""
        if body.stream:
            return EventStream(self.answers, self.events(body.include_usage))
        try:
            if not await while_connected(request.receive, self._wait()):
                return Response(status_code=CLIENT_GONE)
            return JSONResponse(self.whole())
        finally:
            self.answers.close()

    async def events(self, include_usage: bool) -> AsyncIterator[str]:
        head = {**self.head, "object": self.chunk}
        for choice in self.opening():
            yield event({**head, "choices": [choice]})
        try:
            async for number, text in self.answers:
                yield event({**head, "choices": [self.piece(number, text)]})
        except ApiError as error:  # the response has long begun
            yield event(error.body())
            return
        if include_usage:
            yield event({**head, "choices": [], "usage": self.usage().model_dump()})
        yield DONE

    async def _wait(self) -> None:
        async for _ in self.answers:
            pass

    def usage(self) -> schemas.Usage:
        """A prompt counts once, however many answers it has."""
        prompt = sum(self.answers.prompt_tokens[:: self.n])
        answer = sum(len(self.answers.completion(number).tokens) for number in range(self.answers.count))
        return schemas.Usage(prompt_tokens=prompt, completion_tokens=answer, total_tokens=prompt + answer)

    def reason(self, number: int) -> schemas.FinishReason:
        return "length" if self.answers.completion(number).finish_reason == "length" else "stop"

    def text(self, number: int) -> str:
        return self.answers.completion(number).text

    def opening(self) -> list[dict[str, Any]]:
        """Choices that chunks of their own hold before any text."""
        return []

    def piece(self, number: int, text: str | None) -> dict[str, Any]:
        """The choice of a chunk. text: None at an answer's end."""
        raise NotImplementedError

    def whole(self) -> dict[str, Any]:
        """The response that is not streamed."""
        raise NotImplementedError


class CompletionReply(Reply):
    kind, chunk = "cmpl", "text_completion"

    def piece(self, number: int, text: str | None) -> dict[str, Any]:
        reason = self.reason(number) if text is None else None
        return {"index": number, "text": text or "", "logprobs": None, "finish_reason": reason}

    def whole(self) -> dict[str, Any]:
        choices = [
            schemas.CompletionChoice(index=number, text=self.text(number), finish_reason=self.reason(number))
            for number in range(self.answers.count)
        ]
        return schemas.CompletionResponse(**self.head, choices=choices, usage=self.usage()).model_dump()


class ChatReply(Reply):
    kind, chunk = "chatcmpl", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [self._choice(number, delta, None) for number in range(self.answers.count)]

    def piece(self, number: int, text: str | None) -> dict[str, Any]:
        return (
            self._choice(number, {}, self.reason(number))
            if text is None
            else self._choice(number, {"content": text}, None)
        )

    def _choice(self, number: int, delta: dict[str, str], reason: schemas.FinishReason | None) -> dict[str, Any]:
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": reason}

    def whole(self) -> dict[str, Any]:
        choices = [
            schemas.ChatChoice(
                index=number, message=schemas.Answer(content=self.text(number)), finish_reason=self.reason(number)
            )
            for number in range(self.answers.count)
        ]
        return schemas.ChatResponse(**self.head, choices=choices, usage=self.usage()).model_dump()
