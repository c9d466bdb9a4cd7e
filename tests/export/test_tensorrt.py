"""Plans built by TensorRT for RTX, which needs no GPU to build; running one does, so the graph that it is given is
checked in onnxruntime instead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from fasa_trt.core.checkpoint import open_checkpoint
from fasa_trt.core.engine_dir import EngineDirectory
from fasa_trt.core.errors import FasaError
from fasa_trt.core.spec import SparseSpec
from fasa_trt.export import parser_link, tensorrt
from fasa_trt.export.build_log import BuildProgress, new_log
from fasa_trt.export.onnx_model import export_onnx
from fasa_trt.export.tensorrt import RTX_ARCHITECTURES, build_plan, standard_ranges
from fasa_trt.runtime.onnxruntime import OnnxRuntimeBackend
from tests.engines import MAX_SEQ_LEN, decode_steps, export, prefill, random_profile, relative
from tests.models import VARIANTS, make_model

SPEC = SparseSpec(budget=16, n_tip=4, sink=2, recent=4, dense_layers=())
SMALL: dict[str, Any] = {"num_hidden_layers": 1}
# Two layers where they differ: windowed and full, with and without RoPE.
DIFFERING: dict[str, dict[str, Any]] = {
    "gemma2": {"num_hidden_layers": 2},
    "gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"num_hidden_layers": 2, "no_rope_layer_interval": 2},
}


@pytest.fixture(scope="module")
def trt() -> Any:
    pytest.importorskip("tensorrt_rtx")
    return tensorrt.load_tensorrt("tensorrt_rtx")


def fixed_model(
    variant: str, directory: Path, *, dtype: str = "float32", spec: SparseSpec = SPEC, **overrides: Any
) -> Path:
    """The ONNX file that TensorRT is given for a random model of `variant`."""
    overrides = {**SMALL, **DIFFERING.get(variant, {}), **overrides}
    checkpoint = open_checkpoint(make_model(variant, directory / "checkpoint", **overrides))
    spec = spec.resolve(head_dim=checkpoint.head_dim, num_layers=checkpoint.num_layers, max_seq_len=MAX_SEQ_LEN)
    file = directory / "fixed.onnx"
    profile = random_profile(checkpoint)
    export_onnx(checkpoint, profile, spec, file, dtype=dtype, max_seq_len=MAX_SEQ_LEN, fixed_capacity=True)
    return file


def build(file: Path, *, max_seq_len: int = MAX_SEQ_LEN, prefill_chunk: int = 256, **arguments: Any) -> dict[str, Any]:
    ranges = standard_ranges(4, max_seq_len, prefill_chunk)
    return build_plan(file, file.with_suffix(".rtx"), flavour="tensorrt_rtx", ranges=ranges, **arguments)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_builds(variant: str, tmp_path: Path, trt: Any) -> None:
    file = fixed_model(variant, tmp_path)
    facts = build(file, prefill_chunk=32)
    assert file.with_suffix(".rtx").stat().st_size == facts["plan_bytes"] > 0
    assert facts["builder_version"] == trt.__version__
    assert facts["profile"] == {"batch": [1, 4, 4], "tokens": [1, 1, 32], "logit_tokens": [1, 1, 32]}
    assert not [warning for warning in facts["warnings"] if "sparse is unused" not in warning]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", ["gemma2", "qwen3"])
def test_half_precision_builds(variant: str, dtype: str, tmp_path: Path, trt: Any) -> None:
    assert not build(fixed_model(variant, tmp_path, dtype=dtype))["warnings"]


@pytest.mark.parametrize("reduction", ["mean_softmax", "max_softmax", "per_head", "sampled_softmax"])
def test_reductions_build(reduction: Any, tmp_path: Path, trt: Any) -> None:
    spec = SparseSpec(budget=16, n_tip=4, sink=2, recent=4, reduction=reduction, dense_layers=())
    assert not build(fixed_model("llama", tmp_path, spec=spec))["warnings"]


def test_bindings_are_those_of_the_graph(tmp_path: Path, trt: Any) -> None:
    """What a runtime will find in the plan: names, dtypes, sizes, and how dynamic ones are called."""
    file = fixed_model("llama", tmp_path, dtype="bfloat16")
    builder = trt.Builder(log := new_log(trt))
    network, _parser = tensorrt.parse(trt, builder, log, file)
    dtypes = {onnx.TensorProto.INT64: trt.int64, onnx.TensorProto.FLOAT: trt.float32, onnx.TensorProto.BOOL: trt.bool}
    dtypes[onnx.TensorProto.BFLOAT16] = trt.bfloat16
    graph = onnx.load(file, load_external_data=False).graph
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for tensors, values in ((inputs, graph.input), (outputs, graph.output)):
        assert [tensor.name for tensor in tensors] == [value.name for value in values]
        for tensor, value in zip(tensors, values, strict=True):
            kind = value.type.tensor_type
            assert tensor.dtype == dtypes[kind.elem_type]
            assert tuple(tensor.shape) == tuple(-1 if dim.dim_param else dim.dim_value for dim in kind.shape.dim)
    assert [inputs[0].get_dimension_name(axis) for axis in range(2)] == ["batch", "tokens"]


@pytest.mark.parametrize("variant", ["llama", "gemma2"])
@pytest.mark.parametrize("reduction", ["sum", "per_head", "sampled_softmax"])
def test_the_graph_for_tensorrt_computes_the_same(variant: str, reduction: Any, tmp_path: Path) -> None:
    spec = SparseSpec(budget=16, n_tip=4, sink=2, recent=4, reduction=reduction, dense_layers=())
    overrides = {**SMALL, **DIFFERING.get(variant, {})}
    plain = export(variant, tmp_path / "plain", spec, **overrides).backend
    file = fixed_model(variant, tmp_path / "fixed", spec=spec)
    config = {
        "pretrained_config": {"dtype": "float32"},
        "build_config": {"max_seq_len": MAX_SEQ_LEN, "max_batch_size": 8},
        "fasa": {"target": "onnxruntime", "model_file": file.name, "sparse": spec.to_json()},
    }
    fixed = OnnxRuntimeBackend(EngineDirectory(file.parent, config, {}), threads=1)
    ids = np.random.default_rng(0).integers(2, 97, (2, 80))
    for start in (8, 60):  # within the budget and beyond it
        wanted, got = (prefill(backend, ids[:, :start], chunk=23) for backend in (plain, fixed))
        assert relative(got, wanted) < 1e-5
        wanted, got = (decode_steps(backend, ids[:, : start + 10], start) for backend in (plain, fixed))
        assert relative(got, wanted) < 1e-5


def test_architectures(tmp_path: Path, trt: Any) -> None:
    assert {f"SM{architecture}" for architecture in RTX_ARCHITECTURES} <= set(trt.ComputeCapability.__members__)
    file = fixed_model("llama", tmp_path)
    everywhere = build(file)
    assert everywhere["architecture"] is None
    for architecture in RTX_ARCHITECTURES:
        facts = build(file, architecture=architecture)
        assert facts["architecture"] == architecture and not facts["warnings"]


def test_progress_ends_at_all(tmp_path: Path, trt: Any) -> None:
    seen: list[tuple[int, int]] = []
    build(fixed_model("llama", tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(set(seen))
    assert seen[-1] == (100, 100)


def test_progress_of_nested_phases() -> None:
    seen: list[int] = []
    progress = BuildProgress(lambda done, _: seen.append(done))
    progress.start("all", None, 2)
    progress.start("part", "all", 4)
    progress.step("part", 1)  # a quarter of the whole: two steps of four, in one of two
    progress.finish("part")
    progress.step("unknown", 0)
    progress.step("all", 0)
    progress.finish("all")
    assert seen == [25, 50, 100]


@pytest.mark.parametrize("by_signal", [True, False])
def test_interruption_stops_the_build(by_signal: bool, tmp_path: Path, trt: Any) -> None:
    def interrupt(done: int, total: int) -> None:
        if not by_signal:
            raise KeyboardInterrupt
        if done == 0:  # once: Ctrl-C for the second time is not survived
            signal.raise_signal(signal.SIGINT)

    file = fixed_model("llama", tmp_path)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build(file, progress=interrupt)
    assert not file.with_suffix(".rtx").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_refusals(tmp_path: Path, trt: Any) -> None:
    file = fixed_model("llama", tmp_path)
    with pytest.raises(FasaError, match="no such ONNX model"):
        build(tmp_path / "missing.onnx")
    with pytest.raises(FasaError, match=r"cannot build .*not self-consistent"):
        build(file, max_seq_len=2 * MAX_SEQ_LEN)  # more than the graph's cache holds
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    with pytest.raises(FasaError, match="cannot write"):
        ranges = standard_ranges(1, MAX_SEQ_LEN)
        build_plan(file, blocked / "model.rtx", flavour="tensorrt_rtx", ranges=ranges)


def test_broken_models(tmp_path: Path, trt: Any) -> None:
    file = fixed_model("llama", tmp_path)
    (tmp_path / "truncated.onnx").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(FasaError, match=r"cannot parse .*Failed to parse") as caught:
        build(tmp_path / "truncated.onnx")
    assert "\n" not in str(caught.value)
    model = onnx.load(file, load_external_data=False)
    model.graph.node[0].op_type = "Frobnicate"
    onnx.save(model, tmp_path / "unknown.onnx")
    with pytest.raises(FasaError, match=r"cannot parse .*Frobnicate"):
        build(tmp_path / "unknown.onnx")
    file.with_name("fixed.onnx.data").unlink()
    with pytest.raises(FasaError, match=r"cannot parse .*initializer"):
        build(file)


def test_open_capacity_is_refused(tmp_path: Path, trt: Any) -> None:
    export("llama", tmp_path, SPEC, **SMALL)
    with pytest.raises(FasaError, match="capacity"):
        build(tmp_path / "model-True.onnx")


def test_missing_and_old_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(FasaError, match=r'pip install "fasa-trt\[tensorrt\]"'):
        tensorrt.load_tensorrt("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.13.3.9"))
    with pytest.raises(FasaError, match=r"10.13.3.9 is too old: 10.14 is needed"):
        tensorrt.load_tensorrt("tensorrt")


PLUGIN_NODE = """
import sys
import onnx
from onnx import helper
from fasa_trt.export.build_log import new_log
from fasa_trt.export.tensorrt import load_tensorrt, parse

