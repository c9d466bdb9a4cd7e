"""The plugin lowering's results against transformers and against the reference, its node played by numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from fasa_trt.core.spec import REDUCTIONS, SparseSpec
from fasa_trt.export.plugin import export_plugin_onnx
from tests.engines import random_profile, reference_steps, relative
from tests.models import VARIANTS
from tests.plugin_engine import LIMITS, Made, PackedEngine, make_engine

SPEC = SparseSpec(budget=16, n_tip=8, sink=2, recent=4, dense_layers=())
PROMPT, STEPS = 66, 6  # phi3-longrope changes its frequencies at 64


def random_tokens(batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(2, 97, (batch, PROMPT + STEPS))


def prefill(engine: PackedEngine, ids: np.ndarray, start: int, end: int) -> np.ndarray:
    return engine.step([(name, row[start:end]) for name, row in enumerate(ids)])


def check_steps(made: Made) -> None:
    """A chunked prefill, dense, and decode steps beyond the budget, sparse: two sequences."""
    ids, engine = random_tokens(2), made.engine
    dense = made.logits(ids)
    for name in range(2):
        engine.join(name, PROMPT)
    assert relative(prefill(engine, ids, 0, 17), dense[:, 16]) < 2e-4
    assert relative(prefill(engine, ids, 17, PROMPT), dense[:, PROMPT - 1]) < 2e-4
    got = np.stack([prefill(engine, ids, t, t + 1) for t in range(PROMPT, PROMPT + STEPS)], axis=1)
    wanted, comparable = reference_steps(cast(Any, made), ids, PROMPT)
    assert comparable.mean() > 0.3
    assert relative(got[comparable], wanted[comparable]) < 2e-4
    if any(plan.sparse for plan in made.layers):
        assert relative(wanted, dense[:, PROMPT:]) > 1e-3, "sparsity changed nothing: the test proves nothing"


@pytest.mark.parametrize("variant", VARIANTS)
def test_sparse_steps_equal_the_reference(variant: str, tmp_path: Path) -> None:
    check_steps(make_engine(variant, tmp_path, SPEC))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(reduction: str, tmp_path: Path) -> None:
    spec = SparseSpec(16, 8, reduction, sink=2, recent=4, dense_layers=(1,))  # type: ignore[arg-type]
    check_steps(make_engine("llama", tmp_path, spec))


@pytest.mark.parametrize("variant", ["llama", "qwen3", "gemma2"])
def test_in_flight_batching_within_the_budget_equals_transformers(variant: str, tmp_path: Path) -> None:
    """Sequences join while others decode; a prompt arrives in chunks; all blocks are shuffled."""
    made = make_engine(variant, tmp_path, SparseSpec(budget=128, n_tip=8, dense_layers=()))
    engine, ids = made.engine, random_tokens(3)
    wanted = made.logits(ids)
    prompts = (20, 33, 9)

    def step(*work: tuple[int, int]) -> None:
        """(sequence, tokens to feed)"""
        pieces, ends = [], []
        for name, count in work:
            start = engine.sequences[name].length
            pieces.append((name, ids[name, start : start + count]))
            ends.append(start + count - 1)
        got = engine.step(pieces)
        assert relative(got, np.stack([wanted[name, end] for (name, _), end in zip(work, ends, strict=True)])) < 2e-4

    for name, prompt in enumerate(prompts):
        engine.join(name, prompt)
    step((0, 20))
    step((1, 16), (0, 1))
    step((1, 17), (2, 9), (0, 1))
    for _ in range(3):
        step((2, 1), (0, 1), (1, 1))
    step((1, 1))


def test_half_precision_is_close(tmp_path: Path) -> None:
    made = make_engine("qwen3", tmp_path, SparseSpec(budget=128, n_tip=8, dense_layers=()))
    spec, path = made.spec, tmp_path / "half.onnx"
    export_plugin_onnx(made.checkpoint, random_profile(made.checkpoint), spec, path, dtype="float16", limits=LIMITS)
    engine, ids = PackedEngine(path, made.checkpoint, made.layers, "float16"), random_tokens(1)
    engine.join(0, PROMPT)
    got = [prefill(engine, ids, 0, PROMPT), prefill(engine, ids, PROMPT, PROMPT + 1)]
    assert got[0].dtype == np.float32
    assert relative(np.concatenate(got), made.logits(ids)[0, [PROMPT - 1, PROMPT]]) < 2e-2
