"""Paged caches filled with random keys and values, and what FASA should make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fasa_trt.core.reference import attend, importance, select
from fasa_trt.core.spec import SparseSpec

Array = NDArray[Any]


@dataclass
class Case:
    """One decode step of S sequences over a pool of shuffled blocks; see `fasa_trt.plugins.torch.ops`."""

    q: Tensor
    pool: Tensor
    offsets: Tensor
    lengths: Tensor
    labels: Tensor
    scales: Tensor
    kind: str
    n_tip: int
    max_length: int
    spec: SparseSpec
    softcap: float = 0.0
    layer: int = 0
    dense_below: int = 0

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1]) ** -0.5

    def run(self) -> Tensor:
        from fasa_trt.plugins.torch.ops import decode

        return decode(
            self.q, self.pool, self.layer, self.offsets, self.lengths, self.labels, self.scales, self.kind, self.n_tip,
            self.max_length, self.dense_below, self.spec.budget, self.spec.sink, self.spec.recent,
            self.scale, self.softcap, self.spec.reduction,
        )  # fmt: skip

    def with_spec(self, **changes: Any) -> Case:
        return replace(self, spec=replace(self.spec, **changes))

    def cached(self, seq: int, kind: int, kv_head: int) -> Tensor:
        """float64 [L, head_dim] of a sequence's keys (0) or values (1)."""
        length = int(self.lengths[seq])
        tokens = self.pool.shape[4]
        blocks = self.offsets[seq, kind, : -(-length // tokens)].long() // (2 * self.pool.shape[1])
        rows = self.pool[blocks, self.layer, kind, kv_head]
        return rows.reshape(-1, rows.shape[-1])[:length].double()

    def label_scores(self, seq: int) -> Array:
        """float64 [token sets, L]: the reference's scores of labels and queries that are quantised as fasa.h says."""
        kv_heads, dims = self.pool.shape[3], 2 * self.n_tip
        queries = self.q[seq].view(kv_heads, -1, self.q.shape[2])[:, :, :dims].float()
        if self.spec.reduction == "sum":  # before quantisation, in the order of the heads
            total = torch.zeros_like(queries[:, :1])
            for head in range(queries.shape[1]):
                total += queries[:, head : head + 1]
            queries = total
        exact = queries.double()
        if self.kind in ("int4", "int8"):
            # By a tensor: torch divides by a number through its inverse, and halves then round the other way.
            step = queries.abs().amax(dim=-1, keepdim=True).clamp(min=1e-20) / torch.full_like(queries[:1, :1, :1], 127)
            exact = (queries / step).round().clamp(-127, 127).double() * step.double()
        every = np.arange(dims)
        rows = []
        for kv_head in range(kv_heads):
            labels = self.cached_labels(seq, kv_head).cpu().numpy()
            rows.append(importance(exact[kv_head].cpu().numpy(), labels, every, self.scale, self.spec.reduction))
        return np.concatenate(rows)

    def cached_labels(self, seq: int, kv_head: int) -> Tensor:
        """float64 [L, 2 n_tip]: what the labels of a sequence stand for."""
        if self.kind == "prefix":
            return self.cached(seq, 0, kv_head)[:, : 2 * self.n_tip]
        codes, scales = self.cached_codes(seq, kv_head)
        return codes if self.kind == "fp8" else codes * scales[:, None].double()

    def cached_codes(self, seq: int, kv_head: int) -> tuple[Tensor, Tensor]:
        """float64 label codes [L, 2 n_tip] and their scales [L] (of no meaning for fp8)."""
        length, tokens = int(self.lengths[seq]), self.pool.shape[4]
        blocks = self.offsets[seq, 0, : -(-length // tokens)].long() // (2 * self.pool.shape[1])
        rows = self.labels[blocks, :, kv_head].reshape(-1, self.labels.shape[3])[:length]
        scales = self.scales[blocks, :, kv_head].reshape(-1)[:length]
        if self.kind != "int4":
            kind = torch.int8 if self.kind == "int8" else torch.float8_e4m3fn
            return rows[:, : 2 * self.n_tip].contiguous().view(kind).double(), scales
        codes = torch.stack([rows & 15, rows >> 4], dim=-1).flatten(1)[:, : 2 * self.n_tip]
        return codes.double() - 8, scales

    def chosen(self, scores: Array, more: int = 0) -> Array:
        """int64 [token sets, budget + more] of a sequence that is longer than that."""
        return select(scores, self.spec.budget + more, self.spec.sink, self.spec.recent)

    def expected(self) -> tuple[Array, Array]:
        """float64 output [S, Hq, d], and by how much the last chosen score of each head's token set beats the first
        rejected one, relative to the largest score or, for softmaxed scores, to itself (infinite where nothing is
        rejected) [S, Hq]."""
        seqs, heads, head_dim = self.q.shape
        kv_heads = self.pool.shape[3]
        out, gap = np.empty((seqs, heads, head_dim)), np.full((seqs, heads), np.inf)
        queries = self.q.double().cpu().numpy()
        for s, length in enumerate(self.lengths.tolist()):
            chosen = np.tile(np.arange(length), (kv_heads, 1))
            margins = np.full(kv_heads, np.inf)
            if length > self.spec.budget:
                scores = self.label_scores(s)
                chosen = self.chosen(scores)
                margins = self._margins(scores, chosen)
            share = heads // len(chosen)  # query heads of a token set
            for token_set, tokens in enumerate(chosen):
                mine = slice(token_set * share, (token_set + 1) * share)
                picked = torch.from_numpy(tokens).to(self.q.device)
                k, v = (self.cached(s, kind, token_set * kv_heads // len(chosen))[picked] for kind in (0, 1))
                out[s, mine] = attend(
                    queries[s, mine], k.cpu().numpy(), v.cpu().numpy(), self.scale, self.softcap or None
                )
                gap[s, mine] = margins[token_set]
        return out, gap

    def _margins(self, scores: Array, chosen: Array) -> Array:
        by_softmax = self.spec.reduction.endswith("softmax")
        if self.spec.reduction in ("mean_softmax", "max_softmax"):  # sampled_softmax comes in logs
            scores = np.log(scores)
        taken = np.zeros(scores.shape, dtype=bool)
        np.put_along_axis(taken, chosen, True, axis=1)
        most = np.where(taken, -np.inf, scores).max(axis=1)
        taken[:, : self.spec.sink] = taken[:, scores.shape[1] - self.spec.recent :] = False  # not by their score
        least = np.where(taken, scores, np.inf).min(axis=1)
        return (least - most) / (1.0 if by_softmax else np.maximum(np.abs(scores).max(axis=1), 1e-30))


def make_case(
    lengths: list[int],
    *,
    kind: str = "int4",
    n_tip: int = 32,
    head_dim: int = 128,
    kv_heads: int = 2,
    group: int = 4,
    tokens: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    budget: int = 256,
    sink: int = 4,
    recent: int = 32,
    reduction: str = "sum",
    softcap: float = 0.0,
    layers: int = 1,
    layer: int = 0,
    spare_blocks: int = 3,
    max_length: int | None = None,
    loudness: Callable[[Tensor], Tensor] | None = None,
    label_head: bool = False,
    seed: int = 0,
    device: str = "cuda",
) -> Case:
    """Random contents, written by `fasa::append` with rotation switched off, in shuffled blocks of a larger pool.
    Slots past the end hold NaN, columns of `offsets` past the last block are wild. `loudness` gives a factor on the key
    of each position. label_head: labels lie in the pool, of which the case has views."""
    from fasa_trt.plugins.torch.label_head import split
    from fasa_trt.plugins.torch.ops import append

    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    longest = max_length or max(lengths)
    columns = -(-longest // tokens)
    used = [-(-length // tokens) for length in lengths]
    total = sum(used) + spare_blocks
    pool = torch.full(
        (total, layers, 2, kv_heads + label_head, tokens, head_dim), float("nan"), device=device, dtype=dtype
    )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    offsets = torch.full((len(lengths), 2, columns), 0x7FFFFFF, dtype=torch.int32)
    for s, count in enumerate(used):
        for b in range(count):
            block = order.pop()
            offsets[s, 0, b], offsets[s, 1, b] = block * layers * 2, block * layers * 2 + 1
    offsets = offsets.to(device)
    width = {"prefix": 0, "int4": n_tip, "int8": 2 * n_tip, "fp8": 2 * n_tip}[kind]
    labels = torch.zeros((total, tokens, kv_heads, width), dtype=torch.uint8, device=device)
    scales = torch.zeros((total, tokens, kv_heads), dtype=torch.float16, device=device)
    if label_head:
        pool, labels, scales = split(pool, layer, kind, n_tip)
    still = torch.zeros((kv_heads, head_dim // 2), device=device)
    for s, length in enumerate(lengths):
        rows = torch.full((length,), s, dtype=torch.int32, device=device)
        position = torch.arange(length, dtype=torch.int32, device=device)
        spread = torch.exp(torch.randn(head_dim, generator=generator, device=device) * 0.7).to(dtype)  # uneven dims
        loud = loudness(position).to(dtype)[:, None, None] if loudness else 1
        append(
            normal(length, kv_heads * group, head_dim), normal(length, kv_heads, head_dim) * spread * loud,
            normal(length, kv_heads, head_dim), rows, position, still, torch.ones_like(still), pool, layer, offsets,
            labels, scales, kind, n_tip,
        )  # fmt: skip
    spec = SparseSpec(budget=budget, n_tip=n_tip, reduction=reduction, sink=sink, recent=recent)  # type: ignore[arg-type]
    return Case(
        q=normal(len(lengths), kv_heads * group, head_dim),
        pool=pool,
        offsets=offsets,
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        labels=labels,
        scales=scales,
        kind=kind,
        n_tip=n_tip,
        max_length=longest,
        spec=spec,
        softcap=softcap,
        layer=layer,
    )
