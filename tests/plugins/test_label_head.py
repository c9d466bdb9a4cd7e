"""Labels in a head of the pool: the views, and on a GPU, bit for bit what labels beside the pool give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fasa_trt.core.errors import FasaError
from fasa_trt.core.spec import REDUCTIONS
from fasa_trt.plugins.torch import ops
from fasa_trt.plugins.torch.label_head import split
from fasa_trt.plugins.torch.structs import Labels, Pool
from tests.plugins.checks import DTYPES, check, dense
from tests.plugins.paged import Case, make_case

# kind, n_tip, head_dim, KV heads; the first and the last fill a row
FORMATS = [("int4", 32, 128, 8), ("int4", 8, 64, 3), ("int8", 24, 96, 2), ("fp8", 32, 128, 3), ("int8", 64, 256, 4)]
LENGTHS = [700, 100, 513, 64]  # two of them within the budget


def both(kind: str, n_tip: int, head_dim: int, kv_heads: int, **more: Any) -> tuple[Case, Case]:
    """The same contents, with labels beside the pool and in it."""
    options: dict[str, Any] = {"lengths": LENGTHS, "budget": 256, "layers": 2, "layer": 1, **more}
    options |= {"kind": kind, "n_tip": n_tip, "head_dim": head_dim, "kv_heads": kv_heads}
    return make_case(**options), make_case(**options, label_head=True)


def whole_of(pool: Tensor) -> Tensor:
    """The pool that a case has a view of, label head included."""
    return pool.as_strided((*pool.shape[:3], pool.shape[3] + 1, *pool.shape[4:]), pool.stride())


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "n_tip", "head_dim", "kv_heads"), FORMATS)
def test_views_and_what_kernels_get(kind: str, n_tip: int, head_dim: int, kv_heads: int, dtype: torch.dtype) -> None:
    """A token's labels and scales lie in its own row of the last head, of the keys' and of the values' half."""
    whole = torch.zeros(5, 3, 2, kv_heads + 1, 16, head_dim, dtype=dtype)
    pool, labels, scales = split(whole, 1, kind, n_tip)
    assert (pool.shape, scales.shape) == ((5, 3, 2, kv_heads, 16, head_dim), (5, 16, kv_heads))
    width = n_tip if kind == "int4" else 2 * n_tip
    for block, token, head in ((0, 0, 0), (4, 15, kv_heads - 1), (2, 7, 1)):
        assert labels[block, token, head].data_ptr() == whole[block, 1, 0, -1, token].data_ptr() + head * width
        assert scales[block, token, head].data_ptr() == whole[block, 1, 1, -1, token].data_ptr() + head * 2
    offsets = torch.zeros(2, 2, 7, dtype=torch.int32)
    view, found = ops._pool(pool, 1, offsets), ops._labels(kind, n_tip, labels, scales, pool)
    assert (view.num_kv_heads, view.heads_per_block, view.primary) == (kv_heads, kv_heads + 1, whole[0, 1].data_ptr())
    block = 16 * (kv_heads + 1) * head_dim * 2
    assert found.label_block_stride // found.offset_divisor == block
    assert found.label_token_stride == head_dim * 2
    assert (found.label_head_stride, found.secondary_distance) == (width, 0)
    if kind != "fp8":
        assert found.scales - found.labels == block
        assert (found.scale_token_stride, found.scale_head_stride) == (head_dim * 2, 2)


def test_pools_that_are_not_whole_blocks_are_refused() -> None:
    whole, offsets = torch.zeros(5, 3, 2, 4, 16, 64, dtype=torch.float16), torch.zeros(1, 2, 7, dtype=torch.int32)
    for wrong in (whole[:, :2], whole[..., :32], whole[:, :, :, :, :8], whole.transpose(2, 3), whole.float()):
        with pytest.raises(FasaError, match="pool must be"):
            ops._pool(wrong, 0, offsets)
    assert ops._pool(whole[1:4], 2, offsets).heads_per_block == 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "n_tip", "head_dim", "kv_heads"), FORMATS)
def test_append(kind: str, n_tip: int, head_dim: int, kv_heads: int, dtype: torch.dtype) -> None:
    apart, inside = both(kind, n_tip, head_dim, kv_heads, dtype=dtype)
    assert torch.equal(bits(apart.pool), bits(inside.pool))
    for seq in range(len(LENGTHS)):
        for head in range(kv_heads):
            (codes, scales), (found, found_scales) = (each.cached_codes(seq, head) for each in (apart, inside))
            assert torch.equal(found, codes)
            assert torch.equal(found_scales, scales) or kind == "fp8"  # which has none
    whole = whole_of(inside.pool)
    used = kv_heads * (n_tip if kind == "int4" else 2 * n_tip) // 2  # elements of the row
    untouched = [whole[:, 1, 0, -1, :, used:], whole[:, 0, :, -1]]
    untouched.append(whole[:, 1, 1, -1, :, 0 if kind == "fp8" else kv_heads :])
    assert all(part.isnan().all() for part in untouched)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("kind", "n_tip", "head_dim", "kv_heads"), FORMATS)
