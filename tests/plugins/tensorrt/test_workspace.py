"""The workspace that the plugin asks for when an engine is built is enough for every step of every batch. The kernels
say what they need on this machine's GPU; without one, for a GPU without multiprocessors."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from fasa_trt.plugins.torch.structs import DecodeParams, Labels, Pool, PrefillParams, declare
from tests.plugins.tensorrt.driver import Driver
from tests.plugins.tensorrt.layers import SPARSE, tensors

LAYERS: dict[str, dict[str, Any]] = {
    "small": {},
    "long": {"max_seq_len": 131_072, "max_batch_size": 8},
    "many": {"max_seq_len": 9000, "max_batch_size": 300, "max_num_tokens": 8192},
    "tokens": {"max_seq_len": 9000, "max_batch_size": 64, "max_num_tokens": 64 * 128},
    "mean": {"max_seq_len": 131_072, "max_batch_size": 40, "reduction": 2, "num_q_heads": 32, "num_kv_heads": 8},
    "labels": {"max_seq_len": 131_072, "max_batch_size": 40, "label_kind": 1},
    "mean, labels": {
        "max_seq_len": 131_072,
        "max_batch_size": 40,
        "reduction": 2,
        "num_q_heads": 32,
        "num_kv_heads": 8,
        "label_kind": 1,
    },
    "max": {"max_seq_len": 20_000, "max_batch_size": 3, "reduction": 3, "num_q_heads": 32, "num_kv_heads": 2},
    "per head": {"max_seq_len": 20_000, "max_batch_size": 3, "reduction": 1, "num_q_heads": 32, "num_kv_heads": 32},
    "dense": {"max_seq_len": 131_072, "max_batch_size": 70, "n_tip": 0},
    "window": {"max_seq_len": 131_072, "max_batch_size": 70, "n_tip": 0, "window": 4096},
}


def needs(kernels: ctypes.CDLL, layer: dict[str, Any], seqs: int, tokens: int) -> int:
    """Bytes beside what the plugin itself keeps for `tokens` tokens, of a step of `seqs` sequences."""
    pool = Pool(
        max_blocks=1, tokens_per_block=layer["tokens_per_block"], num_kv_heads=layer["num_kv_heads"],
        head_dim=layer["head_dim"],
    )  # fmt: skip
    labels = Labels(kind=layer["label_kind"], n_tip=layer["n_tip"], labels=1 << 20, offset_divisor=1)
    decode = DecodeParams(
        num_seqs=seqs, num_q_heads=layer["num_q_heads"], max_length=layer["max_seq_len"],
        budget=layer["budget"], sink=layer["sink"], recent=layer["recent"], scale=1.0, window=layer["window"],
        reduction=layer["reduction"], pool=pool, labels=labels,
    )  # fmt: skip
    prefill = PrefillParams(
        q_token_stride=layer["num_q_heads"] * layer["head_dim"], num_seqs=seqs, num_tokens=tokens,
        num_q_heads=layer["num_q_heads"], scale=1.0, window=layer["window"], pool=pool,
    )  # fmt: skip
    of_decode = kernels.fasa_decode_workspace if layer["n_tip"] else kernels.fasa_dense_decode_workspace
    for_decode, for_prefill = of_decode(ctypes.byref(decode)), kernels.fasa_prefill_workspace(ctypes.byref(prefill))
    assert for_prefill
    assert for_decode or not layer["n_tip"]
    return int(max(for_decode, for_prefill))


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_enough(driver: Driver, plugin_library: Path, name: str) -> None:
    layer = {**SPARSE, **LAYERS[name]}
    plugin = driver.create(layer)
    assert plugin is not None
    kernels, most = declare(ctypes.CDLL(str(plugin_library))), layer["max_num_tokens"]
    scratch = most * (layer["num_q_heads"] * layer["head_dim"] * 2 + 2 * 4)
    left = plugin.call("workspace", tensors(layer)) - scratch
    largest = 0
    for seqs in range(1, layer["max_batch_size"] + 1):
        for tokens in {most, min(most, 128 * seqs - 1), min(most, 128 * seqs), seqs}:
            largest = max(largest, needs(kernels, layer, seqs, tokens))
    assert largest <= left
    assert left < 60 << 20 or left < 4 * largest  # and not absurdly much
