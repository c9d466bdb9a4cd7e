"""The application: its routes, and what stands before them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from fasa_trt import __version__
from fasa_trt.runtime.service import Service
from fasa_trt.serving.openai import prompts, schemas
from fasa_trt.serving.openai.errors import ApiError, handle_errors
from fasa_trt.serving.openai.gateway import Gateway
from fasa_trt.serving.openai.limits import BearerAuth, BodyLimit
from fasa_trt.serving.openai.metrics import CountRequests
from fasa_trt.serving.openai.replies import ChatReply, CompletionReply
from fasa_trt.serving.request import GenerationRequest

MAX_QUEUE = 256
MAX_BODY_BYTES = 8 * 2**20
ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": text}
    for code, text in {
        400: "The request is wrong; the reason is in `error.message`.",
        401: "The API key is missing or wrong.",
        404: "There is no such model.",
        413: "The body is too long.",
        429: "The queue is full; try again after `Retry-After` seconds.",
        500: "The answer failed.",
        503: "The engine broke; the server must be started again.",
    }.items()
}

GENERATION: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}, **ERRORS}


@dataclass(frozen=True)
class Settings:
    """model_name: what clients call the engine. api_key: None lets everybody in. max_queue: answers that may wait for
    a place in the batch. max_body_bytes: of a request."""

    model_name: str
    api_key: str | None = None
    max_queue: int = MAX_QUEUE
    max_body_bytes: int = MAX_BODY_BYTES


def create_app(service: Service, settings: Settings) -> FastAPI:
    """The service stays its owner's to close, after the server has ended."""
    directory = service.engine.directory
    gateway = Gateway(service, directory.max_batch_size + settings.max_queue)
    model = schemas.Model(id=settings.model_name, created=int(time.time()), max_model_len=directory.max_seq_len)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        gateway.close()

    app = FastAPI(title="fasa-trt", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    handle_errors(app)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    if settings.api_key is not None:
        app.add_middleware(BearerAuth, api_key=settings.api_key)
    app.add_middleware(CountRequests, metrics=gateway.metrics)  # the outermost

    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> dict[str, str]:
        gateway.check_health()
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses={401: ERRORS[401]})
    async def models() -> schemas.ModelList:
        return schemas.ModelList(data=[model])

    @app.get("/v1/models/{name:path}", responses={code: ERRORS[code] for code in (401, 404)})
    async def one_model(name: str) -> schemas.Model:
        check_model(name)
        return model

    @app.post("/v1/completions", response_model=schemas.CompletionResponse, responses=GENERATION)
    async def completions(body: schemas.CompletionRequest, request: Request) -> Response:
        check(body)
        answers = await gateway.ask(len(body.prompts) * body.n, lambda: prompts.of_completion(body))
        return await CompletionReply(answers, settings.model_name, body.n).send(request, body)

    @app.post("/v1/chat/completions", response_model=schemas.ChatResponse, responses=GENERATION)
    async def chat(body: schemas.ChatRequest, request: Request) -> Response:
        check(body)

        def make() -> Sequence[GenerationRequest]:
            return prompts.of_chat(body, service.engine.tokenizer, directory.max_seq_len)

        answers = await gateway.ask(body.n, make)
        return await ChatReply(answers, settings.model_name, body.n).send(request, body)

    def check(body: schemas.Options) -> None:
        check_model(settings.model_name if body.model is None else body.model)
        if body.n < 1:
            raise ApiError(400, f"n must be at least 1, not {body.n}", param="n")
        if isinstance(body, schemas.CompletionRequest) and not body.prompts:
            raise ApiError(400, "prompt is an empty list", param="prompt")

    def check_model(name: str) -> None:
        if name != settings.model_name:
            raise ApiError(
                404, f"there is no model {name!r}; this server has {settings.model_name!r}", code="model_not_found"
            )

    return app
