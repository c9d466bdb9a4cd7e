"""How large an engine will be, and what its steps will read, before it is built."""

from __future__ import annotations

from typing import Any

import numpy as np

from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.contract import block_bytes
from fasa_trt.core.labels import label_bytes, scale_bytes
from fasa_trt.core.profile import Profile
from fasa_trt.export.config import BuildConfig
from fasa_trt.export.graph import NUMPY_DTYPES
from fasa_trt.export.plan import LayerPlan, plan_layers
from fasa_trt.export.plugin_limits import pool_kv_heads


def estimate(checkpoint: Checkpoint, profile: Profile | None, config: BuildConfig) -> dict[str, Any]:
    """Sizes of the engine that `config` describes, without building it; bytes.

    kv_bytes_per_token: of the cache, label heads included; kv_bytes: of all rows at their longest. label_bytes_per_
    token: of that, what quantised labels take. kv_read_per_token: read in each decode step per cached token, densely
    and by FASA; kv_read_fixed: by FASA besides, whatever the length (the budget's rows). block_bytes: of one block of
    the paged cache, all layers; 0 without one.
    """
    assert config.max_seq_len is not None and config.max_batch_size is not None
    width = NUMPY_DTYPES[config.dtype].itemsize
    stand_in = profile or _any_profile(checkpoint)
    layers = plan_layers(checkpoint, stand_in, config.spec, max_seq_len=config.max_seq_len)
    heads, head_dim, labels = checkpoint.num_kv_heads, checkpoint.head_dim, config.label_kind
    full = [plan for plan in layers if plan.window is None]
    dense = 2 * head_dim * heads * width
    pool_heads = pool_kv_heads(heads, layers, labels)
    per_token = sum(2 * head_dim * width * count for count in pool_heads)
    parts = ["model.embed_tokens.", "model.layers.", "model.norm."]  # not a vision tower, nor tied logits once more
    if not checkpoint.config.tie_word_embeddings:
        parts.append("lm_head.")
    exported = [tensor for name, tensor in checkpoint.tensors.items() if name.startswith(tuple(parts))]
    elements = sum(int(np.prod(tensor.shape)) for tensor in exported)

    def read_of_labels(plan: LayerPlan) -> int:
        if labels == "prefix":
            return plan.label_dims * heads * width
        return heads * (label_bytes(labels, plan.n_tip) + scale_bytes(labels))

    block = config.tokens_per_block or 0
    return {
        "weight_bytes": elements * width,
        "kv_bytes_per_token": per_token,
        "kv_bytes": per_token * config.max_seq_len * config.max_batch_size,
        "label_bytes_per_token": per_token - len(layers) * dense,
        "block_bytes": sum(2 * block_bytes(block, count, head_dim, width) for count in pool_heads),
        "kv_read_per_token_dense": len(full) * dense,
        "kv_read_per_token_fasa": sum(read_of_labels(plan) if plan.sparse else dense for plan in full),
        "kv_read_fixed_fasa": sum(config.budget * dense for plan in full if plan.sparse),
        "sparse_layers": sum(plan.sparse for plan in layers),
        "layers": len(layers),
    }


def _any_profile(checkpoint: Checkpoint) -> Profile:
    """Sizes do not depend on what was measured."""
    shape = (checkpoint.num_layers, checkpoint.num_heads, checkpoint.head_dim // 2)
    order = np.arange(shape[-1], dtype=np.int32)
    return Profile(
        agreement=np.zeros((1, *shape), np.float32),
        spread=np.zeros(shape, np.float32),
        ks=(256,),
        num_kv_heads=checkpoint.num_kv_heads,
        fingerprint=checkpoint.fingerprint,
        greedy=np.tile(order, (checkpoint.num_layers, checkpoint.num_kv_heads, 1)),
    )
