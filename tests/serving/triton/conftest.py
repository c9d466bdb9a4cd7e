"""Fixtures of the tests against a real tritonserver: engine, repository, server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.engine import build_engine
from fasa_trt.runtime.generate import Engine, load
from fasa_trt.serving.triton.options import RepositoryOptions
from fasa_trt.serving.triton.repository import write_repository
from tests.engines import random_profile
from tests.serving.triton.live import EXPLICIT, Triton, environment, serving

MAX_SEQ_LEN = 512


@pytest.fixture(scope="session")
def engine_path(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An onnxruntime engine of the sample model."""
    checkpoint = open_checkpoint(tiny_dir)
    config = BuildConfig.resolve(checkpoint, flags={"budget": 64, "max_seq_len": MAX_SEQ_LEN})
    path = tmp_path_factory.mktemp("triton") / "engine"
    return build_engine(checkpoint, random_profile(checkpoint), config, path).path


@pytest.fixture(scope="session")
def engine(engine_path: Path) -> Engine:
    """The same, loaded here: what a server's answers must be equal to."""
    return load(engine_path, threads=1, provider="cpu")


@pytest.fixture(scope="session")
def server_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("python") / "env")


@pytest.fixture(scope="session")
def repository(engine_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repositories") / "models"
    return write_repository(engine_path, path, RepositoryOptions(threads=1)).path


@pytest.fixture(scope="session")
def triton(server_python: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """Serves `repository` for all tests of this process."""
    with serving(server_python, repository, tmp_path_factory.mktemp("log") / "server.log", *EXPLICIT) as running:
        yield running
