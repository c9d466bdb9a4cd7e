"""Checkpoint + profile + build configuration -> a complete engine directory."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from fasa_trt.core.checkpoint import TOKENIZER_FILES, Checkpoint
from fasa_trt.core.engine_dir import CONFIG, PROFILE, EngineDirectory, open_engine, write_engine
from fasa_trt.core.errors import FasaError
from fasa_trt.core.profile import Profile
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.graph import NUMPY_DTYPES
from fasa_trt.export.onnx_model import WEIGHTS_SUFFIX, export_onnx
from fasa_trt.export.plan import LayerPlan, plan_layers
from fasa_trt.export.trtllm_config import model_sizes

Report = Callable[[str, int, int], None]  # stage, steps done, steps in all
ONNX_FILE = "model.onnx"
RTX_FILE = "model.rtx"


def build_engine(
    checkpoint: Checkpoint,
    profile: Profile,
    config: BuildConfig,
    path: Path,
    *,
    force: bool = False,
    command: str = "",
    report: Report | None = None,
) -> EngineDirectory:
    """Writes the engine directory `path`, all of it or nothing.

    config: resolved by `BuildConfig.resolve`. force: replace an engine that is there. Raises FasaError.
    """
    assert config.max_seq_len is not None and config.max_batch_size is not None
    facts = {"command": command, "versions": versions(), "machine": platform.platform()}
    with write_engine(path, force=force, facts=facts) as directory:
        exported = export_onnx(
            checkpoint,
            profile,
            config.spec,
            directory / ONNX_FILE,
            dtype=config.dtype,
            max_seq_len=config.max_seq_len,
            fixed_capacity=config.fixed_capacity,
            progress=_stage(report, "export"),
        )
        model_file = ONNX_FILE
        if config.target == "tensorrt-rtx":
            from fasa_trt.export.tensorrt import build_plan

            model_file = RTX_FILE
            facts["tensorrt"] = build_plan(
                exported.path,
                directory / RTX_FILE,
                flavour="tensorrt_rtx",
                max_batch_size=config.max_batch_size,
                max_seq_len=config.max_seq_len,
                progress=_stage(report, "build"),
            )
            for name in (ONNX_FILE, ONNX_FILE + WEIGHTS_SUFFIX):
                (directory / name).unlink()
        profile.save(directory / PROFILE)
        for name in TOKENIZER_FILES:
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, directory / name)
        content = engine_config(checkpoint, config, exported.layers, model_file)
        (directory / CONFIG).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return open_engine(path, verify=False)


def engine_config(
    checkpoint: Checkpoint, config: BuildConfig, layers: list[LayerPlan], model_file: str
) -> dict[str, Any]:
    """The content of config.json: the fields that TensorRT-LLM's runtimes know, and a section of our own."""
    return {
        "version": version("fasa-trt"),
        "pretrained_config": model_sizes(checkpoint, config.dtype),
        "build_config": {"max_batch_size": config.max_batch_size, "max_seq_len": config.max_seq_len},
        "fasa": {
            "target": config.target,
            "model_file": model_file,
            "lowering": "standard",
            "sparse": config.spec.to_json(),
            "layers": [{"n_tip": plan.n_tip, "window": plan.window} for plan in layers],
            "eos_token_ids": eos_token_ids(checkpoint),
            "model": checkpoint.path.name,
            "fingerprint": checkpoint.fingerprint,
        },
    }


def eos_token_ids(checkpoint: Checkpoint) -> list[int]:
    """Tokens that end a text: those of generation_config.json, else of config.json. Raises FasaError."""
    file = checkpoint.path / "generation_config.json"
    try:
        found = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.is_file() else None
    except (ValueError, AttributeError):
        raise FasaError(f"{file} is not a JSON object", hint="download it again") from None
    found = getattr(checkpoint.config, "eos_token_id", None) if found is None else found
    return [] if found is None else [int(token) for token in (found if isinstance(found, list) else [found])]


def estimate(checkpoint: Checkpoint, profile: Profile | None, config: BuildConfig) -> dict[str, Any]:
    """Sizes of the engine that `config` describes, without building it; bytes.

    kv_read_per_token: read in each decode step per cached token, densely and by FASA; kv_read_fixed: by FASA besides,
    whatever the length (the budget's rows).
    """
    assert config.max_seq_len is not None and config.max_batch_size is not None
    width = NUMPY_DTYPES[config.dtype].itemsize
    stand_in = profile or _any_profile(checkpoint)
    layers = plan_layers(checkpoint, stand_in, config.spec, max_seq_len=config.max_seq_len)
    row = checkpoint.num_kv_heads * width
    full = [plan for plan in layers if plan.window is None]
    dense = 2 * checkpoint.head_dim * row
    parts = ["model.embed_tokens.", "model.layers.", "model.norm."]  # not a vision tower, nor tied logits once more
    if not checkpoint.config.tie_word_embeddings:
        parts.append("lm_head.")
    exported = [tensor for name, tensor in checkpoint.tensors.items() if name.startswith(tuple(parts))]
    elements = sum(int(np.prod(tensor.shape)) for tensor in exported)
    return {
        "weight_bytes": elements * width,
        "kv_bytes_per_token": len(layers) * dense,
        "kv_bytes": len(layers) * dense * config.max_seq_len * config.max_batch_size,
        "kv_read_per_token_dense": len(full) * dense,
        "kv_read_per_token_fasa": sum(plan.label_dims * row if plan.sparse else dense for plan in full),
        "kv_read_fixed_fasa": sum(config.budget * dense for plan in full if plan.sparse),
        "sparse_layers": sum(plan.sparse for plan in layers),
        "layers": len(layers),
    }


def versions() -> dict[str, str]:
    """Of everything that shapes an engine."""
    found = {"python": sys.version.split()[0]}
    for package in ("fasa-trt", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "tensorrt-rtx"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _any_profile(checkpoint: Checkpoint) -> Profile:
    """Sizes do not depend on what was measured."""
    shape = (checkpoint.num_layers, checkpoint.num_heads, checkpoint.head_dim // 2)
    order = np.arange(shape[-1], dtype=np.int32)
    return Profile(
        agreement=np.zeros((1, *shape), np.float32),
        spread=np.zeros(shape, np.float32),
        ks=(256,),
        num_kv_heads=checkpoint.num_kv_heads,
        fingerprint=checkpoint.fingerprint,
        greedy=np.tile(order, (checkpoint.num_layers, checkpoint.num_kv_heads, 1)),
    )


def _stage(report: Report | None, stage: str) -> Callable[[int, int], None] | None:
    return None if report is None else lambda done, total: report(stage, done, total)
