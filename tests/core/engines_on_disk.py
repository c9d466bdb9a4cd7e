"""Small engine directories for the tests of `fasa_trt/core/engine_dir.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fasa_trt.core.engine_dir import open_engine, write_engine
from fasa_trt.core.spec import SparseSpec

CONFIG = {
    "pretrained_config": {"dtype": "float32"},
    "build_config": {"max_seq_len": 64, "max_batch_size": 2},
    "fasa": {"target": "onnxruntime", "model_file": "model.onnx", "sparse": SparseSpec(budget=40).to_json()},
}


def fill(directory: Path, *, model: bytes = b"model", config: Any = CONFIG) -> None:
    (directory / "model.onnx").write_bytes(model)
    (directory / "config.json").write_text(json.dumps(config), "utf-8")


def build(path: Path, *, force: bool = False, **content: Any) -> None:
    with write_engine(path, force=force, facts={"command": "fasa-trt build", "versions": {}}) as directory:
        fill(directory, **content)


def model_of(path: Path) -> bytes:
    return open_engine(path).model_file.read_bytes()
