"""What TensorRT-LLM 1.2.x binds to an engine, as data: the exporter, the runtimes and the tests read it here.

Decoder only, packed input, paged KV cache, in-flight batching. Read from its sources: `runtime/tllmRuntime.cpp`,
`batch_manager/transformerBuffers.cpp`, `batch_manager/kvCacheManager.cpp`, `kernels/kvCacheUtils.h` and
`models/generation_mixin.py`. An engine may declare any subset of the inputs, and no others.

Sizes by name: `sequences` in a step, context requests before generation requests; `tokens`, packed: a chunk of each
context request, then one token of each generation request; `num_logits` rows of logits; `pools` of KV blocks;
`max_blocks` columns of block offsets; `layers` of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fasa_trt.core.errors import FasaError

Memory = Literal["gpu", "host", "pinned"]
Range = tuple[int, int, int]  # smallest, tuned for, largest

CONTEXT, GENERATION = 0, 1  # values of host_request_types
KEYS, VALUES = 0, 1  # third axis of the KV pool and of kv_cache_block_offsets
SECONDARY = 1 << 31  # of a block offset: the block lies in the host's pool
TOKENS_PER_BLOCK = 32  # TensorRT-LLM's default
MAX_NUM_TOKENS = 8192  # the same
# The last release of TensorRT-LLM that runs engines, and the TensorRT inside it: a plan loads in no other.
TRTLLM_VERSION, TRTLLM_TENSORRT = (1, 2, 1), (10, 14, 1)


@dataclass(frozen=True)
class Binding:
    """One tensor that a runtime binds to the engine.

    memory: where its pointer leads. "host" and "pinned" ones are declared like any other, but only a plugin may read
    them. fasa: whether this project's engines declare it.
    """

    name: str
    dtype: str
    shape: tuple[str | int, ...]
    memory: Memory
    fasa: bool
    meaning: str

    def shape_of(self, **sizes: int) -> tuple[str | int, ...]:
        """The shape with the named sizes filled in."""
        return tuple(sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in self.shape)


_OFFSETS = ("pools", "sequences", 2, "max_blocks")
INPUTS: Mapping[str, Binding] = {
    binding.name: binding
    for binding in (
        Binding("input_ids", "int32", ("tokens",), "gpu", True, "the tokens of this step"),
        # FASA's engines know positions from sequence_length; TensorRT warns of inputs that nothing reads.
        Binding("position_ids", "int32", ("tokens",), "gpu", False, "their positions"),
        Binding("last_token_ids", "int32", ("num_logits",), "gpu", True, "running sum of the sequences' tokens"),
        Binding("context_lengths", "int32", ("sequences",), "gpu", True, "context: of this chunk; else of the prompt"),
        Binding("host_context_lengths", "int32", ("sequences",), "host", True, "the same"),
        Binding("sequence_length", "int32", ("sequences",), "gpu", True, "cached tokens after this step"),
        # Rounded up while a CUDA graph is captured, and for context requests not the past: see `past_length`.
        Binding(
            "host_past_key_value_lengths",
            "int32",
            ("sequences",),
            "host",
            True,
            "context: sequence_length; generation: sequence_length - 1",
        ),
        Binding("host_request_types", "int32", ("sequences",), "host", True, "0 context, 1 generation"),
        Binding("host_max_attention_window_sizes", "int32", ("layers",), "host", False, "window of each layer"),
        Binding("host_sink_token_length", "int32", (1,), "host", False, "sink tokens of a cyclic cache"),
        Binding("kv_cache_block_offsets", "int32", _OFFSETS, "gpu", True, "see `block_address`; unused columns stale"),
        Binding("host_kv_cache_block_offsets", "int32", _OFFSETS, "pinned", False, "the same"),
        Binding("host_kv_cache_pool_pointers", "int64", ("pools", 2), "host", True, "GPU pool; host pool or 0; static"),
        Binding("host_kv_cache_pool_mapping", "int32", ("layers", 2), "host", True, "pool, layer inside it; static"),
        Binding("cache_indirection", "int32", ("sequences", "beams", "max_seq_len"), "gpu", False, "beam search"),
        Binding("host_runtime_perf_knobs", "int64", (16,), "host", False, "switches of its own kernels; static"),
        Binding("host_context_progress", "int64", (1,), "host", False, "0 without layer-wise transfer"),
    )
}
FASA_INPUTS: tuple[Binding, ...] = tuple(binding for binding in INPUTS.values() if binding.fasa)
# The only output: keys and values are written into the pool.
LOGITS = Binding("logits", "float32", ("num_logits", "vocab_padded"), "gpu", True, "of the rows of last_token_ids")


def padded_vocab(vocab_size: int, tp_size: int = 1) -> int:
    """Columns of `logits`: the runtime rounds up to the number of GPUs, to nothing else."""
    return -(-vocab_size // tp_size) * tp_size


def new_tokens(request_type: int, context_length: int) -> int:
    """Tokens of a sequence in this step."""
    return context_length if request_type == CONTEXT else 1


def past_length(request_type: int, sequence_length: int, context_length: int) -> int:
    """Tokens of a sequence that were cached before this step: earlier chunks and reused blocks, too."""
    return sequence_length - new_tokens(request_type, context_length)


def least_num_tokens(max_batch_size: int, tokens_per_block: int) -> int:
    """The smallest `max_num_tokens` with which every sequence gets on; see `EngineLimits`."""
    return max_batch_size - 1 + tokens_per_block


@dataclass(frozen=True)
class EngineLimits:
    """Sizes that an engine is built for.

    max_batch_size: sequences in a step. max_num_tokens: packed tokens in a step. max_seq_len: tokens of a sequence,
    prompt and answer. tokens_per_block: of the KV pool. Raises FasaError for sizes that cannot be, and where a step
    has no room for one block of a prompt beside the tokens of all other sequences: chunks of prompts end with blocks,
    so the prompt would wait for as long as the others generate.
    """

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    tokens_per_block: int = TOKENS_PER_BLOCK

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_num_tokens", "max_seq_len"):
            if getattr(self, name) < 1:
                raise FasaError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.tokens_per_block not in (8, 16, 32, 64, 128):
            raise FasaError(
                f"tokens_per_block {self.tokens_per_block} is not possible", hint="one of 8, 16, 32, 64, 128"
            )
        least = least_num_tokens(self.max_batch_size, self.tokens_per_block)
        if self.max_num_tokens < least:
            raise FasaError(
                f"max_num_tokens {self.max_num_tokens} is below {least}, which is max_batch_size - 1 + "
                f"tokens_per_block, {self.max_batch_size} - 1 + {self.tokens_per_block}",
                hint="a step must have room for a block of a prompt beside one token of each other sequence",
            )

    @property
    def max_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_seq_len // self.tokens_per_block)

    def ranges(self, num_layers: int) -> dict[str, Range]:
        """Of every named size that changes from step to step or from run to run, for an optimisation profile.

        Decoding a full batch is what an engine does most.
        """
        batch = self.max_batch_size
        return {
            "tokens": (1, batch, self.max_num_tokens),
            "sequences": (1, batch, batch),
            "num_logits": (1, batch, batch),
            "pools": (1, 1, num_layers),  # layers that differ in KV heads or in the runtime's window lie in several
            "max_blocks": (1, self.max_blocks, self.max_blocks),
        }


# The KV pool: contiguous, [blocks, layers of the pool, 2 (keys, values), KV heads, tokens per block, head_dim].


def block_bytes(tokens_per_block: int, num_kv_heads: int, head_dim: int, item_size: int) -> int:
    """Bytes of the keys, or of the values, that one layer has in one block."""
    return tokens_per_block * num_kv_heads * head_dim * item_size


def block_offset(block: int, kind: int, layers_in_pool: int) -> int:
    """The entry of `kv_cache_block_offsets` for the `kind` (KEYS or VALUES) of a block in the GPU pool."""
    return block * layers_in_pool * 2 + kind


def layer_base(pool_pointer: int, layer_in_pool: int, bytes_per_block: int) -> int:
    """The address from which a layer's offsets count. bytes_per_block: as `block_bytes` gives."""
    return pool_pointer + layer_in_pool * 2 * bytes_per_block


def in_secondary_pool(offset: int) -> bool:
    """Whether an offset, read as int32 or as uint32, counts from the host's pool."""
    return bool(offset & SECONDARY)


def block_address(base: int, offset: int, bytes_per_block: int) -> int:
    """The address of [KV heads, tokens per block, head_dim] elements. base: `layer_base` of the offset's pool."""
    return base + (offset & (SECONDARY - 1)) * bytes_per_block
