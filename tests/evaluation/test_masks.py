"""top_mask against `select` of the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasa_trt.core.reference import select
from fasa_trt.evaluation.masks import top_mask


@pytest.mark.parametrize("budget", [1, 7, 16, 40, 64])
@pytest.mark.parametrize("length", [3, 16, 40])
def test_it_is_the_references_choice(length: int, budget: int) -> None:
    rng = np.random.default_rng(length * 100 + budget)
    scores = rng.integers(-3, 4, (5, 40)).astype(np.float32)  # many ties
    scores[1, :8] = np.nan
    scores[2, 3], scores[2, 5] = np.inf, -np.inf
    sink, recent = min(2, budget - 1), 1
    columns = torch.arange(40)
    forced = (columns < sink) | (columns >= length - recent)
    mask = top_mask(torch.from_numpy(scores), columns < length, budget, forced)
    for row, found in enumerate(mask):
        finite = np.nan_to_num(scores[row, :length], posinf=3e38, neginf=-3e38, nan=-3e38)
        wanted = select(finite[None], budget, sink, recent)[0]
        assert found.nonzero()[:, 0].tolist() == wanted.tolist()


def test_unseen_columns_are_never_taken() -> None:
    scores = torch.full((4,), -torch.inf)
    assert top_mask(scores, torch.tensor([True, False, False, True]), 3).tolist() == [True, False, False, True]
