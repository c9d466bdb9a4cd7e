"""TensorRT-LLM's bindings and the layout of its KV pool."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fasa_trt.core import contract
from fasa_trt.core.contract import FASA_INPUTS, INPUTS, LOGITS, EngineLimits
from fasa_trt.core.errors import FasaError


def test_the_table() -> None:
    assert [binding.name for binding in FASA_INPUTS] == [
        "input_ids",
        "last_token_ids",
        "context_lengths",
        "host_context_lengths",
        "sequence_length",
        "host_past_key_value_lengths",
        "host_request_types",
        "kv_cache_block_offsets",
        "host_kv_cache_pool_pointers",
        "host_kv_cache_pool_mapping",
    ]
    for binding in INPUTS.values():
        assert binding.dtype in ("int32", "int64")
        assert binding.name.startswith("host_") == (binding.memory != "gpu")
    assert (LOGITS.name, LOGITS.dtype) == ("logits", "float32")


def test_shapes_are_filled_in() -> None:
    assert INPUTS["host_kv_cache_pool_mapping"].shape_of(layers=7) == (7, 2)
    assert INPUTS["kv_cache_block_offsets"].shape_of(layers=7) == ("pools", "sequences", 2, "max_blocks")
    assert LOGITS.shape_of(vocab_padded=100) == ("num_logits", 100)


def test_every_open_size_has_a_range() -> None:
    limits = EngineLimits(max_batch_size=4, max_num_tokens=64, max_seq_len=100, tokens_per_block=16)
    ranges = limits.ranges(num_layers=3)
    named = {axis for binding in FASA_INPUTS for axis in binding.shape_of(layers=3) if isinstance(axis, str)}
    assert named == set(ranges)
    assert ranges["max_blocks"] == (1, 7, 7)
    assert all(low <= tuned <= high for low, tuned, high in ranges.values())


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((0, 8, 8), "max_batch_size must be at least 1"),
        ((1, 7, 8, 8), "max_num_tokens 7 is below 8"),
        ((1, 0, 8), "max_num_tokens must be at least 1"),
        ((1, 8, 0), "max_seq_len must be at least 1"),
        ((9, 39, 8), r"max_num_tokens 39 is below 40, which is max_batch_size - 1 \+ tokens_per_block, 9 - 1 \+ 32"),
        ((1, 8, 8, 24), "tokens_per_block 24 is not possible"),
        ((1, 8, 8, 4), "tokens_per_block 4 is not possible"),
    ],
)
def test_impossible_limits_are_refused(limits: tuple[int, ...], message: str) -> None:
    with pytest.raises(FasaError, match=message):
        EngineLimits(*limits)


def test_the_smallest_step_has_room_for_a_block_beside_the_others() -> None:
    assert contract.least_num_tokens(9, 32) == 40
    assert EngineLimits(9, 40, 8).max_num_tokens == 40


def test_padded_vocab() -> None:
    assert contract.padded_vocab(97) == 97
    assert contract.padded_vocab(97, tp_size=4) == 100
    assert contract.padded_vocab(100, tp_size=4) == 100


def test_past_length() -> None:
    """A context chunk of 5 that ends at 12; a token generated at 12, its prompt of 5 long past."""
    assert contract.past_length(contract.CONTEXT, 12, 5) == 7
    assert contract.past_length(contract.GENERATION, 12, 5) == 11


def test_addresses_agree_with_numpy_strides() -> None:
    blocks, layers, heads, tokens, head_dim = 5, 3, 2, 8, 4
    pool = np.zeros((blocks, layers, 2, heads, tokens, head_dim), np.float16)
    size = contract.block_bytes(tokens, heads, head_dim, pool.itemsize)
    for block, layer, kind in itertools.product(range(blocks), range(layers), (contract.KEYS, contract.VALUES)):
        base = contract.layer_base(pool.ctypes.data, layer, size)
        offset = contract.block_offset(block, kind, layers)
        assert contract.block_address(base, offset, size) == pool[block, layer, kind].ctypes.data


def test_the_highest_bit_names_the_pool_and_is_no_part_of_the_number() -> None:
    as_unsigned = 6 | 1 << 31
    as_signed = int(np.uint32(as_unsigned).astype(np.int32))
    for offset in (as_unsigned, as_signed):
        assert contract.in_secondary_pool(offset)
        assert contract.block_address(1000, offset, 10) == 1060
    assert not contract.in_secondary_pool(6)
