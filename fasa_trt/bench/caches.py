"""The caches of a measured decode step, and attention over them: append to a paged pool, then attend.

Layers take turns with as many caches as fit into memory: where every layer has its own, as in serving, that is one
each; where there are fewer, each is still read only once in many megabytes, so the L2 cache never has any of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fasa_trt.bench.kernels.cache import Paged
from fasa_trt.bench.kernels.fasa import NAMES
from fasa_trt.bench.weights import Weights
from fasa_trt.core.spec import SparseSpec
from fasa_trt.plugins.torch.ops import append, decode

Attend = Callable[[int, Tensor], Tensor]
"""attend(cache, q): q [batch, heads, head_dim] after RoPE over a cache, by its index; returns the like."""


@dataclass
class Place:
    """Where the next token of each sequence goes, on the device: lengths int32 [batch], the token included. A step
    that has reached `last` starts again at `first`, so that a captured graph can be replayed for ever."""

    lengths: Tensor
    position: Tensor
    first: int
    last: int

    @classmethod
    def of(cls, batch: int, first: int, last: int, device: torch.device) -> Place:
        lengths = torch.full((batch,), first, dtype=torch.int32, device=device)
        return cls(lengths, lengths - 1, first, last)

    def advance(self) -> None:
        # by scalars alone: tensors from the host cannot be captured
        self.lengths.add_(1 - self.first).remainder_(self.last + 1 - self.first).add_(self.first)
        torch.sub(self.lengths, 1, out=self.position)


@dataclass
class Labels:
    """One label cache for each pool. kind "prefix" has none: tensors are empty. For dense attention, too."""

    kind: str
    n_tip: int
    labels: list[Tensor]
    scales: list[Tensor]

    @classmethod
    def none(cls, pools: list[Tensor]) -> Labels:
        device = pools[0].device
        nothing = torch.empty(0, 0, 0, 0, dtype=torch.uint8, device=device)
        scales = torch.empty(0, 0, 0, dtype=torch.float16, device=device)
        return cls("prefix", 0, [nothing] * len(pools), [scales] * len(pools))

    @classmethod
    def random(cls, pools: list[Tensor], n_tip: int) -> Labels:
        """4-bit labels drawn independently: few scores tie, as among real keys."""
        blocks, _, _, kv_heads, tokens, _ = pools[0].shape
        rows = (blocks, tokens, kv_heads)
        labels = [torch.randint(0, 256, (*rows, n_tip), dtype=torch.uint8, device=pool.device) for pool in pools]
        scales = [torch.rand(rows, device=pool.device).half() + 0.5 for pool in pools]
        return cls("int4", n_tip, labels, scales)

    @property
    def name(self) -> str:
        return NAMES.get(self.kind, self.kind)


@dataclass(frozen=True)
class Side:
    """How a layer attends, and the labels that it keeps for that."""

    labels: Labels
    attend: Attend


class CachedAttention:
    """A layer's attention in a step: rotates, caches and labels the new token, then attends.

    side: of all layers but those in `others`.
    """

    def __init__(
        self, weights: Weights, paged: Paged, place: Place, side: Side, others: Mapping[int, Side] | None = None
    ) -> None:
        self.weights, self.paged, self.place, self.side, self.others = weights, paged, place, side, others or {}
        self.sequence = torch.arange(paged.batch, dtype=torch.int32, device=weights.device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [batch, heads, head_dim], k, v [batch, kv_heads, head_dim] before RoPE, heads contiguous. Like q."""
        cache, weights, side = layer % len(self.paged.pools), self.weights, self.others.get(layer, self.side)
        labels = side.labels
        q = append(
            q, k, v, self.sequence, self.place.position, weights.inv_freq, weights.rope_scale,
            self.paged.pools[cache], 0, self.paged.offsets, labels.labels[cache], labels.scales[cache], labels.kind,
            labels.n_tip, weights.layers[layer].q_norm, weights.layers[layer].k_norm, weights.eps,
        )  # fmt: skip
        return side.attend(cache, q)


def fasa_attend(paged: Paged, labels: Labels, place: Place, spec: SparseSpec) -> Attend:
    """FASA's decode step; the library chooses dense attention where that is faster. spec: resolved."""

    def attend(cache: int, q: Tensor) -> Tensor:
        return decode(
            q, paged.pools[cache], 0, paged.offsets, place.lengths, labels.labels[cache], labels.scales[cache],
            labels.kind, labels.n_tip, place.last, -1, spec.budget, spec.sink, spec.recent, paged.scale,
            0.0, spec.reduction,
        )  # fmt: skip

    return attend


def no_attend(cache: int, q: Tensor) -> Tensor:
    """For the step without attention, which is what all else costs."""
    return q
