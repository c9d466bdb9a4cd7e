"""An engine with the plugin, really built by TensorRT for RTX, which needs no GPU for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fasa_trt.core.contract import INPUTS
from fasa_trt.core.errors import FasaError
from fasa_trt.export.build_log import new_log
from fasa_trt.export.plugin import DOMAIN, NODE_BINDINGS, OP_TYPE
from fasa_trt.export.tensorrt import load_tensorrt, parse
from tests.plugins.tensorrt.driver import Layer
from tests.plugins.tensorrt.layers import DENSE, SPARSE

DTYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
SIZES = {"tokens": (1, 8, 600), "sequences": (1, 4, 6), "pools": (1, 1, 2), "max_blocks": (1, 32, 32)}


@pytest.fixture(scope="module")
def trt(plugin_library: Path) -> Any:
    """TensorRT for RTX with the plugin loaded."""
    pytest.importorskip("tensorrt_rtx")
    trt = load_tensorrt("tensorrt_rtx")
    registry = trt.get_plugin_registry()
    registry.load_library(str(plugin_library))  # silent when it fails
    assert registry.get_creator(OP_TYPE, "1", DOMAIN) is not None
    return trt


def write_model(layer: Layer, dtype: str, file: Path, heads_too_many: int = 0) -> dict[str, list[Any]]:
    """One FasaAttention node between the graph's inputs and its output; returns the inputs' shapes."""
    heads, kv_heads, head_dim = (int(layer[name]) for name in ("num_q_heads", "num_kv_heads", "head_dim"))
    heads += heads_too_many
    element = DTYPES[dtype]
    rows: dict[str, list[Any]] = {
        name: ["tokens", n * head_dim] for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    }
    bindings = {name: list(INPUTS[name].shape_of(layers=3)) for name in NODE_BINDINGS}
    inputs = [helper.make_tensor_value_info(name, element, shape) for name, shape in rows.items()]
    for name, shape in bindings.items():
        kind = TensorProto.INT64 if INPUTS[name].dtype == "int64" else TensorProto.INT32
        inputs.append(helper.make_tensor_value_info(name, kind, shape))
    table = np.ones((kv_heads, head_dim // 2), np.float32)
    constants = [numpy_helper.from_array(table, name) for name in ("inv_freq", "rope_scale")]
    norms = ["q_norm", "k_norm"] if layer["has_qk_norm"] else []
    for name, n in zip(norms, (heads, kv_heads), strict=False):
        constants.append(helper.make_tensor(name, element, (n, head_dim), [1.0] * (n * head_dim)))
    node = helper.make_node(
        OP_TYPE, [*rows, "inv_freq", "rope_scale", *bindings, *norms], ["out"], domain=DOMAIN,
        plugin_namespace=DOMAIN, plugin_version="1", **layer,
    )  # fmt: skip
    out = helper.make_tensor_value_info("out", element, ["tokens", heads * head_dim])
    graph = helper.make_graph([node], "layer", inputs, [out], constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(file))
    return {**rows, **bindings}


def build(trt: Any, file: Path, shapes: Mapping[str, list[Any]]) -> tuple[Any, Any]:
    """The network and the plan (None where there is none)."""
    log = new_log(trt)
    builder = trt.Builder(log)
    network, parser = parse(trt, builder, log, file)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for name, shape in shapes.items():
        ranges = [SIZES.get(size, (size, size, size)) for size in shape]
        profile.set_shape(name, *zip(*ranges, strict=True))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    del parser  # owns the weights
    return network, plan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [SPARSE, DENSE, {**SPARSE, "has_qk_norm": 1}], ids=["sparse", "dense", "normed"])
def test_an_engine_is_built(trt: Any, tmp_path: Path, layer: Layer, dtype: str) -> None:
    shapes = write_model(layer, dtype, tmp_path / "layer.onnx")
    network, plan = build(trt, tmp_path / "layer.onnx", shapes)
    assert plan is not None and plan.nbytes > 0
    inputs = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
    assert set(inputs) == set(shapes)
    for name in NODE_BINDINGS:
        assert inputs[name].dtype == {"int32": trt.int32, "int64": trt.int64}[INPUTS[name].dtype]
    out = network.get_output(0)
    assert out.dtype == {"float16": trt.float16, "bfloat16": trt.bfloat16}[dtype]
    assert tuple(out.shape) == (-1, 1024)
    assert b"FasaAttention" in bytes(plan)


def test_attributes_that_are_refused_stop_the_parser(
    trt: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_model({**SPARSE, "n_tip": 12}, "float16", tmp_path / "layer.onnx")
    with pytest.raises(FasaError, match="cannot parse"):
        build(trt, tmp_path / "layer.onnx", {})
    assert "n_tip must be 8, 16, 24, 32, 48 or 64" in capfd.readouterr().err


def test_tensors_that_do_not_fit_stop_the_build(trt: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shapes = write_model(SPARSE, "float16", tmp_path / "layer.onnx", heads_too_many=1)
    assert build(trt, tmp_path / "layer.onnx", shapes)[1] is None
    assert "input 0 has a shape that does not fit" in capfd.readouterr().err
