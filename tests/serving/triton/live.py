"""A real tritonserver, from the nvidia-pytriton package, and what tests ask of it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

# The server's Python process needs numpy 1.26, from here: see `environment`.
NUMPY = Path(sys.prefix) / "triton"
MISSING = [name for name in ("pytriton", "tritonclient") if importlib.util.find_spec(name) is None]
MISSING += [] if (NUMPY / "numpy").is_dir() else [f"numpy 1.26 in {NUMPY}"]
needs_server = pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: see CONTRIBUTING.md")
START_SECONDS = 60
EXPLICIT = ("--model-control-mode=explicit", "--load-model=*")  # models may be loaded and unloaded by clients


def environment(path: Path) -> Path:
    """Makes an environment like this one, but for its numpy. Returns its Python."""
    venv.create(path, symlinks=True)
    site = sysconfig.get_path("purelib", vars={"base": str(path)})
    lines = (NUMPY, f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})")
    (Path(site) / "tests.pth").write_text("".join(f"{line}\n" for line in lines))
    return path / "bin" / "python"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Triton:
    """A server that runs, on loopback."""

    process: subprocess.Popen[bytes]
    log: Path
    http: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    grpc: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    metrics: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")

    def post(self, path: str, body: bytes | dict[str, Any], timeout: float = 60) -> tuple[int, Any]:
        """Status and parsed body."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{self.http}/v2/{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                status, content = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        return status, json.loads(content) if content else None

    def generate(self, model: str = "fasa", **fields: Any) -> dict[str, Any]:
        status, answer = self.post(f"models/{model}/generate", fields)
        assert status == 200, answer
        assert isinstance(answer, dict)
        return answer

    def refused(self, model: str = "fasa", **fields: Any) -> tuple[int, str]:
        status, answer = self.post(f"models/{model}/generate", fields)
        return status, str(answer["error"])

    def count(self, metric: str, **labels: str) -> float:
        """A metric of the model, summed over what the labels leave open."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        wanted = [f'{name}="{value}"' for name, value in labels.items()]
        found = [line for line in lines if line.startswith(f"{metric}{{") and all(label in line for label in wanted)]
        assert found, f"no {metric} with {labels}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def stubs(self) -> list[int]:
        """Processes that run models."""
        listed = subprocess.run(
            ["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True
        ).stdout
        rows = (line.split(None, 2) for line in listed.splitlines()[1:])
        mine = str(self.process.pid)
        return [int(pid) for pid, parent, args in rows if parent == mine and "triton_python_backend_stub" in args]

    def stop(self) -> int:
        """As a supervisor would. Returns the exit status."""
        self.process.terminate()
        return self.process.wait(40)


@contextlib.contextmanager
def serving(python: Path, repository: Path, log: Path, *options: str) -> Iterator[Triton]:
    """Starts the repository's start script and waits until its models are ready."""
    ports = [free_port() for _ in range(3)]
    names = ("--http-port", "--grpc-port", "--metrics-port")
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [
                repository / "start.sh",
                *(f"{name}={port}" for name, port in zip(names, ports, strict=True)),
                "--exit-timeout-secs=3",  # what it waits at its end for models whose process was killed
                *options,
            ],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHON": str(python), "PYTHONDONTWRITEBYTECODE": "1"},
        )
    triton = Triton(process, log, *(f"127.0.0.1:{port}" for port in ports))
    try:
        wait_until(lambda: ready(triton), START_SECONDS, triton)
        yield triton
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ready(triton: Triton) -> bool:
    assert triton.process.poll() is None, triton.log.read_text(errors="replace")[-4000:]
    try:
        with urllib.request.urlopen(f"http://{triton.http}/v2/health/ready", timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def wait_until(condition: Any, seconds: float, triton: Triton) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, triton.log.read_text(errors="replace")[-4000:]
        time.sleep(0.05)
