"""Memory behind an engine's bindings, at addresses that never change, so that CUDA graphs can be replayed over it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasa_trt.core.contract import FASA_INPUTS, GENERATION, KEYS, LOGITS, VALUES, EngineLimits, block_offset
from fasa_trt.runtime.device_memory import Device
from fasa_trt.runtime.kv_pool import KvPool, PoolLayout
from fasa_trt.runtime.step import Step

PADDING_LENGTH = 2  # tokens of a row that fills the batch up: one of context, and the one that it decodes


class StepBindings:
    """Host arrays for all inputs of a step, copies of some of them in GPU memory, and the logits.

    A step's arrays are overwritten by the next step's: whoever uploads them synchronises before that.
    """

    def __init__(self, device: Device, limits: EngineLimits, layout: PoolLayout, pool: KvPool, vocab_size: int) -> None:
        self.device, self.vocab_size = device, vocab_size
        self._scratch = [block_offset(pool.scratch, KEYS, layers) for layers in layout.layers_in_pool]
        sizes = {
            "tokens": limits.max_num_tokens,
            "sequences": limits.max_batch_size,
            "num_logits": limits.max_batch_size,
            "pools": len(layout.layers),
            "max_blocks": limits.max_blocks,
            "layers": len(pool.mapping),
        }
        self._host: dict[str, NDArray[Any]] = {}
        self._device: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for binding in FASA_INPUTS:
            shape = tuple(int(size) for size in binding.shape_of(**sizes))
            self._host[binding.name] = device.pinned((int(np.prod(shape)),), binding.dtype)
            if binding.memory == "gpu":
                self._device[binding.name] = device.allocate(self._host[binding.name].nbytes, "an engine's input")
        self._write("host_kv_cache_pool_pointers", pool.pointers)
        self._write("host_kv_cache_pool_mapping", pool.mapping)
        item = np.dtype(LOGITS.dtype).itemsize
        self.logits = device.allocate(limits.max_batch_size * vocab_size * item, "the logits")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all inputs, as last written."""
        return dict(self._shapes)

    def addresses(self) -> dict[str, int]:
        """Of all inputs, on the GPU or the host as the contract says, and of the logits."""
        host = {name: array.ctypes.data for name, array in self._host.items()}
        return {**host, **self._device, LOGITS.name: self.logits}

    def write(self, step: Step, rows: int) -> None:
        """Puts a step into the host arrays and enqueues the uploads.

        rows: of the engine's batch. Those beyond the step's own decode a token in the spare block.
        """
        more = rows - len(step.requests)
        last = int(step.last_token_ids[-1])
        context = _padded(step.context_lengths, more, PADDING_LENGTH - 1)
        self._write("input_ids", _padded(step.input_ids, more, 0))
        self._write("last_token_ids", np.append(step.last_token_ids, np.arange(last + 1, last + 1 + more)))
        self._write("context_lengths", context)
        self._write("host_context_lengths", context)
        self._write("sequence_length", _padded(step.sequence_length, more, PADDING_LENGTH))
        self._write("host_past_key_value_lengths", _padded(step.host_past_key_value_lengths, more, PADDING_LENGTH - 1))
        self._write("host_request_types", _padded(step.host_request_types, more, GENERATION))
        offsets = step.kv_cache_block_offsets
        if more:
            spare = np.zeros((offsets.shape[0], more, *offsets.shape[2:]), np.int32)
            for pool, keys in enumerate(self._scratch):
                spare[pool, :, KEYS], spare[pool, :, VALUES] = keys, keys + VALUES - KEYS
            offsets = np.concatenate([offsets, spare], axis=1)
        self._write("kv_cache_block_offsets", offsets)
        for name, target in self._device.items():
            self.device.upload(target, self._host[name][: int(np.prod(self._shapes[name]))])

    def _write(self, name: str, value: NDArray[Any]) -> None:
        self._host[name][: value.size] = value.ravel()
        self._shapes[name] = value.shape


def _padded(values: NDArray[np.int32], more: int, value: int) -> NDArray[np.int32]:
    return np.append(values, np.full(more, value, np.int32))
