"""Makes TensorRT for RTX's ONNX parser able to find its own library.

The parser opens `libtensorrt_rtx.so` by that very name when it imports a plugin. The Linux wheel ships only
`libtensorrt_rtx.so.1`, and when the parser does not find the library it terminates the process: no exception, no
message that names the cause. So a link of the name that it wants is made beside the library, once per installation.
Windows libraries carry their version in another way and need no link.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from pathlib import Path

from fasa_trt.core.errors import FasaError

LIBRARY = "libtensorrt_rtx.so"


def library_directory() -> Path | None:
    """Where the wheel keeps TensorRT for RTX's libraries; None when they were installed in another way."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def link_parser_library(directory: Path | None) -> None:
    """Makes sure that `libtensorrt_rtx.so` is in `directory`; may be called again and by many processes at once.

    Raises FasaError with the command to run when the link is missing and cannot be made.
    """
    if directory is None or sys.platform == "win32":
        return
    link = directory / LIBRARY
    versions = sorted(directory.glob(f"{LIBRARY}.*"))
    if link.exists() or not versions:
        return
    target = versions[-1].name  # relative, so that the environment can be moved
    temporary = directory / f".{LIBRARY}.{os.getpid()}.tmp"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(link)  # also in place of a link that dangles since an upgrade
    except OSError as error:
        raise FasaError(
            f"TensorRT for RTX lacks a link to its own library in {directory}, and it cannot be made here: "
            f"{error.strerror or error}",
            hint=f"make it once: ln -sf {target} {shlex.quote(str(link))}",
        ) from None
