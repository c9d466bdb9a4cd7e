"""Reductions that look at every query head, over each label format. Needs a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fasa_trt.core.spec import REDUCTIONS
from tests.plugins.checks import check
from tests.plugins.paged import make_case

pytestmark = pytest.mark.gpu

LENGTHS = [1000, 64, 65, 401, 2]  # with a budget of 64; 16 tokens are scored together
N_TIPS = [8, 16, 24, 32, 48, 64]
# KV heads, query heads of each, tokens of a block, whether labels lie in the pool. A warp keeps one to four KV heads.
SHAPES = [
    (3, 1, 8, False),
    (2, 4, 64, True),
    (8, 4, 64, False),
    (1, 7, 8, True),
    (5, 3, 32, False),
    (4, 8, 64, False),
    (2, 16, 16, True),
    (12, 9, 32, False),
]


@pytest.mark.parametrize(("kv_heads", "group", "tokens", "label_head"), SHAPES)
@pytest.mark.parametrize("n_tip", N_TIPS)
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("reduction", [reduction for reduction in REDUCTIONS if reduction != "sum"])
def test_every_format(
    kind: str, n_tip: int, reduction: str, kv_heads: int, group: int, tokens: int, label_head: bool
) -> None:
    case = make_case(
        LENGTHS, kind=kind, n_tip=n_tip, kv_heads=kv_heads, group=group, tokens=tokens, budget=64, reduction=reduction,
        label_head=label_head, dtype=torch.float16 if group % 2 else torch.bfloat16, seed=n_tip + group,
    )  # fmt: skip
    check(case)
    assert torch.equal(case.run(), case.run())


@pytest.mark.parametrize("n_tip", N_TIPS)
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_one_head_scores_as_its_sum(kind: str, n_tip: int) -> None:
    """Products with whole numbers are exact, so that the two kernels agree in every bit."""
    case = make_case([9001, 700], kind=kind, n_tip=n_tip, kv_heads=8, group=1, seed=n_tip)
    assert torch.equal(case.with_spec(reduction="per_head").run(), case.run())


@pytest.mark.parametrize(("size", "loudness"), [(2.0**-18, 1.0), (2.0**17, 1 / 16)])
def test_queries_that_float16_cannot_hold(size: float, loudness: float) -> None:
    """FP8 labels meet queries as float16, whatever their size was as bfloat16."""

    def evenly(position: Tensor) -> Tensor:
        return torch.full_like(position, loudness, dtype=torch.float32)

    case = make_case([1500, 700], kind="fp8", reduction="per_head", loudness=evenly, seed=21)
    case.q.mul_(size)
    check(case)
