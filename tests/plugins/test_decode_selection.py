"""Which tokens a decode step attends to: long rows, crowded scores, ties, and what is not a number. Needs a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fasa_trt.core.spec import REDUCTIONS
from tests.plugins.checks import KINDS, check, poison
from tests.plugins.paged import Case, make_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("length", [131072, 140001, 600000])
@pytest.mark.parametrize("kind", ["int4", "prefix"])
def test_long(kind: str, length: int) -> None:
    check(make_case([length, 70000], kind=kind, kv_heads=1, tokens=64, seed=length % 97))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("budget", [64, 4096])
def test_long_by_reduction(reduction: str, budget: int) -> None:
    check(make_case([140001, 70000], reduction=reduction, budget=budget, group=2, tokens=64, seed=15))


@pytest.mark.parametrize("kind", ["int4", "prefix"])
@pytest.mark.parametrize("reduction", ["sum", "per_head", "mean_softmax"])
@pytest.mark.parametrize("budget", [256, 1024])
@pytest.mark.parametrize("length", [30000, 140000])
def test_cluster(kind: str, reduction: str, budget: int, length: int) -> None:
    """The highest scores lie in a few neighbouring blocks of tokens, so that few threads find all of them."""

    def loudness(position: Tensor) -> Tensor:
        return torch.where((position >= 9000) & (position < 9000 + 3 * budget), 8.0, 1.0)

    lengths = [length, length - 1777]
    check(
        make_case(lengths, kind=kind, reduction=reduction, budget=budget, group=2, n_tip=16, loudness=loudness, seed=16)
    )


@pytest.mark.parametrize("falling", [False, True])
@pytest.mark.parametrize("budget", [64, 1024])
def test_scores_that_grow_along_the_row(budget: int, falling: bool) -> None:
    def loudness(position: Tensor) -> Tensor:
        return (20000 - position if falling else 1 + position) / 2000

    check(make_case([20000, 17001], budget=budget, loudness=loudness, seed=17))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("length", [700, 9001])
def test_rejected_tokens_are_not_read(kind: str, reduction: str, length: int) -> None:
    """And all others are attended to once, or the result would not be what test_decode.py wants it to be."""
    case = make_case([length], kind=kind, reduction=reduction, seed=18)
    got = case.run()
    assert torch.isfinite(got).all()
    for kv_head, rejected in enumerate(rejected_tokens(case, more=8)):  # scores that nearly tie may go either way
        poison(case, 0, kv_head, rejected)
    assert torch.equal(case.run(), got)


def rejected_tokens(case: Case, more: int = 0) -> list[Tensor]:
    """bool [L] of each KV head for sequence 0: no head of its group takes the token, nor would with `more` budget."""
    scores = case.label_scores(0)
    chosen = torch.from_numpy(case.chosen(scores, more))
    taken = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, chosen, True)
    by_kv_head = taken.view(case.pool.shape[3], -1, taken.shape[1]).any(dim=1)
    return [~row for row in by_kv_head.to(case.q.device)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("length", [400, 700, 40000])
def test_equal_scores_go_to_lower_positions(kind: str, reduction: str, length: int) -> None:
    """All labels alike: every free token ties, also beyond the lists that selection keeps."""
    case = make_case([length], kind=kind, reduction=reduction, seed=7)
    relabel(case, torch.ones(*case.scales.shape, 2 * case.n_tip, device=case.q.device))
    got = case.run()
    chosen = case.spec.budget - case.spec.recent  # the first of the row, sinks included
    position = torch.arange(length, device=case.q.device)
    for kv_head in range(2):
        poison(case, 0, kv_head, (position >= chosen) & (position < length - case.spec.recent))
    assert torch.equal(case.run(), got)
    poison(case, 0, 1, position == chosen - 1)
    assert case.run().isnan().any()


@pytest.mark.parametrize("kind", ["int4", "prefix"])
@pytest.mark.parametrize("reduction", ["sum", "per_head"])
@pytest.mark.parametrize("equal", [False, True])
def test_a_row_has_its_bits_in_every_batch(kind: str, reduction: str, equal: bool) -> None:
    """Where rows are few, a cluster of blocks of threads attends to each; where scores are equal, one block does."""
    case = make_case([700, 9001, 40000], kind=kind, reduction=reduction, kv_heads=1, seed=20)
    if equal:
        relabel(case, torch.ones(*case.scales.shape, 2 * case.n_tip, device=case.q.device))
    many = replace(
        case, q=case.q.repeat(40, 1, 1), offsets=case.offsets.repeat(40, 1, 1), lengths=case.lengths.repeat(40)
    )
    assert torch.equal(many.run(), case.run().repeat(40, 1, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distinct", [3, 40, 1000])
@pytest.mark.parametrize("length", [700, 20001])
def test_repeated_scores(kind: str, distinct: int, length: int) -> None:
    """A few distinct labels and whole numbers throughout, so that scores tie exactly, here and in the reference."""
    case = make_case([length], kind=kind, head_dim=64, n_tip=16, group=1, seed=19)
    generator = torch.Generator().manual_seed(distinct)
    some = torch.randint(-7, 8, (distinct, 2 * case.n_tip), generator=generator)
    relabel(case, some[torch.randint(distinct, case.scales.shape, generator=generator)].to(case.q.device))
    whole = torch.randint(-20, 21, case.q.shape, generator=generator)
    whole[..., 0] = 127  # so that quantising the query leaves it as it is
    case.q.copy_(whole / 32)
    got = case.run()
    rejected = rejected_tokens(case)
    for kv_head in range(2):
        poison(case, 0, kv_head, rejected[kv_head])
    assert torch.equal(case.run(), got)


def relabel(case: Case, codes: Tensor) -> None:
    """Makes whole numbers within +-7, [blocks, tokens, kv_heads, 2 n_tip], the labels of all slots."""
    codes = codes.int()
    if case.kind == "prefix":
        case.pool[:, case.layer, 0, :, :, : 2 * case.n_tip] = codes.transpose(1, 2).to(case.pool.dtype)
    elif case.kind == "fp8":
        case.labels.copy_(codes.float().to(torch.float8_e4m3fn).view(torch.uint8))
    elif case.kind == "int8":
        case.labels.copy_(codes.to(torch.int8).view(torch.uint8))
    else:
        case.labels.copy_((codes[..., 0::2] + 8 | codes[..., 1::2] + 8 << 4).to(torch.uint8))
    case.scales.fill_(1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bad_keys_harm_only_their_row(kind: str, reduction: str, bad: float) -> None:
    case = make_case([5000, 300, 4000], kind=kind, reduction=reduction, seed=8)
    before = case.run()
    spoil(case, case.offsets[0, 0, : -(-5000 // 32)].long() // 2, slice(3, 5), bad)
    after = case.run()
    assert torch.equal(after[1:], before[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nan_ranks_last(kind: str, reduction: str) -> None:
    case = make_case([5015], kind=kind, reduction=reduction, seed=9)  # its last token lies in slot 22 of its block
    spoil(case, torch.arange(len(case.pool), device=case.q.device), slice(3, 20), float("nan"))
    out = case.with_spec(sink=0, recent=1).run()
    assert torch.isfinite(out).all()


def spoil(case: Case, blocks: Tensor, slots: slice, bad: float) -> None:
    """Makes the keys and labels of some slots of some blocks `bad`."""
    case.pool[blocks, case.layer, 0, :, slots] = bad
    case.scales[blocks, slots] = bad
    if case.kind == "fp8":  # knows no infinity
        byte = torch.tensor(bad).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        case.labels[blocks, slots] = byte.to(case.labels.device)
