"""How much of the cache a decode step reads: the quantity that FASA is about."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasa_trt.core.engine_dir import EngineDirectory


def kv_elements_read(engine: EngineDirectory, lengths: NDArray[np.integer[Any]], *, sparse: bool) -> tuple[int, int]:
    """Cache elements that one step reads for rows of `lengths` tokens, and that it would read without sparsity.

    Per token and KV head a dense layer reads 2 d elements; a sparse one reads 2 n_tip of every token and 2 d of the
    budget's. Rows within the budget are dense.
    """
    model, spec = engine.config["pretrained_config"], engine.spec
    heads, head_dim = int(model["num_key_value_heads"]), int(model["head_size"])
    read = full = 0
    for layer in engine.fasa["layers"]:
        seen = lengths if layer["window"] is None else np.minimum(lengths, layer["window"])
        dense = 2 * head_dim * seen
        focused = 2 * layer["n_tip"] * seen + 2 * head_dim * spec.budget
        is_sparse = sparse & (layer["n_tip"] > 0) & (lengths > spec.budget)
        read += int(np.where(is_sparse, focused, dense).sum()) * heads
        full += int(dense.sum()) * heads
    return read, full
