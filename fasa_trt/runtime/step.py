"""What the engine is to compute next, as the arrays that it is bound to."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fasa_trt.core.contract import CONTEXT, GENERATION
from fasa_trt.runtime.blocks import BlockAllocator
from fasa_trt.runtime.sequence import Sequence

Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Row:
    """The `count` tokens of a sequence that follow those in the cache."""

    sequence: Sequence
    count: int

    @property
    def end(self) -> int:
        return self.sequence.computed + self.count

    @property
    def yields(self) -> bool:
        """Whether a token is sampled after this row: not after a chunk of the context that is not the last one."""
        return self.end >= self.sequence.context


@dataclass(frozen=True)
class Step:
    """A batch of S rows and T packed tokens, context rows first. Arrays are int32, named as in `core/contract.py`.

    input_ids, position_ids: [T]
    last_token_ids: [S], the inclusive scan of tokens a row, so that a row's last token is at value - 1
    context_lengths: [S], of a context row the tokens of its chunk, else the tokens that were computed as context
    sequence_length: [S], tokens in the cache after this step
    host_past_key_value_lengths: [S], of a context row the same as sequence_length, else one less
    host_request_types: [S], 0 context, 1 generation
    kv_cache_block_offsets: [pools, S, 2, max_blocks]; zero past the last block of a row
    logit_rows: [L], rows of the logits [S, vocab] to sample from, ascending; the scheduler wants one token for each
    """

    requests: tuple[int, ...]
    input_ids: Int32
    position_ids: Int32
    last_token_ids: Int32
    context_lengths: Int32
    sequence_length: Int32
    host_past_key_value_lengths: Int32
    host_request_types: Int32
    kv_cache_block_offsets: Int32
    logit_rows: Int32

    @property
    def num_context_rows(self) -> int:
        return int((self.host_request_types == CONTEXT).sum())


def pack(context: Rows[Row], generation: Rows[Row], allocator: BlockAllocator, max_blocks: int) -> Step:
    """The arrays of context rows and, after them, generation rows. max_blocks: columns of the block table."""
    rows = [*context, *generation]
    kinds = np.repeat(np.asarray([CONTEXT, GENERATION], np.int32), [len(context), len(generation)])
    counts = np.asarray([row.count for row in rows], np.int32)
    ends = np.asarray([row.end for row in rows], np.int32)
    offsets = np.zeros((allocator.num_pools, len(rows), 2, max_blocks), np.int32)
    for i, row in enumerate(rows):
        allocator.fill_offsets(row.sequence.id, offsets[:, i])
    tokens = [token for row in rows for token in row.sequence.tokens[row.sequence.computed : row.end]]
    return Step(
        requests=tuple(row.sequence.id for row in rows),
        input_ids=np.asarray(tokens, np.int32),
        position_ids=np.concatenate([np.arange(row.sequence.computed, row.end, dtype=np.int32) for row in rows]),
        last_token_ids=np.cumsum(counts, dtype=np.int32),
        context_lengths=np.asarray([row.count for row in context] + [r.sequence.context for r in generation], np.int32),
        sequence_length=ends,
        host_past_key_value_lengths=ends - kinds,
        host_request_types=kinds,
        kv_cache_block_offsets=offsets,
        logit_rows=np.flatnonzero([row.yields for row in rows]).astype(np.int32),
    )
