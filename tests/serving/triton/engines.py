"""Engine directories that only look like a target's: enough to make a repository of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fasa_trt.core.engine_dir import CONFIG, MANIFEST, write_engine


def trtllm_engine(source: Path, path: Path, *, max_batch_size: int = 2, **pretrained: Any) -> Path:
    """A copy of the engine directory `source` that says it is TensorRT-LLM's."""
    with write_engine(path, force=False, facts={}) as directory:
        for file in source.iterdir():
            if file.name != MANIFEST:
                shutil.copyfile(file, directory / file.name)
        config = json.loads((source / CONFIG).read_text("utf-8"))
        config["fasa"]["target"] = "tensorrt-llm"
        config["pretrained_config"] |= {"logits_dtype": "float32", **pretrained}
        config["build_config"]["max_batch_size"] = max_batch_size
        (directory / CONFIG).write_text(json.dumps(config), "utf-8")
    return path
