"""A server on a free loopback port over an engine of the sample model."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.engine import build_engine
from fasa_trt.runtime.generate import Engine, load
from fasa_trt.runtime.service import Service
from fasa_trt.serving.openai.app import Settings, create_app
from fasa_trt.serving.openai.server import listen, url_of, uvicorn_server
from tests.engines import random_profile

MAX_SEQ_LEN, MAX_BATCH_SIZE = 192, 8
MODEL = "tiny"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'developer' %}{{ raise_exception('no developers here') }}{% endif %}"
    "# {{ message.role }}{% if message.name %} {{ message.name }}{% endif %}: {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}def {% endif %}"
)


@dataclass(frozen=True)
class Running:
    """A server that runs; http knows its URL."""

    url: str
    http: httpx.Client
    service: Service

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60, **options})

    def metric(self, sample: str) -> float:
        """The value of a sample, such as 'fasa_answers_total{finish_reason="stop"}'; 0 when it is not there yet."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{sample} "))


@contextmanager
def running(service: Service, *, shutdown_timeout: int = 20, **settings: Any) -> Iterator[Running]:
    app = create_app(service, Settings(**{"model_name": MODEL, **settings}))
    server = uvicorn_server(app, shutdown_timeout=shutdown_timeout, access_log=False)
    with listen("127.0.0.1", 0) as listening:
        url = url_of(listening)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()  # until it is ready, connections wait in the socket
        try:
            with httpx.Client(base_url=url, timeout=60) as http:
                yield Running(url, http, service)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="package")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine whose chunk ranking is random: sparse steps choose badly, but by the same code."""
    tiny = Path(__file__).parents[3] / "examples" / "models" / "fasa-tiny"
    checkpoint = open_checkpoint(tiny)
    flags = {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": MAX_BATCH_SIZE, "budget": 48, "sink": 2, "recent": 8}
    config = BuildConfig.resolve(checkpoint, flags=flags)
    path = tmp_path_factory.mktemp("serving") / MODEL
    return build_engine(checkpoint, random_profile(checkpoint), config, path).path


@pytest.fixture(scope="package")
def alone(engine_dir: Path) -> Engine:
    """A second engine, for texts that nothing else is computed beside."""
    return load(engine_dir, threads=1)


@pytest.fixture(scope="package")
def service(engine_dir: Path) -> Iterator[Service]:
    with Service(load(engine_dir, threads=1)) as service:
        yield service


@pytest.fixture(scope="package")
def chat_service(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The same engine with a chat template."""
    path = tmp_path_factory.mktemp("chat") / MODEL
    shutil.copytree(engine_dir, path)
    engine = load(path, threads=1)
    engine.tokenizer.chat_template = CHAT_TEMPLATE
    with Service(engine) as service:
        yield service


@pytest.fixture(scope="package")
def server(service: Service) -> Iterator[Running]:
    with running(service) as server:
        yield server


@pytest.fixture(scope="package")
def chat_server(chat_service: Service) -> Iterator[Running]:
    with running(chat_service) as server:
        yield server
