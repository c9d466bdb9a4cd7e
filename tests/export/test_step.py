"""What the layers of a step share, computed by onnxruntime for many rows at once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from fasa_trt.core.reference import sampled
from fasa_trt.core.spec import SparseSpec
from fasa_trt.export.graph import IR_VERSIONS, OPSET, Ops
from fasa_trt.export.step import Step

Numbers = NDArray[np.int64]


def run_sample(capacity: int, position: Numbers, padding: Numbers) -> tuple[Numbers, NDArray[np.bool_]]:
    """`Step.sample` of rows whose new token has slot `position`: slots and whether they count, both [rows, n]."""
    ops = Ops("float32")
    step = Step(ops, SparseSpec())
    step.any_cache = ir.val("cache", dtype=ir.DataType.FLOAT, shape=["batch", 1, "capacity", 1])
    slots, counts = step.sample
    slots.dtype, counts.dtype = ir.DataType.INT64, ir.DataType.BOOL
    inputs = [*step.inputs, step.any_cache]
    graph = ir.Graph(
        inputs, [slots, counts], nodes=ops.nodes, initializers=ops.initializers, opset_imports={"": OPSET}, name="step"
    )
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSIONS[OPSET])).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    rows = len(position)
    feed = {
        "input_ids": np.zeros((rows, 1), np.int64),
        "cache_position": position,
        "left_padding": padding,
        "logit_index": np.zeros((rows, 1), np.int64),
        "sparse": np.asarray(True),
        "cache": np.zeros((rows, 1, capacity, 1), np.float32),
    }
    found = session.run(None, feed)
    return found[0].reshape(rows, -1), found[1].reshape(rows, -1)


@pytest.mark.parametrize("capacity", [16, 100, 512, 513, 1200])
@pytest.mark.parametrize("first", [0, 7])
def test_sample_is_that_of_the_reference(capacity: int, first: int) -> None:
    """Rows of every length that fits, after `first` slots of padding."""
    position = np.arange(first, capacity)
    slots, counts = run_sample(capacity, position, np.full_like(position, first))
    assert slots.min() >= 0 and (slots <= position[:, None]).all()
    for row, chosen, counted in zip(position, slots, counts, strict=True):
        wanted = first + np.flatnonzero(sampled(int(row) - first + 1))
        assert np.sort(chosen[counted]).tolist() == wanted.tolist()  # each of them once
