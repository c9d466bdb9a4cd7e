"""Which matrix product a decode step of one sequence uses: cuBLAS's, or a reduction that torch compiles.

A product of one row is bound by reading the weights; a plain reduction over each of their rows can do that as fast as
memory goes, where cuBLAS does not always. Both are measured, and both sides of a comparison use the faster.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fasa_trt.bench.kernels.dense import FAILURES, one_line
from fasa_trt.bench.kernels.timing import median, replay_us
from fasa_trt.bench.loop import Linear
from fasa_trt.bench.weights import Weights

LAYERS = 4  # whose weights take turns: together larger than the L2 cache


def one_row(x: Tensor, weight: Tensor) -> Tensor:
    """linear(x, weight) for x [1, width], as a reduction in float32."""
    return (weight.float() * x.float()).sum(dim=-1, dtype=torch.float32).to(x.dtype).unsqueeze(0)


@torch.no_grad()
def fastest_linears(weights: Weights, batch: int, repeats: int) -> tuple[dict[str, Linear], dict[str, Any]]:
    """The faster product for each projection, and what was measured, microseconds. More than one row is cuBLAS's."""
    if batch != 1:
        return {}, {}
    compiled = torch.compile(one_row, dynamic=False)
    layers = weights.layers[:LAYERS]
    matrices = {
        "qkv": [layer.qkv for layer in layers],
        "o": [layer.o for layer in layers],
        "gate_up": [layer.gate_up for layer in layers],
        "down": [layer.down for layer in layers],
        "lm_head": [weights.lm_head],
    }
    chosen: dict[str, Linear] = {}
    measured: dict[str, Any] = {}
    for name, tensors in matrices.items():
        x = torch.randn(1, tensors[0].shape[1], device=weights.device, dtype=weights.dtype)
        times: dict[str, Any] = {"cublas": median(replay_us([partial(linear, x, w) for w in tensors], repeats))}
        try:
            wanted = linear(x, tensors[0]).float()
            error = (compiled(x, tensors[0]).float() - wanted).abs().max() / wanted.abs().max()
            if not error < 0.02:
                raise ValueError(f"wrong result: off by {float(error):.3g}")
            times["compiled"] = median(replay_us([partial(compiled, x, w) for w in tensors], repeats))
            if times["compiled"] < times["cublas"]:
                chosen[name] = compiled
        except FAILURES as reason:
            times["without"] = one_line(reason)
        measured[name] = times
    return chosen, measured
