"""Writing a repository: all of it or nothing, and never over something else."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from fasa_trt.core.engine_dir import open_engine
from fasa_trt.core.errors import FasaError
from fasa_trt.serving.triton.options import RepositoryOptions
from fasa_trt.serving.triton.repository import RECORD, write_repository
from tests.core.engines_on_disk import build

OPTIONS = RepositoryOptions()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    build(tmp_path / "engine")
    return tmp_path / "engine"


def names(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def test_engine_is_referred_to(small: Path, tmp_path: Path) -> None:
    made = write_repository(small, tmp_path / "models", OPTIONS)
    assert made.models == ("fasa",)
    assert names(made.path) == {"fasa/config.pbtxt", "fasa/1/model.py", "start.sh", RECORD}
    assert f'string_value: "{small}"' in (made.path / "fasa" / "config.pbtxt").read_text()
    record = json.loads((made.path / RECORD).read_text())
    assert (record["engine"], record["target"], record["copied"]) == (str(small), "onnxruntime", False)
    assert os.access(made.path / "start.sh", os.X_OK) and made.path.stat().st_mode & 0o777 == 0o755
    assert {path.name for path in tmp_path.iterdir()} == {"engine", "models"}


def test_engine_is_copied(small: Path, tmp_path: Path) -> None:
    made = write_repository(small, tmp_path / "models", OPTIONS, copy=True)
    assert 'string_value: "engine"' in (made.path / "fasa" / "config.pbtxt").read_text()
    shutil.rmtree(small)
    moved = made.path.rename(tmp_path / "elsewhere")
    assert open_engine(moved / "fasa" / "1" / "engine").target == "onnxruntime"


def test_force_replaces_repositories_alone(small: Path, tmp_path: Path) -> None:
    models, other = tmp_path / "models", tmp_path / "other"
    write_repository(small, models, OPTIONS)
    with pytest.raises(FasaError, match="exists already"):
        write_repository(small, models, OPTIONS)
    (models / "left.txt").write_text("of the old one")
    write_repository(small, models, RepositoryOptions(max_requests=3), force=True)
    assert not (models / "left.txt").exists()
    assert 'string_value: "3"' in (models / "fasa" / "config.pbtxt").read_text()
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(FasaError, match="is not a repository of fasa-trt's, so --force does not replace it"):
        write_repository(small, other, OPTIONS, force=True)
    (other / "mine.txt").unlink()
    assert write_repository(small, other, OPTIONS).path == other  # it is empty


def test_unsound_engine_and_bad_places(small: Path, tmp_path: Path) -> None:
    for engine, output, reason in (
        (tmp_path / "none", tmp_path / "models", "is not an engine directory"),
        (small, small / "models", "lie in each other"),
    ):
        with pytest.raises(FasaError, match=reason):
            write_repository(engine, output, OPTIONS)
    (small / "model.onnx").write_bytes(b"other")
    with pytest.raises(FasaError, match="is not the file that was built"):
        write_repository(small, tmp_path / "models", OPTIONS)
    assert {path.name for path in tmp_path.iterdir()} == {"engine"}


@pytest.mark.parametrize("exists", [False, True])
def test_full_disk_leaves_what_was_there(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    models = tmp_path / "models"
    if exists:
        write_repository(small, models, OPTIONS)
    before = names(models)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(FasaError, match="No space left on device"):
        write_repository(small, models, OPTIONS, copy=True, force=True)
    assert names(models) == before
    assert {path.name for path in tmp_path.iterdir()} == ({"engine", "models"} if exists else {"engine"})


def test_options_out_of_range() -> None:
    for options, reason in (
        ({"instances": 0}, "instances must be at least 1"),
        ({"max_requests": 0}, "max-requests must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"kv_fraction": 1.5}, "kv-fraction 1.5 is out of range"),
        ({"gpus": (0, 0)}, "gpus must be different numbers"),
        ({"gpus": (-1,)}, "gpus must be different numbers"),
    ):
        with pytest.raises(FasaError, match=reason):
            RepositoryOptions(**options)
