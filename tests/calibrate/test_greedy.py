"""Forward selection against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasa_trt.calibrate import measure as measuring
from fasa_trt.calibrate.greedy import forward_selection
from fasa_trt.calibrate.measure import DecodeSteps
from fasa_trt.core.rope import chunk_pairs
from tests.calibrate.definition import DEVICES, by_definition

CHUNKS, K = 6, 20


def text(seed: int, device: str = "cpu") -> DecodeSteps:
    """2 KV heads of 3 query heads; small integers, which float32 adds exactly."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-9, 10, (6, 2, 2 * CHUNKS), generator=generator).float().to(device)
    k = torch.randint(-9, 10, (2, 150, 2 * CHUNKS), generator=generator).float().to(device)
    return DecodeSteps(
        q, k, torch.from_numpy(chunk_pairs(2 * CHUNKS, 2 * CHUNKS, interleaved=False)).to(device), (99, 149)
    )


def brute_force(texts: list[DecodeSteps], kv_head: int, rounds: int) -> list[int]:
    def agreement(chunks: list[int]) -> float:
        found = []
        for sample in texts:
            for step, position in enumerate(sample.positions):
                keys = sample.k[kv_head, : position + 1].cpu().double().numpy()
                queries, chunk_keys = sample.of_kv_head(kv_head)[step]
                tops = measuring.true_top(queries, chunk_keys, K).cpu().numpy()
                for head in range(3):
                    dims = sample.pairs[chunks].cpu().ravel().numpy()
                    q = sample.q[kv_head * 3 + head, step, dims].cpu().double().numpy()
                    found.append(by_definition(tops[head], keys[:, dims] @ q, K))
        return round(float(np.mean(found)), 5)

    taken: list[int] = []
    rest = list(range(CHUNKS))
    for _ in range(rounds):
        gains = {chunk: agreement([*taken, chunk]) for chunk in rest}
        best = max(rest, key=lambda chunk: gains[chunk])
        rest.remove(best)
        taken.append(best)
    return taken + sorted(rest, key=lambda chunk: -gains[chunk])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rounds", [1, 3, CHUNKS])
def test_brute_force(rounds: int, device: str) -> None:
    texts = [text(seed, device) for seed in (1, 2)]
    order = forward_selection(texts, k=K, rounds=rounds)
    assert order.tolist() == [brute_force(texts, kv_head, rounds) for kv_head in range(2)]


def test_a_copy_of_the_best_chunk_is_not_the_second_choice() -> None:
    """Chunks 0 and 1 know the same about the keys, chunk 2 less, but something else."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 4000, 6, generator=generator)
    pairs = torch.tensor([[0, 1], [2, 3], [4, 5]])
    k[..., 2:4] = k[..., 0:2]
    steps = DecodeSteps(torch.tensor([1.0, 0, 1.0, 0, 1.7, 0])[None, None], k, pairs, (3999,))
    alone = measuring.measure(steps, (64,))[0][0, 0]
    assert alone[0] == alone[1] > alone[2]
    assert forward_selection([steps], k=64, rounds=2).tolist() == [[0, 2, 1]]
