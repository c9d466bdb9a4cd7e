"""Two engines of one checkpoint for the CPU, which differ in nothing but sparsity."""

from __future__ import annotations

from pathlib import Path

from fasa_trt.bench.cpu import random_profile
from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.engine_dir import ONNX_FILES, EngineDirectory
from fasa_trt.core.profile import Profile
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.engine import engine_config
from fasa_trt.export.onnx_model import export_onnx


def dense_and_fasa(
    checkpoint: Checkpoint, config: BuildConfig, directory: Path, seed: int
) -> tuple[EngineDirectory, EngineDirectory]:
    """A truly dense engine, exported without a profile (each layer's keys are one tensor), and a FASA engine whose
    dominant chunks are random ones."""
    dense = _write(checkpoint, None, config, directory / "dense")
    return dense, _write(checkpoint, random_profile(checkpoint, seed), config, directory / "fasa")


def _write(checkpoint: Checkpoint, profile: Profile | None, config: BuildConfig, path: Path) -> EngineDirectory:
    """As much of an engine directory as a backend reads."""
    assert config.max_seq_len is not None
    exported = export_onnx(
        checkpoint, profile, config.spec, path / ONNX_FILES[0], dtype=config.dtype, max_seq_len=config.max_seq_len
    )
    return EngineDirectory(path, engine_config(checkpoint, config, exported.layers), {})
