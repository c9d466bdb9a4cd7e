"""What a method sees of one layer: the prompt when it has been read, and every decode step after it.

A column of the cache is a token's position, in every row of the batch: rows of different length end at different
columns, and what lies beyond a row's own position is not there yet for its query.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def dot(q: Tensor, k: Tensor) -> Tensor:
    """float32 [B, Hkv, G, T, C] from q [B, Hkv, G, T, d] and k [B, Hkv, C, d]."""
    batch, kv_heads, group, steps, dims = q.shape
    product = q.float().reshape(batch, kv_heads, group * steps, dims) @ k.float().transpose(2, 3)
    return product.view(batch, kv_heads, group, steps, -1)


@dataclass(frozen=True)
class Prompt:
    """A layer after prefill.

    k: [B, Hkv, C, d] after RoPE. lengths: int64 [B], tokens of each row. q: [B, Hkv, G, W, d], the last W queries
    after RoPE. positions: int64 [B, W] of them; negative where a prompt is shorter than W. scale: on the logits.
    """

    k: Tensor
    lengths: Tensor
    q: Tensor
    positions: Tensor
    scale: float


@dataclass(frozen=True)
class Step:
    """A layer in T consecutive decode steps, which later ones do not change: step t sees the columns up to its own.

    q: [B, Hkv, G, T, d], k: [B, Hkv, C, d], both after RoPE and with these steps' tokens in. positions: int64 [B, T].
    valid: bool [B, T], False for padding after a row's last token. first: the lowest of all positions.
    """

    q: Tensor
    k: Tensor
    positions: Tensor
    valid: Tensor
    first: int
    scale: float
    softcap: float = 0.0
    window: int | None = None

    @cached_property
    def columns(self) -> Tensor:
        """int64 [C]."""
        return torch.arange(self.k.shape[2], device=self.k.device)

    @cached_property
    def at(self) -> Tensor:
        """Positions as int64 [B, 1, 1, T, 1], to compare with `columns`."""
        return self.positions[:, None, None, :, None]

    @cached_property
    def seen(self) -> Tensor:
        """bool [B, 1, 1, T, C]: the columns that a step could attend to."""
        seen = self.columns <= self.at
        return seen if self.window is None else seen & (self.columns > self.at - self.window)

    @cached_property
    def logits(self) -> Tensor:
        """float32 [B, Hkv, G, T, C] of full attention, -inf where there is nothing to see."""
        logits = self.scale * dot(self.q, self.k)
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.masked_fill(~self.seen, -torch.inf)

    def ends(self, sink: int, recent: int) -> Tensor:
        """bool [B, 1, 1, T, C]: the first `sink` and the last `recent` tokens."""
        return (self.columns < sink) | (self.columns > self.at - recent)
