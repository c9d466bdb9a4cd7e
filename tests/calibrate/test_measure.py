"""Agreement and spread of chunks against brute force, visibility, memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile

from fasa_trt.calibrate import measure as measuring
from fasa_trt.calibrate.measure import DecodeSteps, measure, measure_sets, partial_logits, summed_logits
from fasa_trt.core.rope import chunk_pairs
from tests.calibrate.definition import DEVICES, by_definition

HEADS, KV_HEADS, LENGTH, DIM = 6, 2, 300, 16
POSITIONS = (199, 240, 299)
KS = (8, 32, 64, 512)


def random_steps(
    *, interleaved: bool = False, rotary_dim: int = DIM, window: int | None = None, device: str = "cpu", seed: int = 0
) -> DecodeSteps:
    """Small integers: float32 computes them exactly, in any order, and many logits tie."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-9, 10, (HEADS, len(POSITIONS), DIM), generator=generator).float()
    k = torch.randint(-9, 10, (KV_HEADS, LENGTH, DIM), generator=generator).float()
    pairs = torch.from_numpy(chunk_pairs(DIM, rotary_dim, interleaved=interleaved))
    return DecodeSteps(q.to(device), k.to(device), pairs.to(device), POSITIONS, scale=0.25, window=window)


def brute_force(steps: DecodeSteps, sets: list[list[list[int]]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Agreement [ks, heads, sets] and spread [heads, sets] of sets of chunks, sets[kv_head][number], in float64.

    The true order of equal logits is taken from the code under test, which may choose any.
    """
    q, k, pairs = steps.q.cpu().double().numpy(), steps.k.cpu().double().numpy(), steps.pairs.cpu().numpy()
    agreement, spread = np.zeros((len(KS), len(q), len(sets[0]))), np.zeros((len(q), len(sets[0])))
    group = len(q) // len(k)
    for head in range(len(q)):
        tops = [top[head % group] for top in true_tops(steps, head // group)]
        for step, position in enumerate(steps.positions):
            start = 0 if steps.window is None else max(0, position + 1 - steps.window)
            keys = k[head // group, start : position + 1]
            full = keys @ q[head, step]
            top = tops[step]
            assert (full[top] == -np.sort(-full)[: len(top)]).all()
            for number, chunks in enumerate(sets[head // group]):
                dims = pairs[chunks].ravel()
                logits = keys[:, dims] @ q[head, step, dims] * steps.scale
                spread[head, number] += logits.std() / len(steps.positions)
                for at, wanted in enumerate(KS):
                    agreement[at, head, number] += by_definition(top, logits, wanted) / len(steps.positions)
    return agreement, spread


def true_tops(steps: DecodeSteps, kv_head: int) -> list[NDArray[np.int64]]:
    tops = [measuring.true_top(queries, keys, max(KS)) for queries, keys in steps.of_kv_head(kv_head)]
    return [top.cpu().numpy() for top in tops]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [{}, {"interleaved": True}, {"interleaved": True, "rotary_dim": 8}, {"rotary_dim": 12}, {"window": 50}],
    ids=str,
)
def test_brute_force(options: dict[str, Any], device: str) -> None:
    steps = random_steps(device=device, seed=int(np.random.default_rng().integers(2**31)), **options)
    agreement, spread = measure(steps, KS)
    wanted, wanted_spread = brute_force(steps, [[[chunk] for chunk in range(DIM // 2)]] * KV_HEADS)
    np.testing.assert_allclose(agreement.cpu().numpy(), wanted, rtol=1e-5)
    np.testing.assert_allclose(spread.cpu().numpy(), wanted_spread, rtol=1e-5)


def test_gaussian_input() -> None:
    """Rounding may swap neighbours at the edge of a top K, no more."""
    steps = DecodeSteps(
        torch.randn(HEADS, 3, DIM), torch.randn(KV_HEADS, LENGTH, DIM), random_steps().pairs, POSITIONS, scale=0.3
    )
    agreement, spread = measure(steps, KS)
    wanted, wanted_spread = brute_force(steps, [[[chunk] for chunk in range(DIM // 2)]] * KV_HEADS)
    np.testing.assert_allclose(spread.numpy(), wanted_spread, rtol=1e-4)
    assert np.abs(agreement.numpy() - wanted).max() <= 1 / min(KS)
    assert np.abs(agreement.numpy() - wanted).mean() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype) -> None:
    steps = random_steps()  # small integers are exact in every dtype
    half = DecodeSteps(steps.q.to(dtype), steps.k.to(dtype), steps.pairs, POSITIONS, scale=0.25)
    for ours, theirs in zip(measure(half, KS), measure(steps, KS), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_sets() -> None:
    steps = random_steps()
    chosen = [[0, 3, 5], [7, 1, 2]]
    wanted, _ = brute_force(steps, [[chunks] for chunks in chosen])
    np.testing.assert_allclose(measure_sets(steps, torch.tensor(chosen), KS).numpy(), wanted[..., 0], rtol=1e-5)
    everything = torch.arange(DIM // 2).expand(KV_HEADS, -1)
    assert measure_sets(steps, everything, KS).min() > 0.95, "ties aside, all chunks find all keys"


def test_partial_logits_add_up() -> None:
    steps = random_steps(interleaved=True, rotary_dim=8)
    for kv_head in range(KV_HEADS):
        for step, (queries, keys) in enumerate(steps.of_kv_head(kv_head)):
            seen = steps.k[kv_head, : POSITIONS[step] + 1]
            full = steps.q[steps.heads(kv_head), step] @ seen.T * steps.scale
            assert torch.equal(summed_logits(queries, keys), full)
            assert torch.equal(partial_logits(queries, keys).sum(1), full)


@pytest.mark.parametrize("window", [None, 50])
def test_keys_out_of_sight_change_nothing(window: int | None) -> None:
    steps = random_steps(window=window)
    last = DecodeSteps(steps.q[:, :1], steps.k, steps.pairs, (199,), window=window)
    before = measure(last, KS)
    steps.k[:, 200:] = torch.nan
    if window is not None:
        steps.k[:, :150] = torch.nan
    for ours, theirs in zip(measure(last, KS), before, strict=True):
        assert torch.equal(ours, theirs)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = random_steps()
    whole = measure(steps, KS)
    monkeypatch.setattr(measuring, "SCRATCH_BYTES", 1)  # one chunk at a time
    for ours, theirs in zip(measure(steps, KS), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_threads_are_given_back() -> None:
    threads = torch.get_num_threads()
    measure(random_steps(), KS)
    with pytest.raises(ZeroDivisionError):
        measuring.each(lambda x: x // 0, [1], on=torch.device("cpu"))
    assert torch.get_num_threads() == threads


def test_memory_is_bounded(tmp_path: Path) -> None:
    """The partial logits of a KV head, 8 query heads of 64 chunks on 32k keys, and their copies would take 2 GiB."""
    length = 1 << 15
    q, k = torch.randn(16, 2, 128), torch.randn(2, length, 128)
    pairs = torch.from_numpy(chunk_pairs(128, 128, interleaved=False))
    steps = DecodeSteps(q, k, pairs, (length - 2, length - 1))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        measure(steps, (64, 256))
    trace = tmp_path / "trace.json"
    recorded.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = np.cumsum([event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])])
    keys_of_one_head = 2 * k[0].nbytes  # in float32, before and after they are arranged by chunk
    assert 0 < held.max() < measuring.SCRATCH_BYTES + keys_of_one_head
