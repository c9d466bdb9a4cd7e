"""No damaged engine directory is opened, and each is refused in one line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasa_trt.core.engine_dir import open_engine
from fasa_trt.core.errors import FasaError
from tests.core.engines_on_disk import CONFIG, build


def refused(path: Path, *words: str, verify: bool = True) -> None:
    with pytest.raises(FasaError) as caught:
        open_engine(path, verify=verify)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "is not an engine directory: it has no manifest.json", "fasa-trt build")
    refused(tmp_path, "is not an engine directory")


@pytest.mark.parametrize("name", ["model.onnx", "config.json"])
@pytest.mark.parametrize("verify", [True, False])
def test_missing_file(name: str, verify: bool, engine: Path) -> None:
    (engine / name).unlink()
    refused(engine, f"is incomplete: {name} is missing", "build the engine again", verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_truncated_file(verify: bool, engine: Path) -> None:
    (engine / "model.onnx").write_bytes(b"mode")
    refused(engine, "model.onnx is not the file that was built", "it was changed", verify=verify)


def test_same_size_other_bytes(engine: Path) -> None:
    (engine / "model.onnx").write_bytes(b"modem")
    with pytest.raises(FasaError, match=r"model\.onnx is not the file that was built .*it was changed"):
        open_engine(engine)
    assert open_engine(engine, verify=False).path == engine


def edit_manifest(engine: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((engine / "manifest.json").read_text("utf-8"))
    change(content)
    (engine / "manifest.json").write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", ".."])
def test_manifest_that_points_outside(name: str, engine: Path) -> None:
    (engine.parent / "x").write_bytes(b"")
    digest = hashlib.sha256(b"").hexdigest()
    edit_manifest(engine, lambda manifest: manifest["files"].update({name: {"bytes": 0, "sha256": digest}}))
    refused(engine, name)


def test_other_schema(engine: Path) -> None:
    """Told as such even if nothing else is as this version knows it."""
    (engine / "manifest.json").write_text('{"schema": 2, "contents": []}', "utf-8")
    refused(engine, "has engine schema 2, this version reads 1", "build it again")


@pytest.mark.parametrize("content", ["", "{", "\x00"])
def test_manifest_is_not_json(content: str, engine: Path) -> None:
    (engine / "manifest.json").write_text(content, "utf-8")
    refused(engine, "manifest.json is not valid JSON", "build the engine again")


@pytest.mark.parametrize("content", [[], 3, None])
def test_manifest_is_no_object(content: Any, engine: Path) -> None:
    (engine / "manifest.json").write_text(json.dumps(content), "utf-8")
    refused(engine, "manifest.json is not a JSON object")


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"schema": 1},
        {"schema": 1, "files": []},
        {"schema": 1, "files": None},
        {"schema": 1, "files": {"model.onnx": {}}},
        {"schema": 1, "files": {"model.onnx": None}},
        {"schema": 1, "files": {"model.onnx": {"bytes": 5}}},
    ],
)
def test_manifest_is_garbage(content: Any, engine: Path) -> None:
    (engine / "manifest.json").write_text(json.dumps(content), "utf-8")
    refused(engine, "manifest.json is not an engine manifest")


def test_manifest_without_config(engine: Path) -> None:
    edit_manifest(engine, lambda manifest: manifest["files"].pop("config.json"))
    refused(engine, "manifest.json does not list config.json")


def with_fasa(**changes: Any) -> dict[str, Any]:
    return {**CONFIG, "fasa": {**CONFIG["fasa"], **changes}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "config",
    [
        {key: value for key, value in CONFIG.items() if key != "fasa"},
        {key: value for key, value in CONFIG.items() if key != "build_config"},
        {**CONFIG, "build_config": {"max_seq_len": 64}},
        {**CONFIG, "build_config": {"max_seq_len": "long", "max_batch_size": 2}},
        {**CONFIG, "build_config": {"max_seq_len": None, "max_batch_size": 2}},
        {**CONFIG, "build_config": []},
        {**CONFIG, "fasa": []},
        {**CONFIG, "fasa": None},
        with_fasa(sparse={"budget": 3}),
        with_fasa(sparse=None),
        [],
    ],
)
def test_config_is_garbage(config: Any, tmp_path: Path) -> None:
    build(tmp_path / "engine", config=config)
    refused(tmp_path / "engine", "config.json", "build the engine again")


@pytest.mark.parametrize("name", ["../model.onnx", "other.onnx"])
def test_model_file_that_the_manifest_does_not_vouch_for(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"foreign")
    build(tmp_path / "engine", config=with_fasa(model_file=name))
    (tmp_path / "engine" / "other.onnx").write_bytes(b"foreign")
    refused(tmp_path / "engine", name)


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "model.onnx"])
def test_unreadable_file(name: str, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def protect(method: Any) -> Any:
        def guarded(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.name == name:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return method(path, *arguments, **options)

        return guarded

    monkeypatch.setattr(Path, "open", protect(Path.open))
    monkeypatch.setattr(Path, "read_text", protect(Path.read_text))
    refused(engine, f"cannot read {engine / name}: {os.strerror(errno.EACCES)}")


def test_a_build_that_stopped_before_the_engine(engine: Path) -> None:
    """The ONNX model is there, what config.json names is not."""
    content = json.loads((engine / "config.json").read_text("utf-8"))
    content["fasa"]["model_file"] = "rank0.engine"
    (engine / "config.json").write_text(json.dumps(content), "utf-8")
    digest = hashlib.sha256((engine / "config.json").read_bytes()).hexdigest()
    size = (engine / "config.json").stat().st_size
    edit_manifest(engine, lambda manifest: manifest["files"].update({"config.json": {"bytes": size, "sha256": digest}}))
    refused(engine, "stops before the engine: rank0.engine is not built yet", "fasa-trt build --from-onnx")
    assert open_engine(engine, prepared=True).model_file == engine / "rank0.engine"


def test_an_engine_is_not_to_be_built_again(engine: Path) -> None:
    with pytest.raises(FasaError, match=r"holds no model to be built .*--stop-before-engine"):
        open_engine(engine, prepared=True)
