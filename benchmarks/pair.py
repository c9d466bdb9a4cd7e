"""Two engines of one checkpoint for the CPU, which differ in nothing but sparsity; and steps on them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fasa_trt.bench.cpu import random_profile
from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.engine_dir import ONNX_FILES, EngineDirectory
from fasa_trt.core.profile import Profile
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.engine import engine_config
from fasa_trt.export.onnx_model import export_onnx
from fasa_trt.runtime.onnxruntime import OnnxRuntimeBackend
from fasa_trt.runtime.rows import PREFILL_CHUNK

ZERO, FIRST = np.zeros(1, np.int64), np.zeros((1, 1), np.int64)


@dataclass(frozen=True)
class Timed:
    """An engine with one row of `length` random tokens in its cache, on which the next decode step is timed."""

    directory: EngineDirectory
    backend: OnnxRuntimeBackend
    length: int

    def step(self) -> float:
        """Seconds of one decode step. Every step writes the same slot, so all of them see `length` + 1 tokens."""
        started = time.perf_counter()
        self.backend.step(FIRST, ZERO + self.length, ZERO, FIRST)
        return time.perf_counter() - started


def dense_and_fasa(
    checkpoint: Checkpoint, config: BuildConfig, directory: Path, seed: int
) -> tuple[EngineDirectory, EngineDirectory]:
    """A truly dense engine, exported without a profile (each layer's keys are one tensor), and a FASA engine whose
    dominant chunks are random ones."""
    dense = _write(checkpoint, None, config, directory / "dense")
    return dense, _write(checkpoint, random_profile(checkpoint, seed), config, directory / "fasa")


def filled(
    directory: EngineDirectory,
    length: int,
    *,
    seed: int,
    threads: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> Timed:
    """Loads an engine and prefills `length` random tokens. They lie all over the cache that a step then chooses from:
    an empty one would be untouched memory, which reads as fast as no memory at all."""
    backend = OnnxRuntimeBackend(directory, threads=threads, provider="cpu")
    vocabulary = int(directory.config["pretrained_config"]["vocab_size"])
    tokens = np.random.default_rng(seed).integers(0, vocabulary, (1, length))
    backend.allocate(1)
    for start in range(0, length, PREFILL_CHUNK):
        backend.step(tokens[:, start : start + PREFILL_CHUNK], ZERO + start, ZERO, FIRST, sparse=False)
        if progress is not None:
            progress(min(start + PREFILL_CHUNK, length), length)
    return Timed(directory, backend, length)


def _write(checkpoint: Checkpoint, profile: Profile | None, config: BuildConfig, path: Path) -> EngineDirectory:
    """As much of an engine directory as a backend reads."""
    assert config.max_seq_len is not None
    exported = export_onnx(
        checkpoint, profile, config.spec, path / ONNX_FILES[0], dtype=config.dtype, max_seq_len=config.max_seq_len
    )
    return EngineDirectory(path, engine_config(checkpoint, config, exported.layers), {})
