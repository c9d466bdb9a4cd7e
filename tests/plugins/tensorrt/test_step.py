"""How a step is handed to the kernels: which tokens, which blocks, which workspace. The kernels are stand-ins that keep
what they are called with, so that nothing here needs a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_int64
from pathlib import Path
from typing import Any

import pytest

from fasa_trt.plugins.torch.structs import AppendParams, DecodeParams, PrefillParams
from tests.plugins.tensorrt.driver import BF16, HALF, RUNTIME, Driver, Layer
from tests.plugins.tensorrt.layers import DENSE, SPARSE, tensors

LIST, APPEND, PREFILL, DECODE, DENSE_DECODE = 1, 2, 3, 4, 5
BLOCK = 32 * 2 * 128 * 2  # bytes
ROW = 8 * 128 * 2  # bytes of a token's queries
DEVICE = {name: 0x10000 * (i + 1) for i, name in enumerate(("q", "k", "v", "inv_freq", "rope_scale", "lengths",
          "context", "offsets", "q_norm", "k_norm", "out", "workspace"))}  # fmt: skip
POOLS = [0x7_0000_0000, 0, 0x8_0000_0000, 0x9_0000_0000]  # primary and secondary of two


class Calls(ctypes.Structure):
    """`Calls` of kernels_stub.cpp."""

    _fields_ = (
        *((f"{name}s", c_int32) for name in ("append", "prefill", "decode", "dense_decode", "list")),
        ("order", c_int32 * 8),
        *((name, c_int32) for name in ("count", "num_contexts", "context_tokens", "num_seqs", "status")),
        ("append", AppendParams),
        ("prefill", PrefillParams),
        ("decode", DecodeParams),
    )

    def in_order(self) -> list[int]:
        return list(self.order[: self.count])


@pytest.fixture
def calls(stub_library: Path) -> Calls:
    library = ctypes.CDLL(str(stub_library))
    library.stub_calls.restype = ctypes.POINTER(Calls)
    found: Calls = library.stub_calls().contents
    ctypes.memset(ctypes.byref(found), 0, ctypes.sizeof(Calls))
    return found


def step(
    driver: Driver,
    layer: Layer,
    contexts: Sequence[int],
    pasts: Sequence[int],
    *,
    types: Sequence[int] | None = None,
    mapping: Sequence[int] = (0, 0, 1, 1, 0, 1),
    tokens: int | None = None,
    dtype: int = BF16,
    pools: Sequence[int] = POOLS,
) -> int:
    """One step of context sequences of so many tokens, then of generating ones with so many cached tokens before."""
    seqs = len(contexts) + len(pasts)
    if types is None:
        types = [0] * len(contexts) + [1] * len(pasts)
    given = tensors(
        layer, tokens=sum(contexts) + len(pasts) if tokens is None else tokens, seqs=seqs, pools=2, max_blocks=40,
        layers=len(mapping) // 2, dtype=dtype,
    )  # fmt: skip
    host: list[Any] = [
        (c_int32 * seqs)(*contexts, *[17] * len(pasts)),
        (c_int32 * seqs)(*types),
        (c_int32 * seqs)(*[9999] * len(contexts), *pasts),  # of context sequences not the past: never to be used
        (c_int64 * 4)(*pools),
        (c_int32 * len(mapping))(*mapping),
    ]
    lengths, request_types, past, pointers, mapped = (ctypes.addressof(array) for array in host)
    inputs = [DEVICE[name] for name in ("q", "k", "v", "inv_freq", "rope_scale", "lengths", "context")]
    inputs += [lengths, request_types, past, DEVICE["offsets"], pointers, mapped, DEVICE["q_norm"], DEVICE["k_norm"]]
    plugin = driver.create(layer, RUNTIME)
    assert plugin is not None
    attached = plugin.attach()
    assert attached.call("change_shapes", given) == 0
    return attached.enqueue(given, inputs[: given.inputs], DEVICE["out"], DEVICE["workspace"])


def check_pool(pool: Any, seqs: int, first: int) -> None:
    """Layer 1 is the second layer of the second pool."""
    assert (pool.primary, pool.secondary) == (POOLS[2] + 2 * BLOCK, POOLS[3] + 2 * BLOCK)
    assert pool.offsets == DEVICE["offsets"] + 4 * (1 * seqs + first) * 2 * 40
    assert (pool.max_blocks, pool.tokens_per_block, pool.head_dim) == (40, 32, 128)
    assert (pool.num_kv_heads, pool.heads_per_block) == (2, 2)


def test_a_mixed_batch(stub_driver: Driver, calls: Calls) -> None:
    assert step(stub_driver, SPARSE, [100, 7], [300, 70, 999]) == 0
    assert calls.in_order() == [LIST, APPEND, PREFILL, DECODE]
    assert (calls.num_contexts, calls.context_tokens, calls.num_seqs) == (2, 107, 5)

    append = calls.append
    assert [append.q, append.k, append.v] == [DEVICE["q"], DEVICE["k"], DEVICE["v"]]
    assert (append.q_token_stride, append.k_token_stride, append.v_token_stride) == (1024, 256, 256)
    assert (append.inv_freq, append.rope_scale) == (DEVICE["inv_freq"], DEVICE["rope_scale"])
    assert (append.num_tokens, append.num_q_heads, append.q_norm, append.k_norm) == (110, 8, None, None)
    assert (append.labels.kind, append.labels.n_tip, append.labels.labels) == (0, 16, None)
    check_pool(append.pool, 5, 0)
    assert append.q_out == DEVICE["workspace"]
    assert append.sequence == append.q_out + 600 * ROW
    assert append.position == append.sequence + 2560  # 600 numbers of 4 bytes, rounded up to 256

    prefill = calls.prefill
    assert (prefill.q, prefill.out, prefill.q_token_stride) == (append.q_out, DEVICE["out"], 1024)
    assert (prefill.query_lengths, prefill.lengths) == (DEVICE["context"], DEVICE["lengths"])
    assert (prefill.num_seqs, prefill.num_tokens, prefill.num_q_heads) == (2, 107, 8)
    assert (prefill.scale, prefill.softcap, prefill.window) == (0.125, 0, 0)
    check_pool(prefill.pool, 5, 0)

    decode = calls.decode
    assert (decode.q, decode.out) == (append.q_out + 107 * ROW, DEVICE["out"] + 107 * ROW)
    assert decode.lengths == DEVICE["lengths"] + 4 * 2
    assert (decode.num_seqs, decode.num_q_heads) == (3, 8)
    assert (decode.max_length, decode.dense_below) == (1000, 0)
    assert (decode.budget, decode.sink, decode.recent, decode.reduction) == (64, 4, 16, 0)
    assert (decode.scale, decode.softcap, decode.window) == (0.125, 0, 0)
    assert (decode.labels.kind, decode.labels.n_tip) == (0, 16)
    check_pool(decode.pool, 5, 2)
    assert decode.workspace == prefill.workspace == append.position + 2560
    assert decode.workspace_bytes == prefill.workspace_bytes > 0


def test_the_whole_workspace_is_used_and_no_more(stub_driver: Driver, calls: Calls) -> None:
    assert step(stub_driver, SPARSE, [], [5]) == 0
    plugin = stub_driver.create(SPARSE)
    assert plugin is not None
    size = plugin.call("workspace", tensors(SPARSE))
    assert calls.decode.workspace + calls.decode.workspace_bytes == DEVICE["workspace"] + size


def test_only_context(stub_driver: Driver, calls: Calls) -> None:
    assert step(stub_driver, SPARSE, [599, 1], []) == 0
    assert calls.in_order() == [LIST, APPEND, PREFILL]


def test_only_generation(stub_driver: Driver, calls: Calls) -> None:
    assert step(stub_driver, SPARSE, [], [63], dtype=HALF) == 0
    assert calls.in_order() == [LIST, APPEND, DECODE]
    assert calls.decode.pool.dtype == calls.append.pool.dtype == 0  # float16
    check_pool(calls.decode.pool, 1, 0)


def test_nobody(stub_driver: Driver, calls: Calls) -> None:
    assert step(stub_driver, SPARSE, [], [], tokens=0) == 0
    assert calls.in_order() == []


def test_a_dense_layer(stub_driver: Driver, calls: Calls) -> None:
    assert step(stub_driver, DENSE, [10], [63]) == 0
    assert calls.in_order() == [LIST, APPEND, PREFILL, DENSE_DECODE]
    assert (calls.decode.window, calls.prefill.window, calls.decode.max_length) == (100, 100, 1000)
    assert (calls.append.labels.kind, calls.append.labels.n_tip) == (0, 0)


@pytest.mark.parametrize(("kind", "width"), [(1, 32), (2, 64), (3, 64)])
def test_a_label_head(stub_driver: Driver, calls: Calls, kind: int, width: int) -> None:
    """Blocks have a third head: layer 1 is the second of its pool, after two blocks of bytes."""
    assert step(stub_driver, {**SPARSE, "label_kind": kind, "n_tip": 32}, [10], [63]) == 0
    block, head, row = BLOCK * 3 // 2, BLOCK // 2, 128 * 2
    for call in (calls.append, calls.prefill, calls.decode):
        assert (call.pool.primary, call.pool.secondary) == (POOLS[2] + 2 * block, POOLS[3] + 2 * block)
        assert (call.pool.num_kv_heads, call.pool.heads_per_block) == (2, 3)
    for labels in (calls.append.labels, calls.decode.labels):
        assert (labels.kind, labels.n_tip, labels.offset_divisor) == (kind, 32, 1)
        assert labels.labels == POOLS[2] + 2 * block + 2 * head
        assert labels.scales == labels.labels + block
        assert labels.secondary_distance == POOLS[3] - POOLS[2]
        strides = (labels.label_block_stride, labels.label_token_stride, labels.label_head_stride)
        assert strides == (block, row, width)
        assert (labels.scale_block_stride, labels.scale_token_stride, labels.scale_head_stride) == (block, row, 2)


def test_labels_without_a_host_pool(stub_driver: Driver, calls: Calls) -> None:
    layer = {**SPARSE, "label_kind": 1}
    assert step(stub_driver, layer, [], [5], mapping=(0, 1, 0, 0), pools=[POOLS[0], 0, 0, 0]) == 0
    assert (calls.decode.pool.secondary, calls.decode.labels.secondary_distance) == (None, 0)


def test_head_norms_and_attributes_reach_the_kernels(stub_driver: Driver, calls: Calls) -> None:
    layer = {**SPARSE, "has_qk_norm": 1, "norm_eps": 0.25, "softcap": 3.0, "dense_below": -1, "reduction": 2}
    assert step(stub_driver, layer, [10], [63]) == 0
    assert (calls.append.q_norm, calls.append.k_norm) == (DEVICE["q_norm"], DEVICE["k_norm"])
    assert calls.append.norm_eps == 0.25
    assert (calls.decode.softcap, calls.prefill.softcap) == (3, 3)
    assert (calls.decode.dense_below, calls.decode.reduction) == (-1, 2)


def test_the_host_pool_may_be_missing(stub_driver: Driver, calls: Calls) -> None:
    assert step(stub_driver, SPARSE, [], [5], mapping=(0, 1, 0, 0), pools=[POOLS[0], 0, 0, 0]) == 0
    assert (calls.decode.pool.primary, calls.decode.pool.secondary) == (POOLS[0], None)
    assert calls.decode.pool.offsets == DEVICE["offsets"]


WRONG: dict[str, tuple[list[int], list[int], dict[str, Any], str]] = {
    "order": ([3], [5], {"types": [1, 0]}, "context sequences, which come first"),
    "kind": ([3], [5], {"types": [0, 2]}, "context sequences, which come first"),
    "sum": ([3], [5], {"tokens": 5}, "do not add up to the tokens"),
    "tokens": ([601], [], {}, "more tokens or sequences than the engine was built for"),
    "sequences": ([], [1] * 7, {}, "more tokens or sequences than the engine was built for"),
    "layer": ([], [5], {"mapping": (0, 0)}, "has no row for the layer"),
    "pool": ([], [5], {"mapping": (0, 0, 2, 0)}, "names a pool or a layer that is not there"),
    "layer of pool": ([], [5], {"mapping": (0, 0, 0, 3)}, "names a pool or a layer that is not there"),
    "no pool": ([], [5], {"pools": [POOLS[0], 0, 0, 0]}, "has no pool on the GPU"),
}


@pytest.mark.parametrize("case", WRONG)
def test_steps_that_cannot_be_are_refused(
    stub_driver: Driver, calls: Calls, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    contexts, pasts, changes, message = WRONG[case]
    assert step(stub_driver, SPARSE, contexts, pasts, **changes) != 0
    error = capfd.readouterr().err
    assert error.startswith("[fasa] FasaAttention: layer 1: ")
    assert message in error
    assert calls.in_order() == []


@pytest.mark.parametrize(("status", "message"), [(1, "the stub refuses"), (4, "no kernel image")])
def test_a_kernel_that_fails_stops_the_step(
    stub_driver: Driver, calls: Calls, capfd: pytest.CaptureFixture[str], status: int, message: str
) -> None:
    calls.status = status
    assert step(stub_driver, SPARSE, [3], [5]) != 0
    assert calls.in_order() == [LIST, APPEND]
    assert capfd.readouterr().err == f"[fasa] FasaAttention: layer 1: {message}\n"
