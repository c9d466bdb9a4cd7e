"""Figures for Prometheus. Each application has a registry of its own."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """taken, running: ask for the number of answers admitted, and of those in the runtime."""

    def __init__(self, taken: Callable[[], int], healthy: Callable[[], bool]) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # resident memory, processor time, open files; on Linux
        self.http_requests = Counter(
            "fasa_http_requests", "HTTP requests by route and status.", ["route", "status"], registry=registry
        )
        self.answers = Counter("fasa_answers", "Answers by how they ended.", ["finish_reason"], registry=registry)
        self.prompt_tokens = Counter("fasa_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.generated_tokens = Counter("fasa_generated_tokens", "Tokens of answers.", registry=registry)
        self.first_text = Histogram(
            "fasa_time_to_first_text_seconds",
            "From the request to the first text.",
            buckets=SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "fasa_answer_seconds", "From the request to the answer's end.", buckets=SECONDS, registry=registry
        )
        Gauge("fasa_answers_in_flight", "Answers being made or waiting.", registry=registry).set_function(taken)
        Gauge("fasa_healthy", "1 while the engine serves.", registry=registry).set_function(healthy)


class CountRequests:
    """Middleware: counts requests when their response is complete, the refused ones too."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = "disconnected"  # before there was a response

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            route = getattr(scope.get("route"), "path", "none")  # paths of no route would make endless labels
            self.metrics.http_requests.labels(route, status).inc()


class Stopwatch:
    """Times one answer."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._started, self._silent = metrics, time.perf_counter(), True

    def text(self) -> None:
        if self._silent:
            self._silent = False
            self._metrics.first_text.observe(time.perf_counter() - self._started)

    def end(self) -> None:
        self._metrics.duration.observe(time.perf_counter() - self._started)