trt = load_tensorrt("tensorrt_rtx")

class Copy(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild):
    def __init__(self):
        for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild):
            base.__init__(self)
        self.plugin_name, self.plugin_version, self.plugin_namespace, self.num_outputs = "Copy", "1", "", 1
    def get_capability_interface(self, kind):
        return self
    def get_output_data_types(self, inputs):
        return inputs
    def get_output_shapes(self, inputs, shape_inputs, builder):
        return inputs
    def clone(self):
        return Copy()

class Creator(trt.IPluginCreatorV3One):
    def __init__(self):
        trt.IPluginCreatorV3One.__init__(self)
        self.name, self.plugin_version, self.plugin_namespace = "Copy", "1", ""
        self.field_names = trt.PluginFieldCollection([])
    def create_plugin(self, name, fields, phase):
        return Copy()

creator = Creator()
trt.get_plugin_registry().register_creator(creator, "")
x, y = (helper.make_tensor_value_info(name, 1, [4]) for name in "xy")
graph = helper.make_graph([helper.make_node("Copy", ["x"], ["y"])], "g", [x], [y])
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11), sys.argv[1])
builder = trt.Builder(log := new_log(trt))
network, parser = parse(trt, builder, log, sys.argv[1])
print(network.num_layers, "layer")
"""


def test_parsing_a_plugin_survives(tmp_path: Path, trt: Any) -> None:
    """Without `parser_link`, importing a plugin's node ends the process."""
    command = [sys.executable, "-c", PLUGIN_NODE, str(tmp_path / "plugin.onnx")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "1 layer\n"), result.stderr


