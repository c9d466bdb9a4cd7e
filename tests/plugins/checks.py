"""Attention against the reference in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tests.plugins.paged import Case

KINDS = ["int4", "int8", "fp8", "prefix"]
HEAD_DIMS = [64, 96, 128, 256]
GROUPS = [(1, 1), (2, 2), (3, 3), (8, 4), (5, 5), (4, 8), (2, 16), (32, 1)]  # KV heads, query heads of each
DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # relative, beyond the rounding of the output itself
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
CLEAR = 1e-5  # scores that are this much closer may be chosen in either order, for they are computed in float32


def check(case: Case, share: float = 0.5) -> None:
    """Compares the heads whose choice of tokens is clear, which must be `share` of all."""
    got = case.run()
    wanted, gap = case.expected()
    clear = gap > CLEAR
    assert clear.mean() >= share
    assert torch.isfinite(got).all()
    error = np.abs(got.double().cpu().numpy() - wanted) - ROUNDING[got.dtype] * np.abs(wanted)
    worst = (error.max(axis=-1) / np.abs(wanted).max(axis=-1))[clear]
    assert not worst.size or worst.max() < TOLERANCE[got.dtype], worst.max()


def values_of(case: Case, seq: int, kv_head: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Where the values of a sequence lie: `pool[index]` is [L, head_dim] for the index that comes second."""
    tokens = case.pool.shape[4]
    position = torch.arange(int(case.lengths[seq]), device=case.q.device)
    block = case.offsets[seq, 1].long()[position // tokens] // (2 * case.pool.shape[1])
    full = torch.full_like(position, case.layer), torch.ones_like(position), torch.full_like(position, kv_head)
    return case.pool, (block, *full, position % tokens)


def poison(case: Case, seq: int, kv_head: int, which: Tensor) -> None:
    """Sets the values of the tokens that `which` (bool or int64) names to NaN: whoever attends to one of them shows."""
    pool, index = values_of(case, seq, kv_head)
    pool[tuple(part[which] for part in index)] = float("nan")


def row_of(case: Case, seq: int) -> Case:
    """One sequence of a batch alone, with the batch's bounds on lengths."""
    mine = slice(seq, seq + 1)
    return replace(case, q=case.q[mine], offsets=case.offsets[mine], lengths=case.lengths[mine])


def attention(case: Case, seq: int, q: Tensor, window: int) -> Tensor:
    """float64 [T, Hq, head_dim]: q are the last T tokens of a sequence."""
    kv_heads = case.pool.shape[3]
    keys, values = (torch.stack([case.cached(seq, kind, head) for head in range(kv_heads)]) for kind in (0, 1))
    tokens, heads, head_dim = q.shape
    grouped = q.double().view(tokens, kv_heads, heads // kv_heads, head_dim)
    logits = torch.einsum("tkgd,kld->kgtl", grouped, keys) * case.scale
    if case.softcap:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    age = torch.arange(keys.shape[1] - tokens, keys.shape[1], device=q.device)[:, None]
    age = age - torch.arange(keys.shape[1], device=q.device)
    logits = logits.masked_fill((age < 0) | (age >= (window or keys.shape[1])), -torch.inf)
    return torch.einsum("kgtl,kld->tkgd", logits.softmax(-1), values).reshape(tokens, heads, head_dim)


def close(got: Tensor, wanted: Tensor) -> None:
    assert torch.isfinite(got).all()
    error = (got.double() - wanted).abs() - ROUNDING[got.dtype] * wanted.abs()
    assert error.max() < TOLERANCE[got.dtype] * wanted.abs().max(), error.max() / wanted.abs().max()


def dense(case: Case, window: int = 0) -> Tensor:
    from fasa_trt.plugins.torch.dense import dense_decode

    return dense_decode(
        case.q, case.pool, case.layer, case.offsets, case.lengths, case.max_length, case.scale, case.softcap, window
    )


def check_dense(case: Case, window: int = 0) -> None:
    got = dense(case, window)
    for seq in range(len(case.lengths)):
        close(got[seq : seq + 1], attention(case, seq, case.q[seq : seq + 1], window))
