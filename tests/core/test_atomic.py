"""A write that fails leaves the old file and nothing else."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from fasa_trt.core.atomic import write_bytes
from fasa_trt.core.errors import FasaError


def test_writes_and_replaces(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "file.bin"
    write_bytes(file, b"one")
    write_bytes(file, b"two")
    assert file.read_bytes() == b"two"
    assert list(file.parent.iterdir()) == [file]


def test_readers_never_see_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name appears by a rename within the directory, when all bytes are there."""
    file = tmp_path / "file.bin"
    file.write_bytes(b"old")
    seen = []
    replace = Path.replace

    def watch(source: Path, target: Any) -> Path:
        seen.append((source.parent, source.read_bytes(), file.read_bytes()))
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", watch)
    write_bytes(file, b"new")
    assert seen == [(tmp_path, b"new", b"old")]


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
@pytest.mark.parametrize("kind", ["full disk", "interrupt"])
def test_failure_leaves_the_old_file_alone(
    step: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file.bin"
    file.write_bytes(b"old")

    def fail(path: Path, *_: Any) -> None:
        with path.open("wb") as stream:
            stream.write(b"n")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if kind == "full disk" else KeyboardInterrupt

    monkeypatch.setattr(Path, step, fail)
    wanted = FasaError if kind == "full disk" else KeyboardInterrupt
    with pytest.raises(wanted) as caught:
        write_bytes(file, b"new")
    monkeypatch.undo()
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]
    if kind == "full disk":
        assert f"cannot write {file}: {os.strerror(errno.ENOSPC)}" in str(caught.value)
        assert "free disk space" in str(caught.value)


def test_a_file_where_a_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(FasaError, match="cannot write .*taken.*permissions"):
        write_bytes(tmp_path / "taken" / "file.bin", b"data")


def test_a_directory_where_the_file_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(FasaError, match="cannot write .*taken"):
        write_bytes(tmp_path / "taken", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
