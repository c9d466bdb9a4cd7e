"""The KV cache of a batch of documents, read once and gone on from again and again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TAIL = 256  # queries of the prompt's end that are kept for methods that judge by them


@dataclass
class EvalCache:
    """keys, values: a [B, Hkv, C, d] for each layer, after RoPE, a token's column being its position.
    lengths: tokens of each row. tails: the last TAIL queries of each layer's prompt, [B, Hq, TAIL, d]; the ones before
    a row's start are zeros. scales: factor on each layer's logits.

    Columns beyond a row's length hold anything. So branches share their keys: one overwrites what another left.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: list[int]
    tails: list[Tensor]
    scales: list[float]

    @property
    def capacity(self) -> int:
        return int(self.keys[0].shape[2])

    def branch(self) -> EvalCache:
        """The same documents, to go on from. Only the latest branch may be used: they share memory."""
        return replace(self, lengths=list(self.lengths), tails=list(self.tails))

    def repeat(self, counts: list[int]) -> EvalCache:
        """Row i `counts[i]` times over, in memory of its own."""
        if all(count == 1 for count in counts):
            return self.branch()
        rows = [row for row, count in enumerate(counts) for _ in range(count)]
        index = torch.tensor(rows, device=self.keys[0].device)
        keys, values, tails = ([x.index_select(0, index) for x in xs] for xs in (self.keys, self.values, self.tails))
        return EvalCache(keys, values, [self.lengths[row] for row in rows], tails, self.scales)

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v [B, Hkv, T, d] to columns `positions` [B, T]."""
        rows = torch.arange(len(positions), device=positions.device)[:, None]
        self.keys[layer][rows, :, positions] = k.transpose(1, 2)
        self.values[layer][rows, :, positions] = v.transpose(1, 2)

    def observe(self, layer: int, q: Tensor, counts: Tensor, scale: float) -> None:
        """Shifts each row's `counts` [B] new queries, the first ones of q [B, Hq, T, d], into the tail."""
        self.scales[layer] = scale
        both = torch.cat([self.tails[layer], q], dim=2)
        index = torch.arange(TAIL, device=q.device) + counts[:, None]
        self.tails[layer] = both.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))

    def tail_positions(self) -> Tensor:
        """int64 [B, TAIL] of the tails' queries; negative before a row's start."""
        device = self.keys[0].device
        return torch.tensor(self.lengths, device=device)[:, None] - TAIL + torch.arange(TAIL, device=device)


def empty_cache(
    rows: int, capacity: int, *, layers: int, heads: int, kv_heads: int, head_dim: int, like: Tensor
) -> EvalCache:
    """like: a tensor of the cache's dtype and device."""

    def zeros(*shape: int) -> list[Tensor]:
        return [like.new_zeros(rows, *shape, head_dim) for _ in range(layers)]

    return EvalCache(
        zeros(kv_heads, capacity), zeros(kv_heads, capacity), [0] * rows, zeros(heads, TAIL), [1.0] * layers
    )
