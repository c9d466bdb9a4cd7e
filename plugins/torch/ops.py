"""`torch.ops.fasa.decode` and `torch.ops.fasa.append` over the kernel library.

Shapes, for S sequences, Hq query heads, Hkv KV heads and blocks of `t` tokens:
    pool      float16 or bfloat16 [blocks, layers, 2, Hkv, t, head_dim], keys and values as TensorRT-LLM lays them out
    offsets   int32 [S, 2, max_blocks]: block * layers * 2, plus 1 for values
    labels    uint8 [blocks, t, Hkv, bytes], or empty to read labels from the keys' leading dims ("prefix")
    scales    float16 [blocks, t, Hkv], or empty for "prefix" and "fp8"
Blocks of the pool may have room for more heads: the pool is then a view of its first ones, and labels and scales may
be views of another one (`label_head.py`).
The operators run on the current stream, do not synchronise, and have fake versions for torch.compile.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fasa_trt.core.errors import FasaError
from fasa_trt.core.labels import LABEL_KINDS, label_bytes, scale_bytes
from fasa_trt.core.spec import REDUCTION_CODES
from fasa_trt.plugins import library as builds
from fasa_trt.plugins.torch.structs import AppendParams, DecodeParams, Labels, Pool, PrefillParams, declare
from fasa_trt.runtime.machine import architecture

DTYPES = {torch.float16: 0, torch.bfloat16: 1}


@cache
def library(device: torch.device, head_dim: int) -> ctypes.CDLL:
    """The kernels for a CUDA device and a head_dim. Raises FasaError when they cannot be built."""
    lib = declare(builds.load(architecture(torch.cuda.get_device_capability(device)), (head_dim,)))
    with torch.cuda.device(device):
        lib.fasa_reserve_l2()  # for speed alone: a device that refuses works as well
    return lib


@torch.library.custom_op("fasa::decode", mutates_args=())
def decode(
    q: Tensor,
    pool: Tensor,
    layer: int,
    offsets: Tensor,
    lengths: Tensor,
    labels: Tensor,
    scales: Tensor,
    label_kind: str,
    n_tip: int,
    max_length: int,
    dense_below: int,
    budget: int,
    sink: int,
    recent: int,
    scale: float,
    softcap: float,
    reduction: str,
) -> Tensor:
    """One decode step of one layer. q: [S, Hq, head_dim] after RoPE; lengths: int32 [S] on the device, at
    most max_length; dense_below: see fasa.h, -1 for the measured crossover. Returns the attention's output, like q.
    Raises FasaError for parameters that no kernel takes."""
    return _decode(
        "fasa_decode",
        q,
        pool,
        layer,
        offsets,
        lengths,
        max_length=max_length,
        dense_below=dense_below,
        budget=budget,
        sink=sink,
        recent=recent,
        scale=scale,
        softcap=softcap,
        reduction=REDUCTION_CODES[reduction],
        labels=_labels(label_kind, n_tip, labels, scales, pool),
    )


@decode.register_fake
def _(q: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("fasa::append", mutates_args=("pool", "labels", "scales"))
def append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: Tensor,
    position: Tensor,
    inv_freq: Tensor,
    rope_scale: Tensor,
    pool: Tensor,
    layer: int,
    offsets: Tensor,
    labels: Tensor,
    scales: Tensor,
    label_kind: str,
    n_tip: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    """Normalises, rotates and caches N new tokens. q: [N, Hq, head_dim], k, v: [N, Hkv, head_dim], heads contiguous;
    sequence, position: int32 [N]; inv_freq, rope_scale: float32 [Hkv, head_dim / 2] in baked order; q_norm, k_norm:
    [Hq, head_dim] and [Hkv, head_dim] weights of an RMS norm over each head. Returns the rotated q."""
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    params = AppendParams(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        q_token_stride=q.stride(0),
        k_token_stride=k.stride(0),
        v_token_stride=v.stride(0),
        q_out=q_out.data_ptr(),
        sequence=sequence.data_ptr(),
        position=position.data_ptr(),
        inv_freq=inv_freq.data_ptr(),
        rope_scale=rope_scale.data_ptr(),
        q_norm=None if q_norm is None else q_norm.data_ptr(),
        k_norm=None if k_norm is None else k_norm.data_ptr(),
        norm_eps=norm_eps,
        num_tokens=q.shape[0],
        num_q_heads=q.shape[1],
        pool=_pool(pool, layer, offsets),
        labels=_labels(label_kind, n_tip, labels, scales, pool),
    )
    lib = library(q.device, q.shape[-1])
    _check(lib, lib.fasa_append(ctypes.byref(params), torch.cuda.current_stream(q.device).cuda_stream))
    return q_out


@append.register_fake
def _(q: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape)


def _check_tensors(q: Tensor, pool: Tensor, offsets: Tensor, lengths: Tensor) -> None:
    if q.dtype != pool.dtype or q.shape[-1] != pool.shape[-1]:
        raise FasaError(f"q is {q.dtype} of head_dim {q.shape[-1]}, the pool {pool.dtype} of {pool.shape[-1]}")
    if lengths.dtype != torch.int32 or not lengths.is_contiguous() or len(lengths) != len(offsets):
        raise FasaError("lengths must be contiguous int32, one for each sequence of offsets")


def _pool(pool: Tensor, layer: int, offsets: Tensor) -> Pool:
    _, layers, _, kv_heads, tokens, head_dim = pool.shape
    block = pool.stride(2)  # elements
    heads = block // (tokens * head_dim)
    wanted = (2 * layers * block, 2 * block, heads * tokens * head_dim, tokens * head_dim, head_dim, 1)
    axes = zip(pool.shape, pool.stride(), wanted, strict=True)
    whole = all(size == 1 or found == stride for size, found, stride in axes)
    if pool.dtype not in DTYPES or not whole or heads < kv_heads or not 0 <= layer < layers:
        raise FasaError("pool must be a float16 or bfloat16 tensor that has the layer, contiguous but for more heads")
    if offsets.dtype != torch.int32 or not offsets.is_contiguous():
        raise FasaError("offsets must be a contiguous int32 tensor")
    return Pool(
        primary=pool.data_ptr() + layer * 2 * block * pool.element_size(),
        offsets=offsets.data_ptr(),
        max_blocks=offsets.shape[2],
        tokens_per_block=tokens,
        num_kv_heads=kv_heads,
        heads_per_block=heads,
        head_dim=head_dim,
        dtype=DTYPES[pool.dtype],
    )


def _labels(kind: str, n_tip: int, labels: Tensor, scales: Tensor, pool: Tensor) -> Labels:
    if kind == "prefix":
        return Labels(kind=LABEL_KINDS[kind], n_tip=n_tip)
    if labels.shape[3] < label_bytes(kind, n_tip):
        raise FasaError(f"labels of {labels.shape[3]} bytes are too short for n_tip {n_tip} in {kind}")
    item = scale_bytes(kind)
    return Labels(
        kind=LABEL_KINDS[kind],
        n_tip=n_tip,
        labels=labels.data_ptr(),
        scales=scales.data_ptr(),
        offset_divisor=2 * pool.shape[1],
        label_block_stride=labels.stride(0),
        label_token_stride=labels.stride(1),
        label_head_stride=labels.stride(2),
        scale_block_stride=item * scales.stride(0) if item else 0,
        scale_token_stride=item * scales.stride(1) if item else 0,
        scale_head_stride=item * scales.stride(2) if item else 0,
    )


def _decode(name: str, q: Tensor, pool: Tensor, layer: int, offsets: Tensor, lengths: Tensor, **numbers: Any) -> Tensor:
    """Calls a decode function of the library; `numbers` are further fields of its parameters."""
    _check_tensors(q, pool, offsets, lengths)
    if not q.is_contiguous() or q.shape[0] != len(lengths):
        raise FasaError("q must be contiguous [sequences, heads, head_dim]")
    out = torch.empty_like(q)
    params = DecodeParams(
        q=q.data_ptr(),
        out=out.data_ptr(),
        lengths=lengths.data_ptr(),
        num_seqs=q.shape[0],
        num_q_heads=q.shape[1],
        pool=_pool(pool, layer, offsets),
        **numbers,
    )
    _launch(name, params, q)
    return out


def _launch(name: str, params: DecodeParams | PrefillParams, q: Tensor) -> None:
    """Calls a function of the library on the current stream with the workspace that it asks for."""
    lib = library(q.device, q.shape[-1])
    size = getattr(lib, f"{name}_workspace")(ctypes.byref(params))
    workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=q.device)
    params.workspace, params.workspace_bytes = workspace.data_ptr(), size
    _check(lib, getattr(lib, name)(ctypes.byref(params), torch.cuda.current_stream(q.device).cuda_stream))


def _check(lib: ctypes.CDLL, status: int) -> None:
    if status:
        raise FasaError(f"FASA kernel refused: {lib.fasa_status_text(status).decode()}")
