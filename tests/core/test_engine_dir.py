"""All of an engine or nothing: killed builds, full disks, builds side by side."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fasa_trt.core.engine_dir import check_replaceable, open_engine, sha256, write_engine
from fasa_trt.core.errors import FasaError
from fasa_trt.core.spec import SparseSpec
from tests.core.engines_on_disk import CONFIG, build, fill, model_of


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- a build that ends well ---


def test_written_and_opened(tmp_path: Path) -> None:
    build(tmp_path / "new" / "folder" / "engine")
    assert names(tmp_path / "new" / "folder") == ["engine"]
    engine = open_engine(tmp_path / "new" / "folder" / "engine")
    assert names(engine.path) == ["config.json", "manifest.json", "model.onnx"]
    assert (engine.target, engine.model_file.name) == ("onnxruntime", "model.onnx")
    assert (engine.max_seq_len, engine.max_batch_size) == (64, 2)
    assert engine.spec == SparseSpec(budget=40)
    assert engine.config == CONFIG


def test_manifest(engine: Path) -> None:
    manifest = json.loads((engine / "manifest.json").read_text("utf-8"))
    assert manifest["schema"] == 1 and manifest["command"] == "fasa-trt build"
    assert sorted(manifest["files"]) == ["config.json", "model.onnx"]
    assert manifest["files"]["model.onnx"] == {"bytes": 5, "sha256": hashlib.sha256(b"model").hexdigest()}


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256(size: int, tmp_path: Path) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_facts_may_be_added_while_building(tmp_path: Path) -> None:
    facts: dict[str, Any] = {}
    with write_engine(tmp_path / "engine", force=False, facts=facts) as directory:
        fill(directory)
        facts["late"] = 3
    assert open_engine(tmp_path / "engine").manifest["late"] == 3


def test_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It means where the build began."""
    monkeypatch.chdir(tmp_path)
    with write_engine(Path("engine"), force=False, facts={}) as directory:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
        fill(directory)
    monkeypatch.chdir(tmp_path)
    assert open_engine("engine").model_file.read_bytes() == b"model"
    assert names(tmp_path) == ["elsewhere", "engine"]


# --- replacing ---


def test_refused_before_the_work_begins(engine: Path) -> None:
    with (
        pytest.raises(FasaError, match="exists already"),
        write_engine(engine, force=False, facts={}),
    ):
        pytest.fail("the build ran")


def test_existing_engine_is_kept_without_force(engine: Path) -> None:
    with pytest.raises(FasaError, match=r"engine exists already \(choose another -o, or replace it with --force\)"):
        build(engine, model=b"other")
    assert model_of(engine) == b"model"
    assert names(engine.parent) == ["engine"]


def test_force_replaces_an_engine(engine: Path) -> None:
    (engine / "leftover").write_bytes(b"")
    build(engine, force=True, model=b"other")
    assert model_of(engine) == b"other"
    assert names(engine) == ["config.json", "manifest.json", "model.onnx"]
    assert names(engine.parent) == ["engine"]


def test_remains_of_an_earlier_replacement_are_swept(engine: Path) -> None:
    """Of a build that was killed after the new engine had taken its place."""
    old = engine.with_name(".engine.old")
    old.mkdir()
    (old / "model.onnx").write_bytes(b"older")
    build(engine, force=True, model=b"other")
    assert model_of(engine) == b"other"
    assert names(engine.parent) == ["engine"]


def test_force_on_a_new_path(tmp_path: Path) -> None:
    build(tmp_path / "engine", force=True)
    assert model_of(tmp_path / "engine") == b"model"


def test_force_fills_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    build(tmp_path / "engine", force=True)
    assert model_of(tmp_path / "engine") == b"model"


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_force_replaces_nothing_but_engines(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    file = path if kind == "file" else path / "thesis.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text("words", "utf-8")
    for attempt in (lambda: check_replaceable(path, force=True), lambda: build(path, force=True)):
        with pytest.raises(FasaError, match=r"precious is not an engine directory, so --force does not replace it"):
            attempt()
    assert file.read_text("utf-8") == "words"
    assert names(tmp_path) == ["precious"]


def test_path_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FasaError, match="cannot write .*engine"):
        build(tmp_path / "file" / "engine")


