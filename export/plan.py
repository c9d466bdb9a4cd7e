"""What the exporter decides for each layer before it writes a node: chunk order, sparsity, window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fasa_trt.core.checkpoint import Checkpoint
from fasa_trt.core.errors import FasaError
from fasa_trt.core.profile import Profile
from fasa_trt.core.rope import Rotary, rotary_of, window_of
from fasa_trt.core.spec import SparseSpec


@dataclass(frozen=True)
class LayerPlan:
    """One attention layer.

    rotary: None for a layer without RoPE. order: int64 [kv_heads, F], frequency chunks of each KV head, dominant
    first. n_tip: how many of them predict importance; 0 for a dense layer. window: sliding window in tokens, or None.
    """

    index: int
    rotary: Rotary | None
    order: NDArray[np.int64]
    n_tip: int
    window: int | None

    @property
    def sparse(self) -> bool:
        return self.n_tip > 0

    @property
    def label_dims(self) -> int:
        """Head dims that lead every key row and predict its importance."""
        return 2 * self.n_tip

    def dims(self) -> NDArray[np.int64] | None:
        """The checkpoint's head dim at each baked position, int64 [kv_heads, head_dim]; None to leave them alone."""
        if self.rotary is None:
            return None
        return self.rotary.pairs[self.order].reshape(len(self.order), -1)


def can_be_sparse(checkpoint: Checkpoint, spec: SparseSpec, index: int, *, max_seq_len: int) -> bool:
    """Whether a layer attends sparsely once there is a profile.

    Layers without RoPE and layers whose sliding window is shorter than `max_seq_len` stay dense: the first have no
    frequency chunks, the second read little already.
    """
    window = window_of(checkpoint.config, index)
    return (
        index not in spec.dense_layers
        and rotary_of(checkpoint.config, index, max_seq_len=max_seq_len) is not None
        and (window is None or window >= max_seq_len)
    )


def plan_layers(
    checkpoint: Checkpoint, profile: Profile | None, spec: SparseSpec, *, max_seq_len: int
) -> list[LayerPlan]:
    """Plans every layer; without a profile all are dense.

    `spec` must be resolved. Raises FasaError when the profile belongs to another model.
    """
    chunks = checkpoint.head_dim // 2
    natural = np.tile(np.arange(chunks), (checkpoint.num_kv_heads, 1))
    ranking = None
    if profile is not None:
        profile.check(checkpoint.fingerprint)
        ranking = profile.ranking(spec.rule, budget=spec.budget)
        expected = (checkpoint.num_layers, checkpoint.num_kv_heads, chunks)
        if ranking.shape != expected:
            raise FasaError(
                f"the profile's tables are {ranking.shape}, the model needs {expected}", hint="calibrate again"
            )
    plans = []
    for index in range(checkpoint.num_layers):
        rotary = rotary_of(checkpoint.config, index, max_seq_len=max_seq_len)
        window = window_of(checkpoint.config, index)
        if window is not None and window >= max_seq_len:
            window = None
        sparse = ranking is not None and can_be_sparse(checkpoint, spec, index, max_seq_len=max_seq_len)
        plans.append(
            LayerPlan(
                index=index,
                rotary=rotary,
                order=ranking[index] if sparse and ranking is not None else natural,
                n_tip=(spec.n_tip or 0) if sparse else 0,
                window=window,
            )
        )
    return plans
