"""The sample model, ready for evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from fasa_trt.calibrate.calibrate import calibrate
from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.evaluation.model import EvalModel, load_eval_model


@pytest.fixture(scope="package")
def tiny(tiny_dir: Path) -> EvalModel:
    """With a profile of one short window."""
    checkpoint = open_checkpoint(tiny_dir)
    profile = calibrate(checkpoint, samples=1, length=512, queries=4, device="cpu").profile
    return load_eval_model(checkpoint, profile=profile, device="cpu")
