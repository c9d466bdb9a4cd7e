"""The definition against brute force that shares nothing with it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fasa_trt.core.reference import attend, decode, importance, sampled, select, softmax
from fasa_trt.core.spec import REDUCTIONS, SparseSpec

Array = NDArray[Any]
D = 8
SCALE = 1 / math.sqrt(D)


def random_case(length: int, group: int, seed: int, dtype: type = np.float64) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(rows, D)) * 2 for rows in (group, length, length))
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def brute_scores(q: Array, k: Array, dims: list[int], reduction: str) -> list[list[float]]:
    raw = [[SCALE * sum(float(row[i]) * float(key[i]) for i in dims) for key in k] for row in q]
    if reduction == "per_head":
        return raw
    if reduction == "sum":
        return [[sum(column) for column in zip(*raw, strict=True)]]
    if reduction == "sampled_softmax":
        sums = [sum(math.exp(row[token]) for token in brute_sample(len(k))) for row in raw]
        shares = [[math.exp(s) / total for s in row] for row, total in zip(raw, sums, strict=True)]
        return [[math.log(sum(column) / len(column)) for column in zip(*shares, strict=True)]]
    shares = [[math.exp(s) / sum(math.exp(t) for t in row) for s in row] for row in raw]
    combine = max if reduction == "max_softmax" else lambda column: sum(column) / len(column)
    return [[combine(column) for column in zip(*shares, strict=True)]]


def brute_sample(length: int) -> list[int]:
    """Run after run."""
    runs = [list(range(start, min(start + 16, length))) for start in range(0, length, 16)]
    return [token for r, run in enumerate(runs) if r % 32 == 0 or r >= len(runs) - 2 for token in run]


def brute_select(scores: list[float], budget: int, sink: int, recent: int) -> list[int]:
    """Picks one token after the other."""
    length = len(scores)
    chosen: list[int] = []
    left = list(range(length))
    for token in range(length):
        if (token < sink or token >= length - recent) and len(chosen) < budget:
            chosen.append(token)
            left.remove(token)
    while left and len(chosen) < budget:
        best = left[0]
        for token in left[1:]:
            if (math.isnan(scores[best]) and not math.isnan(scores[token])) or scores[token] > scores[best]:
                best = token
        chosen.append(best)
        left.remove(best)
    return sorted(chosen)


def brute_attend(q: Array, k: Array, v: Array, softcap: float | None = None) -> Array:
    out = np.zeros((len(q), v.shape[1]))
    for h, row in enumerate(q):
        logits = [SCALE * float(np.dot(row, key)) for key in k]
        if softcap is not None:
            logits = [softcap * math.tanh(s / softcap) for s in logits]
        weights = [math.exp(s - max(logits)) for s in logits]
        for weight, value in zip(weights, v, strict=True):
            out[h] += weight / sum(weights) * value
    return out


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("length", [20, 70])
def test_importance(reduction: str, group: int, length: int) -> None:
    q, k, _ = random_case(length, group, seed=1)
    dims = [5, 1, 6, 2]
    got = importance(q, k, np.array(dims), SCALE, reduction)
    np.testing.assert_allclose(got, brute_scores(q, k, dims, reduction), rtol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_importance_reads_the_dominant_dims_alone(reduction: str) -> None:
    q, k, _ = random_case(20, 2, seed=2)
    dims = np.array([0, 1, 4, 5])
    before = importance(q, k, dims, SCALE, reduction)
    others = np.setdiff1d(np.arange(D), dims)
    q[:, others], k[:, others] = np.nan, np.inf
    np.testing.assert_array_equal(importance(q, k, dims, SCALE, reduction), before)


@pytest.mark.parametrize(
    ("length", "runs"),
    [
        (1, [(0, 1)]),
        (15, [(0, 15)]),
        (16, [(0, 16)]),
        (17, [(0, 17)]),
        (32, [(0, 32)]),
        (33, [(0, 33)]),  # runs 0, 1 and 2: the last two and the first
        (48, [(0, 48)]),
        (49, [(0, 16), (32, 49)]),  # run 1 is none of them
        (511, [(0, 16), (480, 511)]),
        (512, [(0, 16), (480, 512)]),
        (513, [(0, 16), (496, 513)]),  # run 32 begins: a regular one, and the last
        (544, [(0, 16), (512, 544)]),
        (545, [(0, 16), (512, 545)]),
        (561, [(0, 16), (512, 528), (544, 561)]),
        (1100, [(0, 16), (512, 528), (1024, 1040), (1072, 1100)]),
    ],
)
def test_sampled(length: int, runs: list[tuple[int, int]]) -> None:
    wanted = [token for start, end in runs for token in range(start, end)]
    got = sampled(length)
    assert got.dtype == np.bool_ and got.shape == (length,)
    assert np.flatnonzero(got).tolist() == wanted == brute_sample(length)


def test_a_whole_sample_is_the_mean_softmax() -> None:
    q, k, _ = random_case(48, 3, seed=6)
    got = importance(q, k, np.arange(4), SCALE, "sampled_softmax")
    np.testing.assert_allclose(np.exp(got), importance(q, k, np.arange(4), SCALE, "mean_softmax"), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_peaks_outside_the_sample_do_not_overflow(dtype: type) -> None:
    q, k, _ = random_case(200, 2, seed=8, dtype=dtype)
    k[40], k[41] = 1000 * q[0], 2000 * q[0]
    got = importance(q, k, np.arange(D), SCALE, "sampled_softmax")
    assert got.dtype == dtype and np.isfinite(got).all()
    assert np.argsort(-got[0])[:2].tolist() == [41, 40]


def test_a_nan_key_in_the_sample_harms_itself_alone() -> None:
    q, k, _ = random_case(100, 3, seed=4)
    dims = np.arange(4)
    weights = np.exp(SCALE * q[:, dims] @ k[:, dims].T)
    counted = np.setdiff1d(brute_sample(100), [5])
    k[5, 0] = np.nan
    got = importance(q, k, dims, SCALE, "sampled_softmax")[0]
    shares = weights / weights[:, counted].sum(axis=1, keepdims=True)
    others = np.setdiff1d(np.arange(100), [5])
    np.testing.assert_allclose(got[others], np.log(shares.mean(axis=0))[others], rtol=1e-10)
    assert np.isnan(got[5]) and 5 not in select(got[None], 99, 0, 1)


def test_unknown_reduction() -> None:
    q, k, _ = random_case(3, 1, seed=0)
    with pytest.raises(ValueError, match="median"):
        importance(q, k, np.arange(2), SCALE, "median")


scores_with_ties_and_nan = st.lists(
    st.one_of(st.integers(-3, 3).map(float), st.floats(-1e30, 1e30), st.just(math.nan)), min_size=1, max_size=40
)


@settings(deadline=None)
@given(scores_with_ties_and_nan, st.integers(1, 45), st.integers(0, 10), st.integers(1, 10))
def test_select(scores: list[float], budget: int, sink: int, recent: int) -> None:
    budget = max(budget, sink + recent)
    got = select(np.array([scores]), budget, sink, recent)
    assert got.tolist() == [brute_select(scores, budget, sink, recent)]
    assert got.shape == (1, min(budget, len(scores)))
    assert got.dtype == np.int64


def test_select_chooses_for_each_row() -> None:
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 5, (6, 30)).astype(np.float32)
    got = select(scores, 9, 2, 3)
    assert got.tolist() == [brute_select(row.tolist(), 9, 2, 3) for row in scores]


def test_ties_go_to_the_lower_position() -> None:
    assert select(np.zeros((1, 10)), 4, 0, 1).tolist() == [[0, 1, 2, 9]]


def test_nan_ranks_below_every_number() -> None:
    scores = np.array([[np.nan, -1e38, np.nan, 5.0, np.nan]], np.float32)
    assert select(scores, 3, 0, 1).tolist() == [[1, 3, 4]]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("length", [1, 17])
def test_attend(length: int, softcap: float | None) -> None:
    q, k, v = random_case(length, 3, seed=length)
    np.testing.assert_allclose(attend(q, k, v, SCALE, softcap), brute_attend(q, k, v, softcap), rtol=1e-12)


def test_softmax_of_large_logits() -> None:
    np.testing.assert_allclose(softmax(np.array([[1e4, 1e4, -1e4]])), [[0.5, 0.5, 0.0]])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("length", [1, 5, 12])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_within_the_budget_is_dense_bit_for_bit(reduction: Any, length: int, dtype: type) -> None:
    q, k, v = random_case(length, 4, seed=length, dtype=dtype)
    spec = SparseSpec(budget=12, reduction=reduction, sink=1, recent=2)
    got = decode(q, k, v, np.arange(4), spec, SCALE, softcap=4.0)
    np.testing.assert_array_equal(got, attend(q, k, v, SCALE, 4.0))
    if length == 1:
        np.testing.assert_allclose(got, np.repeat(v, 4, axis=0), rtol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("length", [13, 50])
def test_decode(reduction: Any, group: int, softcap: float | None, length: int) -> None:
    """Select by brute force, attend by brute force."""
    q, k, v = random_case(length, group, seed=length + group)
    dims = [2, 6, 3, 7]
    spec = SparseSpec(budget=12, reduction=reduction, sink=2, recent=3)
    sets = [brute_select(row, 12, 2, 3) for row in brute_scores(q, k, dims, reduction)]
    if len(sets) == 1:
        sets = sets * group
    wanted = [brute_attend(q[h : h + 1], k[c], v[c], softcap)[0] for h, c in enumerate(sets)]
    got = decode(q, k, v, np.array(dims), spec, SCALE, softcap)
    assert got.shape == (group, D)
    np.testing.assert_allclose(got, wanted, rtol=1e-10)
    assert not np.allclose(got, attend(q, k, v, SCALE, softcap), rtol=1e-3)


def test_per_head_is_each_head_by_itself() -> None:
    q, k, v = random_case(40, 4, seed=9)
    dims = np.arange(4)
    alone = [decode(row[None], k, v, dims, SparseSpec(budget=12, sink=1, recent=2), SCALE)[0] for row in q]
    got = decode(q, k, v, dims, SparseSpec(budget=12, sink=1, recent=2, reduction="per_head"), SCALE)
    np.testing.assert_allclose(got, alone, rtol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_permuted_head_dims_change_nothing(reduction: Any) -> None:
    """What baking relies on."""
    q, k, v = random_case(40, 4, seed=5)
    order = np.random.default_rng(5).permutation(D)
    spec = SparseSpec(budget=12, sink=1, recent=2, reduction=reduction)
    plain = decode(q, k, v, order[:4], spec, SCALE)
    baked = decode(q[:, order], k[:, order], v, np.arange(4), spec, SCALE)
    np.testing.assert_allclose(baked, plain, rtol=1e-10)


def test_all_dims_find_the_true_top_tokens() -> None:
    """With every chunk dominant, the chosen tokens are those with the largest attention weights."""
    q, k, v = random_case(60, 1, seed=7)
    spec = SparseSpec(budget=10, sink=0, recent=1)
    logits = (q @ k.T)[0, :-1]
    best = np.append(np.argsort(-logits)[:9], 59)
    np.testing.assert_allclose(
        decode(q, k, v, np.arange(D), spec, SCALE), attend(q, k[best], v[best], SCALE), rtol=1e-10
    )
