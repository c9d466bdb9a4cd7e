"""From flags to a resolved build configuration, for the verbs that write engines or models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasa_trt.core.errors import FasaError

if TYPE_CHECKING:
    from fasa_trt.core.checkpoint import Checkpoint
    from fasa_trt.export.config import BuildConfig


def layer_list(text: str | None) -> list[int] | None:
    """[0, 1] from "0,1"; "none" and an empty text are an empty list. Raises FasaError."""
    if text is None:
        return None
    if text.strip().lower() == "none":
        return []
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise FasaError(f"--dense-layers {text!r} is not a list of layers", hint="for example 0,1, or none") from None


def resolve(
    checkpoint: Checkpoint, file: Path | None, settings: list[str] | None, default_target: str, **flags: Any
) -> BuildConfig:
    """`BuildConfig.resolve` for flags as typer hands them over; says aloud what was decided for the user."""
    from rich.markup import escape

    from fasa_trt.cli.console import say
    from fasa_trt.export.config import BuildConfig

    flags["dense_layers"] = layer_list(flags.get("dense_layers"))
    config = BuildConfig.resolve(
        checkpoint,
        file=file,
        flags=flags,
        settings=settings or (),
        default_target=default_target,
        default_arch=gpu_architecture(),
    )
    for note in config.notes:
        say(escape(note))
    return config


def gpu_architecture() -> str | None:
    """Compute capability without its dot of the GPU that programs use unless told otherwise; None without a GPU."""
    from fasa_trt.runtime.machine import architecture, cuda

    gpus = cuda().gpus
    return architecture(gpus[0].compute_capability) if gpus else None


def command_line() -> str:
    """The command as it was typed, for manifests."""
    return "fasa-trt " + " ".join(sys.argv[1:])
