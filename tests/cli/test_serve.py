"""`fasa-trt serve`: what it says, what it refuses, and how a process of it starts and ends."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.engine import build_engine
from fasa_trt.serving.openai import app, server
from tests.cli.conftest import Cli
from tests.engines import random_profile
from tests.models import make_model


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A random Llama with the sample model's tokenizer."""
    model = make_model("llama", tmp_path_factory.mktemp("model"), vocab_size=2048, max_position_embeddings=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_dir / name, model / name)
    checkpoint = open_checkpoint(model)
    config = BuildConfig.resolve(checkpoint, flags={"max_seq_len": 2048, "max_batch_size": 2, "budget": 48})
    return build_engine(checkpoint, random_profile(checkpoint), config, tmp_path_factory.mktemp("x") / "small").path


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would have been served, had it not been for this fixture."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(app, "create_app", lambda service, settings: seen.update(settings=settings))
    monkeypatch.setattr(server, "run", lambda app, listening, **options: seen.update(options))
    return seen


def test_defaults(cli: Cli, engine: Path, served: dict[str, Any]) -> None:
    result = cli("serve", engine, "--port", 0)
    assert result.status == 0, result.err
    assert served["settings"] == app.Settings("small", None, app.MAX_QUEUE, app.MAX_BODY_BYTES)
    assert served["shutdown_timeout"] == 30 and not served["access_log"]
    assert "serving small on http://127.0.0.1:" in result.err and "warning" not in result.err


def test_options(cli: Cli, engine: Path, served: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASA_API_KEY", "s3cret")
    options = ("--model-name", "m", "--max-queue", 3, "--max-body", 2, "--shutdown-timeout", 5, "--access-log")
    result = cli("serve", engine, "--port", 0, "--host", "0.0.0.0", *options)
    assert result.status == 0, result.err
    assert served["settings"] == app.Settings("m", "s3cret", 3, 2 * 2**20)
    assert served["shutdown_timeout"] == 5 and served["access_log"]
    assert "warning" not in result.err and "s3cret" not in result.err + result.out


def test_open_address_without_a_key_is_said(cli: Cli, engine: Path, served: dict[str, Any]) -> None:
    result = cli("serve", engine, "--port", 0, "--host", "0.0.0.0")
    assert result.status == 0 and "warning: no API key" in result.err


def test_refused(cli: Cli, engine: Path, tmp_path: Path, served: dict[str, Any]) -> None:
    cli("serve", tmp_path / "nowhere", "--port", 0).refused("is not an engine directory", "fasa-trt build")
    cli("serve", engine, "--port", 0, "--api-key", "").refused("the API key is empty")
    cli("serve", engine, "--port", 0, "--threads", 0).refused("threads must be at least 1")
    cli("serve", engine, "--port", 99999).refused("port 99999 is not possible")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        cli("serve", engine, "--port", port).refused(f"cannot listen on 127.0.0.1 port {port}", "choose another")
    assert not served


def test_port_in_use_is_told_before_the_engine_loads(cli: Cli, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        cli("serve", tmp_path / "nowhere", "--port", other.getsockname()[1]).refused("cannot listen")


def test_without_its_packages(cli: Cli, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("fasa_trt.serving", "fastapi"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    cli("serve", engine).refused("serving needs fastapi", "pip install fasa-trt[serve]")


@pytest.fixture
def process(engine: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its URL."""
    command = [sys.executable, "-m", "fasa_trt.cli.main", "serve", str(engine), "--port", "0", "--threads", "1"]
    # A shell's background job, as a test run may be one, hands down that interrupts are ignored.
    heed = None if os.name == "nt" else partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8", preexec_fn=heed)
    assert process.stderr is not None
    try:
        yield process, "http://" + process.stderr.readline().partition("http://")[2].strip()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a process could take notice of")
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_answers_end(process: tuple[subprocess.Popen[str], str], signal_number: int) -> None:
    running, url = process
    body = {"prompt": "a", "max_tokens": 300, "ignore_eos": True, "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{url}/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        running.send_signal(signal_number)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
    timer = threading.Timer(30, running.kill)
    timer.start()
    _, err = running.communicate()
    timer.cancel()
    assert running.returncode == (-signal.SIGTERM if signal_number == signal.SIGTERM else 130)
    assert "Traceback" not in err
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/models")
