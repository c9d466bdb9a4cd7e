"""What TensorRT has timed before, kept between builds: the second engine for a GPU is built much faster.

TensorRT refuses entries of another version or GPU by itself; the file's name keeps builds from replacing each other's.
TensorRT for RTX times nothing when it builds.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from fasa_trt.core.atomic import write_bytes
from fasa_trt.core.errors import FasaError
from fasa_trt.plugins.library import cache_directory


def timing_cache_file(trt: Any, architecture: str | None) -> Path:
    return cache_directory() / "timing" / f"{trt.__name__}-{trt.__version__}-sm{architecture or 'unknown'}.cache"


def use_timing_cache(config: Any, file: Path) -> None:
    """Starts a build with what `file` holds; with an empty cache where it is absent, damaged, or of another GPU."""
    content = b""
    with contextlib.suppress(OSError):
        content = file.read_bytes()
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def keep_timing_cache(config: Any, file: Path) -> str | None:
    """Writes what the build has timed; says what went wrong where that is not possible, as the plan is none the
    worse."""
    try:
        write_bytes(file, config.get_timing_cache().serialize())
    except FasaError as error:
        return f"the timing cache is not kept: {error}"
    return None
