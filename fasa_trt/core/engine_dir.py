"""The engine directory: what a build writes and every runtime loads.

    config.json            the model's shape, build limits and, under "fasa", all that a runtime needs to know
    model.onnx (+ .data)   or model.rtx, rank0.engine: the target's own file
    profile.safetensors    the calibration that the engine was baked from
    tokenizer files        as in the checkpoint
    manifest.json          sha256 of every file above, versions, the command

A *prepared* directory is one whose build stopped before the engine: config.json already names the target's file, and
the ONNX model is there in its place.

It is written to a temporary sibling and renamed when complete, so a build that dies leaves nothing that could be
mistaken for an engine; the next build of the same directory sweeps the sibling away.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fasa_trt.core.atomic import replace_directory
from fasa_trt.core.errors import FasaError
from fasa_trt.core.spec import SparseSpec

CONFIG = "config.json"
MANIFEST = "manifest.json"
PROFILE = "profile.safetensors"
ONNX_FILES = ("model.onnx", "model.onnx.data")
SCHEMA = 1


@dataclass(frozen=True)
class EngineDirectory:
    """A complete engine directory that has been opened. config: the parsed config.json."""

    path: Path
    config: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def fasa(self) -> dict[str, Any]:
        section: dict[str, Any] = self.config["fasa"]
        return section

    @property
    def target(self) -> str:
        return str(self.fasa["target"])

    @property
    def model_file(self) -> Path:
        return self.path / str(self.fasa["model_file"])

    @property
    def spec(self) -> SparseSpec:
        return SparseSpec.from_json(self.fasa["sparse"])

    @property
    def head_dim(self) -> int:
        return int(self.config["pretrained_config"]["head_size"])

    @property
    def max_seq_len(self) -> int:
        return int(self.config["build_config"]["max_seq_len"])

    @property
    def max_batch_size(self) -> int:
        return int(self.config["build_config"]["max_batch_size"])


def open_engine(path: str | Path, *, verify: bool = True, prepared: bool = False) -> EngineDirectory:
    """Opens and checks a directory that `write_engine` made.

    verify: compare every file's sha256 with the manifest (reads all of the weights once). prepared: whether it must
    be one whose build stopped before the engine; otherwise it must not.
    Raises FasaError when there is no engine, a file is missing or was changed, or the schema is another version's.
    """
    path = Path(path)
    manifest = _read_json(path, MANIFEST)
    try:
        if manifest["schema"] != SCHEMA:
            raise FasaError(
                f"{path} has engine schema {manifest['schema']}, this version reads {SCHEMA}", hint="build it again"
            )
        listed: dict[str, dict[str, Any]] = manifest["files"]
        for name, entry in listed.items():
            if Path(name).name != name:
                raise FasaError(f"{path / MANIFEST} names a file outside its directory: {name}")
            file = path / name
            if not file.is_file():
                raise FasaError(f"{path} is incomplete: {name} is missing", hint="build the engine again")
            if file.stat().st_size != entry["bytes"] or (verify and sha256(file) != entry["sha256"]):
                raise FasaError(f"{file} is not the file that was built", hint="it was changed; build the engine again")
        if CONFIG not in listed:
            raise FasaError(f"{path / MANIFEST} does not list {CONFIG}", hint="build the engine again")
    except (KeyError, TypeError, AttributeError):
        raise FasaError(f"{path / MANIFEST} is not an engine manifest", hint="build the engine again") from None
    except OSError as error:
        raise FasaError(f"cannot read {error.filename}: {error.strerror or error}") from None
    engine = EngineDirectory(path, _read_json(path, CONFIG), manifest)
    try:
        _ = engine.spec, engine.target, engine.max_seq_len, engine.max_batch_size
        model_file = str(engine.fasa["model_file"])
    except KeyError as error:
        raise FasaError(f"{path / CONFIG} lacks {error}", hint="build the engine again") from None
    except (FasaError, TypeError, ValueError, AttributeError) as error:
        raise FasaError(f"{path / CONFIG} is not an engine's: {error}", hint="build the engine again") from None
    if prepared and (model_file in listed or ONNX_FILES[0] not in listed):
        raise FasaError(f"{path} holds no model to be built", hint="make it with fasa-trt build --stop-before-engine")
    if prepared:
        return engine
    if model_file not in listed and ONNX_FILES[0] in listed:
        raise FasaError(
            f"{path} stops before the engine: {model_file} is not built yet",
            hint=f"fasa-trt build --from-onnx {path} -o engine, on the machine that has the GPU",
        )
    if model_file not in listed:
        raise FasaError(f"{path / MANIFEST} does not list {model_file}", hint="build the engine again")
    return engine


@contextlib.contextmanager
def write_engine(path: Path, *, force: bool, facts: dict[str, Any]) -> Iterator[Path]:
    """Yields an empty directory to fill; when the block ends well, adds the manifest and puts it at `path`.

    force: replace an engine that is already there. facts: for the manifest (versions, command).
    Raises FasaError when `path` exists, cannot be written, or another build is writing it.
    """
    path = Path(os.path.abspath(path))
    check_replaceable(path, force)
    building = path.with_name(f".{path.name}.building")
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise FasaError(f"another build is writing {path}", hint="wait for it, or choose another -o") from None
    except OSError as error:
        raise FasaError(
            f"cannot write {path}: {error.strerror or error}", hint="check the directory's permissions"
        ) from None
    try:
        shutil.rmtree(building, ignore_errors=True)  # of a build that was killed
        building.mkdir()
        yield building
        files = sorted(file for file in building.iterdir() if file.is_file())
        manifest = {
            "schema": SCHEMA,
            **facts,
            "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files},
        }
        (building / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
        check_replaceable(path, force)  # again: the build may have taken hours
        replace_directory(building, path)
    except OSError as error:
        raise FasaError(
            f"cannot write {path}: {error.strerror or error}", hint="check permissions and free disk space"
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
        with contextlib.suppress(OSError):  # Windows removes it at the release
            Path(lock.lock_file).unlink()  # while it is held: a moment later it may be another build's
        lock.release()


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_replaceable(path: Path, force: bool) -> None:
    """Raises FasaError when a build may not write `path`; to be asked before the long work."""
    if not path.exists():
        return
    if not force:
        raise FasaError(f"{path} exists already", hint="choose another -o, or replace it with --force")
    empty = path.is_dir() and not any(path.iterdir())
    if not empty and not (path / MANIFEST).is_file():
        raise FasaError(f"{path} is not an engine directory, so --force does not replace it", hint="choose another -o")


def _read_json(path: Path, name: str) -> dict[str, Any]:
    file = path / name
    if not file.is_file():
        raise FasaError(f"{path} is not an engine directory: it has no {name}", hint="make one with fasa-trt build")
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise FasaError(f"cannot read {file}: {error.strerror or error}") from None
    except ValueError as error:
        raise FasaError(f"{file} is not valid JSON: {error}", hint="build the engine again") from None
    if not isinstance(content, dict):
        raise FasaError(f"{file} is not a JSON object", hint="build the engine again")
    return content