def test_decode(kind: str, n_tip: int, head_dim: int, kv_heads: int, reduction: str) -> None:
    apart, inside = both(kind, n_tip, head_dim, kv_heads, reduction=reduction)
    check(inside)
    assert torch.equal(apart.run(), inside.run())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [8, 128])
def test_block_sizes(tokens: int) -> None:
    apart, inside = both("int4", 32, 128, 8, tokens=tokens)
    assert torch.equal(apart.run(), inside.run())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("queries", [20, 300])  # the latter on the kernels of compute capability 9.0
def test_dense_attention_passes_over_it(head_dim: int, dtype: torch.dtype, queries: int) -> None:
    from fasa_trt.plugins.torch.dense import prefill

    apart, inside = both("int4", 16, head_dim, 2, dtype=dtype, lengths=[700, 513])
    assert torch.equal(dense(apart), dense(inside))
    generator = torch.Generator("cuda").manual_seed(3)
    q = torch.randn(2 * queries, 8, head_dim, generator=generator, device="cuda").to(dtype)
    counts = torch.full((2,), queries, dtype=torch.int32, device="cuda")
    outs = [prefill(q, counts, each.pool, 1, each.offsets, each.lengths, 0.1, 0.0, 0) for each in (apart, inside)]
    assert torch.isfinite(outs[0]).all()
    assert torch.equal(*outs)


def with_second_pool(monkeypatch: pytest.MonkeyPatch, first: Tensor, second: Tensor) -> None:
    """Operators take offsets with bit 31 set for blocks of `second`, whose strides are those of `first`."""
    pool_of, labels_of, distance = ops._pool, ops._labels, second.data_ptr() - first.data_ptr()

    def pool(*arguments: Any) -> Pool:
        made = pool_of(*arguments)
        made.secondary = made.primary + distance
        return made

    def labels(*arguments: Any) -> Labels:
        made = labels_of(*arguments)
        made.secondary_distance = distance
        return made

    monkeypatch.setattr(ops, "_pool", pool)
    monkeypatch.setattr(ops, "_labels", labels)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "n_tip", "head_dim", "kv_heads"), FORMATS)
def test_decode_from_two_pools(
    monkeypatch: pytest.MonkeyPatch, kind: str, n_tip: int, head_dim: int, kv_heads: int
) -> None:
    """Every other block of a sequence lies in the second pool; what it had in the first is gone."""
    _, case = both(kind, n_tip, head_dim, kv_heads, lengths=[700, 513, 100])
    wanted = case.run()
    first = whole_of(case.pool)
    second, offsets = torch.full_like(first, float("nan")), case.offsets.clone()
    for seq, length in enumerate(case.lengths.tolist()):
        moved = torch.arange(0, -(-length // 32), 2, device=offsets.device)
        blocks = offsets[seq, 0, moved].long() // 4
        second[blocks] = first[blocks]
        first[blocks] = float("nan")
        offsets[seq, :, moved] |= -(1 << 31)
    with_second_pool(monkeypatch, first, second)
    assert torch.equal(replace(case, offsets=offsets).run(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "n_tip", "head_dim", "kv_heads"), FORMATS)
def test_append_to_the_second_pool(
    monkeypatch: pytest.MonkeyPatch, kind: str, n_tip: int, head_dim: int, kv_heads: int
) -> None:
    first = torch.full((7, 2, 2, kv_heads + 1, 16, head_dim), float("nan"), dtype=torch.bfloat16, device="cuda")
    second = first.clone()
    offsets = 4 * torch.tensor([3, 6, 0, 2], dtype=torch.int32, device="cuda").expand(1, 2, 4).contiguous()
    offsets[:, 1] += 1
    generator = torch.Generator("cuda").manual_seed(2)
    q, k, v = (
        torch.randn(50, kv_heads, head_dim, generator=generator, device="cuda").to(torch.bfloat16) for _ in range(3)
    )
    position = torch.arange(50, dtype=torch.int32, device="cuda")
    table = torch.rand(kv_heads, head_dim // 2, generator=generator, device="cuda")

    def append(offsets: Tensor) -> None:
        pool, labels, scales = split(first, 1, kind, n_tip)
        rows = torch.zeros_like(position)
        ops.append(q, k, v, rows, position, table, table, pool, 1, offsets, labels, scales, kind, n_tip)

    append(offsets)
    with_second_pool(monkeypatch, first, second)
    wanted = bits(first).clone()
    first.fill_(float("nan"))
    append(offsets | -(1 << 31))
    assert torch.equal(bits(second), wanted)
    assert first.isnan().all()
