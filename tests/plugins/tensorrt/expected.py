"""What a layer of the plugin should leave in the pool and give, in float64 from what it was given."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fasa_trt.core.reference import Array, attend, importance, select
from tests.plugins.tensorrt.driver import Layer

INT4, INT8, FP8 = 1, 2, 3  # label_kind


def rotated(x: Tensor, norm: Tensor | None, past: int, eps: float, tables: tuple[Array, Array]) -> Array:
    """Queries or keys [tokens, heads, head_dim] after the norm and the rotation, before the last rounding.

    tables: float32 [kv_heads, head_dim / 2], radians per position and factor on cos and sin, of adjacent dims. norm:
    [heads, head_dim]; transformers rounds before and after its weight, and so does this.
    """
    row = x.double().cpu().numpy()
    if norm is not None:
        row = rounded(row / np.sqrt((row**2).mean(axis=-1, keepdims=True) + eps), x.dtype)
        row = rounded(row * norm.double().cpu().numpy(), x.dtype)
    frequency, scale = (np.repeat(table, x.shape[1] // len(table), axis=0).astype(np.float64) for table in tables)
    angle = (past + np.arange(len(row)))[:, None, None] * frequency
    cos, sin, even, odd = np.cos(angle), np.sin(angle), row[..., 0::2], row[..., 1::2]
    turned = np.stack([(even * cos - odd * sin) * scale, (odd * cos + even * sin) * scale], axis=-1)
    return turned.reshape(row.shape)


def rounded(x: Array, dtype: torch.dtype) -> Array:
    return torch.from_numpy(x).to(dtype).double().numpy()


def label_width(layer: Layer) -> int:
    """Bytes of a label."""
    return int(layer["n_tip"]) * (1 if layer["label_kind"] == INT4 else 2)


def quantised(layer: Layer, keys: Array) -> tuple[Array, Array]:
    """The labels of keys [length, kv_heads, head_dim] as `fasa.h` stores them, uint8 [length, kv_heads, bytes] and
    float16 [length, kv_heads]; the latter 0 for FP8, which has none."""
    prefix = keys[..., : 2 * int(layer["n_tip"])].astype(np.float32)
    if layer["label_kind"] == FP8:
        eight = torch.from_numpy(prefix).clamp(-448, 448).to(torch.float8_e4m3fn)
        return eight.view(torch.uint8).numpy(), np.zeros(prefix.shape[:2], np.float16)
    top = np.float32(7 if layer["label_kind"] == INT4 else 127)
    scales = np.clip(np.abs(prefix).max(axis=-1) / top, np.float32(6.2e-5), np.float32(65504)).astype(np.float16)
    codes = np.clip(np.rint(prefix / scales[..., None].astype(np.float32)), -top, top).astype(np.int8)
    if layer["label_kind"] == INT8:
        return codes.view(np.uint8), scales
    nibbles = (codes + 8).astype(np.uint8)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4, scales


def label_values(layer: Layer, codes: Array, scales: Array) -> Array:
    """float64 [length, kv_heads, 2 n_tip]: what stored labels stand for."""
    if layer["label_kind"] == FP8:
        return torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy()
    if layer["label_kind"] == INT8:
        numbers = codes.view(np.int8).astype(np.float64)
    else:
        numbers = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1).astype(np.float64) - 8
    return numbers * scales[..., None].astype(np.float64)


def scoring_query(layer: Layer, q: Array) -> Array:
    """float64 [1, 2 n_tip]: what labels are multiplied with, for queries [group, head_dim] that share a token set by
    the sum of their scores. Integer labels meet a query of 8 bits."""
    total = np.zeros(2 * int(layer["n_tip"]), np.float32)
    for head in q[:, : len(total)].astype(np.float32):
        total += head
    if layer["label_kind"] not in (INT4, INT8):
        return total[None].astype(np.float64)
    step = np.maximum(np.abs(total).max(), np.float32(1e-20)) / np.float32(127)
    return np.clip(np.rint(total / step), -127, 127)[None].astype(np.float64) * np.float64(step)


def chosen(layer: Layer, q: Array, labels: Array) -> tuple[Array, float]:
    """The tokens that the queries [group, head_dim] of a KV head attend to, and by how much the last of them beats the
    first that is rejected, relative to the largest score. labels: float64 [length, 2 n_tip]."""
    budget, sink, recent = (int(layer[name]) for name in ("budget", "sink", "recent"))
    query = scoring_query(layer, q)
    scores = importance(query, labels, np.arange(query.shape[1]), float(layer["scale"]), "sum")
    tokens, more = (select(scores, count, sink, recent)[0] for count in (budget, budget + 1))
    (rejected,) = set(more) - set(tokens)
    by_score = tokens[(tokens >= sink) & (tokens < scores.shape[1] - recent)]
    return tokens, float((scores[0, by_score].min() - scores[0, rejected]) / np.abs(scores).max())


def attention(layer: Layer, q: Array, k: Array, v: Array, labels: Array, *, generates: bool) -> tuple[Array, Array]:
    """The output for the last tokens of a sequence, and the margins [n, kv_heads] of `chosen`; NaN where all tokens are
    attended to.

    q: float64 [n, heads, head_dim], rotated. k, v: [length, kv_heads, head_dim]. labels: [length, kv_heads, 2 n_tip].
    """
    past, kv_heads = len(k) - len(q), k.shape[1]
    group, window, scale = q.shape[1] // kv_heads, int(layer["window"]), float(layer["scale"])
    out, margins = np.empty(q.shape), np.full((len(q), kv_heads), np.nan)
    for i in range(len(q)):
        seen = slice(max(0, past + i + 1 - window) if window else 0, past + i + 1)
        for head in range(kv_heads):
            mine = slice(head * group, (head + 1) * group)
            keys, values = k[seen, head], v[seen, head]
            if generates and layer["n_tip"] and len(keys) > int(layer["budget"]):
                tokens, margins[i, head] = chosen(layer, q[i, mine], labels[:, head])
                keys, values = keys[tokens], values[tokens]
            out[i, mine] = attend(q[i, mine], keys, values, scale)
    return out, margins
