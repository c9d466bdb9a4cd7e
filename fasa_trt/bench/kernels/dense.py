"""The dense decode attention that FASA is compared with: every kernel that is installed, checked before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fasa_trt.bench.kernels.cache import LLAMA_8B, TOKENS, Paged, make_paged
from fasa_trt.bench.kernels.timing import Calls, replay_us

Attend = Callable[[Tensor], Tensor]  # of queries [batch, q_heads, head_dim] over one of the caches; returns the like
Kernel = Callable[[Paged], list[Attend]]
Samples = dict[str, list[float]]
WORKSPACE_BYTES = 512 << 20
TOLERANCE = 0.02  # on outputs of about 1 / sqrt(context), in bfloat16
# What a kernel that is absent, does not know this GPU or runs out of memory raises: the others go on without it.
FAILURES = (ImportError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError)


def sdpa(backend: str, paged: Paged) -> list[Attend]:
    """torch's scaled_dot_product_attention. It wants contiguous caches, the easiest case there is."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(cache: Tensor, q: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            found = torch.nn.functional.scaled_dot_product_attention(
                q.unsqueeze(2), cache[0], cache[1], enable_gqa=True
            )
        return found.squeeze(2)

    return [partial(attend, paged.contiguous(pool)) for pool in paged.pools]


def flashinfer_paged(layout: str, paged: Paged) -> list[Attend]:
    """FlashInfer's batch decode on tensor cores. layout: HND, as the pools are, or NHD."""
    import flashinfer

    batch, blocks = paged.table.shape
    indptr = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * blocks
    index = paged.table.flatten()
    last = torch.full((batch,), TOKENS, device="cuda", dtype=torch.int32)
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(),
        layout,
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=indptr.clone(),
        paged_kv_indices_buffer=index.clone(),
        paged_kv_last_page_len_buffer=last.clone(),
    )
    dtype = paged.q.dtype
    heads = (paged.q_heads, paged.kv_heads, paged.head_dim)
    decode.plan(indptr, index, last, *heads, TOKENS, q_data_type=dtype, kv_data_type=dtype, sm_scale=paged.scale)
    out = torch.empty_like(paged.q)

    def attend(pool: Tensor, q: Tensor) -> Tensor:
        return decode.run(q, pool, out=out)

    pools = [pool[:, 0] if layout == "HND" else pool[:, 0].transpose(2, 3).contiguous() for pool in paged.pools]
    return [partial(attend, pool) for pool in pools]


def flashinfer_xqa(paged: Paged) -> list[Attend]:
    """XQA, TensorRT-LLM's decode kernel, as FlashInfer ships it."""
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    xqa = partial(
        xqa_batch_decode_with_kv_cache,
        workspace_buffer=_workspace(),
        block_tables=paged.table,
        seq_lens=paged.lengths,
        max_seq_len=paged.context,
        bmm1_scale=paged.scale,
        bmm2_scale=1.0,
        kv_layout="HND",
        out=torch.empty_like(paged.q),
    )

    def attend(pool: Tensor, q: Tensor) -> Tensor:
        return xqa(q, pool)

    return [partial(attend, pool[:, 0]) for pool in paged.pools]


def fasa_dense(paged: Paged) -> list[Attend]:
    """The dense decode of this project's kernel library."""
    from fasa_trt.plugins.torch.dense import dense_decode

    def attend(pool: Tensor, q: Tensor) -> Tensor:
        return dense_decode(q, pool, 0, paged.offsets, paged.lengths, paged.context, paged.scale, 0.0, 0)

    return [partial(attend, pool) for pool in paged.pools]


def _workspace() -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


KERNELS: dict[str, Kernel] = {
    "torch SDPA flash": partial(sdpa, "FLASH_ATTENTION"),
    "torch SDPA cudnn": partial(sdpa, "CUDNN_ATTENTION"),
    "FlashInfer paged HND": partial(flashinfer_paged, "HND"),
    "FlashInfer paged NHD": partial(flashinfer_paged, "NHD"),
    "FlashInfer XQA": flashinfer_xqa,
    "fasa dense": fasa_dense,
}


def calls_of(kernel: Kernel, paged: Paged) -> Calls:
    """A decode step over every cache."""
    return [partial(attend, paged.q) for attend in kernel(paged)]


def reference(paged: Paged) -> Tensor:
    """The first cache's attention in float32, like q."""
    k, v = paged.contiguous(paged.pools[0]).float()
    q = paged.q.float().view(paged.batch, paged.kv_heads, -1, paged.head_dim)
    weights = torch.softmax(q @ k.transpose(2, 3) * paged.scale, dim=-1)
    return (weights @ v).view(paged.q.shape)


def usable(
    kernels: Mapping[str, Kernel] = KERNELS, heads: tuple[int, int, int] = LLAMA_8B
) -> tuple[dict[str, Kernel], dict[str, str]]:
    """The kernels that run here and compute attention, and why the others are left out."""
    paged = make_paged(2048, 3, 1, heads)
    wanted = reference(paged)
    found, missing = {}, {}
    for name, kernel in kernels.items():
        try:
            error = (kernel(paged)[0](paged.q).float() - wanted).abs().max().item()
        except FAILURES as reason:
            missing[name] = one_line(reason)
            continue
        if error < TOLERANCE:
            found[name] = kernel
        else:
            missing[name] = f"wrong result: off by {error:.3g}"
    for name, why in missing.items():
        print(f"without {name}: {why}", flush=True)
    return found, missing


def dense_us(paged: Paged, kernels: Mapping[str, Kernel], repeats: int) -> Samples:
    """Microseconds of every kernel that manages this shape."""
    found: Samples = {}
    for name, kernel in kernels.items():
        try:
            found[name] = replay_us(calls_of(kernel, paged), repeats)
        except FAILURES as reason:
            print(f"{paged.context:7d} x {paged.batch:3d}: without {name}: {one_line(reason)}", flush=True)
        torch.cuda.empty_cache()
    return found


def one_line(reason: BaseException) -> str:
    """The first line of an exception, of a length that a table bears."""
    lines: list[Any] = str(reason).strip().splitlines() or [type(reason).__name__]
    return f"{type(reason).__name__}: {lines[0]}"[:200]
