"""The operators of `fasa_trt.plugins.torch` for CPU tensors, out of the reference: for tests of what calls them.

They run inside `operators_on_cpu` alone. Labels are not quantised: scores come from the keys' leading dims.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fasa_trt.core import reference
from fasa_trt.core.spec import SparseSpec
from fasa_trt.plugins.torch import dense, ops


def slots(pool: Tensor, offsets: Tensor, sequence: int, position: Tensor) -> tuple[Tensor, Tensor]:
    """Block and row in it of each position."""
    tokens = pool.shape[4]
    keys = offsets[sequence, 0].long()
    assert (offsets[sequence, 1].long() == keys + 1).all()
    return keys[position.long() // tokens] // (2 * pool.shape[1]), position.long() % tokens


def cached(pool: Tensor, layer: int, offsets: Tensor, sequence: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a sequence, float32 [kv_heads, length, head_dim]."""
    block, row = slots(pool, offsets, sequence, torch.arange(length))
    k, v = (pool[block, layer, kind, :, row].float().transpose(0, 1) for kind in range(2))
    return k, v


@ops.append.register_kernel("cpu")
def append(
    q: Tensor, k: Tensor, v: Tensor, sequence: Tensor, position: Tensor, inv_freq: Tensor, rope_scale: Tensor,
    pool: Tensor, layer: int, offsets: Tensor, labels: Tensor, scales: Tensor, label_kind: str, n_tip: int,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, norm_eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    def turned(x: Tensor, norm: Tensor | None, frequencies: Tensor, factor: Tensor) -> Tensor:
        assert x.stride(2) == 1 and x.stride(1) == x.shape[2], "the heads of a token must be contiguous"
        x = x.float()
        if norm is not None:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm_eps) * norm.float()
        angle = position[:, None, None].float() * frequencies
        cos, sin = angle.cos() * factor, angle.sin() * factor
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    assert label_kind == "prefix" or labels.shape[3] >= n_tip
    group = q.shape[1] // k.shape[1]
    rotated = turned(k, k_norm, inv_freq, rope_scale)
    for token in range(len(q)):
        block, row = slots(pool, offsets, int(sequence[token]), position[token : token + 1])
        pool[block, layer, 0, :, row] = rotated[token].to(pool.dtype)
        pool[block, layer, 1, :, row] = v[token].to(pool.dtype)
    wide = [table.repeat_interleave(group, dim=0) for table in (inv_freq, rope_scale)]
    return turned(q, q_norm, *wide).to(q.dtype)


@ops.decode.register_kernel("cpu")
def decode(
    q: Tensor, pool: Tensor, layer: int, offsets: Tensor, lengths: Tensor, labels: Tensor, scales: Tensor,
    label_kind: str, n_tip: int, max_length: int, dense_below: int, budget: int, sink: int,
    recent: int, scale: float, softcap: float, reduction: str,
) -> Tensor:  # fmt: skip
    assert q.is_contiguous() and int(lengths.max()) <= max_length
    spec = SparseSpec(budget, n_tip, reduction, sink=sink, recent=recent)  # type: ignore[arg-type]
    kv_heads, dims = pool.shape[3], np.arange(2 * n_tip)
    out = np.empty(q.shape, np.float32).reshape(len(q), kv_heads, -1, q.shape[2])
    for s, g in np.ndindex(len(q), kv_heads):
        k, v = (x[g].numpy() for x in cached(pool, layer, offsets, s, int(lengths[s])))
        queries = q[s].view(kv_heads, -1, q.shape[2])[g].float().numpy()
        out[s, g] = reference.decode(queries, k, v, dims, spec, scale, softcap or None)
    return torch.from_numpy(out).view(q.shape).to(q.dtype)


@dense.prefill.register_kernel("cpu")
def prefill(
    q: Tensor, query_lengths: Tensor, pool: Tensor, layer: int, offsets: Tensor, lengths: Tensor, scale: float,
    softcap: float, window: int,
) -> Tensor:  # fmt: skip
    assert int(query_lengths.sum()) <= len(q)
    kv_heads, out, token = pool.shape[3], torch.full_like(q, torch.nan), 0
    for s, (count, length) in enumerate(zip(query_lengths.tolist(), lengths.tolist(), strict=True)):
        k, v = cached(pool, layer, offsets, s, length)
        for position in range(length - count, length):
            seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
            queries = q[token].float().view(kv_heads, -1, q.shape[2])
            for g in range(kv_heads):
                one, keys, values = (x.numpy() for x in (queries[g], k[g, seen], v[g, seen]))
                attended = torch.from_numpy(reference.attend(one, keys, values, scale, softcap or None))
                out[token].view(queries.shape)[g] = attended.to(q.dtype)
            token += 1
    return out


@dense.dense_decode.register_kernel("cpu")
def dense_decode(
    q: Tensor, pool: Tensor, layer: int, offsets: Tensor, lengths: Tensor, max_length: int, scale: float,
    softcap: float, window: int,
) -> Tensor:  # fmt: skip
    assert int(lengths.max()) <= max_length
    return prefill(q, torch.ones_like(lengths), pool, layer, offsets, lengths, scale, softcap, window)


OPERATORS = (ops.append, ops.decode, dense.prefill, dense.dense_decode)
_off = contextlib.ExitStack()  # stays open: other tests in this process get what they would without this module
for _operator in OPERATORS:
    _off.enter_context(_operator.set_kernel_enabled("cpu", enabled=False))


@contextlib.contextmanager
def operators_on_cpu() -> Iterator[None]:
    with contextlib.ExitStack() as enabled:
        for operator in OPERATORS:
            enabled.enter_context(operator.set_kernel_enabled("cpu", enabled=True))
        yield
