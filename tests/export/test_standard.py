"""The standard lowering's own promises: ragged rows, bit-exact short rows, ties, NaN, sliding windows, padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fasa_trt.core.spec import SparseSpec
from fasa_trt.runtime.onnxruntime import OnnxRuntimeBackend
from tests.engines import Exported, decode_steps, export, prefill, relative

BUDGET = 16
SPEC = SparseSpec(budget=BUDGET, n_tip=4, sink=2, recent=4, dense_layers=())
Array = NDArray[Any]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export("llama", tmp_path_factory.mktemp("llama"), SPEC)


@pytest.fixture(scope="module")
def sampling(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export("llama", tmp_path_factory.mktemp("sampling"), replace(SPEC, reduction="sampled_softmax"))


def random_tokens(batch: int, length: int, seed: int) -> Array:
    return np.random.default_rng(seed).integers(2, 97, (batch, length))


def feed(backend: OnnxRuntimeBackend, tokens: Array, position: Array, padding: Array, *, sparse: bool) -> Array:
    """One step; logits [B, vocab] of the last column."""
    last = np.full((len(tokens), 1), tokens.shape[1] - 1)
    return backend.step(tokens, position, padding, last, sparse=sparse)[:, 0]


@pytest.mark.parametrize("length", [1, 2, BUDGET - 1, BUDGET])
def test_within_budget_is_dense_bit_for_bit(llama: Exported, length: int) -> None:
    """L is the length after the step, so the longest of these attends to exactly `budget` tokens."""
    tokens = random_tokens(2, length, length)
    results = []
    for sparse in (False, True):
        if length > 1:
            prefill(llama.backend, tokens[:, :-1])
        else:
            llama.backend.allocate(2)
        results.append(decode_steps(llama.backend, tokens, length - 1, sparse=sparse))
    assert np.array_equal(results[0], results[1])


def test_one_token_over_budget_is_sparse(llama: Exported) -> None:
    tokens = random_tokens(1, BUDGET + 1, 0)
    results = []
    for sparse in (False, True):
        prefill(llama.backend, tokens[:, :-1])
        results.append(decode_steps(llama.backend, tokens, BUDGET, sparse=sparse))
    assert not np.array_equal(results[0], results[1])


def test_short_rows_of_a_mixed_batch_are_dense_bit_for_bit(llama: Exported) -> None:
    lengths = np.array([9, 60, BUDGET - 1, 31])
    tokens = random_tokens(4, 61, 1)
    unpadded = np.zeros(4, np.int64)
    results = []
    for sparse in (False, True):
        prefill(llama.backend, tokens[:, :60])
        results.append(feed(llama.backend, tokens[:, 60:], lengths, unpadded, sparse=sparse))
    dense, mixed = results
    short = lengths < BUDGET
    assert np.array_equal(dense[short], mixed[short])
    assert all(not np.array_equal(a, b) for a, b in zip(dense[~short], mixed[~short], strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("variant", "reduction", "sparse"),
    [
        ("llama", "sum", False),
        ("llama", "sum", True),
        ("llama", "sampled_softmax", True),
        ("gemma3", "sum", False),
        ("gemma3", "sum", True),
    ],
)
def test_padded_rows_equal_rows_alone(variant: str, reduction: Any, sparse: bool, side: str, tmp_path: Path) -> None:
    backend = export(variant, tmp_path, replace(SPEC, reduction=reduction)).backend
    lengths = [40, 23, 57]
    width, steps = max(lengths), 3
    rows = [random_tokens(1, length + steps, seed)[0] for seed, length in enumerate(lengths)]
    wanted = []
    for row, length in zip(rows, lengths, strict=True):
        prefill(backend, row[None, :length])
        wanted.append(decode_steps(backend, row[None], length, sparse=sparse)[0])

    pad = [width - length for length in lengths]
    prompt = np.stack(
        [
            np.pad(row[:length], (gap, 0) if side == "left" else (0, gap))
            for row, length, gap in zip(rows, lengths, pad, strict=True)
        ]
    )
    padding = np.array(pad) if side == "left" else np.zeros(3, np.int64)
    position = np.full(3, width) if side == "left" else np.array(lengths)
    backend.allocate(3)
    backend.step(prompt, np.zeros(3, np.int64), padding, np.zeros((3, 1), np.int64), sparse=False)
    for step in range(steps):
        new = np.array([[row[length + step]] for row, length in zip(rows, lengths, strict=True)])
        got = feed(backend, new, position + step, padding, sparse=sparse)
        for b in range(3):
            assert relative(got[b], wanted[b][step]) < 1e-4


def test_all_equal_scores_take_the_lowest_positions(llama: Exported) -> None:
    """With equal keys every free token ties; the same ones must be chosen whatever lies in the slots behind them."""
    backend = llama.backend
    tokens = random_tokens(1, 50, 3)
    zero = np.zeros(1, np.int64)
    results = []
    for noise in (0.0, 7.0):
        prefill(backend, tokens)
        for name, value in backend._values.items():
            cache = value.numpy()
            cache[:, :, :50] = 0.25
            if name.startswith("value"):
                chosen = BUDGET - SPEC.sink - SPEC.recent  # free tokens that fit
                cache[:, :, SPEC.sink + chosen : 51 - SPEC.recent] += noise  # rejected ones
        results.append(feed(backend, tokens[:, :1], zero + 50, zero, sparse=True))
    assert relative(results[0], results[1]) < 1e-6


@pytest.mark.parametrize("reduction", ["sum", "sampled_softmax"])
@pytest.mark.parametrize("start", [4, 20])  # among the first 16 tokens, which are sampled, and behind them
def test_nan_keys_are_not_chosen(reduction: str, start: int, llama: Exported, sampling: Exported) -> None:
    backend = (llama if reduction == "sum" else sampling).backend
    tokens = random_tokens(1, 60, 4)
    zero = np.zeros(1, np.int64)
    prefill(backend, tokens)
    for name, value in backend._values.items():
        if name.startswith("key_label"):
            value.numpy()[:, :, start : start + 10] = np.nan
    assert np.isfinite(feed(backend, tokens[:, :1], zero + 60, zero, sparse=True)).all()


@pytest.mark.parametrize(("slot", "attended"), [(0, True), (5, False), (89, True)])
def test_peaks_outside_the_sample_leave_room_for_forced_tokens_alone(
    slot: int, attended: bool, sampling: Exported
) -> None:
    """More tokens than fit exceed every head's normaliser by thousands. What is attended, a NaN among values shows."""
    backend = sampling.backend
    tokens = random_tokens(1, 90, 7)
    zero = np.zeros(1, np.int64)
    prefill(backend, tokens)
    for name, value in backend._values.items():
        if name.startswith("key_label"):
            peaks = value.numpy()[:, :, 16:64]
            peaks[:] = 1e4 * peaks[:, :, :1] * np.where(np.arange(48) % 2, 1, -1)[:, None]
        if name.startswith("value"):
            value.numpy()[:, :, slot] = np.nan
    assert np.isnan(feed(backend, tokens[:, :1], zero + 90, zero, sparse=True)).any() == attended


def test_the_cache_is_updated_in_place(llama: Exported) -> None:
    backend = llama.backend
    tokens = random_tokens(1, 40, 5)
    prefill(backend, tokens[:, :39])
    name = "value.1"
    before = backend._values[name].numpy()
    address, content = before.ctypes.data, before.copy()
    decode_steps(backend, tokens, 39)
    after = backend._values[name].numpy()
    assert after.ctypes.data == address
    changed = np.nonzero((after != content).any(axis=(0, 1, 3)))[0]
    assert changed.tolist() == [39]


def test_going_back_forgets(llama: Exported) -> None:
    """Slots from cache_position on are overwritten, so a shorter history leaves no trace of a longer one."""
    tokens = random_tokens(1, 60, 6)
    prefill(llama.backend, tokens[:, :40])
    wanted = decode_steps(llama.backend, tokens[:, :42], 40)
    prefill(llama.backend, tokens)
    assert np.array_equal(decode_steps(llama.backend, tokens[:, :42], 40), wanted)
