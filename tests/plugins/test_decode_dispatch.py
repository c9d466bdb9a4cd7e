"""Dense or sparse, and what must not change a decode step's bits. Needs a GPU and nvcc."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fasa_trt.core.errors import FasaError
from fasa_trt.core.spec import REDUCTIONS
from tests.plugins.checks import KINDS, check, dense, row_of
from tests.plugins.paged import Case, make_case

pytestmark = pytest.mark.gpu
HUGE = 1 << 30


@pytest.mark.parametrize("budget", [64, 256, 1024, 4096])
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("reduction", ["sum", "per_head"])
def test_within_the_budget_rows_have_the_bits_of_dense_decode(budget: int, kv_heads: int, reduction: str) -> None:
    lengths = [1, budget // 2, budget - 1, budget, budget + 1, 9001]
    case = make_case(lengths, budget=budget, kv_heads=kv_heads, reduction=reduction, seed=1)
    got, whole = case.run(), dense(case)
    assert torch.equal(got[:4], whole[:4])
    assert not torch.equal(got[4], whole[4]) and not torch.equal(got[5], whole[5])
    for seq in range(4):
        alone = row_of(case, seq)
        assert torch.equal(alone.run(), dense(alone)), lengths[seq]
        known = replace(alone, max_length=budget)  # now dense_decode runs in the place of it all
        assert torch.equal(known.run(), dense(known)), lengths[seq]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_length_matters_within_the_budget(kind: str) -> None:
    case = make_case([1, 77, 200, 256], kind=kind, max_length=20000, seed=6)
    got = case.run()
    for reduction in REDUCTIONS:
        assert torch.equal(case.with_spec(reduction=reduction, budget=4096).run(), got)
    known = replace(case, max_length=256)
    assert torch.equal(known.run(), known.with_spec(budget=4096).run())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_order_of_the_batch_does_not_matter(reduction: str) -> None:
    case = make_case([9001, 100, 257, 5000], reduction=reduction, seed=2)
    got = case.run()
    turned = replace(case, q=case.q.flip(0), offsets=case.offsets.flip(0), lengths=case.lengths.flip(0))
    assert torch.equal(turned.run().flip(0), got)


def test_dense_below() -> None:
    case = make_case([200, 3000, 9001], seed=4)
    sparse, whole = case.run(), dense(case)
    assert not torch.equal(sparse[1:], whole[1:])
    for line in (9001, HUGE):
        assert torch.equal(replace(case, dense_below=line).run(), whole)
    for line in (1, 256, 9000):
        assert torch.equal(replace(case, dense_below=line).run(), sparse)


def test_the_measured_crossover() -> None:
    case = make_case([200, 300, 1000], kv_heads=1, seed=5)
    line = measured_crossover(case)
    assert line > 1000
    columns = torch.zeros(3, 2, -(-line // 32) + 1 - case.offsets.shape[2], dtype=torch.int32, device=case.q.device)
    roomy = replace(case, offsets=torch.cat([case.offsets, columns], dim=2))
    below, above = replace(roomy, max_length=line), replace(roomy, max_length=line + 1)
    assert torch.equal(replace(below, dense_below=-1).run(), dense(below))
    assert torch.equal(replace(above, dense_below=-1).run(), above.run())
    assert not torch.equal(above.run(), dense(above))


def measured_crossover(case: Case) -> int:
    from fasa_trt.plugins.torch.ops import _pool, library
    from fasa_trt.plugins.torch.structs import DecodeParams

    params = DecodeParams(
        num_seqs=len(case.lengths), budget=case.spec.budget, pool=_pool(case.pool, case.layer, case.offsets)
    )
    line: int = library(case.q.device, case.q.shape[-1]).fasa_dense_below(ctypes.byref(params))
    return line


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize("n_tip", [8, 24, 32, 64])
def test_labels_among_other_things(kind: str, head_major: bool, n_tip: int) -> None:
    """Labels and scales with larger strides, like one more head of a pool's blocks."""
    case = make_case([300, 3001], kind=kind, n_tip=n_tip, seed=7)
    apart = replace(case, labels=spread(case.labels, 16, head_major), scales=spread(case.scales[..., None], 1, True))
    apart.scales = apart.scales[..., 0]
    assert not apart.labels.is_contiguous() and not apart.scales.is_contiguous()
    assert torch.equal(apart.run(), case.run())


def spread(packed: Tensor, unit: int, head_major: bool) -> Tensor:
    """A copy of [blocks, tokens, heads, width] in an array of more layers, more heads and wider rows of whole units."""
    blocks, tokens, heads, width = packed.shape
    wide = (width // unit + 2) * unit
    shape = (heads + 1, tokens) if head_major else (tokens, heads + 1)
    full = 0xA5 if packed.dtype == torch.uint8 else float("nan")
    array = torch.full((blocks, 3, *shape, wide), full, dtype=packed.dtype, device=packed.device)
    part = array[:, 1].transpose(1, 2) if head_major else array[:, 1]
    view = part[:, :, 1:, :width]
    view.copy_(packed)
    return view


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_stale_contents_do_not_matter(kind: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots past the end hold NaN and columns past the last block are wild (see make_case); the workspace is whatever
    was there before."""
    lengths = [1, 31, 33, 999, 5001, 20001]
    case = make_case(lengths, kind=kind, reduction=reduction, budget=64, max_length=32768, seed=10)
    first = case.run()
    assert torch.isfinite(first).all()
    empty = torch.empty
    for byte in (0x00, 0xFF, 0x7C, 0x7B):  # the last two as 16-bit scores: NaN, and one above all others
        monkeypatch.setattr(torch, "empty", lambda *shape, byte=byte, **options: empty(*shape, **options).fill_(byte))
        assert torch.equal(first, case.run())


@pytest.mark.parametrize("kind", ["int4", "prefix"])
@pytest.mark.parametrize("reduction", ["sum", "mean_softmax"])
def test_graph_replay_with_new_lengths(kind: str, reduction: str) -> None:
    """Sequences change sides between dense and sparse from one replay to the next."""
    case = make_case([9000, 300, 4000], kind=kind, reduction=reduction, max_length=16384, seed=11)
    lengths = case.lengths.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        case.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run()
    for new in ([9000, 300, 4000], [8999, 299, 3999], [256, 257, 1], [257, 256, 255], [1, 1, 4000], [9000, 10, 10]):
        case.lengths.copy_(torch.tensor(new))
        assert (case.lengths <= lengths).all(), "the pool has no more"
        graph.replay()
        torch.cuda.synchronize()
        replayed = out.clone()
        assert torch.equal(replayed, case.run())
        check(case)


def test_bad_parameters_are_refused() -> None:
    case = make_case([500], seed=13)
    for changes in ({"budget": 8, "sink": 1, "recent": 1}, {"budget": 5000}):
        with pytest.raises(FasaError, match="out of its range"):
            case.with_spec(**changes).run()
    with pytest.raises(FasaError, match="out of its range"):
        replace(case, n_tip=40, labels=torch.zeros(*case.labels.shape[:3], 80, dtype=torch.uint8, device="cuda")).run()
    with pytest.raises(FasaError, match="too short for n_tip 64"):
        replace(case, n_tip=64).run()
    with pytest.raises(FasaError, match="q must be contiguous"):
        replace(case, q=case.q.transpose(0, 1).repeat(1, 2, 1).transpose(0, 1)[:1]).run()
    with pytest.raises(FasaError, match="the pool torch.bfloat16"):
        replace(case, q=case.q.half()).run()
    with pytest.raises(FasaError, match="lengths must be contiguous int32"):
        replace(case, lengths=case.lengths.long()).run()