# --- a build that fails ---


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), FasaError("unsupported")])
@pytest.mark.parametrize("force", [False, True])
def test_failure_leaves_what_was_there(error: BaseException, force: bool, tmp_path: Path) -> None:
    path = tmp_path / "engine"
    if force:
        build(path, model=b"old")
    with (
        pytest.raises(type(error)) as caught,
        write_engine(path, force=force, facts={}) as directory,
    ):
        fill(directory)
        raise error
    assert caught.value is error
    assert names(tmp_path) == (["engine"] if force else [])
    if force:
        assert model_of(path) == b"old"


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("step", ["write_bytes", "write_text", "mkdir", "rename"])
@pytest.mark.parametrize("force", [False, True])
def test_full_disk_leaves_what_was_there(
    step: str, force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "engine"
    if force:
        build(path, model=b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, step, full_disk)
        with pytest.raises(FasaError, match=f"cannot write .*engine: {os.strerror(errno.ENOSPC)} .*free disk|permiss"):
            build(path, force=force)
    assert names(tmp_path) == (["engine"] if force else [])
    if force:
        assert model_of(path) == b"old"


def test_old_engine_returns_when_the_new_one_cannot_take_its_place(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail(source: Path, target: Any) -> Path:
        if source.name == ".engine.building":
            full_disk()
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(FasaError, match="cannot write .*engine"):
        build(engine, force=True, model=b"new")
    assert model_of(engine) == b"model"
    assert names(engine.parent) == ["engine"]


# --- a build that is killed, in a process of its own ---

PRELUDE = """
import os, signal, sys
from pathlib import Path
from fasa_trt.core.engine_dir import write_engine
path = Path(sys.argv[1])

def build(force):
    with write_engine(path, force=force, facts={}) as directory:
        (directory / "model.onnx").write_bytes(b"half")
        step()
"""
MIDDLE = """
def step():
    os._exit(9)
build(force=path.exists())
"""
AT_RENAME = """
rename, count = Path.rename, int(sys.argv[2])
def die(source, target):
    global count
    count -= 1
    if count < 0:
        os._exit(9)
    return rename(source, target)
Path.rename = die
def step():
    pass
build(force=path.exists())
"""
WAITING = """
def step():
    print("ready", flush=True)
    sys.stdin.read()
build(force=path.exists())
"""


def start(script: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PRELUDE + script, *map(str, arguments)]
    return subprocess.Popen(command, text=True, encoding="utf-8", **options)


def check_swept(path: Path) -> None:
    """The next build succeeds and leaves nothing of the killed one."""
    build(path, force=path.exists(), model=b"next")
    assert model_of(path) == b"next"
    assert names(path.parent) == ["engine"]


@pytest.mark.parametrize("existing", [False, True])
def test_killed_in_the_middle(existing: bool, tmp_path: Path) -> None:
    path = tmp_path / "engine"
    if existing:
        build(path)
    assert start(MIDDLE, path).wait() == 9
    assert ".engine.building" in names(tmp_path), "the test proves nothing"
    assert path.exists() == existing
    if existing:
        assert model_of(path) == b"model"
    else:
        with pytest.raises(FasaError, match="not an engine directory"):
            open_engine(path)
    check_swept(path)


@pytest.mark.parametrize(("existing", "rename"), [(False, 0), (True, 0), (True, 1)])
def test_killed_at_the_very_end(existing: bool, rename: int, tmp_path: Path) -> None:
    """Before the new engine has its name; between the old one giving it up and the new one taking it."""
    path = tmp_path / "engine"
    if existing:
        build(path)
    assert start(AT_RENAME, path, rename).wait() == 9
    assert ".engine.building" in names(tmp_path)
    assert path.exists() == (existing and rename == 0)
    check_swept(path)


@pytest.fixture
def other_build(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is in the middle of building tmp_path/engine."""
    with start(WAITING, tmp_path / "engine", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_sigkill(other_build: subprocess.Popen[str], tmp_path: Path) -> None:
    other_build.kill()
    other_build.wait()
    assert names(tmp_path) == [".engine.building", ".engine.lock"]
    check_swept(tmp_path / "engine")


def test_two_builds_of_one_directory(other_build: subprocess.Popen[str], tmp_path: Path) -> None:
    path = tmp_path / "engine"
    with pytest.raises(FasaError, match=r"another build is writing .*engine \(wait for it, or choose another -o\)"):
        build(path)
    assert (tmp_path / ".engine.building" / "model.onnx").read_bytes() == b"half", "it was disturbed"
    other_build.communicate("")
    assert other_build.returncode == 0
    assert (path / "model.onnx").read_bytes() == b"half"
    check_swept(path)


def test_two_builds_in_one_process(tmp_path: Path) -> None:
    path = tmp_path / "engine"
    with write_engine(path, force=False, facts={}) as directory:
        fill(directory)
        with pytest.raises(FasaError, match="another build is writing"):
            build(path)
        build(tmp_path / "other")
    assert model_of(path) == b"model"
    assert names(tmp_path) == ["engine", "other"]


def test_engine_that_appears_during_the_build(tmp_path: Path) -> None:
    """Somebody else's directory is not overwritten."""
    path = tmp_path / "engine"
    with (
        pytest.raises(FasaError, match="exists already"),
        write_engine(path, force=False, facts={}) as directory,
    ):
        fill(directory)
        path.mkdir()
        (path / "thesis.txt").write_text("words", "utf-8")
    assert names(path) == ["thesis.txt"]
    assert names(tmp_path) == ["engine"]
