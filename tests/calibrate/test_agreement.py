"""Contextual agreement against its definition, ties included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fasa_trt.calibrate.agreement import found_share
from tests.calibrate.definition import DEVICES, by_definition


@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 40),
    values=st.sampled_from([1, 2, 5, 1000]),
    ks=st.lists(st.integers(1, 50), min_size=1, max_size=4).map(sorted),
)
def test_any_logits(seed: int, n: int, values: int, ks: list[int]) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(-values, values, (2, 3, n)).astype(np.float32)
    top = np.stack([rng.permutation(n) for _ in range(2)])
    found = found_share(torch.tensor(logits), torch.tensor(top), ks)
    expected = [[[by_definition(top[g], logits[g, r], k) for r in range(3)] for g in range(2)] for k in ks]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_gaussian_logits(device: str) -> None:
    rng = np.random.default_rng()
    logits = rng.standard_normal((2, 5, 3000)).astype(np.float32)
    true = rng.standard_normal((2, 3000))
    top = np.argsort(-true, axis=-1)[:, :512]
    found = found_share(torch.tensor(logits, device=device), torch.tensor(top, device=device), (64, 512))
    expected = [[[by_definition(top[g], logits[g, r], k) for r in range(5)] for g in range(2)] for k in (64, 512)]
    np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=1e-5)


def test_a_row_without_information_gets_what_guessing_would() -> None:
    top = torch.arange(25)[None]
    assert found_share(torch.zeros(1, 1, 100), top, (10, 25)).flatten().tolist() == pytest.approx([0.1, 0.25])


def test_the_true_ranking_finds_everything() -> None:
    logits = torch.randn(2, 1, 500)
    assert (found_share(logits.clone(), logits[:, 0].topk(128).indices, (1, 7, 128)) == 1).all()
