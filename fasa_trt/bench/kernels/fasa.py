"""FASA's decode step over the benchmarks' caches, and the bytes that it cannot do without."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fasa_trt.bench.kernels.cache import HEAD_DIM, KV_HEADS, Q_HEADS, SCALE, TOKENS, Paged
from fasa_trt.bench.kernels.timing import Calls
from fasa_trt.core.labels import label_bytes, scale_bytes
from fasa_trt.core.spec import SparseSpec

BUDGET, SINK, RECENT = 256, 4, 32
NAMES = {"int4": "4bit", "int8": "8bit"}  # in the records


@dataclass(frozen=True)
class Variant:
    """kind: of labels: int4, int8, fp8 or prefix. reduction: how a group's heads share a token set."""

    kind: str
    n_tip: int
    reduction: str = SparseSpec.reduction

    @property
    def labels(self) -> str:
        return NAMES.get(self.kind, self.kind)

    @property
    def cache_row(self) -> int:
        """Bytes of a token's label in a cache of its own, per KV head."""
        return label_bytes(self.kind, self.n_tip)

    def bytes_of(self, context: int, batch: int) -> int:
        """What a step must read: every label with its scale once, and the chosen tokens' keys and values."""
        label = (4 * self.n_tip if self.kind == "prefix" else self.cache_row) + scale_bytes(self.kind)
        token_sets = Q_HEADS if self.reduction == "per_head" else KV_HEADS
        return batch * (KV_HEADS * context * label + token_sets * BUDGET * 4 * HEAD_DIM)


def decode_calls(paged: Paged, variant: Variant, *, dense_below: int = 0) -> Calls:
    """Decode steps with random labels, others for every cache. dense_below: sparse beyond the budget for 0, as the
    library chooses for -1."""
    from fasa_trt.plugins.torch.ops import decode

    calls: Calls = []
    for pool in paged.pools:
        labels, scales = random_labels(variant, pool.shape[0], paged.q.device)
        step = partial(
            decode,
            q=paged.q,
            pool=pool,
            layer=0,
            offsets=paged.offsets,
            lengths=paged.lengths,
            labels=labels,
            scales=scales,
            label_kind=variant.kind,
            n_tip=variant.n_tip,
            max_length=paged.context,
            dense_below=dense_below,
            budget=BUDGET,
            sink=SINK,
            recent=RECENT,
            scale=SCALE,
            softcap=0.0,
            reduction=variant.reduction,
        )
        calls.append(step)
    return calls


def random_labels(variant: Variant, blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """uint8 [blocks, TOKENS, KV_HEADS, bytes] and float16 [blocks, TOKENS, KV_HEADS]."""
    shape = (blocks, TOKENS, KV_HEADS, variant.cache_row)
    scales = torch.rand(shape[:3], device=device).half() + 0.5
    bytes_ = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
    if variant.kind == "fp8":  # without the highest bit of the exponent: below 2, and no NaN
        bytes_ &= 0xBF
    return bytes_, scales
