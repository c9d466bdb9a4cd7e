"""Checkpoint + profile + specification -> an ONNX file with its weights beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.core.profile import Profile
from fasa_trt.core.spec import SparseSpec
from fasa_trt.export.decoder import build_decoder, new_context
from fasa_trt.export.graph import DTYPES
from fasa_trt.export.plan import LayerPlan, plan_layers
from fasa_trt.export.standard import StandardAttention

WEIGHTS_SUFFIX = ".data"

Progress = Callable[[int, int], None]  # tensors written so far, tensors in all


@dataclass(frozen=True)
class Exported:
    """What was written: the model file and the plan of its layers."""

    path: Path
    layers: list[LayerPlan]


def export_onnx(
    checkpoint: Checkpoint,
    profile: Profile | None,
    spec: SparseSpec,
    path: Path,
    *,
    dtype: str,
    max_seq_len: int,
    fixed_capacity: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Writes `path` and `path` + ".data" (standard lowering, see `standard.py`).

    spec: resolved. dtype: float32, float16 or bfloat16, of weights, activations and cache. max_seq_len: slots of a
    row's cache; baked in with `fixed_capacity` (TensorRT), otherwise the runtime's to choose up to it. Without a
    profile every layer is dense. Weights are read one at a time while they are written.

    Raises FasaError for an unsupported model, a profile of another model, or a full or unwritable disk.
    """
    if dtype not in DTYPES:
        raise FasaError(f"unknown dtype {dtype!r}", hint=f"one of {', '.join(DTYPES)}")
    layers = plan_layers(checkpoint, profile, spec, max_seq_len=max_seq_len)
    context = new_context(checkpoint, dtype)
    attention = StandardAttention(
        context, spec, capacity=max_seq_len if fixed_capacity else None, portable=fixed_capacity
    )
    write_onnx(build_decoder(context, attention, layers), path, progress)
    return Exported(path, layers)


def write_onnx(model: ir.Model, path: Path, progress: Progress | None = None) -> None:
    """Writes `path` and `path` + ".data", both or neither. Raises FasaError when the disk is full or unwritable."""

    def report(tensor: Any, info: Any) -> None:
        if progress is not None:
            progress(info.index + 1, info.total)

    staging = path.with_name(f".{path.name}.building")  # so that a killed export leaves no half-written model
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        ir.save(
            model,
            staging / path.name,
            external_data=path.name + WEIGHTS_SUFFIX,
            callback=report,
        )
        for file in sorted(staging.iterdir(), reverse=True):  # weights first: the model file says that all is there
            file.replace(path.with_name(file.name))
    except OSError as error:
        raise FasaError(
            f"cannot write {path.parent}: {error.strerror or error}", hint="check permissions and free disk space"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
