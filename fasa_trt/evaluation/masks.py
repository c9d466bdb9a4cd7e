"""Choosing tokens: boolean masks over cache columns, the batched twin of `core/reference.py`'s `select`."""

from __future__ import annotations

import torch
from torch import Tensor


def top_mask(scores: Tensor, seen: Tensor, budget: int, forced: Tensor | None = None) -> Tensor:
    """The `budget` best of the `seen` columns, `forced` ones first; all seen ones where they are no more than that.

    scores: float32 [..., C]. seen, forced: bool, broadcastable to it. Returns bool of the scores' shape.
    Ties go to the lower column; NaN ranks below every number.
    """
    seen = seen.expand(scores.shape)
    if scores.shape[-1] <= budget:
        return seen
    limits = torch.finfo(scores.dtype)
    scores = scores.nan_to_num(nan=limits.min, posinf=limits.max, neginf=limits.min)
    if forced is not None:
        scores = scores.masked_fill(forced, torch.inf)
    scores = scores.masked_fill(~seen, -torch.inf)
    last = scores.topk(budget, dim=-1).values[..., -1:]
    better, equal = scores > last, scores == last
    room = budget - better.sum(-1, keepdim=True)
    return (better | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))) & seen
