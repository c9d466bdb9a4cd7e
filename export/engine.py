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

from fasa_trt.core.checkpoint import TOKENIZER_FILES, Checkpoint
from fasa_trt.core.engine_dir import CONFIG, ONNX_FILES, PROFILE, EngineDirectory, open_engine, write_engine
from fasa_trt.core.errors import FasaError
from fasa_trt.core.profile import Profile
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.finish import BUILDERS, Report, check_can_stop, make_plan
from fasa_trt.export.onnx_model import Exported, Progress, export_onnx
from fasa_trt.export.plan import LayerPlan
from fasa_trt.export.plugin import export_plugin_onnx
from fasa_trt.export.trtllm_config import model_sizes, trtllm_config

# Of everything that shapes an engine.
PACKAGES = ("fasa-trt", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "tensorrt-rtx", "tensorrt")


def build_engine(
    checkpoint: Checkpoint,
    profile: Profile,
    config: BuildConfig,
    path: Path,
    *,
    force: bool = False,
    command: str = "",
    stop_before_engine: bool = False,
    report: Report | None = None,
) -> EngineDirectory:
    """Writes the engine directory `path`, all of it or nothing.

    config: resolved by `BuildConfig.resolve`. force: replace an engine that is there. stop_before_engine: leave the
    ONNX model in place of the plan, for `finish_engine` on the machine that has the GPU. Raises FasaError.
    """
    if stop_before_engine:
        check_can_stop(config.target)
    facts = {**build_facts(command), "settings": config.to_json()}
    with write_engine(path, force=force, facts=facts) as directory:
        exported = export_model(checkpoint, profile, config, directory / ONNX_FILES[0], _stage(report, "export"))
        profile.save(directory / PROFILE)
        for name in TOKENIZER_FILES:
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, directory / name)
        content = engine_config(checkpoint, config, exported.layers)
        (directory / CONFIG).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        if config.target in BUILDERS and not stop_before_engine:
            facts.update(make_plan(directory, directory, content, arch=config.arch, report=report))
            for name in ONNX_FILES:
                (directory / name).unlink()
    return open_engine(path, verify=False, prepared=stop_before_engine)


def export_model(
    checkpoint: Checkpoint, profile: Profile | None, config: BuildConfig, path: Path, progress: Progress | None = None
) -> Exported:
    """Writes the ONNX model that a resolved `config` describes. Raises FasaError."""
    assert config.max_seq_len is not None
    if config.lowering == "plugin":
        return export_plugin_onnx(
            checkpoint,
            profile,
            config.spec,
            path,
            dtype=config.dtype,
            limits=config.limits,
            labels=config.label_kind,
            progress=progress,
        )
    return export_onnx(
        checkpoint,
        profile,
        config.spec,
        path,
        dtype=config.dtype,
        max_seq_len=config.max_seq_len,
        fixed_capacity=config.fixed_capacity,
        progress=progress,
    )


def engine_config(checkpoint: Checkpoint, config: BuildConfig, layers: list[LayerPlan]) -> dict[str, Any]:
    """The content of config.json: the fields that TensorRT-LLM's runtimes know, and a section of our own."""
    model_file = BUILDERS[config.target].file if config.target in BUILDERS else ONNX_FILES[0]
    if config.lowering == "plugin":
        return trtllm_config(
            checkpoint,
            config.spec,
            layers,
            config.limits,
            dtype=config.dtype,
            labels=config.label_kind,
            target=config.target,
            model_file=model_file,
            eos_token_ids=eos_token_ids(checkpoint),
        )
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


def build_facts(command: str) -> dict[str, Any]:
    """What a manifest says of the build."""
    return {"command": command, "versions": versions(), "machine": platform.platform()}


def versions() -> dict[str, str]:
    """Of everything that shapes an engine."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _stage(report: Report | None, stage: str) -> Callable[[int, int], None] | None:
    return None if report is None else lambda done, total: report(stage, done, total)
