"""Weights arrive cast, grouped and permuted as attention needs them, and no other way."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from fasa_trt.core.checkpoint import Checkpoint, open_checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.core.reference import attend
from fasa_trt.core.safetensors_file import PIECE_BYTES
from fasa_trt.core.spec import SparseSpec
from fasa_trt.export.bake import Weights, cast, group_qkv
from fasa_trt.export.graph import Ops
from fasa_trt.export.plan import LayerPlan, plan_layers
from tests.engines import random_profile
from tests.models import make_model

Array = NDArray[Any]
SPEC = SparseSpec(budget=40, n_tip=5, dense_layers=())


def opened(variant: str, tmp_path: Path, **overrides: Any) -> tuple[Checkpoint, LayerPlan, dict[str, Array]]:
    """A checkpoint, the plan of its layer 1 with a random order, and its tensors as the library reads them."""
    checkpoint = open_checkpoint(make_model(variant, tmp_path / "model", **overrides))
    plan = plan_layers(checkpoint, random_profile(checkpoint), SPEC, max_seq_len=128)[1]
    return checkpoint, plan, load_file(checkpoint.path / "model.safetensors")


def data(value: ir.Value | None) -> Array:
    assert value is not None and value.shape is not None
    tensor: Any = value.const_value
    array: Array = tensor.numpy()
    assert tuple(value.shape) == array.shape, "the declared shape is another one"
    assert tensor.dtype == ir.DataType.from_numpy(array.dtype)
    file = io.BytesIO()
    tensor.tofile(file)
    assert file.getvalue() == array.tobytes(), "what is written is not what is read"
    return array


# --- cast ---


def test_every_bfloat16_is_cast_exactly() -> None:
    array = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    got = cast(array.reshape(256, 256), np.dtype(np.float32))
    assert got.dtype == np.float32 and got.shape == (256, 256)
    np.testing.assert_array_equal(got.view(np.uint32).reshape(-1) >> 16, np.arange(1 << 16))
    assert not (got.view(np.uint32) & 0xFFFF).any()


def test_bfloat16_in_another_memory_order() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(cast(array.T, np.dtype(np.float32)), array.astype(np.float32).T)
    np.testing.assert_array_equal(cast(array[:, ::2], np.dtype(np.float32)), array.astype(np.float32)[:, ::2])


@pytest.mark.parametrize("source", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("target", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_cast_rounds_as_numpy_does(source: Any, target: Any) -> None:
    array = np.random.default_rng(0).normal(size=(5, 7)).astype(source)
    got = cast(array, np.dtype(target))
    assert got.dtype == target
    np.testing.assert_array_equal(got.astype(np.float64), array.astype(target).astype(np.float64))


def test_cast_to_the_same_dtype_copies_nothing() -> None:
    array = np.zeros(3, np.float16)
    assert cast(array, np.dtype(np.float16)) is array


# --- group_qkv ---


def brute_group(stacked: Array, heads: int, kv_heads: int, head_dim: int, dims: Array | None) -> Array:
    """Row by row."""
    rows: list[Array] = []
    queries, keys, values = 0, heads * head_dim, (heads + kv_heads) * head_dim
    for g in range(kv_heads):
        order = range(head_dim) if dims is None else dims[g]
        for h in range(heads):
            if h // (heads // kv_heads) == g:
                rows += [stacked[queries + h * head_dim + i] for i in order]
        rows += [stacked[keys + g * head_dim + i] for i in order]
        rows += [stacked[values + g * head_dim + i] for i in range(head_dim)]
    return np.stack(rows)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 1), (3, 3)])
@pytest.mark.parametrize("rest", [(5,), ()])
@pytest.mark.parametrize("permuted", [True, False])
def test_group_qkv(heads: int, kv_heads: int, rest: tuple[int, ...], permuted: bool) -> None:
    rng = np.random.default_rng(heads)
    head_dim = 8
    stacked = rng.normal(size=((heads + 2 * kv_heads) * head_dim, *rest))
    dims = rng.permuted(np.tile(np.arange(head_dim), (kv_heads, 1)), axis=1) if permuted else None
    wanted = brute_group(stacked, heads, kv_heads, head_dim, dims)
    three = np.split(stacked, [heads * head_dim, (heads + kv_heads) * head_dim])
    for arrays in ([stacked], three):
        got = group_qkv(arrays, heads, kv_heads, head_dim, dims)
        np.testing.assert_array_equal(got, wanted)
        assert got.shape == stacked.shape


def test_group_qkv_keeps_bfloat16() -> None:
    stacked = np.arange(24, dtype=np.float32).astype(ml_dtypes.bfloat16)
    assert group_qkv([stacked], 1, 1, 8, None).dtype == ml_dtypes.bfloat16


# --- Weights ---


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_qkv_of_separate_projections(dtype: str, tmp_path: Path) -> None:
    checkpoint, plan, tensors = opened("llama-3", tmp_path)
    weights = Weights(checkpoint, Ops(dtype))
    for kind in ("weight", "bias"):
        stacked = np.concatenate([tensors[f"model.layers.1.self_attn.{x}_proj.{kind}"] for x in "qkv"])
        got = data(weights.qkv(plan, kind))
        assert got.dtype.name == dtype
        np.testing.assert_array_equal(got, brute_group(stacked, 4, 2, 32, plan.dims()).astype(got.dtype))


def test_qkv_of_a_fused_projection(tmp_path: Path) -> None:
    checkpoint, plan, tensors = opened("phi3", tmp_path)
    weights = Weights(checkpoint, Ops("float32"))
    stacked = tensors["model.layers.1.self_attn.qkv_proj.weight"]
    head_dim = checkpoint.head_dim
    np.testing.assert_array_equal(data(weights.qkv(plan, "weight")), brute_group(stacked, 4, 2, head_dim, plan.dims()))
    assert weights.qkv(plan, "bias") is None


def test_no_bias(tmp_path: Path) -> None:
    checkpoint, plan, _ = opened("llama", tmp_path)
    assert Weights(checkpoint, Ops("float32")).qkv(plan, "bias") is None


def test_permuting_leaves_attention_alone(tmp_path: Path) -> None:
    """Projections as baked, label dims first, give the attention of the checkpoint's own order."""
    checkpoint, plan, _ = opened("llama", tmp_path)
    weights = Weights(checkpoint, Ops("float32"))
    plain = dataclasses.replace(plan, rotary=None)
    x = np.random.default_rng(0).normal(size=(9, 48)).astype(np.float32)
    results = []
    for each in (plan, plain):
        matrix = data(Weights(checkpoint, weights.ops).qkv(each, "weight"))
        projected = (x @ matrix.T).reshape(9, 2, 4, 32)  # tokens, KV heads, two queries + key + value, dims
        results.append([attend(projected[-1, g, :2], projected[:, g, 2], projected[:, g, 3], 0.2) for g in range(2)])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_missing_projection(tmp_path: Path) -> None:
    checkpoint, plan, tensors = opened("llama", tmp_path)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, checkpoint.path / "model.safetensors")
    weights = Weights(open_checkpoint(checkpoint.path), Ops("float32"))
    with pytest.raises(FasaError, match=r"has no tensor model\.layers\.1\.self_attn\.k_proj\.weight"):
        weights.qkv(plan, "weight")


