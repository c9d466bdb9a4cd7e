"""Drawing with torch gives the tokens that drawing on the host gives."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fasa_trt.runtime.device_memory import Device
from fasa_trt.runtime.device_sampling import HostSampler, _runs, choose_tokens
from fasa_trt.runtime.sampling import NOT_FINITE, Draw, Sampling, choose
from tests.fake_cuda import FakeCuda

SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.2},
    {"temperature": 4.0},
    {"temperature": 1e-30},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_k": 10_000},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
]


def draws(rng: np.random.Generator) -> list[Draw]:
    return [Draw(Sampling(**options), float(rng.random())) for options in SETTINGS]  # type: ignore[arg-type]


def logits_of(rng: np.random.Generator, rows: int, vocab: int = 60) -> NDArray[np.float32]:
    return (rng.normal(size=(rows, vocab)) * 3).astype(np.float32)


@pytest.mark.parametrize("seed", range(20))
def test_same_tokens_as_on_the_host(seed: int) -> None:
    rng = np.random.default_rng(seed)
    chosen, logits = draws(rng), logits_of(rng, len(SETTINGS))
    logits[3, ::2] = -np.inf
    wanted = [choose(row, draw) for row, draw in zip(logits, chosen, strict=True)]
    assert choose_tokens(torch.from_numpy(logits), chosen).tolist() == wanted


def test_every_kind_of_draw_varies() -> None:
    """Otherwise the test above compares constants."""
    rng = np.random.default_rng(0)
    (logits,) = logits_of(rng, 1)
    for options in ({"temperature": 1.0}, {"temperature": 1.0, "top_k": 7}, {"temperature": 1.0, "top_p": 0.6}):
        found = {choose(logits, Draw(Sampling(**options), u)) for u in np.linspace(0, 0.999, 50)}  # type: ignore[arg-type]
        assert len(found) > 1


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_ends_of_the_distribution(uniform: float) -> None:
    logits = np.array([[0.0, 1.0, -np.inf, 2.0]], np.float32)
    draw = Draw(Sampling(1.0), uniform)
    (token,) = choose_tokens(torch.from_numpy(logits), [draw]).tolist()
    assert token == choose(logits[0], draw) != 2


def test_ties_go_to_the_lower_id() -> None:
    logits = torch.zeros(2, 9)
    tie = [Draw(Sampling(), 0.0), Draw(Sampling(1.0, top_k=1), 0.9)]
    assert choose_tokens(logits, tie).tolist() == [0, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite(value: float, temperature: float) -> None:
    logits = np.zeros((3, 5), np.float32)
    logits[1, 2] = value
    logits[2, :] = -np.inf
    logits[0, 4] = 50
    tokens = choose_tokens(torch.from_numpy(logits), [Draw(Sampling(temperature), 0.5)] * 3).tolist()
    assert tokens == [4, NOT_FINITE, NOT_FINITE]


def test_host_sampler_copies_the_rows_that_are_asked_for() -> None:
    cuda = FakeCuda()
    device = Device(cuda)
    logits = logits_of(np.random.default_rng(1), 6)
    pointer = device.allocate(logits.nbytes, "logits")
    staged = device.pinned(logits.shape, np.float32)
    staged[:] = logits
    device.upload(pointer, staged)
    sampler, rows = HostSampler(device, pointer, (6, 60)), np.array([0, 2, 3, 5], np.int32)
    greedy = [Draw(Sampling(), 0.0)] * 4
    before: Any = cuda.calls["cudaMemcpyAsync"]
    assert sampler(rows, greedy) == logits[rows].argmax(1).tolist()
    assert cuda.calls["cudaMemcpyAsync"] - before == 3
    assert sampler(rows[:0], []) == []


def test_runs() -> None:
    assert _runs(np.array([], np.int32)) == []
    assert _runs(np.array([1, 2, 3, 7, 9, 10], np.int32)) == [(1, 3), (7, 1), (9, 2)]


def test_real_bindings_have_the_names() -> None:
    """Where `cuda.bindings` is installed: everything that `Device` calls is there."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    assert sys.modules["cuda.bindings.runtime"] is runtime
    for name in dir(FakeCuda):
        assert not name.startswith("cuda") or hasattr(runtime, name), name
    assert runtime.cudaMemcpyKind.cudaMemcpyHostToDevice == 1
    assert runtime.cudaDeviceAttr(75).name == "cudaDevAttrComputeCapabilityMajor"
    assert runtime.cudaError_t.cudaErrorMemoryAllocation == 2
