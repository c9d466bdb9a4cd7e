"""Dense causal prefill of the kernel library, over the paged cache, against torch's scaled_dot_product_attention."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasa_trt.bench.kernels.cache import HEAD_DIM, Q_HEADS, SCALE, Paged, make_paged, normal
from fasa_trt.bench.kernels.dense import FAILURES, one_line
from fasa_trt.bench.kernels.timing import Calls, median, replay_us

LENGTHS = (4096, 8192, 16384, 32768)
COPIES = 2
TOLERANCE = 0.05  # on outputs of which the first few are about 1, in bfloat16

# Calls over every cache with queries [length, Q_HEADS, HEAD_DIM], each returning the like.
Kernel = Callable[[Paged, Tensor], Calls]


def prefill(*, quick: bool, repeats: int) -> dict[str, Any]:
    """{"rows": one a length: medians by kernel, TFLOP/s of the causal half, raw samples}."""
    found = []
    for length in LENGTHS[:1] if quick else LENGTHS:
        paged = make_paged(length, 1, COPIES)
        q = normal(length, Q_HEADS, HEAD_DIM)
        wanted = sdpa(None, paged, q)[0]()
        row: dict[str, Any] = {"length": length, "batch": 1, "kernels": {}, "without": {}}
        for name, kernel in KERNELS.items():
            try:
                row["kernels"][name] = timed(kernel(paged, q), wanted, repeats)
            except FAILURES as reason:
                row["without"][name] = one_line(reason)
        found.append(row)
        shown = {name: f"{kernel['us']:.1f} us, {kernel['tflops']}" for name, kernel in row["kernels"].items()}
        print(f"prefill {length}: {shown} {row['without'] or ''}", flush=True)
    return {"rows": found}


def timed(calls: Calls, wanted: Tensor, repeats: int) -> dict[str, Any]:
    """Raises ValueError when the first call does not compute `wanted`."""
    error = (calls[0]() - wanted).abs().max().item()
    if not error < TOLERANCE:
        raise ValueError(f"wrong result: off by {error:.3g}")
    samples = replay_us(calls, repeats)
    flops = 2 * 2 * Q_HEADS * HEAD_DIM * wanted.shape[0] ** 2 / 2
    return {"us": median(samples), "tflops": round(flops / median(samples) / 1e6, 1), "samples": samples}


def sdpa(backend: str | None, paged: Paged, q: Tensor) -> Calls:
    """torch's, by backend, or by its own choice; over contiguous keys and values."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    queries = q.transpose(0, 1).unsqueeze(0)

    def attend(cache: Tensor) -> Tensor:
        chosen = contextlib.nullcontext() if backend is None else sdpa_kernel(getattr(SDPBackend, backend))
        with chosen:
            found = torch.nn.functional.scaled_dot_product_attention(
                queries, cache[0], cache[1], is_causal=True, enable_gqa=True
            )
        return found[0].transpose(0, 1)

    return [partial(attend, paged.contiguous(pool)) for pool in paged.pools]


def fasa_prefill(paged: Paged, q: Tensor) -> Calls:
    from fasa_trt.plugins.torch.dense import prefill

    return [
        partial(
            prefill,
            q=q,
            query_lengths=paged.lengths,
            pool=pool,
            layer=0,
            offsets=paged.offsets,
            lengths=paged.lengths,
            scale=SCALE,
            softcap=0.0,
            window=0,
        )
        for pool in paged.pools
    ]


KERNELS: dict[str, Kernel] = {
    "torch SDPA default": partial(sdpa, None),
    "torch SDPA flash": partial(sdpa, "FLASH_ATTENTION"),
    "torch SDPA cudnn": partial(sdpa, "CUDNN_ATTENTION"),
    "fasa prefill": fasa_prefill,
}
