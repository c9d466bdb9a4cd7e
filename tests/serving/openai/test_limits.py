"""Keys, body sizes, a full queue, clients that go, an engine that breaks, and the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.generate import Engine, load
from fasa_trt.runtime.service import Service
from tests.serving.openai.conftest import MAX_BATCH_SIZE, MODEL, Running, running

LONG: dict[str, Any] = {"model": MODEL, "prompt": "a", "max_tokens": 10**4, "temperature": 0}


class Gate:
    """Holds an engine's steps up while it is closed, or lets them fail."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.open.set()
        self.error: Exception | None = None
        self.steps = 0
        step = engine.backend.step  # type: ignore[attr-defined]

        def gated(*arguments: Any, **options: Any) -> Any:
            assert self.open.wait(30)
            self.steps += 1
            if self.error is not None:
                raise self.error
            return step(*arguments, **options)

        monkeypatch.setattr(engine.backend, "step", gated)


@pytest.fixture
def gate(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(service.engine, monkeypatch)
    yield gate
    gate.error = None
    gate.open.set()
    until(lambda: service.num_requests == 0)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def test_key(service: Service) -> None:
    with running(service, api_key="s3cret\N{EURO SIGN}") as server:
        for key in ("none", "s3cret", "S3cret\N{EURO SIGN}"):
            headers = [(b"Authorization", f"Bearer {key}".encode())]
            for answer in (
                server.http.get("/v1/models", headers=headers),
                server.http.post("/v1/completions", content=b"[", headers=headers),
            ):
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
        assert server.http.get("/v1/models").status_code == 401
        good = [(b"Authorization", "Bearer s3cret\N{EURO SIGN}".encode())]
        assert server.http.get("/v1/models", headers=good).status_code == 200
        for path in ("/health", "/version", "/metrics"):
            assert server.http.get(path).status_code == 200


def test_key_of_the_openai_package(service: Service) -> None:
    with running(service, api_key="s3cret") as server:
        with pytest.raises(openai.AuthenticationError, match="a valid API key is needed"):
            server.client().models.list()
        assert server.client(api_key="s3cret").models.list().data[0].id == MODEL


@pytest.mark.parametrize("declared", [True, False])
def test_body_limit(service: Service, declared: bool) -> None:
    def body(size: int) -> Any:
        whole = b'{"prompt": "a", "max_tokens": 1}'.ljust(size)
        return whole if declared else iter([whole[: size // 2], whole[size // 2 :]])

    with running(service, max_body_bytes=1000) as server:
        headers = {"Content-Type": "application/json"}
        assert server.http.post("/v1/completions", content=body(1000), headers=headers).status_code == 200
        for size in (1001, 100_000, 20_000_000):
            refused = server.http.post("/v1/completions", content=body(size), headers=headers)
            assert refused.status_code == 413
            assert refused.json()["error"]["message"] == "the body is longer than 1000 bytes"


def test_full_queue(service: Service, gate: Gate) -> None:
    with running(service, max_queue=2) as server:
        gate.open.clear()
        streams = [server.client().completions.create(**LONG, stream=True) for _ in range(MAX_BATCH_SIZE + 2)]
        with pytest.raises(openai.RateLimitError, match="the queue is full: 10 of 10 places are taken") as refused:
            server.client().completions.create(**LONG)
        assert refused.value.response.headers["retry-after"] == "1" and refused.value.code == "queue_full"
        assert server.http.get("/health").status_code == 200, "a busy server is a healthy one"
        streams.pop().close()
        until(lambda: server.metric("fasa_answers_in_flight") == 9)
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(**LONG, n=2)
        gate.open.set()
        assert server.client().completions.create(model=MODEL, prompt="a", max_tokens=1).choices
        for stream in streams:
            stream.close()
        until(lambda: server.metric("fasa_answers_in_flight") == 0)


def test_openai_clients_come_back_to_a_full_queue(service: Service, gate: Gate) -> None:
    with running(service, max_queue=0) as server:
        gate.open.clear()
        streams = [server.client().completions.create(**LONG, stream=True) for _ in range(MAX_BATCH_SIZE)]

        def leave() -> None:
            for stream in streams:
                stream.close()
            gate.open.set()

        timer = threading.Timer(0.3, leave)
        timer.start()
        answer = server.client(max_retries=3).completions.create(model=MODEL, prompt="a", max_tokens=1)
        assert answer.usage is not None and answer.usage.completion_tokens == 1
        timer.join()


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_goes_is_cancelled(server: Running, gate: Gate, stream: bool) -> None:
    """Even before the first token."""
    cancelled = 'fasa_answers_total{finish_reason="cancelled"}'
    before = server.metric(cancelled)
    gate.open.clear()
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server.url, timeout=0.3) as http:
        answer = http.send(http.build_request("POST", "/v1/completions", json={**LONG, "stream": stream}), stream=True)
        answer.read()
    until(lambda: server.metric(cancelled) == before + 1)
    assert server.metric("fasa_answers_in_flight") == 0
    gate.open.set()
    until(lambda: server.service.num_requests == 0)
    assert gate.steps <= 2, "it had 190 tokens to go"


def test_client_that_goes_between_tokens_is_cancelled(server: Running, gate: Gate) -> None:
    cancelled = 'fasa_answers_total{finish_reason="cancelled"}'
    before = server.metric(cancelled)
    stream = server.client().completions.create(**LONG, n=2, stream=True)
    assert next(iter(stream)).choices
    gate.open.clear()
    stream.close()
    until(lambda: server.metric(cancelled) == before + 2)
    steps = gate.steps
    gate.open.set()
    until(lambda: server.service.num_requests == 0)
    assert gate.steps <= steps + 2


def test_failed_step_fails_its_requests_alone(server: Running, gate: Gate) -> None:
    gate.error = FasaError("the GPU is lost")
    client = server.client()
    with pytest.raises(openai.InternalServerError, match="the GPU is lost"):
        client.completions.create(**LONG)
    with pytest.raises(openai.APIError, match="the GPU is lost"):
        list(client.completions.create(**LONG, stream=True))
    assert server.metric('fasa_answers_total{finish_reason="error"}') >= 2
    gate.error = None
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).choices
    assert server.http.get("/health").json() == {"status": "ok"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_broken_engine_is_told(engine_dir: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in the code ends the service's thread; the server lives, and says so until it is started again."""
    with Service(load(engine_dir, threads=1)) as service, running(service) as server:
        gate = Gate(service.engine, monkeypatch)
        assert server.http.get("/health").status_code == 200
        gate.open.clear()
        stream = server.client().completions.create(**LONG, stream=True)
        gate.error = KeyError("oh")
        gate.open.set()
        with pytest.raises(openai.APIError, match="the service broke: KeyError: 'oh'"):
            list(stream)
        for answer in (server.http.get("/health"), server.http.post("/v1/completions", json=LONG)):
            assert answer.status_code == 503
            assert "the service broke: KeyError: 'oh' (start it again)" in answer.json()["error"]["message"]
        assert server.metric("fasa_healthy") == 0 and server.metric("fasa_answers_in_flight") == 0
        assert server.http.get("/version").status_code == 200


def test_stop_lets_answers_end(service: Service, alone: Engine, gate: Gate) -> None:
    with running(service) as server:
        gate.open.clear()
        stream = server.client().completions.create(**LONG, stream=True)
        texts: list[str] = []
        reader = threading.Thread(target=lambda: texts.extend(chunk.choices[0].text for chunk in stream))
        reader.start()
        threading.Timer(0.3, gate.open.set).start()
    reader.join(30)
    assert "".join(texts) == alone.generate("a", max_new_tokens=10**4)[0].text
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_stop_waits_no_longer_than_its_time(service: Service, gate: Gate) -> None:
    gate.open.clear()
    started = time.monotonic()
    with running(service, shutdown_timeout=1) as server:
        stream = server.client().completions.create(**LONG, stream=True)
    assert time.monotonic() - started < 10
    with pytest.raises((httpx.HTTPError, openai.APIError)):
        list(stream)
    gate.open.set()
    until(lambda: service.num_requests == 0)
