"""examples/02_embed_python.py with an engine of the sample model."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.engine import build_engine
from tests.engines import random_profile

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "02_embed_python.py"


def test_embed_python(tiny_dir: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_dir)
    config = BuildConfig.resolve(checkpoint, flags={"max_seq_len": 96, "max_batch_size": 2, "budget": 48})
    build_engine(checkpoint, random_profile(checkpoint), config, tmp_path / "engine")
    command = [sys.executable, str(EXAMPLE), str(tmp_path / "engine")]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    batch = [ast.literal_eval(line.partition(": ")[2]) for line in lines[:3]]
    assert all(batch), "three prompts on an engine of two rows"
    assert any(line.startswith("KV read: ") and line.endswith("of dense attention") for line in lines)
    served = [ast.literal_eval(line) for line in lines[-2:]]
    assert all(served) and batch[0].startswith(served[0]), "the service gives what the batch gave"
