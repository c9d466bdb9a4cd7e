"""Writing files and directories so that a reader sees the old one or the new one, never half of either."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from fasa_trt.core.errors import FasaError


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` through a temporary sibling. Raises FasaError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise FasaError(
            f"cannot write {path}: {error.strerror or error}", hint="check permissions and free disk space"
        ) from None
    finally:  # whatever went wrong, an interrupt included
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace_directory(new: Path, path: Path) -> None:
    """Gives the directory `new` the name `path`, in the same folder; what was there goes when that has succeeded.
    Raises OSError."""
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)  # also of a build that was killed between the two renames
