"""The paged KV pools in GPU memory, laid out as `core/contract.py` has them.

Layers with equally many KV heads share a pool, the first layer's first. All pools have the same blocks, and one block
more than the allocator knows: rows that only fill a batch up write there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fasa_trt.core.contract import block_bytes
from fasa_trt.core.errors import FasaError
from fasa_trt.runtime.device_memory import Device

ITEM_SIZES = {"float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class PoolLayout:
    """num_kv_heads, layers: of each pool, the heads of a layer and its layers. item_size: bytes of an element."""

    num_kv_heads: tuple[int, ...]
    layers: tuple[tuple[int, ...], ...]
    head_dim: int
    item_size: int
    tokens_per_block: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> PoolLayout:
        """As a plugin engine's config.json tells. Raises FasaError when it does not."""
        try:
            model = config["pretrained_config"]
            count = int(model["num_hidden_layers"])
            heads = [int(n) for n in model.get("num_kv_heads_per_layer") or [model["num_key_value_heads"]] * count]
            head_dim, item_size = int(model["head_size"]), ITEM_SIZES[model["dtype"]]
            tokens_per_block = int(config["build_config"]["plugin_config"]["tokens_per_block"])
        except (KeyError, TypeError, ValueError) as error:
            raise FasaError(f"config.json does not describe a paged KV cache: {error}", hint="build again") from None
        kinds = tuple(dict.fromkeys(heads))
        layers = tuple(tuple(i for i, n in enumerate(heads) if n == kind) for kind in kinds)
        return cls(kinds, layers, head_dim, item_size, tokens_per_block)

    @property
    def layers_in_pool(self) -> tuple[int, ...]:
        return tuple(map(len, self.layers))

    def pool_block_bytes(self, pool: int) -> int:
        """Keys and values of all layers of a pool in one block."""
        row = block_bytes(self.tokens_per_block, self.num_kv_heads[pool], self.head_dim, self.item_size)
        return 2 * len(self.layers[pool]) * row

    @property
    def bytes_per_block(self) -> int:
        return sum(map(self.pool_block_bytes, range(len(self.layers))))

    def blocks_within(self, size: int) -> int:
        """Blocks for the allocator that fit into `size` bytes."""
        return size // self.bytes_per_block - 1


@dataclass(frozen=True)
class KvPool:
    """pointers: int64 [pools, 2]; mapping: int32 [layers, 2], pool and layer inside it. scratch: the spare block."""

    pointers: np.ndarray[Any, np.dtype[np.int64]]
    mapping: np.ndarray[Any, np.dtype[np.int32]]
    num_blocks: int
    num_bytes: int

    @property
    def scratch(self) -> int:
        return self.num_blocks


def allocate_pool(device: Device, layout: PoolLayout, num_blocks: int) -> KvPool:
    """Raises FasaError when the GPU has too little memory."""
    pools = range(len(layout.layers))
    sizes = [(num_blocks + 1) * layout.pool_block_bytes(pool) for pool in pools]
    pointers = [[device.allocate(size, "the KV cache"), 0] for size in sizes]
    mapping = np.zeros((sum(layout.layers_in_pool), 2), np.int32)
    for pool in pools:
        for place, layer in enumerate(layout.layers[pool]):
            mapping[layer] = pool, place
    return KvPool(np.asarray(pointers, np.int64), mapping, num_blocks, sum(sizes))