needs_links = pytest.mark.skipif(sys.platform == "win32", reason="Windows needs no link")


@needs_links
def test_parser_link(tmp_path: Path) -> None:
    link = tmp_path / "libtensorrt_rtx.so"
    parser_link.link_parser_library(tmp_path)
    assert not link.is_symlink(), "nothing to link to"
    (tmp_path / "libtensorrt_rtx.so.1").write_bytes(b"library")
    link.symlink_to("libtensorrt_rtx.so.0")  # left over from an older version
    for _ in range(2):
        parser_link.link_parser_library(tmp_path)
        assert os.readlink(link) == "libtensorrt_rtx.so.1"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["libtensorrt_rtx.so", "libtensorrt_rtx.so.1"]


@needs_links
def test_parser_link_in_an_unwritable_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "libtensorrt_rtx.so.1").write_bytes(b"library")
    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(FasaError, match=r"Permission denied.*ln -sf libtensorrt_rtx.so.1 .*libtensorrt_rtx.so"):
        parser_link.link_parser_library(tmp_path)


def test_no_link_on_windows_or_without_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser_link.link_parser_library(None)
    (tmp_path / "libtensorrt_rtx.so.1").write_bytes(b"library")
    monkeypatch.setattr(sys, "platform", "win32")
    parser_link.link_parser_library(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