def test_some_biases_but_not_all(tmp_path: Path) -> None:
    checkpoint, plan, tensors = opened("llama-3", tmp_path)
    del tensors["model.layers.1.self_attn.v_proj.bias"]
    save_file(tensors, checkpoint.path / "model.safetensors")
    weights = Weights(open_checkpoint(checkpoint.path), Ops("float32"))
    with pytest.raises(FasaError, match=r"has no tensor model\.layers\.1\.self_attn\.v_proj\.bias"):
        weights.qkv(plan, "bias")


def test_projection_of_another_shape(tmp_path: Path) -> None:
    checkpoint, plan, tensors = opened("llama", tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name][:-1].copy()}, checkpoint.path / "model.safetensors")
    weights = Weights(open_checkpoint(checkpoint.path), Ops("float32"))
    with pytest.raises(FasaError, match=r"q_proj\.weight does not have the 256 rows .*checkpoint is not of its config"):
        weights.qkv(plan, "weight")


@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize(("variant", "spans"), [("qwen3", False), ("gemma3", False), ("olmo2", True)])
def test_head_norms(which: str, variant: str, spans: bool, tmp_path: Path) -> None:
    """In float32, offset, and in the baked order of each KV head; OLMo 2 has a weight for every head."""
    checkpoint, plan, tensors = opened(variant, tmp_path)
    if not plan.sparse:  # Gemma 3's sliding layers: permute all the same
        plan = dataclasses.replace(plan, order=random_profile(checkpoint).ranking("spread", budget=40)[1])
    offset = 1.0 if variant == "gemma3" else 0.0
    found = Weights(checkpoint, Ops("float16")).head_norm(plan, which, offset)
    assert found is not None
    value, spans_heads = found
    assert spans_heads == spans
    weight = tensors[f"model.layers.1.self_attn.{which}_norm.weight"] + np.float32(offset)
    group = 2 if which == "q" else 1
    dims = plan.dims()
    assert dims is not None
    got = data(value)
    assert got.dtype == np.float32 and got.shape == (2, group, 32)
    for g, j, i in np.ndindex(got.shape):
        start = (g * group + j) * 32 if spans else 0
        assert got[g, j, i] == weight[start + dims[g, i]]


