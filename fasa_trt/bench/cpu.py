"""Decode steps on a CPU, through onnxruntime: a dense engine against a FASA engine of the same checkpoint."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fasa_trt.bench.record import summary
from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.engine_dir import EngineDirectory
from fasa_trt.core.errors import FasaError
from fasa_trt.core.profile import Profile
from fasa_trt.core.spec import SparseSpec
from fasa_trt.export.onnx_model import export_onnx
from fasa_trt.runtime.onnxruntime import OnnxRuntimeBackend
from fasa_trt.runtime.rows import PREFILL_CHUNK

POINTS = ((2048, 1), (8192, 1))  # context, batch
WARM_UP = 2  # steps before each block: the other engine's memory leaves the processor's caches
BLOCK = 5  # timed steps of one engine before the next one's turn
SHORT = 1  # cached tokens of the step that stands for everything but attention
Write = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Timed:
    """An engine with `batch` rows of `length` random tokens in its cache, on which the next decode step is timed."""

    backend: OnnxRuntimeBackend
    batch: int
    length: int

    def step(self) -> float:
        """Seconds of one step. Every step writes the same slot, so all of them see `length` + 1 tokens."""
        zero, first = np.zeros(self.batch, np.int64), np.zeros((self.batch, 1), np.int64)
        started = time.perf_counter()
        self.backend.step(first, zero + self.length, zero, first)
        return time.perf_counter() - started


def run_cpu(
    record: dict[str, Any],
    checkpoint: Checkpoint,
    points: Sequence[tuple[int, int]],
    spec: SparseSpec,
    *,
    repeats: int,
    threads: int | None,
    write: Write,
    seed: int = 0,
) -> dict[str, Any]:
    """Adds to `record`, which `new_record` made, a row for each (context, batch). write gets it after every row.

    The profile ranks chunks at random and the cache holds random tokens: the time depends on neither.
    Raises FasaError for contexts within the budget.
    """
    for context, batch in points:
        if context <= spec.budget + 1 or batch < 1:
            raise FasaError(
                f"{context} x {batch} cannot be measured with a budget of {spec.budget}",
                hint="a context beyond the budget, and a batch of 1 or more",
            )
    longest, widest = max(context for context, _ in points), max(batch for _, batch in points)
    spec = spec.resolve(head_dim=checkpoint.head_dim, num_layers=checkpoint.num_layers, max_seq_len=longest)
    record.update(
        shape=checkpoint.path.name,
        device="cpu",
        dtype="float32",
        layers=checkpoint.num_layers,
        sparse=spec.to_json(),
        threads=threads,
        repeats=repeats,
        note="CPU, onnxruntime: median milliseconds of one step; random tokens in the cache, chunks ranked at random",
        rows=[],
    )
    with tempfile.TemporaryDirectory(prefix="fasa-bench-") as work:
        profiles = {"dense": None, "fasa": random_profile(checkpoint, seed)}
        engines = {
            side: write_engine(checkpoint, profile, spec, Path(work) / side, longest, widest)
            for side, profile in profiles.items()
        }
        for context, batch in points:
            started = time.perf_counter()
            timed = {side: filled(engine, context - 1, batch, seed, threads) for side, engine in engines.items()}
            timed["rest"] = filled(engines["dense"], SHORT, batch, seed, threads)
            samples = measured(timed, repeats)
            row = row_of(context, batch, samples)
            row.update(run_id=record["run_id"], shape=record["shape"], seconds=round(time.perf_counter() - started, 1))
            record["rows"].append(row)
            print(
                f"{context:7d} x {batch:3d}: dense {row['dense_ms']:.2f} ms, fasa {row['fasa_ms']:.2f} ms", flush=True
            )
            write(record)
    return record


def write_engine(
    checkpoint: Checkpoint, profile: Profile | None, spec: SparseSpec, path: Path, max_seq_len: int, batch: int
) -> EngineDirectory:
    """As much of an engine directory as a backend reads. Without a profile nothing of FASA is in it."""
    file = path / "model.onnx"
    path.mkdir()
    export_onnx(checkpoint, profile, spec, file, dtype="float32", max_seq_len=max_seq_len)
    config = {
        "pretrained_config": {"dtype": "float32", "vocab_size": int(checkpoint.config.vocab_size)},
        "build_config": {"max_seq_len": max_seq_len, "max_batch_size": batch},
        "fasa": {"target": "onnxruntime", "model_file": file.name, "sparse": spec.to_json()},
    }
    return EngineDirectory(path, config, {})


def filled(
    engine: EngineDirectory,
    length: int,
    batch: int,
    seed: int,
    threads: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> Timed:
    """Loads an engine and prefills random tokens. They lie all over the cache that a step then chooses from: untouched
    memory would read as fast as no memory at all."""
    backend = OnnxRuntimeBackend(engine, threads=threads, provider="cpu")
    vocabulary = int(engine.config["pretrained_config"]["vocab_size"])
    tokens = np.random.default_rng(seed).integers(0, vocabulary, (batch, length))
    zero, first = np.zeros(batch, np.int64), np.zeros((batch, 1), np.int64)
    backend.allocate(batch)
    for start in range(0, length, PREFILL_CHUNK):
        backend.step(tokens[:, start : start + PREFILL_CHUNK], zero + start, zero, first, sparse=False)
        if progress is not None:
            progress(min(start + PREFILL_CHUNK, length), length)
    return Timed(backend, batch, length)


def measured(timed: dict[str, Timed], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of at least `repeats` steps of each. They take turns in blocks, every other round in reverse, so
    that drift meets all alike."""
    samples: dict[str, list[float]] = {side: [] for side in timed}
    for turn in range(-(-repeats // BLOCK)):
        for side in sorted(timed, reverse=turn % 2 == 1):
            for _ in range(WARM_UP):
                timed[side].step()
            samples[side] += [round(1e3 * timed[side].step(), 4) for _ in range(BLOCK)]
    return samples


def row_of(context: int, batch: int, samples: dict[str, list[float]]) -> dict[str, Any]:
    spread = {side: summary(values) for side, values in samples.items()}
    dense, fasa, rest = (spread[side]["median"] for side in ("dense", "fasa", "rest"))
    return {
        "context": context,
        "batch": batch,
        "dense_ms": dense,
        "dense_kernel": "onnxruntime",
        "fasa_ms": fasa,
        "speedup": round(dense / fasa, 3),
        "rest_ms": rest,
        "attention_share": {"dense": round(1 - rest / dense, 4), "fasa": round(1 - rest / fasa, 4)},
        "tokens_per_second": {"dense": round(1e3 * batch / dense, 1), "fasa": round(1e3 * batch / fasa, 1)},
        "spread_ms": spread,
        "samples_ms": samples,
    }


def random_profile(checkpoint: Checkpoint, seed: int) -> Profile:
    """Rankings drawn at random: good for time and memory, which do not depend on them, and for nothing else."""
    rng = np.random.default_rng(seed)
    shape = (checkpoint.num_layers, checkpoint.num_heads, checkpoint.head_dim // 2)
    return Profile(
        agreement=rng.random((1, *shape), np.float32),
        spread=rng.random(shape, np.float32),
        ks=(256,),
        num_kv_heads=checkpoint.num_kv_heads,
        fingerprint=checkpoint.fingerprint,
        info={"random_seed": seed},
    )
