"""Layers and steps to try the plugin with."""

from __future__ import annotations

from tests.plugins.tensorrt.driver import BF16, FLOAT, INT32, INT64, Layer, Tensors

SPARSE: Layer = {
    "layer_index": 1,
    "num_q_heads": 8,
    "num_kv_heads": 2,
    "head_dim": 128,
    "tokens_per_block": 32,
    "num_layers": 3,
    "label_kind": 0,
    "n_tip": 16,
    "budget": 64,
    "sink": 4,
    "recent": 16,
    "reduction": 0,
    "window": 0,
    "dense_below": 0,
    "has_qk_norm": 0,
    "max_num_tokens": 600,
    "max_batch_size": 6,
    "max_seq_len": 1000,
    "scale": 0.125,
    "softcap": 0.0,
    "norm_eps": 1e-5,
}
DENSE: Layer = {**SPARSE, "n_tip": 0, "window": 100}


def tensors(
    layer: Layer,
    *,
    tokens: int = -1,
    seqs: int = -1,
    pools: int = -1,
    max_blocks: int = -1,
    layers: int = 3,
    dtype: int = BF16,
) -> Tensors:
    """The plugin's inputs, and its output."""
    heads, kv_heads, head_dim = (int(layer[name]) for name in ("num_q_heads", "num_kv_heads", "head_dim"))
    q, kv = (tokens, heads * head_dim), (tokens, kv_heads * head_dim)
    table = (kv_heads, head_dim // 2)
    shapes: list[tuple[int, ...]] = [q, kv, kv, table, table]
    shapes += [(seqs,)] * 5
    shapes += [(pools, seqs, 2, max_blocks), (pools, 2), (layers, 2)]
    types = [dtype] * 3 + [FLOAT] * 2 + [INT32] * 6 + [INT64, INT32]
    if layer["has_qk_norm"]:
        shapes += [(heads, head_dim), (kv_heads, head_dim)]
        types += [dtype] * 2
    return Tensors([*shapes, q], [*types, dtype])
