"""The plugin lowering: the graph against TensorRT-LLM's contract, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.numpy_helper import to_array

from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.core.contract import FASA_INPUTS, EngineLimits
from fasa_trt.core.errors import FasaError
from fasa_trt.core.spec import REDUCTION_CODES, SparseSpec
from fasa_trt.export import plugin_limits, tensorrt
from fasa_trt.export.build_log import new_log
from fasa_trt.export.onnx_model import Exported
from fasa_trt.export.plugin import NODE_BINDINGS, export_plugin_onnx
from fasa_trt.export.plugin_limits import pool_kv_heads
from fasa_trt.export.trtllm_config import trtllm_config
from tests.engines import random_profile
from tests.models import VARIANTS, make_model
from tests.plugin_engine import LIMITS, overrides_of

SPEC = SparseSpec(budget=16, n_tip=8, sink=2, recent=4, dense_layers=())


def export(variant: str, directory: Path, *, spec: SparseSpec = SPEC, **arguments: Any) -> Exported:
    """Exports a random model of `variant`; arguments: of `export_plugin_onnx`, others override the model's config."""
    settings: dict[str, Any] = {"dtype": "float16", "limits": LIMITS}
    for name in ("dtype", "limits", "labels", "dense_below"):
        if name in arguments:
            settings[name] = arguments.pop(name)
    checkpoint = open_checkpoint(
        make_model(variant, directory / "checkpoint", **{**overrides_of(variant), **arguments})
    )
    spec = spec.resolve(head_dim=checkpoint.head_dim, num_layers=checkpoint.num_layers, max_seq_len=LIMITS.max_seq_len)
    return export_plugin_onnx(checkpoint, random_profile(checkpoint), spec, directory / "model.onnx", **settings)


def nodes_of(exported: Exported) -> tuple[onnx.ModelProto, list[onnx.NodeProto], list[dict[str, Any]]]:
    """The model, its attention nodes, and the attributes of each."""
    model = onnx.load(str(exported.path))
    nodes = [node for node in model.graph.node if node.op_type == "FasaAttention"]
    attributes = [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in nodes]
    return model, nodes, attributes


def described(value: onnx.ValueInfoProto) -> tuple[str, int, tuple[str | int, ...]]:
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_graph_keeps_the_contract(variant: str, dtype: str, tmp_path: Path) -> None:
    exported = export(variant, tmp_path, dtype=dtype)
    onnx.checker.check_model(str(exported.path), full_check=True)
    model, nodes, _ = nodes_of(exported)
    layers = len(exported.layers)
    kinds = {"int32": onnx.TensorProto.INT32, "int64": onnx.TensorProto.INT64}
    wanted = [(binding.name, kinds[binding.dtype], binding.shape_of(layers=layers)) for binding in FASA_INPUTS]
    assert [described(value) for value in model.graph.input] == wanted
    assert [described(value) for value in model.graph.output] == [
        ("logits", onnx.TensorProto.FLOAT, ("num_logits", 97))
    ]
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20, "ai.fasa": 1}
    assert not model.functions
    assert len(nodes) == layers

    # TensorRT must not touch what lies in host memory.
    host = {binding.name for binding in FASA_INPUTS if binding.memory != "gpu"}
    readers = {node.op_type for node in model.graph.node if host & set(node.input)}
    assert readers == {"FasaAttention"}
    assert {name for node in model.graph.node for name in node.input} >= {binding.name for binding in FASA_INPUTS}


