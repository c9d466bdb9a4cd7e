"""What the plugin lowering makes of a model of Llama-3.1-8B's shape: the whole graph, its weights as holes in files."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import pytest

from fasa_trt.core.checkpoint import Checkpoint, open_checkpoint
from fasa_trt.core.labels import LabelKind
from fasa_trt.core.profile import Profile
from fasa_trt.export import plugin_limits
from fasa_trt.export.bake import Initializer
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.engine import engine_config, export_model

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4096, 14336, 32, 32, 8, 128, 128256
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            found[f"{prefix}self_attn.{name}_proj.weight"] = (rows * HEAD_DIM, HIDDEN)
        found[f"{prefix}self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        found |= {f"{prefix}mlp.{name}_proj.weight": (MLP, HIDDEN) for name in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, MLP)
        found |= {f"{prefix}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return found


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """All tensors in one file of 16 GB, none of which is on the disk."""
    directory = tmp_path_factory.mktemp("llama-8b")
    (directory / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    header, offset = {}, 0
    for name, shape in shapes().items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    described = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(described)) + described)
        file.truncate(file.tell() + offset)
    checkpoint = open_checkpoint(directory)
    checkpoint.__dict__["fingerprint"] = "0" * 64  # of a gigabyte of zeros
    return checkpoint


@pytest.fixture
def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are skipped in the file instead of being written."""

    def skip(tensor: Initializer, file: BinaryIO) -> None:
        file.truncate(file.seek(tensor.nbytes, 1))

    monkeypatch.setattr(Initializer, "tofile", skip)


def profile_of(checkpoint: Checkpoint) -> Profile:
    shape = (LAYERS, HEADS, HEAD_DIM // 2)
    spread = np.random.default_rng(0).random(shape, np.float32)
    return Profile(
        agreement=spread[None], spread=spread, ks=(256,), num_kv_heads=KV_HEADS, fingerprint=checkpoint.fingerprint
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs files with holes")
@pytest.mark.parametrize(("labels", "n_tip", "heads"), [("prefix", 24, None), ("int4", 32, [8] + [9] * (LAYERS - 1))])
def test_llama_8b(
    labels: LabelKind,
    n_tip: int,
    heads: list[int] | None,
    llama_8b: Checkpoint,
    tmp_path: Path,
    without_weights: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugin_limits, "READABLE", ("prefix", "int4"))
    config = BuildConfig.resolve(llama_8b, flags={"target": "tensorrt-llm", "labels": labels})
    assert (config.n_tip, config.max_seq_len, config.dtype) == (n_tip, 131072, "bfloat16")
    exported = export_model(llama_8b, profile_of(llama_8b), config, tmp_path / "model.onnx")
    onnx.checker.check_model(str(exported.path), full_check=True)
    data = tmp_path / "model.onnx.data"
    assert data.stat().st_size > 2 * sum(int(np.prod(shape)) for shape in shapes().values())
    graph = onnx.load(str(exported.path), load_external_data=False).graph
    assert sum(node.op_type == "FasaAttention" for node in graph.node) == LAYERS
    content = engine_config(llama_8b, config, exported.layers)  # which checks it
    assert content["pretrained_config"].get("num_kv_heads_per_layer") == heads
    assert content["fasa"]["labels"] == labels
    data.unlink()
