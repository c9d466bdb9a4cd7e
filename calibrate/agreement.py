"""Contextual agreement: how many of a head's true top K keys another set of logits finds.

    CA_K(b) = |TopK(a) & TopK(b)| / K        (arXiv 2602.03152, calibration)

The indices of TopK(b) are not needed, only its smallest value: b finds a key of TopK(a) if it gives it at least that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def found_share(logits: Tensor, top: Tensor, ks: Sequence[int]) -> Tensor:
    """Agreement of every row of logits with the true ranking, for each K: float32 [len(ks), G, rows], in 0..1.

    logits: float32 [G, rows, n]; on a CPU its rows are left in another order. top: int64 [G, at least min(max(ks), n)],
    the keys by true rank. A K of n or more takes every key: its agreement is 1.
    Keys of equal logit at the edge of a row's top K share the places that are left there, so that a row without any
    information gets K / n, as if it guessed.
    """
    n = logits.shape[-1]
    found = logits.gather(-1, top[:, None].expand(-1, logits.shape[1], -1))
    largest = _largest(logits, min(max(ks) + 1, n))
    shares = []
    for k in (min(k, n) for k in ks):
        edge = largest[..., -k, None]
        share = (found[..., :k] >= edge).float().mean(-1)
        if k < n and bool((largest[..., -k - 1, None] == edge).any()):
            tied, places = _count(logits == edge), k - _count(logits > edge)
            above, at_edge = _count(found[..., :k] > edge), _count(found[..., :k] == edge)
            share = (above + at_edge * places / tied) / k
        shares.append(share)
    return torch.stack(shares)


def _count(mask: Tensor) -> Tensor:
    return mask.float().sum(-1)


def _largest(rows: Tensor, count: int) -> Tensor:
    """The `count` largest numbers along the last dim, ascending: [..., count].

    On a CPU NumPy's vectorised partition and sort, in place, take a fraction of the time of torch's.
    """
    if rows.device.type != "cpu":
        return rows.topk(count).values.flip(-1)
    first = rows.shape[-1] - count
    rows.numpy().partition(first, axis=-1)
    rows.numpy()[..., first:].sort(axis=-1)
    return rows[..., first:]