def test_head_norm_of_a_layer_without_rope_keeps_its_order(tmp_path: Path) -> None:
    checkpoint, plan, tensors = opened("qwen3", tmp_path)
    found = Weights(checkpoint, Ops("float32")).head_norm(dataclasses.replace(plan, rotary=None), "k", 0.0)
    assert found is not None
    weight = tensors["model.layers.1.self_attn.k_norm.weight"]
    np.testing.assert_array_equal(data(found[0]), np.broadcast_to(weight, (2, 1, 32)))


def test_no_head_norm(tmp_path: Path) -> None:
    checkpoint, plan, _ = opened("llama", tmp_path)
    assert Weights(checkpoint, Ops("float32")).head_norm(plan, "q", 0.0) is None


def test_norms_stay_in_float32(tmp_path: Path) -> None:
    checkpoint, _, tensors = opened("llama", tmp_path)
    weights = Weights(checkpoint, Ops("float16"))
    got = data(weights.norm("model.norm.weight", 1.0))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, tensors["model.norm.weight"] + np.float32(1))


def test_stored_tensors_are_shared_and_read_late(tmp_path: Path) -> None:
    """Tied embeddings are one initializer; nothing is read before the graph is saved."""
    checkpoint, _, tensors = opened("llama", tmp_path)
    ops = Ops("float16")
    weights = Weights(checkpoint, ops)
    name = "model.embed_tokens.weight"
    first = weights.stored(name)
    assert weights.stored(name) is first
    assert len(ops.initializers) == 1
    array = tensors[name] * 2
    stored = checkpoint.tensor(name)
    with stored.file.open("r+b") as file:
        file.seek(stored.offset)
        file.write(array.tobytes())
    np.testing.assert_array_equal(data(first), array.astype(np.float16))
    assert weights.has(name) and not weights.has("model.embed_tokens.bias")


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_large_tensors_are_written_as_they_are_read(stored: str, dtype: str, tmp_path: Path) -> None:
    """Piece by piece: `data` compares both ways."""
    checkpoint, plan, tensors = opened("llama", tmp_path, hidden_size=512, vocab_size=301)
    if stored == "bfloat16":
        tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
        save_file(tensors, checkpoint.path / "model.safetensors", metadata={"format": "pt"})
        checkpoint = open_checkpoint(checkpoint.path)
    embeddings = tensors["model.embed_tokens.weight"]
    assert embeddings.nbytes > PIECE_BYTES and embeddings.nbytes % PIECE_BYTES
    weights = Weights(checkpoint, Ops(dtype))
    got = data(weights.stored("model.embed_tokens.weight"))
    np.testing.assert_array_equal(got, cast(embeddings, got.dtype))
    data(weights.qkv(plan, "weight"))
