"""Labels in one head more of the pool, as `fasa.h` lays them out, in views for the operators of `ops.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from fasa_trt.core.labels import label_bytes


def split(pool: Tensor, layer: int, kind: str, n_tip: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values, labels and scales, as views of a pool [blocks, layers, 2, Hkv + 1, t, head_dim] whose last head
    is the label head of `layer`: [blocks, layers, 2, Hkv, t, head_dim], uint8 [blocks, t, Hkv, bytes] and float16
    [blocks, t, Hkv]. The labels must fit: Hkv * bytes is at most 2 * head_dim."""
    kv_heads, width = pool.shape[3] - 1, label_bytes(kind, n_tip)
    labels = pool[:, layer, 0, kv_heads].view(torch.uint8)[..., : kv_heads * width]
    scales = pool[:, layer, 1, kv_heads].view(torch.float16)[..., :kv_heads]
    return pool[:, :, :, :kv_heads], labels.unflatten(-1, (kv_heads, width)), scales