@pytest.mark.parametrize("variant", ["llama", "qwen3", "glm4", "smollm3"])
def test_inputs_of_a_node(variant: str, tmp_path: Path) -> None:
    exported = export(variant, tmp_path)
    model, nodes, attributes = nodes_of(exported)
    weights = {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
    for node, plan, a in zip(nodes, exported.layers, attributes, strict=True):
        assert tuple(node.input[5:13]) == NODE_BINDINGS
        inv_freq, scale = (weights[name] for name in node.input[3:5])
        assert inv_freq.dtype == scale.dtype == np.float32
        assert inv_freq.shape == scale.shape == (2, 32)
        if plan.rotary is None:
            assert not inv_freq.any() and (scale == 1).all()
        else:
            assert np.array_equal(inv_freq, plan.rotary.inv_freq[plan.order])
            assert np.array_equal(scale, plan.rotary.scale[plan.order])
        norms = [weights[name] for name in node.input[13:]]
        assert a["has_qk_norm"] == (variant == "qwen3")
        assert [norm.shape for norm in norms] == ([(4, 64), (2, 64)] if variant == "qwen3" else [])
        assert all(norm.dtype == np.float16 for norm in norms)


def test_attributes(tmp_path: Path) -> None:
    limits = EngineLimits(max_batch_size=3, max_num_tokens=50, max_seq_len=100, tokens_per_block=16)
    exported = export("gemma2", tmp_path, limits=limits, dense_below=64, num_hidden_layers=2)
    _, _, attributes = nodes_of(exported)
    common = {
        "plugin_namespace": b"ai.fasa",
        "plugin_version": b"1",
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "tokens_per_block": 16,
        "num_layers": 2,
        "label_kind": 0,
        "budget": 16,
        "sink": 2,
        "recent": 4,
        "reduction": REDUCTION_CODES[SparseSpec.reduction],
        "scale": pytest.approx(24**-0.5),
        "softcap": 5.0,
        "norm_eps": pytest.approx(1e-6),
        "dense_below": 64,
        "has_qk_norm": 0,
        "max_num_tokens": 50,
        "max_batch_size": 3,
        "max_seq_len": 100,
    }
    assert attributes[0] == {**common, "layer_index": 0, "n_tip": 0, "window": 24}
    assert attributes[1] == {**common, "layer_index": 1, "n_tip": 8, "window": 0}


def test_label_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the graph says once the plugin reads them."""
    monkeypatch.setattr(plugin_limits, "READABLE", ("prefix", "int4", "int8"))
    spec = SparseSpec(budget=16, n_tip=8, sink=2, recent=4, dense_layers=(1,))
    exported = export("llama", tmp_path, spec=spec, labels="int4")
    _, _, attributes = nodes_of(exported)
    assert [a["label_kind"] for a in attributes] == [1, 0, 1]
    assert [a["num_layers"] for a in attributes] == [2, 1, 2]  # layers with a label head have a pool of their own
    assert [a["num_kv_heads"] for a in attributes] == [2, 2, 2]
    assert pool_kv_heads(2, exported.layers, "int4") == [3, 2, 3]
    assert pool_kv_heads(2, exported.layers, "prefix") == [2, 2, 2]
    with pytest.raises(FasaError, match="int8 labels of 4 KV heads take 256 bytes a token, a label head has 128"):
        export(
            "llama",
            tmp_path,
            spec=SparseSpec(budget=64, n_tip=32, dense_layers=()),
            labels="int8",
            num_key_value_heads=4,
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float32"}, "does not compute in float32"),
        ({"head_dim": 32}, "no kernel for heads of 32 dims"),
        (
            {"num_attention_heads": 34, "num_key_value_heads": 2, "hidden_size": 34},
            "no kernel for 34 query heads and 2 KV heads",
        ),
        (
            {"num_attention_heads": 34, "num_key_value_heads": 34, "hidden_size": 34},
            "no kernel for 34 query heads and 34 KV heads",
        ),
        (
            {"spec": SparseSpec(budget=16, n_tip=12, sink=2, recent=4, dense_layers=())},
            r"no kernel for n-tip 12 \(--n-tip 16\)",
        ),
        (
            {"spec": SparseSpec(budget=15, n_tip=8, sink=2, recent=4, dense_layers=())},
            r"cannot attend to 15 tokens \(a budget of 16",
        ),
        ({"labels": "int4"}, r"does not read int4 labels \(it reads prefix\)"),
    ],
)
def test_what_no_kernel_can_execute_is_refused(
    arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_limits, "READABLE", ("prefix",))  # whatever the plugin reads by now
    with pytest.raises(FasaError, match=message):
        export("llama", tmp_path, **arguments)
    assert not list(tmp_path.glob("*.onnx*"))


def test_the_sample_model(tiny_dir: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_dir)
    spec = SparseSpec().resolve(head_dim=checkpoint.head_dim, num_layers=checkpoint.num_layers, max_seq_len=2048)
    limits = EngineLimits(max_batch_size=8, max_num_tokens=2048, max_seq_len=2048)
    steps: list[tuple[int, int]] = []
    exported = export_plugin_onnx(
        checkpoint,
        random_profile(checkpoint),
        spec,
        tmp_path / "tiny.onnx",
        dtype="bfloat16",
        limits=limits,
        progress=lambda done, total: steps.append((done, total)),
    )
    onnx.checker.check_model(str(exported.path), full_check=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.onnx", "tiny.onnx.data"]
    assert steps[-1][0] == steps[-1][1]
    config = trtllm_config(checkpoint, spec, exported.layers, limits, dtype="bfloat16")
    assert len(config["fasa"]["layers"]) == len(nodes_of(exported)[1]) == checkpoint.num_layers


def test_dense_models_have_no_sparse_limits(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model("llama", tmp_path / "checkpoint", head_dim=64))
    spec = SparseSpec(budget=8, n_tip=3, sink=1, recent=1, dense_layers=())
    exported = export_plugin_onnx(checkpoint, None, spec, tmp_path / "m.onnx", dtype="float16", limits=LIMITS)
    _, _, attributes = nodes_of(exported)
    assert [a["n_tip"] for a in attributes] == [0, 0, 0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", ["llama", "gemma3", "olmo2"])
def test_tensorrt_builds_all_but_the_node(variant: str, dtype: str, tmp_path: Path) -> None:
    """With the queries in place of attention's output, as the node's library may not be at hand."""
    pytest.importorskip("tensorrt_rtx")
    exported = export(variant, tmp_path, dtype=dtype, num_hidden_layers=1)
    model = onnx.load(str(exported.path))
    for node in model.graph.node:
        if node.op_type == "FasaAttention":
            node.CopyFrom(onnx.helper.make_node("Identity", node.input[:1], node.output))
    file = tmp_path / "without.onnx"
    onnx.save(model, str(file))
    trt = tensorrt.load_tensorrt("tensorrt_rtx")
    log = new_log(trt)
    builder = trt.Builder(log)
    network, _parser = tensorrt.parse(trt, builder, log, file)
    config = builder.create_builder_config()
    config.add_optimization_profile(tensorrt._profile(builder, network, LIMITS.ranges(1), file))
    found = [network.get_input(index) for index in range(network.num_inputs)]
    assert [(x.name, x.dtype, tuple(x.shape)) for x in found] == [
        (
            binding.name,
            getattr(trt, binding.dtype),
            tuple(-1 if isinstance(size, str) else size for size in binding.shape_of(layers=1)),
        )
        for binding in FASA_INPUTS
    ]
    assert network.get_output(0).dtype == trt.float32
    assert builder.build_serialized_network(network, config) is not None
    assert not log.errors
