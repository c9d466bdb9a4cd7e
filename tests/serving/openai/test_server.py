"""Where a server can listen, what it counts, and what it says of itself."""

from __future__ import annotations

import socket

import pytest

import fasa_trt
from fasa_trt.core.errors import FasaError
from fasa_trt.serving.openai.server import is_loopback, listen, url_of
from tests.serving.openai.conftest import MODEL, Running


def test_listen_on_a_free_port() -> None:
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        assert url_of(listening) == f"http://127.0.0.1:{port}" and is_loopback(listening)
        assert listening.proto == socket.IPPROTO_TCP, "asyncio switches Nagle's algorithm off for these alone"
        with socket.create_connection(("127.0.0.1", port)):
            pass
        with pytest.raises(FasaError, match=rf"cannot listen on 127.0.0.1 port {port}: .* .choose another"):
            listen("127.0.0.1", port)


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_listen_on_ipv6() -> None:
    try:
        listening = listen("::1", 0)
    except FasaError as error:
        pytest.skip(str(error))
    with listening:
        assert url_of(listening) == f"http://[::1]:{listening.getsockname()[1]}" and is_loopback(listening)


def test_all_addresses_are_not_loopback() -> None:
    with listen("0.0.0.0", 0) as listening:
        assert not is_loopback(listening)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.1", "a" * 70, "\ud800"])
def test_hosts_that_are_not_ours(host: str) -> None:
    with pytest.raises(FasaError, match="cannot listen on "):
        listen(host, 0)


@pytest.mark.parametrize("port", [-1, 65536])
def test_ports_that_are_none(port: int) -> None:
    with pytest.raises(FasaError, match=f"port {port} is not possible"):
        listen("127.0.0.1", port)


def test_version(server: Running) -> None:
    assert server.http.get("/version").json() == {"version": fasa_trt.__version__}


def test_unknown_paths_and_methods(server: Running) -> None:
    for answer, status in (
        (server.http.get("/v1/nothing"), 404),
        (server.http.get("/docs"), 404),
        (server.http.get("/v1/completions"), 405),
    ):
        assert answer.status_code == status
        assert str(answer.request.url.path) in answer.json()["error"]["message"]


def test_metrics(server: Running) -> None:
    names = (
        'fasa_http_requests_total{route="/v1/completions",status="200"}',
        'fasa_http_requests_total{route="none",status="404"}',
        'fasa_answers_total{finish_reason="length"}',
        "fasa_prompt_tokens_total",
        "fasa_generated_tokens_total",
        "fasa_time_to_first_text_seconds_count",
        "fasa_answer_seconds_count",
    )
    before = [server.metric(name) for name in names]
    answer = server.client().completions.create(model=MODEL, prompt="import os", n=2, max_tokens=5, temperature=0)
    server.http.get("/nowhere")
    grown = [server.metric(name) - was for name, was in zip(names, before, strict=True)]
    assert answer.usage is not None
    assert grown == [1, 1, 2, 2 * answer.usage.prompt_tokens, 10, 2, 2]
    assert server.metric("fasa_healthy") == 1 and server.metric("fasa_answers_in_flight") == 0
