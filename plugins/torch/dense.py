"""`torch.ops.fasa.dense_decode` and `torch.ops.fasa.prefill`: dense attention over the pool; shapes as in `ops.py`.

All blocks must lie in the pool that is given. The sliding `window` counts tokens, the query's own included; 0 for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasa_trt.core.errors import FasaError
from fasa_trt.plugins.torch.ops import _check_tensors, _decode, _launch, _pool
from fasa_trt.plugins.torch.structs import PrefillParams


@torch.library.custom_op("fasa::dense_decode", mutates_args=())
def dense_decode(
    q: Tensor,
    pool: Tensor,
    layer: int,
    offsets: Tensor,
    lengths: Tensor,
    max_length: int,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    """One decode step of one layer that attends every cached token. q: contiguous [S, Hq, head_dim] after RoPE;
    lengths: int32 [S] on the device, at most max_length. Returns the attention's output, like q."""
    numbers = {"max_length": max_length, "scale": scale, "softcap": softcap, "window": window}
    return _decode("fasa_dense_decode", q, pool, layer, offsets, lengths, **numbers)


@dense_decode.register_fake
def _(q: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("fasa::prefill", mutates_args=())
def prefill(
    q: Tensor,
    query_lengths: Tensor,
    pool: Tensor,
    layer: int,
    offsets: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    """Causal attention of N query tokens, the last query_lengths[s] of each sequence. q: [N, Hq, head_dim] after RoPE,
    heads contiguous, the sequences one after another; query_lengths, lengths: int32 [S] on the device, summing to at
    most N, and with their keys and values in the pool. Returns [N, Hq, head_dim]; rows past the sum are undefined."""
    _check_tensors(q, pool, offsets, lengths)
    if q.stride(2) != 1 or q.stride(1) != q.shape[2] or q.data_ptr() % 16:
        raise FasaError("the heads of a token in q must be contiguous, and q 16-byte aligned")
    if query_lengths.dtype != torch.int32 or query_lengths.shape != lengths.shape or not query_lengths.is_contiguous():
        raise FasaError("query_lengths must be contiguous int32, one for each sequence")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    params = PrefillParams(
        q=q.data_ptr(),
        q_token_stride=q.stride(0),
        out=out.data_ptr(),
        query_lengths=query_lengths.data_ptr(),
        lengths=lengths.data_ptr(),
        num_seqs=len(lengths),
        num_tokens=q.shape[0],
        num_q_heads=q.shape[1],
        scale=scale,
        softcap=softcap,
        window=window,
        pool=_pool(pool, layer, offsets),
    )
    _launch("fasa_prefill", params, q)
    return out


@prefill.register_fake
def _(q: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape)
