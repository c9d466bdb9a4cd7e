"""`fasa-trt triton-repo` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.core.engines_on_disk import build


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    build(tmp_path / "engine")
    return tmp_path / "engine"


def test_writes_a_repository(cli: Cli, engine: Path, tmp_path: Path) -> None:
    options = ("--gpus", "0,2", "--instances", 2, "--max-requests", 5, "--kv-fraction", 0.5, "--no-streaming")
    done = cli("triton-repo", engine, "-o", tmp_path / "models", *options)
    assert done.status == 0, done.err
    assert "wrote" in done.err and str(tmp_path / "models" / "start.sh") in done.err.replace("\n", "")
    config = (tmp_path / "models" / "fasa" / "config.pbtxt").read_text()
    for line in ("count: 2", "kind: KIND_GPU", "gpus: 0", "gpus: 2", "decoupled: false", 'string_value: "5"'):
        assert line in config
    again = cli("triton-repo", engine, "-o", tmp_path / "models", "--copy", "--force", "--json")
    assert json.loads(again.out) == {"repository": str(tmp_path / "models"), "models": ["fasa"]}
    assert (tmp_path / "models" / "fasa" / "1" / "engine" / "manifest.json").is_file()


def test_refusals(cli: Cli, engine: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    cli("triton-repo", tmp_path / "none", "-o", models).refused("is not an engine directory", "fasa-trt build")
    cli("triton-repo", engine, "-o", models, "--gpus", "a").refused("--gpus a is not a list of numbers")
    cli("triton-repo", engine, "-o", models, "--instances", 0).refused("instances must be at least 1")
    cli("triton-repo", engine, "-o", engine, "--force").refused("is not a repository of fasa-trt's")
    assert not models.exists()
