"""Which matrix product a decode step of one sequence uses: cuBLAS's, or a reduction that torch compiles.

A product of one row is bound by reading the weights; a plain reduction over each of their rows can do that as fast as
memory goes, where cuBLAS does not always. As torch compiles it at once, and with its search for tile sizes. All are
measured, and both sides of a comparison use the fastest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fasa_trt.bench.kernels.dense import FAILURES, one_line
from fasa_trt.bench.kernels.timing import median, replay_us
from fasa_trt.bench.loop import Linear, compiled
from fasa_trt.bench.weights import Weights

LAYERS = 4  # whose weights take turns: together larger than the L2 cache


def one_row(x: Tensor, weight: Tensor) -> Tensor:
    """linear(x, weight) for x [1, width], as a reduction in float32."""
    return (weight.float() * x.float()).sum(dim=-1, dtype=torch.float32).to(x.dtype).unsqueeze(0)


@dataclass(frozen=True)
class Choice:
    """The fastest product of each projection where that is not cuBLAS's, what it is, and what was measured (us)."""

    linears: dict[str, Linear] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def fastest_linears(weights: Weights, batch: int, repeats: int) -> Choice:
    """The choice for one row; more than one is cuBLAS's."""
    choice = Choice()
    if batch != 1:
        return choice
    candidates = {
        "cublas": linear,
        "compiled": compiled(one_row),
        "tuned": compiled(one_row, coordinate_descent_tuning=True),
    }
    layers = weights.layers[:LAYERS]
    matrices = {
        "qkv": [layer.qkv for layer in layers],
        "o": [layer.o for layer in layers],
        "gate_up": [layer.gate_up for layer in layers],
        "down": [layer.down for layer in layers],
        "lm_head": [weights.lm_head],
    }
    for projection, tensors in matrices.items():
        x = torch.randn(1, tensors[0].shape[1], device=weights.device, dtype=weights.dtype)
        wanted = linear(x, tensors[0])
        times: dict[str, float] = {}
        without: dict[str, str] = {}
        for name, product in candidates.items():
            try:
                check(product(x, tensors[0]), wanted)
                times[name] = median(replay_us([partial(product, x, w) for w in tensors], repeats))
            except FAILURES as reason:
                without[name] = one_line(reason)
        fastest = min(times, key=times.__getitem__)
        if fastest != "cublas":
            choice.linears[projection] = candidates[fastest]
            choice.names[projection] = fastest
        choice.measured[projection] = {**times, **({"without": without} if without else {})}
    return choice


def check(got: Tensor, wanted: Tensor) -> None:
    """Raises ValueError where a product is wrong."""
    error = (got.float() - wanted.float()).abs().max() / wanted.float().abs().max()
    if not error < 0.02:
        raise ValueError(f"wrong result: off by {float(error):.3g}")
