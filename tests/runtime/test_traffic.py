"""The share of the cache that is read, counted element by element."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasa_trt.core.engine_dir import EngineDirectory
from fasa_trt.core.spec import SparseSpec
from fasa_trt.runtime.traffic import kv_elements_read

KV_HEADS, HEAD_DIM, BUDGET = 2, 8, 40
LAYERS: list[dict[str, Any]] = [
    {"n_tip": 3, "window": None},
    {"n_tip": 0, "window": None},
    {"n_tip": 0, "window": 50},
    {"n_tip": 3, "window": None},
]


def engine(layers: list[dict[str, Any]]) -> EngineDirectory:
    config = {
        "pretrained_config": {"num_key_value_heads": KV_HEADS, "head_size": HEAD_DIM},
        "fasa": {"layers": layers, "sparse": SparseSpec(budget=BUDGET).to_json()},
    }
    return EngineDirectory(Path(), config, {})


def brute(layers: list[dict[str, Any]], lengths: list[int], sparse: bool) -> tuple[int, int]:
    read = full = 0
    for length in lengths:
        for layer in layers:
            for _ in range(KV_HEADS):
                visible = length if layer["window"] is None else min(length, layer["window"])
                full += sum(HEAD_DIM + HEAD_DIM for _ in range(visible))
                if sparse and layer["n_tip"] and length > BUDGET:
                    read += sum(2 * layer["n_tip"] for _ in range(visible)) + BUDGET * (HEAD_DIM + HEAD_DIM)
                else:
                    read += visible * (HEAD_DIM + HEAD_DIM)
    return read, full


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("lengths", [[1], [40], [41], [500], [3, 40, 41, 77, 500]])
@pytest.mark.parametrize("layers", [LAYERS, LAYERS[:1], LAYERS[1:3], [{"n_tip": 1, "window": None}]])
def test_counted_one_by_one(layers: list[dict[str, Any]], lengths: list[int], sparse: bool) -> None:
    assert kv_elements_read(engine(layers), np.array(lengths), sparse=sparse) == brute(layers, lengths, sparse)


def test_long_contexts_tend_to_the_label_share() -> None:
    read, full = kv_elements_read(engine(LAYERS[:1]), np.array([10_000_000]), sparse=True)
    assert read / full == pytest.approx(3 / HEAD_DIM, rel=1e-4)


def test_nothing_is_read_for_no_rows() -> None:
    assert kv_elements_read(engine(LAYERS), np.array([], np.int64), sparse=True) == (0, 0)
