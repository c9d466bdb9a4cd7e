"""Writes a model repository: a folder for each model, a start script, and a record of what it was made from.

    fasa/config.pbtxt, fasa/1/model.py    or TensorRT-LLM's five models
    fasa/1/engine/                        with `copy`: the engine
    start.sh                              starts tritonserver on it
    fasa-trt.json                         the engine, the version that wrote it; marks what --force may replace

It is written to a temporary sibling and renamed when complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fasa_trt import __version__
from fasa_trt.core.atomic import replace_directory
from fasa_trt.core.engine_dir import EngineDirectory, open_engine
from fasa_trt.core.errors import FasaError
from fasa_trt.plugins import plugin_library
from fasa_trt.serving.triton import fasa_model, trtllm
from fasa_trt.serving.triton.model_config import ModelConfig
from fasa_trt.serving.triton.options import RepositoryOptions

RECORD = "fasa-trt.json"
START = "start.sh"
CONFIG, MODEL = "config.pbtxt", "model.py"
ENGINE = "engine"  # the copy's folder
TEMPLATES = Path(__file__).parent

# Triton overlooks files beside the models' folders.
START_FASA = """#!/usr/bin/env bash
# Starts tritonserver on this repository, on loopback. Arguments are tritonserver's, such as --http-address=0.0.0.0.
# $PYTHON is a Python that has fasa-trt.
set -euo pipefail
exec "${PYTHON:-python3}" -m fasa_trt.serving.triton.server "$(dirname "${BASH_SOURCE[0]}")" "$@"
"""
START_TRTLLM = """#!/usr/bin/env bash
# Starts tritonserver on this repository, on loopback, with the plugin that the engine needs; in NVIDIA's container with
# TensorRT-LLM {version}. Arguments are tritonserver's, such as --http-address=0.0.0.0 ($ADDRESS sets all three).
# $FASA_TRT_PLUGIN names the plugin where it is elsewhere. The backend has no setting for plugins: it is preloaded.
set -euo pipefail
plugin="${{FASA_TRT_PLUGIN:-{plugin}}}"
if [[ ! -r "$plugin" ]]; then
    echo "error: no plugin library at '$plugin' (set FASA_TRT_PLUGIN; fasa-trt plugin build --kind tensorrt)" >&2
    exit 1
fi
export LD_PRELOAD="$plugin${{LD_PRELOAD:+:$LD_PRELOAD}}"
address="${{ADDRESS:-127.0.0.1}}"
exec tritonserver --model-repository="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)" \\
    --http-address="$address" --grpc-address="$address" --metrics-address="$address" "$@"
"""


@dataclass(frozen=True)
class Repository:
    path: Path
    models: tuple[str, ...]


def write_repository(
    engine_path: Path, output: Path, options: RepositoryOptions, *, copy: bool = False, force: bool = False
) -> Repository:
    """Makes the repository `output` of an engine directory, which it refers to by its absolute path, or has a copy of.

    force: replace a repository that is already there. Raises FasaError when the engine is not sound, an option is
    another target's, `output` exists or cannot be written.
    """
    output = Path(os.path.abspath(output))
    check_replaceable(output, force)
    engine = open_engine(engine_path.resolve())
    _check_places(engine.path, output, copy)
    models = _models(engine, output, options, copy)
    record = {
        "version": __version__,
        "engine": str(engine.path),
        "target": engine.target,
        "copied": copy,
        "models": [config.name for config, _ in models],
    }
    temporary: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        temporary.chmod(0o755)  # mkdtemp's is the user's alone; a server may be another
        for config, source in models:
            version = temporary / config.name / "1"  # ensembles have one, too, without files
            version.mkdir(parents=True)
            (version.parent / CONFIG).write_text(config.to_text(), "utf-8")
            if source is not None:
                (version / MODEL).write_text(source, "utf-8", newline="\n")
        if copy:
            shutil.copytree(engine.path, temporary / _copy_in(engine))
        start = temporary / START
        start.write_text(_start(engine), "utf-8", newline="\n")
        start.chmod(0o755)
        (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        replace_directory(temporary, output)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise FasaError(f"cannot write {output}: {reason}", hint="check permissions and free disk space") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return Repository(output, tuple(config.name for config, _ in models))


def check_replaceable(path: Path, force: bool) -> None:
    """Raises FasaError when a repository may not be written to `path`."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not force:
        raise FasaError(f"{path} exists already", hint="choose another -o, or replace it with --force")
    if not (path / RECORD).is_file():
        raise FasaError(
            f"{path} is not a repository of fasa-trt's, so --force does not replace it", hint="choose another -o"
        )


def _check_places(engine: Path, output: Path, copy: bool) -> None:
    if engine == output or output in engine.parents or engine in output.parents:
        raise FasaError(f"{output} and the engine {engine} lie in each other", hint="choose another -o")
    for path in (output, *(() if copy else (engine,))):
        if not str(path).isprintable():
            raise FasaError(f"{str(path)!r} has characters that configurations cannot hold", hint="move it")


def _models(
    engine: EngineDirectory, output: Path, options: RepositoryOptions, copy: bool
) -> list[tuple[ModelConfig, str | None]]:
    """Each model's configuration and its model.py, where it has one."""
    if engine.target != "tensorrt-llm":
        where = ENGINE if copy else str(engine.path)
        return [(fasa_model.fasa_config(where, options), fasa_model.MODEL_PY)]
    where = str(output / _copy_in(engine)) if copy else str(engine.path)
    sources = {file.stem: file for file in (TEMPLATES / "trtllm_models").glob("[!_]*.py")}
    return [
        (config, sources[config.name].read_text("utf-8") if config.name in sources else None)
        for config in trtllm.trtllm_configs(engine, where, options)
    ]


def _copy_in(engine: EngineDirectory) -> Path:
    model = trtllm.TENSORRT_LLM if engine.target == "tensorrt-llm" else fasa_model.NAME
    return Path(model, "1", ENGINE)


def _start(engine: EngineDirectory) -> str:
    if engine.target != "tensorrt-llm":
        return START_FASA
    from fasa_trt.core.contract import TRTLLM_VERSION

    plugin = plugin_library.find(engine.head_dim)
    version = ".".join(map(str, TRTLLM_VERSION))
    return START_TRTLLM.format(version=version, plugin="" if plugin is None else plugin)
